"""Schemes: how a layer's weight and its input are quantized, as data."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.linear import block_key, largest_scale2, quantize_weight
from fused_ops.linear_products import Product, native, product_of

from .. import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantKey,
    formats,
)
from ..key import FP8


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantized.

    input_quant_key: what the layer wants its input to be.
    weight_key: what its weight is, [N, K] in groups along K, or in blocks.
    bounded: the layer has an `input_scale_ub`, which bounds the magnitude behind its input's dynamic FP8 scales.
    """

    input_quant_key: QuantKey
    weight_key: QuantKey
    bounded: bool = False

    def __post_init__(self):
        if self.bounded and not self.input_quant_key.bounded:
            raise ValueError(f"Scheme: bounded is True, {self.input_quant_key} takes no bound")

    @property
    def calibrated(self) -> bool:
        return self.input_quant_key.scale.static or self.input_quant_key.scale2 is not None

    def check(self, cols: int) -> None:
        """Raise ValueError unless rows of K = `cols` can be quantized so."""
        for name, key in ("input", self.input_quant_key), ("weight", self.weight_key):
            if key.scale.dtype != torch.float32 and cols % key.scale.group_shape.cols:
                raise ValueError(f"{name} has {cols} columns, {key} expects a multiple of {key.scale.group_shape.cols}")

    def product(self, arch: str) -> Product:
        """The product that a GPU of this architecture has for it; ValueError where it has none."""
        return product_of(native(self.input_quant_key, arch), native(self.weight_key, arch), arch)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        """The layer's buffers of a weight [N, K]; see `fused_ops.linear.quantize_weight`, and `storable`.

        Raises ValueError where a weight isn't finite.
        """
        if not weight.isfinite().all():
            raise ValueError("weight has values that aren't finite")
        key = self.weight_key
        if key.scale2 is not None:
            scale2 = storable(largest_scale2(weight.abs().amax()))
            data, scale, _ = formats.quantize(weight, key, scale2=scale2)
            return {"weight": data, "weight_scale": scale, "weight_scale2": scale2}
        data, scale, _ = quantize_weight(weight, key)
        return {"weight": data, "weight_scale": scale}

    def calibrate(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """The layer's buffers for inputs that span [low, high]: those of a dynamic key for these two values.

        NVFP4: `input_scale2 = max(amax / (6 * 448), 2^-126)`, as `storable` rounds it.
        """
        key, ends = self.input_quant_key, torch.stack([low, high]).float().reshape(1, 2)
        if key.scale2 is not None:
            return {"input_scale2": storable(largest_scale2(ends.abs().amax()))}
        _, scale, zero_point = formats.quantize(ends, key.with_scale(static=False))
        return {"input_scale": scale} | ({} if zero_point is None else {"input_zero_point": zero_point})


def storable(scale2: Tensor) -> Tensor:
    """NVFP4's second scale as the reciprocal of a float32, at most a step away: files hold its divisor."""
    return 1 / (1 / scale2)


_FP8_CHANNEL, _INT8_CHANNEL = block_key(FP8, 1, -1), block_key(torch.int8, 1, -1)
SCHEMES = {
    "int8_token": Scheme(INT8_DYNAMIC_TOKEN, _INT8_CHANNEL),
    "int8_static": Scheme(INT8_STATIC_TENSOR, _INT8_CHANNEL),
    "int8_static_asym": Scheme(INT8_STATIC_TENSOR_ASYM, _INT8_CHANNEL),
    "fp8_static": Scheme(FP8_STATIC_TENSOR, _FP8_CHANNEL),
    "fp8_token": Scheme(FP8_DYNAMIC_TOKEN, _FP8_CHANNEL),
    "fp8_block": Scheme(FP8_DYNAMIC_GROUP_128, block_key(FP8, 128, 128)),
    "fp8_group64": Scheme(FP8_DYNAMIC_GROUP_64, block_key(FP8, 64, 64)),
    "mxfp8": Scheme(MXFP8, MXFP8),
    "mxfp4": Scheme(MXFP4, MXFP4),
    "nvfp4": Scheme(NVFP4, NVFP4),
}


def served_by(arch: str) -> str:
    """Names of the schemes that a GPU of this architecture has a product for."""
    names = []
    for name, scheme in SCHEMES.items():
        with suppress(ValueError):
            scheme.product(arch)
            names.append(name)
    return ", ".join(names) or "none"
