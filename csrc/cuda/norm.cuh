// Norms: transforms of the row that a block holds.
#pragma once

#include "row.cuh"

namespace fused_ops {

// A thread's elements of a vector of any dtype that goes with the columns.
template <Stages K, Dtype DTYPE>
struct Columns {
  using W = typename Element<DTYPE>::type;
  Pack<W, Held<K>::kPack> packs[DTYPE == kNothing ? 1 : Held<K>::kPacks];

  DEVICE Columns(const Held<K>& held, const void* data) {
    if constexpr (DTYPE != kNothing)
#pragma unroll
      for (int i = 0; i < Held<K>::kPacks; ++i) load<K.aligned>(packs[i], (const W*)data + held.at(i), held.count(i));
  }
  DEVICE float operator()(int i, int j) const {
    float two[2];
    widen_two(packs[i].e + j / 2 * 2, two[0], two[1]);
    return two[j % 2];
  }
};

template <Stages K, Slot SLOT>
DEVICE float rstd_of(const Held<K>& held, float eps, Scratch& scratch) {
  const float sum = sum_of<K, SLOT>(held, scratch, [](float x, int, int) { return x * x; });
  return 1.0f / sqrtf(sum / (float)K.cols + eps);
}

// y = round_S(x * rstd * w), or round_S(round_S(x * rstd) * w).
template <Stages K, NormStage NORM>
DEVICE void scale_by(Held<K>& held, float rstd, const Columns<K, NORM.weight>& w) {
  held.each([&](float x, int i, int j) {
    x = x * rstd;
    if constexpr (NORM.round_before_weight && NORM.weight != kNothing) x = round_to<typename Held<K>::T>(x);
    if constexpr (NORM.weight != kNothing) x *= NORM.weight_plus_one ? w(i, j) + 1.0f : w(i, j);
    return x;
  });
}

template <Stages K, NormStage NORM, Slot SLOT>
DEVICE void rms_norm(Held<K>& held, const void* weight, float eps, Scratch& scratch) {
  const Columns<K, NORM.weight> w(held, weight);  // on its way while the sum is made
  scale_by<K, NORM>(held, rstd_of<K, SLOT>(held, eps, scratch), w);
}

// y = round_S((x - mean) * rstd * w + b), the variance being about the mean.
template <Stages K, NormStage NORM>
DEVICE void layer_norm(Held<K>& held, const void* weight, const void* bias, float eps, Scratch& scratch) {
  const Columns<K, NORM.weight> w(held, weight);
  const Columns<K, NORM.bias> b(held, bias);
  const float mean = sum_of<K, kMeanSum>(held, scratch, [](float x, int, int) { return x; }) / (float)K.cols;
  const float squares = sum_of<K, kNormSum>(held, scratch, [&](float x, int i, int j) {
    const float apart = x - mean;
    return j < held.count(i) ? apart * apart : 0.0f;
  });
  const float rstd = 1.0f / sqrtf(squares / (float)K.cols + eps);
  held.each([&](float x, int i, int j) {
    x = (x - mean) * rstd;
    if constexpr (NORM.weight != kNothing) x *= w(i, j);
    if constexpr (NORM.bias != kNothing) x += b(i, j);
    return x;
  });
}

}  // namespace fused_ops
