"""Attention on a GPU: which tiles, with which arguments. The numbers of sequences stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .attention import Inputs, Tile, attend_kernel, finish_kernel
from .epilogue import Output, Slice
from .launch import OPTIONS, Pipeline, bytes_of, float32, next_power_of_two, on_device, places_of, round_up
from .launch import run as run_pipeline
from .quantize import FORMATS, codes_of
from .row import Rows

SEGMENT = 512  # keys; a place where a sequence is cut, wherever it stands
WORKSPACE = 1 << 29  # bytes of intermediate results, at most, or what one query takes where that is more
PROGRAMS = 1 << 14  # for the segments of a launch, about: a program without one costs little, thousands do


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
    tokens: int | None = None  # of all sequences, where q has
    first: int = 0  # those from here on

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

    def rows(self, part: slice, cols: int) -> Results:
        """Those of some tokens of `cols` columns, a multiple of 128 of them unless they are the last."""
        y, data, scale, zero_point = (
            None if t is None else t[part] for t in (self.y, self.data, None, self.zero_point)
        )
        if self.key is not None and self.scale is not None:
            codes = codes_of(self.key, cols)
            wide = round_up(codes.groups, 4)
            scale = self.scale if codes.per_tensor else self.scale[part]
            if codes.layout == "swizzled":
                scale = self.scale[part.start * wide : round_up(part.stop, 128) * wide]
        return Results(self.key, self.given, self.given_zero, y, data, scale, zero_point)


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


def output_of(r: Results) -> tuple:
    """The arguments of `with_places`: an `Output`, and four strides."""
    y, data = (None if t is None else Rows(bytes_of(t), (t.stride(0),)) for t in (r.y, r.data))
    scale, zero_point = bytes_of(r.scale), r.zero_point
    strides = (t.stride() if t is not None and t.ndim == 2 else (0, 0) for t in (scale, zero_point))
    return Output(y, data, r.given, r.given_zero, scale, zero_point), *next(strides), *next(strides)


NOWHERE = output_of(Results())


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


# --- launches ---


@dataclass
class Plan:
    """What a launch has from its model: all but pointers and numbers that Triton doesn't compile for."""

    kernel: Any  # what its kernels are compiled for
    slice: Slice
    compiled: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str, kernel: Any, grid: tuple[int, int, int], arguments: tuple, warps: int) -> None:
        """Launch `kernel`. What Triton compiled for this plan and name is started without its looking at every argument
        again, which takes several times as long.
        """
        compiled = self.compiled.get(name)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = kernel[grid](*arguments, num_warps=warps, num_stages=2, **OPTIONS)
        if compiled is not None:  # as it is in the interpreter
            self.compiled[name] = compiled


PLANS: dict[tuple, Plan] = {}


def plan_of(
    about: tuple, tensors: tuple[Tensor | None, ...], r: Results, kernel: Callable[[], Any], cols: int, heads: int
) -> Plan:
    """The plan of a launch for `tensors` and `r`, of so many slices of results a token.

    It is another one wherever Triton would compile another kernel: by tensors' dtypes, strides, whether they begin at
    multiples of 16 bytes, and on AMD whether they end within 2 GiB. It isn't by a first dimension (tokens, blocks of a
    cache) or by strides of scales.
    """
    kinds: list = [None if t is None else (*memory(t), t.shape[1:], t.stride()) for t in tensors]
    kinds += [None if t is None else (*memory(t), t.stride(0)) for t in (r.y, r.data)]
    kinds += [None if t is None else memory(t) for t in (r.given, r.given_zero, r.scale, r.zero_point)]
    key = (about, r.key, tensors[0].device, *kinds)  # type: ignore[union-attr]
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= 4096:
            PLANS.clear()
        plan = PLANS[key] = Plan(kernel(), slice_of(r.key, cols, heads))
    return plan


def memory(t: Tensor) -> tuple:
    return t.dtype, t.data_ptr() & 15, torch.version.hip is not None and t.untyped_storage().nbytes() < 1 << 31


