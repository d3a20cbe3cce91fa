"""Attention over a paged cache, prefill and decoding in one launch, and the epilogue that quantizes its rows.

A program has a tile of K.rows rows, which are some queries of a sequence times heads that share keys. It goes through
the keys K.keys at a time, at fixed places, with a softmax that is corrected as larger logits come:

    m' = max(m, max(s))        p = exp(s - m')        a = exp(m - m')
    total' = total * a + sum(p)        acc' = acc * a + round_S(p) v

The weights p are rounded to S for the product with v, as everywhere. Every K.segment keys begin with m, total and acc
anew and end with their mean, y = acc / total, so that sums don't grow beyond float32; `fold` joins a segment to those
before it, as weighted means. So segments may also be computed by programs of their own, into memory, and be folded by
another kernel, which is done for sequences of few queries: their keys are all there is to share out. A row's bits are
the same either way, and so what is launched may follow from shapes. They depend on its query and on the keys it sees,
not on its tile, nor on how its prompt was cut into chunks; on a GPU as far as a product of matrices treats the rows of
a tile alike, and two kernels of the same tile multiply it in the same order.

A key that a row doesn't see leaves its m, total and acc as they were: logits are selected, not multiplied, and
weights of 0 meet finite values only. Values that aren't finite, or whose sum is beyond float32, show in acc, and then
the segment is done again (`segment_of`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .epilogue import store, store_given_scale, with_places
from .platform import INFINITY, MAGNITUDE, bits, dot, halves_sum, narrow, round_to, widen
from .quantize import PLACES, decode, store_padding
from .row import Rows
from .sequences import Sequences, blocks_of_keys, first_tile, last_at_most, sequence, tile_of

OF_A_CALL = [*Sequences._fields, "begin", "few", "segments", "end", *PLACES]  # arguments that aren't compiled for
LOG2E = tl.constexpr(1.44269504)
SMALLER = tl.constexpr(2.0**-32)


@dataclass(frozen=True)
class Tile:
    """How attention of so many heads and columns is computed; a kernel is compiled for it."""

    heads: int
    ratio: int  # of them that share keys
    parts: int  # tiles that those take
    shared: int  # of them in a tile, a power of two
    queries: int  # of a tile
    rows: int
    keys: int  # at a time
    segment: int
    page: int  # keys in a block of the cache
    cols: int
    block: int  # places of them, a power of two
    rope_cols: int  # that stand elsewhere, as keys do too; 0: none do
    rope_block: int
    v_cols: int
    v_block: int
    format: str  # of a cache that holds codes
    causal: bool
    window: int  # keys that a query sees up to its own; 0: all
    capped: bool
    merged: int  # heads of a program that folds
    warps: int


class Inputs(NamedTuple):
    """Strides of q: token, head; of caches: block, place in it, head."""

    q: Rows | None
    q_rope: Rows | None  # columns that stand elsewhere, as those of the keys do
    k: Rows | None
    k_rope: Rows | None
    v: Rows | None  # None: the keys' first columns
    k_scale: Rows | None
    v_scale: Rows | None
    sinks: Any
    scale: float | None
    cap: float | None


class Partial(NamedTuple):
    """Segments of the `few` queries of each sequence from `begin` on: [sequence, query, head, segment], of m and total,
    and of y.
    """

    stats: Any
    y: Any
    begin: int
    few: int  # sequences of more queries have none
    segments: int


@triton.jit
def nothing(K: tl.constexpr, ROWS: tl.constexpr):
    """m, total and acc of rows that have seen no key."""
    return (
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, K.v_block), tl.float32),
    )


# --- one block of keys ---


@triton.jit
def load_cached(
    cache, head, block, slot, exists, COLS: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, K: tl.constexpr
):
    """[keys, BLOCK] of S, a code's exact value; zeros where there is none."""
    column = tl.arange(0, BLOCK)[None, :]
    row = block * cache.strides[0] + slot * cache.strides[1] + head * cache.strides[2]
    held = tl.load(cache.data + row[:, None] + column, mask=exists[:, None] & (column < COLS), other=0)
    return held if K.format == "" else narrow(decode(held, K.format), S)


@triton.jit
def exp_from(x, m):
    """e^(x - m), 0 where both are -inf: a row that has seen nothing."""
    return tl.exp2((x - tl.where(m == float("-inf"), 0.0, m)) * LOG2E)


