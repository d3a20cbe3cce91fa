"""The kernel of operations on the heads of q, k and v: load -> norm -> rotate -> store, quantize, write to a cache.

A program has a token and a block of the heads of one tensor (`Part`), [R, C] float32 in registers, of which every value
has been rounded to S where the unfused operations would store a tensor. It is compiled for its parts' stages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import FP8_STATIC_TENSOR

from .._op import NO_KEY
from ..mla import halves
from ..norm import ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE
from ..rope import INTERLEAVED, IS_NEOX, NORM_V, ROUND_PRODUCTS, WHOLE_VECTOR, sections_of
from .activation import one_plus_exp_minus
from .kv_cache import slot_of, write
from .launch import (
    OPTIONS,
    Pipeline,
    bytes_of,
    float32,
    next_power_of_two,
    on_device,
    places_of,
    round_up,
    spread,
    strides_of,
    warps_of,
)
from .launch import run as run_pipeline
from .norm import rstd_of, scaled
from .platform import is_nan, narrow, number, round_to, row_sum, value_of, widen
from .quantize import Codes, codes_of, columns, places_at, quantize
from .rope import Rotation, angles, partner, positions_of, rotate, swapped
from .row import Rows


class Part(NamedTuple):
    """A tensor's heads, what they are multiplied with, and where results go; None: there is no such."""

    x: Rows
    weight: Any = None
    y: Rows | None = None
    data: Rows | None = None  # codes,
    given: Any = None  # what they are scaled by from outside,
    scale: Rows | None = None  # and their scales: the strides of `places_at`, as `number`s
    cache: Rows | None = None
    cache_scale: Rows | None = None


@dataclass(frozen=True)
class Stages:
    heads: int
    cols: int
    block: int  # places of a head, a power of two
    group: int  # columns that share a scale,
    width: int  # and the places they take, which are as many
    rows: int  # heads of a block, a power of two
    first: int  # its first block,
    blocks: int  # and how many it has
    norm: str  # "", "head", "whole": all heads are a row
    flat: int  # places of that row, a power of two
    round_before_weight: bool
    weight_plus_one: bool
    rotation: Rotation | None
    sigmoid: bool
    cache: Codes | None
    codes: Codes | None


@triton.jit
def load_heads(x, token, head, column, valid):
    pointer = x.data + token * x.strides[0] + head * x.strides[1] + column
    return widen(tl.load(pointer, mask=valid, other=0.0))


@triton.jit
def rstd_of_heads(x, held, token, active, eps, K: tl.constexpr):
    """Of each head, or of all, [R, 1] or [1, 1].

    It has the bits of `rms_norm` on rows of that length: `row_sum` reshapes a row to axes of two, in an order that its
    number of places alone gives, and an addition of two values has one result whatever threads hold them. Heads that
    fill their places lie in `held` as they do in the row of all; others are read again, as that row.
    """
    if K.norm == "head":
        return rstd_of(row_sum(held * held), eps, K.cols)
    elif K.block == K.cols:
        row = tl.reshape(held, (1, K.flat))
        return rstd_of(row_sum(row * row), eps, K.heads * K.cols)
    else:
        i = tl.arange(0, K.flat).to(tl.int64)[None, :]
        row = load_heads(x, token, i // K.cols, i % K.cols, active & (i < K.heads * K.cols))
        return rstd_of(row_sum(row * row), eps, K.heads * K.cols)


@triton.jit
def normed(x, rstd, weight, head, column, within, valid, S: tl.constexpr, K: tl.constexpr):
    if K.norm == "whole":
        return scaled(x, rstd, weight, head * K.cols + column, valid, valid, S, K)
    else:
        return scaled(x, rstd, weight, column, within, valid, S, K)


@triton.jit
def load(p, token, active, head, column, within, valid, eps, S: tl.constexpr, K: tl.constexpr):
    """The heads, normed, and where a pair's elements lie apart the other ones: from memory once more, which is the L1
    cache, since each thread reads vectors of both and none has to ask another.
    """
    APART: tl.constexpr = K.rotation is not None and K.rotation.apart
    held = load_heads(p.x, token, head, column, valid)
    if APART:
        across, paired = partner(column, K.rotation), valid & (column < 2 * K.rotation.half)
        other = load_heads(p.x, token, head, across, paired)
    if K.norm != "":
        rstd = rstd_of_heads(p.x, held, token, active, eps, K)
        held = normed(held, rstd, p.weight, head, column, within, valid, S, K)
        if APART:
            other = normed(other, rstd, p.weight, head, across, within, paired, S, K)
    tl.debug_barrier()  # results may lie in the inputs' place, and no thread writes before all have read
    if APART:
        return held, other
    else:
        return held, held


@triton.jit
def sigmoid(x, S: tl.constexpr):
    return round_to(tl.where(is_nan(x), x, tl.div_rn(1.0, one_plus_exp_minus(x, 0.0, S))), S)


@triton.jit
def store(y, token, head, column, valid, x):
    pointer = y.data + token * y.strides[0] + head * y.strides[1] + column
    tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=valid)


