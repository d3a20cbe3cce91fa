// Quantizers: stores of a row, as codes and scales.
#pragma once

#include "row.cuh"

namespace fused_ops {

// What every stage here asks of the key.
template <Stages K>
struct Codes {
  static constexpr Key kKey{K.key};
  static constexpr int kPack = Held<K>::kPack, kPacks = Held<K>::kPacks;
  static constexpr int kGroup = (int)kKey.group(K.cols);
  static constexpr int kGroups = (K.cols + kGroup - 1) / kGroup;
  // Groups that neighbouring lanes of a warp hold, and nobody else.
  static constexpr int kLanes = kGroup % kPack ? 0 : kGroup / kPack;
  static constexpr bool kInLanes = kLanes > 0 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0;
  // Groups that all threads work on, one after another: a whole row, or what is more than they hold.
  static constexpr bool kByAll = kGroup >= K.cols || kGroup > Held<K>::kCols;
  // Others that they hold at once.
  static constexpr int kTogether = Held<K>::kWhole || kByAll ? kGroups : Held<K>::kCols / kGroup;
  // Bytes that complete a layout's unit of four groups are zero.
  static constexpr bool kInFours = kKey.layout() == Key::kSwizzled128x4 || kKey.layout() == Key::kPackedUe8m0;
  static constexpr int kScaleBytes = kInFours || kKey.scale_format() != Key::kFloat ? 1 : 4;
  static constexpr bool kAsymmetric = kKey.asymmetric();
  static constexpr bool kSwizzled = kKey.layout() == Key::kSwizzled128x4;
};

template <Stages K>
DEVICE int encode(float x, float zero_point) {
  constexpr Key key{K.key};
  if constexpr (key.asymmetric()) return encode_int8_asymmetric<int>(x, zero_point);
  if constexpr (key.format() == Key::kInt8) return encode_int8<false, int>(x);
  if constexpr (key.format() == Key::kE2m1) return encode_e2m1<false, int>(x);
  if constexpr (key.format() == Key::kE4m3Fnuz) return encode_e4m3fnuz<false, int>(x);
  return encode_e4m3<false, int>(x);
}

#if PTX(890)
DEVICE int encode_two_e4m3(float first, float second) {
  unsigned short codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
}
#endif

// FP4 by the hardware, where an architecture with all of its own features has it; _cuda.HARDWARE_FP4 defines it.
#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define FP4_BY_PTX PTX(1000)
#else
#define FP4_BY_PTX 0
#endif
#if defined(FUSED_OPS_HARDWARE_FP4) && (FP4_BY_PTX || !defined(__CUDA_ARCH__))
// What the instruction makes of NaN, 6, is 0 here.
DEVICE int encode_two_e2m1(float first, float second) {
  first = first == first ? first : 0.0f;
  second = second == second ? second : 0.0f;
#if FP4_BY_PTX
  int codes;
  asm("{\n"
      "  .reg .b8 two;\n"
      "  .reg .b16 wide;\n"
      "  cvt.rn.satfinite.e2m1x2.f32 two, %1, %2;\n"
      "  mov.b16 wide, {two, 0};\n"
      "  cvt.u32.u16 %0, wide;\n"
      "}"
      : "=r"(codes)
      : "f"(second), "f"(first));
  return codes;
#else
  const auto code = [](float x) {
    const float m = bits<float>(bits<int>(x) & kMagnitudeBits);  // which at a tie goes to the even code
    const int steps = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.0f);
    return steps | (bits<int>(x) < 0 ? 8 : 0);
  };
  return code(first) | code(second) << 4;
#endif
}
#endif

// Codes of two neighbours, the first in the low bits.
template <Stages K>
DEVICE int encode_two(float first, float second, float zero_point) {
  constexpr int kFormat = Key{K.key}.format();
#if PTX(890)
  if constexpr (kFormat == Key::kE4m3) return encode_two_e4m3(first, second);
#endif
#if defined(FUSED_OPS_HARDWARE_FP4) && (FP4_BY_PTX || !defined(__CUDA_ARCH__))
  if constexpr (kFormat == Key::kE2m1) return encode_two_e2m1(first, second);
#endif
  constexpr int kBits = 8 / Key{K.key}.codes_per_byte();
  return encode<K>(first, zero_point) | encode<K>(second, zero_point) << kBits;
}

