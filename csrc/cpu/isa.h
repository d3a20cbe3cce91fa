// Instruction sets: a kernel file is compiled once per set, and the set is chosen when the library loads.
//
//   #include "isa.h"
//   #define KERNELS "norm.inc"
//   #include "each_isa.inc"                       // namespaces fused_ops::base, fused_ops::v3 and fused_ops::v4
//   ... PICK_ISA(norm_rows)(arguments);
//
// A .inc file includes no headers (they would be compiled for one set and linked into all) and tests ISA, not
// __AVX2__, which the pragma doesn't define.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define HAVE_X86 1
#else
#define HAVE_X86 0
#endif

#define ISA_BASE 1
#define ISA_V3 3  // x86-64-v3: AVX2, FMA, F16C
#define ISA_V4 4  // x86-64-v4, AVX-512, and of its extensions VBMI, VNNI and BF16: Zen 4, Sapphire Rapids

namespace fused_ops {

// Elements of a row are summed in this many lanes, element i in lane i % 32, and the lanes in a binary tree: the same
// bits on every instruction set, in every operation.
constexpr int kLanes = 32;

// The best that the machine has; FUSED_OPS_ISA=base or v3 forces a lesser one, so that tests can compare their bits.
extern const int kIsa;

// What a store of a whole vector around the caches asks of its address, in bytes.
inline int streaming_alignment() { return kIsa >= ISA_V4 ? 64 : 32; }

}  // namespace fused_ops

#if HAVE_X86
#define PICK_ISA(function)                                   \
  (::fused_ops::kIsa == ISA_V4   ? ::fused_ops::v4::function \
   : ::fused_ops::kIsa == ISA_V3 ? ::fused_ops::v3::function \
                                 : ::fused_ops::base::function)
#else
#define PICK_ISA(function) (::fused_ops::base::function)
#endif
