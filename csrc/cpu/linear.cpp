// y = x * w^T of two tensors of 8-bit codes, decoded on the way. Another format is one more decoder in linear.inc.
#include <memory>

#include "common.h"
#include "isa.h"

namespace fused_ops {

constexpr int64_t kGroup = 128;    // columns of a scale group, and side of a weight block with one scale
constexpr int64_t kBlock = 512;    // columns summed before they are folded, where no scales are grouped
constexpr int64_t kTile = kLanes;  // weight rows that are worked on together
constexpr int64_t kMaxRows = 256;  // rows of x in one pass over the weight

constexpr float kOne = 1;

// Scales of rows and of blocks of columns; without any, they are 1.
struct Scales {
  const float* data = &kOne;
  int64_t row_stride = 0, block_stride = 0;

  double operator()(int64_t row, int64_t block = 0) const { return data[row * row_stride + block * block_stride]; }
};

struct Linear {
  Rows x, w, y;             // codes [T, K] and [N, K], results [T, N]
  int64_t cols, outs;       // K, N
  int format;               // of the codes
  Scales x_row, w_row;      // of whole rows
  Scales x_block, w_block;  // of kGroup columns; w_block's rows are kGroup rows of the weight
  int64_t block, blocks;    // columns that are folded together, and how many of those make a row

  const void* bias = nullptr;  // [N], may be absent
  ScalarType bias_dtype = ScalarType::Float, dtype;

  int64_t first = 0, rows = 0;  // rows of x in this pass
  void* decoded = nullptr;      // [blocks, rows, block]
};

}  // namespace fused_ops

#define KERNELS "linear.inc"
#include "each_isa.inc"

namespace fused_ops {
namespace {

const float* scales_of(const Tensor& scale, const char* name) {
  STD_TORCH_CHECK(
      scale.defined() && scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), name,
      ": expected contiguous float32 on the CPU");
  return static_cast<const float*>(scale.data_ptr());
}

bool is_shape(const Tensor& tensor, int64_t rows, int64_t cols) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols;
}

Linear linear_of(const Tensor& data, const Tensor& scale, int64_t code, const Tensor& weight,
                 const Tensor& weight_scale, const OptionalTensor& bias, ScalarType dtype) {
  Linear p;
  const Key key{code};
  p.x = rows_of(data, "data");
  p.cols = p.x.cols;
  p.format = key.format();
  p.dtype = dtype;
  const int64_t columns = code >> 16;  // of a group, 0: all
  STD_TORCH_CHECK(code >= 0 && (p.format == Key::kInt8 || p.format == Key::kE4m3) && !key.asymmetric() &&
                      key.scale_format() == Key::kFloat && key.layout() == Key::kRowMajor &&
                      (columns == 0 || columns == kGroup) && key.is_static() == key.per_tensor() &&
                      !(key.per_tensor() && columns),
                  "key: this backend has no product for it");
  STD_TORCH_CHECK(is_float(dtype), "out_dtype: expected bfloat16, float16 or float32");

  const ScalarType codes = p.format == Key::kInt8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(data.scalar_type() == codes, "data: expected the key's codes");
  p.w = rows_of(weight, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == codes && weight.dim() == 2 && p.w.cols == p.cols,
                  "weight: expected [N, K] of data's dtype");
  p.outs = p.w.count;

  const int64_t groups = (p.cols + kGroup - 1) / kGroup;
  const bool grouped = columns == kGroup;
  p.block = grouped ? kGroup : kBlock;
  p.blocks = (p.cols + p.block - 1) / p.block;
  STD_TORCH_CHECK(key.per_tensor() ? scale.numel() == 1 : is_shape(scale, p.x.count, grouped ? groups : 1),
                  "scale: unexpected shape");
  const float *x_scale = scales_of(scale, "scale"), *w_scale = scales_of(weight_scale, "weight_scale");
  if (grouped) {
    p.x_block = {x_scale, groups, 1};
  } else {
    p.x_row = {x_scale, !key.per_tensor(), 0};
  }
  if (grouped && is_shape(weight_scale, (p.outs + kGroup - 1) / kGroup, groups)) {
    p.w_block = {w_scale, groups, 1};
  } else {
    p.w_row = {w_scale, is_shape(weight_scale, p.outs, 1), 0};
    STD_TORCH_CHECK(p.w_row.row_stride || weight_scale.numel() == 1, "weight_scale: unexpected shape");
  }

  if (!bias) return p;
  const Rows added = rows_of(*bias, "bias");
  p.bias_dtype = bias->scalar_type();
  STD_TORCH_CHECK(is_float(p.bias_dtype) && bias->dim() == 1 && added.cols == p.outs,
                  "bias: expected [N] of bfloat16, float16 or float32");
  p.bias = added.data;
  return p;
}

void run(Linear& p) {
  if (p.x.count == 0 || p.outs == 0) return;
  struct alignas(64) Line {
    char bytes[64];
  };
  const int64_t value_bytes = p.format == Key::kInt8 ? 2 : 4;
  const int64_t row_bytes = p.blocks * p.block * value_bytes;
  const std::unique_ptr<Line[]> decoded(new Line[std::min(p.x.count, kMaxRows) * row_bytes / sizeof(Line)]);
  p.decoded = decoded.get();
  const int64_t tiles = (p.outs + kTile - 1) / kTile;
  constexpr int64_t kCodes = 8;  // that cost what other operations spend on an element
  for (; p.first < p.x.count; p.first += p.rows) {
    p.rows = std::min(p.x.count - p.first, kMaxRows);
    parallel_rows(p.rows, p.cols / kCodes, [&](int64_t begin, int64_t end) { PICK_ISA(linear_decode)(p, begin, end); });
    parallel_rows(tiles, kTile * p.cols * p.rows / kCodes,
                  [&](int64_t begin, int64_t end) { PICK_ISA(linear_multiply)(p, begin, end); });
  }
}

Tensor scaled_linear(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                     const Tensor& weight_scale, const OptionalTensor& bias, ScalarType dtype) {
  Linear p = linear_of(data, scale, key, weight, weight_scale, bias, dtype);
  Tensor y = empty_rows(data, p.outs, dtype, p.y);
  run(p);
  return y;
}

void scaled_linear_out(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                       const Tensor& weight_scale, const OptionalTensor& bias, ScalarType dtype,
                       const OptionalTensor& y) {
  Linear p = linear_of(data, scale, key, weight, weight_scale, bias, dtype);
  if (!y) return;
  p.y = rows_like(*y, "y_out", data, p.outs, dtype);
  const int64_t bytes = static_cast<int64_t>(y->element_size());
  check_output(p.y, bytes, "y_out");
  check_overlap(p.y, bytes, p.x, 1, false, "y_out");
  check_overlap(p.y, bytes, p.w, 1, false, "y_out");
  for (const Tensor* input : {&scale, &weight_scale, bias ? &*bias : &scale})
    check_overlap(p.y, bytes, whole(*input), static_cast<int64_t>(input->element_size()), false, "y_out");
  run(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("scaled_linear", TORCH_BOX(&scaled_linear));
  m.impl("scaled_linear.out", TORCH_BOX(&scaled_linear_out));
}

}  // namespace fused_ops
