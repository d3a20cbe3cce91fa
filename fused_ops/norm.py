"""RMSNorm: alone, fused with the residual addition before it, and with the quantization after it.

    r = round_S(x * x_multiplier + residual)                          the new residual
    y = round_S(r / sqrt(mean(r^2) + eps) * (weight + weight_bias))   S is x's dtype, the rest float32

`round_before_weight=True` rounds once more, as Llama's model code does: y = round_S(round_S(r / sqrt(..)) * weight).
A fused operation returns the same bits as the unfused ones, one after another. A row's bits depend on the row alone,
except on the reference backend, whose sums are torch's.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quant import NAMED_KEYS, QuantizedActivation, QuantKey

from ._check import FLOATS, check, check_key, number
from ._op import op, refused
from .quantize import (
    check_unquantized,
    empty_quantized,
    given_tensor,
    key_inputs,
    quantized,
    refuse_backward,
    write_quant,
    wrong_key,
)

ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE = 1, 2
_FLAGS = {  # (weight_bias, round_before_weight) as kernels take them: one int costs less than two arguments
    (0.0, False): 0,
    (0.0, True): ROUND_BEFORE_WEIGHT,
    (1.0, False): WEIGHT_BIAS_ONE,
    (1.0, True): WEIGHT_BIAS_ONE | ROUND_BEFORE_WEIGHT,
}


@op("y")
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, flags: int):
    r = x.float()
    # torch's float32 sqrt is an ulp off for a fifth of all values; rounding a float64 one is exact.
    y = r * (1 / (r.square().mean(-1, keepdim=True) + eps).double().sqrt().float())
    if weight is None:
        return y.to(x.dtype)
    if flags & ROUND_BEFORE_WEIGHT:
        y = y.to(x.dtype).float()
    return (y * (weight.float() + 1 if flags & WEIGHT_BIAS_ONE else weight.float())).to(x.dtype)


@op("y residual")
def _fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, flags: int, x_multiplier: float = 1.0
):
    r = (x if x_multiplier == 1.0 else x * x_multiplier) + residual
    return _rms_norm.reference(r, weight, eps, flags), r


@op("data scale zero_point unquantized", returns=2)
def _rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    flags: int,
    key: int,
    given: Tensor | None,
    zero_point: Tensor | None = None,
):
    return quantized(_rms_norm.reference(x, weight, eps, flags), key, given, zero_point)


@op("data scale residual zero_point unquantized", returns=3)
def _fused_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    flags: int,
    key: int,
    given: Tensor | None,
    zero_point: Tensor | None = None,
    x_multiplier: float = 1.0,
):
    y, r = _fused_add_rms_norm.reference(x, residual, weight, eps, flags, x_multiplier)
    data, scale, *rest = quantized(y, key, given, zero_point)
    return data, scale, r, *rest


def _check(name: str, x, weight, eps, flags, **residual) -> int:
    sizes = check(name, x=(x, "... N", FLOATS), **residual, weight=(weight, "N ?", FLOATS))
    number(name, eps=eps)
    if flags not in _FLAGS.values():
        raise ValueError(f"{name}: flags is {flags}, expected one of {list(_FLAGS.values())}")
    return sizes["N"]


@_rms_norm.declares("check")
def _(x, weight, eps, flags):
    _check("rms_norm", x, weight, eps, flags)


@_fused_add_rms_norm.declares("check")
def _check_add(x, residual, weight, eps, flags, x_multiplier=1.0, name="fused_add_rms_norm"):
    number(name, x_multiplier=x_multiplier)
    return _check(name, x, weight, eps, flags, residual=(residual, "... N", "x"))


@_rms_norm_quant.declares("check")
def _(x, weight, eps, flags, key, given, zero_point=None):
    cols = _check("rms_norm_quant", x, weight, eps, flags)
    check_key("rms_norm_quant", key, cols, given, x.device, zero_point)


@_fused_add_rms_norm_quant.declares("check")
def _(x, residual, weight, eps, flags, key, given, zero_point=None, x_multiplier=1.0):
    cols = _check_add(x, residual, weight, eps, flags, x_multiplier, "fused_add_rms_norm_quant")
    check_key("fused_add_rms_norm_quant", key, cols, given, x.device, zero_point)


@_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape)


@_fused_add_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_rms_norm_quant.declares("empty")
def _(x, weight, eps, flags, key, given, zero_point=None):
    return empty_quantized(x, key)


@_fused_add_rms_norm_quant.declares("empty")
def _(x, residual, weight, eps, flags, key, given, zero_point=None, x_multiplier=1.0):
    data, scale, *rest = empty_quantized(x, key)
    return data, scale, x.new_empty(x.shape), *rest


@_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for shape in (1, 8), (7, 576), (2, 3, 4096), (0, 64), (33, 1000), (2, 1):
        for dtype in FLOATS:
            x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device)
            yield x, weight.to(dtype), 1e-5, ROUND_BEFORE_WEIGHT
            yield x, weight, 1e-6, WEIGHT_BIAS_ONE
            yield x, None, 1e-6, 0


@_fused_add_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for x, *rest in _rms_norm.cases(device):
        yield x, torch.randn_like(x), *rest


@_rms_norm_quant.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in NAMED_KEYS.values():
        for args in _rms_norm.cases(device):
            if args[0].shape[-1] % 32 == 0:
                yield *args, *key_inputs(key, device)


@_fused_add_rms_norm_quant.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for x, weight, eps, flags, *key in _rms_norm_quant.cases(device):
        yield x, torch.randn_like(x), weight, eps, flags, *key


@_rms_norm.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, weight = torch.randn(tokens, cols, device=device).to(dtype), torch.randn(cols, device=device).to(dtype)
    return x, weight, 1e-5, 0


@_fused_add_rms_norm.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, *rest = _rms_norm.workload(tokens, cols, key, dtype, device)
    return x, torch.randn_like(x), *rest


@_rms_norm_quant.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return *_rms_norm.workload(tokens, cols, None, dtype, device), *key_inputs(key, device)


@_fused_add_rms_norm_quant.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return *_fused_add_rms_norm.workload(tokens, cols, None, dtype, device), *key_inputs(key, device)


def check_flags(op_name: str, weight_bias: float, round_before_weight: bool) -> None:
    if (weight_bias, round_before_weight) not in _FLAGS:
        raise ValueError(
            f"{op_name}: weight_bias is {weight_bias!r} and round_before_weight {round_before_weight!r}, "
            "expected 0.0 or 1.0, and a bool"
        )


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Root-mean-square norm over the last dimension: `y = round_S(x / sqrt(mean(x^2) + eps) * (weight + weight_bias))`.

    Args:
        x: [..., N] bfloat16, float16 or float32 (S); rows may be strided.
        weight: [N] in any of these dtypes, or None for the weightless norm.
        eps: added to the mean of squares.
        weight_bias: 0.0, or 1.0 for Gemma's (1 + weight).
        round_before_weight: round to S before the weight too, as Hugging Face's Llama does.
        out: [..., N] in S, written instead of a fresh tensor; may be x.

    Returns:
        y, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    flags = _FLAGS.get((weight_bias, round_before_weight))
    try:
        if out is None:
            y = _rms_norm.call(x, weight, eps, flags)
            if y.requires_grad:
                refuse_backward("rms_norm", y)
            return y
        _rms_norm.out(x, weight, eps, flags, y_out=out)
    except RuntimeError as error:
        check_flags("rms_norm", weight_bias, round_before_weight)
        refused(_rms_norm, (x, weight, eps, flags), error, {"y_out": out})
        raise
    return out


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    x_multiplier: float = 1.0,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition, then `rms_norm` of the rounded sum: `r = round_S(round_S(x * x_multiplier) + residual)`.

    Args:
        x, residual: [..., N] of one dtype S.
        weight, eps, weight_bias, round_before_weight: as in `rms_norm`.
        x_multiplier: Granite's factor of x.
        out, residual_out: written instead of fresh tensors; residual_out may be residual.

    Returns:
        (normed, new residual), both [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    flags = _FLAGS.get((weight_bias, round_before_weight))
    outs: dict[str, Any] = {}
    try:
        if out is None and residual_out is None and x_multiplier == 1.0:
            y, r = _fused_add_rms_norm.call(x, residual, weight, eps, flags)
            if y.requires_grad:
                refuse_backward("fused_add_rms_norm", y, r)
            return y, r
        check_flags("fused_add_rms_norm", weight_bias, round_before_weight)
        _fused_add_rms_norm.check(x, residual, weight, eps, flags, x_multiplier)
        y = x.new_empty(x.shape) if out is None else out
        r = x.new_empty(x.shape) if residual_out is None else residual_out
        outs = {"y_out": y, "residual_out": r}
        _fused_add_rms_norm.out(x, residual, weight, eps, flags, x_multiplier, **outs)
    except RuntimeError as error:
        check_flags("fused_add_rms_norm", weight_bias, round_before_weight)
        refused(_fused_add_rms_norm, (x, residual, weight, eps, flags, x_multiplier), error, outs)
        raise
    return y, r


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_ub: Tensor | None = None,
    keep_unquantized: bool = False,
    pad_rows: int = 1,
    out: Any = None,
) -> QuantizedActivation | Tensor:
    """`rms_norm`, then `quantize`, in one pass over memory; bit for bit what the two return one after the other.

    Args:
        x, weight, eps, weight_bias, round_before_weight: as in `rms_norm`.
        quant_key, scale, scale2, zero_point, scale_ub, keep_unquantized, pad_rows, out: as in `quantize`; with
            `quant_key=None` this is `rms_norm`.

    Returns:
        `QuantizedActivation` of logical shape [..., N]; a Tensor where quant_key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    if quant_key is None:
        check_unquantized(
            "rms_norm_quant",
            scale=scale,
            scale2=scale2,
            zero_point=zero_point,
            scale_ub=scale_ub,
            keep_unquantized=keep_unquantized,
            pad_rows=pad_rows,
        )
        return rms_norm(x, weight, eps, weight_bias=weight_bias, round_before_weight=round_before_weight, out=out)
    if type(quant_key) is not QuantKey:
        raise wrong_key("rms_norm_quant", quant_key)
    given = None
    if not scale is scale2 is scale_ub is None:
        given = given_tensor("rms_norm_quant", quant_key, scale, scale2, scale_ub)
    flags = _FLAGS.get((weight_bias, round_before_weight))
    inputs = (x, weight, eps, flags, quant_key.code, given)
    if (
        flags is not None
        and out is zero_point is None
        and quant_key.symmetric
        and not keep_unquantized
        and pad_rows == 1
    ):
        try:
            data, made = _rms_norm_quant.call(*inputs)
        except RuntimeError as error:
            refused(_rms_norm_quant, (*inputs, zero_point), error)
            raise
        if made.requires_grad:
            refuse_backward("rms_norm_quant", data, made)
        return QuantizedActivation(data, made if scale is None else scale, quant_key, x.dtype, scale2)
    check_flags("rms_norm_quant", weight_bias, round_before_weight)
    return write_quant(_rms_norm_quant, inputs, quant_key, scale, scale2, zero_point, keep_unquantized, pad_rows, out)


