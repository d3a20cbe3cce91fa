"""Linear layers on quantized operands.

    y = round_out(sum_k x_k * w_k + bias)       x = data * scale, w = weight * weight_scale, exactly decoded

Sums are float32 (INT8: int32) within blocks of columns, which the CPU backend adds in float64. There a row of y doesn't
depend on its neighbours, nor on the number of threads or the instruction set; torch's matrix product, which the
reference uses, gives no such promise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    QuantizedActivation,
    QuantKey,
    ScaleLayout,
    formats,
)
from quant.key import FP8, PER_TOKEN

from ._check import FLOATS, check
from ._op import op, refuse_backward, refused
from .quantize import key_inputs

BLOCK = 128  # columns of an activation's group, and side of a weight block, with one scale
KEYS = (
    FP8_STATIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_GROUP_128,
    INT8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_GROUP_128,
)


@op("y")
def _scaled_linear(
    data: Tensor,
    scale: Tensor,
    key: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
):
    x = formats.dequantize(data, scale, QuantKey.from_code(key))
    y = x @ decode_weight(weight, weight_scale).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def decode_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 [N, K] of a weight whose scales are one, [N, 1], or [ceil(N / 128), ceil(K / 128)]."""
    rows, cols = weight.shape
    if weight_scale.ndim == 2 and weight_scale.shape != (rows, 1) and weight_scale.numel() != 1:
        weight_scale = weight_scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return weight.float() * weight_scale


def takes(key: QuantKey) -> bool:
    """Whether there is a product for activations of this key: 8-bit codes, float32 scales, one a row or per 128."""
    return (
        key.dtype in (FP8, torch.int8)
        and key.symmetric
        and key.scale.dtype == torch.float32
        and key.scale.layout == ScaleLayout.ROW_MAJOR
        and (key.per_tensor if key.scale.static else key.scale.group_shape in (PER_TOKEN, (1, BLOCK)))
    )


@_scaled_linear.declares("check")
def _(data, scale, key, weight, weight_scale, bias, out_dtype):
    quant_key = QuantKey.from_code(key)
    if not takes(quant_key):
        raise ValueError(f"scaled_linear: activation is {quant_key}, which no product takes yet")
    sizes = check(
        "scaled_linear",
        data=(data, "... K", quant_key.storage_dtype),
        weight=(weight, "N K", "data"),
        bias=(bias, "N ?", FLOATS),
    )
    rows, cols, out = data.shape[:-1].numel(), sizes["K"], sizes["N"]
    whole, blocks = [[1], [], [1, 1], [out, 1]], [-(-out // BLOCK), -(-cols // BLOCK)]
    grouped = quant_key.scale.group_shape.cols == BLOCK
    expected = [[1], []] if quant_key.scale.static else [[rows, quant_key.groups(cols)]]
    for name, tensor, shapes in (
        ("scale", scale, expected),
        ("weight_scale", weight_scale, [blocks, *whole] if grouped else whole),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"scaled_linear: {name} is {type(tensor).__name__}, expected a Tensor")
        if tensor.dtype != torch.float32:
            raise TypeError(f"scaled_linear: {name} is {tensor.dtype}, expected torch.float32")
        if list(tensor.shape) not in shapes or not tensor.is_contiguous() or tensor.device != data.device:
            raise ValueError(
                f"scaled_linear: {name} is {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}, "
                f"expected contiguous {' or '.join(map(str, shapes))} on {data.device}"
            )
    if out_dtype not in FLOATS:
        raise TypeError(f"scaled_linear: out_dtype is {out_dtype}, expected one of {FLOATS}")


@_scaled_linear.declares("empty")
def _(data, scale, key, weight, weight_scale, bias, out_dtype):
    return data.new_empty((*data.shape[:-1], weight.shape[0]), dtype=out_dtype)


def linear_inputs(tokens: int, cols: int, out: int, key: QuantKey, device: str) -> tuple:
    """(data, scale, key, weight, weight_scale) of normally distributed values, for tests and benchmarks."""
    x = torch.randn(tokens, cols, device=device)
    given = None if key.scale.static is False else key_inputs(key, device)[1]
    data, scale, _ = formats.quantize(x, key, **({} if given is None else {"scale": given}))
    limit = 127 if key.dtype == torch.int8 else 448
    grouped = key.scale.group_shape.cols == BLOCK
    weight = (torch.randn(out, cols, device=device) * limit / 5).clamp(-limit, limit)
    shape = (-(-out // BLOCK), -(-cols // BLOCK)) if grouped else (out, 1)
    return data, scale, key.code, weight.to(key.dtype), torch.rand(shape, device=device) / limit + 1e-3


@_scaled_linear.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in KEYS:
        for tokens, cols, out in (1, 576, 192), (5, 100, 7), (33, 256, 130), (0, 64, 8):
            for dtype in FLOATS:
                bias = torch.randn(out, device=device).to(dtype) if tokens == 5 else None
                yield *linear_inputs(tokens, cols, out, key, device), bias, dtype


@_scaled_linear.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return *linear_inputs(tokens, cols, cols, key, device), None, dtype


def scaled_linear(
    activation: QuantizedActivation,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`y = round_out(sum_k(x_k * w_k) + bias)` of an activation and a weight that are both quantized.

    Args:
        activation: logical shape [..., K]; FP8 or INT8 codes with a static scale, one a token, or one for 1x128 groups.
        weight: [N, K], codes of the activation's format.
        weight_scale: float32: one element, [N, 1], or, with 1x128 activations,
            [ceil(N / 128), ceil(K / 128)].
        bias: [N] bfloat16, float16 or float32.
        out_dtype: bfloat16, float16 or float32.
        out: [..., N] in out_dtype, written instead of a fresh tensor.

    Returns:
        y, [..., N] in out_dtype.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    if not isinstance(activation, QuantizedActivation):
        raise TypeError(f"scaled_linear: activation is {type(activation).__name__}, expected a QuantizedActivation")
    inputs = (activation.data, activation.scale, activation.quant_key.code, weight, weight_scale, bias, out_dtype)
    try:
        if out is None:
            y = _scaled_linear.call(*inputs)
            if y.requires_grad:
                refuse_backward("scaled_linear", y)
            return y
        _scaled_linear.out(*inputs, y_out=out)
    except RuntimeError as error:
        refused(_scaled_linear, inputs, error, {"y_out": out})
        raise
    return out
