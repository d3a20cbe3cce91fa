#include "row_op.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;

struct RmsNorm {
  static Pipeline make(T x, OptionalT weight, double eps, int64_t flags) {
    Pipeline p = pipeline_of(x);
    p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    return p;
  }
};

struct LayerNorm {
  static Pipeline make(T x, OptionalT weight, OptionalT bias, double eps) {
    Pipeline p = pipeline_of(x);
    p.norm = norm_of(p, Norm::kLayer, weight, bias, eps, 0);
    return p;
  }
};

struct FusedAddRmsNorm {
  static Pipeline make(T x, T residual, OptionalT weight, double eps, int64_t flags, double x_multiplier = 1.0) {
    Pipeline p = RmsNorm::make(x, weight, eps, flags);
    set_add(p, residual, x, x_multiplier);
    return p;
  }
};

struct FusedAddRmsNormPad {
  static Pipeline make(T x, T residual, OptionalT weight, double eps, int64_t flags, int64_t multiple) {
    Pipeline p = FusedAddRmsNorm::make(x, residual, weight, eps, flags);
    STD_TORCH_CHECK(multiple > 0 && multiple < int64_t{1} << 31, "multiple: expected at least 1");
    p.multiple = multiple;
    return p;
  }
};

struct RmsNormAdd {
  static Pipeline make(T x, T residual, OptionalT weight, double eps, int64_t flags) {
    Pipeline p = pipeline_of(x);
    p.post = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    p.other = rows_like(residual, "residual", x, p.cols, p.dtype);
    return p;
  }
};

struct RmsNormAddRmsNorm {
  static Pipeline make(T x, T residual, OptionalT post_weight, OptionalT weight, double post_eps, double eps,
                       int64_t flags) {
    Pipeline p = RmsNormAdd::make(x, residual, post_weight, post_eps, flags);
    p.norm = norm_of(p, Norm::kRms, weight, {}, eps, flags);
    return p;
  }
};

}  // namespace

void implement_norms(Library& m) {
  using XWeight = Inputs<T, OptionalT, double, int64_t>;
  using XResidualWeight = Inputs<T, T, OptionalT, double, int64_t>;
  implement<RowOp<RmsNorm, XWeight>>(m, "rms_norm");
  implement<RowOp<LayerNorm, Inputs<T, OptionalT, OptionalT, double>>>(m, "layer_norm");
  implement<RowOp<FusedAddRmsNorm, XResidualWeight, Inputs<double>, Residual::kAlso>>(m, "fused_add_rms_norm");
  implement_plain<
      RowOp<FusedAddRmsNormPad, Inputs<T, T, OptionalT, double, int64_t, int64_t>, Inputs<>, Residual::kAlso>>(
      m, "fused_add_rms_norm_pad");
  implement_plain<RowOp<RmsNormAdd, XResidualWeight, Inputs<>, Residual::kOnly>>(m, "rms_norm_add");
  implement<
      RowOp<RmsNormAddRmsNorm, Inputs<T, T, OptionalT, OptionalT, double, double, int64_t>, Inputs<>, Residual::kAlso>>(
      m, "rms_norm_add_rms_norm");
}

}  // namespace fused_ops
