"""Rotary position embedding: a transform of a block of heads of one token."""

from dataclasses import dataclass

import triton
import triton.language as tl

from .platform import round_to


@dataclass(frozen=True)
class Rotation:
    half: int  # of the columns that are rotated
    is_neox: bool
    round_products: bool
    sections: tuple[int, ...]  # of the pairs, that turn by time, height and width; none: all turn by one position
    alternating: bool

    @property
    def apart(self) -> bool:
        """Whether the elements of a pair aren't neighbours."""
        return self.is_neox and self.half > 0


@triton.jit
def positions_of(positions, stride, token, tokens, table_rows, R: tl.constexpr):
    """A token's three positions, all the same without M-RoPE, and whether the table has them; if not, they are 0.

    Tokens beyond the last, which complete a tile of scales, have none.
    """
    active = token < tokens
    time = token
    if positions is not None:
        time = tl.load(positions + token, mask=active, other=-1).to(tl.int64)
    inside = active & (time >= 0) & (time < table_rows)
    height, width = time, time
    if len(R.sections) > 0:
        height = tl.load(positions + (token + stride), mask=active, other=-1).to(tl.int64)
        width = tl.load(positions + (token + stride + stride), mask=active, other=-1).to(tl.int64)
        inside = inside & (height >= 0) & (height < table_rows) & (width >= 0) & (width < table_rows)
    return tl.where(inside, time, 0), tl.where(inside, height, 0), tl.where(inside, width, 0), inside


@triton.jit
def axis_of(pair, R: tl.constexpr):
    """Which position a pair turns by."""
    time: tl.constexpr = R.sections[0]
    height: tl.constexpr = R.sections[1]
    width: tl.constexpr = R.sections[2]
    if R.alternating:
        second = (pair % 3 == 1) & (pair < 3 * height)
        third = (pair % 3 == 2) & (pair < 3 * width)
        return second.to(tl.int32) + 2 * third.to(tl.int32)
    else:
        return (pair >= time).to(tl.int32) + (pair >= time + height).to(tl.int32)


@triton.jit
def load_angles(table, stride, place, pair, within, S: tl.constexpr, R: tl.constexpr):
    """The table's values of these pairs. Whole rows are read for each axis, since vectors of them are fast."""
    value = tl.load(table + place[0] * stride + pair, mask=within, other=0.0)
    if len(R.sections) > 0:
        axis = axis_of(pair, R)
        for a in tl.static_range(1, 3):
            value = tl.where(axis == a, tl.load(table + place[a] * stride + pair, mask=within, other=0.0), value)
    return round_to(value, S) if R.round_products else value


@triton.jit
def twice(x):
    return tl.reshape(tl.join(x, x), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def angles(table, stride, place, BLOCK: tl.constexpr, S: tl.constexpr, R: tl.constexpr):
    """cos and sin [1, BLOCK] of each column's pair."""
    if R.is_neox:
        i = tl.arange(0, BLOCK)[None, :]
        pair, within = i % R.half, i < 2 * R.half
    else:
        pair = tl.arange(0, BLOCK // 2)[None, :]
        within = pair < R.half
    cos = load_angles(table, stride, place, pair, within, S, R)
    sin = load_angles(table + R.half, stride, place, pair, within, S, R)
    if R.is_neox:
        return cos, sin
    else:
        return twice(cos), twice(sin)


@triton.jit
def swapped(x):
    """Each element of a pair of neighbours in the other's place."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(odd, even), x.shape)


@triton.jit
def partner(column, R: tl.constexpr):
    """The column of a pair's other element, in NeoX style."""
    return (column + R.half) % (2 * R.half)


@triton.jit
def product(a, b, S: tl.constexpr, R: tl.constexpr):
    return round_to(a * b, S) if R.round_products else a * b


@triton.jit
def rotate(x, other, column, cos, sin, S: tl.constexpr, R: tl.constexpr):
    """y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin, of elements x and their pairs' other ones."""
    first = column < R.half if R.is_neox else column % 2 == 0
    a, b = product(x, cos, S, R), product(other, sin, S, R)
    y = round_to(tl.where(first, a - b, a + b), S)
    return tl.where(column < 2 * R.half, y, x)
