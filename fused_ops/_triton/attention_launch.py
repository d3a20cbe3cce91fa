"""Attention on a GPU: which tiles, with which arguments. The numbers of sequences stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .attention import Inputs, Output, Partial, Slice, Tile, attend_kernel, finish_kernel
from .launch import (
    OPTIONS,
    Pipeline,
    bytes_of,
    float32,
    next_power_of_two,
    on_device,
    places,
    places_of,
    round_up,
)
from .launch import run as run_pipeline
from .quantize import FORMATS, codes_of
from .row import Rows
from .sequences import Sequences

LOG2E = 1.4426950408889634
SEGMENT = 512  # keys; a place where a sequence is cut, wherever it stands
WORKSPACE = 1 << 29  # bytes, at most, of segments that are folded by another kernel


@dataclass
class Call:
    """Arguments of attention. q [T, H, D], caches [blocks, page, heads, D]."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    tables: Tensor
    lengths: Tensor
    starts: Tensor
    scale: float
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    q_rope: Tensor | None = None
    k_rope: Tensor | None = None

    @property
    def v_cols(self) -> int:
        return self.k.shape[3] if self.v is None else self.v.shape[3]


@dataclass
class Results:
    """Outputs of [T, H * D]; those that are None aren't computed."""

    key: int | None = None
    given: Tensor | None = None
    given_zero: Tensor | None = None
    y: Tensor | None = None
    data: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None


def quantized_apart(r: Results, cols: int, heads: int) -> bool:
    """Whether a scale is shared by columns of several heads, or groups' columns wouldn't lie side by side."""
    if r.key is None:
        return False
    codes = codes_of(r.key, heads * cols)
    if codes.per_tensor:
        return False
    return cols % codes.group != 0 or (codes.group != cols and next_power_of_two(codes.group) != codes.group)


def slice_of(key: int | None, cols: int, heads: int) -> Slice:
    codes = None if key is None else codes_of(key, heads * cols)
    _, group, width = places_of(cols, codes)
    return Slice(cols, max(16, next_power_of_two(cols)), group, width, codes)


def output_of(r: Results, e: Slice) -> Output:
    y, data = (None if t is None else Rows(bytes_of(t), (t.stride(0),)) for t in (r.y, r.data))
    scale, zero_point = (places(t, e.codes) for t in (r.scale, r.zero_point))
    return Output(y, data, r.given, r.given_zero, scale, zero_point)


def tail_rows(tokens: int, r: Results, e: Slice) -> int:
    """Rows that a launch has for these tokens: those that complete a tile of scales, or at least one for its scale."""
    if e.codes is not None and e.codes.layout == "swizzled" and r.scale is not None:
        return round_up(tokens, 128)
    return max(tokens, 1) if e.codes is not None and e.codes.per_tensor and r.scale is not None else tokens


def quantized(r: Results, like: Tensor, cols: int, direct: Callable[[Results], None]) -> None:
    """Make `r`, slices of `cols` columns, by a launch whose epilogue does, or that makes y, which is quantized then."""
    tokens, heads, _ = like.shape
    if r.data is None and r.scale is None:
        r.key = None
    if not quantized_apart(r, cols, heads):
        return direct(r)
    y = like.new_empty(tokens, heads * cols) if r.y is None else r.y
    direct(Results(y=y))
    rest = {name: getattr(r, name) for name in ("key", "given", "given_zero", "data", "scale", "zero_point")}
    run_pipeline(Pipeline(y, **rest))


def run(args: tuple, r: Results) -> None:
    c = Call(*args)
    quantized(r, c.q, c.v_cols, lambda direct: launch(c, direct))


def operation(name: str, required: int) -> Callable[[tuple, dict[str, Any]], None]:
    """What runs an operation of attention, or its `..._quant`, of which so many inputs come before the key."""
    from .mla import run as run_mla

    attend = run_mla if name.startswith("mla") else run

    def call(args: tuple, outs: dict[str, Any]) -> None:
        key, given, given_zero, *_ = *args[required:], None, None, None
        r = Results(key, given, given_zero, outs.get("y", outs.get("unquantized")))
        r.data, r.scale, r.zero_point = map(outs.get, ("data", "scale", "zero_point"))
        attend(args[:required], r)

    return call


