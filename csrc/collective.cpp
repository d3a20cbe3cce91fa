#include "collective.h"
#include "row_op.h"
namespace fused_ops {
namespace {
thread_local Collective current;
thread_local Tensor held;
}
bool collective_now(Pipeline& p) {
  if (!current.workspace) return false;
  Collective c = current;
  current.workspace = nullptr;
  run_on_cuda(p, c);
  return true;
}
namespace {
using T = const Tensor&;
using OptionalT = const OptionalTensor&;
void set(const Pipeline& p, T workspace, int64_t rank) { held = workspace; current = {&held, rank, false, p.rows}; }
struct AllReduce {
  static Pipeline make(T x, T workspace, int64_t rank, std::string group) {
    Pipeline p = pipeline_of(x);
    set(p, workspace, rank);
    return p;
  }
};
struct AllReduceRmsNorm {
  static Pipeline make(T x, OptionalT weight, double eps, int64_t flags, T workspace, int64_t rank, std::string group) {
    Pipeline p = pipeline_of(x);
    p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    set(p, workspace, rank);
    return p;
  }
};
struct AllReduceFusedAddRmsNorm {
  static Pipeline make(T x, T residual, OptionalT weight, double eps, int64_t flags, T workspace, int64_t rank, std::string group, double x_multiplier = 1.0) {
    Pipeline p = AllReduceRmsNorm::make(x, weight, eps, flags, workspace, rank, group);
    p.load = Pipeline::kAdd;
    p.other = rows_like(residual, "residual", x, p.cols, p.dtype);
    p.x_multiplier = static_cast<float>(x_multiplier);
    return p;
  }
};
}
void implement_collectives(Library& m) {
  implement_plain<RowOp<AllReduce, Inputs<T, T, int64_t, std::string>>>(m, "all_reduce");
  implement<RowOp<AllReduceRmsNorm, Inputs<T, OptionalT, double, int64_t, T, int64_t, std::string>>>(m, "all_reduce_rms_norm");
  implement<RowOp<AllReduceFusedAddRmsNorm, Inputs<T, T, OptionalT, double, int64_t, T, int64_t, std::string>, Inputs<double>, Residual::kAlso>>(m, "all_reduce_fused_add_rms_norm");
}
}
