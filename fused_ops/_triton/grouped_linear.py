"""Products of rows with the weight of their expert. A program has a tile of an expert's rows and a tile of its weight.

Codes become bfloat16 when a tile is read, which holds every one of them exactly, times its scale where 16 or 32 columns
share one, and their products are added in float32. Two int8 stay what they are, added in int32. Scales of 32 to 512
columns multiply the sums of their columns, in ascending order, those of rows the result. So a row of y doesn't depend
on its place, as far as a product of matrices treats the rows of a tile alike.

Which rows are an expert's follows from tokens_per_expert, on the device. Its numbers may be anything: an expert whose
count is negative has no rows; one that would have more than there are gets what is left, all of it NaN, as does a row
that is made of a row of x which isn't there.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .platform import at, dot, from_bits, narrow, value_of, widen
from .quantize import decode, places_at, scale_pointers

AT_ONCE = tl.constexpr(256)  # experts that are counted


@dataclass(frozen=True)
class Operand:
    """What the codes of a tensor of rows mean."""

    format: str
    per_byte: int
    scale: str  # how one is stored: "float32", "e8m0", "e4m3"
    in_values: bool  # of so few columns that codes are multiplied with it
    high: int  # rows that share one; 0: all
    group: int  # columns that do; 0: all
    groups: int  # in a row
    layout: str  # "plain", "packed", "swizzled"


@dataclass(frozen=True)
class Product:
    """A kernel is compiled for it."""

    x: Operand
    w: Operand
    experts: int
    cols: int  # that are multiplied,
    chunk: int  # so many at a time,
    block: int  # and so many before float32 scales of groups; 0: there are none
    outs: int
    rows: int  # of a tile of x
    tile: int  # rows of a tile of the weight
    apart: bool  # each expert's rows have a part of their own
    warps: int

    @property
    def exact(self) -> bool:
        return self.x.format == self.w.format == "int8"


class Scales(NamedTuple):
    """Scales, or zero points, and their strides: of experts, and as `number`s of rows and of groups."""

    data: Any
    expert: int
    row: int
    column: int


@triton.jit
def tiles_of(count, K: tl.constexpr):
    return (count + K.rows - 1) // K.rows


@triton.jit
def rows_of_tile(tokens_per_expert, tile, most, K: tl.constexpr):
    """Of a tile: its expert (-1: none), the first of the rows of y that it may have, where they end, and whether all
    of the expert's rows exist. most: rows of y, or of each expert where these are apart.
    """
    if K.apart:
        each = tiles_of(most, K)
        expert = (tile // each).to(tl.int32)
        count = tl.load(tokens_per_expert + expert).to(tl.int64)
        begin = expert.to(tl.int64) * most
        return expert, begin + tile % each * K.rows, begin + tl.minimum(count, most), count <= most
    else:
        expert, first, end = tl.full((), -1, tl.int32), most * 0, most * 0
        known = most >= 0
        tiles, begin = most * 0, most * 0  # of the experts before
        for start in range(0, K.experts, AT_ONCE):
            i = start + tl.arange(0, AT_ONCE)
            count = tl.load(tokens_per_expert + i, mask=i < K.experts, other=0).to(tl.int64)
            count = tl.minimum(tl.maximum(count, 0), most + 1)
            ends = begin + tl.cumsum(count, axis=0)
            begins = tl.minimum(ends - count, most)
            own = tiles_of(tl.minimum(ends, most) - begins, K)
            last = tiles + tl.cumsum(own, axis=0)
            there = (tile >= last - own) & (tile < last)  # in one at most
            if tl.max(there.to(tl.int32), axis=0) != 0:
                expert = tl.max(tl.where(there, i, -1), axis=0)
                begins_here = tl.max(tl.where(there, begins, 0), axis=0)
                first = begins_here + (tile - tl.max(tl.where(there, last - own, 0), axis=0)) * K.rows
                end = tl.max(tl.where(there, tl.minimum(ends, most), 0), axis=0)
                known = tl.max((there & (ends > most)).to(tl.int32), axis=0) == 0
            tiles += tl.sum(own, axis=0)
            begin += tl.sum(count, axis=0)
        return expert, first, end, known


@triton.jit
def decode_e8m0(code):
    """2^(code - 127), NaN for 255."""
    code = code.to(tl.int32)
    value = from_bits(tl.where(code == 0, 0x400000, code << 23))
    return tl.where(code == 255, float("nan"), value)


@triton.jit
def load_scales(places, row, slot, exists, F: tl.constexpr):
    """float32 of the rows `row` [R] and groups `slot` [1, G], 0 where there are none."""
    held = tl.load(scale_pointers(places, row, slot, F), mask=exists, other=0)
    if F.layout == "packed" or F.scale == "e8m0":
        return tl.where(exists, decode_e8m0(held), 0.0)
    elif F.scale == "e4m3":
        return decode(held, "e4m3")
    else:
        return held


@triton.jit
def row_scales(places, row, exists, first, F: tl.constexpr):
    """[R] of the group in which the column `first` is, or of whole rows."""
    if F.high == 0:
        row = row * 0
    elif F.high > 1:
        row = row // F.high
    slot = tl.full((1, 1), 0, tl.int32)
    if F.group > 0:
        slot += first // F.group
    return tl.reshape(load_scales(places, row, slot, exists[:, None], F), (row.shape[0],))


@triton.jit
def decode_codes(held, F: tl.constexpr):
    """float32 [R, C] of codes in bytes."""
    if F.per_byte == 2:
        held = held.to(tl.int32)
        codes = tl.reshape(tl.join(held & 15, held >> 4), (held.shape[0], 2 * held.shape[1]))
        magnitude = from_bits((codes & 7) << 22) * 8.507059173023462e37  # 2^126
        return tl.where(codes > 7, -magnitude, magnitude)
    else:
        return decode(held, F.format)


@triton.jit
def load_codes(data, exists, first, F: tl.constexpr, K: tl.constexpr):
    """Bytes of K.chunk columns from `first` on, of the rows that begin at `data` [R]."""
    column = first // F.per_byte + tl.arange(0, K.chunk // F.per_byte)[None, :]
    return tl.load(data[:, None] + column, mask=exists[:, None] & (column < K.cols // F.per_byte), other=0)


@triton.jit
def load_values(data, places, zeros, row, exists, first, F: tl.constexpr, K: tl.constexpr):
    """bfloat16 [R, K.chunk] from the column `first` on, zeros where there are no rows or columns."""
    x = decode_codes(load_codes(data, exists, first, F, K), F)
    if zeros is not None:
        zero = row_scales(zeros, row, exists, first, F).to(tl.float32)
        x = tl.where(exists[:, None] & (first + tl.arange(0, K.chunk)[None, :] < K.cols), x - zero[:, None], 0.0)
    if F.in_values:
        slot = first // F.group + tl.arange(0, K.chunk // F.group)[None, :]
        scale = load_scales(places, row, slot, exists[:, None] & (slot < F.groups), F)
        wide = tl.broadcast_to(scale[:, :, None], (x.shape[0], K.chunk // F.group, F.group))
        x *= tl.reshape(wide, x.shape)
    return narrow(x, tl.bfloat16)


@triton.jit
def places_of(scales, expert, F: tl.constexpr):
    data = scales.data + expert * scales.expert
    return places_at(data, value_of(scales.row), value_of(scales.column), F)


@triton.jit
def add_products(total, weights, x, w, x_scale, w_scale, zeros, source, exists, result, inside, first, K: tl.constexpr):
    """The products of K.chunk columns, and of two int8 with zero points, the sums of the weight's codes, [K.tile]."""
    if K.exact:
        a = load_codes(x, exists, first, K.x, K).to(tl.int8, bitcast=True)
        b = load_codes(w, inside, first, K.w, K).to(tl.int8, bitcast=True)
        if zeros is not None:
            weights += tl.sum(b.to(tl.int32), axis=1)
        return tl.dot(a, tl.trans(b), total), weights
    else:
        a = load_values(x, x_scale, zeros, source, exists, first, K.x, K)
        b = load_values(w, w_scale, None, result, inside, first, K.w, K)
        return dot(a, tl.trans(b), total), weights


