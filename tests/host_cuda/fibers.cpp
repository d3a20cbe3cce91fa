// One warp runs as far as it can before the next, in an order drawn anew for every block, so that a missing barrier
// shows in results. Shared memory begins as garbage; a barrier that not every thread reaches ends the process.
#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

thread_local Dim threadIdx, blockIdx;

namespace fibers {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = kReady;
  bool started = false;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned> words;
  std::unique_ptr<char[]> shared{new char[kSharedBytes]};
  jmp_buf scheduler;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
};
thread_local Block block;

Fiber& current() { return *block.fibers[threadIdx.x]; }

void wait(State at) {
  current().state = at;
  if (!_setjmp(current().here)) _longjmp(block.scheduler, 1);
}

void body() {
  block.kernel(block.arguments);
  current().state = kDone;
  _longjmp(block.scheduler, 1);
}

// Runs thread t until it waits or ends.
void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(block.scheduler)) return;
  if (current().started) _longjmp(current().here, 1);
  current().started = true;
  setcontext(&current().start);
}

void run_block(unsigned threads, std::mt19937& random) {
  const auto all = [&](unsigned begin, unsigned end, State state) {
    return std::all_of(&block.fibers[begin], &block.fibers[0] + end, [&](auto& f) { return f->state == state; });
  };
  const auto release = [&](unsigned begin, unsigned end) {
    for (unsigned t = begin; t < end; ++t) block.fibers[t]->state = kReady;
  };
  // Until every thread of the warp waits for the block or is done.
  const auto run_warp = [&](unsigned begin, unsigned end) {
    bool ran = false;
    for (;;) {
      for (unsigned t = begin; t < end; ++t)
        if (block.fibers[t]->state == kReady) {
          resume(t);
          ran = true;
        }
      if (!all(begin, end, kAtWarp)) return ran;
      release(begin, end);
    }
  };
  std::vector<unsigned> warps;
  for (unsigned begin = 0; begin < threads; begin += kWarp) warps.push_back(begin);
  while (!all(0, threads, kDone)) {
    std::shuffle(warps.begin(), warps.end(), random);
    bool ran = false;
    for (const unsigned begin : warps) ran |= run_warp(begin, std::min(begin + kWarp, threads));
    if (all(0, threads, kAtBlock)) {
      release(0, threads);
    } else if (!ran) {
      std::fprintf(stderr, "block %u: a barrier or a shuffle was not reached by every thread\n", blockIdx.x);
      std::abort();
    }
  }
}

}  // namespace

void* shared() { return block.shared.get(); }
unsigned& word(unsigned thread) { return block.words.at(thread); }
void wait_for_block() { wait(kAtBlock); }
void wait_for_warp() { wait(kAtWarp); }

void launch(void (*kernel)(void**), void** arguments, unsigned blocks, unsigned threads) {
  static thread_local std::mt19937 random;
  block.kernel = kernel;
  block.arguments = arguments;
  block.words.resize(threads);
  while (block.fibers.size() < threads) block.fibers.emplace_back(new Fiber);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(block.shared.get(), 0xff, kSharedBytes);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *block.fibers[t];
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      makecontext(&fiber.start, body, 0);
      fiber.started = false;
      fiber.state = kReady;
    }
    run_block(threads, random);
  }
}

}  // namespace fibers

// As Driver::launch, of a function that `compile` in __init__.py returned.
extern "C" const char* launch(int, void* kernel, unsigned blocks, unsigned threads, void** arguments) {
  fibers::launch((void (*)(void**))kernel, arguments, blocks, threads);
  return nullptr;
}
