// Row pipelines: load -> transform -> store, as on the CPU, for kernels that are compiled for one choice of stages.
//
// `threads` threads, a power of two, own a row: each reads its elements once, keeps them in registers as values of S,
// which every stage rounds to, and writes them once. How a row is spread over threads follows from its length and S
// alone, and with it the order of every sum. Rows that share a block, or a warp, never meet.
#pragma once

#include "platform.cuh"
#include "stages.h"

namespace fused_ops {

using namespace cuda;

constexpr int kMaxWarps = kMaxThreads / kWarp;

template <bool FLAT, class T>
DEVICE T* at(const Strided& rows, long long row) {
  if (FLAT || rows.dims <= 1) return (T*)(rows.data + row * rows.stride[0]);
  long long bytes = 0;
  for (int d = rows.dims - 1; d >= 0; --d) {
    bytes += row % rows.size[d] * rows.stride[d];
    row /= rows.size[d];
  }
  return (T*)(rows.data + bytes);
}

template <bool SWIZZLED>
DEVICE char* at(const ScalePlace& scales, long long row) {
  if (!SWIZZLED) return scales.data + row * scales.row_bytes;
  return scales.data + row / 128 * (scales.row_bytes * 128) + row % 32 * 16 + row % 128 / 32 * 4;
}

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
    for (int j = 0; j < kPack; j += 2) widen_two(packs[i].e + j, v[j], v[j + 1]);
  }
  // Rounds to S; what the row doesn't have stays zero.
  DEVICE void keep(int i, const float (&v)[kPack]) {
    const int n = count(i);
#pragma unroll
    for (int j = 0; j < kPack; j += 2) {
      narrow_two(v[j], v[j + 1], packs[i].e + j);
      if (!K.aligned && j >= n) packs[i].e[j] = T{};
      if (!K.aligned && j + 1 >= n) packs[i].e[j + 1] = T{};
    }
    if (K.aligned && !n) packs[i] = P{};
  }
  // Every element becomes f(element, pack, place in it), rounded to S.
  template <class F>
  DEVICE void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kPack];
      floats(i, v);
#pragma unroll
      for (int j = 0; j < kPack; ++j) v[j] = f(v[j], i, j);
      keep(i, v);
    }
  }
};

template <Stages K>
DEVICE void load_row(const typename Held<K>::T* x, Held<K>& held) {
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) load<K.aligned>(held.packs[i], x + held.at(i), held.count(i));
}

template <Stages K>
DEVICE void store_row(typename Held<K>::T* y, const Held<K>& held) {
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) store<K.aligned>(y + held.at(i), held.packs[i], held.count(i));
}

template <Stages K>
DEVICE void load_rows(const Strided& in, long long r, Held<K>& held) {
  load_row(at<K.flat, const typename Held<K>::T>(in, r), held);
}

template <Stages K>
DEVICE void store_rows(const Strided& out, long long r, const Held<K>& held, int cols) {
  using T = typename Held<K>::T;
  T* y = at<K.flat, T>(out, r);
  store_row(y, held);
  for (int c = K.cols + held.thread; c < cols; c += K.threads) y[c] = T{};
}

// Results that the threads of a row share, one word from each warp: a slot for each reduction, so that one barrier is
// enough for it.
struct Scratch {
  int words[6][kMaxWarps];
};

enum Slot { kPostSum, kMeanSum, kNormSum, kAmax, kLow, kTensorAmax };

// Once for the row what `within` makes of so many neighbouring lanes.
template <Stages K, Slot SLOT, class V, class Within>
DEVICE V over_row(V x, Scratch& scratch, const Within& within) {
  x = within(x, K.threads < kWarp ? K.threads : kWarp);
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