// Codes of pack i.
template <Stages K>
DEVICE void store_codes(const Held<K>& held, int i, unsigned char* data, float reciprocal, float zero_point) {
  constexpr int kPack = Held<K>::kPack;
  float v[kPack];
  held.floats(i, v);
  const int n = held.count(i);
  constexpr int kPerByte = Key{K.key}.codes_per_byte();
  Pack<unsigned char, kPack / kPerByte> codes;
#pragma unroll
  for (int j = 0; j < kPack; j += 2) {
    const int two = encode_two<K>(v[j] * reciprocal, v[j + 1] * reciprocal, zero_point);
    codes.e[j / kPerByte] = (unsigned char)two;
    if constexpr (kPerByte == 1) codes.e[j + 1] = (unsigned char)(two >> 8);
  }
  store<K.aligned>(data + held.at(i) / kPerByte, codes, n / kPerByte);
}

// What is stored for group g, and zeros after the last.
template <Stages K>
DEVICE void store_scale(char* row, const ScalePlace& place, int g, int stored) {
  const auto put = [&](int slot, int value) {
    char* const to = row + slot / 4 * place.four + slot % 4 * place.one;
    if constexpr (Codes<K>::kScaleBytes == 4) {
      *(int*)to = value;
    } else {
      *to = (char)value;
    }
  };
  put(g, Key{K.key}.layout() == Key::kPackedUe8m0 ? stored >> 23 : stored);
  if constexpr (Codes<K>::kInFours)
    if (g == Codes<K>::kGroups - 1)
      for (int slot = g + 1; slot % 4; ++slot) put(slot, 0);
}

// Largest magnitude, or largest and negated smallest element, of pack i.
template <Stages K>
DEVICE void most_of(const Held<K>& held, int i, int& high, int& low) {
  float v[Held<K>::kPack];
  held.floats(i, v);
  high = low = 0;
#pragma unroll
  for (const float x : v) {
    if constexpr (Key{K.key}.asymmetric()) {
      high = larger(high, bits<int>(x));
      low = larger(low, bits<int>(x) ^ ~kMagnitudeBits);
    } else {
      high = larger(high, bits<int>(x) & kMagnitudeBits);
    }
  }
}

template <Stages K>
DEVICE void include(const Held<K>& held, int& high, int& low) {
#pragma unroll
  for (int i = 0; i < Held<K>::kPacks; ++i) {
    int a, b;
    most_of(held, i, a, b);
    high = larger(high, a);
    low = larger(low, b);
  }
}

// A group's codes and, by one thread, its scale.
template <Stages K>
DEVICE Scale<float, int> scale_of(int high, int low, float given, float& zero_point) {
  zero_point = 0;
  if constexpr (Key{K.key}.asymmetric()) return asymmetric_scale<float, int>(high, low, zero_point);
  return dynamic_scale<float, int>(high, Key{K.key}, given);
}

