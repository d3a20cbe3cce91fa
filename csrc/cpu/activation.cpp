#include "row.h"

namespace fused_ops {
namespace {

Pipeline gated(const Tensor& gate, const Tensor& up, bool round_activation) {
  Pipeline p = pipeline_of(gate);
  p.load = Pipeline::kSiluMul;
  p.other = rows_like(up, "up", gate, p.cols, p.dtype);
  p.round_activation = round_activation;
  return p;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up, bool round_activation) {
  Pipeline p = gated(gate, up, round_activation);
  Tensor y = empty_rows(gate, p.cols, p.dtype, p.y);
  run(p, false);
  return y;
}

void silu_mul_out(const Tensor& gate, const Tensor& up, bool round_activation, const OptionalTensor& y) {
  Pipeline p = gated(gate, up, round_activation);
  if (y) p.y = rows_like(*y, "y_out", gate, p.cols, p.dtype);
  run(p, true);
}

std::tuple<Tensor, Tensor> silu_mul_quant(const Tensor& gate, const Tensor& up, bool round_activation, int64_t key,
                                          const OptionalTensor& given) {
  Pipeline p = gated(gate, up, round_activation);
  set_key(p, key, given);
  auto outputs = new_quantized(p, gate);
  run(p, false);
  return outputs;
}

void silu_mul_quant_out(const Tensor& gate, const Tensor& up, bool round_activation, int64_t key,
                        const OptionalTensor& given, const OptionalTensor& zero_point, const OptionalTensor& data,
                        const OptionalTensor& scale, const OptionalTensor& zero_point_out,
                        const OptionalTensor& unquantized) {
  Pipeline p = gated(gate, up, round_activation);
  set_key(p, key, given);
  STD_TORCH_CHECK(!zero_point, "zero_point: these keys take none");
  set_outputs(p, gate, data, scale, zero_point_out, unquantized);
  run(p, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul.out", TORCH_BOX(&silu_mul_out));
  m.impl("silu_mul_quant", TORCH_BOX(&silu_mul_quant));
  m.impl("silu_mul_quant.out", TORCH_BOX(&silu_mul_quant_out));
}

}  // namespace fused_ops
