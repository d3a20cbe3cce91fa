#include <cstring>

#include "collective.h"
#include "memory.h"
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

// Contiguous [rows, columns of x] in x's dtype, whichever it is.
Tensor empty_like_rows(T x, int64_t rows) {
  const int64_t size[2] = {rows, x.size(1)}, stride[2] = {std::max<int64_t>(x.size(1), 1), 1};
  return empty_strided(2, size, stride, dtype_code(x), device_of(x, "x"));
}

Collective collective_for(const char* op, T x, const char* name, int64_t rows, T workspace, int64_t rank) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": expected two dimensions");
  STD_TORCH_CHECK(rows >= 0 && rows < int64_t{1} << 48, "rows: expected 0 to 2^48");
  Collective of = collective_of(op, workspace, rank, device_of(x, name));
  const Share own = share_of(rows, of.ranks, of.rank);
  STD_TORCH_CHECK(x.size(0) == own.end - own.begin, name, ": has ", x.size(0), " rows, but ", own.end - own.begin,
                  " of ", rows, " are rank ", of.rank, "'s");
  return of;
}

void check_memory(const Collective& of, const Gather& g) {
  const auto bytes = [](const ScaleOut& scale) { return one_row(scale.data, scale.extent); };
  Memory memory;
  memory.reads(g.x, 1, "");
  for (const ScaleOut& scale : g.scale) memory.reads(bytes(scale), 1, "");
  memory.writes(one_row(of.memory, of.bytes), 1, "workspace");
  memory.writes(g.y, 1, g.scales ? "data_out" : "y_out");
  memory.writes(bytes(g.result[0]), 1, "scale_out");
  memory.writes(bytes(g.result[1]), 1, "zero_point_out");
  memory.check();
}

Call gather_call(const Collective& of, T x, int64_t rows, int64_t key) {
  Call call;
  std::strncpy(call.name, of.name, sizeof(call.name) - 1);
  call.rows = rows;
  call.cols = x.size(1);
  call.dtype = dtype_code(x);
  call.key = key;
  return call;
}

void gather_into(const Collective& of, T x, int64_t rows, T y) {
  Gather g;
  g.x = bytes_of(x, "x");
  g.y = bytes_of(y, "y_out");
  STD_TORCH_CHECK(y.size(0) == rows && y.size(1) == x.size(1) && dtype_code(y) == dtype_code(x),
                  "y_out: unexpected shape or dtype");
  STD_TORCH_CHECK(g.y.device == g.x.device, "y_out: unexpected device");
  check_memory(of, g);
  run_gather(of, gather_call(of, x, rows, -1), g);
}

Tensor all_gather(T x, int64_t rows, T workspace, int64_t rank, Group) {
  const Collective of = collective_for("all_gather", x, "x", rows, workspace, rank);
  Tensor y = empty_like_rows(x, rows);
  gather_into(of, x, rows, y);
  return y;
}

void all_gather_out(T x, int64_t rows, T workspace, int64_t rank, Group, OptionalT y) {
  const Collective of = collective_for("all_gather", x, "x", rows, workspace, rank);
  gather_into(of, x, rows, y ? *y : empty_like_rows(x, rows));
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
  const Collective of = collective_for("all_gather_quantized", data, "data", rows, workspace, rank);
  Gather g;
  g.x = bytes_of(data, "data");
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
  run_gather(of, gather_call(of, data, rows, code), g);
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
  add_kernel<TORCH_BOX(&all_gather)>(m, "all_gather");
  add_kernel<TORCH_BOX(&all_gather_out)>(m, "all_gather.out");
  add_kernel<TORCH_BOX(&all_gather_quantized)>(m, "all_gather_quantized");
  add_kernel<TORCH_BOX(&all_gather_quantized_out)>(m, "all_gather_quantized.out");
}

}  // namespace fused_ops
