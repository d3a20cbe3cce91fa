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
    if (active) store_rows(p.sum, r, held, K.cols);
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
  static constexpr bool kGroups = K.data && !Codes<K>::kWholeRow && !Codes<K>::kInLanes;
  static constexpr int kRows = K.block / K.threads, kParts = Key{K.key}.asymmetric() ? 2 : 1;
  int amax[kGroups ? kRows * kParts * Codes<K>::kGroups : 1];
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
  const int place = threadIdx.x / K.threads;
  Held<K> held = {}, residual = {};
  held.thread = residual.thread = threadIdx.x % K.threads;
  constexpr bool kAddsFirst = K.load == kAdd, kAddsLater = K.post.kind != kNoNorm;
  if (active) {
    if constexpr (kAddsFirst || kAddsLater) load_rows(p.other, r, residual);
    load_held(held);
  }
  if constexpr (kAddsFirst) add<K, K.multiplied>(p, r, residual, held, active);
  if constexpr (kAddsLater) {
    rms_norm<K, K.post, kPostSum>(held, p.post_weight, p.post_eps, shared.scratch);
    add<K, false>(p, r, residual, held, active);
  }
  if constexpr (K.norm.kind == kRmsNorm) rms_norm<K, K.norm, kNormSum>(held, p.weight, p.eps, shared.scratch);
  if constexpr (K.norm.kind == kLayerNorm) layer_norm<K, K.norm>(held, p.weight, p.bias, p.eps, shared.scratch);
  if constexpr (K.y)
    if (active) store_rows(p.y, r, held, K.y_cols);
  if constexpr (K.collect_amax) {
    int low, high = row_amax(held, low);
    high = lanes_max(active ? high : 0, kWarp);
    if (threadIdx.x % kWarp == 0) atomicMax(p.tensor_amax, high);
  }
  if constexpr (K.data || K.scale) {
    int* const amax = shared.amax + (Shared<K>::kGroups ? place * Shared<K>::kParts * Codes<K>::kGroups : 0);
    quantize(p, r, held, shared.scratch, amax, active);
    if constexpr (Codes<K>::kSwizzled)
      if (r >= p.rows && r < (p.rows + 127) / 128 * 128) zero_padding<K>(p, r, held.thread);
  }
}

template <Stages K>
DEVICE void run(const Row& p, long long block, Shared<K>& shared) {
  const long long r = block * Shared<K>::kRows + threadIdx.x / K.threads;
  const bool active = r < p.rows && !skips<K>(p, r);
  work(p, r, active, [&](Held<K>& held) { load(p, r, held); }, shared);
}

}  // namespace fused_ops
