#include "row.h"

#include <unistd.h>

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

}  // namespace

void check_memory(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  const Named outs[] = {{p.sum, bytes, "residual_out"},
                        {p.y, bytes, "output"},
                        {p.data, 1, "data_out"},
                        memory(p.scale, "scale_out"),
                        memory(p.zero_point, "zero_point_out")};
  const auto vector = [&](const void* data, ScalarType dtype) { return memory(data, p.cols, byte_size(dtype), ""); };
  const Named read_later[] = {
      vector(p.norm.weight, p.norm.weight_dtype), vector(p.norm.bias, p.norm.bias_dtype),
      vector(p.post.weight, p.post.weight_dtype),
      memory(p.tokens_per_expert, p.rows_per_expert ? p.rows / p.rows_per_expert : 0, p.long_tokens ? 8 : 4, "")};
  for (const Named& out : outs) {
    if (!out.rows) continue;
    check_output(out.rows, out.bytes, out.name);
    check_overlap(out.rows, out.bytes, p.x, bytes, true, out.name);
    check_overlap(out.rows, out.bytes, p.other, bytes, true, out.name);
    for (const Named& in : read_later) check_overlap(out.rows, out.bytes, in.rows, in.bytes, false, out.name);
    for (const Named& other : outs)
      if (&other != &out) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
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

void run_once(Pipeline& p) {
  p.stream = worth_streaming(p);
  const auto run_rows = PICK_ISA(run_rows);
  std::atomic<int> amax{0};
  parallel_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 8192;
    alignas(64) float small[kOnStack];
    const int64_t padded = (p.cols + kLanes - 1) / kLanes * kLanes;
    int largest;
    if (padded <= kOnStack) {
      largest = run_rows(p, begin, end, small);
    } else {
      struct alignas(64) Line {
        float v[16];
      };
      const std::unique_ptr<Line[]> large(new Line[padded / 16]);
      largest = run_rows(p, begin, end, large[0].v);
    }
    for (int seen = amax; seen < largest && !amax.compare_exchange_weak(seen, largest);) continue;
  });
  if (p.tensor_amax) *p.tensor_amax = amax;
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

}  // namespace

void run(Pipeline& p) {
  if (p.scale && p.key.per_tensor()) {
    STD_TORCH_CHECK(!p.key.asymmetric(), "key: this backend serves asymmetric keys static or by token");
    return run_per_tensor(p);
  }
  if (!p.rows) return;
  if (p.scale.swizzled) {  // padding of rows that don't exist
    for (int64_t r = p.rows; r % 128; ++r)
      for (int64_t four = 0; four < p.scale.row_bytes / 4; ++four)
        std::memset(p.scale.data + p.scale.row(r) + four * p.scale.four, 0, 4);
  }
  run_once(p);
}

}  // namespace fused_ops
