"""Row pipelines on a GPU: which kernel, with which arguments.

What is launched follows from row length, dtype and key alone, never from the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import MAX_COLS
from .long_row import long_row_kernel
from .platform import number
from .quantize import PLACES, Codes, codes_of
from .row import Rows, Stages, row_kernel

ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE = 1, 2
PART = 8192  # places of a row that is longer than a block holds
# numerics: a product and a sum are two roundings
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@dataclass
class Pipeline:
    """Arguments of a row operation. Outputs that are None aren't computed."""

    x: Tensor
    load: str = "copy"
    other: Tensor | None = None  # the residual, of "add" or after the post norm; up, of gated loads
    x_multiplier: float = 1.0
    round_activation: bool = False
    alpha: float | None = None
    limit: float | None = None
    tokens_per_expert: Tensor | None = None

    post_weight: Tensor | None = None
    post_eps: float | None = None  # None: there is no such norm
    norm: str = ""
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float | None = None
    flags: int = 0

    key: int | None = None
    given: Tensor | None = None
    given_zero: Tensor | None = None

    residual: Tensor | None = None
    y: Tensor | None = None
    data: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    tensor_amax: Tensor | None = None

    @property
    def cols(self) -> int:
        cols = self.x.shape[-1]
        return cols // 2 if self.load == "swiglu_oai" and self.other is None else cols


