#include "row.h"

namespace fused_ops {
namespace {

std::tuple<Tensor, Tensor> quantize(const Tensor& x, int64_t key, const OptionalTensor& given) {
  Pipeline p = pipeline_of(x);
  set_key(p, key, given);
  auto outputs = new_quantized(p, x);
  run(p, false);
  return outputs;
}

void quantize_out(const Tensor& x, int64_t key, const OptionalTensor& given, const OptionalTensor& zero_point,
                  const OptionalTensor& data, const OptionalTensor& scale, const OptionalTensor& zero_point_out,
                  const OptionalTensor& unquantized) {
  Pipeline p = pipeline_of(x);
  set_key(p, key, given);
  STD_TORCH_CHECK(!zero_point, "zero_point: these keys take none");
  set_outputs(p, x, data, scale, zero_point_out, unquantized);
  run(p, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize.out", TORCH_BOX(&quantize_out));
}

}  // namespace fused_ops
