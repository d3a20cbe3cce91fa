#include "../rope.h"

#include <memory>

#include "threads.h"

#define WIDE_VECTORS
#define KERNELS "rope.inc"
#include "each_isa.inc"

namespace fused_ops {

namespace {

bool worth_streaming(const Rope& p) {
  const int unit = streaming_alignment();
  const auto rounded = [=](int64_t bytes) { return bytes % unit == 0; };
  int64_t bytes = 0;
  for (const Heads* heads : {&p.q, &p.k}) {
    const Place& out = heads->out;
    if (!out) continue;
    if (!aligned(out.data, unit) || !rounded(out.token) || !rounded(out.head)) return false;
    bytes += p.tokens * heads->count * heads->cols * byte_size(p.dtype);
  }
  return bytes > last_level_cache() && rounded(p.half * byte_size(p.dtype));
}

}  // namespace

void run_on_cpu(Rope& p) {
  if (p.codes.data) prepare_on_cpu(p.codes);
  p.stream = worth_streaming(p);
  const auto run = PICK_ISA(rope_rows);
  int64_t elements = 0, widest = 0;  // of a token; and of what a norm takes
  for (const Heads* heads : {&p.q, &p.k, &p.v}) {
    elements += heads->count * heads->cols;
    widest = std::max(widest, heads->cols * (p.whole_vector ? heads->count : 1));
  }
  parallel_rows(p.tokens, elements, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 8192;
    alignas(64) float small[kOnStack];
    const int64_t padded = (widest + kLanes - 1) / kLanes * kLanes, needed = 7 * padded + 12 * kLanes;
    std::unique_ptr<float[]> large(needed > kOnStack ? new float[needed] : nullptr);
    run(p, begin, end, large ? large.get() : small, padded);
  });
}

}  // namespace fused_ops
