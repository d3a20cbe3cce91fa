// Number formats and scale arithmetic, shared by host and device code: no headers, no torch.
//
// Functions are templates over a float type F and an int type I of the same width: float and int, or a vector of each.
// What they compute is defined by quant/formats.py.
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

constexpr int kInfinityBits = 0x7f800000, kMagnitudeBits = 0x7fffffff, kNanBits = 0x7fc00000;

// A quantization key, as quant/key.py packs it into an int.
struct Key {
  enum Format { kE4m3 = 0, kE4m3Fnuz = 1, kInt8 = 2, kE2m1 = 3 };
  enum ScaleFormat { kFloat = 0, kE8m0 = 1, kScaleE4m3 = 2 };
  enum Layout { kRowMajor = 0, kColumnMajor = 1, kTmaAligned = 2, kPackedUe8m0 = 3, kSwizzled128x4 = 4 };

  long long code;

  HOST_DEVICE constexpr int format() const { return code & 15; }
  HOST_DEVICE constexpr bool is_static() const { return code >> 4 & 1; }
  HOST_DEVICE constexpr bool asymmetric() const { return code >> 5 & 1; }
  HOST_DEVICE constexpr bool power_of_two() const { return code >> 6 & 1; }
  HOST_DEVICE constexpr bool per_tensor() const { return code >> 7 & 1; }
  HOST_DEVICE constexpr int scale_format() const { return code >> 8 & 3; }
  HOST_DEVICE constexpr int layout() const { return code >> 12 & 7; }
  // Columns that share a scale.
  HOST_DEVICE constexpr long long group(long long cols) const { return code >> 16 ? code >> 16 : cols; }
  HOST_DEVICE constexpr int codes_per_byte() const { return format() == kE2m1 ? 2 : 1; }
};

// The largest code, which amax maps to, and the smallest float32 scale.
HOST_DEVICE float format_max(int format) {
  switch (format) {
    case Key::kInt8:
      return 127.0f;
    case Key::kE2m1:
      return 6.0f;
    case Key::kE4m3Fnuz:
      return 224.0f;
    default:
      return 448.0f;
  }
}
HOST_DEVICE float smallest_scale(int format) {
  return format == Key::kInt8 ? 1.1920928955078125e-07f /* 2^-23 */ : 1.0f / (format_max(format) * 512.0f);
}

// --- codes, each in the low byte ---

// The code of |x| in a format with MANTISSA bits whose smallest normal exponent is SMALLEST, biased as in float32.
// Adding a float whose last place is the format's step there rounds x to nearest even, subnormals included.
template <int MANTISSA, int SMALLEST, class I, class F>
HOST_DEVICE I magnitude_code(F x) {
  constexpr int kShift = 23 - MANTISSA;
  I exponent = bits<I>(x) & kInfinityBits;
  exponent = exponent > (SMALLEST << 23) ? exponent : I{} + (SMALLEST << 23);
  const I step = exponent + (kShift << 23);
  const I rounded = bits<I>(x + bits<F>(step)) - step;
  return rounded + (exponent >> kShift) - (SMALLEST << MANTISSA);
}

// Comparisons stand where they choose: of vectors of sixteen, compilers keep no result of one.
template <class I, class F>
HOST_DEVICE I unless_nan(F x, I code, int of_nan) {
  return (bits<I>(x) & kMagnitudeBits) > kInfinityBits ? I{} + of_nan : code;
}

// float8_e4m3fn, saturating; NaN is 0x7f. FINITE: |x| rounds to at most 448 and isn't NaN.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_e4m3(F x) {
  constexpr int kMax = 0x43e00000;  // 448
  const I all = bits<I>(x);
  I magnitude = all & kMagnitudeBits;
  if constexpr (!FINITE) magnitude = magnitude > kMax ? I{} + kMax : magnitude;
  const I code = magnitude_code<3, 121, I>(bits<F>(magnitude)) | (all >> 24 & 0x80);
  return FINITE ? code : unless_nan(x, code, 0x7f);
}

// float8_e4m3fnuz, saturating at 224; there is no negative zero, whose code is NaN's. FINITE as above.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_e4m3fnuz(F x) {
  constexpr int kMax = 0x43600000;  // 224
  I magnitude = bits<I>(x) & kMagnitudeBits;
  if constexpr (!FINITE) magnitude = magnitude > kMax ? I{} + kMax : magnitude;
  const I code = magnitude_code<3, 120, I>(bits<F>(magnitude));
  const I sign = code > 0 ? bits<I>(x) >> 24 & 0x80 : I{};
  return FINITE ? code | sign : unless_nan(x, code | sign, 0x80);
}