@triton.jit
def tanh(x):
    z = x * x
    near = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    near = tl.fma(z, tl.fma(z, near, -5.37397155531e-2), 1.33314422036e-1)
    near = tl.fma(x * z, tl.fma(z, near, -3.33332819422e-1), x)
    magnitude = tl.abs(x)
    far = 1.0 - tl.div_rn(2.0, tl.exp2(magnitude * 2.88539008178) + 1.0)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def is_finite(x):
    return (bits(x) & MAGNITUDE) < INFINITY


@triton.jit
def nonfinite(seen, v, S: tl.constexpr):
    """What infinities and NaN among the values make of the sums of rows that see them; 0 for others.

    Each is counted in seven bits of an integer, by one product with `seen` that is exact in S.
    """
    held = bits(widen(v))
    magnitude = held & MAGNITUDE
    kind = tl.where(magnitude > INFINITY, 16384.0, tl.where(held > 0, 1.0, 128.0))
    kind = tl.where(magnitude < INFINITY, 0.0, kind)
    none = tl.zeros((seen.shape[0], v.shape[1]), tl.float32)
    count = dot(narrow(seen.to(tl.float32), S), narrow(kind, S), none).to(tl.int32)
    infinite = tl.where((count & 127) > 0, float("inf"), 0.0) + tl.where((count >> 7) > 0, float("-inf"), 0.0)
    return tl.where((count >> 14) > 0, float("nan"), infinite)


@triton.jit
def segment(x, q, q_rope, since, until, kv_head, s, i, low, high, factor, K: tl.constexpr, EXACT: tl.constexpr):
    """m, total [K.rows] and y of the keys from `low` to `high`; a row sees those from `since` to `until`.

    Unless EXACT, y is wrong, and isn't finite, where any value isn't. EXACT: values are multiplied with `factor`
    meanwhile, a power of two.
    """
    S: tl.constexpr = q.dtype
    scale = x.scale
    if x.k_scale is not None:
        scale *= tl.load(x.k_scale.data + kv_head * x.k_scale.strides[0])
    m, total, acc = nothing(K, K.rows)
    for first in tl.range(low, high, K.keys, num_stages=1 if EXACT else None):
        key = first + tl.arange(0, K.keys)
        block, inside = blocks_of_keys(s, i, key, key < high, K.page)
        exists, slot = (key < high) & inside, (key % K.page).to(tl.int64)
        held = load_cached(x.k, kv_head, block, slot, exists, K.cols, K.block, S, K)
        logits = dot(q, tl.trans(held), tl.zeros((K.rows, K.keys), tl.float32))
        if K.rope_cols > 0:
            turned = load_cached(x.k_rope, kv_head, block, slot, exists, K.rope_cols, K.rope_block, S, K)
            logits = dot(q_rope, tl.trans(turned), logits)
        logits *= scale
        if K.capped:
            logits = tanh(tl.div_rn(logits, x.cap)) * x.cap
        logits = tl.where(inside[None, :], logits, float("nan"))
        seen = key[None, :] < until[:, None]
        if K.window > 0:
            seen = seen & (key[None, :] >= since[:, None])
        logits = tl.where(seen, logits, float("-inf"))

        larger = tl.maximum(m, tl.max(logits, axis=1))
        p = exp_from(logits, larger[:, None])
        rest = exp_from(m, larger)
        total = total * rest + tl.reshape(halves_sum(p), (K.rows,))
        if x.v is not None:
            held = load_cached(x.v, kv_head, block, slot, exists, K.v_cols, K.v_block, S, K)
        if EXACT:
            values = narrow(tl.where(is_finite(widen(held)), widen(held), 0.0) * factor, S)
            acc = dot(narrow(p, S), values, acc * rest[:, None])
            acc += nonfinite(seen, held, S)
        else:
            acc = dot(narrow(p, S), held, acc * rest[:, None])
        m = larger
    y = acc * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))[:, None]
    return m, total, y


# --- segments ---


@triton.jit
def segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K: tl.constexpr):
    """Segment `number` of the keys from `low` to `high`.

    What isn't finite is done again, once with the values as they are, and what isn't then with smaller ones.
    """
    low, high = tl.maximum(low, number * K.segment), tl.minimum(high, (number + 1) * K.segment)
    m, total, y = segment(x, q, q_rope, since, until, kv_head, s, i, low, high, 1.0, K, False)
    factor = tl.full((), 1.0, tl.float32)
    while (factor >= SMALLER) & (tl.max(tl.max(bits(y) & MAGNITUDE, axis=1), axis=0) >= INFINITY):
        m, total, again = segment(x, q, q_rope, since, until, kv_head, s, i, low, high, factor, K, True)
        y = tl.where(is_finite(y), y, again * tl.div_rn(1.0, factor))
        factor *= SMALLER
    return m, total, y


