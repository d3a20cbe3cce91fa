// Products of codes, pass by pass: rows are decoded to memory that the cache holds, and meet every weight once.
#include <memory>

#include "linear.h"

#define KERNELS "linear.inc"
#include "each_isa.inc"

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

int64_t row_bytes(const Linear& p) { return p.blocks * p.block * (p.x.decoder == Decoder::kInt8 ? 2 : 4); }

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
        PICK_ISA(linear_decode)(p, first, last);
      });
  for_parts(
      groups, end,
      [](const Linear& p) {
        return Parts{ceil_div(p.w.rows, kTile), p.rows + kWeightRows, kTile * p.x.cols * p.rows / kCodes};
      },
      [](const Linear& p, int64_t first, int64_t last) { PICK_ISA(linear_multiply)(p, first, last); });
}

}  // namespace

void run(Linear* groups, int64_t count) {
  Linear* const end = groups + count;
  int64_t rows = 0;
  for (const Linear* p = groups; p != end; ++p) rows += p->rows;
  if (rows == 0 || groups->w.rows == 0) return;
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
