#include "row.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <memory>
#include <type_traits>

#include "isa.h"

#define KERNELS "row.inc"
#include "each_isa.inc"

namespace fused_ops {

Pipeline pipeline_of(const Tensor& x) {
  Pipeline p;
  p.x = rows_of(x, "x");
  p.rows = p.x.count;
  p.cols = p.x.cols;
  p.dtype = dtype_of(x);
  STD_TORCH_CHECK(p.cols > 0, "x: expected at least one column");
  STD_TORCH_CHECK(is_float(p.dtype), "x: expected bfloat16, float16 or float32");
  return p;
}

namespace {

const void* vector_of(const Pipeline& p, const OptionalTensor& tensor, ScalarType& dtype, const char* name) {
  if (!tensor) return nullptr;
  const Rows rows = rows_of(*tensor, name);
  dtype = dtype_of(*tensor);
  STD_TORCH_CHECK(is_float(dtype), name, ": expected bfloat16, float16 or float32");
  STD_TORCH_CHECK(tensor->dim() == 1 && rows.cols == p.cols, name, ": expected one element a column");
  return rows.data;
}

}  // namespace

Norm norm_of(const Pipeline& p, Norm::Kind kind, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
             int64_t flags) {
  Norm norm;
  norm.kind = kind;
  norm.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(flags >= 0 && flags < 4, "flags: expected 0 to 3");
  norm.round_before_weight = flags & 1;
  norm.weight_plus_one = flags & 2;
  norm.weight = vector_of(p, weight, norm.weight_dtype, "weight");
  norm.bias = vector_of(p, bias, norm.bias_dtype, "bias");
  return norm;
}

void set_experts(Pipeline& p, const Tensor& x, const OptionalTensor& tokens_per_expert) {
  if (!tokens_per_expert) return;
  const Tensor& tokens = *tokens_per_expert;
  const ScalarType dtype = dtype_of(tokens);
  STD_TORCH_CHECK(tokens.is_cpu() && (dtype == ScalarType::Int || dtype == ScalarType::Long),
                  "tokens_per_expert: expected int32 or int64 on the CPU");
  STD_TORCH_CHECK(x.dim() == 3 && tokens.dim() == 1 && tokens.size(0) == x.size(0) && tokens.is_contiguous(),
                  "tokens_per_expert: expected one element for each of the experts in [experts, rows, columns]");
  p.tokens_per_expert = tokens.data_ptr();
  p.long_tokens = dtype == ScalarType::Long;
  p.rows_per_expert = x.size(1);
}

namespace {

struct Named {
  Rows rows;
  int64_t bytes;
  const char* name;
};

Named memory(const void* data, int64_t count, int64_t bytes, const char* name) {
  Rows rows;
  rows.data = static_cast<char*>(const_cast<void*>(data));
  rows.count = 1;
  rows.cols = count;
  rows.stride[0] = 0;
  return {rows, bytes, name};
}

Named memory(const ScaleOut& out, const char* name) { return memory(out.data, out.extent, 1, name); }

std::array<Named, 5> outputs(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  return {Named{p.sum, bytes, "residual_out"}, Named{p.y, bytes, "output"}, Named{p.data, 1, "data_out"},
          memory(p.scale, "scale_out"), memory(p.zero_point, "zero_point_out")};
}

std::array<Named, 4> read_by_every_row(const Pipeline& p) {
  const auto vector = [&](const void* data, ScalarType dtype) { return memory(data, p.cols, byte_size(dtype), ""); };
  return {vector(p.norm.weight, p.norm.weight_dtype), vector(p.norm.bias, p.norm.bias_dtype),
          vector(p.post.weight, p.post.weight_dtype),
          memory(p.tokens_per_expert, p.rows_per_expert ? p.rows / p.rows_per_expert : 0, p.long_tokens ? 8 : 4, "")};
}

}  // namespace

void check_memory(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  const auto outs = outputs(p);
  for (const Named& out : outs) {
    if (!out.rows) continue;
    check_output(out.rows, out.bytes, out.name);
    check_overlap(out.rows, out.bytes, p.x, bytes, true, out.name);
    check_overlap(out.rows, out.bytes, p.other, bytes, true, out.name);
    for (const Named& in : read_by_every_row(p)) check_overlap(out.rows, out.bytes, in.rows, in.bytes, false, out.name);
    for (const Named& other : outs)
      if (&other != &out) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
  }
}

void check_apart(const Pipeline& a, const Pipeline& b) {
  for (const Named& out : outputs(a)) {
    check_overlap(out.rows, out.bytes, b.x, byte_size(b.dtype), false, out.name);
    for (const Named& in : read_by_every_row(b)) check_overlap(out.rows, out.bytes, in.rows, in.bytes, false, out.name);
    for (const Named& other : outputs(b)) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
  }
}

namespace {

int64_t last_level_cache() {
  const int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : int64_t{32} << 20;
}

bool aligned(const Rows& rows) {
  bool all = reinterpret_cast<uintptr_t>(rows.data) % 32 == 0;
  for (int d = 0; d < rows.dims; ++d) all = all && rows.stride[d] % 32 == 0;
  return all;
}

// Results that no cache can hold until they are read go around it: the write then costs no read of the old line.
bool worth_streaming(const Pipeline& p) {
  static const int64_t cache = last_level_cache();
  const int64_t bytes = byte_size(p.dtype);
  const int64_t a_row = p.cols * ((p.sum ? bytes : 0) + (p.y ? bytes : 0)) + (p.data ? p.data.cols : 0);
  return p.rows * a_row > cache && aligned(p.sum) && aligned(p.y) && aligned(p.data);
}

// One pass over the rows of both; b may be absent.
void run_once(Pipeline& a, Pipeline* b = nullptr) {
  for (Pipeline* p : {&a, b ? b : &a}) p->stream = worth_streaming(*p);
  const auto run_rows = PICK_ISA(run_rows);
  const int64_t cols = std::max(a.cols, b ? b->cols : 0), rows = a.rows + (b ? b->rows : 0);
  std::atomic<int> amax{0};
  parallel_rows(rows, cols, [&](int64_t begin, int64_t end) {
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
    if (begin < a.rows) largest = run_rows(a, begin, std::min(end, a.rows), row);
    if (end > a.rows) run_rows(*b, std::max(begin - a.rows, int64_t{0}), end - a.rows, row);
    for (int seen = amax; seen < largest && !amax.compare_exchange_weak(seen, largest);) continue;
  });
  if (a.tensor_amax) *a.tensor_amax = amax;
}

// One scale for the whole tensor takes two launches: the rows and their largest element, then the codes.
void run_per_tensor(Pipeline& p) {
  int amax = 0;
  Pipeline rows = p;
  rows.data = Rows();
  rows.tensor_amax = &amax;
  std::unique_ptr<char[]> workspace;
  const bool as_read = p.load == Pipeline::kCopy && !p.norm && !p.post;
  if (!as_read && !p.y) {
    const int64_t row_bytes = p.cols * byte_size(p.dtype);
    workspace.reset(new char[p.rows * row_bytes]);
    rows.y.data = workspace.get();
    rows.y.count = rows.y.size[0] = p.rows;
    rows.y.cols = p.cols;
    rows.y.dims = 1;
    rows.y.stride[0] = row_bytes;
  }
  run_once(rows);

  Pipeline codes;
  codes.rows = p.rows;
  codes.cols = p.cols;
  codes.dtype = p.dtype;
  codes.x = as_read ? p.x : rows.y;
  codes.tokens_per_expert = p.tokens_per_expert;
  codes.long_tokens = p.long_tokens;
  codes.rows_per_expert = p.rows_per_expert;
  codes.data = p.data;
  codes.key = Key{p.key.code | 1 << 4};  // static now
  codes.given = bits<float>(dynamic_scale<float, int>(amax, p.key, p.given).stored);
  *reinterpret_cast<float*>(p.scale.data) = codes.given;
  run_once(codes);
}

bool one_scale(const Pipeline& p) { return p.scale && p.key.per_tensor(); }

// Of rows that don't exist.
void zero_padding(const Pipeline& p) {
  if (!p.scale.swizzled) return;
  for (int64_t r = p.rows; r % 128; ++r)
    for (int64_t four = 0; four < p.scale.row_bytes / 4; ++four)
      std::memset(p.scale.data + p.scale.row(r) + four * p.scale.four, 0, 4);
}

}  // namespace

void run(Pipeline& p) {
  STD_TORCH_CHECK(!one_scale(p) || !p.key.asymmetric(), "key: asymmetric keys are served static or by token");
  if (one_scale(p)) return run_per_tensor(p);
  zero_padding(p);
  run_once(p);
}

void run(Pipeline& a, Pipeline& b) {
  if (one_scale(a) || one_scale(b)) {
    run(a);
    return run(b);
  }
  zero_padding(a);
  zero_padding(b);
  run_once(a, &b);
}

}  // namespace fused_ops