@triton.jit
def work(p, block, token, tokens, table, table_stride, place, inside, slot, exists, eps, K: tl.constexpr):
    S: tl.constexpr = p.x.data.dtype.element_ty
    R: tl.constexpr = K.rotation
    active = token < tokens
    if p.y is None and K.codes is None:
        active = active & exists  # it goes into the cache only
    heads = (block - K.first).to(tl.int64) * K.rows + tl.arange(0, K.rows)
    head = heads[:, None]
    column, within = columns(K, 1)
    valid = active & (head < K.heads) & within

    held, other = load(p, token, active, head, column, within, valid, eps, S, K)
    if R is not None:
        if R.half > 0:
            if not R.is_neox:
                other = swapped(other)
            cos, sin = angles(table, table_stride, place, K.block, S, R)
            held = rotate(held, other, column, cos, sin, S, R)
        held = tl.where(valid & ~inside, float("nan"), held)
    if K.sigmoid:
        held = sigmoid(held, S)
    if p.y is not None:
        store(p.y, token, head, column, valid, held)
    if p.cache is not None:
        write(p.cache, p.cache_scale, slot, head, column, valid & exists, held, K)
    if K.codes is not None:
        rows, row = tokens.to(tl.int64) * K.heads, token * K.heads + heads
        codes = None
        if p.data is not None:
            codes = p.data.data + token * p.data.strides[0] + heads * p.data.strides[1]
        scale = None
        if p.scale is not None:
            scale = places_at(p.scale.data, value_of(p.scale.strides[0]), value_of(p.scale.strides[1]), K.codes)
        quantize(held, rows, row, active & (heads < K.heads), codes, p.given, None, scale, None, None, K)


