// What a CUDA kernel asks of its device, for a host compiler: every thread of a block is a fiber (fibers.cpp), and
// barriers and shuffles are where they switch. PTX, clusters and asynchronous copies can't be had.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED(T, NAME)                          \
  static_assert(sizeof(T) <= fibers::kSharedBytes); \
  T& NAME = *(T*)fibers::shared()

struct Dim {
  unsigned x, y, z;
};
extern thread_local Dim threadIdx, blockIdx;

namespace fibers {

constexpr size_t kSharedBytes = 48 << 10;  // what every device has
void* shared();                            // the block's
unsigned threads();
void wait_for_block();  // until every thread is here
void wait_for_warp();
void pause(unsigned nanoseconds);  // lets other blocks run; the clock of all devices goes on by so much
unsigned long long now();
unsigned& word(unsigned thread);  // that a thread shows to others

// A kernel with its arguments, which are copied as a launch does.
struct Kernel {
  virtual void operator()() const = 0;
  virtual ~Kernel() = default;
};
template <class F>
struct Bound : Kernel {
  F f;
  explicit Bound(F f) : f(f) {}
  void operator()() const override { f(); }
};

template <class... P, size_t... I>
Kernel* bound(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  return new Bound([kernel, ... a = *(P*)arguments[I]] { kernel(a...); });
}
template <class... P>
Kernel* bound(void (*kernel)(P...), void** arguments) {
  return bound(kernel, arguments, std::index_sequence_for<P...>());
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait_for_block(); }
inline void __syncwarp() { fibers::wait_for_warp(); }
inline void __nanosleep(unsigned nanoseconds) { fibers::pause(nanoseconds); }
inline long long clock64() { return fibers::now(); }

inline int __syncthreads_and(int value) {
  fibers::word(threadIdx.x) = value;
  fibers::wait_for_block();
  bool all = true;
  for (unsigned t = 0; t < fibers::threads(); ++t) all = all && fibers::word(t);
  fibers::wait_for_block();  // before a word is written again
  return all;
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  static_assert(sizeof(V) == sizeof(unsigned));
  std::memcpy(&fibers::word(threadIdx.x), &value, sizeof(value));
  fibers::wait_for_warp();
  V other;
  std::memcpy(&other, &fibers::word(threadIdx.x ^ mask), sizeof(other));
  fibers::wait_for_warp();  // before the word is written again
  return other;
}

inline void atomicMax(int* to, int value) { *to = *to > value ? *to : value; }

inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned value) {
  const unsigned old = *at;
  if (old == expected) *at = value;
  return old;
}