def launch(c: Call, r: Results) -> None:
    rows, heads, _ = c.q.shape
    kv_heads, page = c.k.shape[2], c.k.shape[1]
    of_heads = tuple(s is not None and s.shape[0] > 1 for s in (c.k_scale, c.v_scale))
    about = (c.causal, c.window, c.soft_cap != 0, of_heads, c.tables.dtype, c.lengths.dtype, c.starts.dtype)
    tensors = (c.q, c.q_rope, c.k, c.k_rope, c.v, c.sinks, c.k_scale, c.v_scale)
    plan = plan_of(about, tensors, r, lambda: tile_of(c), c.v_cols, heads)
    tile, e = plan.kernel, plan.slice

    count, blocks = c.tables.shape
    most = blocks * page
    x = Inputs(
        strided(c.q), strided(c.q_rope), strided(c.k), strided(c.k_rope), strided(c.v), by_head(c.k_scale),
        by_head(c.v_scale), c.sinks, float32(c.scale), float32(c.soft_cap),
    )  # fmt: skip
    tokens = rows if c.tokens is None else c.tokens
    numbers = (c.starts, c.lengths, c.tables, c.tables.stride(0), count, tokens, c.first, rows, most, c.k.shape[0])
    out = output_of(r)
    parts, segments = kv_heads * tile.parts, -(-most // SEGMENT)
    few, at_once = shares(rows, count, segments, heads * segments * (tile.v_cols + 2) * 4, tile.queries)
    stats = y = None
    if few:
        places = at_once * few * heads * segments
        stats, y = (torch.empty(places * n, dtype=torch.float32, device=c.q.device) for n in (2, tile.v_cols))

    def start() -> None:
        if tokens > few:  # of a slice too, a sequence may have queries before it
            grid = rows // tile.queries + count + (c.first > 0), parts, 1
            arguments: tuple = (x, *numbers, None, None, 0, few, 0, *out, tile, e, False)
            plan.start("attend", attend_kernel, grid, arguments, tile.warps)
        tail = tail_rows(rows, r, e)
        for begin in range(0, count, at_once) if few else (0,):
            end = min(begin + at_once, count) if few else count
            if few:
                grid = end - begin, parts, min(segments, max(1, PROGRAMS // ((end - begin) * parts)))
                arguments = x, *numbers, stats, y, begin, few, segments, *NOWHERE, tile, None, True
                plan.start("share", attend_kernel, grid, arguments, tile.warps)
            if tail:
                grid = tail, -(-heads // tile.merged), 1
                arguments = x, *numbers, stats, y, begin, few, segments, end, *out, tile, e
                plan.start("fold" if few else "finish", finish_kernel, grid, arguments, 4)

    on_device(c.q.device, start)


def strided(x: Tensor | None) -> Rows | None:
    return None if x is None else Rows(bytes_of(x), x.stride()[:-1])


def by_head(scale: Tensor | None) -> Rows | None:
    return None if scale is None else Rows(scale, (int(scale.shape[0] > 1),))


def shares(tokens: int, count: int, segments: int, each: int, queries: int) -> tuple[int, int]:
    """(the most queries of a sequence whose segments are shared out, for how many sequences at once), or zeros.

    each: bytes that a query takes. Queries: as many as there is memory for with all sequences, but no fewer than they
    have on average, and at most those of a tile.
    """
    if segments < 2 or not tokens * count:
        return 0, 0
    room = max(1, WORKSPACE // each)
    few = min(max(-(-tokens // count), room // count), queries, tokens, room)
    return few, min(count, room // few)


def tile_of(c: Call) -> Tile:
    return tile_for(
        c.q.shape[1], c.k.shape[2], c.k.shape[1], c.q.shape[2], 0 if c.q_rope is None else c.q_rope.shape[2], c.v_cols,
        c.v is None, c.q.element_size(), FORMATS[c.k.dtype] if c.k_scale is not None else "", c.causal,
        min(c.window, 2**31 - 1), c.soft_cap != 0,
    )  # fmt: skip


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
    window: int,
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
        rope_cols, rope_block, v_cols, v_block, format, causal, window, capped,
        min(next_power_of_two(heads), max(1, 2048 // v_block)), 8 if wide and not torch.version.hip else 4,
    )  # fmt: skip
