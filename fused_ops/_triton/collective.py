"""Rows that are summed over ranks: a load stage, before any of the others.

Memory, flags and the order of steps are those of csrc/cuda/collective.cuh, which says why they are enough.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import cuda, hip

from .platform import INTERPRETED, at, narrow, round_to, value_of, widen
from .quantize import PLACES, columns, places_at
from .row import Stages, work

# Of a Mailbox, in bytes.
CALLS, ARRIVED, FAILED, BROKEN, CALL, FLAGS, MAILBOX = map(tl.constexpr, (0, 4, 8, 12, 128, 256, 33024))
MAX_BLOCKS, MAX_RANKS = tl.constexpr(64), tl.constexpr(16)
TIMED_OUT, OTHER_CALL, GIVEN_UP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FAILURE_CALL, FAILURE_THEIRS = tl.constexpr(16), tl.constexpr(80)


class Ranks(NamedTuple):
    """`Ranks` of csrc/cuda/stages.h; own: this rank's memory. All but addresses come to a kernel as `number`s."""

    memory: tuple
    own: int
    rank: int
    blocks: int
    slot_bytes: int
    begin: int
    end: int
    share: int
    all: int
    limit: int
    call: tuple
    called: int
    failure: int


@dataclass(frozen=True)
class RankStages:
    row: Stages
    ranks: int
    lanes: int  # a power of two
    two_shot: bool  # each rank sums some of the columns for all
    scattered: bool  # a rank works on its own rows alone
    pitch: int  # elements from row to row of a slot
    share: int  # columns that a rank sums for all
    amd: bool


@triton.jit
def at_address(address, T: tl.constexpr):
    return address.to(tl.pointer_type(T))


@triton.jit
def with_values(r):
    """The same, but for the words of the call, which are seldom read. There are fewer than 2^31 rows."""
    begin, end = value_of(r.begin).to(tl.int32), value_of(r.end).to(tl.int32)
    share, all = value_of(r.share).to(tl.int32), value_of(r.all).to(tl.int32)
    rank, blocks = value_of(r.rank).to(tl.int32), value_of(r.blocks).to(tl.int32)
    slot_bytes, limit, called = value_of(r.slot_bytes), value_of(r.limit), value_of(r.called).to(tl.int32)
    return Ranks(r.memory, r.own, rank, blocks, slot_bytes, begin, end, share, all, limit, r.call, called, r.failure)


@triton.jit
def nanoseconds(polls, AMD: tl.constexpr):
    if INTERPRETED:
        return polls * 100000
    elif AMD:
        return hip.memrealtime() * 10  # of a clock of 100 MHz
    else:
        return cuda.globaltimer()


@triton.jit
def memory_of(ranks, lane, E: tl.constexpr):
    """The address of each lane's rank's memory."""
    RANKS: tl.constexpr = E.ranks
    address = lane.to(tl.int64) * 0
    for p in tl.static_range(RANKS):
        address = tl.where(lane == p, ranks.memory[p], address)
    return address


@triton.jit
def copy_call(source, target):
    word = tl.arange(0, 8) * 8
    tl.store(at_address(target + word, tl.int64), tl.load(at_address(source + word, tl.int64), volatile=True))


@triton.jit
def give_up(ranks, reason, rank, number, E: tl.constexpr):
    """Tells the host, once, and every rank that this one's workspace is of no use any more."""
    if tl.atomic_xchg(at_address(ranks.own + FAILED, tl.int32), 1, sem="relaxed", scope="gpu") == 0:
        tl.store(at_address(ranks.failure + 8, tl.int64), rank.to(tl.int64))
        for i in tl.static_range(8):
            tl.store(at_address(ranks.failure + FAILURE_CALL + 8 * i, tl.int64), value_of(ranks.call[i]))
        lane = tl.arange(0, E.lanes)
        if reason == OTHER_CALL:
            theirs = tl.sum(tl.where(lane == rank, memory_of(ranks, lane, E), 0))
            copy_call(theirs + CALL + (number & 1) * 64, ranks.failure + FAILURE_THEIRS)
        tl.debug_barrier()
        tl.atomic_xchg(at_address(ranks.failure, tl.int64), reason.to(tl.int64), sem="release", scope="sys")
        broken = at_address(memory_of(ranks, lane, E) + BROKEN, tl.int32)
        tl.atomic_xchg(broken, ranks.rank + 1 + lane * 0, mask=lane < E.ranks, sem="relaxed", scope="sys")


