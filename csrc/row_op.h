// The overloads of a row operation, from one function that turns its arguments into a Pipeline.
//
//   struct SiluMul {
//     static Pipeline make(const Tensor& gate, const Tensor& up, bool round_activation, const OptionalTensor& = {});
//   };
//   using SiluMulOp = RowOp<SiluMul, Inputs<const Tensor&, const Tensor&, bool>, Inputs<const OptionalTensor&>>;
//   implement<SiluMulOp>(m, "silu_mul");      // silu_mul, silu_mul.out, silu_mul_quant, silu_mul_quant.out
//
// Required are the inputs of the functional overload; Optional are those that the out overload has besides. The order
// of arguments is the one of the schemas that fused_ops/_op.py and fused_ops/quantize.py make.
#pragma once

#include <string>

#include "kernel.h"
#include "row.h"

namespace fused_ops {

template <class... T>
struct Inputs {};

// What results are shaped as: x, or its first rows where there are fewer results.
inline Tensor result_like(const Tensor& x, const Pipeline& p) {
  if (p.rows == p.x.count) return x;
  Tensor whole = x;
  return torch::stable::narrow(whole, 0, 0, p.rows);
}

// What an operation returns besides its rows: nothing, or the new residual, or nothing but that.
enum class Residual { kNone, kAlso, kOnly };

template <class Make, class Required, class Optional = Inputs<>, Residual RESIDUAL = Residual::kNone>
struct RowOp;

template <class Make, class First, class... R, class... O, Residual RESIDUAL>
struct RowOp<Make, Inputs<First, R...>, Inputs<O...>, RESIDUAL> {
  static constexpr bool kAlso = RESIDUAL == Residual::kAlso;

  static auto functional(First x, R... r) {
    Pipeline p = Make::make(x, r...);
    const Tensor like = result_like(x, p);
    Tensor y = empty_rows(like, padded_cols(p), p.dtype, RESIDUAL == Residual::kOnly ? p.sum : p.y);
    if constexpr (kAlso) {
      Tensor sum = empty_rows(like, p.cols, p.dtype, p.sum);
      run(p);
      return std::tuple(std::move(y), std::move(sum));
    } else {
      run(p);
      return y;
    }
  }

  static auto quantized(First x, R... r, int64_t key, const OptionalTensor& given) {
    Pipeline p = Make::make(x, r...);
    set_key(p, key, given, {});
    const Tensor like = result_like(x, p);
    auto [data, scale] = new_quantized(p, like);
    if constexpr (kAlso) {
      Tensor sum = empty_rows(like, p.cols, p.dtype, p.sum);
      run(p);
      return std::tuple(std::move(data), std::move(scale), std::move(sum));
    } else {
      run(p);
      return std::tuple(std::move(data), std::move(scale));
    }
  }

  // The out overloads, which differ in whether they have a residual.
  struct Plain {
    static void out(First x, R... r, O... o, const OptionalTensor& y) {
      Pipeline p = Make::make(x, r..., o...);
      const Tensor like = result_like(x, p);
      if (y && RESIDUAL == Residual::kOnly) p.sum = rows_like(*y, "residual_out", like, p.cols, p.dtype);
      if (y && RESIDUAL == Residual::kNone) p.y = rows_like(*y, "y_out", like, padded_cols(p), p.dtype);
      finish(p);
    }
    static void quantized_out(First x, R... r, int64_t key, const OptionalTensor& given, const OptionalTensor& zero,
                              O... o, const OptionalTensor& data, const OptionalTensor& scale,
                              const OptionalTensor& zero_out, const OptionalTensor& unquantized) {
      Pipeline p = Make::make(x, r..., o...);
      set_key(p, key, given, zero);
      set_quantized(p, result_like(x, p), data, scale, zero_out, unquantized);
      finish(p);
    }
  };
  struct WithResidual {
    static void out(First x, R... r, O... o, const OptionalTensor& y, const OptionalTensor& residual) {
      Pipeline p = Make::make(x, r..., o...);
      const Tensor like = result_like(x, p);
      if (y) p.y = rows_like(*y, "y_out", like, padded_cols(p), p.dtype);
      if (residual) p.sum = rows_like(*residual, "residual_out", like, p.cols, p.dtype);
      finish(p);
    }
    static void quantized_out(First x, R... r, int64_t key, const OptionalTensor& given, const OptionalTensor& zero,
                              O... o, const OptionalTensor& data, const OptionalTensor& scale,
                              const OptionalTensor& residual, const OptionalTensor& zero_out,
                              const OptionalTensor& unquantized) {
      Pipeline p = Make::make(x, r..., o...);
      set_key(p, key, given, zero);
      const Tensor like = result_like(x, p);
      set_quantized(p, like, data, scale, zero_out, unquantized);
      if (residual) p.sum = rows_like(*residual, "residual_out", like, p.cols, p.dtype);
      finish(p);
    }
  };
  using Out = std::conditional_t<kAlso, WithResidual, Plain>;

 private:
  static int64_t padded_cols(const Pipeline& p) { return round_up(p.cols, p.multiple); }

  static void finish(Pipeline& p) {
    check_memory(p);
    run(p);
  }
};

template <class Op>
void implement_plain(Library& m, const std::string& name) {
  add_kernel<TORCH_BOX(&Op::functional)>(m, name);
  add_kernel<TORCH_BOX(&Op::Out::out)>(m, name + ".out");
}

template <class Op>
void implement_quantized(Library& m, const std::string& name) {
  add_kernel<TORCH_BOX(&Op::quantized)>(m, name);
  add_kernel<TORCH_BOX(&Op::Out::quantized_out)>(m, name + ".out");
}

template <class Op>
void implement(Library& m, const std::string& name) {
  implement_plain<Op>(m, name);
  implement_quantized<Op>(m, name + "_quant");
}

// Each family's operations: the same functions serve every device.
void implement_norms(Library& m);
void implement_dual_norm(Library& m);
void implement_activations(Library& m);
void implement_quantize(Library& m);
void implement_rope(Library& m);
void implement_collectives(Library& m);
void implement_gathers(Library& m);

// All of them, for a dispatch key: CPU when the library is loaded, CUDA where it is asked for.
void implement_rows(const char* dispatch_key);

}  // namespace fused_ops
