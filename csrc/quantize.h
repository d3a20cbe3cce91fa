// Number formats and scale arithmetic, shared by host and device code: no headers, no torch.
//
// Encoders are templates over a float type F and an int type I of the same width: float and int, or a vector of
// each. What they compute is defined by quant/formats.py.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace fused_ops {

template <class To, class From>
HOST_DEVICE To bits(From from) {
  return __builtin_bit_cast(To, from);
}

constexpr int kInfinityBits = 0x7f800000, kMagnitudeBits = 0x7fffffff;

// A quantization key, as quant/key.py packs it into an int.
struct Key {
  enum Format { kE4m3 = 0, kE4m3Fnuz = 1, kInt8 = 2, kE2m1 = 3 };
  enum ScaleFormat { kFloat = 0, kE8m0 = 1, kScaleE4m3 = 2 };
  enum Layout { kRowMajor = 0, kColumnMajor = 1, kTmaAligned = 2, kPackedUe8m0 = 3, kSwizzled128x4 = 4 };

  long long code;

  HOST_DEVICE int format() const { return code & 15; }
  HOST_DEVICE bool is_static() const { return code >> 4 & 1; }
  HOST_DEVICE bool asymmetric() const { return code >> 5 & 1; }
  HOST_DEVICE bool power_of_two() const { return code >> 6 & 1; }
  HOST_DEVICE bool per_tensor() const { return code >> 7 & 1; }
  HOST_DEVICE int scale_format() const { return code >> 8 & 3; }
  HOST_DEVICE int layout() const { return code >> 12 & 7; }
  // Columns that share a scale.
  HOST_DEVICE long long group(long long cols) const { return code >> 16 ? code >> 16 : cols; }
};

// The largest code, which amax maps to, and the smallest scale.
HOST_DEVICE float format_max(int format) { return format == Key::kInt8 ? 127.0f : 448.0f; }
HOST_DEVICE float smallest_scale(int format) {
  return format == Key::kInt8 ? 1.1920928955078125e-07f /* 2^-23 */ : static_cast<float>(1.0 / (448.0 * 512.0));
}

// The float32 scale of a group whose largest magnitude has these bits; NaN if that isn't finite. `bound` is scale_ub.
HOST_DEVICE float dynamic_scale(int amax_bits, const Key& key, float bound) {
  if (amax_bits >= kInfinityBits) return bits<float>(0x7fc00000);
  float amax = bits<float>(amax_bits);
  const float limit = format_max(key.format());
  if (key.power_of_two()) {
    const float ratio = (amax < 1e-10f ? 1e-10f : amax) / limit;
    return bits<float>((bits<int>(ratio) + 0x7fffff) & kInfinityBits);
  }
  amax = amax <= bound ? amax : bound;
  const float scale = amax / limit, least = smallest_scale(key.format());
  return scale < least ? least : scale;
}

// The code of |x| in a format with MANTISSA bits whose smallest normal exponent is SMALLEST, biased as in float32.
// Adding a float whose last place is the format's step there rounds x to nearest even, subnormals included.
template <int MANTISSA, int SMALLEST, class I, class F>
HOST_DEVICE I magnitude_code(F x) {
  constexpr int kShift = 23 - MANTISSA;
  I exponent = bits<I>(x) & kInfinityBits;
  exponent = exponent > (SMALLEST << 23) ? exponent : exponent * 0 + (SMALLEST << 23);
  const I step = exponent + (kShift << 23);
  const I rounded = bits<I>(x + bits<F>(step)) - step;
  return rounded + (exponent >> kShift) - (SMALLEST << MANTISSA);
}

// float8_e4m3fn in the low byte, saturating; NaN is 0x7f. FINITE: |x| rounds to at most 448 and isn't NaN.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_e4m3(F x) {
  constexpr int kMax = 0x43e00000;  // 448
  const I all = bits<I>(x);
  I magnitude = all & kMagnitudeBits;
  const I nan = magnitude > kInfinityBits ? magnitude * 0 - 1 : magnitude * 0;
  if constexpr (!FINITE) magnitude = magnitude > kMax ? magnitude * 0 + kMax : magnitude;
  const I code = magnitude_code<3, 121, I>(bits<F>(magnitude)) | (all >> 24 & 0x80);
  if constexpr (FINITE) return code;
  return (code & ~nan) | (nan & 0x7f);
}

// int8 in the low byte, saturating; NaN is 0. FINITE as above. Adding 1.5 * 2^23 rounds to an integer in the low bits.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_int8(F x) {
  constexpr float kMagic = 12582912.0f;
  constexpr int kMagicBits = 0x4b400000;
  if constexpr (FINITE) return bits<I>(x + kMagic) & 0xff;
  const I nan = (bits<I>(x) & kMagnitudeBits) > kInfinityBits ? bits<I>(x) * 0 - 1 : bits<I>(x) * 0;
  I code = bits<I>(x + kMagic);
  // Bits of huge values compare as integers too: negative floats are negative ints, beyond any code.
  code = code > kMagicBits + 127 ? code * 0 + (kMagicBits + 127) : code;
  code = code < kMagicBits - 128 ? code * 0 + (kMagicBits - 128) : code;
  return code & 0xff & ~nan;
}

}  // namespace fused_ops
