"""Quantization on its own, and what every operation that ends in one shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant import NAMED_KEYS, QuantizedActivation, QuantKey, formats

from ._check import FLOATS, check, check_key
from ._op import Op, op, refused

# Kernels take one tensor from outside, whichever the key asks for: `given` is the scale of a static key, scale2 of
# NVFP4, and the upper bound of the amax (scale_ub) of a dynamic FP8 key.


def quantized(y: Tensor, code: int, given: Tensor | None, zero_point: Tensor | None) -> tuple:
    """The reference of every `..._quant`: (data, scale, zero_point, unquantized) of `y`."""
    key = QuantKey.from_code(code)
    given_name = "scale2" if key.scale2 else "scale" if key.scale.static else "scale_ub"
    data, scale, zero = formats.quantize(y, key, zero_point=zero_point, **{given_name: given})
    static = key.scale.static
    return data, scale.reshape(1).clone() if static else scale, None if static else zero, y


def empty_quantized(y: Tensor, code: int) -> tuple:
    """Uninitialized (data, scale, zero_point, unquantized) for an unquantized result like `y`."""
    key = QuantKey.from_code(code)
    data, scale, zero_point = formats.empty(y.shape, key, y.device)
    scale = y.new_empty(1, dtype=torch.float32) if scale is None else scale
    return data, scale, zero_point, y.new_empty(y.shape)


@op("data scale zero_point unquantized", returns=2)
def _quantize(x: Tensor, key: int, given: Tensor | None, zero_point: Tensor | None = None):
    return quantized(x, key, given, zero_point)


@_quantize.declares("check")
def _(x, key, given, zero_point=None):
    sizes = check("quantize", x=(x, "... N", FLOATS))
    check_key("quantize", key, sizes["N"], given, x.device, zero_point)


@_quantize.declares("empty")
def _(x, key, given, zero_point=None):
    return empty_quantized(x, key)


@_quantize.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in NAMED_KEYS.values():
        for shape in (1, 32), (3, 576), (2, 5, 4096), (0, 64), (7, 160):
            for dtype in FLOATS:
                yield torch.randn(shape, device=device).to(dtype), *key_inputs(key, device)


@_quantize.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return torch.randn(tokens, cols, device=device).to(dtype), *key_inputs(key, device)


def key_inputs(key: QuantKey, device: str) -> tuple:
    """Plausible (code, given, zero_point) for a test or benchmark of `key` on normally distributed values."""
    given = zero_point = None
    if key.scale.static or key.scale2 is not None:
        given = torch.tensor([4.0 / 2688 if key.scale2 else 4.0 / 127], device=device)
    if key.scale.static and not key.symmetric:
        zero_point = torch.tensor([-3], dtype=torch.int32, device=device)
    return (key.code, given) if zero_point is None else (key.code, given, zero_point)


def quantize(
    x: Tensor,
    quant_key: QuantKey,
    *,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_ub: Tensor | None = None,
    keep_unquantized: bool = False,
    pad_rows: int = 1,
    out: QuantizedActivation | None = None,
) -> QuantizedActivation:
    """Quantize the last dimension of `x` as `quant_key` says.

        data = sat(round(x * (1 / scale))), scale from each group's largest magnitude      in float32

    with every format's exact arithmetic as in `quant.formats`, which is the reference.

    Args:
        x: [..., N] bfloat16, float16 or float32; rows may be strided. MX and NVFP4 keys need N
            divisible by their group.
        quant_key: the scheme.
        scale: float32 [1], the scale of a static key.
        scale2: float32 [1], NVFP4's per-tensor scale.
        zero_point: int32 [1], a static asymmetric key.
        scale_ub: float32 [1], an upper bound of the magnitude that dynamic FP8 scales come from.
        keep_unquantized: also return `x` as `.unquantized`.
        pad_rows: allocate rows of `data` to a multiple of this; the result is a view of the first.
        out: its tensors are written instead of fresh ones; returned, with this call's static scale, zero point or
            scale2. `pad_rows` is about fresh tensors.

    Returns:
        `QuantizedActivation`; its `.dequantize()` is close to x.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    given = (
        None if scale is scale2 is scale_ub is None else given_tensor("quantize", quant_key, scale, scale2, scale_ub)
    )
    if out is None and quant_key.symmetric and not keep_unquantized and pad_rows == 1:
        try:
            data, made = _quantize.call(x, quant_key.code, given)
        except RuntimeError as error:
            refused(_quantize, (x, quant_key.code, given, zero_point), error)
            raise
        if made.requires_grad:
            refuse_backward("quantize", data, made)
        return QuantizedActivation(data, made if scale is None else scale, quant_key, x.dtype, scale2)
    inputs = (x, quant_key.code, given)
    return write_quant(_quantize, inputs, quant_key, scale, scale2, zero_point, keep_unquantized, pad_rows, out)


