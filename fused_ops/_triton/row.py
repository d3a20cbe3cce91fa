"""The kernel of a row operation: load -> transform -> store, over a block of whole rows in registers.

It is compiled for its choice of stages (`Stages`, and which tensors are None). Values between stages are float32 that
have been rounded to S, the dtype of the rows, where the unfused operations would store a tensor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .activation import gated, load_pairs, relu2
from .norm import layer_norm, rms_norm
from .platform import MAGNITUDE, at, bits, load_rows, round_to, store_rows
from .quantize import PLACES, Codes, columns, places_at, quantize


class Rows(NamedTuple):
    """The rows of a tensor: its first element, and the strides of the leading dimensions, in elements."""

    data: object
    strides: tuple


@dataclass(frozen=True)
class Stages:
    cols: int
    y_cols: int  # with padding
    block: int  # places of a row, or of a part of it, a power of two
    group: int  # columns that share a scale,
    width: int  # and the places they take
    rows: int  # of a block
    load: str  # "copy", "add", "silu", "gelu_tanh", "swiglu_oai", "relu2"
    round_activation: bool
    post: bool  # a norm before the residual is added
    norm: str  # "", "rms", "layer"
    round_before_weight: bool
    weight_plus_one: bool
    codes: Codes | None


@triton.jit
def load(x, other, sizes, row, active, begin, column, valid, alpha, limit, S: tl.constexpr, K: tl.constexpr):
    if K.load == "swiglu_oai" and other is None:
        if K.width == K.group:
            g, u = load_pairs(x, sizes, row, active, begin, K)
        else:  # columns aren't at neighbouring places
            g = load_rows(x, sizes, row, 2 * column, valid)
            u = load_rows(x, sizes, row, 2 * column + 1, valid)
        return gated(g, u, alpha, limit, S, K)
    else:
        held = load_rows(x, sizes, row, column, valid)
        if K.load == "relu2":
            return relu2(held, S)
        elif K.load == "copy" or K.load == "add":
            return held
        else:
            return gated(held, load_rows(other, sizes, row, column, valid), alpha, limit, S, K)


@triton.jit
def store_zeros(y, sizes, row, active, K: tl.constexpr):
    """In the columns behind a row."""
    for first in range(K.cols, K.y_cols, K.block):
        padding = first + tl.arange(0, K.block).to(tl.int64)[None, :]
        tl.store(at(y, sizes, row)[:, None] + padding, 0.0, mask=active[:, None] & (padding < K.y_cols))


@triton.jit
def join_amax(tensor_amax, x):
    magnitudes = tl.max(bits(x) & MAGNITUDE, axis=1)
    tl.atomic_max(tensor_amax, tl.max(magnitudes, axis=0))


@triton.jit
def work(
    held,
    rows,
    sizes,
    row,
    active,
    column,
    within,
    other,
    x_multiplier,
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
    tensor_amax,
    S: tl.constexpr,
    K: tl.constexpr,
):
    """All stages after the load."""
    valid = active[:, None] & within
    if x_multiplier is not None:
        held = round_to(held * x_multiplier, S)
    if K.post:
        held = rms_norm(held, post_weight, post_eps, column, within, valid, S, K)
    if K.post or K.load == "add":
        held = round_to(held + load_rows(other, sizes, row, column, valid), S)
        if residual is not None:
            store_rows(residual, sizes, row, column, valid, held)
    if K.norm == "rms":
        held = rms_norm(held, weight, eps, column, within, valid, S, K)
    elif K.norm == "layer":
        held = layer_norm(held, weight, bias, eps, column, within, valid, S, K)
    if y is not None:
        store_rows(y, sizes, row, column, valid, held)
        store_zeros(y, sizes, row, active, K)
    if K.codes is not None:
        if data is not None:
            data = at(data, sizes, row)
        quantize(held, rows, row, active, data, given, given_zero, scale, zero_point, tensor_amax, K)
    elif tensor_amax is not None:
        join_amax(tensor_amax, held)


@triton.jit
def rows_here(rows, tokens_per_expert, rows_per_expert, K: tl.constexpr):
    """The rows [R] of this program, and which of them there are, or are used by an expert."""
    row = tl.program_id(0).to(tl.int64) * K.rows + tl.arange(0, K.rows)
    active = row < rows
    if tokens_per_expert is not None:
        tokens = tl.load(tokens_per_expert + row // rows_per_expert, mask=active, other=0)
        active = active & (row % rows_per_expert < tokens)
    return row, active


@triton.jit(do_not_specialize=["rows", "rows_per_expert", *PLACES])
def row_kernel(
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
    scales, zero_points = scale, zero_point
    if scale is not None:
        scales = places_at(scale, scale_row, scale_column, K.codes)
    if zero_point is not None:
        zero_points = places_at(zero_point, zero_row, zero_column, K.codes)
    row, active = rows_here(rows, tokens_per_expert, rows_per_expert, K)
    column, within = columns(K, 1)
    valid = active[:, None] & within
    held = load(x, other, sizes, row, active, 0, column, valid, alpha, limit, S, K)
    work(
        held,
        rows,
        sizes,
        row,
        active,
        column,
        within,
        other,
        x_multiplier,
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
        scales,
        zero_points,
        tensor_amax,
        S,
        K,
    )
