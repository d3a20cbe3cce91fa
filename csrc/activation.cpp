#include "row_op.h"

namespace fused_ops {
namespace {

using T = const Tensor&;
using OptionalT = const OptionalTensor&;

template <Pipeline::Load LOAD>
struct Gated {
  static Pipeline make(T gate, T up, bool round_activation, OptionalT tokens_per_expert = {}) {
    Pipeline p = pipeline_of(gate);
    p.load = LOAD;
    p.other = rows_like(up, "up", gate, p.cols, p.dtype);
    p.round_activation = round_activation;
    set_experts(p, gate, tokens_per_expert);
    return p;
  }
};

struct SwigluOai {
  static Pipeline make(T gate, OptionalT up, double alpha, double limit, bool round_activation,
                       OptionalT tokens_per_expert = {}) {
    Pipeline p = Gated<Pipeline::kSwigluOai>::make(gate, up ? *up : gate, round_activation, tokens_per_expert);
    if (!up) {
      STD_TORCH_CHECK(p.cols % 2 == 0, "gate: expected an even number of columns without up");
      p.cols /= 2;
      p.other = Rows();
    }
    STD_TORCH_CHECK(limit >= 0 && is_finite(alpha), "limit, alpha: expected at least 0, and a finite float32");
    p.alpha = static_cast<float>(alpha);
    p.limit = static_cast<float>(limit);
    return p;
  }
};

struct Relu2 {
  static Pipeline make(T x, OptionalT tokens_per_expert = {}) {
    Pipeline p = pipeline_of(x);
    p.load = Pipeline::kRelu2;
    set_experts(p, x, tokens_per_expert);
    return p;
  }
};

}  // namespace

void implement_activations(Library& m) {
  using GateUp = Inputs<T, T, bool>;
  using Experts = Inputs<OptionalT>;
  implement<RowOp<Gated<Pipeline::kSilu>, GateUp, Experts>>(m, "silu_mul");
  implement<RowOp<Gated<Pipeline::kGeluTanh>, GateUp, Experts>>(m, "gelu_tanh_mul");
  implement<RowOp<SwigluOai, Inputs<T, OptionalT, double, double, bool>, Experts>>(m, "swiglu_oai_mul");
  implement<RowOp<Relu2, Inputs<T>, Experts>>(m, "relu2");
}

}  // namespace fused_ops
