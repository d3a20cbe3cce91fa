"""Norms of a sublayer's result: post-norm (OLMo2, Exaone4) and sandwich (Gemma2, Gemma3, GLM4) layers.

r = round_S(residual + rms_norm(x))
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from ._check import FLOATS, check, check_eps
from ._op import OPS, invoke, op
from .norm import both, norm_flags
from .quantize import QuantOptions, plain_out, quantizing, run_quant

_rms_norm, _fused_add_rms_norm = OPS["rms_norm"], OPS["fused_add_rms_norm"]


@op("residual")
def _rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, flags: int):
    return residual + _rms_norm.reference(x, weight, eps, flags)


@op("y residual")
def _rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    weight: Tensor | None,
    post_eps: float,
    eps: float,
    flags: int,
):
    r = _rms_norm_add.reference(x, residual, post_weight, post_eps, flags)
    return _rms_norm.reference(r, weight, eps, flags), r


@_rms_norm_add.declares("check")
def _(x, residual, weight, eps, flags, *, name) -> int:
    return _fused_add_rms_norm.check(x, residual, weight, eps, flags, name=name)


@_rms_norm_add_rms_norm.declares("check")
def _(x, residual, post_weight, weight, post_eps, eps, flags, *, name) -> int:
    check(name, x=(x, "... N", FLOATS), post_weight=(post_weight, "N ?", FLOATS))
    check_eps(name, post_eps=post_eps)
    return _fused_add_rms_norm.check(x, residual, weight, eps, flags, name=name)


@_rms_norm_add.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape)


@_rms_norm_add_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_rms_norm_add.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for args in _fused_add_rms_norm.cases(device):
        yield args[:5]


@_rms_norm_add_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for x, residual, weight, eps, flags in _rms_norm_add.cases(device):
        yield x, residual, None if weight is None else weight.flip(0), weight, 1e-4, eps, flags


@_rms_norm_add.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return _fused_add_rms_norm.workload(tokens, cols, key, dtype, device)


@_rms_norm_add_rms_norm.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, residual, weight, eps, flags = _fused_add_rms_norm.workload(tokens, cols, key, dtype, device)
    return x, residual, weight, weight, eps, eps, flags


_rms_norm_add_rms_norm_quant = quantizing(_rms_norm_add_rms_norm)


def rms_norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    residual_out: Tensor | None = None,
) -> Tensor:
    """The new residual of a post-norm layer: `r = round_S(residual + rms_norm(x))`.

    Args:
        x, residual: [..., N] of one dtype S.
        weight, eps, weight_bias, round_before_weight: as in `rms_norm`.
        residual_out: written instead of a fresh tensor; may be residual.

    Returns:
        r, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    args = (x, residual, weight, eps, norm_flags("rms_norm_add", weight_bias, round_before_weight))
    return invoke(_rms_norm_add, args, None if residual_out is None else (residual_out,))


def rms_norm_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    weight: Tensor | None,
    post_eps: float,
    eps: float,
    quant_key: QuantKey | None,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    residual_out: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> tuple[QuantizedActivation | Tensor, Tensor]:
    """A sandwich: `rms_norm_add` with post_weight, then `rms_norm` of the sum with weight, then `quantize`.

    One pass over memory, and bit for bit what the three return one after the other.

    Args:
        x, residual: [..., N] of one dtype S.
        post_weight, post_eps: of the norm before the addition.
        weight, eps: of the norm after it. weight_bias, round_before_weight: of both, as in `rms_norm`.
        residual_out: written instead of a fresh tensor; may be residual.
        quant_key, **quant: as in `quantize`; with `quant_key=None` the normed rows stay in S.

    Returns:
        (`QuantizedActivation` of the normed rows, or a Tensor; new residual [..., N] in S).

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    flags = norm_flags("rms_norm_add_rms_norm_quant", weight_bias, round_before_weight)
    args = (x, residual, post_weight, weight, post_eps, eps, flags)
    if quant_key is None:
        out = plain_out("rms_norm_add_rms_norm_quant", quant)
        return invoke(_rms_norm_add_rms_norm, args, both(out, residual_out))
    outs = None if residual_out is None else {"residual": residual_out}
    return run_quant(_rms_norm_add_rms_norm_quant, args, quant_key, quant, outs)
