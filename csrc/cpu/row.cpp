#include "../row.h"

#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>

#include "isa.h"
#include "threads.h"

#define WIDE_VECTORS
#define KERNELS "row.inc"
#include "each_isa.inc"

namespace fused_ops {

namespace {

// Results that no cache can hold until they are read go around it: the write then costs no read of the old line.
bool worth_streaming(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  const int64_t a_row = p.cols * ((p.sum ? bytes : 0) + (p.y ? bytes : 0)) + (p.data ? p.data.cols : 0);
  return (p.rows - p.begin) * a_row > last_level_cache() && aligned(p.sum, streaming_alignment()) &&
         aligned(p.y, streaming_alignment()) && aligned(p.data, 32);
}

}  // namespace

void squares_on_cpu(const Pipeline& p, float* out) {
  const auto run_squares = PICK_ISA(run_squares);
  parallel_rows(p.rows - p.begin, p.cols,
                [&](int64_t begin, int64_t end) { run_squares(p, p.begin + begin, p.begin + end, out + 2 * begin); });
}

void run_rows_on_cpu(Pipeline& a, Pipeline* b) {
  for (Pipeline* p : {&a, b ? b : &a}) p->stream = worth_streaming(*p);
  const auto run_rows = PICK_ISA(run_rows);
  const int64_t rows_of_a = a.rows - a.begin, cols = std::max(a.cols, b ? b->cols : 0);
  std::atomic<int> amax{0};
  parallel_rows(rows_of_a + (b ? b->rows - b->begin : 0), cols, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 8192;
    alignas(64) float small[kOnStack];
    struct alignas(64) Line {
      float v[16];
    };
    std::unique_ptr<Line[]> large;
    const int64_t padded = (cols + kLanes - 1) / kLanes * kLanes;
    if (padded > kOnStack) large.reset(new Line[padded / 16]);
    float* const row = large ? large[0].v : small;
    int largest = 0;
    if (begin < rows_of_a) largest = run_rows(a, a.begin + begin, a.begin + std::min(end, rows_of_a), row);
    if (end > rows_of_a) {
      const int64_t first = b->begin - rows_of_a;
      run_rows(*b, first + std::max(begin, rows_of_a), first + end, row);
    }
    for (int seen = amax; seen < largest && !amax.compare_exchange_weak(seen, largest);) continue;
  });
  if (a.tensor_amax) *a.tensor_amax = amax;
}

namespace {

// One scale for the whole tensor takes two launches: the rows and their largest element, then the codes.
void run_per_tensor(Pipeline& p) {
  int amax = 0;
  Pipeline rows = p;
  rows.data = Rows();
  rows.tensor_amax = &amax;
  std::unique_ptr<char[]> workspace;
  if (!quantizes_x(p) && !p.y) {
    const int64_t row_bytes = p.cols * byte_size(p.dtype);
    workspace.reset(new char[p.rows * row_bytes]);
    rows.y.data = workspace.get();
    rows.y.count = rows.y.size[0] = p.rows;
    rows.y.cols = p.cols;
    rows.y.dims = 1;
    rows.y.stride[0] = row_bytes;
  }
  run_rows_on_cpu(rows);

  Pipeline codes = codes_of(p, quantizes_x(p) ? p.x : rows.y);
  codes.key = Key{p.key.code | 1 << 4};  // static now
  codes.given_value = bits<float>(dynamic_scale<float, int>(amax, p.key, p.given_value).stored);
  *reinterpret_cast<float*>(p.scale.data) = codes.given_value;
  run_rows_on_cpu(codes);
}

void read_given(Pipeline& p) {
  p.given_value = p.given ? *p.given : std::numeric_limits<float>::infinity();
  if (p.given_zero) p.given_zero_value = static_cast<float>(*p.given_zero);
  if (p.scale && p.key.is_static()) *reinterpret_cast<float*>(p.scale.data) = p.given_value;
}

// Of rows that don't exist.
void zero_padding(const Pipeline& p) {
  if (!p.scale.swizzled) return;
  for (int64_t r = p.rows; r % 128; ++r)
    for (int64_t four = 0; four < p.scale.row_bytes / 4; ++four)
      std::memset(p.scale.data + p.scale.row(r) + four * p.scale.four, 0, 4);
}

}  // namespace

void prepare_on_cpu(Pipeline& p) {
  read_given(p);
  if (!one_scale(p)) zero_padding(p);
}

void run_on_cpu(Pipeline& a, Pipeline* b) {
  for (Pipeline* p : {&a, b}) {
    if (!p) continue;
    prepare_on_cpu(*p);
    if (one_scale(*p)) return run_per_tensor(*p);  // never one of two
  }
  run_rows_on_cpu(a, b);
}

}  // namespace fused_ops
