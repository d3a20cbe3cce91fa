#include "rope.h"

#include <vector>

#include "isa.h"

#define KERNELS "rope.inc"
#include "each_isa.inc"

namespace fused_ops {
namespace {

Rope rope_of(const Tensor& q, const Tensor& k, const OptionalTensor& positions, const Tensor& cos_sin, int64_t flags,
             int64_t mrope) {
  Rope p;
  p.dtype = dtype_of(q);
  STD_TORCH_CHECK(is_float(p.dtype), "q: expected bfloat16, float16 or float32");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && cos_sin.dim() == 2, "q, k, cos_sin_cache: unexpected shape");
  const int64_t tokens = q.size(0);
  STD_TORCH_CHECK(k.size(0) == tokens && k.size(2) == q.size(2) && dtype_of(k) == p.dtype, "k: expected q's");
  p.q = {rows_of(q, "q"), {}, q.size(1)};
  p.k = {rows_of(k, "k"), {}, k.size(1)};
  const Rows table = rows_of(cos_sin, "cos_sin_cache");
  p.head_dim = q.size(2);
  p.half = table.cols / 2;
  STD_TORCH_CHECK(dtype_of(cos_sin) == ScalarType::Float && table.cols % 2 == 0 && table.cols <= p.head_dim,
                  "cos_sin_cache: expected float32 of an even width up to q's");
  p.cos_sin = table.at<const float>(0);
  p.cos_sin_stride = cos_sin.stride(0);
  STD_TORCH_CHECK(mrope == 0, "mrope");
  p.is_neox = flags & 4;
  p.round_products = flags & 8;
  p.positions = nullptr;
  p.wide_positions = false;
  if (!positions) {
    STD_TORCH_CHECK(table.count == tokens, "cos_sin_cache: expected a row for each token");
    return p;
  }
  const ScalarType index = positions->scalar_type();
  STD_TORCH_CHECK(positions->is_cpu() && (index == ScalarType::Long || index == ScalarType::Int), "positions: dtype");
  STD_TORCH_CHECK(positions->dim() == 1 && positions->size(0) == tokens && (tokens <= 1 || positions->stride(0) == 1),
                  "positions: expected one for each token");
  p.positions = positions->data_ptr();
  p.wide_positions = index == ScalarType::Long;
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(p.position(t) >= 0 && p.position(t) < table.count, "positions: outside cos_sin_cache");
  return p;
}

void run(const Rope& p, int64_t tokens) {
  const auto rows = PICK_ISA(rope_rows);
  const int64_t padded = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  parallel_rows(tokens, (p.q.per_token + p.k.per_token) * p.head_dim, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(5 * padded);
    rows(p, begin, end, buffer.data());
  });
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const OptionalTensor& positions,
                                const Tensor& cos_sin, int64_t flags, int64_t mrope) {
  Rope p = rope_of(q, k, positions, cos_sin, flags, mrope);
  Tensor q_out = empty_rows(q, p.head_dim, p.dtype, p.q.out), k_out = empty_rows(k, p.head_dim, p.dtype, p.k.out);
  run(p, q.size(0));
  return {std::move(q_out), std::move(k_out)};
}

void rope_out(const Tensor& q, const Tensor& k, const OptionalTensor& positions, const Tensor& cos_sin, int64_t flags,
              int64_t mrope, const OptionalTensor& q_out, const OptionalTensor& k_out) {
  Rope p = rope_of(q, k, positions, cos_sin, flags, mrope);
  STD_TORCH_CHECK(q_out && k_out, "q_out, k_out: expected both");
  p.q.out = rows_like(*q_out, "q_out", q, p.head_dim, p.dtype);
  p.k.out = rows_like(*k_out, "k_out", k, p.head_dim, p.dtype);
  const int64_t bytes = static_cast<int64_t>(q.element_size());
  const Rows table = rows_of(cos_sin, "cos_sin_cache");
  for (const Rope::Heads* heads : {&p.q, &p.k}) {
    const Rope::Heads* other = heads == &p.q ? &p.k : &p.q;
    check_output(heads->out, bytes, "output");
    check_overlap(heads->out, bytes, heads->in, bytes, true, "output");
    check_overlap(heads->out, bytes, other->in, bytes, false, "output");
    check_overlap(heads->out, bytes, other->out, bytes, false, "output");
    check_overlap(heads->out, bytes, table, 4, false, "output");
    if (positions) check_overlap(heads->out, bytes, whole(*positions), positions->element_size(), false, "output");
  }
  run(p, q.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope.out", TORCH_BOX(&rope_out));
}

}  // namespace fused_ops