template <Stages K, class R>
DEVICE void quantize(const Row& p, long long r, R& row, Scratch& scratch, int* amax, bool active) {
  using C = Codes<K>;
  constexpr int kCols = Held<K>::kCols;
  // Nobody writes where there is no row. Compilers use fewer registers if they are told so here, but not of whole rows.
  unsigned char* const data = K.data && (active || C::kByAll) ? at<K.flat, unsigned char>(p.data, r) : nullptr;
  if constexpr (K.by_tensor_amax || C::kKey.is_static()) {
    float scale;
    if constexpr (K.by_tensor_amax) {
      const float bound = p.given ? *p.given : bits<float>(kInfinityBits);
      scale = bits<float>(dynamic_scale<float, int>(*p.tensor_amax, C::kKey, bound).stored);
    } else {
      scale = *p.given;
    }
    if (K.scale && r == 0 && row.thread == 0) *(float*)p.scale.data = scale;
    const float reciprocal = 1.0f / scale, zero_point = C::kAsymmetric ? (float)*p.given_zero : 0.0f;
    row.template write<kCols>([&](const Held<K>& part) {
#pragma unroll
      for (int i = 0; i < C::kPacks; ++i)
        if (active) store_codes(part, i, data, reciprocal, zero_point);
    });
    return;
  }
  const float given = p.given ? *p.given : bits<float>(kInfinityBits);
  char* const scales = at<C::kSwizzled>(p.scale, r);
  char* const zero_points = at<C::kSwizzled>(p.zero_point, r);
  const auto write = [&](const Held<K>& part, int i, int g, const Scale<float, int>& scale, float zero_point,
                         bool first) {
    if (!active || !part.count(i)) return;
    if (K.scale && first) store_scale<K>(scales, p.scale, g, scale.stored);
    if (K.zero_point && first) store_scale<K>(zero_points, p.zero_point, g, (int)zero_point);
    if (K.data) store_codes(part, i, data, scale.reciprocal, zero_point);
  };
  if constexpr (C::kByAll) {
    for (int g = 0; g < C::kGroups; ++g) {
      const int begin = g * C::kGroup, end = g + 1 < C::kGroups ? begin + C::kGroup : K.cols;
      int low = 0, high = 0;
      row.parts([&](const Held<K>& part) { include(part, high, low); }, begin, end);
      if (g) __syncthreads();  // the group before has been read
      high = row_max<K, kAmax>(high, scratch);
      if constexpr (C::kAsymmetric) low = row_max<K, kLow>(low, scratch);
      float zero_point;
      const auto scale = scale_of<K>(high, low, given, zero_point);
      row.template write<kCols>(
          [&](const Held<K>& part) {
#pragma unroll
            for (int i = 0; i < C::kPacks; ++i)
              write(part, i, g, scale, zero_point, i == 0 && part.thread == 0 && part.first == begin);
          },
          begin, end);
    }
  } else if constexpr (C::kInLanes) {
    row.template write<kCols>([&](const Held<K>& part) {
#pragma unroll
      for (int i = 0; i < C::kPacks; ++i) {
        int low, high;
        most_of(part, i, high, low);
        high = lanes_max(high, C::kLanes);
        if constexpr (C::kAsymmetric) low = lanes_max(low, C::kLanes);
        float zero_point;
        const auto scale = scale_of<K>(high, low, given, zero_point);
        write(part, i, part.at(i) / C::kGroup, scale, zero_point, part.thread % C::kLanes == 0);
      }
    });
  } else {  // an integer maximum in shared memory, which has no order
    constexpr int kParts = C::kAsymmetric ? 2 : 1;
    row.template write<C::kTogether * C::kGroup>([&](const Held<K>& part) {
      const auto group = [&](int i) { return (part.at(i) - part.first) / C::kGroup; };
      if constexpr (!Held<K>::kWhole) __syncthreads();  // the part before has been read
      for (int g = part.thread; g < kParts * C::kTogether; g += K.threads) amax[g] = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < C::kPacks; ++i) {
        int low, high;
        most_of(part, i, high, low);
        if (!part.count(i)) continue;
        atomicMax(amax + group(i), high);
        if (kParts == 2) atomicMax(amax + C::kTogether + group(i), low);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < C::kPacks; ++i) {
        const int g = group(i) < C::kTogether ? group(i) : 0;
        float zero_point;
        const auto scale = scale_of<K>(amax[g], kParts == 2 ? amax[C::kTogether + g] : 0, given, zero_point);
        write(part, i, part.first / C::kGroup + g, scale, zero_point, part.at(i) % C::kGroup == 0);
      }
    });
  }
}

// Scales of rows that don't exist, which complete a layout's unit of 128 rows, are zero.
template <Stages K>
DEVICE void zero_padding(const Row& p, long long r, int thread) {
  char* const scales = at<true>(p.scale, r);
  for (int slot = thread; slot < p.scale.row_bytes; slot += K.threads) scales[slot / 4 * p.scale.four + slot % 4] = 0;
}

}  // namespace fused_ops