@triton.jit
def minus_zeros(total, weights, zeros, source, exists, first, K: tl.constexpr):
    """float32, or int32, of sum(x w) - zero sum(w)."""
    if K.exact and zeros is not None:
        zero = row_scales(zeros, source, exists, first, K.x)
        total -= zero[:, None] * weights[None, :]
    return total


@triton.jit
def with_row_scales(
    total, x_places, w_places, x_scale2, w_scale2, expert, source, exists, result, inside, K: tl.constexpr
):
    """float32. Two int8's exact sums are rounded once, as the CPU rounds them."""
    a, b = tl.full((K.rows,), 1.0, tl.float32), tl.full((K.tile,), 1.0, tl.float32)
    if K.x.group == 0:
        a = row_scales(x_places, source, exists, 0, K.x)
    if K.w.group == 0:
        b = row_scales(w_places, result, inside, 0, K.w)
    if x_scale2 is not None:
        a *= tl.load(x_scale2)
    if w_scale2 is not None:
        b *= tl.load(w_scale2.data + expert * w_scale2.strides[0])
    if K.exact and K.block == 0:
        factor = a.to(tl.float64)[:, None] * b.to(tl.float64)[None, :]
        return (total.to(tl.float64) * factor).to(tl.float32)
    else:
        return total * a[:, None] * b[None, :]


