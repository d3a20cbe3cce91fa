// The vocabulary of device code: what NVRTC and a host compiler (tests/host_cuda) both understand.
//
// Every use of PTX has its C++ twin, which defines the result; the host runs the twin.
#pragma once

#include "../quantize.h"

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#define DEVICE inline
#endif
#define INLINE DEVICE

// The block's shared memory.
#ifndef SHARED
#define SHARED(T, NAME) __shared__ T NAME
#endif

#if defined(__CUDA_ARCH__) && !defined(FUSED_OPS_NO_PTX)
#define PTX(ARCH) (__CUDA_ARCH__ >= ARCH)
#else
#define PTX(ARCH) 0
#endif

namespace fused_ops {

// Scalars under the names that csrc/activation.inc knows vectors by.
using f32 = float;
using i32 = int;

DEVICE float all(float x) { return x; }
DEVICE double to_double(float x) { return x; }
DEVICE float to_float(double x) { return (float)x; }
DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
// NaN gives the bound.
DEVICE float lesser(float x, float bound) { return x < bound ? x : bound; }
DEVICE float greater(float x, float bound) { return x > bound ? x : bound; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }

// --- memory formats ---

struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};

DEVICE float widen(float x) { return x; }
DEVICE float widen(Bf16 x) { return bits<float>((int)(x.bits << 16)); }

DEVICE float widen(Fp16 x) {
#if PTX(530)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Exponents are moved to the middle of float32's range, so that subnormals of float16 are normal or zero.
  const int magnitude = (x.bits & 0x7fff) << 13;
  const float value = magnitude >= 0x0f800000 ? bits<float>(magnitude | 0x70000000) : bits<float>(magnitude) * 0x1p112f;
  return bits<float>(bits<int>(value) | (x.bits & 0x8000) << 16);
#endif
}

// x rounded to nearest even; NaN becomes the one NaN 0x7fff.
template <class T>
DEVICE T narrow(float x);

template <>
DEVICE float narrow<float>(float x) {
  return x;
}

template <>
DEVICE Bf16 narrow<Bf16>(float x) {
#if PTX(800)
  unsigned y;  // of two, which runs at full rate where that of one does not
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(0.0f), "f"(x));
  return {(unsigned short)y};
#else
  const unsigned all = bits<unsigned>(x);
  if ((all & kMagnitudeBits) > kInfinityBits) return {0x7fff};
  return {(unsigned short)((all + 0x7fff + (all >> 16 & 1)) >> 16)};
#endif
}

template <>
DEVICE Fp16 narrow<Fp16>(float x) {
#if PTX(800)
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(0.0f), "f"(x));
  return {(unsigned short)y};
#else
  const int magnitude = bits<int>(x) & kMagnitudeBits, sign = bits<int>(x) >> 16 & 0x8000;
  if (magnitude > kInfinityBits) return {0x7fff};
  if (magnitude >= 0x477ff000) return {(unsigned short)(sign | 0x7c00)};  // 65520 rounds to infinity
  // Adding a float whose last place is float16's step there rounds, subnormals included.
  return {(unsigned short)(sign | magnitude_code<10, 113, int>(bits<float>(magnitude)))};
#endif
}

// Two neighbours at once: of 16 bits they are the halves of a word.
template <class T>
DEVICE void widen_two(const T* from, float& x, float& y) {
  x = widen(from[0]);
  y = widen(from[1]);
}
template <class T>
DEVICE void narrow_two(float x, float y, T* to) {
  to[0] = narrow<T>(x);
  to[1] = narrow<T>(y);
}
#if PTX(800)
template <>
DEVICE void widen_two(const Bf16* from, float& x, float& y) {
  const unsigned both = *(const unsigned*)from;
  x = bits<float>(both << 16);
  y = bits<float>(both & 0xffff0000u);
}
template <>
DEVICE void narrow_two(float x, float y, Bf16* to) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*(unsigned*)to) : "f"(y), "f"(x));
}
template <>
DEVICE void narrow_two(float x, float y, Fp16* to) {
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*(unsigned*)to) : "f"(y), "f"(x));
}
#endif

// x rounded to T, as a float.
template <class T, bool FITS = false>
DEVICE float round_to(float x) {
  return widen(narrow<T>(x));
}

// N elements of T, moved by accesses of up to 16 bytes where they are aligned so.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T e[N];
};

// The first n of N elements, the others zero. ALIGNED: `from` is, to the pack, and n is 0 or N.
template <bool ALIGNED, class T, int N>
DEVICE void load(Pack<T, N>& to, const T* from, int n) {
  if constexpr (ALIGNED) {
    using Words = Pack<unsigned, sizeof(to) / 4>;  // which are chosen whole, where halves of them would be one by one
    to = bits<Pack<T, N>>(n ? *(const Words*)from : Words{});
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to.e[j] = j < n ? from[j] : T{};
  }
}

template <bool ALIGNED, class T, int N>
DEVICE void store(T* to, const Pack<T, N>& from, int n) {
  if constexpr (ALIGNED) {
    if (n) *(Pack<T, N>*)to = from;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < n) to[j] = from.e[j];
  }
}

// --- over the lanes of a warp: each gets the result ---

// Over `lanes` neighbours, a power of two. Every lane adds the same pairs, so all get the same bits.
DEVICE float lanes_sum(float x, int lanes) {
#pragma unroll
  for (int distance = lanes / 2; distance; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
DEVICE int lanes_max(int x, int lanes) {
#pragma unroll
  for (int distance = lanes / 2; distance; distance /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// --- between devices, which see each other's memory ---

// All that this thread wrote or saw written before is seen by who finds the flag raised.
DEVICE void raise_flag(unsigned long long* flag, unsigned long long value) {
#if PTX(700)
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
#else
  *(volatile unsigned long long*)flag = value;
#endif
}

DEVICE unsigned long long look_at(const unsigned long long* flag) {
#if PTX(700)
  unsigned long long value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
#else
  return *(const volatile unsigned long long*)flag;
#endif
}

DEVICE unsigned long long nanoseconds() {
#if PTX(700)
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#else
  return clock64();
#endif
}

}  // namespace fused_ops
