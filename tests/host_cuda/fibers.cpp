// One warp runs as far as it can before the next, in an order drawn anew for every round, so that a missing barrier
// shows in results. Shared memory begins as garbage; a barrier that not every thread reaches ends the process.
//
// A launch runs at once, block by block, unless it goes to a queue: the queues of several devices run together, a
// block here and a block there in any order, as far as it comes before it waits. Each queue's launches are in order.
#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <vector>

thread_local Dim threadIdx, blockIdx;

namespace fibers {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum State { kReady, kAtWarp, kAtBlock, kPaused, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = kReady;
  bool started = false;
};

using Random = std::mt19937;

class Block {
 public:
  std::vector<unsigned> words;
  std::unique_ptr<char[]> shared{new char[kSharedBytes]};

  void start(Kernel* kernel, unsigned index, unsigned threads);
  // Runs every warp that can run, once. False where the block has ended.
  bool step(Random& random);
  void wait(State at);

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  Kernel* kernel_ = nullptr;
  unsigned index_ = 0, threads_ = 0;

  static void body();
  void resume(unsigned t);
  bool run_warp(unsigned begin, unsigned end);

  bool all(unsigned begin, unsigned end, State state) const {
    for (unsigned t = begin; t < end; ++t)
      if (fibers_[t]->state != state) return false;
    return true;
  }
  bool release(unsigned begin, unsigned end, State state) {
    bool any = false;
    for (unsigned t = begin; t < end; ++t)
      if (fibers_[t]->state == state) {
        fibers_[t]->state = kReady;
        any = true;
      }
    return any;
  }
};

thread_local Block* running = nullptr;
thread_local unsigned long long nanoseconds = 0;

void Block::start(Kernel* kernel, unsigned index, unsigned threads) {
  kernel_ = kernel;
  index_ = index;
  threads_ = threads;
  words.resize(threads);
  while (fibers_.size() < threads) fibers_.emplace_back(new Fiber);
  std::memset(shared.get(), 0xff, kSharedBytes);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers_[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, body, 0);
    fiber.started = false;
    fiber.state = kReady;
  }
}

void Block::wait(State at) {
  Fiber& fiber = *fibers_[threadIdx.x];
  fiber.state = at;
  if (!_setjmp(fiber.here)) _longjmp(scheduler_, 1);
}

void Block::body() {
  Block& block = *running;
  (*block.kernel_)();
  block.fibers_[threadIdx.x]->state = kDone;
  _longjmp(block.scheduler_, 1);
}

// Runs thread t until it waits or ends.
void Block::resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(scheduler_)) return;
  Fiber& fiber = *fibers_[t];
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Until every thread of the warp waits for something else than the warp. Whether any of them ran.
bool Block::run_warp(unsigned begin, unsigned end) {
  bool ran = false;
  for (;;) {
    for (unsigned t = begin; t < end; ++t)
      if (fibers_[t]->state == kReady) {
        resume(t);
        ran = true;
      }
    if (!all(begin, end, kAtWarp)) return ran;
    release(begin, end, kAtWarp);
  }
}

bool Block::step(Random& random) {
  running = this;
  blockIdx.x = index_;
  std::vector<unsigned> warps;
  for (unsigned begin = 0; begin < threads_; begin += kWarp) warps.push_back(begin);
  std::shuffle(warps.begin(), warps.end(), random);
  bool ran = release(0, threads_, kPaused);
  for (const unsigned begin : warps) ran |= run_warp(begin, std::min(begin + kWarp, threads_));
  if (all(0, threads_, kDone)) return false;
  if (all(0, threads_, kAtBlock)) {
    release(0, threads_, kAtBlock);
  } else if (!ran) {
    std::fprintf(stderr, "block %u: a barrier or a shuffle was not reached by every thread\n", index_);
    std::abort();
  }
  return true;
}

struct Launch {
  std::unique_ptr<Kernel> kernel;
  unsigned blocks, threads;
};

struct Device {
  std::deque<Launch> launches;
  std::vector<std::unique_ptr<Block>> blocks;  // that have not ended, of the first launch
};
thread_local std::deque<Device> devices;
thread_local int queue = -1;  // the device that launches go to

// Blocks cost stacks, so they are used again.
thread_local std::vector<std::unique_ptr<Block>> spare;

std::unique_ptr<Block> block_of(Kernel* kernel, unsigned index, unsigned threads) {
  std::unique_ptr<Block> block;
  if (spare.empty()) {
    block.reset(new Block);
  } else {
    block = std::move(spare.back());
    spare.pop_back();
  }
  block->start(kernel, index, threads);
  return block;
}

void run(Kernel* kernel, unsigned blocks, unsigned threads) {
  static thread_local Random random;
  for (unsigned index = 0; index < blocks; ++index) {
    auto block = block_of(kernel, index, threads);
    while (block->step(random)) {
    }
    spare.push_back(std::move(block));
  }
}

}  // namespace

void* shared() { return running->shared.get(); }
unsigned& word(unsigned thread) { return running->words.at(thread); }
unsigned threads() { return running->words.size(); }
void wait_for_block() { running->wait(kAtBlock); }
void wait_for_warp() { running->wait(kAtWarp); }
void pause(unsigned duration) {
  nanoseconds += duration;
  running->wait(kPaused);
}
unsigned long long now() { return nanoseconds; }

}  // namespace fibers

using namespace fibers;

// As Driver::launch, of a function that `compile` in __init__.py returned.
extern "C" const char* launch(int, void* kernel, unsigned blocks, unsigned threads, void** arguments) {
  std::unique_ptr<Kernel> bound(((Kernel * (*)(void**)) kernel)(arguments));
  if (queue < 0) {
    run(bound.get(), blocks, threads);
  } else {
    devices[queue].launches.push_back({std::move(bound), blocks, threads});
  }
  return nullptr;
}

// Launches go to the queue of this device from now on; -1: they run at once.
extern "C" void set_queue(int device) {
  if (device >= (int)devices.size()) devices.resize(device + 1);
  queue = device;
}

// Runs all queues until they are empty.
extern "C" void run_queues(unsigned seed) {
  Random random(seed);
  for (;;) {
    std::vector<Device*> busy;
    for (Device& device : devices)
      if (!device.launches.empty()) busy.push_back(&device);
    if (busy.empty()) return;
    Device& device = *busy[random() % busy.size()];
    const Launch& launch = device.launches.front();
    if (device.blocks.empty())
      for (unsigned index = 0; index < launch.blocks; ++index)
        device.blocks.push_back(block_of(launch.kernel.get(), index, launch.threads));
    auto& block = device.blocks[random() % device.blocks.size()];
    // Now one step and now many, so that a device may be a whole launch ahead of another.
    bool more = true;
    for (unsigned steps = random() % 4 ? 1 : 64; more && steps; --steps) more = block->step(random);
    if (more) continue;
    spare.push_back(std::move(block));
    std::swap(block, device.blocks.back());
    device.blocks.pop_back();
    if (device.blocks.empty()) device.launches.pop_front();
  }
}
