#include <cstring>

#include "collective.h"
#include "row_op.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;
using Group = std::string;  // of the reference

Rows bytes_of(T tensor, const char* name) {
  Rows rows = rows_of(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected two dimensions");
  rows.cols *= static_cast<int64_t>(tensor.element_size());
  return rows;
}

int32_t code_of(T tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Contiguous [rows, columns of x] in x's dtype, whichever it is.
Tensor empty_like_rows(T x, int64_t rows) {
  const int64_t size[2] = {rows, x.size(1)}, stride[2] = {std::max<int64_t>(x.size(1), 1), 1};
  AtenTensorHandle handle;
  const int device = device_of(x, "x");
  const int32_t type = device == kCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, size, stride, code_of(x), type, std::max(device, 0), &handle));
  return Tensor(handle);
}

void check_share(const Collective& of, int64_t have, int64_t rows, const char* name) {
  STD_TORCH_CHECK(rows >= 0 && rows < int64_t{1} << 48, "rows: expected 0 to 2^48");
  const Share own = share_of(rows, of.ranks, of.rank);
  STD_TORCH_CHECK(have == own.end - own.begin, name, ": has ", have, " rows, but ", own.end - own.begin, " of ", rows,
                  " are rank ", of.rank, "'s");
}

void check_memory(const Collective& of, const Gather& g) {
  struct Named {
    Rows rows;
    bool written;
    const char* name;
  };
  const auto bytes = [](char* data, int64_t count) {
    Rows rows;
    rows.data = data;
    rows.count = 1;
    rows.stride[0] = 0;
    rows.cols = count;
    return rows;
  };
  const auto scale = [&](const ScaleOut& s) { return bytes(s.data, s.extent); };
  const Named all[] = {{g.x, false, ""},
                       {scale(g.scale[0]), false, ""},
                       {scale(g.scale[1]), false, ""},
                       {g.y, true, "data_out"},
                       {scale(g.result[0]), true, "scale_out"},
                       {scale(g.result[1]), true, "zero_point_out"},
                       {bytes(of.memory, of.bytes), true, "workspace"}};
  for (const Named& out : all) {
    if (!out.written) continue;
    if (out.rows) check_output(out.rows, 1, out.name);
    for (const Named& other : all)
      if (&other != &out) check_overlap(out.rows, 1, other.rows, 1, false, out.name);
  }
}

Call gather_call(const Collective& of, const Gather& g, int64_t rows, int64_t dtype, int64_t key) {
  Call call;
  std::strncpy(call.name, of.name, sizeof(call.name) - 1);
  call.rows = rows;
  call.cols = g.x.cols;
  call.dtype = dtype;
  call.key = key;
  return call;
}

void gather_into(T x, int64_t rows, T workspace, int64_t rank, T y) {
  Gather g;
  g.x = bytes_of(x, "x");
  const Collective of = collective_of("all_gather", workspace, rank, g.x.device);
  check_share(of, x.size(0), rows, "x");
  g.y = bytes_of(y, "y_out");
  STD_TORCH_CHECK(y.size(0) == rows && y.size(1) == x.size(1) && code_of(y) == code_of(x) && g.y.device == g.x.device,
                  "y_out: unexpected shape, dtype or device");
  check_memory(of, g);
  run_gather(of, gather_call(of, g, rows, code_of(x), -1), g);
}

void check_rows_fit(T x, int64_t rows, T workspace, int64_t rank, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": expected two dimensions");
  check_share(collective_of(name, workspace, rank, device_of(x, name)), x.size(0), rows, name);
}

Tensor all_gather(T x, int64_t rows, T workspace, int64_t rank, Group) {
  check_rows_fit(x, rows, workspace, rank, "x");
  Tensor y = empty_like_rows(x, rows);
  gather_into(x, rows, workspace, rank, y);
  return y;
}

void all_gather_out(T x, int64_t rows, T workspace, int64_t rank, Group, OptionalT y) {
  check_rows_fit(x, rows, workspace, rank, "x");
  gather_into(x, rows, workspace, rank, y ? *y : empty_like_rows(x, rows));
}

