// Rows on torch's threads, and the machine that they run on.
#pragma once

#include <cinttypes>
#include <cstdio>

#include "../common.h"
#include "isa.h"

namespace fused_ops {

// Subnormal float32s count, even where the caller flushes them (torch.set_flush_denormal).
class KeepSubnormals {
#if HAVE_X86
 public:
  KeepSubnormals() : saved_(_mm_getcsr()) {
    if (saved_ & kFlush) _mm_setcsr(saved_ & ~kFlush);
  }
  ~KeepSubnormals() {
    if (saved_ & kFlush) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kDenormalsAreZero = 0x40, kFlush = _MM_FLUSH_ZERO_MASK | kDenormalsAreZero;
  const unsigned saved_;
#endif
};

// In bytes, of what a core sees, which on AMD's processors is less than sysconf says. What is larger goes around it.
inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t kib = 0;
    if (FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
      std::fclose(file);
    }
    return kib > 0 ? kib << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

// Work that threads pay for, in elements of a row's stage: waking them takes 2 us, as much as 6,000 elements.
constexpr int64_t kSerial = 16384;

// kernel(begin, end) over [0, count) on torch's threads; a small piece of work stays in the caller.
template <class Kernel>
void parallel_rows(int64_t count, int64_t work_per_row, const Kernel& kernel) {
  const auto body = [&](int64_t begin, int64_t end) {
    const KeepSubnormals keep;
    kernel(begin, end);
  };
  if (count * work_per_row < kSerial || count < 2) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kSerial / 4 / std::max<int64_t>(1, work_per_row)), body);
}

}  // namespace fused_ops
