// The kernel of a row operation: its stages, one after the other.
#pragma once

#include "activation.cuh"
#include "norm.cuh"
#include "quantize.cuh"

namespace fused_ops {

// The row and the residual, of which the row may be multiplied first.
template <Stages K, bool MULTIPLIED>
DEVICE void add(const Row& p, long long r, const Held<K>& residual, Held<K>& held, bool active) {
  using T = typename Held<K>::T;
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) {
    float a[Held<K>::kPack], b[Held<K>::kPack];
    held.floats(i, a);
    residual.floats(i, b);
#pragma unroll
    for (int j = 0; j < Held<K>::kPack; ++j) {
      if constexpr (MULTIPLIED) a[j] = round_to<T>(a[j] * p.x_multiplier);
      a[j] += b[j];
    }
    held.keep(i, a);
  }
  if constexpr (K.sum)
    if (active && held.writes) store_rows(p.sum, r, held, K.cols);
}

template <Stages K>
DEVICE bool skips(const Row& p, long long r) {
  if constexpr (!K.expert_bytes) return false;
  const long long expert = r / p.rows_per_expert, place = r % p.rows_per_expert;
  return place >= (K.expert_bytes == 8 ? ((const long long*)p.tokens_per_expert)[expert]
                                       : ((const int*)p.tokens_per_expert)[expert]);
}

template <Stages K>
struct Shared {
  Scratch scratch;
  // Largest elements of groups that no warp holds alone.
  static constexpr bool kGroups = K.data && !Codes<K>::kByAll && !Codes<K>::kInLanes;
  static constexpr int kRows = K.block / K.threads, kParts = Key{K.key}.asymmetric() ? 2 : 1;
  int amax[kGroups ? kRows * kParts * Codes<K>::kTogether : 1];
};

// The row that the stages begin with.
template <Stages K>
DEVICE void load(const Row& p, long long r, Held<K>& held) {
  if constexpr (K.load == kCopy || K.load == kAdd) load_rows(p.x, r, held);
  if constexpr (K.load == kSilu) load_gated<K, Activation::kSilu>(p, r, held);
  if constexpr (K.load == kGeluTanh) load_gated<K, Activation::kGeluTanh>(p, r, held);
  if constexpr (K.load == kSwigluOai) load_gated<K, Activation::kSwigluOai>(p, r, held);
  if constexpr (K.load == kRelu2) load_relu2(p, r, held);
}

// Row r by the threads that own it, from what `load_held` gives them. Threads without a row, which aren't active, go
// along, since barriers count them.
template <Stages K, class Load>
DEVICE void work(const Row& p, long long r, bool active, const Load& load_held, Shared<K>& shared) {
  constexpr bool kAddsFirst = K.load == kAdd, kAddsLater = K.post.kind != kNoNorm;
  auto row = empty_row<K>();
  Held<K> residual = {};
  residual.thread = row.thread;
  auto&& begun = row.then([&](Held<K>& part) {
    if (active) {
      residual.span() = part.span();
      if constexpr (kAddsFirst || kAddsLater) load_rows(p.other, r, residual);
      load_held(part);
    }
    if constexpr (kAddsFirst) add<K, K.multiplied>(p, r, residual, part, active);
  });
  auto&& added =
      norm<K, K.post, kPostSum>(begun, p.post_weight, nullptr, p.post_eps, shared.scratch).then([&](Held<K>& part) {
        if constexpr (kAddsLater) add<K, false>(p, r, residual, part, active);
      });
  auto&& result = norm<K, K.norm, kNormSum>(added, p.weight, p.bias, p.eps, shared.scratch).then([&](Held<K>& part) {
    if constexpr (K.y)
      if (active && part.writes) store_rows(p.y, r, part, K.y_cols);
  });
  if constexpr (K.data || K.scale) {
    const int place = threadIdx.x / K.threads;
    int* const amax = shared.amax + (Shared<K>::kGroups ? place * Shared<K>::kParts * Codes<K>::kTogether : 0);
    quantize<K>(p, r, result, shared.scratch, amax, active);
    if constexpr (Codes<K>::kSwizzled)
      if (r >= p.rows && r < (p.rows + 127) / 128 * 128) zero_padding<K>(p, r, result.thread);
  } else {
    int low = 0, high = 0;
    result.template write<Held<K>::kCols>([&](const Held<K>& part) {
      if constexpr (K.collect_amax) include(part, high, low);
    });
    if constexpr (K.collect_amax) {
      high = lanes_max(active ? high : 0, kWarp);
      if (threadIdx.x % kWarp == 0) atomicMax(p.tensor_amax, high);
    }
  }
}

template <Stages K>
DEVICE void run(const Row& p, long long block, Shared<K>& shared) {
  const long long r = block * Shared<K>::kRows + threadIdx.x / K.threads;
  const bool active = r < p.rows && !skips<K>(p, r);
  work(p, r, active, [&](Held<K>& held) { load(p, r, held); }, shared);
}

}  // namespace fused_ops
