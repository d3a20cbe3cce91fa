// Runs CUDA kernels on the host: every thread of a block is a fiber, and barriers and shuffles are where they switch.
//
// One warp runs as far as it can before the next, in an order drawn anew for every block, so that a missing barrier
// shows in results. A barrier that only some threads reach is an error, and shared memory begins as garbage. What it
// can't do: PTX, clusters, asynchronous copies.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(T, NAME) T& NAME = *(T*)fibers::block().shared.data()

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
inline Dim threadIdx, blockIdx;

namespace fibers {

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  enum State { kReady, kAtWarp, kAtBlock, kDone } state = kReady;
  bool started = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> exchanged;  // a word from each thread, for shuffles
  std::vector<char> shared;
  jmp_buf scheduler;
  void (*kernel)(void*);
  void* arguments;
};
inline Block& block() {
  static Block one;
  return one;
}

inline Fiber& current() { return block().fibers[threadIdx.x]; }

inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

inline void wait(Fiber::State at) {
  Fiber& fiber = current();
  fiber.state = at;
  if (!_setjmp(fiber.here)) _longjmp(block().scheduler, 1);
}

inline void body() {
  block().kernel(block().arguments);
  current().state = Fiber::kDone;
  _longjmp(block().scheduler, 1);
}

// Runs thread t until it waits or ends.
inline void resume(unsigned t) {
  threadIdx.x = t;
  Fiber& fiber = current();
  if (_setjmp(block().scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Whether all of [begin, end) wait at `at`; a mixture is an error once nobody can run.
inline bool all_at(unsigned begin, unsigned end, Fiber::State at) {
  for (unsigned t = begin; t < end; ++t)
    if (block().fibers[t].state != at) return false;
  return true;
}

inline void run_block(unsigned threads, std::mt19937& random) {
  constexpr unsigned kWarp = 32;
  Block& b = block();
  std::vector<unsigned> warps((threads + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
  const auto release = [&](unsigned begin, unsigned end) {
    for (unsigned t = begin; t < end; ++t) b.fibers[t].state = Fiber::kReady;
  };
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    bool ran = false;
    for (const unsigned w : warps) {
      const unsigned begin = w * kWarp, end = std::min(begin + kWarp, threads);
      for (bool more = true; more;) {
        for (unsigned t = begin; t < end; ++t)
          if (b.fibers[t].state == Fiber::kReady) {
            resume(t);
            ran = true;
          }
        more = all_at(begin, end, Fiber::kAtWarp);
        if (more) release(begin, end);
      }
    }
    if (all_at(0, threads, Fiber::kDone)) return;
    if (all_at(0, threads, Fiber::kAtBlock)) {
      release(0, threads);
    } else if (!ran) {
      fail("a barrier or a shuffle was not reached by every thread");
    }
  }
}

// kernel(arguments) for every thread of every block.
inline void launch(void (*kernel)(void*), void* arguments, unsigned blocks, unsigned threads, size_t shared,
                   unsigned seed) {
  constexpr size_t kStack = 256 << 10;
  Block& b = block();
  b.kernel = kernel;
  b.arguments = arguments;
  b.exchanged.resize(threads);
  b.shared.resize(shared);
  b.fibers.resize(threads);
  std::mt19937 random(seed);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(b.shared.data(), 0xff, shared);
    for (Fiber& fiber : b.fibers) {
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, body, 0);
      fiber.started = false;
      fiber.state = Fiber::kReady;
    }
    run_block(threads, random);
  }
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::Fiber::kAtBlock); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  static_assert(sizeof(V) == sizeof(unsigned));
  auto& words = fibers::block().exchanged;
  std::memcpy(&words[threadIdx.x], &value, sizeof(value));
  fibers::wait(fibers::Fiber::kAtWarp);
  V other;
  std::memcpy(&other, &words[threadIdx.x ^ mask], sizeof(other));
  fibers::wait(fibers::Fiber::kAtWarp);  // before the word is written again
  return other;
}

inline void atomicMax(int* to, int value) { *to = *to > value ? *to : value; }
