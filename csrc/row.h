// Row pipelines: load -> transform -> store.
//
// A fused operation reads a row once, works on it in a float32 buffer that stays in the L1 cache, and writes it once.
// So an operation is a choice of stages, made at run time: L loads, T transforms and S stores are L + T + S functions
// (row.inc and what it includes), compiled once per instruction set. An operation's own file checks its arguments and
// fills in a Pipeline; row_op.h makes its overloads from that.
#pragma once

#include <memory>

#include "memory.h"

namespace fused_ops {

struct Norm {
  enum Kind { kNone, kRms, kLayer } kind = kNone;
  const void *weight = nullptr, *bias = nullptr;  // may be absent
  ScalarType weight_dtype = ScalarType::Float, bias_dtype = ScalarType::Float;
  float eps = 0;
  bool round_before_weight = false, weight_plus_one = false;
  const float* mean_square = nullptr;  // of row r at 2 * r, where it isn't the row's own

  explicit operator bool() const { return kind != kNone; }
};

// Where scales, or zero points, lie: the one of row r and group 4 * i + j lies `row(r) + i * four + j * one`
// bytes from data.
struct ScaleOut {
  char* data = nullptr;
  int64_t row_bytes = 0, four = 0, one = 0;
  int64_t extent = 0;  // bytes
  int element = 4;     // bytes
  bool swizzled = false;

  explicit operator bool() const { return data != nullptr; }

  int64_t row(int64_t r) const {
    if (!swizzled) return r * row_bytes;
    return r / 128 * (row_bytes * 128) + r % 32 * 16 + r % 128 / 32 * 4;
  }
};

// What the ranks of a workspace do together: x is the sum of every rank's, of which each makes all rows or its own.
struct Collective {
  const char* name = nullptr;  // of the operation
  char* memory = nullptr;      // the workspace's
  int64_t bytes = 0, rank = 0, ranks = 0;
  bool scattered = false;
  std::shared_ptr<void> begun;  // the call, on the CPU: while a copy of this lives, the rank is in it

  explicit operator bool() const { return name != nullptr; }
};

// What a load sums, in this order: row r of the first lies `(r - begin) * row_bytes` behind data, that of the next
// rank_bytes on.
struct Summands {
  const char* data = nullptr;
  int64_t count = 0, rank_bytes = 0, row_bytes = 0, begin = 0;

  explicit operator bool() const { return data != nullptr; }
};

struct Pipeline {
  int64_t rows = 0, cols = 0;            // of the result
  int64_t begin = 0;                     // the first of the rows that are worked on
  ScalarType dtype = ScalarType::Float;  // S, of the rows that are read and of unquantized results

  enum Load { kCopy, kAdd, kSilu, kGeluTanh, kSwigluOai, kRelu2 } load = kCopy;
  Rows x;
  Collective collective;          // may be absent
  Summands summands;              // instead of x, may be absent
  Rows other;                     // the residual, of kAdd or after the first norm; up, of gated loads
  Rows sum;                       // the new residual, may be absent
  float x_multiplier = 1.0f;      // kAdd
  bool round_activation = false;  // gated loads
  float alpha = 0, limit = 0;     // kSwigluOai; without `other` x holds gate and up, interleaved

  // Of rows [experts, rows_per_expert] only the first so many of each expert are worked on, where this is given.
  const void* tokens_per_expert = nullptr;
  bool long_tokens = false;
  int64_t rows_per_expert = 0;

  Norm post;  // before the residual is added, may be absent
  Norm norm;  // may be absent

  Rows y;                      // the unquantized result, may be absent
  int64_t multiple = 1;        // columns of y are padded to a multiple of this, with zeros
  int* tensor_amax = nullptr;  // magnitude bits of the largest result, may be absent
  Rows data;                   // the codes, may be absent
  Key key{0};
  ScaleOut scale, zero_point;       // dynamic keys
  const float* given = nullptr;     // static keys: the scale; NVFP4: scale2; other dynamic keys: upper bound of amax
  const int* given_zero = nullptr;  // static asymmetric keys
  // Where a row here is a slice of the one that is quantized, whole groups: how many groups lie before and behind it.
  int64_t groups_before = 0, groups_behind = 0;

