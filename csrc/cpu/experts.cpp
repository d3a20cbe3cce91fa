// Around the products of experts: which rows are whose, and the sum over a token's experts.
#include "experts.h"

#include <vector>

#include "../kernel.h"

#define KERNELS "experts.inc"
#include "each_isa.inc"

namespace fused_ops {
namespace {

constexpr int64_t kMostExperts = 65536;

int32_t* ints_of(const OptionalTensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  if (!tensor) return nullptr;
  const auto found = tensor->sizes();
  STD_TORCH_CHECK(tensor->is_cpu() && dtype_of(*tensor) == ScalarType::Int && tensor->is_contiguous() &&
                      std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()),
                  name, ": unexpected dtype, shape or strides");
  return static_cast<int32_t*>(tensor->data_ptr());
}

// Counts, then places, in the order of the index.
void sort_by_expert_out(const Tensor& index, int64_t experts, const OptionalTensor& tokens_per_expert,
                        const OptionalTensor& rows, const OptionalTensor& positions) {
  STD_TORCH_CHECK(index.dim() == 2, "top_k_index: expected [T, k]");
  STD_TORCH_CHECK(experts >= 1 && experts <= kMostExperts, "num_experts: expected 1 to ", kMostExperts);
  const Integers expert(index, "top_k_index");
  const int64_t k = index.size(1);
  STD_TORCH_CHECK(expert.count < int64_t{1} << 31, "top_k_index: expected less than 2^31 of them");
  expert.check_below(experts, "top_k_index");
  int32_t* const count_out = ints_of(tokens_per_expert, {experts}, "tokens_per_expert_out");
  int32_t* const rows_out = ints_of(rows, {expert.count}, "rows_out");
  Rows positions_out;
  if (positions) positions_out = rows_like(*positions, "positions_out", index, k, ScalarType::Int);
  if (positions) check_output(positions_out, 4, "positions_out");
  const Rows in = one_row(const_cast<void*>(expert.data), expert.count);
  const Rows outs[] = {one_row(count_out, experts), one_row(rows_out, expert.count), positions_out};
  const char* const names[] = {"tokens_per_expert_out", "rows_out", "positions_out"};
  for (int i = 0; i < 3; ++i) {
    check_overlap(outs[i], 4, in, expert.wide ? 8 : 4, false, names[i]);
    for (int j = 0; j < i; ++j) check_overlap(outs[i], 4, outs[j], 4, false, names[i]);
  }

  std::vector<int32_t> next(experts + 1);
  for (int64_t i = 0; i < expert.count; ++i) ++next[expert[i] + 1];
  for (int64_t e = 0; e < experts; ++e) {
    if (count_out) count_out[e] = next[e + 1];
    next[e + 1] += next[e];
  }
  for (int64_t i = 0; i < expert.count; ++i) {
    const int32_t place = next[expert[i]]++;
    if (rows_out) rows_out[place] = static_cast<int32_t>(i / k);
    if (positions_out) positions_out.at<int32_t>(i / k)[i % k] = place;
  }
}

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(const Tensor& index, int64_t experts) {
  STD_TORCH_CHECK(index.dim() == 2 && experts >= 1 && experts <= kMostExperts, "top_k_index: expected [T, k]");
  const int64_t tokens = index.size(0), k = index.size(1), count = tokens * k, one = 1, steps[] = {std::max(k, one), 1};
  const int64_t sizes[] = {tokens, k};
  std::tuple<Tensor, Tensor, Tensor> made = {empty_strided(1, &experts, &one, ScalarType::Int, kCpu),
                                             empty_strided(1, &count, &one, ScalarType::Int, kCpu),
                                             empty_strided(2, sizes, steps, ScalarType::Int, kCpu)};
  sort_by_expert_out(index, experts, std::get<0>(made), std::get<1>(made), std::get<2>(made));
  return made;
}

ExpertsSum sum_of(const Tensor& y, const Tensor& positions, const Tensor& weights) {
  ExpertsSum p;
  p.y = rows_of(y, "y");
  p.weights = rows_of(weights, "weights");
  p.dtype = dtype_of(y);
  p.weight = dtype_of(weights);
  p.positions = Integers(positions, "positions");
  STD_TORCH_CHECK(y.dim() == 2 && p.y.device == kCpu && is_float(p.dtype), "y: expected floats [R, N] on the CPU");
  STD_TORCH_CHECK(p.y.cols > 0, "y: expected at least one column");
  STD_TORCH_CHECK(positions.dim() == 2 && weights.dim() == 2 && p.weights.device == kCpu &&
                      positions.size(0) == weights.size(0) && positions.size(1) == weights.size(1),
                  "weights: expected [T, k] as positions");
  STD_TORCH_CHECK(p.weight == p.dtype || p.weight == ScalarType::Float, "weights: expected float32, or y's dtype");
  p.positions.check_below(p.y.count, "positions");
  return p;
}

void run(const ExpertsSum& p) {
  const int64_t work = p.y.cols * std::max<int64_t>(p.weights.cols, 1);
  parallel_rows(p.out.count, work, [&](int64_t begin, int64_t end) { PICK_ISA(sum_rows)(p, begin, end); });
}

Tensor sum_experts(const Tensor& y, const Tensor& positions, const Tensor& weights) {
  ExpertsSum p = sum_of(y, positions, weights);
  Tensor out = empty_rows(weights, p.y.cols, p.dtype, p.out);
  run(p);
  return out;
}

void sum_experts_out(const Tensor& y, const Tensor& positions, const Tensor& weights, const OptionalTensor& out) {
  ExpertsSum p = sum_of(y, positions, weights);
  if (!out) return;
  p.out = rows_like(*out, "sum_out", weights, p.y.cols, p.dtype);
  const int64_t bytes = byte_size(p.dtype);
  check_output(p.out, bytes, "sum_out");
  check_overlap(p.out, bytes, p.y, bytes, false, "sum_out");
  check_overlap(p.out, bytes, p.weights, byte_size(p.weight), false, "sum_out");
  check_overlap(p.out, bytes, one_row(positions.data_ptr(), p.positions.count * (p.positions.wide ? 8 : 4)), 1, false,
                "sum_out");
  run(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  add_kernel<TORCH_BOX(&sort_by_expert)>(m, "sort_by_expert");
  add_kernel<TORCH_BOX(&sort_by_expert_out)>(m, "sort_by_expert.out");
  add_kernel<TORCH_BOX(&sum_experts)>(m, "sum_experts");
  add_kernel<TORCH_BOX(&sum_experts_out)>(m, "sum_experts.out");
}

}  // namespace fused_ops
