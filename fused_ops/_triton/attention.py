"""Attention over a paged cache, prefill and decoding in one launch, and the epilogue that quantizes its rows.

A program has a tile of K.rows rows, which are some queries of a sequence times heads that share keys. It goes through
the keys K.keys at a time, at fixed places, with a softmax that is corrected as larger logits come:

    m' = max(m, max(s))        p = exp2(s - m')        a = exp2(m - m')
    total' = total * a + sum(p)        acc' = acc * a + round_S(p) v

The weights p are rounded to S for the product with v, as everywhere. Every K.segment keys begin with m, total and acc
anew, and `fold` adds a segment to those before it. So segments may also be computed by programs of their own, into
memory, and be folded by another kernel, which is done for sequences of few queries: their keys are all there is to
share out. A row's bits are the same either way, and so what is launched may follow from shapes. They depend on its
query and on the keys it sees, not on its tile, nor on how its prompt was cut into chunks; on a GPU as far as a
product of matrices treats the rows of a tile alike, and two kernels of the same tile multiply it in the same order.

A key that a row doesn't see leaves its m, total and acc as they were: logits are selected, not multiplied, and
weights of 0 meet finite values only. Values that aren't finite show in acc, and then the segment is done again
(`nonfinite`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .platform import INFINITY, MAGNITUDE, bits, dot, halves_sum, narrow, round_to, widen
from .quantize import Codes, decode, quantize, store_padding
from .row import Rows
from .sequences import blocks_of_keys, last_at_most, sequence, tile_of


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
    windowed: bool
    capped: bool
    merged: int  # heads of a program that folds
    warps: int


@dataclass(frozen=True)
class Slice:
    """What becomes of a head's results, which are a slice of a token's row."""

    cols: int
    block: int  # places of them, a power of two
    group: int  # columns that share a scale,
    width: int  # and the places they take
    codes: Codes | None


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
    window: int
    inner: float | None  # of the logits, as powers of two: with a cap, outer * tanh(inner * q . k)
    outer: float | None


class Output(NamedTuple):
    """Where results go; None: nothing is wanted."""

    y: Any = None
    data: Any = None  # codes,
    given: Any = None  # what they are scaled by from outside,
    given_zero: Any = None
    scale: Any = None  # and their scales and zero points: `Places`
    zero_point: Any = None


class Partial(NamedTuple):
    """Segments of the `few` queries of each sequence: [sequence, query, head, segment], m and total, and acc."""

    stats: Any
    acc: Any
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
def exp2_from(x, m):
    """2^(x - m), 0 where both are -inf: a row that has seen nothing."""
    return tl.exp2(x - tl.where(m == float("-inf"), 0.0, m))


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
def segment(x, q, q_rope, since, until, kv_head, s, i, low, high, K: tl.constexpr, EXACT: tl.constexpr):
    """m, total [K.rows] and acc of the keys from `low` to `high`; a row sees those from `since` to `until`.

    Unless EXACT, acc is wrong, and isn't finite, where any value isn't.
    """
    S: tl.constexpr = q.dtype
    inner = x.inner
    if x.k_scale is not None:
        inner *= tl.load(x.k_scale.data + kv_head * x.k_scale.strides[0])
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
        logits *= inner
        if K.capped:
            logits = tanh(logits) * x.outer
        logits = tl.where(inside[None, :], logits, float("nan"))
        seen = key[None, :] < until[:, None]
        if K.windowed:
            seen = seen & (key[None, :] >= since[:, None])
        logits = tl.where(seen, logits, float("-inf"))

        larger = tl.maximum(m, tl.max(logits, axis=1))
        p = exp2_from(logits, larger[:, None])
        rest = exp2_from(m, larger)
        total = total * rest + tl.reshape(halves_sum(p), (K.rows,))
        if x.v is not None:
            held = load_cached(x.v, kv_head, block, slot, exists, K.v_cols, K.v_block, S, K)
        if EXACT:
            finite = (bits(widen(held)) & MAGNITUDE) < INFINITY
            acc = dot(narrow(p, S), tl.where(finite, held, 0.0).to(S), acc * rest[:, None])
            acc += nonfinite(seen, held, S)
        else:
            acc = dot(narrow(p, S), held, acc * rest[:, None])
        m = larger
    return m, total, acc


# --- segments ---


@triton.jit
def segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K: tl.constexpr):
    """Segment `number` of the keys from `low` to `high`."""
    low, high = tl.maximum(low, number * K.segment), tl.minimum(high, (number + 1) * K.segment)
    m, total, acc = segment(x, q, q_rope, since, until, kv_head, s, i, low, high, K, False)
    if tl.max(tl.max(bits(acc) & MAGNITUDE, axis=1), axis=0) >= INFINITY:
        m, total, acc = segment(x, q, q_rope, since, until, kv_head, s, i, low, high, K, True)
    return m, total, acc


@triton.jit
def fold(m, total, acc, m2, total2, acc2):
    """The sums of what came before and of a segment; one that a row doesn't see changes nothing but the sign of 0."""
    larger = tl.maximum(m, m2)
    a, b = exp2_from(m, larger), exp2_from(m2, larger)
    return larger, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@triton.jit
