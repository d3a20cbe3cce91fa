"""Linear layers on quantized operands.

    y = round_out(sum_k x_k * w_k + bias)       x and w exactly what `quant.formats.dequantize` means

Sums are float32 (INT8 times INT8: int32) within blocks of columns, which the CPU backend adds in float64. There a row
of y doesn't depend on its neighbours, nor on the number of threads or the instruction set; torch's matrix product,
which the reference uses, gives no such promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant import MXFP4, MXFP8, NVFP4, QuantizedActivation, QuantKey, ScaleDesc, ScaleLayout, formats
from quant.key import FP4, FP8, FP8_FNUZ, PER_TENSOR, PER_TOKEN, GroupShape

from ._check import FLOATS, check
from ._gradient import refuse_backward, refuse_backward_of
from ._op import op, refused
from .quantize import case_keys, key_inputs

GROUPS = (32, 64, 128, 256, 512)  # columns that may share a float32 scale
BLOCKS = (128, 64)  # sides of the blocks of a weight that may
ONE_BYTE = (torch.int8, FP8, FP8_FNUZ)  # formats that go with them
INFERRED = -1  # instead of the weight's key, where its dtype and the shape of its scale say all of it


@op("y")
def _scaled_linear(
    data: Tensor,
    scale: Tensor,
    key: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    weight_code: int = INFERRED,
    weight_scale2: Tensor | None = None,
    weight_sums: Tensor | None = None,
):
    for zero in [] if zero_point is None else zero_point.flatten().tolist():
        if not -128 <= zero <= 127:
            raise ValueError(f"scaled_linear: zero_point has {zero}, expected -128 to 127")
    x = formats.dequantize(data, scale, QuantKey.from_code(key), scale2=scale2, zero_point=zero_point)
    y = x @ decode_weight(weight, weight_scale, weight_key_of(weight, weight_scale, weight_code), weight_scale2).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


# --- weights ---


def block_key(dtype: torch.dtype, rows: int, cols: int) -> QuantKey:
    """The key of a weight with one float32 scale for so many rows and columns; -1 is all of them."""
    return QuantKey(dtype, ScaleDesc(torch.float32, True, GroupShape(rows, cols)))


def quantize_weight(weight: Tensor, key: QuantKey) -> tuple[Tensor, Tensor, Tensor | None]:
    """(data, scale, scale2) of a weight [N, K], as `quant.formats.quantize` makes them; scale2 by `largest_scale2`."""
    if key.scale.dtype != torch.float32:
        scale2 = None if key.scale2 is None else largest_scale2(weight.abs().amax())
        data, scale, _ = formats.quantize(weight, key, scale2=scale2)
        return data, scale, scale2
    rows, cols = weight.shape
    high, wide = (size if n == -1 else n for size, n in zip((rows, cols), key.scale.group_shape, strict=True))
    blocks = pad(weight.float(), (0, -cols % wide, 0, -rows % high)).unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    blocks = blocks.transpose(1, 2)  # [N / high, K / wide, high, wide]
    token = QuantKey(key.dtype, ScaleDesc(torch.float32, False, PER_TOKEN, key.scale.power_of_two))
    data, scale, _ = formats.quantize(blocks.flatten(2), token)
    data = data.unflatten(2, (high, wide)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[:rows, :cols]
    return data.contiguous(), scale.view(1) if key.per_tensor else scale.view(blocks.shape[:2]), None


def decode_weight(
    weight: Tensor, weight_scale: Tensor, key: QuantKey | None = None, scale2: Tensor | None = None
) -> Tensor:
    """float32 [N, K] of a weight that `scaled_linear` takes; its key may be inferred as there."""
    key = weight_key_of(weight, weight_scale, INFERRED) if key is None else key
    if key.scale.group_shape.rows <= 1:
        return formats.dequantize(weight, weight_scale, key, scale2=scale2)
    return weight.float() * _spread(weight_scale, weight.shape, key)


def exact_values(
    data: Tensor, scale: Tensor, key: QuantKey, scale2: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """float64 [..., N] of an activation or a weight, without any rounding, which `dequantize` does to float32."""
    values = formats.decode(data, key.dtype).double()
    shape = values.shape[:-1].numel(), values.shape[-1]
    values = values.reshape(shape)
    if zero_point is not None:
        values = values - _spread(zero_point, shape, key)
    values = values * _spread(scale, shape, key).double()
    return (values if scale2 is None else values * scale2.double()).unflatten(0, data.shape[:-1])


def _spread(scale: Tensor, shape: Sequence[int], key: QuantKey) -> Tensor:
    """The scale of each element of [rows, cols]."""
    (rows, cols), (high, wide) = shape, key.scale.group_shape
    if high > 1:
        scale = scale.repeat_interleave(high, 0)[:rows]
    else:
        scale = formats.logical(scale, rows, key.groups(cols), key.scale)
    return scale.repeat_interleave(wide, 1)[:, :cols] if wide > 1 else scale


def largest_scale2(amax: Tensor) -> Tensor:
    """float32 [1]: NVFP4's `scale2 = max(amax / (6 * 448), 2^-126)` for a tensor of this largest magnitude."""
    return formats.divide(amax.float().reshape(1), formats.MAX[FP4] * formats.MAX[FP8]).clamp_min(2.0**-126)


