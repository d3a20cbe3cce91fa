"""Schemes: how a layer's weight and its input are quantized, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from .. import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    QuantKey,
    formats,
)


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantized.

    input_quant_key: what the layer wants its input to be.
    weight_block: rows and columns of the weight that share a scale; None: the whole row (one scale per channel).
    """

    input_quant_key: QuantKey
    weight_block: int | None = None

    @property
    def calibrated(self) -> bool:
        return self.input_quant_key.scale.static

    def weight_scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        block = self.weight_block
        return (rows, 1) if block is None else (-(-rows // block), -(-cols // block))

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [N, K], float32 scales): `scale = max(amax / 448, 1 / (448 * 512))`, INT8 `max(amax / 127, 2^-23)`.

        Raises ValueError where a weight isn't finite.
        """
        if not weight.isfinite().all():
            raise ValueError("weight has values that aren't finite")
        dtype = self.input_quant_key.dtype
        rows, cols = weight.shape
        high, wide = (1, cols) if self.weight_block is None else (self.weight_block, self.weight_block)
        blocks = pad(weight.float(), (0, -cols % wide, 0, -rows % high))
        blocks = blocks.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # [rows / high, high, cols / wide, wide]
        scale = blocks.abs().amax((1, 3), keepdim=True) / formats.MAX[dtype]
        scale = scale.clamp_min(formats.SMALLEST_SCALE[dtype])
        codes = formats.encode(blocks * (1 / scale), dtype).view(dtype)
        codes = codes.flatten(2, 3).flatten(0, 1)[:rows, :cols].contiguous()
        return codes, scale[:, 0, :, 0].contiguous()


SCHEMES = {
    "int8_token": Scheme(INT8_DYNAMIC_TOKEN),
    "fp8_static": Scheme(FP8_STATIC_TENSOR),
    "fp8_token": Scheme(FP8_DYNAMIC_TOKEN),
    "fp8_block": Scheme(FP8_DYNAMIC_GROUP_128, weight_block=128),
}


def static_scale(amax: Tensor, key: QuantKey) -> Tensor:
    """float32 [1]: the scale of a static key for inputs of this largest magnitude."""
    scale = amax.float() / formats.MAX[key.dtype]
    return scale.clamp_min(formats.SMALLEST_SCALE[key.dtype]).reshape(1)
