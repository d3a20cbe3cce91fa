"""The kernel of rows that are longer than a block's registers hold: the stages of `row.py`, a part of a row at a time.

What a stage needs of the whole row, a sum or a largest magnitude, is made by a loop of its own. The next loop reads the
parts again: from where they have been stored, or else from the inputs, which nothing has overwritten then. A sum is
that of the parts' sums, in order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .norm import mean_of, rstd_of, scaled, scaled_and_moved
from .platform import at, load_rows, round_to, row_sum, store_rows
from .quantize import PLACES, columns, highest, part_of, places_at, quantize
from .row import Rows, join_amax, load, rows_here, store_zeros


class Source(NamedTuple):
    """What rows are made of."""

    x: Rows
    other: Any
    sizes: tuple
    row: Any
    active: Any
    x_multiplier: Any
    alpha: Any
    limit: Any
    post_weight: Any
    post_eps: Any


@triton.jit
def places_of(s, begin, K: tl.constexpr):
    """The columns of the part that begins there, which of them rows have, and which of those of active rows."""
    column, within = columns(K, 1, begin)
    return column, within, s.active[:, None] & within


@triton.jit
def loaded(s, begin, S: tl.constexpr, K: tl.constexpr):
    column, _, valid = places_of(s, begin, K)
    held = load(s.x, s.other, s.sizes, s.row, s.active, begin, column, valid, s.alpha, s.limit, S, K)
    return held if s.x_multiplier is None else round_to(held * s.x_multiplier, S)


@triton.jit
def rstd_before(s, S: tl.constexpr, K: tl.constexpr):
    """Of the norm before the residual is added."""
    squares = tl.zeros((K.rows, 1), tl.float32)
    if K.post:
        for begin in range(0, K.cols, part_of(K)):
            held = loaded(s, begin, S, K)
            squares += row_sum(held * held)
        squares = rstd_of(squares, s.post_eps, K.cols)
    return squares


@triton.jit
def added(s, post_rstd, begin, S: tl.constexpr, K: tl.constexpr):
    """What the norm reads."""
    held = loaded(s, begin, S, K)
    column, within, valid = places_of(s, begin, K)
    if K.post:
        held = scaled(held, post_rstd, s.post_weight, column, within, valid, S, K)
    if K.post or K.load == "add":
        held = round_to(held + load_rows(s.other, s.sizes, s.row, column, valid), S)
    return held


@triton.jit
def added_before(s, residual, post_rstd, begin, S: tl.constexpr, K: tl.constexpr):
    """The same again."""
    if residual is not None:
        column, _, valid = places_of(s, begin, K)
        return load_rows(residual, s.sizes, s.row, column, valid)
    else:
        return added(s, post_rstd, begin, S, K)


@triton.jit
def moments(s, residual, post_rstd, eps, S: tl.constexpr, K: tl.constexpr):
    """The mean that a norm subtracts and the factor that it has; the residual is stored on the way."""
    total = tl.zeros((K.rows, 1), tl.float32)
    mean, rstd = total, total
    if K.norm != "" or residual is not None:
        for begin in range(0, K.cols, part_of(K)):
            held = added(s, post_rstd, begin, S, K)
            if residual is not None:
                column, _, valid = places_of(s, begin, K)
                store_rows(residual, s.sizes, s.row, column, valid, held)
            total += row_sum(held if K.norm == "layer" else held * held)
        tl.debug_barrier()  # threads read what others have stored
    if K.norm == "rms":
        rstd = rstd_of(total, eps, K.cols)
    elif K.norm == "layer":
        mean = mean_of(total, K.cols)
        squares = tl.zeros((K.rows, 1), tl.float32)
        for begin in range(0, K.cols, part_of(K)):
            centred = added_before(s, residual, post_rstd, begin, S, K) - mean
            _, _, valid = places_of(s, begin, K)
            centred = tl.where(valid, centred, 0.0)
            squares += row_sum(centred * centred)
        rstd = rstd_of(squares, eps, K.cols)
    return mean, rstd


@triton.jit
def normed(s, residual, post_rstd, mean, rstd, weight, bias, begin, S: tl.constexpr, K: tl.constexpr):
    held = added_before(s, residual, post_rstd, begin, S, K)
    column, within, valid = places_of(s, begin, K)
    if K.norm == "rms":
        return scaled(held, rstd, weight, column, within, valid, S, K)
    elif K.norm == "layer":
        return scaled_and_moved(tl.where(valid, held - mean, 0.0), rstd, weight, bias, column, within, valid, S)
    else:
        return held


@triton.jit(do_not_specialize=["rows", "rows_per_expert", *PLACES])
def long_row_kernel(
    rows,
    sizes,
    x,
    other,
    x_multiplier,
    alpha,
    limit,
    tokens_per_expert,
    rows_per_expert,
    post_weight,
    post_eps,
    weight,
    bias,
    eps,
    residual,
    y,
    data,
    given,
    given_zero,
    scale,
    zero_point,
    scale_row: tl.int64,
    scale_column: tl.int64,
    zero_row: tl.int64,
    zero_column: tl.int64,
    tensor_amax,
    K: tl.constexpr,
):
    S: tl.constexpr = x.data.dtype.element_ty
    C: tl.constexpr = K.codes
    # A scale for all of a row: codes are made when all parts have been seen.
    LATER: tl.constexpr = C is not None and not C.per_tensor and C.groups == 1
    scales, zero_points = scale, zero_point
    if scale is not None:
        scales = places_at(scale, scale_row, scale_column, C)
    if zero_point is not None:
        zero_points = places_at(zero_point, zero_row, zero_column, C)
    row, active = rows_here(rows, tokens_per_expert, rows_per_expert, K)
    codes = data
    if data is not None:
        codes = at(data, sizes, row)

    s = Source(x, other, sizes, row, active, x_multiplier, alpha, limit, post_weight, post_eps)
    post_rstd = rstd_before(s, S, K)
    mean, rstd = moments(s, residual, post_rstd, eps, S, K)
    high = tl.zeros((K.rows, 1), tl.int32)
    low = high
    for begin in range(0, K.cols, part_of(K)):
        held = normed(s, residual, post_rstd, mean, rstd, weight, bias, begin, S, K)
        if y is not None:
            column, _, valid = places_of(s, begin, K)
            store_rows(y, sizes, row, column, valid, held)
        if LATER:
            part_high, part_low = highest(held, K)
            high, low = tl.maximum(high, part_high), tl.maximum(low, part_low)
        elif C is not None:
            first = begin // C.group
            quantize(
                held, rows, row, active, codes, given, given_zero, scales, zero_points, tensor_amax, K, first, begin
            )  # fmt: skip
        elif tensor_amax is not None:
            join_amax(tensor_amax, held)
    if y is not None:
        store_zeros(y, sizes, row, active, K)
    if LATER:
        tl.debug_barrier()
        for begin in range(0, K.cols, part_of(K)):
            if y is not None:
                column, _, valid = places_of(s, begin, K)
                held = load_rows(y, sizes, row, column, valid)
            else:
                held = normed(s, residual, post_rstd, mean, rstd, weight, bias, begin, S, K)
            quantize(
                held, rows, row, active, codes, given, given_zero, scales, zero_points, tensor_amax, K, 0, begin, high,
                low,
            )  # fmt: skip
