// What host and device agree on: the arguments of a row kernel, and what it is compiled for.
#pragma once

namespace fused_ops {
namespace cuda {

constexpr int kDims = 8, kWarp = 32, kMaxThreads = 1024;

// The rows of a tensor, wherever they lie: leading dimensions, merged where strides (in bytes) allow.
struct Strided {
  char* data;
  int dims;
  long long size[kDims], stride[kDims];
};

// Where scales, or zero points, lie: as ScaleOut in csrc/row.h.
struct ScalePlace {
  char* data;
  long long row_bytes, four, one;
};

struct Row {
  long long rows;
  Strided x, other, sum, y, data;
  const void *post_weight, *weight, *bias;
  float post_eps, eps, x_multiplier, alpha, limit;
  const void* tokens_per_expert;
  long long rows_per_expert;
  const float* given;     // a static scale, NVFP4's scale2, or the upper bound of amax; may be null
  const int* given_zero;  // of a static asymmetric key
  ScalePlace scale, zero_point;
  int* tensor_amax;  // magnitude bits of the largest result
};

enum Dtype : int { kNothing = 0, kBf16 = 1, kFp16 = 2, kFp32 = 3 };
enum Load : int { kCopy, kAdd, kSilu, kGeluTanh, kSwigluOai, kRelu2 };  // as Pipeline::Load
enum NormKind : int { kNoNorm, kRmsNorm, kLayerNorm };                  // as Norm::Kind

struct NormStage {
  NormKind kind;
  Dtype weight, bias;
  bool round_before_weight, weight_plus_one;
};

struct Stages {
  Dtype dtype;  // S
  int cols;
  int threads;   // of a row
  int block;     // threads of a block
  bool aligned;  // every row of every tensor is aligned for whole packs, of which its length is a multiple
  bool flat;     // the rows of every tensor lie at one stride

  Load load;
  bool multiplied, round_activation, interleaved;
  int expert_bytes;  // of an element of tokens_per_expert

  NormStage post, norm;
  bool sum, y, data, scale, zero_point;  // outputs
  int y_cols;                            // with padding
  long long key;
  // One scale for the whole tensor takes two launches: one collects amax, the other quantizes by it.
  bool collect_amax, by_tensor_amax;
};

}  // namespace cuda
}  // namespace fused_ops
