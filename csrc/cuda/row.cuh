// Row pipelines: load -> transform -> store, as on the CPU, for kernels that are compiled for one choice of stages.
//
// `threads` threads, a power of two, own a row: each reads its elements once, keeps them in registers as values of S,
// which every stage rounds to, and writes them once. Of a row that is too long for that they hold a part at a time, and
// make it again, from memory, for every reduction; what is written is written by the last of those passes, part by
// part, so that it may lie where the row is read. How a row is spread over threads follows from its length and S alone,
// and with it the order of every sum. Rows that share a block, or a warp, never meet.
#pragma once

#include "platform.cuh"
#include "stages.h"

namespace fused_ops {

using namespace cuda;

constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kMaxPacks = 8;   // of a thread: the longest row that registers hold
constexpr int kPartPacks = 4;  // of a longer one, which leaves room for a residual and a weight

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

// The columns that threads hold of a row: all, or some in each of several passes, of which one writes.
template <Stages K, bool WHOLE>
struct Span {
  static constexpr int first = 0, end = K.cols;
  static constexpr bool writes = true;
};
template <Stages K>
struct Span<K, false> {
  int first, end;
  bool writes;
};

// Whether registers hold a row whole.
template <Stages K>
constexpr bool kFits = K.cols <= 16 / sizeof(typename Element<K.dtype>::type) * K.threads * kMaxPacks;

// A thread's part of its row, or of a part of it.
template <Stages K>
struct Held : Span<K, kFits<K>> {
  using T = typename Element<K.dtype>::type;
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr bool kWhole = kFits<K>;
  static constexpr int kPacks = kWhole ? (K.cols + kPack * K.threads - 1) / (kPack * K.threads) : kPartPacks;
  static constexpr int kCols = kPack * K.threads * kPacks;
  using P = Pack<T, kPack>;

  P packs[kPacks];
  int thread;  // of those that own the row

  DEVICE Span<K, kWhole>& span() { return *this; }
  DEVICE int at(int i) const { return this->first + (i * K.threads + thread) * kPack; }
  // Elements of pack i that the row has.
  DEVICE int count(int i) const {
    const int rest = this->end - at(i);
    return rest < 0 ? 0 : rest < kPack ? rest : kPack;
  }
  DEVICE bool ends() const { return kWhole || (this->end == K.cols && this->first + kCols >= K.cols); }
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

  // What every row can do (see Remade). This one is its only part.
  template <class F>
  DEVICE auto ahead(const F& f) const {
    return [made = f(*this)](const Held&) -> const auto& { return made; };
  }
  template <class F>
  DEVICE Held& then(const F& f) {
    f(*this);
    return *this;
  }
  template <class F>
  DEVICE void parts(const F& f, int = 0, int = K.cols) {
    f(*this);
  }
  template <int COLS, class F>
  DEVICE void write(const F& f, int = 0, int = K.cols) {
    f(*this);
  }
};

// A row of which threads hold a part at a time: `make` makes it.
template <Stages K, class Make>
struct Remade {
  Make make;
  int thread;

  // What f(part) gives, for a later stage to ask for by the part; where the row is held, on its way from now on.
  template <class F>
  DEVICE F ahead(const F& f) const {
    return f;
  }
  // The row that f has worked on: f(part) changes it.
  template <class F>
  DEVICE auto then(const F& f) const {
    const auto both = [make = make, f](Held<K>& part) {
      make(part);
      f(part);
    };
    return Remade<K, decltype(both)>{both, thread};
  }
  // f(part) for columns [begin, end).
  template <class F>
  DEVICE void parts(const F& f, int begin = 0, int end = K.cols) const {
    pass<false, Held<K>::kCols>(f, begin, end);
  }
  // The same in the pass that writes, with so many columns in a part.
  template <int COLS, class F>
  DEVICE void write(const F& f, int begin = 0, int end = K.cols) const {
    pass<true, COLS>(f, begin, end);
  }

 private:
  template <bool WRITES, int COLS, class F>
  DEVICE void pass(const F& f, int begin, int end) const {
#pragma unroll 1
    for (int first = begin; first < end; first += COLS) {
      Held<K> part = {};
      part.thread = thread;
      part.first = first;
      part.end = end - first < COLS ? end : first + COLS;
      part.writes = WRITES;
      make(part);
      f(part);
    }
  }
};

// A row of zeros, for stages to begin with.
template <Stages K>
DEVICE auto empty_row() {
  const int thread = threadIdx.x % K.threads;
  if constexpr (Held<K>::kWhole) {
    Held<K> held = {};
    held.thread = thread;
    return held;
  } else {
    const auto nothing = [](Held<K>&) {};
    return Remade<K, decltype(nothing)>{nothing, thread};
  }
}

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
  if (!held.ends()) return;
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

// The sum over the row of f(element, whether the row has it).
template <Stages K, Slot SLOT, class R, class F>
DEVICE float sum_of(R& row, Scratch& scratch, const F& f) {
  constexpr int kPack = Held<K>::kPack;
  float lanes[kPack] = {};
  row.parts([&](const Held<K>& part) {
#pragma unroll
    for (int i = 0; i < Held<K>::kPacks; ++i) {
      float v[kPack];
      part.floats(i, v);
#pragma unroll
      for (int j = 0; j < kPack; ++j) lanes[j] += f(v[j], j < part.count(i));
    }
  });
#pragma unroll
  for (int half = kPack / 2; half; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return row_sum<K, SLOT>(lanes[0], scratch);
}

}  // namespace fused_ops