@triton.jit(do_not_specialize=["tokens", "axis_stride", "table_rows", "mapped", "slots"])
def heads_kernel(
    tokens,
    positions,
    axis_stride,
    table,
    table_stride,
    table_rows,
    slot_mapping,
    mapped,
    block_size,
    slots,
    eps,
    parts,
    K: tl.constexpr,
    R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    time, height, width, inside = positions_of(positions, axis_stride, token, tokens, table_rows, R)
    slot, exists = (0, 0), inside
    if slot_mapping is not None:
        slot, exists, known = slot_of(slot_mapping, mapped, token, block_size, slots)
        exists, inside = exists & inside, inside & known
    place = (time, height, width)
    for i in tl.static_range(len(parts)):
        if (block >= K[i].first) & (block < K[i].first + K[i].blocks):
            work(parts[i], block, token, tokens, table, table_stride, place, inside, slot, exists, eps, K[i])


@dataclass
class Call:
    """Arguments of an operation on heads, by the names that all of them have."""

    q: Tensor
    k: Tensor
    positions: Tensor | None
    cos_sin_cache: Tensor
    flags: int
    mrope: int = 0
    v: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float | None = None  # None: there are no norms
    k_cache: Tensor | None = None
    v_cache: Tensor | None = None
    slot_mapping: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    q_key: int = NO_KEY
    q_given: Tensor | None = None
    gate: Tensor | None = None


def mla_call(q_pe, k_pe, kv_c, positions, cos_sin_cache, kv_cache, slot_mapping, kv_scale, flags) -> Call:
    k_cache, v_cache = halves(kv_cache, kv_c.shape[1])
    caches = {"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    k, v = k_pe.unsqueeze(1), kv_c.unsqueeze(1)
    return Call(q_pe, k, positions, cos_sin_cache, flags, v=v, **caches, k_scale=kv_scale, v_scale=kv_scale)


def operation(arguments: list[str]) -> Callable[[tuple, dict[str, Any]], None]:
    """What runs an operation with these arguments."""

    def call(args: tuple, outs: dict[str, Any]) -> None:
        run(Call(**dict(zip(arguments, args, strict=False))), outs)

    def mla(args: tuple, outs: dict[str, Any]) -> None:
        run(mla_call(*args), {"q": outs.get("q_pe")})

    return mla if "q_pe" in arguments else call


def run(c: Call, outs: dict[str, Any]) -> None:
    q_key = NO_KEY if outs.get("q") is outs.get("q_scale") is None else c.q_key
    if q_key != NO_KEY and spread(codes_of(q_key, c.q.shape[2])):  # a rotation needs columns at their own places
        q = c.q.new_empty(c.q.shape)
        run(replace(c, q_key=NO_KEY), outs | {"q": q})
        run_pipeline(Pipeline(q, key=q_key, given=c.q_given, data=outs.get("q"), scale=outs.get("q_scale")))
    else:
        launch(c, q_key, outs)


def launch(c: Call, q_key: int, outs: dict[str, Any]) -> None:
    parts, kernel = parts_of(c, q_key, outs)
    tokens, q_heads, q_cols = c.q.shape
    if not (parts and tokens):
        return
    grid = tokens
    if q_key != NO_KEY and codes_of(q_key, q_cols).layout == "swizzled":
        grid = -(-round_up(tokens * q_heads, 128) // q_heads)  # tokens that there aren't complete the last tile
    positions, table, slots, cache = c.positions, c.cos_sin_cache, c.slot_mapping, c.k_cache
    arguments = {
        "tokens": tokens,
        "positions": positions,
        "axis_stride": 0 if positions is None else positions.stride(0),
        "table": table,
        "table_stride": table.stride(0),
        "table_rows": table.shape[0],
        "slot_mapping": slots,
        "mapped": 0 if slots is None else slots.shape[0],
        "block_size": 1 if cache is None else max(1, cache.shape[1]),
        "slots": 0 if cache is None else cache.shape[0] * cache.shape[1],
        "eps": float32(c.eps),
        "parts": parts,
        "K": kernel,
        "R": rotation_of(c.flags, c.mrope, table.shape[1] // 2),
    }
    blocks = kernel[-1].first + kernel[-1].blocks
    warps = warps_of(max(part.rows * part.block for part in kernel) * c.q.element_size())
    on_device(c.q.device, lambda: heads_kernel[(grid, blocks)](**arguments, num_warps=warps, **OPTIONS))


def parts_of(c: Call, q_key: int, outs: dict[str, Any]) -> tuple[tuple[Part, ...], tuple[Stages, ...]]:
    """The tensors of which something is wanted, and what is done with each."""
    q, q_scale, k, gate = map(outs.get, ("q", "q_scale", "k", "gate"))
    turned = {
        "rotation": rotation_of(c.flags, c.mrope, c.cos_sin_cache.shape[1] // 2),
        "norm": "" if c.eps is None else "whole" if c.flags & WHOLE_VECTOR else "head",
    }
    wanted: list[tuple[Tensor, dict, dict]] = []
    if q_key != NO_KEY:
        codes = codes_of(q_key, c.q.shape[2])
        quantized = {"data": rows_of(bytes_of(q)), "given": c.q_given, "scale": scales_of(q_scale, codes)}
        wanted.append((c.q, {"weight": c.q_weight, **quantized}, {"codes": codes, **turned}))
    elif q is not None:
        wanted.append((c.q, {"weight": c.q_weight, "y": rows_of(q)}, turned))
    if k is not None or c.k_cache is not None:
        written, stage = cache_store(c.k_cache, c.k_scale)
        wanted.append((c.k, {"weight": c.k_weight, "y": rows_of(k), **written}, {**stage, **turned}))
    if c.v is not None:
        written, stage = cache_store(c.v_cache, c.v_scale)
        wanted.append((c.v, written, {**stage, "norm": "head" if c.flags & NORM_V else ""}))
    if gate is not None:
        wanted.append((c.gate, {"y": rows_of(gate)}, {"sigmoid": True}))  # type: ignore[arg-type]

    parts: list[Part] = []
    kernel: list[Stages] = []
    for x, tensors, chosen in wanted:
        _, heads, cols = x.shape
        if heads * cols:
            first = kernel[-1].first + kernel[-1].blocks if kernel else 0
            flags = 0 if tensors.get("weight") is None else c.flags & (ROUND_BEFORE_WEIGHT | WEIGHT_BIAS_ONE)
            parts.append(Part(rows_of(x), **tensors))
            kernel.append(stages(heads, cols, first, flags, **chosen))
    return tuple(parts), tuple(kernel)


def rows_of(heads: Any) -> Any:
    """[T, heads, D], or a cache: all but the last dimension have strides."""
    return None if heads is None else Rows(heads, heads.stride()[:-1])


def scales_of(scale: Tensor | None, codes: Codes) -> Rows | None:
    return None if scale is None else Rows(bytes_of(scale), tuple(map(number, strides_of(scale, codes))))


def cache_store(cache: Tensor | None, scale: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A part's tensors and stage for it."""
    if cache is None:
        return {}, {}
    if scale is None:
        return {"cache": rows_of(cache)}, {}
    by_head = Rows(scale, (int(scale.shape[0] > 1),))
    return {"cache": rows_of(bytes_of(cache)), "cache_scale": by_head}, {"cache": cache_codes(cache.dtype)}


@cache
def cache_codes(dtype: torch.dtype) -> Codes:
    return codes_of(replace(FP8_STATIC_TENSOR, dtype=dtype).code, 1)


@lru_cache(4096)
def rotation_of(flags: int, mrope: int, half: int) -> Rotation:
    sections = tuple(sections_of(mrope)) if mrope else ()
    return Rotation(half, bool(flags & IS_NEOX), bool(flags & ROUND_PRODUCTS), sections, bool(mrope & INTERLEAVED))


@lru_cache(4096)
def stages(
    heads: int,
    cols: int,
    first: int,
    flags: int,
    *,
    norm: str = "",
    rotation: Rotation | None = None,
    sigmoid: bool = False,
    cache: Codes | None = None,
    codes: Codes | None = None,
) -> Stages:
    """How heads are spread over blocks: what a launch looks like follows from these alone."""
    block, group, width = places_of(cols, codes)
    rows = next_power_of_two(heads)
    if norm != "whole":
        rows = min(rows, max(1, 2048 // block))
    return Stages(
        heads,
        cols,
        block,
        group,
        width,
        rows,
        first,
        -(-heads // rows),
        norm,
        next_power_of_two(heads * cols),
        bool(flags & ROUND_BEFORE_WEIGHT),
        bool(flags & WEIGHT_BIAS_ONE),
        rotation,
        sigmoid,
        cache,
        codes,
    )
