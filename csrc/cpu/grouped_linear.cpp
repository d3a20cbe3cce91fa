// y = x * w^T where rows of y have the weight of an expert, whose rows follow each other or have a part of y each.
#include <vector>

#include "../kernel.h"
#include "linear.h"

namespace fused_ops {
namespace {

// Of what experts have one of each, the first expert's; and how many bytes lie between two.
struct Stacked {
  OptionalTensor first;
  int64_t step = 0;

  Stacked(const OptionalTensor& all, int64_t experts, const char* name) {
    if (!all) return;
    STD_TORCH_CHECK(all->dim() >= 2 && all->size(0) == experts, name, ": expected one for each expert");
    first = torch::stable::select(*all, 0, 0);
    step = all->stride(0) * static_cast<int64_t>(all->element_size());
  }
};

// A pointer into what experts have, moved to that of another.
template <class T>
void move(T*& pointer, int64_t bytes) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer) + bytes);
}

// What all groups have in common, and those of the experts that have rows.
struct Grouped {
  Linear common;
  std::vector<Linear> groups;

  void run() {
    for (Linear& group : groups) group.y = common.y;
    fused_ops::run(groups.data(), static_cast<int64_t>(groups.size()));
  }
};

Grouped grouped_of(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                   const Tensor& weight_scale, const Tensor& tokens_per_expert, const OptionalTensor& rows,
                   const OptionalTensor& bias, ScalarType dtype, const OptionalTensor& scale2 = {},
                   const OptionalTensor& zero_point = {}, int64_t weight_key = kInferred,
                   const OptionalTensor& weight_scale2 = {}) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) > 0, "weight: expected [experts, N, K]");
  const int64_t experts = weight.size(0);
  const Stacked w(weight, experts, "weight"), w_scale(weight_scale, experts, "weight_scale"),
      w_bias(bias, experts, "bias"), w_scale2(weight_scale2, experts, "weight_scale2");
  Grouped made;
  Linear& p = made.common = linear_of(data, scale, key, *w.first, *w_scale.first, w_bias.first, dtype, scale2,
                                      zero_point, weight_key, w_scale2.first);
  const bool apart = !rows && data.dim() == 3;  // each expert has M rows, of which some are used
  STD_TORCH_CHECK(rows || (apart ? data.size(0) == experts : data.dim() == 2),
                  "data: expected [R, K] or [experts, M, K] without rows");
  int64_t count = p.x.rows;
  if (rows) {
    STD_TORCH_CHECK(rows->dim() == 1, "rows: expected [R]");
    p.source = Integers(*rows, "rows");
    p.source.check_below(p.x.rows, "rows");
    count = p.source.count;
  }
  const Integers tokens(tokens_per_expert, "tokens_per_expert");
  STD_TORCH_CHECK(tokens_per_expert.dim() == 1 && tokens.count == experts,
                  "tokens_per_expert: expected one for each expert");

  const bool in_values = p.w.key.scale_format() != Key::kFloat;
  for (int64_t e = 0, next = 0; e < experts; ++e) {
    if (apart) next = e * data.size(1);
    const int64_t most = apart ? data.size(1) : count - next;
    STD_TORCH_CHECK(tokens[e] >= 0 && tokens[e] <= most, "tokens_per_expert: has ", tokens[e], " of expert ", e,
                    ", expected 0 to ", most);
    if (tokens[e] == 0) continue;
    Linear& group = made.groups.emplace_back(p);
    group.first = next;
    group.rows = tokens[e];
    next += tokens[e];
    move(group.w.codes.data, e * w.step);
    if (in_values) move(group.w.groups.data, e * w_scale.step);
    if (in_values && weight_scale2) move(group.w_row.data, e * w_scale2.step);
    if (!in_values) move(p.w_stride ? group.w_block : group.w_row.data, e * w_scale.step);
    if (bias) move(group.bias, e * w_bias.step);
  }
  return made;
}

Tensor grouped_scaled_linear(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                             const Tensor& weight_scale, const Tensor& tokens_per_expert, const OptionalTensor& rows,
                             const OptionalTensor& bias, ScalarType dtype) {
  Grouped grouped = grouped_of(data, scale, key, weight, weight_scale, tokens_per_expert, rows, bias, dtype);
  const int64_t outs = grouped.common.w.rows;
  Tensor y;
  if (rows) {
    const int64_t size[] = {rows->size(0), outs}, stride[] = {std::max<int64_t>(outs, 1), 1};
    y = empty_strided(2, size, stride, dtype, kCpu);
    grouped.common.y = rows_of(y, "y");
  } else {
    y = empty_rows(data, outs, dtype, grouped.common.y);
  }
  grouped.run();
  return y;
}

void grouped_scaled_linear_out(const Tensor& data, const Tensor& scale, int64_t key, const Tensor& weight,
                               const Tensor& weight_scale, const Tensor& tokens_per_expert, const OptionalTensor& rows,
                               const OptionalTensor& bias, ScalarType dtype, const OptionalTensor& scale2,
                               const OptionalTensor& zero_point, int64_t weight_key,
                               const OptionalTensor& weight_scale2, const OptionalTensor& y) {
  Grouped grouped = grouped_of(data, scale, key, weight, weight_scale, tokens_per_expert, rows, bias, dtype, scale2,
                               zero_point, weight_key, weight_scale2);
  if (!y) return;
  Linear& p = grouped.common;
  STD_TORCH_CHECK(!rows || (y->dim() == 2 && y->size(0) == rows->size(0)), "y_out: unexpected shape");
  p.y = rows_like(*y, "y_out", rows ? *y : data, p.w.rows, dtype);
  const OptionalTensor given[] = {data, scale, weight, weight_scale, tokens_per_expert};
  check_result(
      p, {&given[0], &given[1], &given[2], &given[3], &given[4], &rows, &scale2, &zero_point, &weight_scale2, &bias});
  grouped.run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  add_kernel<TORCH_BOX(&grouped_scaled_linear)>(m, "grouped_scaled_linear");
  add_kernel<TORCH_BOX(&grouped_scaled_linear_out)>(m, "grouped_scaled_linear.out");
}

}  // namespace fused_ops
