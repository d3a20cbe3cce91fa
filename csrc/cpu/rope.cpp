#include "../rope.h"

#include <memory>

#include "threads.h"

#define KERNELS "rope.inc"
#include "each_isa.inc"

namespace fused_ops {

void run_on_cpu(Rope& p) {
  if (p.codes.data) prepare_on_cpu(p.codes);
  const auto run = PICK_ISA(rope_rows);
  int64_t elements = 0, widest = 0;  // of a token; and of what a norm takes
  for (const Heads* heads : {&p.q, &p.k, &p.v}) {
    elements += heads->count * heads->cols;
    widest = std::max(widest, heads->cols * (p.whole_vector ? heads->count : 1));
  }
  parallel_rows(p.tokens, elements, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 4096;
    alignas(64) float small[kOnStack];
    const int64_t padded = (widest + kLanes - 1) / kLanes * kLanes, needed = 4 * padded + 2 * kLanes;
    std::unique_ptr<float[]> large(needed > kOnStack ? new float[needed] : nullptr);
    run(p, begin, end, large ? large.get() : small, padded);
  });
}

}  // namespace fused_ops
