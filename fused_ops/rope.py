"""Rotary position embedding.

    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin        in float32, every product and sum rounded (no fma), then once to S

(x1, x2) are the halves of the first `rotary_dim` elements of a head (NeoX), or its even and odd ones (interleaved,
GPT-J); the rest of the head passes. `round_products=True` rounds cos, sin, products and sums to S, as eager model
code does.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, eq. 34.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._check import FLOATS, INDICES, boolean, check
from ._op import invoke, op


@op("q k")
def _rope(q: Tensor, k: Tensor, positions: Tensor | None, cos_sin_cache: Tensor, is_neox: bool, round_products: bool):
    rows = cos_sin_cache if positions is None else cos_sin_cache[positions]
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    return tuple(_rotate(x, cos, sin, is_neox, round_products) for x in (q, k))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool, round_products: bool) -> Tensor:
    half = cos.shape[-1]
    dtype = x.dtype if round_products else torch.float32
    first, second = (
        (slice(0, half), slice(half, 2 * half)) if is_neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    x1, x2, cos, sin = (t.to(dtype) for t in (x[..., first], x[..., second], cos, sin))
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., first] = x1 * cos - x2 * sin
    y[..., second] = x2 * cos + x1 * sin
    return y


@_rope.declares("check")
def _(q, k, positions, cos_sin_cache, is_neox, round_products):
    sizes = check(
        "rope",
        q=(q, "T H D", FLOATS),
        k=(k, "T K D", "q"),
        positions=(positions, "T ?", INDICES),
        cos_sin_cache=(cos_sin_cache, "P R", torch.float32),
    )
    boolean("rope", is_neox=is_neox, round_products=round_products)
    rows, rotary_dim = cos_sin_cache.shape
    if rotary_dim % 2 or rotary_dim > sizes["D"]:
        raise ValueError(f"rope: cos_sin_cache has {rotary_dim} columns, expected an even number up to {sizes['D']}")
    if positions is None:
        if rows != sizes["T"]:
            raise ValueError(
                f"rope: cos_sin_cache has {rows} rows, expected {sizes['T']}, one a token, without positions"
            )
    elif positions.device.type == "cpu" and not isinstance(positions, FakeTensor) and positions.numel():
        low, high = (int(v) for v in positions.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"rope: positions has {low if low < 0 else high}, expected 0 to {rows - 1}")


@_rope.declares("empty")
def _(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rope_inputs(tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype, device) -> tuple:
    """q, k cut out of one packed projection, positions and a cos_sin_cache, for tests and benchmarks."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angles = torch.arange(4096, device=device)[:, None] * frequencies
    return q, k, torch.randint(0, 4096, (tokens,), device=device), torch.cat([angles.cos(), angles.sin()], dim=-1)


@_rope.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for tokens, heads, kv_heads, dim, rotary_dim in (
        (1, 9, 3, 64, 64),
        (4, 4, 1, 128, 64),
        (33, 2, 2, 128, 96),
        (5, 3, 1, 80, 80),
        (0, 2, 1, 64, 64),
        (3, 1, 1, 10, 6),
    ):
        for dtype in FLOATS:
            inputs = rope_inputs(tokens, heads, kv_heads, dim, rotary_dim, dtype, device)
            for is_neox in True, False:
                yield *inputs, is_neox, not is_neox
                yield *inputs[:2], None, inputs[3][:tokens], is_neox, is_neox


@_rope.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return *rope_inputs(tokens, cols // 128, max(1, cols // 512), 128, 128, dtype, device), True, False


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    is_neox: bool = True,
    round_products: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions; see the module for the formula.

    Args:
        q: [T, heads, D] bfloat16, float16 or float32 (S); k: [T, kv_heads, D] in S. Views of a packed qkv pass.
        positions: [T] int64 or int32, rows of `cos_sin_cache`; None: the cache's rows are this call's [T, rotary_dim].
        cos_sin_cache: float32 [max_position, rotary_dim], cosines, then sines; rotary_dim is even and at most D.
        is_neox: halves (NeoX), or interleaved pairs (GPT-J).
        round_products: round cos, sin, products and sums to S.
        out: (q, k) written instead of fresh tensors; may be the inputs.

    Returns:
        (q, k) rotated, contiguous, in S.

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a position is outside the cache; nothing
            is written.
    """
    inputs = (q, k, positions, cos_sin_cache, is_neox, round_products)
    if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 2):
        raise TypeError(f"rope: out is {type(out).__name__}, expected (q, k)")
    return invoke(_rope, inputs, None if out is None else tuple(out))