@triton.jit
def fold(m, total, y, m2, total2, y2):
    """The means of what came before and of a segment; one that a row doesn't see changes nothing but the sign of 0."""
    larger = tl.maximum(m, m2)
    a, b = total * exp_from(m, larger), total2 * exp_from(m2, larger)
    both = tl.where(a + b == 0.0, 1.0, a + b)
    return larger, a + b, y * tl.div_rn(a, both)[:, None] + y2 * tl.div_rn(b, both)[:, None]


@triton.jit
def finished(x, m, total, y, head, active, S: tl.constexpr, K: tl.constexpr):
    """y with the sink's weight, rounded to S; NaN where all weights are 0."""
    if x.sinks is not None:
        sink = widen(tl.load(x.sinks + head, mask=active, other=0.0))
        larger = tl.maximum(m, sink)
        total *= exp_from(m, larger)
        y *= tl.div_rn(total, total + exp_from(sink, larger))[:, None]
    else:
        y *= tl.div_rn(total, total)[:, None]
    y += 0.0  # which makes every 0 positive
    if x.v_scale is not None:
        y *= tl.load(x.v_scale.data + head // K.ratio * x.v_scale.strides[0], mask=active, other=1.0)[:, None]
    return round_to(y, S)


# --- kernels ---


@triton.jit
def load_queries(q, token, head, active, COLS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    row = token * q.strides[0] + head * q.strides[1]
    return tl.load(q.data + row[:, None] + column, mask=active[:, None] & (column < COLS), other=0.0)


@triton.jit
def segments_of(low, high, K: tl.constexpr):
    """The first that keys from `low` to `high` have, and where they end."""
    return low // K.segment, (high + K.segment - 1) // K.segment


@triton.jit
def partial_rows(partial, i, query, head, number, K: tl.constexpr):
    return (((i - partial.begin).to(tl.int64) * partial.few + query) * K.heads + head) * partial.segments + number


@triton.jit
def attend(
    x, s, i, tile, part, start, queries, length, partial, out, K: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr
):
    S: tl.constexpr = x.q.data.dtype.element_ty
    r = tl.arange(0, K.rows)
    query = (tile * K.queries).to(tl.int32) + r // K.shared
    shared = part % K.parts * K.shared + r % K.shared
    kv_head = (part // K.parts).to(tl.int64)
    head, row = kv_head * K.ratio + shared, start - s.first + query
    active = (query < queries) & (shared < K.ratio) & (row >= 0) & (row < s.rows)

    until = tl.zeros((K.rows,), tl.int32) + length.to(tl.int32)
    if K.causal:
        until = until - queries.to(tl.int32) + query + 1
    since = until - K.window
    until = tl.where(active, until, 0)
    low, high = 0, tl.max(until, axis=0)
    if K.window > 0:
        low = tl.maximum(tl.min(since, axis=0), 0) // K.keys * K.keys  # that of the first query
    first, end = segments_of(low, high, K)

    q = load_queries(x.q, row, head, active, K.cols, K.block)
    q_rope = q
    if K.rope_cols > 0:
        q_rope = load_queries(x.q_rope, row, head, active, K.rope_cols, K.rope_block)
    if SPLIT:
        for number in range(first + tl.program_id(2), end, tl.num_programs(2)):
            m, total, y = segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K)
            place = partial_rows(partial, i, query, head, number, K)
            tl.store(partial.stats + place * 2, m, mask=active)
            tl.store(partial.stats + place * 2 + 1, total, mask=active)
            column = tl.arange(0, K.v_block)[None, :]
            tl.store(partial.y + place[:, None] * K.v_cols + column, y, mask=active[:, None] & (column < K.v_cols))
    else:
        m, total, y = nothing(K, K.rows)
        for number in range(first, end):
            m2, total2, y2 = segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K)
            m, total, y = fold(m, total, y, m2, total2, y2)
        y = finished(x, m, total, y, head, active, S, K)
        store(out, s.rows, row, head, active, y, S, E)


@triton.jit(do_not_specialize=OF_A_CALL)
def attend_kernel(
    x, starts, lengths, tables,
    width: tl.int64, all: tl.int64, tokens: tl.int64, first: tl.int64, rows: tl.int64, most: tl.int64, blocks: tl.int64,
    stats, partial_y, begin: tl.int64, few: tl.int64, segments: tl.int64,
    out, scale_row: tl.int64, scale_column: tl.int64, zero_row: tl.int64, zero_column: tl.int64,
    K: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT: segments of the queries of a sequence that has `few`; otherwise all keys of a tile of one with more."""
    s = Sequences(starts, lengths, tables, width, all, tokens, first, rows, most, blocks)
    partial = Partial(stats, partial_y, begin, few, segments)
    if SPLIT:
        i, tile = begin + tl.program_id(0), begin * 0
    else:
        i, tile = tile_of(s, first_tile(s, K.queries) + tl.program_id(0), K.queries)
        out = with_places(out, scale_row, scale_column, zero_row, zero_column, E)
    start, queries, length, known = sequence(s, i)
    begins = start + tile * K.queries
    meets = (tile * K.queries < queries) & (begins < first + rows) & (begins + K.queries > first)
    if known & meets & ((queries <= few) == SPLIT):
        attend(x, s, i, tile, tl.program_id(1), start, queries, length, partial, out, K, E, SPLIT)


@triton.jit(do_not_specialize=OF_A_CALL)
def finish_kernel(
    x, starts, lengths, tables,
    width: tl.int64, all: tl.int64, tokens: tl.int64, first: tl.int64, rows: tl.int64, most: tl.int64, blocks: tl.int64,
    stats, partial_y, begin: tl.int64, few: tl.int64, segments: tl.int64, end: tl.int64,
    out, scale_row: tl.int64, scale_column: tl.int64, zero_row: tl.int64, zero_column: tl.int64,
    K: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Rows that `attend_kernel` leaves: segments are folded; zeros without a sequence, NaN in one that isn't known.

    Those of the sequences from `begin` to `end`, whose segments there are; without a sequence with the first.
    """
    s = Sequences(starts, lengths, tables, width, all, tokens, first, rows, most, blocks)
    partial = Partial(stats, partial_y, begin, few, segments)
    out = with_places(out, scale_row, scale_column, zero_row, zero_column, E)
    S: tl.constexpr = x.q.data.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * K.merged + tl.arange(0, K.merged).to(tl.int64)
    store_given_scale(out, E)
    if row >= rows:
        if E.codes is not None:  # noqa: SIM102
            if E.codes.layout == "swizzled" and out.scale is not None:
                store_padding(out.scale, row + tl.arange(0, 1), rows, E.codes)
        return

    token = first + row
    i = last_at_most(s, token, 0)
    if (tl.maximum(i, 0) < begin) | (i >= end):
        return
    start, queries, length, known = sequence(s, i)
    query = token - start
    exists = (i >= 0) & (query < queries)
    known, folded = exists & known, exists & known & (queries <= few)
    there = False
    if known & (queries > few):  # of numbers that go back, no tile may be
        other, _ = tile_of(s, start // K.queries + i + query // K.queries, K.queries)
        there = other == i
    if not there:
        active = head < K.heads
        m, total, y = nothing(K, K.merged)
        if stats is not None:
            until = tl.where(folded, length, 0)
            if K.causal:
                until = tl.where(folded, length - queries + query + 1, 0)
            low = until * 0
            if K.window > 0:
                low = tl.maximum(until - K.window, 0)
            lowest, highest = segments_of(low, until, K)
            column = tl.arange(0, K.v_block)[None, :]
            valid = active[:, None] & (column < K.v_cols)
            for number in range(lowest, highest):
                place = partial_rows(partial, i, query, head, number, K)
                m2 = tl.load(partial.stats + place * 2, mask=active, other=0.0)
                total2 = tl.load(partial.stats + place * 2 + 1, mask=active, other=0.0)
                y2 = tl.load(partial.y + place[:, None] * K.v_cols + column, mask=valid, other=0.0)
                m, total, y = fold(m, total, y, m2, total2, y2)
        y = finished(x, m, total, y, head, active, S, K)
        y = tl.where(folded, y, tl.where(exists, float("nan"), 0.0))
        store(out, rows, row + head * 0, head, active, y, S, E)
