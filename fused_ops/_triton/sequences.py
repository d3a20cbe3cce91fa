"""Which sequence a program works for: the host reads no numbers, so kernels find their own.

Numbers may be anything: what is used as an offset lies in its tensor. A sequence is `known` if its own are in range.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Sequences(NamedTuple):
    """starts [all + 1], lengths [all], and tables [all, ...] whose rows lie `width` apart.

    Kernels make it of arguments of their own: Triton compiles for the values of integers that come in a tuple,
    whatever `do_not_specialize` says.
    """

    starts: object
    lengths: object
    tables: object
    width: int
    all: int
    tokens: int  # of all sequences, and those of none behind them,
    first: int  # of which those from here on
    rows: int  # are the rows of q and of the results
    most: int  # keys that a row of tables has blocks for
    blocks: int  # of the cache


@triton.jit
def last_at_most(s, value, TILE: tl.constexpr):
    """The last sequence that begins at `value` or before, or -1.

    With tiles: sequence i begins with tile number starts[i] // TILE + i, at which all before it have ended.
    """
    low, high = s.all * 0, s.all
    while low < high:
        middle = (low + high) // 2
        begin = tl.load(s.starts + middle).to(tl.int64)
        if TILE > 0:
            begin = begin // TILE + middle
        if begin <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def tile_of(s, number, TILE: tl.constexpr):
    """(its sequence or -1, its number in that) of tiles of TILE queries each."""
    i = last_at_most(s, number, TILE)
    start = tl.load(s.starts + i, mask=i >= 0, other=0).to(tl.int64)
    return i, number - (start // TILE + i)


@triton.jit
def first_tile(s, TILE: tl.constexpr):
    """No tile before it has one of the rows: token t is in tile t // TILE + i or the one before, i its sequence."""
    return tl.maximum(s.first // TILE - 1, 0)


@triton.jit
def sequence(s, i):
    """Sequence `i`'s first token, its queries, its tokens, whether it is known; nothing is read of -1, which isn't."""
    exists = i >= 0
    start = tl.load(s.starts + i, mask=exists, other=0).to(tl.int64)
    end = tl.load(s.starts + (i + 1), mask=exists, other=0).to(tl.int64)
    length = tl.load(s.lengths + i, mask=exists, other=0).to(tl.int64)
    ordered = exists & (start >= 0) & (start <= end) & (end <= s.tokens)
    known = ordered & (end - start <= length) & (length <= s.most)
    return start, end - start, length, known


@triton.jit
def blocks_of_keys(s, i, key, wanted, PAGE: tl.constexpr):
    """int64 numbers of the blocks that hold these keys, and whether the cache has them; 0 where not."""
    entry = tl.load(s.tables + i.to(tl.int64) * s.width + key // PAGE, mask=wanted, other=0).to(tl.int64)
    inside = (entry >= 0) & (entry < s.blocks)
    return tl.where(inside, entry, 0), inside
