"""Products of experts on a GPU: which tiles, with which arguments. The numbers of experts' rows stay where they are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant import QuantKey

from ..linear import INFERRED, weight_key_of
from . import TILE
from .grouped_linear import Operand, Product, Scales, grouped_kernel
from .launch import OPTIONS, bytes_of, on_device, rows_of
from .platform import number
from .quantize import FORMATS, LAYOUTS, SCALES
from .row import Rows


def grouped_scaled_linear(args: tuple, outs: dict[str, Any]) -> None:
    y = outs.get("y")
    if y is not None and y.numel():
        launch(y, *args)


def launch(
    y: Tensor, data: Tensor, scale: Tensor, key: int, weight: Tensor, weight_scale: Tensor, tokens_per_expert: Tensor,
    rows: Tensor | None, bias: Tensor | None, _: torch.dtype, scale2: Tensor | None = None,
    zero_point: Tensor | None = None, code: int = INFERRED, weight_scale2: Tensor | None = None,
) -> None:  # fmt: skip
    w_key = weight_key_of(weight[0], weight_scale[0], code)
    apart = rows is None and data.ndim == 3
    k = product_of(QuantKey.from_code(key), w_key, *weight.shape[:2], data.shape[-1], apart)
    most, x_rows = y.shape[-2], data.shape[:-1].numel()
    # There are no more, whatever the numbers are.
    tiles = k.experts * -(-most // k.rows) if apart else most // k.rows + min(k.experts, most)
    x_sizes, (x,) = rows_of(bytes_of(data))
    y_sizes, (to,) = rows_of(y)
    arguments = (
        x, x_sizes, scales_of(scale), scales_of(zero_point), scale2, x_rows, Rows(bytes_of(weight),
        weight.stride()[:2]), scales_of(weight_scale, stacked=True), stacked(weight_scale2), stacked(bias),
        tokens_per_expert, rows, to, y_sizes, most, k,
    )  # fmt: skip
    grid = tiles, -(-k.outs // k.tile)
    on_device(data.device, lambda: grouped_kernel[grid](*arguments, num_warps=k.warps, num_stages=2, **OPTIONS))


def stacked(tensor: Tensor | None) -> Rows | None:
    return None if tensor is None else Rows(tensor, tensor.stride()[:1])


def scales_of(scale: Tensor | None, stacked: bool = False) -> Scales | None:
    if scale is None:
        return None
    expert, *rest = scale.stride() if stacked else (0, *scale.stride())
    row, column = rest if len(rest) == 2 else (0, 0)
    return Scales(bytes_of(scale), expert, number(row), number(column))


@lru_cache(4096)
def product_of(x: QuantKey, w: QuantKey, experts: int, outs: int, columns: int, apart: bool) -> Product:
    """The one place where a launch is decided, by what a model has, never by a batch."""
    cols = columns * x.packing
    a, b = operand_of(x, cols), operand_of(w, cols)
    groups = [o.group for o in (a, b) if o.group and not o.in_values]
    block = min(groups, default=0)
    chunk = min(128 if a.format == b.format == "int8" else 64, block or 128)
    return Product(a, b, experts, cols, chunk, block, outs, 64, TILE, apart, 4 if torch.version.hip else 8)


def operand_of(key: QuantKey, cols: int) -> Operand:
    scale = key.scale
    high, group = (max(0, size) for size in scale.group_shape)
    return Operand(
        FORMATS[key.dtype],
        key.packing,
        SCALES.get(scale.dtype, "float32"),
        scale.dtype != torch.float32,
        high,
        group,
        key.groups(cols),
        LAYOUTS.get(scale.layout, "plain"),
    )
