// Products of codes, pass by pass: rows are decoded to memory that the cache holds, and meet every weight once.
#include <algorithm>
#include <atomic>
#include <memory>

#include "linear.h"

#define KERNELS "linear.inc"
#include "each_isa.inc"

// Where scales take values to the ends of bfloat16's range, the kernels that multiply float32.
#if HAVE_X86
#define KERNEL(p, function) (kIsa == ISA_V4 && (p).extreme ? v3::function : PICK_ISA(function))
#else
#define KERNEL(p, function) PICK_ISA(function)
#endif

namespace fused_ops {
namespace {

constexpr int64_t kCodes = 8;       // that cost what other operations spend on an element
constexpr int64_t kWeightRows = 4;  // rows of x whose products cost as much as reading the weight

// What a group is worked on in: how many, what one costs beside those of other groups, and its work for threads.
struct Parts {
  int64_t count, cost, work;
};

// kernel(group, begin, end) of the parts of all groups, spread evenly over torch's threads.
template <class PartsOf, class Kernel>
void for_parts(const Linear* groups, const Linear* end, const PartsOf& parts_of, const Kernel& kernel) {
  int64_t units = 0, work = 0;
  for (const Linear* p = groups; p != end; ++p) {
    const Parts parts = parts_of(*p);
    units += parts.count * parts.cost;
    work += parts.count * parts.work;
  }
  parallel_rows(units, work / units, [&](int64_t from, int64_t to) {
    for (const Linear* p = groups; p != end && to > 0; ++p) {
      const Parts parts = parts_of(*p);
      const auto part = [&](int64_t unit) { return std::clamp<int64_t>(ceil_div(unit, parts.cost), 0, parts.count); };
      if (part(from) < part(to)) kernel(*p, part(from), part(to));
      from -= parts.count * parts.cost;
      to -= parts.count * parts.cost;
    }
  });
}

// Values of e8m0 scales within 2^50 of 1 have products that are multiples of 2^-118, and finite sums: what bfloat16 and
// sums without subnormal numbers can hold.
constexpr int kLeastScale = 127 - 50, kMostScale = 127 + 50;

bool is_extreme(const uint8_t* scales, int64_t count) {
  uint8_t least = kLeastScale, most = kMostScale;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, scales[i]);
    most = std::max(most, scales[i]);
  }
  return least < kLeastScale || most > kMostScale;
}

bool has_extremes(const Operand& operand) {
  if (operand.key.scale_format() != Key::kE8m0) return false;
  const ScaleOut& scale = operand.groups;
  const int64_t groups = operand.cols / 32, run = scale.one != 1 ? 1 : scale.four != 4 ? 4 : groups;
  std::atomic<bool> found{false};
  parallel_rows(operand.rows, groups / kCodes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && !found; ++row)
      for (int64_t g = 0; g < groups; g += run) {
        const char* const from = scale.data + scale.row(row) + g / 4 * scale.four + g % 4 * scale.one;
        if (is_extreme(reinterpret_cast<const uint8_t*>(from), std::min(run, groups - g))) found = true;
      }
  });
  return found;
}

int64_t row_bytes(const Linear& p) { return p.blocks * p.block / kLanes * KERNEL(p, linear_bytes)(p.x.decoder); }

int64_t factors(const Linear& p) { return p.x_group ? p.blocks : 1; }

// The activation's scales of rows [begin, end) of this pass, as factors: one a row, or one a block of columns.
void fold_scales(const Linear& p, float* out, int64_t begin, int64_t end) {
  const bool packed = p.x.key.layout() == Key::kPackedUe8m0;
  for (int64_t m = begin; m < end; ++m)
    for (int64_t b = 0; b < factors(p); ++b) {
      const int64_t row = p.row_of_x(m), group = p.x_group ? b * p.block / p.x_group : 0;
      out[m * factors(p) + b] =
          packed ? kE8m0Values[scale_at<uint8_t>(p.x_scale, row, group)] : scale_at<float>(p.x_scale, row, group);
    }
}

struct alignas(64) Line {
  char bytes[64];
};

// Groups of together at most kMaxRows rows.
void run_pass(Linear* groups, Linear* end, Line* memory) {
  char* decoded = memory->bytes;
  for (Linear* p = groups; p != end; ++p) {
    p->decoded = decoded;
    decoded += p->rows * row_bytes(*p);
  }
  float* const x_factors = reinterpret_cast<float*>(decoded);
  float* next = x_factors;
  for (Linear* p = groups; p != end && p->x_scale; next += p->rows * factors(*p), ++p)
    (p->x_group ? p->x_block : p->x_row) = {next, factors(*p), p->x_group != 0};

  for_parts(
      groups, end, [](const Linear& p) { return Parts{p.rows, 1, p.x.cols / kCodes}; },
      [&](const Linear& p, int64_t first, int64_t last) {
        const int64_t before = (static_cast<const char*>(p.decoded) - memory->bytes) / row_bytes(p);
        if (p.x_scale) fold_scales(p, x_factors + before * factors(p), first, last);
        KERNEL(p, linear_decode)(p, first, last);
      });
  for_parts(
      groups, end,
      [](const Linear& p) {
        return Parts{ceil_div(p.w.rows, kTile), p.rows + kWeightRows, kTile * p.x.cols * p.rows / kCodes};
      },
      [](const Linear& p, int64_t first, int64_t last) { KERNEL(p, linear_multiply)(p, first, last); });
}

}  // namespace

void run(Linear* groups, int64_t count) {
  Linear* const end = groups + count;
  int64_t rows = 0;
  for (const Linear* p = groups; p != end; ++p) rows += p->rows;
  if (rows == 0 || groups->w.rows == 0) return;
  if (kIsa == ISA_V4) {
    const bool extreme = has_extremes(groups->x) ||
                         std::any_of(groups, end, [](const Linear& p) { return p.rows && has_extremes(p.w); });
    for (Linear* p = groups; p != end; ++p) p->extreme = extreme;
  }
  const int64_t bytes = std::min(rows, kMaxRows) * (row_bytes(*groups) + factors(*groups) * sizeof(float));
  const std::unique_ptr<Line[]> memory(new Line[ceil_div(bytes, sizeof(Line))]);
  while (groups != end) {
    Linear* next = groups;
    for (rows = 0; next != end && rows + next->rows <= kMaxRows; ++next) rows += next->rows;
    if (next != groups) {
      if (rows) run_pass(groups, next, memory.get());
      groups = next;
      continue;
    }
    const int64_t all = groups->first + groups->rows;  // of a group that doesn't fit
    for (; groups->first < all; groups->first += groups->rows) {
      groups->rows = std::min(all - groups->first, kMaxRows);
      run_pass(groups, groups + 1, memory.get());
    }
    ++groups;
  }
}

}  // namespace fused_ops
