#include "collective.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "cpu/meeting.h"
#include "row_op.h"

namespace fused_ops {
Collective collective_of(const char* name, const Tensor& workspace, int64_t rank, int device) {
  const Rows rows = rows_of(workspace, "workspace");
  STD_TORCH_CHECK(rows.device == device, "workspace: expected one on the device of the rows");
  STD_TORCH_CHECK(workspace.dim() == 1 && dtype_of(workspace) == ScalarType::Byte, "workspace: expected uint8 [B]");
  if (on_cuda(device)) return collective_on_cuda(name, workspace, rank);
  const Header header = header_of(rows.data, rows.cols);
  STD_TORCH_CHECK(rank >= 0 && rank < header.ranks, "rank: expected 0 to ", header.ranks - 1);
  Collective of;
  of.name = name;
  of.memory = rows.data;
  of.bytes = rows.cols;
  of.rank = rank;
  of.ranks = header.ranks;
  of.begun = begin_call(of);
  return of;
}

void run_collective(Pipeline& p) { on_cuda(p.x.device) ? run_collective_on_cuda(p) : run_collective_on_cpu(p); }
void run_pair(Pipeline& q, Pipeline& k) { on_cuda(q.x.device) ? run_pair_on_cuda(q, k) : run_pair_on_cpu(q, k); }
void run_gather(const Collective& of, const Call& call, const Gather& g) {
  on_cuda(g.x.device) ? run_gather_on_cuda(of, call, g) : run_gather_on_cpu(of, call, g);
}

Call call_of(const Pipeline& p) {
  Call call;
  std::strncpy(call.name, p.collective.name, sizeof(call.name) - 1);
  call.rows = p.x.count;
  call.cols = p.cols;
  call.dtype = static_cast<int64_t>(p.dtype);
  if (p.quantizes) call.key = p.key.code;
  if (p.norm) {
    call.flags = p.norm.round_before_weight + 2 * p.norm.weight_plus_one;
    call.weight = p.norm.weight ? static_cast<int64_t>(p.norm.weight_dtype) : -1;
    call.eps = p.norm.eps;
  }
  call.x_multiplier = p.x_multiplier;
  return call;
}

namespace {

// As few digits as say which float32 it is, as which kernels have it.
std::string text_of(double value) {
  char text[32];
  for (int digits = 6; digits <= 9; ++digits) {
    std::snprintf(text, sizeof(text), "%.*g", digits, value);
    if (std::strtof(text, nullptr) == static_cast<float>(value)) break;
  }
  return text;
}

}  // namespace

std::string text_of(const Call& call) {
  std::ostringstream text;
  const auto dtype = [&](int64_t code) {
    code < 0 ? text << "None" : text << torch::headeronly::toString(static_cast<ScalarType>(code));
  };
  text << std::string(call.name, strnlen(call.name, sizeof(call.name))) << (call.key >= 0 ? "_quant(" : "(");
  dtype(call.dtype);
  text << " [" << call.rows << ", " << call.cols << "]";
  if (call.other_cols) text << " and [" << call.rows << ", " << call.other_cols << "]";
  if (call.flags >= 0) {
    text << ", weight ";
    dtype(call.weight);
    if (call.other_cols) text << " and ", dtype(call.other_weight);
    text << ", eps " << text_of(call.eps) << ", weight_bias " << (call.flags >> 1 & 1) << ", round_before_weight "
         << (call.flags & 1);
  }
  if (call.x_multiplier != 1) text << ", x_multiplier " << text_of(call.x_multiplier);
  if (call.key >= 0) text << ", quant_key of code " << call.key;
  text << ")";
  return text.str();
}

Share share_of(int64_t rows, int64_t ranks, int64_t rank) {
  const int64_t share = (rows + ranks - 1) / ranks;
  return {std::min(rank * share, rows), std::min((rank + 1) * share, rows)};
}

namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;
using Group = std::string;  // of the reference

Pipeline summed(const char* name, T x, T workspace, int64_t rank, bool scattered) {
  Pipeline p = pipeline_of(x);
  p.collective = collective_of(name, workspace, rank, p.x.device);
  p.collective.scattered = scattered;
  if (!scattered) return p;
  STD_TORCH_CHECK(x.dim() == 2, "x: expected two dimensions");
  const Share own = share_of(p.x.count, p.collective.ranks, rank);
  p.rows = own.end - own.begin;
  return p;
}

template <bool SCATTERED>
struct Reduce {
  static Pipeline make(T x, T workspace, int64_t rank, const Group&) {
    return summed(SCATTERED ? "reduce_scatter" : "all_reduce", x, workspace, rank, SCATTERED);
  }
};

template <bool SCATTERED>
struct ReduceRmsNorm {
  static Pipeline make(T x, OptionalT weight, double eps, int64_t flags, T workspace, int64_t rank, const Group&) {
    Pipeline p = summed(SCATTERED ? "reduce_scatter_rms_norm" : "all_reduce_rms_norm", x, workspace, rank, SCATTERED);
    p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    return p;
  }
};

template <bool SCATTERED>
struct ReduceFusedAddRmsNorm {
  static Pipeline make(T x, T residual, OptionalT weight, double eps, int64_t flags, T workspace, int64_t rank,
                       const Group&, double x_multiplier = 1.0) {
    const char* name = SCATTERED ? "reduce_scatter_fused_add_rms_norm" : "all_reduce_fused_add_rms_norm";
    Pipeline p = summed(name, x, workspace, rank, SCATTERED);
    p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    set_add(p, residual, result_like(x, p), x_multiplier);
    return p;
  }
};

// --- rows of q and k, whose columns the ranks share ---

struct Pair {
  Pipeline q, k;
};

Pair pair_of(T q, T k, OptionalT q_weight, OptionalT k_weight, double eps, int64_t flags, T workspace, int64_t rank) {
  Pair p{pipeline_of(q), {}};
  p.q.collective = collective_of("qk_all_reduce_rms_norm", workspace, rank, p.q.x.device);
  p.k = pipeline_of(k);
  STD_TORCH_CHECK(p.q.dtype == p.k.dtype, "k: expected q's dtype");
  rows_like(k, "k", q, p.k.cols, p.q.dtype);
  p.q.norm = norm_of(p.q, Norm::kRms, q_weight, {}, eps, flags);
  p.k.norm = norm_of(p.k, Norm::kRms, k_weight, {}, eps, flags);
  p.k.collective = p.q.collective;
  return p;
}

std::tuple<Tensor, Tensor> qk_all_reduce_rms_norm(T q, T k, OptionalT q_weight, OptionalT k_weight, double eps,
                                                  int64_t flags, T workspace, int64_t rank, Group) {
  Pair p = pair_of(q, k, q_weight, k_weight, eps, flags, workspace, rank);
  Tensor q_out = empty_rows(q, p.q.cols, p.q.dtype, p.q.y), k_out = empty_rows(k, p.k.cols, p.k.dtype, p.k.y);
  check_memory(p.q);
  check_memory(p.k);
  run_pair(p.q, p.k);
  return {std::move(q_out), std::move(k_out)};
}

void qk_all_reduce_rms_norm_out(T q, T k, OptionalT q_weight, OptionalT k_weight, double eps, int64_t flags,
                                T workspace, int64_t rank, Group, OptionalT q_out, OptionalT k_out) {
  Pair p = pair_of(q, k, q_weight, k_weight, eps, flags, workspace, rank);
  if (q_out) p.q.y = rows_like(*q_out, "q_out", q, p.q.cols, p.q.dtype);
  if (k_out) p.k.y = rows_like(*k_out, "k_out", k, p.k.cols, p.k.dtype);
  check_memory(p.q);
  check_memory(p.k);
  const auto without_workspace = [](Pipeline one) {
    one.collective = {};
    return one;
  };
  check_apart(without_workspace(p.q), without_workspace(p.k));
  check_apart(without_workspace(p.k), without_workspace(p.q));
  run_pair(p.q, p.k);
}

}  // namespace

