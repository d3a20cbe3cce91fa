// Gated activations: loads of the row that a block holds.
#pragma once

#include "row.cuh"

namespace fused_ops {

#include "../activation.inc"

// Gate and up, side by side in two tensors or element by element in one.
template <Stages K, Activation ACT>
DEVICE void load_gated(const Row& p, long long r, Held<K>& held) {
  using T = typename Held<K>::T;
  constexpr int kPack = Held<K>::kPack, kPacks = Held<K>::kPacks;
  const T* x = at<K.flat, const T>(p.x, r);
  const T* other = K.interleaved ? x : at<K.flat, const T>(p.other, r);
  typename Held<K>::P first[kPacks], second[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = held.at(i), n = held.count(i);
    if constexpr (K.interleaved) {
      load<K.aligned>(first[i], x + 2 * at, 2 * n < kPack ? 2 * n : kPack);
      load<K.aligned>(second[i], x + 2 * at + kPack, 2 * n < kPack ? 0 : 2 * n - kPack);
    } else {
      load<K.aligned>(first[i], x + at, n);
      load<K.aligned>(second[i], other + at, n);
    }
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const auto& from = j < kPack / 2 ? first[i] : second[i];
      const T g = K.interleaved ? from.e[2 * j % kPack] : first[i].e[j];
      const T u = K.interleaved ? from.e[2 * j % kPack + 1] : second[i].e[j];
      v[j] = gated<T, ACT, K.round_activation>(widen(g), widen(u), p.alpha, p.limit);
    }
    held.keep(i, v);
  }
}

template <Stages K>
DEVICE void load_relu2(const Row& p, long long r, Held<K>& held) {
  load_rows(p.x, r, held);
  held.each([](float x, int, int) {
    const float positive = x < 0.0f ? 0.0f : x;
    return positive * positive;
  });
}

}  // namespace fused_ops