def finished(x, m, total, acc, head, active, S: tl.constexpr, K: tl.constexpr):
    """acc / total with the sink's weight, rounded to S."""
    if x.sinks is not None:
        sink = widen(tl.load(x.sinks + head, mask=active, other=0.0)) * 1.44269504
        larger = tl.maximum(m, sink)
        rest = exp2_from(m, larger)
        total = total * rest + exp2_from(sink, larger)
        acc = acc * rest[:, None]
    acc = tl.div_rn(acc + 0.0, total[:, None])  # which makes every 0 positive
    if x.v_scale is not None:
        acc *= tl.load(x.v_scale.data + head // K.ratio * x.v_scale.strides[0], mask=active, other=1.0)[:, None]
    return round_to(acc, S)


@triton.jit
def store(out, tokens, token, head, active, x, S: tl.constexpr, E: tl.constexpr):
    """x [R, E.block], slices number `head` of the rows `token`, as they are and as codes."""
    column = tl.arange(0, E.block)[None, :]
    if out.y is not None:
        pointer = out.y.data + (token * out.y.strides[0] + head * E.cols)[:, None] + column
        tl.store(pointer, narrow(x, S), mask=active[:, None] & (column < E.cols))
    if E.codes is not None:
        C: tl.constexpr = E.codes
        data = None
        if out.data is not None:
            data = out.data.data + (token * out.data.strides[0] + head * (E.cols // C.per_byte))
        scale = None if C.per_tensor else out.scale
        first = (head * (E.cols // C.group))[:, None]
        quantize(x, tokens, token, active, data, out.given, out.given_zero, scale, out.zero_point, None, E, first)


@triton.jit
def store_given_scale(out, E: tl.constexpr):
    """A static scale that is returned with the codes; by one program."""
    if E.codes is not None:  # noqa: SIM102, which Triton compiles one after the other
        if E.codes.per_tensor and out.scale is not None:
            tl.store(out.scale.data, tl.load(out.given), mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))


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
    return ((i.to(tl.int64) * partial.few + query) * K.heads + head) * partial.segments + number


@triton.jit
def attend(
    x, s, i, tile, part, start, queries, length, partial, out, K: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr
):
    S: tl.constexpr = x.q.data.dtype.element_ty
    r = tl.arange(0, K.rows)
    query = (tile * K.queries).to(tl.int32) + r // K.shared
    shared = part % K.parts * K.shared + r % K.shared
    kv_head = (part // K.parts).to(tl.int64)
    head, token = kv_head * K.ratio + shared, start + query
    active = (query < queries) & (shared < K.ratio)

    until = tl.zeros((K.rows,), tl.int32) + length.to(tl.int32)
    if K.causal:
        until = until - queries.to(tl.int32) + query + 1
    since = until - x.window
    until = tl.where(active, until, 0)
    low, high = 0, tl.max(until, axis=0)
    if K.windowed:
        low = tl.maximum(tl.min(since, axis=0), 0) // K.keys * K.keys  # that of the first query
    first, end = segments_of(low, high, K)

    q = load_queries(x.q, token, head, active, K.cols, K.block)
    q_rope = q
    if K.rope_cols > 0:
        q_rope = load_queries(x.q_rope, token, head, active, K.rope_cols, K.rope_block)
    if SPLIT:
        number = tl.program_id(2)
        if (number >= first) & (number < end):
            m, total, acc = segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K)
            row = partial_rows(partial, i, query, head, number, K)
            tl.store(partial.stats + row * 2, m, mask=active)
            tl.store(partial.stats + row * 2 + 1, total, mask=active)
            column = tl.arange(0, K.v_block)[None, :]
            tl.store(partial.acc + row[:, None] * K.v_cols + column, acc, mask=active[:, None] & (column < K.v_cols))
    else:
        m, total, acc = nothing(K, K.rows)
        for number in range(first, end):
            m2, total2, acc2 = segment_of(number, x, q, q_rope, since, until, kv_head, s, i, low, high, K)
            m, total, acc = fold(m, total, acc, m2, total2, acc2)
        y = finished(x, m, total, acc, head, active, S, K)
        store(out, s.tokens, token, head, active, y, S, E)


@triton.jit(do_not_specialize=["s", "few"])
def attend_kernel(x, s, few, partial, out, K: tl.constexpr, E: tl.constexpr, SPLIT: tl.constexpr):
    """SPLIT: one segment of the queries of a sequence that has `few`; otherwise all keys of a tile of one with more."""
    if SPLIT:
        i, tile = tl.program_id(0), tl.program_id(0).to(tl.int64) * 0
    else:
        i, tile = tile_of(s, tl.program_id(0), K.queries)
    start, queries, length, known = sequence(s, i)
    if known & (tile * K.queries < queries) & ((queries <= few) == SPLIT):
        attend(x, s, i, tile, tl.program_id(1), start, queries, length, partial, out, K, E, SPLIT)


@triton.jit(do_not_specialize=["s", "few"])
def finish_kernel(x, s, few, partial, out, K: tl.constexpr, E: tl.constexpr):
    """Rows that `attend_kernel` leaves: segments are folded; zeros without a sequence, NaN in one that isn't known."""
    S: tl.constexpr = x.q.data.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * K.merged + tl.arange(0, K.merged).to(tl.int64)
    store_given_scale(out, E)
    if token >= s.tokens:
        if E.codes is not None:  # noqa: SIM102
            if E.codes.layout == "swizzled" and out.scale is not None:
                store_padding(out.scale, token + tl.arange(0, 1), s.tokens, E.codes)
        return

    i = last_at_most(s, token, 0)
    start, queries, length, known = sequence(s, i)
    exists, query = (token < s.tokens) & (i >= 0), token - start
    exists = exists & (query < queries)
    known, folded = exists & known, exists & known & (queries <= few)
    there = False
    if known & (queries > few):  # of numbers that go back, no tile may be
        other, _ = tile_of(s, start // K.queries + i + query // K.queries, K.queries)
        there = other == i
    if not there:
        active = (head < K.heads) & (token < s.tokens)
        m, total, acc = nothing(K, K.merged)
        if partial is not None:
            until = tl.where(folded, length, 0)
            if K.causal:
                until = tl.where(folded, length - queries + query + 1, 0)
            low = until * 0
            if K.windowed:
                low = tl.maximum(until - x.window, 0)
            first, end = segments_of(low, until, K)
            column = tl.arange(0, K.v_block)[None, :]
            valid = active[:, None] & (column < K.v_cols)
            for number in range(first, end):
                row = partial_rows(partial, i, query, head, number, K)
                m2 = tl.load(partial.stats + row * 2, mask=active, other=0.0)
                total2 = tl.load(partial.stats + row * 2 + 1, mask=active, other=0.0)
                acc2 = tl.load(partial.acc + row[:, None] * K.v_cols + column, mask=valid, other=0.0)
                m, total, acc = fold(m, total, acc, m2, total2, acc2)
        y = finished(x, m, total, acc, head, active, S, K)
        y = tl.where(folded, y, tl.where(exists, float("nan"), 0.0))
        store(out, s.tokens, token + head * 0, head, active, y, S, E)
