"""Around the products of routed experts: which rows are whose, and the sum over a token's experts.

rows sorted by expert -> grouped_scaled_linear -> activation -> grouped_scaled_linear -> out_t = sum_j w_tj * y_tj

An expert that isn't there is an error on the CPU; on a GPU its pairs come behind all others and have position -1, and a
token with a position that isn't there gets NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._check import FLOATS, INDICES, check, check_below
from ._op import invoke, op

MOST = 65536  # experts

# --- sort_by_expert ---


@op("tokens_per_expert rows positions")
def _sort_by_expert(top_k_index: Tensor, num_experts: int):
    flat = top_k_index.reshape(-1).long()
    check_below("sort_by_expert", "top_k_index", flat, num_experts)
    order = flat.argsort(stable=True)
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    rows = order // max(top_k_index.shape[1], 1)
    found = flat.bincount(minlength=num_experts), rows, positions.view(top_k_index.shape)
    return tuple(each.to(torch.int32) for each in found)


@_sort_by_expert.declares("check")
def _(top_k_index, num_experts) -> None:
    check("sort_by_expert", top_k_index=(top_k_index, "T k", INDICES))
    _check_count(num_experts)
    if not 1 <= num_experts <= MOST:
        raise ValueError(f"sort_by_expert: num_experts is {num_experts}, expected 1 to {MOST}")
    if not top_k_index.is_contiguous():
        raise ValueError(f"sort_by_expert: top_k_index has strides {top_k_index.stride()}, expected contiguous memory")


def _check_count(num_experts: Any) -> None:
    """Raise TypeError for what torch would make an int of: True, a tensor."""
    if isinstance(num_experts, bool) or not isinstance(num_experts, (int, torch.SymInt)):
        raise TypeError(f"sort_by_expert: num_experts is {type(num_experts).__name__}, expected an int")


@_sort_by_expert.declares("empty")
def _(top_k_index, num_experts):
    sizes = (num_experts,), (top_k_index.shape[0] * top_k_index.shape[1],), top_k_index.shape
    return tuple(top_k_index.new_empty(size, dtype=torch.int32) for size in sizes)


def chosen(tokens: int, top_k: int, experts: int, device: str) -> Tensor:
    """[tokens, top_k], different experts for each token at random."""
    return torch.rand(tokens, experts, device=device).topk(top_k).indices


SIZES = (7, 2, 5), (1, 8, 8), (33, 1, 4), (0, 2, 3), (64, 8, 128)


@_sort_by_expert.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for tokens, top_k, experts in SIZES:
        for dtype in INDICES:
            yield chosen(tokens, top_k, experts, device).to(dtype), experts


@_sort_by_expert.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return chosen(tokens, 8, 128, device), 128


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of experts for tokens that go to k of them each, as `grouped_scaled_linear` and `sum_experts` read it.

    Pairs of token and expert are sorted by expert; those of an expert keep their order.

    Args:
        top_k_index: int32 or int64 [T, k], contiguous: the experts of each token, 0 to num_experts - 1.
        num_experts: E, 1 to 65,536.

    Returns:
        tokens_per_expert: int32 [E], how many pairs each expert has.
        rows: int32 [T * k], in sorted order the token of each pair.
        positions: int32 [T, k], where each pair is in sorted order.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_count(num_experts)
    return invoke(_sort_by_expert, (top_k_index, num_experts))


# --- sum_experts ---


@op("sum")
def _sum_experts(y: Tensor, positions: Tensor, weights: Tensor):
    check_below("sum_experts", "positions", positions, len(y))
    products = y[positions] * weights.unsqueeze(-1)
    total = y.new_zeros((len(weights), y.shape[1]), dtype=torch.float32)
    for product in products.unbind(1):
        total = total + product.float()
    return total.to(y.dtype)


@_sum_experts.declares("check")
def _(y, positions, weights) -> None:
    check("sum_experts", y=(y, "R N", FLOATS), positions=(positions, "T k", INDICES), weights=(weights, "T k", FLOATS))
    if weights.dtype not in (torch.float32, y.dtype):
        raise TypeError(f"sum_experts: weights is {weights.dtype}, expected torch.float32 or {y.dtype} as y")
    if not positions.is_contiguous():
        raise ValueError(f"sum_experts: positions has strides {positions.stride()}, expected contiguous memory")


@_sum_experts.declares("empty")
def _(y, positions, weights):
    return y.new_empty(len(weights), y.shape[1])


@_sum_experts.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for tokens, top_k, _ in SIZES:
        for cols in 8, 100:
            for dtype in FLOATS:
                positions = torch.randperm(tokens * top_k, device=device).view(tokens, top_k)
                weights = torch.rand(tokens, top_k, device=device)
                yield (
                    torch.randn(tokens * top_k, cols, device=device).to(dtype),
                    positions.to(torch.int32 if cols == 8 else torch.int64),
                    weights if cols == 8 else weights.to(dtype),
                )


@_sum_experts.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    positions = torch.randperm(tokens * 8, device=device).view(tokens, 8)
    return torch.randn(tokens * 8, cols, device=device).to(dtype), positions, torch.rand(tokens, 8, device=device)


def sum_experts(y: Tensor, positions: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`out_t = round_S(sum_j weights_tj * y[positions_tj])`: what a token gets of its experts, added in order of j.

    Sums are float32. A product is rounded to S where the weights are in S, as the model code does, and stays float32
    where they are float32.

    Args:
        y: [R, N] of dtype S (bfloat16, float16, float32), rows of experts.
        positions: int32 or int64 [T, k], contiguous: rows of y, as `sort_by_expert` gives them.
        weights: [T, k] in S or float32.
        out: [T, N] in S, written instead of a fresh tensor.

    Returns:
        [T, N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.

    Source: the sum over experts in transformers' "grouped_mm" and "batched_mm".
    """
    return invoke(_sum_experts, (y, positions, weights), None if out is None else (out,))
