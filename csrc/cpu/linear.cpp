// y = x * w^T of two tensors of codes: arguments and their checks. linear_passes.cpp multiplies. Another format is one
// more struct in linear_formats.inc.
//
// Scales of 16 or 32 columns are multiplied into the values when those are decoded; the factors of larger groups are
// applied to the sums of a block of columns, and those of whole rows or tensors to a result.
#include "linear.h"

#include <cmath>
#include <limits>

#include "../kernel.h"

namespace fused_ops {
namespace {

// What each code of a one-byte scale means.
template <class Value>
std::array<float, 256> values_of(const Value& value) {
  std::array<float, 256> values;
  for (int code = 0; code < 256; ++code) values[code] = value(code);
  return values;
}
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
// Not by decode_e4m3, whose subnormal float32s a process may have switched off before this is made.
const std::array<float, 256> kE4m3Values = values_of([](int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = std::ldexp(exponent ? 8.0f + mantissa : mantissa, (exponent ? exponent : 1) - 10);
  return (code & 0x7f) == 0x7f ? kNan : code & 0x80 ? -magnitude : magnitude;
});

const float* floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && dtype_of(tensor) == ScalarType::Float && tensor.is_contiguous(), name,
                  ": expected contiguous float32 on the CPU");
  return static_cast<const float*>(tensor.data_ptr());
}

const float* one_float(const OptionalTensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor && tensor->defined() && tensor->numel() == 1, name, ": expected one element");
  return floats(*tensor, name);
}

bool is_shape(const Tensor& tensor, int64_t rows, int64_t cols) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols;
}

int64_t columns_of(int64_t code) { return code >> 16; }  // of a group, 0: all

// Codes of a key, after a check that there are products of it.
Operand operand_of(const Tensor& codes, const char* name, int64_t code) {
  Operand operand;
  const Key key = operand.key = key_of(code, name);
  const int format = key.format(), scale = key.scale_format();
  const int64_t columns = columns_of(code);
  const bool fp8 = format == Key::kE4m3, fnuz = format == Key::kE4m3Fnuz, int8 = format == Key::kInt8,
             fp4 = format == Key::kE2m1;
  const bool power = columns >= 32 && columns <= kBlock && (columns & (columns - 1)) == 0;
  const bool known = scale == Key::kFloat  ? (fp8 || fnuz || int8) && (columns == 0 || power)
                     : scale == Key::kE8m0 ? (fp8 || fp4) && columns == 32
                                           : scale == Key::kScaleE4m3 && fp4 && columns == 16;
  STD_TORCH_CHECK(known, name, ": no product takes its key");
  const ScalarType dtype = int8   ? ScalarType::Char
                           : fp8  ? ScalarType::Float8_e4m3fn
                           : fnuz ? ScalarType::Float8_e4m3fnuz
                                  : ScalarType::Byte;
  STD_TORCH_CHECK(dtype_of(codes) == dtype, name, ": expected the key's codes");
  operand.codes = rows_of(codes, name);
  operand.rows = operand.codes.count;
  operand.cols = operand.codes.cols * key.codes_per_byte();
  STD_TORCH_CHECK(operand.cols > 0 && (scale == Key::kFloat || operand.cols % columns == 0), name,
                  ": expected rows of whole groups");
  operand.decoder = scale == Key::kScaleE4m3 ? Decoder::kNvE2m1
                    : scale == Key::kE8m0    ? (fp8 ? Decoder::kMxE4m3 : Decoder::kMxE2m1)
                    : int8                   ? Decoder::kInt8
                    : fnuz                   ? Decoder::kE4m3Fnuz
                                             : Decoder::kE4m3;
  operand.group_values = (scale == Key::kScaleE4m3 ? kE4m3Values : kE8m0Values).data();
  return operand;
}

// Scales, or zero points, as the operand's key says.
ScaleOut given_scale(const Tensor& tensor, const Operand& operand, bool zero_point, const char* name) {
  if (!operand.key.per_tensor()) return scales_of(tensor, operand.key, operand.rows, operand.cols, zero_point, name);
  STD_TORCH_CHECK(
      tensor.numel() == 1 && tensor.is_cpu() && dtype_of(tensor) == (zero_point ? ScalarType::Int : ScalarType::Float),
      name, ": expected one element");
  ScaleOut one;
  one.data = static_cast<char*>(tensor.data_ptr());
  return one;
}