def wrong_key(op_name: str, key: Any) -> TypeError:
    return TypeError(f"{op_name}: quant_key is {type(key).__name__}, expected a QuantKey")


def check_unquantized(op_name: str, **options: Any) -> None:
    """Raise where an option of the quantization is given, and quant_key=None asks for none."""
    for name, value in options.items():
        if value is not None and value is not False and not (name == "pad_rows" and value == 1):
            raise ValueError(f"{op_name}: {name} is given, but quant_key is None")


def given_tensor(op_name: str, key: QuantKey, scale: Any, scale2: Any, scale_ub: Any) -> Tensor | None:
    """The one of the three that the kernel takes for `key`; a surplus one raises."""
    wanted = "scale" if key.scale.static else "scale2" if key.scale2 is not None else "scale_ub"
    values = {"scale": scale, "scale2": scale2, "scale_ub": scale_ub}
    for name, value in values.items():
        if value is not None and name != wanted:
            raise ValueError(f"{op_name}: {name} is given, but {key} takes none")
    return values[wanted]


def write_quant(
    operation: Op,
    inputs: tuple,
    key: QuantKey,
    scale: Tensor | None,
    scale2: Tensor | None,
    zero_point: Tensor | None,
    keep_unquantized: bool,
    pad_rows: int,
    out: Any,
    more_inputs: tuple = (),
    **more_outputs: Tensor,
) -> QuantizedActivation:
    """Run the `out` overload into `out`, or into fresh tensors.

    Everything that isn't the plain functional call goes this way: given outputs, `keep_unquantized`, `pad_rows`,
    zero points.
    """
    args = (*inputs, zero_point, *more_inputs)
    outs: dict[str, Tensor | None] = {}
    try:
        if out is None:
            out = _allocate(operation, args, key, scale, scale2, zero_point, keep_unquantized, pad_rows)
        else:
            operation.check(*args)
            out = _given_out(operation.name, out, key, scale, scale2, zero_point, keep_unquantized, inputs[0].dtype)
        outs = {"data_out": out.data, **more_outputs}
        if not key.scale.static:
            outs |= {"scale_out": out.scale, "zero_point_out": out.zero_point}
        if keep_unquantized:
            outs["unquantized_out"] = out.unquantized
        operation.out(*args, **outs)
    except RuntimeError as error:
        refused(operation, args, error, outs)
        raise
    return out


def _allocate(operation, args, key, scale, scale2, zero_point, keep_unquantized, pad_rows) -> QuantizedActivation:
    if isinstance(pad_rows, bool) or not isinstance(pad_rows, int) or pad_rows < 1:
        raise ValueError(f"{operation.name}: pad_rows is {pad_rows!r}, expected an int of at least 1")
    operation.check(*args)
    fresh = dict(zip(operation.outputs, operation.empty(*args), strict=True))
    data = fresh["data"]
    if pad_rows > 1:
        rows = data.shape[:-1].numel()
        padded = data.new_empty((-(-rows // pad_rows) * pad_rows, data.shape[-1]))
        data = padded[:rows].view(data.shape)
    return QuantizedActivation(
        data,
        fresh["scale"] if scale is None else scale,
        key,
        args[0].dtype,
        scale2,
        fresh["zero_point"] if zero_point is None else zero_point,
        fresh["unquantized"] if keep_unquantized else None,
    )


def _given_out(op_name, out: Any, key, scale, scale2, zero_point, keep_unquantized, dtype) -> QuantizedActivation:
    """`out` with what isn't written but given in this call: a static scale or zero point, scale2."""
    if not isinstance(out, QuantizedActivation):
        raise TypeError(f"{op_name}: out is {type(out).__name__}, expected a QuantizedActivation")
    if out.quant_key != key or out.orig_dtype != dtype:
        raise ValueError(f"{op_name}: out is {out.quant_key} of {out.orig_dtype}, expected {key} of {dtype}")
    if keep_unquantized and out.unquantized is None:
        raise ValueError(f"{op_name}: out has no `unquantized`, and keep_unquantized asks for it")
    for name, given in ("scale", scale), ("scale2", scale2), ("zero_point", zero_point):
        if given is not None and getattr(out, name) is not given:
            out = replace(out, **{name: given})
    return out if keep_unquantized or out.unquantized is None else replace(out, unquantized=None)


def refuse_backward(op_name: str, *outputs: Tensor) -> None:
    """Make a backward pass that reaches these outputs raise by name: gradients are not defined here."""

    def refuse(_):
        raise RuntimeError(f"fused_ops.{op_name} is for inference only and has no gradient; use torch.no_grad()")

    if not torch.compiler.is_compiling():
        for output in outputs:
            if output.requires_grad:
                output.register_hook(refuse)