def launch(p: Pipeline) -> None:
    kernel, warps = kernel_of(p)
    rows = p.x.shape[:-1].numel()
    blocks = -(-rows_with_padding(kernel.codes, rows, p.scale) // kernel.rows)
    if not blocks:
        return
    sizes, (x, other, residual, y, data) = rows_of(p.x, p.other, p.residual, p.y, bytes_of(p.data))
    arguments = {
        "rows": rows,
        "sizes": sizes,
        "x": x,
        "other": other,
        "alpha": float32(p.alpha),
        "limit": float32(p.limit),
        "tokens_per_expert": p.tokens_per_expert,
        "rows_per_expert": 0 if p.tokens_per_expert is None else p.x.shape[1],
        "post_weight": p.post_weight,
        "post_eps": float32(p.post_eps),
        "bias": p.bias,
        "residual": residual,
        "y": y,
        "data": data,
        "tensor_amax": p.tensor_amax,
        "K": kernel,
        **arguments_of(p, kernel),
    }
    function = row_kernel if p.cols <= MAX_COLS else long_row_kernel
    on_device(p.x.device, lambda: function[(blocks,)](**arguments, num_warps=warps, **OPTIONS))


def run(p: Pipeline, launch_loading: Callable[[Pipeline], None] = launch) -> None:
    """Launch it, in two passes where a stage needs all that the one before it makes.

    launch_loading: launches what loads the rows, alone or before another pass.
    """
    if p.data is p.scale is p.zero_point is None:
        p.key = None
    if p.key is None:
        return launch_loading(p)
    codes = codes_of(p.key, p.cols)
    one_scale = codes.per_tensor and not codes.static
    normed = bool(p.norm) or p.post_eps is not None
    # In other places, a row would have other sums.
    if not (one_scale or (normed and moved(codes, p.cols))):
        return launch_loading(p)
    if one_scale:
        p.tensor_amax = torch.zeros(1, dtype=torch.int32, device=p.x.device)
    plain = p.load == "copy" and not normed
    if p.y is None and not plain:
        shape = p.x.shape if p.data is None else p.data.shape
        p.y = p.x.new_empty((*shape[:-1], p.cols))
    second = Pipeline(
        p.x if plain else p.y,  # type: ignore[arg-type]
        tokens_per_expert=p.tokens_per_expert,
        key=p.key,
        given=p.given,
        given_zero=p.given_zero,
        data=p.data,
        scale=p.scale,
        zero_point=p.zero_point,
        tensor_amax=p.tensor_amax,
    )
    launch_loading(replace(p, key=None, data=None, scale=None, zero_point=None))
    launch(second)


def kernel_of(p: Pipeline) -> tuple[Stages, int]:
    y_cols = p.cols if p.y is None else p.y.shape[-1]
    flags = 0 if p.weight is p.post_weight is None else p.flags
    return stages(
        p.cols, y_cols, p.x.element_size(), p.load, p.round_activation, p.post_eps is not None, p.norm, flags, p.key
    )


def rows_with_padding(codes: Codes | None, rows: int, scale: Tensor | None) -> int:
    """As many as a kernel goes over: those that complete a layout too, and one where it writes a tensor's scale."""
    if codes is not None and codes.layout == "swizzled":
        return round_up(rows, 128)
    return max(rows, 1) if codes is not None and codes.per_tensor and scale is not None else rows


def arguments_of(p: Pipeline, kernel: Stages) -> dict[str, Any]:
    """What kernels of rows take that isn't rows."""
    return {
        "x_multiplier": None if p.x_multiplier == 1.0 else float32(p.x_multiplier),
        "weight": p.weight,
        "eps": float32(p.eps),
        "given": p.given,
        "given_zero": p.given_zero,
        "scale": bytes_of(p.scale),
        "zero_point": p.zero_point,
        **dict(zip(PLACES, (*strides_of(p.scale, kernel.codes), *strides_of(p.zero_point, kernel.codes)), strict=True)),
    }


def on_device(device: torch.device, start: Any) -> None:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        start()
    else:
        with torch.cuda.device(device):
            start()


def float32(value: float | None) -> float | None:
    """As C++ converts it: out of range is infinite."""
    return None if value is None else c_float(value).value


def bytes_of(tensor: Tensor | None) -> Tensor | None:
    """One-byte elements as uint8: which eight-bit floats Triton knows depends on the target."""
    return tensor if tensor is None or tensor.element_size() > 1 else tensor.view(torch.uint8)


def rows_of(*tensors: Tensor | None) -> tuple[tuple[int, ...], list[Rows | None]]:
    """The leading sizes that the tensors share, merged where all their strides allow, but the first, as `number`s; and
    each tensor as `Rows`.
    """
    shape = next(t.shape for t in tensors if t is not None)
    strides = [t.stride() for t in tensors if t is not None]
    dims: list[int] = []  # the last dimension of each merged run
    sizes: list[int] = []
    for d, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        if dims and all(s[dims[-1]] == size * s[d] for s in strides):
            dims[-1] = d
            sizes[-1] *= size
        else:
            dims.append(d)
            sizes.append(size)
    # One row has the stride of many: Triton compiles for what strides are divisible by.
    found = [None if t is None else Rows(t, tuple(map(t.stride().__getitem__, dims)) or t.shape[-1:]) for t in tensors]
    return tuple(map(number, sizes[1:])), found


def strides_of(tensor: Tensor | None, codes: Codes | None) -> tuple[int, int]:
    """Those of scales or zero points, as `PLACES` has them; zeros where the layout says where they are."""
    if tensor is None or codes is None or codes.per_tensor or codes.layout == "swizzled":
        return 0, 0
    row, column = tensor.stride()
    return row, column


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache(4096)
def stages(
    cols: int,
    y_cols: int,
    element: int,
    load: str,
    round_activation: bool,
    post: bool,
    norm: str,
    flags: int,
    key: int | None,
) -> tuple[Stages, int]:
    """The kernel for these, and its warps; the one place where a launch is decided."""
    codes = None if key is None else codes_of(key, cols)
    block, group, width = places_of(cols, codes)
    return Stages(
        cols,
        y_cols,
        block,
        group,
        width,
        max(1, 1024 // (block * element)),
        load,
        round_activation,
        post,
        norm,
        bool(flags & ROUND_BEFORE_WEIGHT),
        bool(flags & WEIGHT_BIAS_ONE),
        codes,
    ), warps_of(block * element)


def places_of(cols: int, codes: Codes | None) -> tuple[int, int, int]:
    """How many places a row, or a part of a long one, takes, a power of two; the columns of a group, and the places it
    takes.
    """
    group = cols if codes is None or codes.per_tensor else codes.group
    if cols > MAX_COLS:
        group = PART if group == cols else group
        width = next_power_of_two(group)
        return max(PART, width), group, width
    width = next_power_of_two(group)
    block = next_power_of_two(-(-cols // group)) * width
    return block, width if width == block else group, width


def spread(codes: Codes) -> bool:
    """Whether groups, which aren't a power of two, take more places than they have columns."""
    return codes.groups > 1 and next_power_of_two(codes.group) != codes.group


def moved(codes: Codes, cols: int) -> bool:
    """Whether columns have other places than without a key."""
    return spread(codes) or places_of(cols, codes)[0] != places_of(cols, None)[0]


def warps_of(size: int) -> int:
    """Warps for a block of so many bytes: a thread loads 16 at once, two to four times."""
    threads = 32
    while threads < 1024 and size > 16 * threads * (2 if threads < 256 else 4):
        threads *= 2
    return max(1, threads // (64 if torch.version.hip else 32))