def launch(c: Call, r: Results) -> None:
    tokens, heads, cols = c.q.shape
    kv_heads = c.k.shape[2]
    capped = c.soft_cap != 0
    tile = tile_for(
        heads, kv_heads, c.k.shape[1], cols, 0 if c.q_rope is None else c.q_rope.shape[2], c.v_cols, c.v is None,
        c.q.element_size(), FORMATS[c.k.dtype] if c.k_scale is not None else "", c.causal, c.window > 0, capped,
    )  # fmt: skip
    e = slice_of(r.key, c.v_cols, heads)
    count, blocks = c.tables.shape
    most = blocks * c.k.shape[1]
    s = Sequences(c.starts, c.lengths, c.tables, c.tables.stride(0), count, tokens, most, c.k.shape[0])
    inputs = Inputs(
        strided(c.q),
        strided(c.q_rope),
        strided(c.k),
        strided(c.k_rope),
        strided(c.v),
        by_head(c.k_scale),
        by_head(c.v_scale),
        c.sinks,
        min(c.window, 2**31 - 1),
        float32(c.scale / c.soft_cap if capped else c.scale * LOG2E),
        float32(c.soft_cap * LOG2E),
    )
    partial = partial_of(c, tile, -(-most // tile.segment))
    few = 0 if partial is None else partial.few
    arguments = {"x": inputs, "s": s, "few": few, "partial": partial, "out": output_of(r, e), "K": tile, "E": e}
    options = {"num_warps": tile.warps, "num_stages": 2, **OPTIONS}
    parts = kv_heads * tile.parts

    def start() -> None:
        if tokens > few:
            attend_kernel[(tokens // tile.queries + count, parts)](**arguments, SPLIT=False, **options)
        if partial is not None:
            attend_kernel[(count, parts, partial.segments)](**arguments, SPLIT=True, **options)
        rows = tail_rows(tokens, r, e)
        if rows:
            finish_kernel[(rows, -(-heads // tile.merged))](**arguments, num_warps=4, **OPTIONS)

    on_device(c.q.device, start)


def strided(x: Tensor | None) -> Rows | None:
    return None if x is None else Rows(bytes_of(x), x.stride()[:-1])


def by_head(scale: Tensor | None) -> Rows | None:
    return None if scale is None else Rows(scale, (int(scale.shape[0] > 1),))


def partial_of(c: Call, tile: Tile, segments: int) -> Partial | None:
    """Memory for the segments of sequences of few queries, where there may be several; how few follows from shapes."""
    tokens, count = c.q.shape[0], c.tables.shape[0]
    if segments < 2 or segments > 65535 or not count * tokens:
        return None
    each = count * tile.heads * segments * (tile.v_cols + 2) * 4
    few = min(tile.queries, tokens, WORKSPACE // each)
    if not few:
        return None
    rows = count * few * tile.heads * segments
    stats, acc = (torch.empty(rows * n, dtype=torch.float32, device=c.q.device) for n in (2, tile.v_cols))
    return Partial(stats, acc, few, segments)


@lru_cache(4096)
def tile_for(
    heads: int,
    kv_heads: int,
    page: int,
    cols: int,
    rope_cols: int,
    v_cols: int,
    latent: bool,
    element: int,
    format: str,
    causal: bool,
    windowed: bool,
    capped: bool,
) -> Tile:
    """The one place where a launch is decided, by what a model has, never by a batch."""
    block, v_block, rope_block = (max(16, next_power_of_two(n)) for n in (cols, v_cols, rope_cols))
    wide = max(block, v_block) > 128
    rows = 16 if element == 4 else 32 if latent and wide else 64
    keys = (16 if wide else 32) if element == 4 or (latent and wide) else 32 if wide else 64
    ratio = heads // kv_heads
    shared = min(rows, next_power_of_two(ratio))
    return Tile(
        heads, ratio, -(-ratio // shared), shared, rows // shared, rows, keys, SEGMENT, max(1, page), cols, block,
        rope_cols, rope_block, v_cols, v_block, format, causal, windowed, capped,
        min(next_power_of_two(heads), max(1, 2048 // v_block)), 8 if wide and not torch.version.hip else 4,
    )  # fmt: skip