void set_activation(Linear& p, const Tensor& data, const Tensor& scale, int64_t code, const OptionalTensor& scale2,
                    const OptionalTensor& zero_point) {
  p.x = operand_of(data, "data", code);
  const Key& key = p.x.key;
  STD_TORCH_CHECK(!key.is_static() || key.per_tensor(), "key: static scales are per tensor");
  p.x_group = key.scale_format() == Key::kFloat ? columns_of(code) : 0;
  (key.scale_format() == Key::kFloat ? p.x_scale : p.x.groups) = given_scale(scale, p.x, false, "scale");
  STD_TORCH_CHECK(scale2.has_value() == (key.scale_format() == Key::kScaleE4m3),
                  "scale2: NVFP4 takes one, no other key");
  if (scale2) p.x_row.data = one_float(scale2, "scale2");
  STD_TORCH_CHECK(zero_point.has_value() == key.asymmetric(), "zero_point: asymmetric keys take one, no other key");
  if (!zero_point) return;
  p.zero_point = given_scale(*zero_point, p.x, true, "zero_point");
  const int64_t rows = key.per_tensor() ? 1 : p.x.rows, groups = p.x_group ? ceil_div(p.x.cols, p.x_group) : 1;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t zero = scale_at<int32_t>(p.zero_point, m, g);
      STD_TORCH_CHECK(zero >= -128 && zero <= 127, "zero_point has ", zero, ", expected -128 to 127");
    }
}

// Where no key of the weight is given: the one that the dtypes and the shape of its scale mean. Sets p.w_row_shift.
int64_t infer_key(Linear& p, const Tensor& weight, const Tensor& scale) {
  const ScalarType dtype = dtype_of(weight), scale_dtype = dtype_of(scale);
  const int64_t swizzled = scale.dim() == 1 ? Key::kSwizzled128x4 << 12 : 0;
  if (scale_dtype == ScalarType::Float8_e8m0fnu)
    return (dtype == ScalarType::Byte ? Key::kE2m1 : Key::kE4m3) | Key::kE8m0 << 8 | swizzled | 32 << 16;
  if (scale_dtype == ScalarType::Float8_e4m3fn) return Key::kE2m1 | Key::kScaleE4m3 << 8 | swizzled | 16 << 16;
  const int64_t format = dtype == ScalarType::Char              ? Key::kInt8
                         : dtype == ScalarType::Float8_e4m3fnuz ? Key::kE4m3Fnuz
                                                                : Key::kE4m3;
  const auto sizes = weight.sizes(), scales = scale.sizes();
  if (scales.size() == 2 && sizes.size() == 2) {
    if (scales[1] == 1 && scales[0] == sizes[0]) return format;
    for (const int shift : {7, 6}) {
      const int64_t side = int64_t{1} << shift;
      if (scales[0] != ceil_div(sizes[0], side) || scales[1] != ceil_div(sizes[1], side)) continue;
      p.w_row_shift = shift;
      return format | side << 16;
    }
  }
  return format | 1 << 7;
}

void set_weight(Linear& p, const Tensor& weight, const Tensor& scale, int64_t code, const OptionalTensor& scale2) {
  if (code == kInferred) code = infer_key(p, weight, scale);
  p.w = operand_of(weight, "weight", code);
  const Key& key = p.w.key;
  STD_TORCH_CHECK(weight.dim() == 2 && p.w.cols == p.x.cols && !key.asymmetric(), "weight: expected [N, K], symmetric");
  STD_TORCH_CHECK(scale2.has_value() == (key.scale_format() == Key::kScaleE4m3),
                  "weight_scale2: NVFP4 takes one, no other key");
  STD_TORCH_CHECK(key.layout() == Key::kRowMajor || key.layout() == Key::kSwizzled128x4,
                  "weight_key: expected row-major or swizzled scales");
  if (key.scale_format() != Key::kFloat) {
    p.w.groups = given_scale(scale, p.w, false, "weight_scale");
    if (scale2) p.w_row.data = one_float(scale2, "weight_scale2");
    return;
  }
  const float* values = floats(scale, "weight_scale");
  const int64_t columns = columns_of(code), groups = columns ? ceil_div(p.w.cols, columns) : 1;
  STD_TORCH_CHECK(
      key.per_tensor() ? scale.numel() == 1 : is_shape(scale, ceil_div(p.w.rows, int64_t{1} << p.w_row_shift), groups),
      "weight_scale: unexpected shape");
  if (columns) {
    p.w_block = values;
    p.w_stride = groups;
  } else {
    p.w_row = {values, !key.per_tensor(), 0};
  }
}

