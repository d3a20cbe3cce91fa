// Row pipelines: load -> transform -> store, as on the CPU, for kernels that are compiled for one choice of stages.
//
// `threads` threads own a row: each reads its elements once, keeps them in registers as values of S, which every stage
// rounds to, and writes them once. How a row is spread over threads follows from its length and S alone, and with it
// the order of every sum. Rows that share a block never meet.
#pragma once

#include "platform.cuh"

namespace fused_ops {

constexpr int kMaxDims = 8, kMaxWarps = 32;

// The rows of a tensor, wherever they lie.
struct Strided {
  char* data;
  int dims;                                     // leading dimensions, merged where strides allow
  long long size[kMaxDims], stride[kMaxDims];  // strides in bytes

  template <class T>
  DEVICE T* at(long long row) const {
    if (dims <= 1) return (T*)(data + row * stride[0]);
    long long bytes = 0;
    for (int d = dims - 1; d >= 0; --d) {
      bytes += row % size[d] * stride[d];
      row /= size[d];
    }
    return (T*)(data + bytes);
  }
};

// Where scales, or zero points, lie: the one of row r and group 4 * i + j lies `row(r) + i * four + j * one` bytes from
// data.
struct ScalePlace {
  char* data;
  long long row_bytes, four, one;

  template <bool SWIZZLED>
  DEVICE char* row(long long r) const {
    return data + (SWIZZLED ? r / 128 * (row_bytes * 128) + r % 32 * 16 + r % 128 / 32 * 4 : r * row_bytes);
  }
};

// The arguments of a launch.
struct Row {
  long long rows;
  Strided x, other, sum, y, data;
  const void *post_weight, *weight, *bias;
  float post_eps, eps, x_multiplier, alpha, limit;
  const void* tokens_per_expert;
  long long rows_per_expert;
  const float* given;     // a static scale, NVFP4's scale2, or the upper bound of amax: on the device, may be null
  const int* given_zero;  // of a static asymmetric key
  ScalePlace scale, zero_point;
  int* tensor_amax;       // magnitude bits of the largest result
};

enum Dtype { kNothing = 0, kBf16 = 1, kFp16 = 2, kFp32 = 3 };
enum Load { kCopy, kAdd, kGatedSilu, kGatedGeluTanh, kGatedSwigluOai, kRelu2 };
enum NormKind { kNoNorm, kRmsNorm, kLayerNorm };

struct NormStage {
  NormKind kind = kNoNorm;
  Dtype weight = kNothing, bias = kNothing;
  bool round_before_weight = false, weight_plus_one = false;
};

// What a kernel is compiled for.
struct Stages {
  Dtype dtype;  // S
  int cols;
  int threads;   // of a row
  int block;     // threads of a block
  bool aligned;  // every row of every tensor is aligned for whole packs, which its length is a multiple of

  Load load = kCopy;
  bool multiplied = false, round_activation = false, interleaved = false;
  int expert_bytes = 0;  // of an element of tokens_per_expert

  NormStage post = {}, norm = {};
  bool sum = false, y = false, data = false, scale = false, zero_point = false;  // outputs
  int y_cols = 0;                                                               // with padding
  long long key = 0;
  // One scale for the whole tensor takes two launches: one collects amax, the other quantizes by it.
  bool collect_amax = false, by_tensor_amax = false;
};

template <Dtype DTYPE>
struct Element {
  using type = float;
};
template <>
struct Element<kBf16> {
  using type = Bf16;
};
template <>
struct Element<kFp16> {
  using type = Fp16;
};

// A thread's part of its row.
template <Stages K>
struct Held {
  using T = typename Element<K.dtype>::type;
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kPacks = (K.cols + kPack * K.threads - 1) / (kPack * K.threads);
  using P = Pack<T, kPack>;

  P packs[kPacks];
  int thread;  // of those that own the row

  DEVICE int at(int i) const { return (i * K.threads + thread) * kPack; }
  // Elements of pack i that the row has.
  DEVICE int count(int i) const {
    const int rest = K.cols - at(i);
    return rest < 0 ? 0 : rest < kPack ? rest : kPack;
  }
  DEVICE void floats(int i, float (&v)[kPack]) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j) v[j] = widen(packs[i].e[j]);
  }
  // Rounds to S; what the row doesn't have stays zero.
  DEVICE void keep(int i, const float (&v)[kPack]) {
    const int n = count(i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) packs[i].e[j] = K.aligned || j < n ? narrow<T>(v[j]) : T{};
    if (K.aligned && !n) packs[i] = P{};
  }
};

template <Stages K>
DEVICE void load_rows(const Strided& in, long long r, Held<K>& held) {
  const auto* x = in.at<const typename Held<K>::T>(r);
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) load<K.aligned>(held.packs[i], x + held.at(i), held.count(i));
}

template <Stages K>
DEVICE void store_rows(const Strided& out, long long r, const Held<K>& held, int cols) {
  using T = typename Held<K>::T;
  T* y = out.at<T>(r);
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) store<K.aligned>(y + held.at(i), held.packs[i], held.count(i));
  for (int c = K.cols + held.thread; c < cols; c += K.threads) y[c] = T{};
}

// Results that the threads of a row share, one word from each warp: a slot for each reduction, so that one barrier is
// enough for it.
struct Scratch {
  int words[6][kMaxWarps];
};

enum Slot { kPostSum, kMeanSum, kNormSum, kAmax, kLow, kTensorAmax };

// `combine` over the row of what `within` made of each warp.
template <Stages K, Slot SLOT, class V, class Within>
DEVICE V over_row(V x, Scratch& scratch, const Within& within) {
  x = within(x, kWarp);
  constexpr int kWarps = K.threads / kWarp;
  if constexpr (kWarps > 1) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane == 0) scratch.words[SLOT][warp] = bits<int>(x);
    __syncthreads();
    x = bits<V>(scratch.words[SLOT][warp / kWarps * kWarps + lane % kWarps]);
    x = within(x, kWarps);
  }
  return x;
}

template <Stages K, Slot SLOT>
DEVICE float row_sum(float x, Scratch& scratch) {
  return over_row<K, SLOT>(x, scratch, [](float v, int lanes) { return lanes_sum(v, lanes); });
}

template <Stages K, Slot SLOT>
DEVICE int row_max(int x, Scratch& scratch) {
  return over_row<K, SLOT>(x, scratch, [](int v, int lanes) { return lanes_max(v, lanes); });
}

// The sum over the row of f(v) for every element that it has.
template <Stages K, Slot SLOT, class F>
DEVICE float sum_of(const Held<K>& held, Scratch& scratch, const F& f) {
  constexpr int kPack = Held<K>::kPack;
  float lanes[kPack] = {};
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) {
    float v[kPack];
    held.floats(i, v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) lanes[j] += f(v[j], i, j);
  }
#pragma unroll
  for (int half = kPack / 2; half; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return row_sum<K, SLOT>(lanes[0], scratch);
}

}  // namespace fused_ops