@triton.jit(do_not_specialize=["x_rows", "most"])
def grouped_kernel(
    x, x_sizes, x_scale, x_zero, x_scale2, x_rows: tl.int64, weight, w_scale, w_scale2, bias, tokens_per_expert, rows,
    y, y_sizes, most: tl.int64, K: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if K.exact else tl.float32
    expert, first_row, end, known = rows_of_tile(tokens_per_expert, tl.program_id(0).to(tl.int64), most, K)
    if (expert < 0) | (first_row >= end):
        return
    row = first_row + tl.arange(0, K.rows)
    active, source = row < end, row
    if rows is not None:
        source = tl.load(rows + row, mask=active, other=0).to(tl.int64)
    exists = active & (source >= 0) & (source < x_rows)
    source = tl.where(exists, source, 0)
    result = tl.program_id(1).to(tl.int64) * K.tile + tl.arange(0, K.tile)
    inside = result < K.outs
    expert = expert.to(tl.int64)
    data = at(x, x_sizes, source)
    codes = weight.data + (expert * weight.strides[0] + result * weight.strides[1])
    x_places = places_of(x_scale, 0, K.x)
    w_places = places_of(w_scale, expert, K.w)
    zeros = x_zero
    if x_zero is not None:
        zeros = places_of(x_zero, 0, K.x)

    none = tl.zeros((K.tile,), tl.int32)
    total, sums = tl.zeros((K.rows, K.tile), SUM), none
    if K.block == 0:
        for first in range(0, K.cols, K.chunk):
            total, sums = add_products(
                total, sums, data, codes, x_places, w_places, zeros, source, exists, result, inside, first, K
            )  # fmt: skip
        total = minus_zeros(total, sums, zeros, source, exists, 0, K)
    else:
        all = tl.zeros((K.rows, K.tile), tl.float32)
        for begin in range(0, K.cols, K.block):
            total, sums = tl.zeros((K.rows, K.tile), SUM), none
            for first in range(0, K.block, K.chunk):
                total, sums = add_products(
                    total, sums, data, codes, x_places, w_places, zeros, source, exists, result, inside, begin + first,
                    K,
                )  # fmt: skip
            part = minus_zeros(total, sums, zeros, source, exists, begin, K).to(tl.float32)
            if not K.x.in_values and K.x.group > 0:
                part *= row_scales(x_places, source, exists, begin, K.x)[:, None]
            if not K.w.in_values and K.w.group > 0:
                part *= row_scales(w_places, result, inside, begin, K.w)[None, :]
            all += part
        total = all
    total = with_row_scales(total, x_places, w_places, x_scale2, w_scale2, expert, source, exists, result, inside, K)
    if bias is not None:
        total += widen(tl.load(bias.data + expert * bias.strides[0] + result, mask=inside, other=0.0))[None, :]
    total = tl.where((exists & known)[:, None], total, float("nan"))
    pointer = at(y, y_sizes, row)[:, None] + result[None, :]
    tl.store(pointer, narrow(total, pointer.dtype.element_ty), mask=active[:, None] & inside[None, :])
