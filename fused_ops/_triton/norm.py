"""Norms: transforms of a block of rows."""

import triton
import triton.language as tl

from .platform import round_to, row_sum, widen


@triton.jit
def load_vector(vector, column, within):
    return widen(tl.load(vector + column, mask=within, other=0.0))


@triton.jit
def mean_of(total, COLS: tl.constexpr):
    return tl.div_rn(total, COLS * 1.0)


@triton.jit
def rstd_of(squares, eps, COLS: tl.constexpr):
    """Of a row's sum of squares."""
    return tl.div_rn(1.0, tl.sqrt_rn(mean_of(squares, COLS) + eps))


@triton.jit
def rms_norm(x, weight, eps, column, within, valid, S: tl.constexpr, K: tl.constexpr):
    return scaled(x, rstd_of(row_sum(x * x), eps, K.cols), weight, column, within, valid, S, K)


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
    y = tl.where(valid, x - mean_of(row_sum(x), K.cols), 0.0)
    return scaled_and_moved(y, rstd_of(row_sum(y * y), eps, K.cols), weight, bias, column, within, valid, S)


@triton.jit
def scaled_and_moved(y, rstd, weight, bias, column, within, valid, S: tl.constexpr):
    y = y * rstd
    if weight is not None:
        y = y * load_vector(weight, column, within)
    if bias is not None:
        y = y + load_vector(bias, column, within)
    return tl.where(valid, round_to(y, S), 0.0)
