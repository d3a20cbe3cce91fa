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
void wait_for_block();  // until every thread is here
void wait_for_warp();
unsigned& word(unsigned thread);  // that a thread shows to others
void launch(void (*kernel)(void**), void** arguments, unsigned blocks, unsigned threads);

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*(P*)arguments[I]...);
}
template <class... P>
void call(void (*kernel)(P...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<P...>());
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait_for_block(); }
inline void __syncwarp() { fibers::wait_for_warp(); }

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
