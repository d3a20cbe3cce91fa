// What every operation shares: tensors as rows, allocation, checks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "quantize.h"

namespace fused_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMaxDims = 8;

constexpr int kCpu = -1;  // as a device; others are CUDA's indices

inline int device_of(const Tensor& tensor, const char* name) {
  int32_t type, index = kCpu;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  if (type == aoti_torch_device_type_cpu()) return kCpu;
  STD_TORCH_CHECK(type == aoti_torch_device_type_cuda(), name, ": expected a tensor on the CPU or a CUDA device");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

// The elements of a tensor as rows of its contiguous last dimension, wherever they lie.
struct Rows {
  char* data = nullptr;
  int device = kCpu;
  int64_t count = 0, cols = 0;
  int dims = 0;                              // leading dimensions, merged where strides allow
  int64_t size[kMaxDims], stride[kMaxDims];  // strides in bytes

  explicit operator bool() const { return data != nullptr; }

  template <class T>
  T* at(int64_t row) const {
    return reinterpret_cast<T*>(data + offset(row));
  }

  int64_t offset(int64_t row) const { return dims <= 1 ? row * stride[0] : offset_of_many(row); }

  __attribute__((noinline)) int64_t offset_of_many(int64_t row) const {
    int64_t bytes = 0;
    for (int d = dims - 1; d >= 0; --d) {
      bytes += row % size[d] * stride[d];
      row /= size[d];
    }
    return bytes;
  }
};

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

inline bool is_finite(double value) {
  constexpr double kMost = 3.4028234663852886e38;  // of float32
  return value >= -kMost && value <= kMost;
}

// The dtypes that kernels see, as the stable ABI numbers them: asked once, since each is a call. e8m0 can be asked for
// from torch 2.12 on only; until then its number is the enum's.
struct DtypeCode {
  ScalarType dtype;
  int32_t code;
};
inline const DtypeCode kDtypes[] = {
    {ScalarType::BFloat16, aoti_torch_dtype_bfloat16()},
    {ScalarType::Half, aoti_torch_dtype_float16()},
    {ScalarType::Float, aoti_torch_dtype_float32()},
    {ScalarType::Char, aoti_torch_dtype_int8()},
    {ScalarType::Float8_e4m3fn, aoti_torch_dtype_float8_e4m3fn()},
    {ScalarType::Float8_e4m3fnuz, aoti_torch_dtype_float8_e4m3fnuz()},
    {ScalarType::Byte, aoti_torch_dtype_uint8()},
    {ScalarType::Float8_e8m0fnu, static_cast<int32_t>(ScalarType::Float8_e8m0fnu)},
    {ScalarType::Int, aoti_torch_dtype_int32()},
    {ScalarType::Long, aoti_torch_dtype_int64()},
};

inline int32_t dtype_code(ScalarType dtype) {
  for (const DtypeCode& known : kDtypes)
    if (known.dtype == dtype) return known.code;
  STD_TORCH_CHECK(false, "no kernel writes this dtype");
}

// Of any tensor, also of dtypes that no kernel sees.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Tensor::scalar_type asks for every dtype's number in turn; this is seven times faster.
inline ScalarType dtype_of(const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  for (const DtypeCode& known : kDtypes)
    if (known.code == code) return known.dtype;
  return ScalarType::Undefined;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int64_t byte_size(ScalarType dtype) {
  if (dtype == ScalarType::Float || dtype == ScalarType::Int) return 4;
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2 : 1;
}

inline bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Whether every row is.
inline bool aligned(const Rows& rows, int64_t bytes) {
  bool all = aligned(rows.data, bytes);
  for (int d = 0; d < rows.dims; ++d) all = all && rows.stride[d] % bytes == 0;
  return all;
}

// Sizes and strides at once: every question to a tensor is a call across the stable ABI.
inline Rows rows_of(const Tensor& tensor, const char* name) {
  Rows rows;
  rows.device = device_of(tensor, name);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDims, name, ": expected 1 to ", kMaxDims, " dimensions");
  rows.count = 1;
  rows.cols = sizes[dim - 1];
  rows.stride[0] = 0;
  STD_TORCH_CHECK(rows.cols <= 1 || strides[dim - 1] == 1, name, ": expected a contiguous last dimension");
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = 0; d + 1 < dim; ++d) {
    const int64_t size = sizes[d], stride = strides[d] * bytes;
    rows.count *= size;
    if (size == 1) continue;
    const int last = rows.dims - 1;
    if (rows.dims && rows.stride[last] == size * stride) {
      rows.size[last] *= size;
      rows.stride[last] = stride;
    } else {
      rows.size[rows.dims] = size;
      rows.stride[rows.dims++] = stride;
    }
  }
  rows.data = static_cast<char*>(tensor.data_ptr());
  return rows;
}

// Rows of `tensor` that match those of `like`: the same leading sizes, `cols` elements of `dtype` each.
inline Rows rows_like(const Tensor& tensor, const char* name, const Tensor& like, int64_t cols, ScalarType dtype) {
  const Rows rows = rows_of(tensor, name);
  STD_TORCH_CHECK(dtype_of(tensor) == dtype && rows.device == device_of(like, name), name,
                  ": unexpected dtype or device");
  const auto sizes = tensor.sizes(), expected = like.sizes();
  STD_TORCH_CHECK(sizes.size() == expected.size() && rows.cols == cols, name, ": unexpected shape");
  for (size_t d = 0; d + 1 < sizes.size(); ++d) STD_TORCH_CHECK(sizes[d] == expected[d], name, ": unexpected shape");
  return rows;
}

