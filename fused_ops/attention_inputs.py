"""Arguments of attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quant import QuantKey
from quant.key import FP8, FP8_FNUZ

from ._check import FLOATS
from .attention import _paged_attention
from .kv_cache import CODES
from .mla import _mla_attention

BATCHES = (  # (queries, tokens) of each sequence
    ((1, 1),),
    ((5, 5), (1, 40), (3, 17)),
    ((0, 0), (1, 300), (0, 3), (33, 33)),
    ((2, 258), (1, 16), (7, 513)),
    (),
)


def batch(lengths: Sequence[tuple[int, int]], block_size: int, device: str, spare: int = 3) -> tuple[Tensor, ...]:
    """(block_tables, seq_lens, query_start_loc) of sequences of (queries, tokens), in blocks in random order."""
    counts = [-(-length // block_size) for _, length in lengths]
    blocks = torch.randperm(sum(counts) + spare, device=device)
    tables = torch.full((len(lengths), max([*counts, 0]) + 1), -7, dtype=torch.int32, device=device)
    for row, count, end in zip(tables, counts, torch.tensor([0, *counts]).cumsum(0)[1:].tolist(), strict=True):
        row[:count] = blocks[end - count : end]
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0)
    seq_lens = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    return tables, seq_lens.to(device), starts.to(device, torch.int32)


def blocks_of(lengths: Sequence[tuple[int, int]], block_size: int, spare: int = 3) -> int:
    """How many `batch` spreads its sequences over."""
    return sum(-(-length // block_size) for _, length in lengths) + spare


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None]:
    """(a cache of normally distributed values, its scale)"""
    values = torch.randn(shape, device=device)
    if dtype not in CODES:
        return values.to(dtype), None
    scale = torch.full((1,), 4.0 / 127, device=device)
    codes = values / scale
    return (codes.round().clamp(-128, 127) if dtype == torch.int8 else codes.clamp(-200, 200)).to(dtype), scale


HEADS = (  # heads, kv_heads, head size, that of values
    (4, 2, 64, 64),
    (3, 1, 128, 128),
    (2, 2, 80, 96),
    (8, 1, 256, 256),
    (4, 4, 96, 32),
)


@_paged_attention.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, lengths in enumerate(BATCHES * 3):
        for j, (heads, kv_heads, cols, v_cols) in enumerate(HEADS):
            dtype = FLOATS[(i + j) % 3]
            held = (dtype, FP8, dtype, torch.int8, FP8_FNUZ)[(2 * i + j) % 5]
            block_size = (16, 5, 64, 1)[(i + j) % 4]
            blocks, tokens = blocks_of(lengths, block_size), sum(queries for queries, _ in lengths) + i % 2
            packed = torch.randn(tokens, heads + 2, cols, device=device).to(dtype)
            (k, k_scale), (v, v_scale) = (
                filled((blocks, block_size, kv_heads, c), held, device) for c in (cols, v_cols)
            )
            if i % 3 == 1:  # heads outermost in a block
                k, v = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v))
            if k_scale is not None and j % 2:
                k_scale = torch.rand(kv_heads, device=device) / 16 + 0.01
            sinks = torch.randn(heads, device=device).to(FLOATS[i % 3]) if (i + j) % 4 == 3 else None
            causal = (i + j) % 5 != 4
            window, cap = (0, 7, 100)[i % 3] * causal, (0.0, 30.0)[(i + j) % 3 == 2]
            yield (
                packed[:, :heads], k, v, *batch(lengths, block_size, device), cols**-0.5, causal, window, cap, sinks,
                k_scale, v_scale,
            )  # fmt: skip


@_paged_attention.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    """A prefill of so many tokens."""
    heads, kv_heads, lengths = max(1, cols // 128), max(1, cols // 512), [(tokens, tokens)]
    q = torch.randn(tokens, heads, 128, device=device).to(dtype)
    (k, _), (v, _) = (filled((blocks_of(lengths, 16), 16, kv_heads, 128), dtype, device) for _ in range(2))
    return q, k, v, *batch(lengths, 16, device), 128**-0.5, True, 0, 0.0, None, None, None


LATENTS = (  # heads, nope, rope, rank, v
    (4, 32, 16, 64, 32),
    (2, 128, 64, 512, 128),
    (3, 24, 8, 40, 64),
)


@_mla_attention.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, lengths in enumerate(BATCHES * 2):
        for j, (heads, nope, rope, rank, v_cols) in enumerate(LATENTS):
            dtype = FLOATS[(i + j) % 3]
            held = (dtype, FP8, torch.int8, dtype)[(i + 2 * j) % 4]
            block_size, tokens = (16, 64, 3)[(i + j) % 3], sum(queries for queries, _ in lengths) + i % 2
            q = torch.randn(tokens, heads, nope + rope, device=device).to(dtype)
            kv_b = (torch.randn(heads, nope + v_cols, rank, device=device) * rank**-0.5).to(dtype)
            cache, scale = filled((blocks_of(lengths, block_size), block_size, rank + rope), held, device)
            projections = kv_b[:, :nope], kv_b[:, nope:]
            sequences = batch(lengths, block_size, device)
            yield q[..., :nope], q[..., nope:], cache, *projections, *sequences, (nope + rope) ** -0.5, scale


@_mla_attention.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    heads, lengths = max(1, cols // 128), [(tokens, tokens)]
    q = torch.randn(tokens, heads, 192, device=device).to(dtype)
    kv_b = (torch.randn(heads, 256, 512, device=device) / 32).to(dtype)
    cache, _ = filled((blocks_of(lengths, 16), 16, 576), dtype, device)
    sequences = batch(lengths, 16, device)
    return q[..., :128], q[..., 128:], cache, kv_b[:, :128], kv_b[:, 128:], *sequences, 192**-0.5, None
