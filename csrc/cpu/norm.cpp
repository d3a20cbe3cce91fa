#include "row.h"

namespace fused_ops {
namespace {

Pipeline add_rms_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, double eps, int64_t flags,
                      double x_multiplier) {
  Pipeline p = pipeline_of(x);
  p.load = Pipeline::kAdd;
  p.other = rows_like(residual, "residual", x, p.cols, p.dtype);
  p.x_multiplier = static_cast<float>(x_multiplier);
  set_norm(p, weight, eps, flags);
  return p;
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps, int64_t flags) {
  Pipeline p = pipeline_of(x);
  set_norm(p, weight, eps, flags);
  Tensor y = empty_rows(x, p.cols, p.dtype, p.y);
  run(p, false);
  return y;
}

void rms_norm_out(const Tensor& x, const OptionalTensor& weight, double eps, int64_t flags, const OptionalTensor& y) {
  Pipeline p = pipeline_of(x);
  set_norm(p, weight, eps, flags);
  if (y) p.y = rows_like(*y, "y_out", x, p.cols, p.dtype);
  run(p, true);
}

std::tuple<Tensor, Tensor> fused_add_rms_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                              double eps, int64_t flags) {
  Pipeline p = add_rms_norm(x, residual, weight, eps, flags, 1.0);
  Tensor y = empty_rows(x, p.cols, p.dtype, p.y), sum = empty_rows(x, p.cols, p.dtype, p.sum);
  run(p, false);
  return {std::move(y), std::move(sum)};
}

void fused_add_rms_norm_out(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, double eps,
                            int64_t flags, double x_multiplier, const OptionalTensor& y,
                            const OptionalTensor& residual_out) {
  Pipeline p = add_rms_norm(x, residual, weight, eps, flags, x_multiplier);
  if (y) p.y = rows_like(*y, "y_out", x, p.cols, p.dtype);
  if (residual_out) p.sum = rows_like(*residual_out, "residual_out", x, p.cols, p.dtype);
  run(p, true);
}

std::tuple<Tensor, Tensor> rms_norm_quant(const Tensor& x, const OptionalTensor& weight, double eps, int64_t flags,
                                          int64_t key, const OptionalTensor& given) {
  Pipeline p = pipeline_of(x);
  set_norm(p, weight, eps, flags);
  set_key(p, key, given);
  auto outputs = new_quantized(p, x);
  run(p, false);
  return outputs;
}

void rms_norm_quant_out(const Tensor& x, const OptionalTensor& weight, double eps, int64_t flags, int64_t key,
                        const OptionalTensor& given, const OptionalTensor& zero_point, const OptionalTensor& data,
                        const OptionalTensor& scale, const OptionalTensor& zero_point_out,
                        const OptionalTensor& unquantized) {
  Pipeline p = pipeline_of(x);
  set_norm(p, weight, eps, flags);
  set_key(p, key, given);
  STD_TORCH_CHECK(!zero_point, "zero_point: these keys take none");
  set_outputs(p, x, data, scale, zero_point_out, unquantized);
  run(p, true);
}

std::tuple<Tensor, Tensor, Tensor> fused_add_rms_norm_quant(const Tensor& x, const Tensor& residual,
                                                            const OptionalTensor& weight, double eps, int64_t flags,
                                                            int64_t key, const OptionalTensor& given) {
  Pipeline p = add_rms_norm(x, residual, weight, eps, flags, 1.0);
  set_key(p, key, given);
  auto [data, scale] = new_quantized(p, x);
  Tensor sum = empty_rows(x, p.cols, p.dtype, p.sum);
  run(p, false);
  return {std::move(data), std::move(scale), std::move(sum)};
}

void fused_add_rms_norm_quant_out(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, double eps,
                                  int64_t flags, int64_t key, const OptionalTensor& given,
                                  const OptionalTensor& zero_point, double x_multiplier, const OptionalTensor& data,
                                  const OptionalTensor& scale, const OptionalTensor& residual_out,
                                  const OptionalTensor& zero_point_out, const OptionalTensor& unquantized) {
  Pipeline p = add_rms_norm(x, residual, weight, eps, flags, x_multiplier);
  set_key(p, key, given);
  STD_TORCH_CHECK(!zero_point, "zero_point: these keys take none");
  set_outputs(p, x, data, scale, zero_point_out, unquantized);
  if (residual_out) p.sum = rows_like(*residual_out, "residual_out", x, p.cols, p.dtype);
  run(p, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm.out", TORCH_BOX(&rms_norm_out));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("fused_add_rms_norm.out", TORCH_BOX(&fused_add_rms_norm_out));
  m.impl("rms_norm_quant", TORCH_BOX(&rms_norm_quant));
  m.impl("rms_norm_quant.out", TORCH_BOX(&rms_norm_quant_out));
  m.impl("fused_add_rms_norm_quant", TORCH_BOX(&fused_add_rms_norm_quant));
  m.impl("fused_add_rms_norm_quant.out", TORCH_BOX(&fused_add_rms_norm_quant_out));
}

}  // namespace fused_ops