// The bytes of a tensor of any strides, as one row.
Rows memory_of(const Tensor& tensor) {
  int64_t last = tensor.numel() > 0;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (last)
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return one_row(tensor.data_ptr(), last * static_cast<int64_t>(tensor.element_size()));
}

}  // namespace

const std::array<float, 256> kE8m0Values = values_of([](int code) {
  return code == 255 ? kNan : bits<float>(code ? code << 23 : 0x400000);  // 2^(code - 127)
});

Linear linear_of(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight, const Tensor& weight_scale,
                 const OptionalTensor& bias, ScalarType dtype, const OptionalTensor& scale2,
                 const OptionalTensor& zero_point, int64_t weight_key, const OptionalTensor& weight_scale2) {
  STD_TORCH_CHECK(is_float(dtype), "out_dtype: expected bfloat16, float16 or float32");
  Linear p;
  p.dtype = dtype;
  set_activation(p, data, scale, key, scale2, zero_point);
  set_weight(p, weight, weight_scale, weight_key, weight_scale2);

  const int64_t w_group = p.w_stride ? columns_of(p.w.key.code) : 0;
  for (const int64_t group : {p.x_group, w_group})
    if (group) p.block = std::min(p.block, group);
  p.blocks = ceil_div(p.x.cols, p.block);
  p.rows = p.x.rows;
  if (w_group)
    for (p.w_shift = 0; p.block << p.w_shift < w_group;) ++p.w_shift;

  // Integers are multiplied with integers only. A value with a scale of its own can be too small for the unit of FP8.
  if (p.x.decoder == Decoder::kInt8 && p.w.decoder != Decoder::kInt8) p.x.decoder = Decoder::kFloatInt8;
  if (p.w.decoder == Decoder::kInt8 && p.x.decoder != Decoder::kInt8) p.w.decoder = Decoder::kFloatInt8;
  const bool fnuz = p.w.decoder == Decoder::kE4m3Fnuz;
  if ((fnuz || p.w.decoder == Decoder::kE4m3) && p.x.key.scale_format() == Key::kE8m0) {
    static char one = 127;
    p.w.decoder = fnuz ? Decoder::kMxE4m3Fnuz : Decoder::kMxE4m3;
    p.w.groups.data = &one;
  }

  if (!bias) return p;
  const Rows added = rows_of(*bias, "bias");
  p.bias_dtype = dtype_of(*bias);
  STD_TORCH_CHECK(is_float(p.bias_dtype) && bias->dim() == 1 && added.cols == p.w.rows,
                  "bias: expected [N] of bfloat16, float16 or float32");
  p.bias = added.data;
  return p;
}

void check_result(const Linear& p, std::initializer_list<const OptionalTensor*> arguments) {
  const int64_t bytes = byte_size(p.dtype);
  check_output(p.y, bytes, "y_out");
  check_overlap(p.y, bytes, p.x.codes, 1, false, "y_out");
  for (const OptionalTensor* argument : arguments)
    if (*argument) check_overlap(p.y, bytes, memory_of(**argument), 1, false, "y_out");
}

namespace {

Tensor scaled_linear(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                     const Tensor& weight_scale, const OptionalTensor& bias, ScalarType dtype) {
  Linear p = linear_of(data, scale, key, weight, weight_scale, bias, dtype);
  Tensor y = empty_rows(data, p.w.rows, dtype, p.y);
  run(&p, 1);
  return y;
}

void scaled_linear_out(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                       const Tensor& weight_scale, const OptionalTensor& bias, ScalarType dtype,
                       const OptionalTensor& scale2, const OptionalTensor& zero_point, int64_t weight_key,
                       const OptionalTensor& weight_scale2, const OptionalTensor& /*weight_sums*/,
                       const OptionalTensor& y) {
  Linear p =
      linear_of(data, scale, key, weight, weight_scale, bias, dtype, scale2, zero_point, weight_key, weight_scale2);
  if (!y) return;
  p.y = rows_like(*y, "y_out", data, p.w.rows, dtype);
  const OptionalTensor given[] = {data, scale, weight, weight_scale};
  check_result(p, {&given[0], &given[1], &given[2], &given[3], &scale2, &zero_point, &weight_scale2, &bias});
  run(&p, 1);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  add_kernel<TORCH_BOX(&scaled_linear)>(m, "scaled_linear");
  add_kernel<TORCH_BOX(&scaled_linear_out)>(m, "scaled_linear.out");
}

}  // namespace fused_ops
