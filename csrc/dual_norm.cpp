#include "row_op.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;

constexpr int64_t kNoKey = -1;

Pipeline normed(T x, OptionalT weight, double eps, int64_t flags, int64_t key, OptionalT given,
                OptionalT zero_point = {}) {
  Pipeline p = pipeline_of(x);
  p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
  if (key != kNoKey) set_key(p, key, given, zero_point);
  STD_TORCH_CHECK(key != kNoKey || !(given || zero_point), "given, zero_point: this result isn't quantized");
  return p;
}

std::tuple<Tensor, Tensor> fresh(Pipeline& p, T like, int64_t key) {
  if (key != kNoKey) return new_quantized(p, like);
  const int64_t none = 0, one = 1;
  Tensor y = empty_rows(like, p.cols, p.dtype, p.y);
  return {std::move(y), empty_strided(1, &none, &one, ScalarType::Float, p.x.device)};
}

void set_given(Pipeline& p, T like, int64_t key, OptionalT data, OptionalT scale, OptionalT zero_point,
               OptionalT unquantized) {
  if (key != kNoKey) return set_quantized(p, like, data, scale, zero_point, unquantized);
  STD_TORCH_CHECK(!zero_point && !unquantized, "zero_point_out, unquantized_out: this result isn't quantized");
  if (data) p.y = rows_like(*data, "output", like, p.cols, p.dtype);
}

void check_rows(T q, T kv) {
  STD_TORCH_CHECK(dtype_of(q) == dtype_of(kv), "kv: expected q's dtype");
  rows_like(kv, "kv", q, kv.size(-1), dtype_of(q));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_rms_norm(T q, T kv, OptionalT q_weight, OptionalT kv_weight,
                                                         double q_eps, double kv_eps, int64_t flags, int64_t q_key,
                                                         int64_t kv_key, OptionalT q_given, OptionalT kv_given) {
  Pipeline a = normed(q, q_weight, q_eps, flags, q_key, q_given);
  Pipeline b = normed(kv, kv_weight, kv_eps, flags, kv_key, kv_given);
  check_rows(q, kv);
  auto [q_data, q_scale] = fresh(a, q, q_key);
  auto [kv_data, kv_scale] = fresh(b, kv, kv_key);
  run(a, b);
  return {std::move(q_data), std::move(q_scale), std::move(kv_data), std::move(kv_scale)};
}

void dual_rms_norm_out(T q, T kv, OptionalT q_weight, OptionalT kv_weight, double q_eps, double kv_eps, int64_t flags,
                       int64_t q_key, int64_t kv_key, OptionalT q_given, OptionalT kv_given, OptionalT q_zero_point,
                       OptionalT kv_zero_point, OptionalT q_data, OptionalT q_scale, OptionalT kv_data,
                       OptionalT kv_scale, OptionalT q_zero_point_out, OptionalT kv_zero_point_out,
                       OptionalT q_unquantized, OptionalT kv_unquantized) {
  Pipeline a = normed(q, q_weight, q_eps, flags, q_key, q_given, q_zero_point);
  Pipeline b = normed(kv, kv_weight, kv_eps, flags, kv_key, kv_given, kv_zero_point);
  check_rows(q, kv);
  set_given(a, q, q_key, q_data, q_scale, q_zero_point_out, q_unquantized);
  set_given(b, kv, kv_key, kv_data, kv_scale, kv_zero_point_out, kv_unquantized);
  check_memory(a);
  check_memory(b);
  check_apart(a, b);
  check_apart(b, a);
  run(a, b);
}

}  // namespace

void implement_dual_norm(Library& m) {
  add_kernel<TORCH_BOX(&dual_rms_norm)>(m, "dual_rms_norm");
  add_kernel<TORCH_BOX(&dual_rms_norm_out)>(m, "dual_rms_norm.out");
}

}  // namespace fused_ops