@triton.jit
def begin_call(ranks, E: tl.constexpr):
    """This call's number, and whether the workspace is still of use. The last block to ask counts the call."""
    number = tl.load(at_address(ranks.own + CALLS, tl.int32), volatile=True) + 1
    broken = tl.atomic_add(at_address(ranks.own + BROKEN, tl.int32), 0, sem="relaxed", scope="sys")
    tl.debug_barrier()
    if broken != 0:
        give_up(ranks, tl.full((), GIVEN_UP, tl.int32), broken - 1, number, E)
    else:
        for i in tl.static_range(8):
            tl.store(at_address(ranks.own + CALL + (number & 1) * 64 + 8 * i, tl.int64), value_of(ranks.call[i]))
    arrived = at_address(ranks.own + ARRIVED, tl.int32)
    if tl.atomic_add(arrived, 1, sem="relaxed", scope="gpu") == ranks.blocks - 1:
        tl.store(arrived, 0)
        tl.store(at_address(ranks.own + CALLS, tl.int32), number)
    return number, broken == 0


@triton.jit
def exchange(ranks, number, STEP: tl.constexpr, E: tl.constexpr):
    """Waits for this block of every rank, which then sees what this one wrote. Whether all came."""
    tl.debug_barrier()
    lane = tl.arange(0, E.lanes)
    others = lane < E.ranks
    expected = (number.to(tl.int64) << 32 | ranks.called) + lane.to(tl.int64) * 0
    line = FLAGS + (((number & 1) * 2 + STEP) * MAX_BLOCKS + tl.program_id(0)) * (MAX_RANKS * 8)
    theirs = at_address(memory_of(ranks, lane, E) + line + ranks.rank * 8, tl.int64)
    mine = at_address(ranks.own + line + lane * 8, tl.int64)
    tl.atomic_xchg(theirs, expected, mask=others, sem="release", scope="sys")
    polls = tl.full((), 0, tl.int64)
    begin = nanoseconds(polls, E.amd)
    waiting = tl.full((), 1, tl.int32)
    reason = tl.full((), 0, tl.int32)
    while (waiting != 0) & (reason == 0):
        found = tl.atomic_add(mine, tl.zeros_like(expected), mask=others, sem="acquire", scope="sys")
        apart = others & (found != expected)
        waiting = tl.max(apart.to(tl.int32), axis=0)
        if waiting != 0:
            polls += 1
            other_call = apart & ((found >> 32) == number)
            rank = tl.min(tl.where(apart, lane, E.lanes), axis=0)
            broken = tl.atomic_add(at_address(ranks.own + BROKEN, tl.int32), 0, sem="relaxed", scope="sys")
            if tl.max(other_call.to(tl.int32), axis=0) != 0:
                reason += OTHER_CALL
                rank = tl.min(tl.where(other_call, lane, E.lanes), axis=0)
            elif broken != 0:
                reason += GIVEN_UP
                rank = broken - 1
            elif nanoseconds(polls, E.amd) - begin > ranks.limit:
                reason += TIMED_OUT
            if reason != 0:
                give_up(ranks, reason, rank, number, E)
    tl.debug_barrier()
    return reason == 0


@triton.jit
def slot_rows(address, number, place, ranks, S: tl.constexpr, E: tl.constexpr):
    """Pointers to rows of a rank's slot."""
    slot = at_address(address + MAILBOX + (number & 1) * ranks.slot_bytes, S)
    return (tl.multiple_of(slot, 16) + place * E.pitch)[:, None]


@triton.jit
def summed(ranks, number, place, column, valid, S: tl.constexpr, E: tl.constexpr):
    """float32 sum of a row of all ranks, in their order."""
    RANKS: tl.constexpr = E.ranks
    total = widen(tl.load(slot_rows(ranks.memory[0], number, place, ranks, S, E) + column, mask=valid, other=0.0))
    for p in tl.static_range(1, RANKS):
        part = tl.load(slot_rows(ranks.memory[p], number, place, ranks, S, E) + column, mask=valid, other=0.0)
        total += widen(part)
    return total


