#include "row.h"

#include <array>

#include "collective.h"

namespace fused_ops {

Pipeline pipeline_of(const Tensor& x) {
  Pipeline p;
  p.x = rows_of(x, "x");
  p.rows = p.x.count;
  p.cols = p.x.cols;
  p.dtype = dtype_of(x);
  STD_TORCH_CHECK(p.cols > 0, "x: expected at least one column");
  STD_TORCH_CHECK(is_float(p.dtype), "x: expected bfloat16, float16 or float32");
  return p;
}

namespace {

const void* vector_of(const Pipeline& p, const OptionalTensor& tensor, ScalarType& dtype, const char* name) {
  if (!tensor) return nullptr;
  const Rows rows = rows_of(*tensor, name);
  dtype = dtype_of(*tensor);
  STD_TORCH_CHECK(is_float(dtype) && rows.device == p.x.device, name, ": expected bfloat16, float16 or float32");
  STD_TORCH_CHECK(tensor->dim() == 1 && rows.cols == p.cols, name, ": expected one element a column");
  return rows.data;
}

}  // namespace

Norm norm_of(const Pipeline& p, Norm::Kind kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
             int64_t flags) {
  Norm norm;
  norm.kind = kind;
  STD_TORCH_CHECK(eps >= 0, "eps: expected at least 0");
  norm.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(flags >= 0 && flags < 4, "flags: expected 0 to 3");
  norm.round_before_weight = flags & 1;
  norm.weight_plus_one = flags & 2;
  norm.weight = vector_of(p, weight, norm.weight_dtype, "weight");
  norm.bias = vector_of(p, bias, norm.bias_dtype, "bias");
  return norm;
}

void set_add(Pipeline& p, const Tensor& residual, const Tensor& like, double x_multiplier) {
  p.load = Pipeline::kAdd;
  p.other = rows_like(residual, "residual", like, p.cols, p.dtype);
  STD_TORCH_CHECK(is_finite(x_multiplier), "x_multiplier: expected a finite float32");
  p.x_multiplier = static_cast<float>(x_multiplier);
}

void set_experts(Pipeline& p, const Tensor& x, const OptionalTensor& tokens_per_expert) {
  if (!tokens_per_expert) return;
  const Tensor& tokens = *tokens_per_expert;
  const ScalarType dtype = dtype_of(tokens);
  STD_TORCH_CHECK(
      device_of(tokens, "tokens_per_expert") == p.x.device && (dtype == ScalarType::Int || dtype == ScalarType::Long),
      "tokens_per_expert: expected int32 or int64 on the device of the rows");
  STD_TORCH_CHECK(x.dim() == 3 && tokens.dim() == 1 && tokens.size(0) == x.size(0) && tokens.is_contiguous(),
                  "tokens_per_expert: expected one element for each of the experts in [experts, rows, columns]");
  p.tokens_per_expert = tokens.data_ptr();
  p.long_tokens = dtype == ScalarType::Long;
  p.rows_per_expert = x.size(1);
}

namespace {

struct Named {
  Rows rows;
  int64_t bytes;
  const char* name;
};

Named memory(const void* data, int64_t count, int64_t bytes, const char* name) {
  return {one_row(const_cast<void*>(data), count), bytes, name};
}

Named memory(const ScaleOut& out, const char* name) { return memory(out.data, out.extent, 1, name); }

std::array<Named, 6> outputs(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  return {Named{p.sum, bytes, "residual_out"},    Named{p.y, bytes, p.data ? "unquantized_out" : "y_out"},
          Named{p.data, 1, "data_out"},           memory(p.scale, "scale_out"),
          memory(p.zero_point, "zero_point_out"), memory(p.collective.memory, p.collective.bytes, 1, "workspace")};
}

std::array<Named, 6> read_by_every_row(const Pipeline& p) {
  const auto vector = [&](const void* data, ScalarType dtype) { return memory(data, p.cols, byte_size(dtype), ""); };
  return {vector(p.norm.weight, p.norm.weight_dtype),
          vector(p.norm.bias, p.norm.bias_dtype),
          vector(p.post.weight, p.post.weight_dtype),
          memory(p.tokens_per_expert, p.rows_per_expert ? p.rows / p.rows_per_expert : 0, p.long_tokens ? 8 : 4, ""),
          memory(p.given, p.given ? 1 : 0, 4, ""),
          memory(p.given_zero, p.given_zero ? 1 : 0, 4, "")};
}

}  // namespace

void check_memory(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  const auto outs = outputs(p);
  for (const Named& out : outs) {
    if (!out.rows) continue;
    check_output(out.rows, out.bytes, out.name);
    check_overlap(out.rows, out.bytes, p.x, bytes, true, out.name);
    check_overlap(out.rows, out.bytes, p.other, bytes, true, out.name);
    for (const Named& in : read_by_every_row(p)) check_overlap(out.rows, out.bytes, in.rows, in.bytes, false, out.name);
    for (const Named& other : outs)
      if (&other != &out) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
  }
}

void check_apart(const Pipeline& a, const Pipeline& b) {
  for (const Named& out : outputs(a)) {
    check_overlap(out.rows, out.bytes, b.x, byte_size(b.dtype), false, out.name);
    for (const Named& in : read_by_every_row(b)) check_overlap(out.rows, out.bytes, in.rows, in.bytes, false, out.name);
    for (const Named& other : outputs(b)) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
  }
}

void add_outputs(Memory& memory, const Pipeline& p) {
  for (const Named& out : outputs(p))
    if (out.rows) memory.writes(out.rows, out.bytes, out.name);
}

Pipeline codes_of(const Pipeline& p, const Rows& rows) {
  Pipeline codes;
  codes.rows = p.rows;
  codes.cols = p.cols;
  codes.dtype = p.dtype;
  codes.x = rows;
  codes.tokens_per_expert = p.tokens_per_expert;
  codes.long_tokens = p.long_tokens;
  codes.rows_per_expert = p.rows_per_expert;
  codes.data = p.data;
  codes.key = p.key;
  return codes;
}

namespace {

void check_served(const Pipeline& p) {
  STD_TORCH_CHECK(!one_scale(p) || !p.key.asymmetric(), "key: asymmetric keys are served static or by token");
}

}  // namespace

void run(Pipeline& p) {
  check_served(p);
  if (p.collective) {
    STD_TORCH_CHECK(!one_scale(p), "key: expected static scales, or one a row or group");
    check_memory(p);  // of the workspace too, which every call writes
    return run_collective(p);
  }
  on_cuda(p.x.device) ? run_on_cuda(p) : run_on_cpu(p);
}

void run(Pipeline& a, Pipeline& b) {
  check_served(a);
  check_served(b);
  if (one_scale(a) || one_scale(b)) {
    run(a);
    return run(b);
  }
  on_cuda(a.x.device) ? run_on_cuda(a, &b) : run_on_cpu(a, &b);
}

}  // namespace fused_ops