// Ascending, by insertion: there are few (and gcc 12 warns of bounds that std::sort doesn't leave).
inline void sort_dims(std::pair<int64_t, int64_t>* dims, int n) {
  for (int i = 1; i < n; ++i) std::rotate(std::upper_bound(dims, dims + i, dims[i]), dims + i, dims + i + 1);
}

// The bytes that rows cover: (stride, count) from the outermost on, around `inner` bytes at once.
struct Extent {
  int dims = 0;
  int64_t stride[kMaxDims], count[kMaxDims], inner = 0;

  Extent(const Rows& rows, int64_t bytes) : inner(rows.cols * bytes) {
    std::pair<int64_t, int64_t> sorted[kMaxDims];
    for (int d = 0; d < rows.dims; ++d) sorted[d] = {rows.stride[d], rows.size[d]};
    sort_dims(sorted, rows.dims);
    for (int d = rows.dims - 1; d >= 0; --d) {
      const auto [step, size] = sorted[d];
      if (dims && stride[dims - 1] == step * size) {
        stride[dims - 1] = step;
        count[dims - 1] *= size;
      } else {
        stride[dims] = step;
        count[dims++] = size;
      }
    }
  }
  int64_t span(int from) const {
    int64_t bytes = inner;
    for (int d = from; d < dims; ++d) bytes += (count[d] - 1) * stride[d];
    return bytes;
  }
};

// Whether a and b may share a byte where b begins `apart` bytes behind a. Where their outer strides agree, one may lie
// in the gaps of the other, as slices of a packed tensor do.
inline bool may_meet(const Extent& a, int i, const Extent& b, int j, int64_t apart) {
  if (apart >= a.span(i) || -apart >= b.span(j)) return false;
  if (i == a.dims || j == b.dims || a.stride[i] != b.stride[j] || a.stride[i] <= 0) return true;
  const int64_t stride = a.stride[i];
  if (a.span(i + 1) > stride || b.span(j + 1) > stride) return true;  // beyond its next neighbours, too
  const int64_t gap = (apart % stride + stride) % stride;
  return may_meet(a, i + 1, b, j + 1, gap) || may_meet(a, i + 1, b, j + 1, gap - stride);
}

// Outputs must not share memory with anything else, except, where `in_place` says so, with an input that lies just so:
// one whose row is read before the output's is written.
inline void check_overlap(const Rows& out, int64_t out_bytes, const Rows& in, int64_t in_bytes, bool in_place,
                          const char* name) {
  if (!out || !in || !out.count || !in.count || !out.cols || !in.cols) return;
  const int64_t apart = in.data - out.data;
  const auto span = [](const Rows& rows, int64_t bytes) {
    bytes *= rows.cols;
    for (int d = 0; d < rows.dims; ++d) bytes += (rows.size[d] - 1) * rows.stride[d];
    return bytes;
  };
  if (apart >= span(out, out_bytes) || -apart >= span(in, in_bytes)) return;
  bool same = in_place && apart == 0 && out_bytes == in_bytes && out.dims == in.dims && out.cols == in.cols;
  for (int d = 0; same && d < out.dims; ++d) same = out.stride[d] == in.stride[d] && out.size[d] == in.size[d];
  if (same) return;
  STD_TORCH_CHECK(!may_meet(Extent(out, out_bytes), 0, Extent(in, in_bytes), 0, apart), name,
                  ": overlaps another argument in memory");
}

// Contiguous memory as one row, for check_overlap.
inline Rows one_row(void* data, int64_t cols) {
  Rows rows;
  rows.data = static_cast<char*>(data);
  rows.count = 1;
  rows.stride[0] = 0;
  rows.cols = cols;
  return rows;
}

// An output's rows must not share memory with each other.
inline void check_output(const Rows& out, int64_t out_bytes, const char* name) {
  std::pair<int64_t, int64_t> dims[kMaxDims];  // (stride, size), innermost first
  for (int d = 0; d < out.dims; ++d) dims[d] = {out.stride[d], out.size[d]};
  sort_dims(dims, out.dims);
  int64_t extent = out.cols * out_bytes;
  for (int d = 0; d < out.dims && out.count; ++d) {
    STD_TORCH_CHECK(dims[d].first >= extent, name, ": rows overlap in memory");
    extent += (dims[d].second - 1) * dims[d].first;
  }
}

// One C call, no dispatcher: a third of the cost of torch::stable::empty.
inline Tensor empty_strided(int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype, int device) {
  AtenTensorHandle handle;
  const int32_t type = device == kCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, size, stride, dtype, type, std::max(device, 0), &handle));
  return Tensor(handle);
}

inline Tensor empty_strided(int64_t dims, const int64_t* size, const int64_t* stride, ScalarType dtype, int device) {
  return empty_strided(dims, size, stride, dtype_code(dtype), device);
}

// Contiguous, with the leading sizes of `like` and `cols` columns; `rows` becomes its rows.
inline Tensor empty_rows(const Tensor& like, int64_t cols, ScalarType dtype, Rows& rows) {
  const auto sizes = like.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDims, "expected 1 to ", kMaxDims, " dimensions");
  int64_t size[kMaxDims], stride[kMaxDims], step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    size[d] = d == dim - 1 ? cols : sizes[d];
    stride[d] = step;
    step *= std::max<int64_t>(size[d], 1);
  }
  rows.device = device_of(like, "x");
  Tensor tensor = empty_strided(dim, size, stride, dtype, rows.device);
  rows.data = static_cast<char*>(tensor.data_ptr());
  rows.count = 1;
  for (int64_t d = 0; d + 1 < dim; ++d) rows.count *= size[d];
  rows.cols = cols;
  rows.dims = 1;
  rows.size[0] = rows.count;
  rows.stride[0] = cols * byte_size(dtype);
  return tensor;
}

}  // namespace fused_ops
