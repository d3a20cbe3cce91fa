// Norms: transforms of a row.
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

template <Stages K, Slot SLOT, class R>
DEVICE float rstd_of(R& row, float eps, Scratch& scratch) {
  const float sum = sum_of<K, SLOT>(row, scratch, [](float x, bool) { return x * x; });
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

// On its way while sums are made.
template <Stages K, Dtype DTYPE, class R>
DEVICE auto columns_of(const R& row, const void* data) {
  return row.ahead([data](const Held<K>& part) { return Columns<K, DTYPE>(part, data); });
}

template <Stages K, NormStage NORM, Slot SLOT, class R>
DEVICE decltype(auto) rms_norm(R& row, const void* weight, float eps, Scratch& scratch) {
  const auto w = columns_of<K, NORM.weight>(row, weight);
  const float rstd = rstd_of<K, SLOT>(row, eps, scratch);
  return row.then([=](Held<K>& part) { scale_by<K, NORM>(part, rstd, w(part)); });
}

// y = round_S((x - mean) * rstd * w + b), the variance being about the mean.
template <Stages K, NormStage NORM, class R>
DEVICE decltype(auto) layer_norm(R& row, const void* weight, const void* bias, float eps, Scratch& scratch) {
  const auto weights = columns_of<K, NORM.weight>(row, weight);
  const auto biases = columns_of<K, NORM.bias>(row, bias);
  const float mean = sum_of<K, kMeanSum>(row, scratch, [](float x, bool) { return x; }) / (float)K.cols;
  const float squares = sum_of<K, kNormSum>(row, scratch, [mean](float x, bool there) {
    const float apart = x - mean;
    return there ? apart * apart : 0.0f;
  });
  const float rstd = 1.0f / sqrtf(squares / (float)K.cols + eps);
  return row.then([=](Held<K>& part) {
    const auto& w = weights(part);
    const auto& b = biases(part);
    part.each([&](float x, int i, int j) {
      x = (x - mean) * rstd;
      if constexpr (NORM.weight != kNothing) x *= w(i, j);
      if constexpr (NORM.bias != kNothing) x += b(i, j);
      return x;
    });
  });
}

template <Stages K, NormStage NORM, Slot SLOT, class R>
DEVICE decltype(auto) norm(R& row, const void* weight, const void* bias, float eps, Scratch& scratch) {
  if constexpr (NORM.kind == kRmsNorm) {
    return rms_norm<K, NORM, SLOT>(row, weight, eps, scratch);
  } else if constexpr (NORM.kind == kLayerNorm) {
    return layer_norm<K, NORM>(row, weight, bias, eps, scratch);
  } else {
    return (row);
  }
}

}  // namespace fused_ops
