#include "row.h"

#include <unistd.h>

#include <limits>
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

void set_norm(Pipeline& p, const OptionalTensor& weight, double eps, int64_t flags) {
  p.rms_norm = true;
  p.eps = static_cast<float>(eps);
  STD_TORCH_CHECK(flags >= 0 && flags < 4, "flags: expected 0 to 3");
  p.round_before_weight = flags & 1;
  p.weight_plus_one = flags & 2;
  if (!weight) return;
  const Rows rows = rows_of(*weight, "weight");
  p.weight_dtype = dtype_of(*weight);
  STD_TORCH_CHECK(is_float(p.weight_dtype), "weight: expected bfloat16, float16 or float32");
  STD_TORCH_CHECK(weight->dim() == 1 && rows.cols == p.cols, "weight: expected one element a column");
  p.weight = rows.data;
}

void set_key(Pipeline& p, int64_t code, const OptionalTensor& given) {
  STD_TORCH_CHECK(code >= 0 && code >> 16 < int64_t{1} << 31, "key: no key has this code");
  p.key = Key{code};
  const int format = p.key.format();
  const int64_t group = p.key.group(p.cols);
  STD_TORCH_CHECK((format == Key::kE4m3 || format == Key::kInt8) && p.key.scale_format() == Key::kFloat &&
                      !p.key.asymmetric() && p.key.layout() <= Key::kTmaAligned,
                  "key: this backend doesn't serve it");
  STD_TORCH_CHECK(p.key.is_static() == p.key.per_tensor(), "key: this backend doesn't serve it");
  STD_TORCH_CHECK(!p.key.power_of_two() || format == Key::kE4m3, "key: power_of_two is defined for FP8");
  STD_TORCH_CHECK(!(p.key.per_tensor() && code >> 16) && (group == p.cols || group % kLanes == 0),
                  "key: groups of a multiple of 32 columns are served");
  p.given = std::numeric_limits<float>::infinity();
  if (given) {
    STD_TORCH_CHECK(given->defined() && given->is_cpu() && dtype_of(*given) == ScalarType::Float &&
                        given->numel() == 1 && (p.key.is_static() || (format == Key::kE4m3 && !p.key.power_of_two())),
                    "given: unexpected tensor");
    p.given = *static_cast<const float*>(given->data_ptr());
  }
  STD_TORCH_CHECK(given || !p.key.is_static(), "scale: a static key takes one");
}

namespace {

ScalarType storage(const Key& key) { return key.format() == Key::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn; }

int64_t groups(const Pipeline& p) {
  const int64_t group = p.key.group(p.cols);
  return p.key.is_static() ? 1 : (p.cols + group - 1) / group;
}

// Strides of [T, groups] in the key's layout, as quant/formats.py makes them.
void scale_strides(const Pipeline& p, int64_t* stride) {
  const int64_t column = p.key.layout() == Key::kTmaAligned ? (p.rows + 3) / 4 * 4 : p.rows;
  stride[0] = p.key.layout() == Key::kRowMajor ? groups(p) : 1;
  stride[1] = p.key.layout() == Key::kRowMajor ? 1 : column;
}

void set_scale(Pipeline& p, const Tensor& scale) {
  int64_t stride[2];
  scale_strides(p, stride);
  p.scale = static_cast<float*>(scale.data_ptr());
  p.scale_row_stride = stride[0];
  p.scale_group_stride = stride[1];
}

}  // namespace

std::tuple<Tensor, Tensor> new_quantized(Pipeline& p, const Tensor& like) {
  Tensor data = empty_rows(like, p.cols, storage(p.key), p.data);
  if (p.key.is_static()) {
    const int64_t one = 1;
    Tensor scale = empty_strided(1, &one, &one, ScalarType::Float);
    *static_cast<float*>(scale.data_ptr()) = p.given;
    return {std::move(data), std::move(scale)};
  }
  const int64_t size[2] = {p.rows, groups(p)};
  int64_t stride[2];
  scale_strides(p, stride);
  Tensor scale = empty_strided(2, size, stride, ScalarType::Float);
  set_scale(p, scale);
  return {std::move(data), std::move(scale)};
}

