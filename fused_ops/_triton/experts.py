"""Around the products of routed experts: a stable counting sort, and the sum over a token's experts.

The host reads no numbers, so an index may be anything: a pair of an expert that isn't there comes behind all others and
has no place, and a token that has no place gets NaN.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import OPTIONS, next_power_of_two, on_device, rows_of
from .platform import at, narrow, round_to, widen

EXPERTS, PAIRS = tl.constexpr(4), tl.constexpr(1024)  # that a program has, and that it looks at at a time


@triton.jit
def experts_at(index, first, pairs, experts: tl.constexpr):
    """Numbers of pairs from `first` on and the expert of each, `experts` of those that aren't there; -1: no pair."""
    pair = first + tl.arange(0, PAIRS)
    expert = tl.load(index + pair, mask=pair < pairs, other=0)
    expert = tl.where((expert >= 0) & (expert < experts), expert, experts)
    return pair, tl.where(pair < pairs, expert, -1)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(index, pairs, tokens_per_expert, experts: tl.constexpr):
    mine = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, pairs, PAIRS):
        _, expert = experts_at(index, first, pairs, experts)
        count += tl.sum((expert[None, :] == mine[:, None]).to(tl.int32), axis=1)
    tl.store(tokens_per_expert + mine, count, mask=mine < experts)


@triton.jit(do_not_specialize=["pairs"])
def place_kernel(index, pairs, tokens_per_expert, rows, positions, experts: tl.constexpr, TOP_K: tl.constexpr):
    """rows [pairs] and positions (Rows) of all pairs; those before an expert's are counted."""
    mine = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    place = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, experts, PAIRS):
        other = first + tl.arange(0, PAIRS)
        count = tl.load(tokens_per_expert + other, mask=other < experts, other=0)
        place += tl.sum(tl.where(other[None, :] < mine[:, None], count[None, :], 0), axis=1)
    for first in range(0, pairs, PAIRS):
        pair, expert = experts_at(index, first, pairs, experts)
        there = expert[None, :] == mine[:, None]
        found = place[:, None] + tl.cumsum(there.to(tl.int32), axis=1) - 1
        token = (pair // TOP_K)[None, :] + found * 0
        if rows is not None:
            tl.store(rows + found, token, mask=there)
        if positions is not None:
            pointer = positions.data + (token * positions.strides[0] + (pair % TOP_K)[None, :])
            tl.store(pointer, tl.where(mine[:, None] < experts, found, -1), mask=there)
        place += tl.sum(there.to(tl.int32), axis=1)


def sort_by_expert(args: tuple, outs: dict[str, Any]) -> None:
    index, experts = args
    pairs = index.numel()
    count = outs.get("tokens_per_expert")
    if count is None:
        count = index.new_empty(experts, dtype=torch.int32)
    rows, positions = outs.get("rows"), outs.get("positions")
    if positions is not None:
        _, (positions,) = rows_of(positions)

    def start() -> None:
        count_kernel[(-(-experts // EXPERTS.value),)](index, pairs, count, experts, **OPTIONS)
        if pairs and not (rows is positions is None):
            grid = (-(-(experts + 1) // EXPERTS.value),)
            place_kernel[grid](index, pairs, count, rows, positions, experts, index.shape[1], **OPTIONS)

    on_device(index.device, start)


# --- the sum ---


@dataclass(frozen=True)
class Sum:
    """A kernel is compiled for it."""

    cols: int
    block: int  # of them, a power of two
    top_k: int


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(y, rows, positions, weights, out, K: tl.constexpr):
    S: tl.constexpr = y.data.dtype.element_ty
    W: tl.constexpr = weights.data.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * K.block + tl.arange(0, K.block)[None, :]
    within = column < K.cols
    total = tl.zeros((1, K.block), tl.float32)
    for j in range(K.top_k):
        position = tl.load(positions + token * K.top_k + j).to(tl.int64)
        exists = (position >= 0) & (position < rows)
        pointer = at(y, (), tl.where(exists, position, 0))[:, None] + column
        held = widen(tl.load(pointer, mask=exists[:, None] & within, other=float("nan")))
        weight = widen(tl.load(at(weights, (), token) + j))
        total += round_to(held * weight[:, None], W)
    tl.store(at(out, (), token)[:, None] + column, narrow(total, S), mask=within)


def sum_experts(args: tuple, outs: dict[str, Any]) -> None:
    y, positions, weights = args
    (tokens, top_k), cols = weights.shape, y.shape[1]
    total = outs.get("sum")
    if total is None or not total.numel():
        return
    k = Sum(cols, min(1024, next_power_of_two(cols)), top_k)
    tensors = [rows_of(t)[1][0] for t in (y, weights, total)]
    grid = tokens, -(-cols // k.block)

    def start() -> None:
        sum_kernel[grid](tensors[0], y.shape[0], positions, tensors[1], tensors[2], k, num_warps=4, **OPTIONS)

    on_device(y.device, start)
