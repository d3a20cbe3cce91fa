// Row pipelines: load -> transform -> store.
//
// A fused operation reads a row once, works on it in a float32 buffer that stays in the L1 cache, and writes it once.
// So an operation is a choice of three stages, made at run time: L loads, T transforms and S stores are L + T + S
// functions (row.inc), compiled once per instruction set. An operation's own file checks its arguments and fills in
// a Pipeline.
#pragma once

#include "common.h"

namespace fused_ops {

struct Pipeline {
  int64_t rows = 0, cols = 0;
  ScalarType dtype = ScalarType::Float;  // S, of the rows that are read and of unquantized results

  enum Load { kCopy, kAdd, kSiluMul } load = kCopy;
  Rows x;
  Rows other;                     // kAdd: the residual; kSiluMul: up
  Rows sum;                       // kAdd: the new residual, may be absent
  float x_multiplier = 1.0f;      // kAdd
  bool round_activation = false;  // kSiluMul

  bool rms_norm = false;
  const void* weight = nullptr;  // absent: the weightless norm
  ScalarType weight_dtype = ScalarType::Float;
  float eps = 0;
  bool round_before_weight = false, weight_plus_one = false;

  Rows y;     // the unquantized result, may be absent
  Rows data;  // the codes, may be absent
  Key key{0};
  float* scale = nullptr;  // dynamic keys
  int64_t scale_row_stride = 0, scale_group_stride = 0;
  float given = 0;  // static keys: the scale; dynamic ones: upper bound of amax

  bool stream = false;  // write around the caches, see finish()
};

// Arguments that several operations share. Each check throws before anything is written.
void set_norm(Pipeline& p, const OptionalTensor& weight, double eps, int64_t flags);
void set_key(Pipeline& p, int64_t key, const OptionalTensor& given);
Pipeline pipeline_of(const Tensor& x);

// Fresh (data, scale) for `like`, and both as the pipeline's outputs.
std::tuple<Tensor, Tensor> new_quantized(Pipeline& p, const Tensor& like);
// Given outputs; absent ones are not written.
void set_outputs(Pipeline& p, const Tensor& like, const OptionalTensor& data, const OptionalTensor& scale,
                 const OptionalTensor& zero_point, const OptionalTensor& unquantized);

// Runs it, on torch's threads. Outputs that the caller gave are checked against all inputs for overlap.
void run(Pipeline& p, bool check_memory);

}  // namespace fused_ops
