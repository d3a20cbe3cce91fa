// Instruction sets: a kernel file is compiled once per set, and the set is chosen when the library loads.
//
//   #include "isa.h"
//   #define KERNELS "norm.inc"
//   #include "each_isa.inc"                       // namespaces fused_ops::base and fused_ops::v3
//   ... PICK_ISA(norm_rows)(arguments);
//
// A .inc file includes no headers (they would be compiled for one set and linked into all) and tests ISA, not
// __AVX2__, which the pragma doesn't define.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_V3 1
#else
#define HAVE_V3 0
#endif

#define ISA_BASE 1
#define ISA_V3 3

namespace fused_ops {

// Elements of a row are summed in this many lanes, element i in lane i % 32, and the lanes in a binary tree: the same
// bits on every instruction set, in every operation.
constexpr int kLanes = 32;

// FUSED_OPS_ISA=base forces the portable code, so that a test can compare the two bit by bit.
inline bool use_v3() {
#if HAVE_V3
  const char* forced = std::getenv("FUSED_OPS_ISA");
  return __builtin_cpu_supports("x86-64-v3") && !(forced && std::strcmp(forced, "base") == 0);
#else
  return false;
#endif
}

inline const bool kUseV3 = use_v3();

}  // namespace fused_ops

#if HAVE_V3
#define PICK_ISA(function) (::fused_ops::kUseV3 ? ::fused_ops::v3::function : ::fused_ops::base::function)
#else
#define PICK_ISA(function) (::fused_ops::base::function)
#endif
