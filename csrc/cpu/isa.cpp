// Which instruction set the kernels are taken of.
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fused_ops {
namespace {

#if HAVE_X86

// vdpbf16ps adds a pair of products to each lane: the upper one, then the lower, each sum rounded, as Intel's and AMD's
// manuals say and kernels need that are to give the bits of other instruction sets.
__attribute__((target("avx512vl,avx512bf16"))) bool adds_upper_first() {
  const auto pair = [](uint32_t upper, uint32_t lower) { return (__m128bh)_mm_set1_epi32(upper | lower >> 16); };
  constexpr uint32_t kOne = 0x3f800000, kTwoTo24 = 0x4b800000, kSign = 0x80000000;
  // 1 + 2^24 - 2^24: in any other order, or without rounding between, the 1 isn't lost.
  return _mm_cvtss_f32(_mm_dpbf16_ps(_mm_set1_ps(1), pair(kTwoTo24, kSign | kTwoTo24), pair(kOne, kOne))) == 0;
}

int best_isa() {
  if (!__builtin_cpu_supports("x86-64-v3")) return ISA_BASE;
  const bool extended = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16");
  return __builtin_cpu_supports("x86-64-v4") && extended && adds_upper_first() ? ISA_V4 : ISA_V3;
}

#else

int best_isa() { return ISA_BASE; }

#endif

int chosen_isa() {
  const char* forced = std::getenv("FUSED_OPS_ISA");
  if (forced && std::strcmp(forced, "base") == 0) return ISA_BASE;
  if (forced && std::strcmp(forced, "v3") == 0) return std::min(best_isa(), ISA_V3);
  return best_isa();
}

}  // namespace

const int kIsa = chosen_isa();

}  // namespace fused_ops