// Whose absent results are made, since ranks must meet whatever each wants.
struct Quantized {
  Tensor data, scale, zero_point;
};

Quantized gather_quantized(T data, T scale, int64_t code, int64_t rows, T workspace, int64_t rank, OptionalT zero,
                           OptionalT data_out, OptionalT scale_out, OptionalT zero_out) {
  const Key key = key_of(code, "key");
  STD_TORCH_CHECK(!key.is_static() && !key.per_tensor(), "key: expected scales that are made by row or group");
  STD_TORCH_CHECK(zero.has_value() == key.asymmetric(), "zero_point: an asymmetric key has one, and no other");
  check_rows_fit(data, rows, workspace, rank, "data");
  Gather g;
  g.x = bytes_of(data, "data");
  const Collective of = collective_of("all_gather_quantized", workspace, rank, g.x.device);
  STD_TORCH_CHECK(dtype_of(data) == storage_of(key), "data: unexpected dtype");
  const int64_t have = data.size(0), cols = data.size(1) * key.codes_per_byte();
  STD_TORCH_CHECK(cols > 0, "data: expected at least one column");
  check_columns(key, cols);
  g.groups = (cols + key.group(cols) - 1) / key.group(cols);
  g.padded = key.layout() == Key::kPackedUe8m0 || key.layout() == Key::kSwizzled128x4;
  g.scales = key.asymmetric() ? 2 : 1;
  g.scale[0] = scales_of(scale, key, have, cols, false, "scale", g.x.device);
  Quantized made;
  made.data = data_out ? *data_out : empty_like_rows(data, rows);
  g.y = bytes_of(made.data, "data_out");
  STD_TORCH_CHECK(g.y.count == rows && g.y.cols == g.x.cols && dtype_of(made.data) == dtype_of(data),
                  "data_out: unexpected shape or dtype");
  if (scale_out) {
    made.scale = *scale_out;
    g.result[0] = scales_of(*scale_out, key, rows, cols, false, "scale_out", g.x.device);
  } else {
    made.scale = new_scales(key, rows, cols, g.x.device, false, g.result[0]);
  }
  if (zero) {
    g.scale[1] = scales_of(*zero, key, have, cols, true, "zero_point", g.x.device);
    if (zero_out) {
      made.zero_point = *zero_out;
      g.result[1] = scales_of(*zero_out, key, rows, cols, true, "zero_point_out", g.x.device);
    } else {
      made.zero_point = new_scales(key, rows, cols, g.x.device, true, g.result[1]);
    }
  }
  STD_TORCH_CHECK(zero || !zero_out, "zero_point_out: this key has none");
  check_memory(of, g);
  run_gather(of, gather_call(of, g, rows, static_cast<int64_t>(dtype_of(data)), code), g);
  return made;
}

std::tuple<Tensor, Tensor> all_gather_quantized(T data, T scale, int64_t key, int64_t rows, T workspace, int64_t rank,
                                                Group) {
  Quantized made = gather_quantized(data, scale, key, rows, workspace, rank, {}, {}, {}, {});
  return {std::move(made.data), std::move(made.scale)};
}

void all_gather_quantized_out(T data, T scale, int64_t key, int64_t rows, T workspace, int64_t rank, Group,
                              OptionalT zero_point, OptionalT data_out, OptionalT scale_out, OptionalT zero_point_out) {
  gather_quantized(data, scale, key, rows, workspace, rank, zero_point, data_out, scale_out, zero_point_out);
}

}  // namespace

void implement_gathers(Library& m) {
  m.impl("all_gather", TORCH_BOX(&all_gather));
  m.impl("all_gather.out", TORCH_BOX(&all_gather_out));
  m.impl("all_gather_quantized", TORCH_BOX(&all_gather_quantized));
  m.impl("all_gather_quantized.out", TORCH_BOX(&all_gather_quantized_out));
}

}  // namespace fused_ops