  // What the CPU's passes are made of: values of the two above, and whether to write around the caches.
  float given_value = 0, given_zero_value = 0;
  bool stream = false;
  bool quantizes = false;  // to key, perhaps no rows

  bool skips(int64_t r) const {
    if (!tokens_per_expert) return false;
    const int64_t expert = r / rows_per_expert, place = r % rows_per_expert;
    return place >= (long_tokens ? static_cast<const int64_t*>(tokens_per_expert)[expert]
                                 : static_cast<const int32_t*>(tokens_per_expert)[expert]);
  }
};

// Arguments that several operations share. Each check throws before anything is written.
Pipeline pipeline_of(const Tensor& x);
Norm norm_of(const Pipeline& p, Norm::Kind kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
             int64_t flags);
// kAdd of these rows, which are shaped as those of `like`.
void set_add(Pipeline& p, const Tensor& residual, const Tensor& like, double x_multiplier);
void set_experts(Pipeline& p, const Tensor& x, const OptionalTensor& tokens_per_expert);
// Raises where there is no QuantKey of this code.
Key key_of(int64_t code, const char* name);
// Raises where this key doesn't quantize rows of so many columns.
void check_columns(const Key& key, int64_t cols);
ScalarType storage_of(const Key& key);
void set_key(Pipeline& p, int64_t key, const OptionalTensor& given, const OptionalTensor& zero_point);

// The scales, or zero points, that an earlier quantization of `rows` x `cols` elements made.
ScaleOut scales_of(const Tensor& tensor, const Key& key, int64_t rows, int64_t cols, bool zero_point, const char* name,
                   int device = kCpu);

// Fresh ones, or fresh zero points.
Tensor new_scales(const Key& key, int64_t rows, int64_t cols, int device, bool zero_point, ScaleOut& out);

// Fresh (data, scale) for `like`, and both as the pipeline's outputs.
std::tuple<Tensor, Tensor> new_quantized(Pipeline& p, const Tensor& like);
// Given outputs; absent ones are not written.
void set_quantized(Pipeline& p, const Tensor& like, const OptionalTensor& data, const OptionalTensor& scale,
                   const OptionalTensor& zero_point, const OptionalTensor& unquantized);

// Raises where an output shares memory with another argument in a way that would change what is read.
void check_memory(const Pipeline& p);
// The same for what a writes and b reads or writes, in one launch.
void check_apart(const Pipeline& a, const Pipeline& b);
// What a pipeline writes, for an operation whose inputs aren't one's.
void add_outputs(Memory& memory, const Pipeline& p);

// One dynamic scale for the whole tensor takes two passes over it.
inline bool one_scale(const Pipeline& p) { return p.scale && p.key.per_tensor() && !p.key.is_static(); }

// Its first pass needs no result of its own where what is quantized is x.
inline bool quantizes_x(const Pipeline& p) { return p.load == Pipeline::kCopy && !p.norm && !p.post; }
// Its second pass, but for the scale: the codes of `rows`, which the first has made.
Pipeline codes_of(const Pipeline& p, const Rows& rows);

// Runs it, or both in one launch, where the tensors are.
void run(Pipeline& p);
void run(Pipeline& a, Pipeline& b);
// On torch's threads, and on a CUDA device; b may be absent, and has none of one_scale.
void run_on_cpu(Pipeline& a, Pipeline* b = nullptr);
// One pass over the rows of both; b may be absent.
void run_rows_on_cpu(Pipeline& a, Pipeline* b = nullptr);
// Sums of squares of the rows from begin on, at out[0], out[2], ...
void squares_on_cpu(const Pipeline& p, float* out);
// Before the CPU's stages: reads what is given, writes what isn't a row's.
void prepare_on_cpu(Pipeline& p);
bool on_cuda(int device);
void run_on_cuda(Pipeline& a, Pipeline* b = nullptr);

}  // namespace fused_ops