@triton.jit
def publish(x, x_sizes, ranks, number, row, column, within, S: tl.constexpr, E: tl.constexpr):
    """This rank's rows to its slot; scattered: those of this number for every rank."""
    RANKS: tl.constexpr = E.ranks if E.scattered else 1
    place = row - ranks.begin
    for to in tl.static_range(RANKS):
        source, valid = row, (row < ranks.end)[:, None] & within
        if E.scattered:
            source = to * ranks.share + row
            valid = valid & (source < ranks.all)[:, None]
        held = tl.load(at(x, x_sizes, source)[:, None] + column, mask=valid, other=0.0)
        to_place = place + to * (ranks.end - ranks.begin)
        tl.store(slot_rows(ranks.own, number, to_place, ranks, S, E) + column, held, mask=valid)


@triton.jit
def sum_share(ranks, number, row, column, within, S: tl.constexpr, K: tl.constexpr, E: tl.constexpr):
    """This rank's columns, over what only this rank reads of its slot."""
    place = row - ranks.begin
    valid = (row < ranks.end)[:, None] & within & (column // E.share == ranks.rank)
    total = narrow(summed(ranks, number, place, column, valid, S, E), S)
    tl.store(slot_rows(ranks.own, number, place, ranks, S, E) + column, total, mask=valid)


@triton.jit
def shares(ranks, number, place, column, valid, S: tl.constexpr, E: tl.constexpr):
    """Each column from the rank that summed it."""
    RANKS: tl.constexpr = E.ranks
    held = column * 0.0 + place[:, None] * 0.0
    for p in tl.static_range(RANKS):
        mine = valid & (column // E.share == p)
        part = tl.load(slot_rows(ranks.memory[p], number, place, ranks, S, E) + column, mask=mine, other=0.0)
        held = tl.where(mine, widen(part), held)
    return held


@triton.jit(do_not_specialize=["rows", "last", *PLACES])
def rank_kernel(
    rows,
    sizes,
    x,
    x_sizes,
    other,
    x_multiplier,
    weight,
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
    ranks,
    last,
    K: tl.constexpr,
    E: tl.constexpr,
):
    S: tl.constexpr = x.data.dtype.element_ty
    scales, zero_points = scale, zero_point
    if scale is not None:
        scales = places_at(scale, scale_row, scale_column, K.codes)
    if zero_point is not None:
        zero_points = places_at(zero_point, zero_row, zero_column, K.codes)
    ranks = with_values(ranks)
    column, within = columns(K, 1)
    first = tl.program_id(0).to(tl.int64) * K.rows + ranks.begin
    step = ranks.blocks.to(tl.int64) * K.rows
    number, came = begin_call(ranks, E)
    if came:
        for start in range(first, ranks.end, step):
            publish(x, x_sizes, ranks, number, start + tl.arange(0, K.rows), column, within, S, E)
        came = exchange(ranks, number, 0, E)
    if E.two_shot:  # noqa: SIM102
        if came:
            for start in range(first, ranks.end, step):
                sum_share(ranks, number, start + tl.arange(0, K.rows), column, within, S, K, E)
            came = exchange(ranks, number, 1, E)
    for start in range(first, last, step):
        row = start + tl.arange(0, K.rows)
        active = (row < rows) & (row < ranks.end)
        valid = active[:, None] & within
        place = row - ranks.begin
        if E.scattered:
            place += ranks.rank * (ranks.end - ranks.begin)
        if E.two_shot:
            held = shares(ranks, number, place, column, valid, S, E)
        else:
            held = round_to(summed(ranks, number, place, column, valid, S, E), S)
        held = tl.where(valid, tl.where(came, held, float("nan")), 0.0)
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
            None,
            None,
            weight,
            None,
            eps,
            residual,
            y,
            data,
            given,
            given_zero,
            scales,
            zero_points,
            None,
            S,
            K,
        )
