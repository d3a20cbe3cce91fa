"""What becomes of a head's results: they are stored as they are, and quantized, as a slice of a token's row."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .platform import narrow
from .quantize import Codes, places_at, quantize


@dataclass(frozen=True)
class Slice:
    """A kernel is compiled for it."""

    cols: int
    block: int  # places of them, a power of two
    group: int  # columns that share a scale,
    width: int  # and the places they take
    codes: Codes | None


class Output(NamedTuple):
    """Where results go; None: nothing is wanted."""

    y: Any = None
    data: Any = None  # codes,
    given: Any = None  # what they are scaled by from outside,
    given_zero: Any = None
    scale: Any = None  # and their scales and zero points: in kernels, as `Places`
    zero_point: Any = None


@triton.jit
def with_places(out, scale_row, scale_column, zero_row, zero_column, E: tl.constexpr):
    scale, zero_point = out.scale, out.zero_point
    if out.scale is not None:
        scale = places_at(out.scale, scale_row, scale_column, E.codes)
    if out.zero_point is not None:
        zero_point = places_at(out.zero_point, zero_row, zero_column, E.codes)
    return Output(out.y, out.data, out.given, out.given_zero, scale, zero_point)


@triton.jit
def store(out, rows, row, head, active, x, S: tl.constexpr, E: tl.constexpr):
    """x [R, E.block], slices number `head` of the rows `row` of `rows`, as they are and as codes."""
    column = tl.arange(0, E.block)[None, :]
    if out.y is not None:
        pointer = out.y.data + (row * out.y.strides[0] + head * E.cols)[:, None] + column
        tl.store(pointer, narrow(x, S), mask=active[:, None] & (column < E.cols))
    if E.codes is not None:
        C: tl.constexpr = E.codes
        data = None
        if out.data is not None:
            data = out.data.data + (row * out.data.strides[0] + head * (E.cols // C.per_byte))
        scale = None if C.per_tensor else out.scale
        first = (head * (E.cols // C.group))[:, None]
        quantize(x, rows, row, active, data, out.given, out.given_zero, scale, out.zero_point, None, E, first)


@triton.jit
def store_given_scale(out, E: tl.constexpr):
    """A static scale that is returned with the codes; by one program."""
    if E.codes is not None:  # noqa: SIM102, which Triton compiles one after the other
        if E.codes.per_tensor and out.scale is not None:
            tl.store(out.scale.data, tl.load(out.given), mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
