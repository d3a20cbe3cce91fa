"""Gated activations, alone and fused with the quantization after them.

    y = round_S(silu(gate) * up)        silu(g) = g / (1 + exp(-g)), float32; S is gate's dtype

`round_activation=True` rounds the activation to S first, as eager model code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quant import NAMED_KEYS, QuantizedActivation, QuantKey

from ._check import FLOATS, boolean, check, check_key
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


@op("y")
def _silu_mul(gate: Tensor, up: Tensor, round_activation: bool):
    if round_activation:  # in S, as the model code writes it: the same bits on this backend
        return torch.nn.functional.silu(gate) * up
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


@op("data scale zero_point unquantized", returns=2)
def _silu_mul_quant(
    gate: Tensor, up: Tensor, round_activation: bool, key: int, given: Tensor | None, zero_point: Tensor | None = None
):
    return quantized(_silu_mul.reference(gate, up, round_activation), key, given, zero_point)


@_silu_mul.declares("check")
def _check(gate, up, round_activation, name="silu_mul"):
    sizes = check(name, gate=(gate, "... N", FLOATS), up=(up, "... N", "gate"))
    boolean(name, round_activation=round_activation)
    return sizes["N"]


@_silu_mul_quant.declares("check")
def _(gate, up, round_activation, key, given, zero_point=None):
    cols = _check(gate, up, round_activation, "silu_mul_quant")
    check_key("silu_mul_quant", key, cols, given, gate.device, zero_point)


@_silu_mul.declares("empty")
def _(gate, *_):
    return gate.new_empty(gate.shape)


@_silu_mul_quant.declares("empty")
def _(gate, up, round_activation, key, given, zero_point=None):
    return empty_quantized(gate, key)


@_silu_mul.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for shape in (1, 8), (7, 576), (2, 3, 1536), (0, 64), (33, 1000), (2, 1):
        for dtype in FLOATS:
            packed = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
            yield *packed.chunk(2, dim=-1), True
            yield packed[..., : shape[-1]] * 20, packed[..., shape[-1] :], False


@_silu_mul_quant.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in NAMED_KEYS.values():
        for args in _silu_mul.cases(device):
            if args[0].shape[-1] % 32 == 0:
                yield *args, *key_inputs(key, device)


@_silu_mul.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return *torch.randn(tokens, 2 * cols, device=device).to(dtype).chunk(2, dim=-1), True


@_silu_mul_quant.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return *_silu_mul.workload(tokens, cols, None, dtype, device), *key_inputs(key, device)


def silu_mul(gate: Tensor, up: Tensor, *, round_activation: bool = False, out: Tensor | None = None) -> Tensor:
    """SwiGLU's activation: `y = round_S(silu(gate) * up)`, in float32.

    Args:
        gate, up: [..., N] of one dtype S (bfloat16, float16, float32); rows may be strided, so that halves of one
            projection pass as `gate_up.chunk(2, dim=-1)`.
        round_activation: round silu(gate) to S before the product, as eager model code does.
        out: [..., N] in S, written instead of a fresh tensor; may be gate or up.

    Returns:
        y, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    inputs = (gate, up, round_activation)
    try:
        if out is None:
            y = _silu_mul.call(*inputs)
            if y.requires_grad:
                refuse_backward("silu_mul", y)
            return y
        _silu_mul.out(*inputs, y_out=out)
    except RuntimeError as error:
        refused(_silu_mul, inputs, error, {"y_out": out})
        raise
    return out


def silu_mul_quant(
    gate: Tensor,
    up: Tensor,
    quant_key: QuantKey | None,
    *,
    round_activation: bool = False,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_ub: Tensor | None = None,
    keep_unquantized: bool = False,
    pad_rows: int = 1,
    out: Any = None,
) -> QuantizedActivation | Tensor:
    """`silu_mul`, then `quantize`, in one pass over memory; bit for bit what the two return one after the other.

    Args:
        gate, up, round_activation: as in `silu_mul`.
        quant_key, scale, scale2, zero_point, scale_ub, keep_unquantized, pad_rows, out: as in `quantize`; with
            `quant_key=None` this is `silu_mul`.

    Returns:
        `QuantizedActivation` of logical shape [..., N]; a Tensor where quant_key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    if quant_key is None:
        check_unquantized(
            "silu_mul_quant",
            scale=scale,
            scale2=scale2,
            zero_point=zero_point,
            scale_ub=scale_ub,
            keep_unquantized=keep_unquantized,
            pad_rows=pad_rows,
        )
        return silu_mul(gate, up, round_activation=round_activation, out=out)
    if type(quant_key) is not QuantKey:
        raise wrong_key("silu_mul_quant", quant_key)
    given = None
    if not scale is scale2 is scale_ub is None:
        given = given_tensor("silu_mul_quant", quant_key, scale, scale2, scale_ub)
    inputs = (gate, up, round_activation, quant_key.code, given)
    if out is zero_point is None and quant_key.symmetric and not keep_unquantized and pad_rows == 1:
        try:
            data, made = _silu_mul_quant.call(*inputs)
        except RuntimeError as error:
            refused(_silu_mul_quant, (*inputs, zero_point), error)
            raise
        if made.requires_grad:
            refuse_backward("silu_mul_quant", data, made)
        return QuantizedActivation(data, made if scale is None else scale, quant_key, gate.dtype, scale2)
    return write_quant(_silu_mul_quant, inputs, quant_key, scale, scale2, zero_point, keep_unquantized, pad_rows, out)