void set_outputs(Pipeline& p, const Tensor& like, const OptionalTensor& data, const OptionalTensor& scale,
                 const OptionalTensor& zero_point, const OptionalTensor& unquantized) {
  STD_TORCH_CHECK(!zero_point, "zero_point_out: these keys have none");
  if (data) p.data = rows_like(*data, "data_out", like, p.cols, storage(p.key));
  if (unquantized) p.y = rows_like(*unquantized, "unquantized_out", like, p.cols, p.dtype);
  if (p.key.is_static()) {
    STD_TORCH_CHECK(!scale, "scale_out: a static key's scale is given, not written");
    return;
  }
  STD_TORCH_CHECK(data.has_value() == scale.has_value(), "data_out, scale_out: expected both or neither");
  if (!scale) return;
  STD_TORCH_CHECK(scale->defined() && scale->is_cpu() && dtype_of(*scale) == ScalarType::Float, "scale_out: dtype");
  STD_TORCH_CHECK(scale->dim() == 2 && scale->size(0) == p.rows && scale->size(1) == groups(p), "scale_out: shape");
  set_scale(p, *scale);
  STD_TORCH_CHECK((p.rows <= 1 || scale->stride(0) == p.scale_row_stride) &&
                      (groups(p) <= 1 || scale->stride(1) == p.scale_group_stride),
                  "scale_out: strides");
}

namespace {

// The scales as rows of bytes, for the overlap check.
Rows scale_memory(const Pipeline& p) {
  Rows rows;
  if (!p.scale || !p.rows || !p.cols) return rows;
  rows.data = reinterpret_cast<char*>(p.scale);
  rows.count = 1;
  rows.stride[0] = 0;
  rows.cols = (p.rows - 1) * p.scale_row_stride + (groups(p) - 1) * p.scale_group_stride + 1;
  return rows;
}

void check_all(const Pipeline& p) {
  const int64_t bytes = byte_size(p.dtype);
  struct Named {
    Rows rows;
    int64_t bytes;
    const char* name;
  };
  const Named outs[] = {{p.sum, bytes, "residual_out"},
                        {p.y, bytes, "output"},
                        {p.data, 1, "data_out"},
                        {scale_memory(p), 4, "scale_out"}};
  Rows weight;
  if (p.weight) {
    weight.data = static_cast<char*>(const_cast<void*>(p.weight));
    weight.count = 1;
    weight.cols = p.cols;
    weight.stride[0] = 0;
  }
  const int64_t weight_bytes = byte_size(p.weight_dtype);
  for (const Named& out : outs) {
    if (!out.rows) continue;
    check_output(out.rows, out.bytes, out.name);
    check_overlap(out.rows, out.bytes, p.x, bytes, true, out.name);
    check_overlap(out.rows, out.bytes, p.other, bytes, true, out.name);
    check_overlap(out.rows, out.bytes, weight, weight_bytes, false, out.name);
    for (const Named& other : outs)
      if (&other != &out) check_overlap(out.rows, out.bytes, other.rows, other.bytes, false, out.name);
  }
}

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
  const int64_t a_row = p.cols * ((p.sum ? bytes : 0) + (p.y ? bytes : 0) + (p.data ? 1 : 0));
  return p.rows * a_row > cache && aligned(p.sum) && aligned(p.y) && aligned(p.data);
}

}  // namespace

void run(Pipeline& p, bool check_memory) {
  if (check_memory) check_all(p);
  if (!p.rows) return;
  p.stream = worth_streaming(p);
  const auto run_rows = PICK_ISA(run_rows);
  parallel_rows(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    constexpr int64_t kOnStack = 8192;
    alignas(64) float small[kOnStack];
    const int64_t padded = (p.cols + kLanes - 1) / kLanes * kLanes;
    if (padded <= kOnStack) return run_rows(p, begin, end, small);
    struct alignas(64) Line {
      float v[16];
    };
    const std::unique_ptr<Line[]> large(new Line[padded / 16]);
    run_rows(p, begin, end, large[0].v);
  });
}

}  // namespace fused_ops
