"""Norms: transforms of a block of rows."""

import triton
import triton.language as tl

from .platform import round_to, row_sum, widen


@triton.jit
def load_vector(vector, column, within):
    return widen(tl.load(vector + column, mask=within, other=0.0))


@triton.jit
def mean_of(x, COLS: tl.constexpr):
    return tl.div_rn(row_sum(x), COLS * 1.0)


@triton.jit
def rstd_of(x, eps, COLS: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(mean_of(x * x, COLS) + eps))


@triton.jit
def rms_norm(x, weight, eps, column, within, valid, S: tl.constexpr, K: tl.constexpr):
    return scaled(x, rstd_of(x, eps, K.cols), weight, column, within, valid, S, K)


@triton.jit
def scaled(x, rstd, weight, column, within, valid, S: tl.constexpr, K: tl.constexpr):
    """y = round_S(x * rstd * w), or round_S(round_S(x * rstd) * w)."""
    y = x * rstd
    if weight is not None:
        if K.round_before_weight:
            y = round_to(y, S)
        w = load_vector(weight, column, within)
        if K.weight_plus_one:
            w = w + 1.0
        y = y * w
    return tl.where(valid, round_to(y, S), 0.0)


@triton.jit
def layer_norm(x, weight, bias, eps, column, within, valid, S: tl.constexpr, K: tl.constexpr):
    """y = round_S((x - mean) * rstd * w + b), the variance being about the mean."""
    y = tl.where(valid, x - mean_of(x, K.cols), 0.0)
    y = y * rstd_of(y, eps, K.cols)
    if weight is not None:
        y = y * load_vector(weight, column, within)
    if bias is not None:
        y = y + load_vector(bias, column, within)
    return tl.where(valid, round_to(y, S), 0.0)