// The value of a code that isn't NaN, by way of subnormal float32s.
template <class F, class I>
HOST_DEVICE F decode_e4m3(I code) {
  return bits<F>((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
}

// float4_e2m1, saturating; NaN is 0. FINITE: |x| rounds to at most 6 and isn't NaN.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_e2m1(F x) {
  constexpr int kMax = 0x40c00000;  // 6
  const I all = bits<I>(x);
  I magnitude = all & kMagnitudeBits;
  if constexpr (!FINITE) magnitude = magnitude > kMax ? I{} + kMax : magnitude;
  const I code = magnitude_code<1, 127, I>(bits<F>(magnitude)) | (all >> 28 & 8);
  return FINITE ? code : unless_nan(x, code, 0);
}

// int8, saturating; NaN is 0. FINITE as above; bits above the low byte are then left. Adding 1.5 * 2^23 rounds to an
// integer in the low bits.
template <bool FINITE, class I, class F>
HOST_DEVICE I encode_int8(F x) {
  constexpr float kMagic = 12582912.0f;
  constexpr int kMagicBits = 0x4b400000;
  I code = bits<I>(x + kMagic);
  if constexpr (FINITE) return code;
  // Bits of huge values compare as integers too: negative floats are negative ints, beyond any code.
  code = code > kMagicBits + 127 ? I{} + (kMagicBits + 127) : code;
  code = code < kMagicBits - 128 ? I{} + (kMagicBits - 128) : code;
  return unless_nan(x, code & 0xff, 0);
}

// Nearest integer, ties to even, of any x: adding 2^23 of its sign leaves no room for a fraction.
template <class I, class F>
HOST_DEVICE F round_even(F x) {
  const F step = bits<F>((bits<I>(x) & ~kMagnitudeBits) | 0x4b000000);
  return (bits<I>(x) & kMagnitudeBits) < 0x4b000000 ? (x + step) - step : x;
}

// int8 with a zero point, saturating; NaN is 0.
template <class I, class F>
HOST_DEVICE I encode_int8_asymmetric(F x, F zero_point) {
  return encode_int8<false, I>(round_even<I>(x) + zero_point);
}

// --- scales ---

// The scale of a group: what is stored (float32 bits, or an eight-bit code), and what elements are multiplied with.
// Where the group isn't finite both are NaN; where the codes are all to be zero the reciprocal is NaN.
template <class F, class I>
struct Scale {
  I stored;
  F reciprocal;
};

// From the bits of the group's largest magnitude. `given` is scale2 of NVFP4, else the bound of the amax.
template <class F, class I>
HOST_DEVICE Scale<F, I> dynamic_scale(I amax_bits, const Key& key, float given) {
  const F amax = bits<F>(amax_bits), nan = bits<F>(I{} + kNanBits);
  const float limit = format_max(key.format());
  if (key.scale_format() == Key::kScaleE4m3) {
    const float g = 1.0f / given;
    const F finite = amax_bits < kInfinityBits ? amax : nan;
    const I code = encode_e4m3<false, I>(g * (finite * (1.0f / 6.0f)));
    const F reciprocal = g * (1.0f / decode_e4m3<F>(code));
    const I is_zero = (code - 1) >> 31;
    return {code, ((code | is_zero) & 0x7f) == 0x7f ? nan : reciprocal};
  }
  if (key.scale_format() == Key::kE8m0) {
    I exponent = (bits<I>(amax / limit) + 0x7fffff) >> 23;
    exponent = exponent > 254 ? I{} + 254 : exponent;
    const I inverse = exponent == 254 ? I{} + 0x400000 : (254 - exponent) << 23;
    return {amax_bits < kInfinityBits ? exponent : I{} + 255, amax_bits < kInfinityBits ? bits<F>(inverse) : nan};
  }
  F scale;
  if (key.power_of_two()) {
    const F ratio = (amax < 1e-10f ? F{} + 1e-10f : amax) / limit;
    scale = bits<F>((bits<I>(ratio) + 0x7fffff) & kInfinityBits);
  } else {
    const F least = F{} + smallest_scale(key.format());
    scale = (amax <= given ? amax : F{} + given) / limit;
    scale = scale < least ? least : scale;
  }
  scale = amax_bits < kInfinityBits ? scale : nan;
  return {bits<I>(scale), 1.0f / scale};
}

// Of an asymmetric int8 group that spans [-low, high], both at least 0, with its zero point.
template <class F, class I>
HOST_DEVICE Scale<F, I> asymmetric_scale(I high_bits, I low_bits, F& zero_point) {
  const I largest = high_bits > low_bits ? high_bits : low_bits;
  const F least = F{} + smallest_scale(Key::kInt8), nan = bits<F>(I{} + kNanBits);
  F scale = (bits<F>(high_bits) + bits<F>(low_bits)) / 255.0f;
  scale = scale < least ? least : scale;
  scale = largest < kInfinityBits ? scale : nan;
  const F reciprocal = 1.0f / scale;
  zero_point = largest < kInfinityBits ? -128.0f + round_even<I>(bits<F>(low_bits) * reciprocal) : F{};
  return {bits<I>(scale), reciprocal};
}

}  // namespace fused_ops
