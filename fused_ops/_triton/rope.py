"""Rotary position embedding: a block of heads of a token, of q or of k."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..rope import IS_NEOX, ROUND_PRODUCTS
from .launch import OPTIONS, next_power_of_two, on_device, warps_of
from .platform import narrow, round_to, widen
from .row import Rows


@dataclass(frozen=True)
class Heads:
    head_dim: int
    half: int  # of the columns that are rotated,
    places: int  # the next power of two,
    rest: int  # and that of the columns that pass
    block: int  # heads of a block, a power of two
    is_neox: bool
    round_products: bool


@triton.jit
def product(a, b, S: tl.constexpr, K: tl.constexpr):
    if K.round_products:
        return round_to(a * b, S)
    else:
        return a * b


@triton.jit
def store(pointer, x, within):
    tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=within)


@triton.jit
def rotate(x, out, heads, token, first, cos, sin, K: tl.constexpr):
    """y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin."""
    S: tl.constexpr = x.data.dtype.element_ty
    head = (first + tl.arange(0, K.block))[:, None]
    source = x.data + token * x.strides[0] + head.to(tl.int64) * x.strides[1]
    target = out.data + token * out.strides[0] + head.to(tl.int64) * out.strides[1]

    i = tl.arange(0, K.places)[None, :]
    pair = tl.arange(0, 2 * K.places)[None, :]
    within = (head < heads) & (i < K.half)
    if K.is_neox:
        x1 = widen(tl.load(source + i, mask=within, other=0.0))
        x2 = widen(tl.load(source + K.half + i, mask=within, other=0.0))
    else:
        both = widen(tl.load(source + pair, mask=(head < heads) & (pair < 2 * K.half), other=0.0))
        x1, x2 = tl.split(tl.reshape(both, (K.block, K.places, 2)))
    y1 = round_to(product(x1, cos, S, K) - product(x2, sin, S, K), S)
    y2 = round_to(product(x2, cos, S, K) + product(x1, sin, S, K), S)
    if K.is_neox:
        store(target + i, y1, within)
        store(target + K.half + i, y2, within)
    else:
        both = tl.reshape(tl.join(y1, y2), (K.block, 2 * K.places))
        store(target + pair, both, (head < heads) & (pair < 2 * K.half))

    if K.head_dim > 2 * K.half:
        rest = 2 * K.half + tl.arange(0, K.rest)[None, :]
        within = (head < heads) & (rest < K.head_dim)
        tl.store(target + rest, tl.load(source + rest, mask=within), mask=within)


@triton.jit(do_not_specialize=["table_rows", "q_heads", "k_heads", "q_blocks"])
def rope_kernel(
    q, q_out, q_heads, k, k_out, k_heads, q_blocks, positions, table, table_stride, table_rows, K: tl.constexpr
):
    S: tl.constexpr = q.data.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    position = token
    if positions is not None:
        position = tl.load(positions + token).to(tl.int64)
    i = tl.arange(0, K.places)[None, :]
    # A position outside the table is read from nowhere, and what it rotates is NaN.
    within = i < tl.where((position >= 0) & (position < table_rows), K.half, 0)
    cos = tl.load(table + position * table_stride + i, mask=within, other=float("nan"))
    sin = tl.load(table + position * table_stride + K.half + i, mask=within, other=float("nan"))
    if K.round_products:
        cos, sin = round_to(cos, S), round_to(sin, S)
    block = tl.program_id(1)
    if block < q_blocks:
        if q_out is not None:
            rotate(q, q_out, q_heads, token, block * K.block, cos, sin, K)
    else:
        if k_out is not None:
            rotate(k, k_out, k_heads, token, (block - q_blocks) * K.block, cos, sin, K)


@lru_cache(4096)
def kernel_of(head_dim: int, half: int, heads: int, is_neox: bool, round_products: bool) -> Heads:
    places, rest = next_power_of_two(half), next_power_of_two(head_dim - 2 * half)
    block = min(next_power_of_two(heads), max(1, 1024 // places))
    return Heads(head_dim, half, places, rest, block, is_neox, round_products)


def rope(args: tuple, outs: dict[str, Any]) -> None:
    q, k, positions, table, flags, _ = args
    is_neox, round_products = bool(flags & IS_NEOX), bool(flags & ROUND_PRODUCTS)
    tokens, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], table.shape[1] // 2
    kernel = kernel_of(head_dim, half, max(q_heads, k_heads), is_neox, round_products)
    block = kernel.block
    q_blocks, k_blocks = -(-q_heads // block), -(-k_heads // block)
    if not (tokens and q_blocks + k_blocks and outs):
        return
    q_rows, q_out, k_rows, k_out = (heads_of(t) for t in (q, outs.get("q"), k, outs.get("k")))
    arguments = {
        "q": q_rows,
        "q_out": q_out,
        "q_heads": q_heads,
        "k": k_rows,
        "k_out": k_out,
        "k_heads": k_heads,
        "q_blocks": q_blocks,
        "positions": positions,
        "table": table,
        "table_stride": table.stride(0),
        "table_rows": table.shape[0],
        "K": kernel,
    }
    warps = warps_of(2 * block * kernel.places * q.element_size())
    on_device(q.device, lambda: rope_kernel[(tokens, q_blocks + k_blocks)](**arguments, num_warps=warps, **OPTIONS))


def heads_of(tensor: Tensor | None) -> Rows | None:
    return None if tensor is None else Rows(tensor, tensor.stride()[:2])