def fused_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    *,
    x_multiplier: float = 1.0,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_ub: Tensor | None = None,
    keep_unquantized: bool = False,
    pad_rows: int = 1,
    out: Any = None,
    residual_out: Tensor | None = None,
) -> tuple[QuantizedActivation | Tensor, Tensor]:
    """`fused_add_rms_norm`, then `quantize`, in one pass over memory; bit for bit what the two return.

    Args:
        x, residual, weight, eps, x_multiplier, weight_bias, round_before_weight, residual_out: as in
            `fused_add_rms_norm`.
        quant_key, scale, scale2, zero_point, scale_ub, keep_unquantized, pad_rows, out: as in `quantize`; with
            `quant_key=None` this is `fused_add_rms_norm`.

    Returns:
        (`QuantizedActivation` of the normed rows, new residual [..., N] in S).

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    if quant_key is None:
        check_unquantized(
            "fused_add_rms_norm_quant",
            scale=scale,
            scale2=scale2,
            zero_point=zero_point,
            scale_ub=scale_ub,
            keep_unquantized=keep_unquantized,
            pad_rows=pad_rows,
        )
        return fused_add_rms_norm(
            x, residual, weight, eps, x_multiplier=x_multiplier, weight_bias=weight_bias,
            round_before_weight=round_before_weight, out=out, residual_out=residual_out,
        )  # fmt: skip
    if type(quant_key) is not QuantKey:
        raise wrong_key("fused_add_rms_norm_quant", quant_key)
    given = None
    if not scale is scale2 is scale_ub is None:
        given = given_tensor("fused_add_rms_norm_quant", quant_key, scale, scale2, scale_ub)
    flags = _FLAGS.get((weight_bias, round_before_weight))
    inputs = (x, residual, weight, eps, flags, quant_key.code, given)
    plain = (
        out is None
        and residual_out is zero_point is None
        and quant_key.symmetric
        and not keep_unquantized
        and pad_rows == 1
    )
    if plain and x_multiplier == 1.0 and flags is not None:
        try:
            data, made, r = _fused_add_rms_norm_quant.call(*inputs)
        except RuntimeError as error:
            refused(_fused_add_rms_norm_quant, (*inputs, zero_point), error)
            raise
        if r.requires_grad:
            refuse_backward("fused_add_rms_norm_quant", data, made, r)
        return QuantizedActivation(data, made if scale is None else scale, quant_key, x.dtype, scale2), r
    check_flags("fused_add_rms_norm_quant", weight_bias, round_before_weight)
    _fused_add_rms_norm_quant.check(*inputs, zero_point, x_multiplier)
    r = x.new_empty(x.shape) if residual_out is None else residual_out
    activation = write_quant(
        _fused_add_rms_norm_quant, inputs, quant_key, scale, scale2, zero_point, keep_unquantized, pad_rows, out,
        more_inputs=(x_multiplier,), residual_out=r,
    )  # fmt: skip
    return activation, r
