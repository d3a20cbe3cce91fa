// Keys, and the tensors that a quantization makes: their shapes, dtypes and strides are those of quant/formats.py.
#include "row.h"

namespace fused_ops {

ScalarType storage_of(const Key& key) {
  switch (key.format()) {
    case Key::kInt8:
      return ScalarType::Char;
    case Key::kE2m1:
      return ScalarType::Byte;
    case Key::kE4m3Fnuz:
      return ScalarType::Float8_e4m3fnuz;
    default:
      return ScalarType::Float8_e4m3fn;
  }
}

namespace {

ScalarType scale_dtype(const Key& key) {
  if (key.layout() == Key::kPackedUe8m0) return ScalarType::Int;
  if (key.scale_format() == Key::kE8m0) return ScalarType::Float8_e8m0fnu;
  return key.scale_format() == Key::kScaleE4m3 ? ScalarType::Float8_e4m3fn : ScalarType::Float;
}

struct ScaleShape {
  int64_t dims, size[2], stride[2];
};

ScaleShape scale_shape(const Key& key, int64_t rows, int64_t cols) {
  const int64_t group = key.group(cols), groups = (cols + group - 1) / group;
  if (key.per_tensor()) return {1, {1}, {1}};
  switch (key.layout()) {
    case Key::kRowMajor:
      return {2, {rows, groups}, {groups, 1}};
    case Key::kColumnMajor:
      return {2, {rows, groups}, {1, rows}};
    case Key::kTmaAligned:
      return {2, {rows, groups}, {1, round_up(rows, 4)}};
    case Key::kPackedUe8m0:
      return {2, {rows, (groups + 3) / 4}, {1, round_up(rows, 4)}};
    default:  // kSwizzled128x4
      return {1, {round_up(rows, 128) * round_up(groups, 4)}, {1}};
  }
}

ScaleOut scale_out(const Key& key, int64_t rows, const ScaleShape& shape, const Tensor& tensor, ScalarType dtype) {
  ScaleOut out;
  out.data = static_cast<char*>(tensor.data_ptr());
  const int64_t bytes = byte_size(dtype);
  out.element = static_cast<int>(bytes);
  out.extent = bytes;
  for (int d = 0; d < shape.dims; ++d) out.extent += (shape.size[d] - 1) * shape.stride[d] * bytes;
  for (int d = 0; d < shape.dims; ++d)
    if (!shape.size[d]) out.extent = 0;
  if (key.per_tensor()) return out;
  switch (key.layout()) {
    case Key::kSwizzled128x4:
      out.swizzled = true;
      out.row_bytes = rows ? shape.size[0] / round_up(rows, 128) : 0;
      out.four = 512;
      out.one = 1;
      break;
    case Key::kPackedUe8m0:
      out.row_bytes = 4;
      out.four = shape.stride[1] * 4;
      out.one = 1;
      out.element = 1;
      break;
    default:
      out.row_bytes = shape.stride[0] * bytes;
      out.one = shape.stride[1] * bytes;
      out.four = 4 * out.one;
  }
  return out;
}

bool is_one(const Pipeline& p, const OptionalTensor& tensor, ScalarType dtype) {
  return tensor->defined() && device_of(*tensor, "given") == p.x.device && dtype_of(*tensor) == dtype &&
         tensor->numel() == 1;
}

void check_given(const ScaleShape& shape, const Tensor& tensor, ScalarType dtype, int device, const char* name) {
  STD_TORCH_CHECK(tensor.defined() && dtype_of(tensor) == dtype && device_of(tensor, name) == device, name,
                  ": unexpected dtype or device");
  STD_TORCH_CHECK(tensor.dim() == shape.dims, name, ": unexpected shape");
  for (int d = 0; d < shape.dims; ++d) {
    STD_TORCH_CHECK(tensor.size(d) == shape.size[d], name, ": unexpected shape");
    STD_TORCH_CHECK(shape.size[d] <= 1 || tensor.stride(d) == shape.stride[d], name, ": unexpected strides");
  }
}

}  // namespace

ScaleOut scales_of(const Tensor& tensor, const Key& key, int64_t rows, int64_t cols, bool zero_point, const char* name,
                   int device) {
  const ScaleShape shape = scale_shape(key, rows, cols);
  const ScalarType dtype = zero_point ? ScalarType::Int : scale_dtype(key);
  check_given(shape, tensor, dtype, device, name);
  return scale_out(key, rows, shape, tensor, dtype);
}

Tensor new_scales(const Key& key, int64_t rows, int64_t cols, int device, bool zero_point, ScaleOut& out) {
  const ScaleShape shape = scale_shape(key, rows, cols);
  const ScalarType dtype = zero_point ? ScalarType::Int : scale_dtype(key);
  Tensor scale = empty_strided(shape.dims, shape.size, shape.stride, dtype, device);
  out = scale_out(key, rows, shape, scale, dtype);
  return scale;
}

Key key_of(int64_t code, const char* name) {
  constexpr int64_t unused = 1 << 10 | 1 << 11 | 1 << 15;
  const Key key{code};
  const int format = key.format(), scale = key.scale_format(), layout = key.layout();
  const bool plain = scale == Key::kFloat, mx = scale == Key::kE8m0, nv = scale == Key::kScaleE4m3;
  const bool e4m3 = format == Key::kE4m3, fnuz = format == Key::kE4m3Fnuz, int8 = format == Key::kInt8,
             fp4 = format == Key::kE2m1;
  const bool known = code >= 0 && code >> 16 < int64_t{1} << 31 && !(code & unused) && layout <= Key::kSwizzled128x4 &&
                     ((plain && (e4m3 || fnuz || int8)) || (mx && (e4m3 || fp4)) || (nv && fp4)) &&
                     (!key.asymmetric() || int8) && (!key.power_of_two() || (plain && (e4m3 || fnuz))) &&
                     (layout != Key::kPackedUe8m0 || key.power_of_two()) && (layout != Key::kSwizzled128x4 || !plain) &&
                     (!key.per_tensor() || (code >> 16 == 0 && layout == Key::kRowMajor));
  STD_TORCH_CHECK(known, name, ": no key has the code ", code);
  return key;
}

void check_columns(const Key& key, int64_t cols) {
  const int64_t columns = key.code >> 16;
  if (key.per_tensor()) {
    STD_TORCH_CHECK(key.scale_format() == Key::kFloat, "key: one scale per tensor is a float32");
    return;
  }
  STD_TORCH_CHECK(!key.is_static(), "key: static scales are per tensor");
  STD_TORCH_CHECK(columns == 0 || columns % 32 == 0 || columns == 16, "key: groups of ", columns,
                  " columns, expected 16 or a multiple of 32");
  const bool divides = key.scale_format() != Key::kFloat;
  STD_TORCH_CHECK(!divides || (columns && cols % columns == 0), "key: expected a row of whole groups");
  STD_TORCH_CHECK(columns != 16 || cols % 16 == 0, "key: expected a row of whole groups of 16");
}

void set_key(Pipeline& p, int64_t code, const OptionalTensor& given, const OptionalTensor& zero_point) {
  const Key key = p.key = key_of(code, "key");
  const int scale = key.scale_format();
  check_columns(key, p.cols);
  p.quantizes = true;

  const bool fp8 = key.format() == Key::kE4m3 || key.format() == Key::kE4m3Fnuz;
  const bool bounded = fp8 && scale == Key::kFloat && !key.power_of_two();
  if (given) {
    STD_TORCH_CHECK(is_one(p, given, ScalarType::Float) && (key.is_static() || scale == Key::kScaleE4m3 || bounded),
                    "given: unexpected tensor");
    p.given = static_cast<const float*>(given->data_ptr());
  }
  STD_TORCH_CHECK(given || !(key.is_static() || scale == Key::kScaleE4m3), "scale, scale2: this key takes one");
  const bool takes_zero = key.is_static() && key.asymmetric();
  STD_TORCH_CHECK(zero_point.has_value() == takes_zero && (!takes_zero || is_one(p, zero_point, ScalarType::Int)),
                  "zero_point: a static asymmetric key takes one, of int32, and no other key");
  if (takes_zero) p.given_zero = static_cast<const int32_t*>(zero_point->data_ptr());
}

std::tuple<Tensor, Tensor> new_quantized(Pipeline& p, const Tensor& like) {
  Tensor data = empty_rows(like, p.cols / p.key.codes_per_byte(), storage_of(p.key), p.data);
  Tensor scale = new_scales(p.key, p.rows, p.cols, p.x.device, false, p.scale);
  return {std::move(data), std::move(scale)};
}

void set_quantized(Pipeline& p, const Tensor& like, const OptionalTensor& data, const OptionalTensor& scale,
                   const OptionalTensor& zero_point, const OptionalTensor& unquantized) {
  if (data) p.data = rows_like(*data, "data_out", like, p.cols / p.key.codes_per_byte(), storage_of(p.key));
  if (unquantized) p.y = rows_like(*unquantized, "unquantized_out", like, p.cols, p.dtype);
  if (p.key.is_static()) {
    STD_TORCH_CHECK(!scale && !zero_point, "scale_out, zero_point_out: a static key's are given, not written");
    return;
  }
  STD_TORCH_CHECK(data.has_value() == scale.has_value(), "data_out, scale_out: expected both or neither");
  STD_TORCH_CHECK(!zero_point || (p.key.asymmetric() && scale), "zero_point_out: this key has none");
  if (!scale) return;
  const ScaleShape shape = scale_shape(p.key, p.rows, p.cols);
  check_given(shape, *scale, scale_dtype(p.key), p.x.device, "scale_out");
  p.scale = scale_out(p.key, p.rows, shape, *scale, scale_dtype(p.key));
  if (!zero_point) return;
  check_given(shape, *zero_point, ScalarType::Int, p.x.device, "zero_point_out");
  p.zero_point = scale_out(p.key, p.rows, shape, *zero_point, ScalarType::Int);
}

}  // namespace fused_ops