def weight_key_of(weight: Tensor, weight_scale: Tensor, code: int) -> QuantKey:
    """The key that the code, or else the dtypes and the shape of the scale, means."""
    if code != INFERRED:
        return QuantKey.from_code(code)
    for key in MXFP8, MXFP4, NVFP4:
        if (weight.dtype, weight_scale.dtype) == (key.storage_dtype, key.scale.dtype):
            return key if weight_scale.ndim != 1 else key.with_scale(layout=ScaleLayout.SWIZZLED_128X4)
    if weight.dtype not in ONE_BYTE:
        raise TypeError(_no_product("weight", f"{weight.dtype} with {weight_scale.dtype}"))
    groups = [PER_TENSOR, PER_TOKEN, *(GroupShape(side, side) for side in BLOCKS)]
    shapes = [scale_shape(weight.shape, group) for group in groups]
    shape = list(weight_scale.shape) if weight_scale.numel() != 1 else shapes[0]
    if shape not in shapes:
        expected = " or ".join(map(str, [[1], *shapes[1:]]))
        raise ValueError(f"scaled_linear: weight_scale is {shape}, expected {expected}, or a weight_key")
    return block_key(weight.dtype, *groups[shapes.index(shape)])


def scale_shape(shape: Sequence[int], group: GroupShape) -> list[int]:
    """Rows and columns of the scales of a weight of this shape."""
    return [1 if n == -1 else -(-size // n) for size, n in zip(shape, group, strict=True)]


def weight_code_of(weight_key: Any, weight: Any, weight_scale: Any) -> int:
    """The code of a weight's key, as kernels take it; None is inferred."""
    if weight_key is None:
        return INFERRED
    if type(weight_key) is not QuantKey:
        raise TypeError(f"scaled_linear: weight_key is {type(weight_key).__name__}, expected a QuantKey")
    if weight_key.code < 0:
        _check_blocks(weight, weight_scale, weight_key)
    return weight_key.code


def _check_blocks(weight: Any, weight_scale: Any, key: QuantKey) -> None:
    """Kernels take no code of a key whose groups span rows: they infer it, and here is checked that this is right."""
    group = key.scale.group_shape
    square = group in [(side, side) for side in BLOCKS]
    if not (square and key.dtype in ONE_BYTE and key.symmetric and not key.scale.layout):
        raise ValueError(_no_product("weight_key", key))
    if not (isinstance(weight, Tensor) and isinstance(weight_scale, Tensor) and weight.ndim == 2):
        return  # the operation says what is wrong
    _check_storage(weight, key)
    if list(weight_scale.shape) != (expected := scale_shape(weight.shape, group)):
        raise ValueError(f"scaled_linear: weight_scale is {list(weight_scale.shape)}, expected {expected}")


# --- checks ---


def _no_product(name: str, what: Any) -> str:
    return f"scaled_linear: {name} is {what}, which no product takes"


def _check_storage(weight: Tensor, key: QuantKey) -> None:
    if weight.dtype != key.storage_dtype:
        raise TypeError(f"scaled_linear: weight is {weight.dtype}, expected {key.storage_dtype} of {key}")


def takes(key: QuantKey, weight: bool = False) -> bool:
    """Whether there is a product of activations, or of weights, of this key."""
    known = key.scale.dtype != torch.float32 or key.scale.group_shape.cols in (-1, *GROUPS)
    if weight:
        return known and key.symmetric and key.scale.layout in (ScaleLayout.ROW_MAJOR, ScaleLayout.SWIZZLED_128X4)
    return known and (key.per_tensor or not key.scale.static)


def _check_scales(key: QuantKey, rows: int, cols: int, device: torch.device, **tensors: Any) -> None:
    """Raise unless the scale, scale2 and zero point, by the names of the arguments, are what the key says."""
    group, blocks = key.scale.group_shape, key.scale.group_shape.rows > 1
    if cols == 0 or (key.scale.dtype != torch.float32 and cols % group.cols):
        raise ValueError(f"scaled_linear: K is {cols}, {key} expects a multiple of {max(group.cols, 1)}")
    if blocks:  # of a weight: as many rows, which may be apart
        rows, key = -(-rows // group.rows), key.with_scale(group_shape=GroupShape(1, group.cols))
    _, scale, zero_point = formats.empty((rows, cols), key.with_scale(static=False), "meta")
    scale2 = None if key.scale2 is None else torch.empty(1, device="meta")
    for (name, tensor), want in zip(tensors.items(), (scale, scale2, zero_point), strict=False):
        if want is None:
            if tensor is not None:
                raise ValueError(f"scaled_linear: {name} is given, but {key} takes none")
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"scaled_linear: {name} is {type(tensor).__name__}, {key} takes a Tensor")
        for got, expected in (tensor.dtype, want.dtype), (tensor.layout, want.layout):
            if got != expected:
                raise TypeError(f"scaled_linear: {name} is {got}, expected {expected}")
        if want is scale2 or key.per_tensor:
            right = tensor.numel() == 1
        else:
            right = tensor.shape == want.shape and all(
                size <= 1 or got == stride or (blocks and got > stride > 1)
                for size, got, stride in zip(tensor.shape, tensor.stride(), want.stride(), strict=True)
            )
        if not right or tensor.device != device:
            raise ValueError(
                f"scaled_linear: {name} is {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}, "
                f"expected {list(want.shape)} with strides {want.stride()} on {device}"
            )


@_scaled_linear.declares("check")
def _(
    data, scale, key, weight, weight_scale, bias, out_dtype, scale2=None, zero_point=None, weight_code=INFERRED,
    weight_scale2=None, weight_sums=None,
):  # fmt: skip
    if key < 0:
        raise ValueError("scaled_linear: activation has groups that span rows, as only a weight's do")
    x_key = QuantKey.from_code(key)
    if not takes(x_key):
        raise ValueError(_no_product("activation", x_key))
    codes = (*ONE_BYTE, torch.uint8)
    sizes = check("scaled_linear", data=(data, "... K", x_key.storage_dtype), weight=(weight, "N columns", codes))
    cols = sizes["K"] * x_key.packing
    _check_scales(x_key, data.shape[:-1].numel(), cols, data.device, scale=scale, scale2=scale2, zero_point=zero_point)
    if not isinstance(weight_scale, Tensor):
        raise TypeError(f"scaled_linear: weight_scale is {type(weight_scale).__name__}, expected a Tensor")
    w_key = weight_key_of(weight, weight_scale, weight_code)
    if not takes(w_key, weight=True):
        raise ValueError(_no_product("weight", w_key))
    rows = weight.shape[0]
    _check_storage(weight, w_key)
    if sizes["columns"] * w_key.packing != cols:
        raise ValueError(
            f"scaled_linear: weight is {list(weight.shape)} of {w_key}, expected [N, {cols // w_key.packing}]"
        )
    _check_scales(w_key, rows, cols, data.device, weight_scale=weight_scale, weight_scale2=weight_scale2)
    if weight_sums is not None and x_key.symmetric:
        raise ValueError(f"scaled_linear: weight_sums is given, but {x_key} has no zero points")
    check(
        "scaled_linear",
        data=(data, "... K", data.dtype),
        weight=(weight, "N columns", codes),
        bias=(bias, "N ?", FLOATS),
        weight_sums=(weight_sums, "N ?", torch.int32),
    )
    if out_dtype not in FLOATS:
        raise TypeError(f"scaled_linear: out_dtype is {out_dtype!r}, expected one of {FLOATS}")


@_scaled_linear.declares("empty")
def _(data, scale, key, weight, weight_scale, bias, out_dtype, *optional):
    return data.new_empty((*data.shape[:-1], weight.shape[0]), dtype=out_dtype)


# --- examples ---


def usual_weight(key: QuantKey) -> QuantKey:
    """The key of the weight that an activation of this key usually meets."""
    if key.scale.dtype != torch.float32:
        return key.with_scale(layout=ScaleLayout.ROW_MAJOR)
    group = key.scale.group_shape.cols
    return block_key(key.dtype, *((group, group) if group in BLOCKS else PER_TOKEN))


def linear_inputs(
    tokens: int, cols: int, out: int, key: QuantKey, device: str, weight: QuantKey | None = None
) -> tuple[QuantizedActivation, Tensor, Tensor, Tensor | None]:
    """(activation, weight, weight_scale, weight_scale2) of normally distributed values, for tests and benchmarks."""
    _, given, *zero_point = key_inputs(key, device)
    name = "scale2" if key.scale2 else "scale"
    options = {} if given is None else {name: given}
    x = torch.randn(tokens, cols, device=device)
    data, scale, zero = formats.quantize(x, key, **options, zero_point=zero_point[0] if zero_point else None)
    activation = QuantizedActivation(data, scale, key, torch.bfloat16, options.get("scale2"), zero)
    return activation, *quantize_weight(torch.randn(out, cols, device=device), weight or usual_weight(key))


def linear_arguments(inputs: tuple, *others: Any) -> tuple:
    """Arguments of the operation from `linear_inputs`; others: the required ones behind the weight's."""
    x, weight, weight_scale, weight_scale2 = inputs
    required = (x.data, x.scale, x.quant_key.code, weight, weight_scale, *others)
    plain = x.scale2 is x.zero_point is weight_scale2 is None
    return required if plain else (*required, x.scale2, x.zero_point, INFERRED, weight_scale2)


@_scaled_linear.declares("cases")
def _(device: str) -> Iterator[tuple]:
    dtypes = cycle(FLOATS)
    for key in filter(takes, case_keys()):
        for tokens, cols, out in (1, 576, 192), (5, 160, 7), (33, 256, 130), (0, 64, 8):
            dtype = next(dtypes)
            bias = torch.randn(out, device=device).to(dtype) if tokens == 5 else None
            yield linear_arguments(linear_inputs(tokens, cols, out, key, device), bias, dtype)


@_scaled_linear.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return linear_arguments(linear_inputs(tokens, cols, cols, key, device), None, dtype)


# --- the public function ---


def scaled_linear(
    activation: QuantizedActivation,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    weight_key: QuantKey | None = None,
    weight_scale2: Tensor | None = None,
    weight_sums: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`y = round_out(sum_k(x_k * w_k) + bias)` of an activation and a weight that are both quantized.

    On a GPU by torch's products, and FlashInfer's where torch has none (`fused_ops.linear_products`), of operands laid
    out as a `QuantLinear` asks for and stores them; others are refused. FlashInfer's, and ROCm's of MX formats, make
    bfloat16 and float16 only, and round before they add a bias (ROCm's not where both are bfloat16).

    Args:
        activation: logical shape [..., K], of any key and layout; float32 scales of groups of 32, 64, 128, 256 or 512
            columns, rows, or the tensor; zero points within [-128, 127].
        weight: [N, K] INT8 or FP8 (e4m3fn, e4m3fnuz) codes, or uint8 [N, K // 2] of FP4 (the low nibble is the even
            column); its format may be another than the activation's.
        weight_scale: float32: one element, [N, 1], or [ceil(N / b), ceil(K / b)] for blocks of b = 128 or 64; else
            what `weight_key` says.
        bias: [N] bfloat16, float16 or float32.
        out_dtype: bfloat16, float16 or float32.
        weight_key: what the weight is, as `quant.formats.quantize` makes it of rows of K, with row-major or swizzled
            scales: MXFP8, MXFP4, NVFP4, float32 scales of rows or of groups; or (b, b) blocks as above. None: INT8 or
            FP8 with float32 scales of whatever their shape means.
        weight_scale2: float32, one element: NVFP4's second scale.
        weight_sums: int32 [N], `weight.sum(1)`: what a GPU's product of INT8 with zero points needs, a CPU's doesn't.
        out: [..., N] in out_dtype, written instead of a fresh tensor.

    Returns:
        y, [..., N] in out_dtype.

    Raises:
        TypeError, ValueError: an argument is not as above, or K is no multiple of an MX or NVFP4 group; nothing is
            written.
    """
    if not isinstance(activation, QuantizedActivation):
        raise TypeError(f"scaled_linear: activation is {type(activation).__name__}, expected a QuantizedActivation")
    x = activation
    if weight_key is weight_scale2 is weight_sums is out is x.scale2 is x.zero_point is None:
        try:
            y = _scaled_linear.call(x.data, x.scale, x.quant_key.code, weight, weight_scale, bias, out_dtype)
        except RuntimeError as error:
            refused(_scaled_linear, (x.data, x.scale, x.quant_key.code, weight, weight_scale, bias, out_dtype), error)
            raise
        if y.requires_grad:
            refuse_backward("scaled_linear", y)
        return y
    inputs = (x.data, x.scale, x.quant_key.code, weight, weight_scale, bias, out_dtype)
    return _write(inputs, x.scale2, x.zero_point, weight_key, (weight_scale2, weight_sums), out)


def _write(
    inputs: tuple, scale2: Any, zero_point: Any, weight_key: Any, of_weight: tuple, out: Tensor | None
) -> Tensor:
    """Run the `out` overload, which alone takes what is seldom given: each argument costs every call 0.2 us."""
    data, _, _, weight, weight_scale, _, out_dtype = inputs
    args = (*inputs, scale2, zero_point, weight_code_of(weight_key, weight, weight_scale), *of_weight)
    try:
        if out is None:
            if not (isinstance(data, Tensor) and isinstance(weight, Tensor) and weight.ndim and out_dtype in FLOATS):
                _scaled_linear.check(*args)  # which raises
            y: Any = _scaled_linear.empty(*inputs)
        else:
            y = out
        _scaled_linear.out(*args, y_out=y)
    except RuntimeError as error:
        refused(_scaled_linear, args, error, {"y_out": out})
        raise
    refuse_backward_of("scaled_linear", args, (y,))
    return y