void implement_collectives(Library& m) {
  using X = Inputs<T, T, int64_t, Group>;
  using XWeight = Inputs<T, OptionalT, double, int64_t, T, int64_t, Group>;
  using XResidualWeight = Inputs<T, T, OptionalT, double, int64_t, T, int64_t, Group>;
  implement_plain<RowOp<Reduce<false>, X>>(m, "all_reduce");
  implement_plain<RowOp<Reduce<true>, X>>(m, "reduce_scatter");
  implement<RowOp<ReduceRmsNorm<false>, XWeight>>(m, "all_reduce_rms_norm");
  implement<RowOp<ReduceRmsNorm<true>, XWeight>>(m, "reduce_scatter_rms_norm");
  implement<RowOp<ReduceFusedAddRmsNorm<false>, XResidualWeight, Inputs<double>, Residual::kAlso>>(
      m, "all_reduce_fused_add_rms_norm");
  implement<RowOp<ReduceFusedAddRmsNorm<true>, XResidualWeight, Inputs<double>, Residual::kAlso>>(
      m, "reduce_scatter_fused_add_rms_norm");
  add_kernel<TORCH_BOX(&qk_all_reduce_rms_norm)>(m, "qk_all_reduce_rms_norm");
  add_kernel<TORCH_BOX(&qk_all_reduce_rms_norm_out)>(m, "qk_all_reduce_rms_norm.out");
}

}  // namespace fused_ops
