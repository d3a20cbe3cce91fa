"""Quantizers: stores of a block of rows as codes and scales. Numerics are those of csrc/quantize.h."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quant import QuantKey, ScaleLayout
from quant.formats import MAX, SMALLEST_SCALE
from quant.key import E8M0, FP4, FP8, FP8_FNUZ

from .platform import INFINITY, INTERPRETED, MAGNITUDE, bits, from_bits, is_nan

FORMATS = {FP8: "e4m3", FP8_FNUZ: "e4m3fnuz", torch.int8: "int8", FP4: "e2m1"}
SCALES = {E8M0: "e8m0", FP8: "e4m3"}  # stored so; others as float32
LAYOUTS = {ScaleLayout.PACKED_UE8M0: "packed", ScaleLayout.SWIZZLED_128X4: "swizzled"}


@dataclass(frozen=True)
class Codes:
    """A key, for rows of so many columns; a kernel is compiled for it."""

    format: str
    limit: float  # what the largest magnitude is scaled to
    least: float  # the smallest float32 scale
    per_byte: int
    scale: str  # "float32", "power_of_two", "e8m0", "e4m3"
    static: bool
    per_tensor: bool
    asymmetric: bool
    group: int  # columns that share a scale
    groups: int
    layout: str  # "plain", or where groups come in fours: "packed", "swizzled"


@lru_cache(4096)
def codes_of(code: int, cols: int) -> Codes:
    key = QuantKey.from_code(code)
    scale, layout = key.scale, key.scale.layout
    rounded = "power_of_two" if scale.power_of_two else "float32"
    return Codes(
        FORMATS[key.dtype],
        MAX[key.dtype],
        SMALLEST_SCALE.get(key.dtype, 0.0),
        key.packing,
        SCALES.get(scale.dtype, rounded),
        scale.static,
        key.per_tensor,
        not key.symmetric,
        min(key.group_size(cols), cols),
        key.groups(cols),
        LAYOUTS.get(layout, "plain"),
    )


class Places(NamedTuple):
    """Where scales, or zero points, lie: that of row r and group 4i + j at `data + r * row + i * four + j * one`.

    With the swizzled layout `row` is the bytes of a row, and 128 rows make a tile.
    """

    data: object
    row: int
    four: int
    one: int


# Strides of scales and zero points: arguments of kernels, which don't come in tuples, since Triton compiles for
# integers there, and a column's stride may be the number of tokens.
PLACES = ["scale_row", "scale_column", "zero_row", "zero_column"]


@triton.jit
def places_at(data, row, column, C: tl.constexpr):
    """`Places` of scales that begin at `data`, of which two strides say all where the layout doesn't."""
    if C.layout == "swizzled":
        return Places(data, (C.groups + 3) // 4 * 4, 512, 1)
    elif C.layout == "packed":
        return Places(data, 4, 4 * column, 1)
    else:
        return Places(data, row, 0, column)


# --- codes: int32, of which the low byte counts ---


@triton.constexpr_function
def casts_to_e4m3():
    """Whether the target has the cast: saturating, to nearest even, with 0x7f for NaN."""
    return not INTERPRETED.value and tl.target_info.cuda_capability_geq(8, 9)


@triton.jit
def magnitude_code(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """The code of x >= 0 in a format whose smallest normal exponent is SMALLEST, biased as in float32.

    Adding a float whose last place is the format's step rounds x to nearest even, subnormals included.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    exponent = tl.maximum(bits(x) & INFINITY, SMALLEST << 23)
    step = exponent + (SHIFT << 23)
    return bits(x + from_bits(step)) - step + (exponent >> SHIFT) - (SMALLEST << MANTISSA)


@triton.jit
def saturated(x, LIMIT: tl.constexpr):
    """|x|, at most LIMIT, which is what NaN becomes too."""
    magnitude = from_bits(bits(x) & MAGNITUDE)
    return tl.where(magnitude < LIMIT, magnitude, LIMIT)


@triton.jit
def encode_e4m3(x):
    if casts_to_e4m3():
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        code = magnitude_code(saturated(x, 448.0), 3, 121) | ((bits(x) >> 24) & 0x80)
        return tl.where(is_nan(x), 0x7F, code)


@triton.jit
def decode_e4m3(code):
    """The value of a code that isn't negative or NaN, by way of subnormal float32s."""
    return from_bits(code << 20) * 1.329227995784916e36  # 2^120


@triton.jit
def encode_e4m3fnuz(x):
    """There is no negative zero, whose code is NaN's."""
    code = magnitude_code(saturated(x, 224.0), 3, 120)
    code = tl.where(code > 0, code | ((bits(x) >> 24) & 0x80), 0)
    return tl.where(is_nan(x), 0x80, code)


@triton.jit
def encode_e2m1(x):
    code = magnitude_code(saturated(x, 6.0), 1, 127) | ((bits(x) >> 28) & 8)
    return tl.where(is_nan(x), 0, code)


@triton.jit
def encode_int8(x):
    """Adding 1.5 * 2^23 rounds to an integer in the low bits; those of huge values are beyond any code's."""
    ZERO: tl.constexpr = 0x4B400000
    code = tl.minimum(tl.maximum(bits(x + 12582912.0), ZERO - 128), ZERO + 127)
    return tl.where(is_nan(x), 0, code)


@triton.jit
def round_even(x):
    """The nearest integer: adding 2^23 of x's sign leaves no room for a fraction."""
    step = from_bits((bits(x) & ~MAGNITUDE) | 0x4B000000)
    return tl.where((bits(x) & MAGNITUDE) < 0x4B000000, (x + step) - step, x)


@triton.jit
def encode(x, zero_point, C: tl.constexpr):
    if C.asymmetric:
        return encode_int8(round_even(x) + zero_point)
    elif C.format == "int8":
        return encode_int8(x)
    elif C.format == "e2m1":
        return encode_e2m1(x)
    elif C.format == "e4m3fnuz":
        return encode_e4m3fnuz(x)
    else:
        return encode_e4m3(x)


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """float32 of codes that a cache holds, in bytes: exact, and so in every 16-bit float."""
    if FORMAT == "int8":
        return code.to(tl.int8, bitcast=True).to(tl.float32)
    elif FORMAT == "e4m3" and casts_to_e4m3():
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = code.to(tl.int32)
        magnitude = decode_e4m3(code & 0x7F)
        if FORMAT == "e4m3fnuz":
            nan = code == 0x80
            magnitude *= 0.5  # of an exponent whose bias is one more
        else:
            nan = (code & 0x7F) == 0x7F
        return tl.where(nan, float("nan"), tl.where(code < 0x80, magnitude, -magnitude))


# --- scales ---


@triton.jit
def reciprocal(x):
    return tl.div_rn(1.0, x)


@triton.jit
def dynamic_scale(amax_bits, given, C: tl.constexpr):
    """From the bits of groups' largest magnitudes: what is stored (int32), and what elements are multiplied with.

    Where the group isn't finite both are NaN; where the codes are all to be zero the factor is.
    """
    finite = amax_bits < INFINITY
    amax = from_bits(amax_bits)
    NAN: tl.constexpr = float("nan")
    if C.scale == "e4m3":
        g = reciprocal(tl.load(given))
        stored = tl.where(finite, encode_e4m3(g * (amax * (1 / 6))), 0x7F)
        factor = g * reciprocal(decode_e4m3(stored))
        return stored, tl.where((stored == 0) | (stored == 0x7F), NAN, factor)
    elif C.scale == "e8m0":
        exponent = tl.minimum((bits(tl.div_rn(amax, C.limit)) + 0x7FFFFF) >> 23, 254)
        factor = from_bits(tl.where(exponent == 254, 0x400000, (254 - exponent) << 23))
        return tl.where(finite, exponent, 255), tl.where(finite, factor, NAN)
    else:
        if C.scale == "power_of_two":
            ratio = tl.div_rn(tl.where(amax < 1e-10, 1e-10, amax), C.limit)
            scale = from_bits((bits(ratio) + 0x7FFFFF) & INFINITY)
        else:
            if given is not None:
                bound = tl.load(given)
                amax = tl.where(amax <= bound, amax, bound)
            scale = tl.div_rn(amax, C.limit)
            scale = tl.where(scale < C.least, C.least, scale)
        scale = tl.where(finite, scale, NAN)
        return bits(scale), reciprocal(scale)


@triton.jit
def asymmetric_scale(high_bits, low_bits, C: tl.constexpr):
    """Of groups that span [-low, high]: what is stored, what elements are multiplied with, the zero point."""
    finite = (high_bits < INFINITY) & (low_bits < INFINITY)
    low = from_bits(low_bits)
    scale = tl.div_rn(from_bits(high_bits) + low, 255.0)
    scale = tl.where(finite, tl.where(scale < C.least, C.least, scale), float("nan"))
    factor = reciprocal(scale)
    return bits(scale), factor, tl.where(finite, round_even(low * factor) - 128.0, 0.0)


# --- memory ---


@triton.jit
def scale_pointers(places, row, slot, C: tl.constexpr):
    slot = slot.to(tl.int64)
    if C.layout == "plain":
        return places.data + (row[:, None] * places.row + slot * places.one)
    else:
        start = row * places.row
        if C.layout == "swizzled":
            start = row // 128 * places.row * 128 + row % 32 * 16 + row % 128 // 32 * 4
        data = places.data.to(tl.pointer_type(tl.uint8))
        return data + (start[:, None] + slot // 4 * places.four + slot % 4 * places.one)


@triton.jit
def store_scales(places, row, active, first, stored, K: tl.constexpr):
    """`stored` [R, groups], of which the first is a row's group number `first`; with a row's last group go zeros that
    complete the last unit of four.
    """
    C: tl.constexpr = K.codes
    GROUPS: tl.constexpr = (part_of(K) + C.group - 1) // C.group
    slot = tl.arange(0, stored.shape[1])[None, :]
    if C.layout == "packed":
        stored = stored >> 23
    pointer = scale_pointers(places, row, first + slot, C)
    if pointer.dtype.element_ty == tl.float32:
        stored = from_bits(stored)
    exists = (slot < GROUPS) & (first + slot < C.groups)
    tl.store(pointer, stored.to(pointer.dtype.element_ty), mask=active[:, None] & exists)
    if C.layout != "plain" and C.groups % 4 != 0:
        slot = C.groups + tl.arange(0, 4)[None, :]
        zeros = active[:, None] & (first + GROUPS >= C.groups) & (slot < (C.groups + 3) // 4 * 4)
        tl.store(scale_pointers(places, row, slot, C), 0, mask=zeros)


@triton.jit
def store_padding(places, row, rows, C: tl.constexpr):
    """Scales of rows that don't exist, which complete a tile of 128 rows, are zero."""
    missing = (row >= rows) & (row < (rows + 127) // 128 * 128)
    for first in range(0, (C.groups + 3) // 4 * 4, 4):
        slot = first + tl.arange(0, 4)[None, :]
        tl.store(scale_pointers(places, row, slot, C), 0, mask=missing[:, None])


@triton.jit
def store_codes(data, active, begin, codes, K: tl.constexpr):
    STEP: tl.constexpr = K.codes.per_byte
    column, within = columns(K, STEP, begin)
    if STEP == 2:
        even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1] // 2, 2)))
        codes = even | (odd << 4)
    tl.store(data[:, None] + column, codes.to(tl.uint8), mask=active[:, None] & within)


@triton.constexpr_function
def part_of(K):
    """How many columns a block has, of rows that may have more."""
    return min(K.cols, K.block // K.width * K.group)


@triton.jit
def columns(K: tl.constexpr, STEP: tl.constexpr, begin=0):
    """The columns [1, K.block / STEP] of a block, from `begin` on, in units of STEP, and which of them a row has.

    A group of K.group columns takes K.width places, the next power of two.
    """
    i = tl.arange(0, K.block // STEP)[None, :]
    if K.width == K.group:
        column = begin // STEP + i
        return column, column < K.cols // STEP
    else:
        place = i % (K.width // STEP)
        column = begin // STEP + i // (K.width // STEP) * (K.group // STEP) + place
        return column, (place < K.group // STEP) & (column < K.cols // STEP)


# --- the stage ---


@triton.jit
def amax_of(magnitudes, K: tl.constexpr):
    """The largest of each group [R, groups], as an integer maximum: it has no order, and NaN wins."""
    groups = tl.reshape(magnitudes, (magnitudes.shape[0], K.block // K.width, K.width))
    return tl.max(groups, axis=2)


@triton.jit
def over_groups(x, K: tl.constexpr):
    """[R, groups] as a factor of each element [R, K.block]."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], K.width))
    return tl.reshape(wide, (x.shape[0], K.block))


@triton.jit
def highest(x, K: tl.constexpr):
    """Of each group, as bits: its largest magnitude, or with zero points what it spans above and below 0."""
    if K.codes.asymmetric:
        return amax_of(tl.maximum(bits(x), 0), K), amax_of(tl.maximum(bits(x) ^ ~MAGNITUDE, 0), K)
    else:
        amax = amax_of(bits(x) & MAGNITUDE, K)
        return amax, amax


@triton.jit
def quantize(
    x, rows, row, active, data, given, given_zero, scale, zero_point, tensor_amax, K: tl.constexpr, first=0, begin=0,
    high=None, low=None,
):  # fmt: skip
    """Of x, rows number `row` of `rows`: codes to the pointers `data` [R], and what goes with them.

    x may be slices of rows that begin with the group number `first` [R, 1]; or parts of rows that begin with that group
    and the column `begin`, and `highest` of whole rows, where these are a group.
    """
    C: tl.constexpr = K.codes
    if C.per_tensor:
        if C.static:
            value = tl.load(given)
        else:
            stored, _ = dynamic_scale(tl.load(tensor_amax), given, C)
            value = from_bits(stored)
        if scale is not None:
            tl.store(scale.data, value, mask=tl.program_id(0) == 0)
        if C.asymmetric:
            codes = encode(x * reciprocal(value), tl.load(given_zero).to(tl.float32), C)
        else:
            codes = encode(x * reciprocal(value), 0.0, C)
    else:
        if high is None:
            high, low = highest(x, K)
        if C.asymmetric:
            stored, factor, zero = asymmetric_scale(high, low, C)
            codes = encode(x * over_groups(factor, K), over_groups(zero, K), C)
            if zero_point is not None:
                store_scales(zero_point, row, active, first, zero.to(tl.int32), K)
        else:
            stored, factor = dynamic_scale(high, given, C)
            codes = encode(x * over_groups(factor, K), 0.0, C)
        if scale is not None:
            store_scales(scale, row, active, first, stored, K)
            if C.layout == "swizzled":
                store_padding(scale, row, rows, C)
    if data is not None:
        store_codes(data, active, begin, codes, K)
