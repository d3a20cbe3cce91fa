"""Norms: alone, fused with the residual addition before them, and with the quantization after them.

    r = round_S(x * x_multiplier + residual)                          the new residual
    y = round_S(r / sqrt(mean(r^2) + eps) * (weight + weight_bias))   S is x's dtype, the rest float32

`round_before_weight=True` rounds once more, as Llama's model code does: y = round_S(round_S(r / sqrt(..)) * weight).
A fused operation returns the same bits as the unfused ones, one after another. A row's bits depend on the row alone,
except on the reference backend, whose sums are torch's.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019; Ba et al., "Layer Normalization", 2016.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from ._check import FLOAT32_MAX, FLOATS, check, check_eps, number
from ._op import invoke, op
from .quantize import QuantOptions, plain_out, quantizing, run_quant

ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE = 1, 2
_FLAGS = {  # (weight_bias, round_before_weight) as kernels take them: one int costs less than two arguments
    (0.0, False): 0,
    (0.0, True): ROUND_BEFORE_WEIGHT,
    (1.0, False): WEIGHT_BIAS_ONE,
    (1.0, True): WEIGHT_BIAS_ONE | ROUND_BEFORE_WEIGHT,
}


@op("y")
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, flags: int):
    return normed(x, x.float().square().mean(-1, keepdim=True), weight, eps, flags)


def normed(x: Tensor, mean_square: Tensor, weight: Tensor | None, eps: float, flags: int) -> Tensor:
    """x [..., N] over the root of its mean square [..., 1], times the weight."""
    y = x.float() * _rstd(mean_square, eps)
    if weight is None:
        return y.to(x.dtype)
    if flags & ROUND_BEFORE_WEIGHT:
        y = y.to(x.dtype).float()
    return (y * (weight.float() + 1 if flags & WEIGHT_BIAS_ONE else weight.float())).to(x.dtype)


def _rstd(variance: Tensor, eps: float) -> Tensor:
    # torch's float32 sqrt is an ulp off for a fifth of all values; rounding a float64 one is exact.
    return 1 / (variance + eps).double().sqrt().float()


@op("y")
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    r = x.float()
    r = r - r.mean(-1, keepdim=True)
    y = r * _rstd(r.square().mean(-1, keepdim=True), eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@op("y residual")
def _fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, flags: int, x_multiplier: float = 1.0
):
    r = (x if x_multiplier == 1.0 else x * x_multiplier) + residual
    return _rms_norm.reference(r, weight, eps, flags), r


@op("y residual")
def _fused_add_rms_norm_pad(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, flags: int, multiple: int):
    y, r = _fused_add_rms_norm.reference(x, residual, weight, eps, flags)
    return pad(y, (0, -y.shape[-1] % multiple)), r


@_rms_norm.declares("check")
def _check(x, weight, eps, flags, *, name, **more) -> int:
    sizes = check(name, x=(x, "... N", FLOATS), **more, weight=(weight, "N ?", FLOATS))
    check_eps(name, eps=eps)
    if flags not in _FLAGS.values():
        raise ValueError(f"{name}: flags is {flags}, expected one of {list(_FLAGS.values())}")
    return sizes["N"]


@_layer_norm.declares("check")
def _(x, weight, bias, eps, *, name) -> int:
    return _check(x, weight, eps, 0, name=name, bias=(bias, "N ?", FLOATS))


@_fused_add_rms_norm.declares("check")
def check_add(x, residual, weight, eps, flags, x_multiplier=1.0, *, name) -> int:
    number(name, x_multiplier=x_multiplier)
    if not abs(x_multiplier) <= FLOAT32_MAX:
        raise ValueError(f"{name}: x_multiplier is {x_multiplier}, expected a finite float32")
    return _check(x, weight, eps, flags, name=name, residual=(residual, "... N", "x"))


@_fused_add_rms_norm_pad.declares("check")
def _(x, residual, weight, eps, flags, multiple, *, name) -> int:
    cols = check_add(x, residual, weight, eps, flags, name=name)
    if isinstance(multiple, bool) or not isinstance(multiple, (int, torch.SymInt)) or not 0 < multiple < 1 << 31:
        raise ValueError(f"{name}: multiple is {multiple!r}, expected an int from 1 to 2147483647")
    return cols


@_layer_norm.declares("empty")
@_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape)


@_fused_add_rms_norm.declares("empty")
def empty_add(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_fused_add_rms_norm_pad.declares("empty")
def _(x, residual, weight, eps, flags, multiple):
    *rows, cols = x.shape
    return x.new_empty(*rows, -(-cols // multiple) * multiple), x.new_empty(x.shape)


@_rms_norm.declares("cases")
def cases(device: str) -> Iterator[tuple]:
    for shape in (1, 8), (7, 576), (2, 3, 4096), (0, 64), (33, 1000), (2, 1), (5, 64):
        for dtype in FLOATS:
            x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device)
            yield x, weight.to(dtype), 1e-5, ROUND_BEFORE_WEIGHT
            yield x, weight, 1e-6, WEIGHT_BIAS_ONE
            yield x, None, 1e-6, 0


@_layer_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for x, weight, eps, flags in cases(device):
        x = x + 3 if flags else x
        yield x, weight, None if flags == WEIGHT_BIAS_ONE or weight is None else weight.flip(0), eps


@_fused_add_rms_norm.declares("cases")
def cases_add(device: str) -> Iterator[tuple]:
    for x, weight, eps, flags in cases(device):
        yield x, torch.randn_like(x), weight, eps, flags, *([0.22] if flags == WEIGHT_BIAS_ONE else [])


@_fused_add_rms_norm_pad.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for args in cases_add(device):
        for multiple in 1, 128:
            yield *args[:5], multiple


@_rms_norm.declares("workload")
def workload(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, weight = torch.randn(tokens, cols, device=device).to(dtype), torch.randn(cols, device=device).to(dtype)
    return x, weight, 1e-5, 0


@_layer_norm.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, weight, eps, _ = workload(tokens, cols, key, dtype, device)
    return x, weight, weight, eps


@_fused_add_rms_norm.declares("workload")
def workload_add(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    x, *rest = workload(tokens, cols, key, dtype, device)
    return x, torch.randn_like(x), *rest


@_fused_add_rms_norm_pad.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return *workload_add(tokens, cols, key, dtype, device), 256


_rms_norm_quant = quantizing(_rms_norm)
_layer_norm_quant = quantizing(_layer_norm)
_fused_add_rms_norm_quant = quantizing(_fused_add_rms_norm)


def norm_flags(op_name: str, weight_bias: float, round_before_weight: bool) -> int:
    """The two options as kernels take them."""
    try:
        return _FLAGS[weight_bias, round_before_weight]
    except (KeyError, TypeError):
        raise ValueError(
            f"{op_name}: weight_bias is {weight_bias!r} and round_before_weight {round_before_weight!r}, "
            "expected 0.0 or 1.0, and a bool"
        ) from None


def both(out: Tensor | None, residual_out: Tensor | None) -> tuple | None:
    """Given outputs as `invoke` takes them."""
    return None if out is residual_out is None else (out, residual_out)


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
    args = (x, weight, eps, norm_flags("rms_norm", weight_bias, round_before_weight))
    return invoke(_rms_norm, args, None if out is None else (out,))


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Layer norm over the last dimension: `y = round_S((x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias)`.

    Args:
        x: [..., N] bfloat16, float16 or float32 (S); rows may be strided.
        weight, bias: [N] in any of these dtypes, or None.
        eps: added to the variance.
        out: [..., N] in S, written instead of a fresh tensor; may be x.

    Returns:
        y, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    return invoke(_layer_norm, (x, weight, bias, eps), None if out is None else (out,))


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
    args = (x, residual, weight, eps, norm_flags("fused_add_rms_norm", weight_bias, round_before_weight))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    return invoke(_fused_add_rms_norm, args, both(out, residual_out), optional)


def fused_add_rms_norm_pad(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    multiple: int,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_add_rms_norm` whose normed rows are padded with zeros, as a product with padded weights wants them.

    Args:
        x, residual, weight, eps, weight_bias, round_before_weight, out, residual_out: as in `fused_add_rms_norm`.
        multiple: columns are padded to a multiple of this. A router reads `normed[..., :N]`.

    Returns:
        (normed [..., ceil(N / multiple) * multiple], new residual [..., N]), both in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    flags = norm_flags("fused_add_rms_norm_pad", weight_bias, round_before_weight)
    args = (x, residual, weight, eps, flags, multiple)
    return invoke(_fused_add_rms_norm_pad, args, both(out, residual_out))


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`rms_norm`, then `quantize`, in one pass over memory; bit for bit what the two return one after the other.

    Args:
        x, weight, eps, weight_bias, round_before_weight: as in `rms_norm`.
        quant_key, **quant: as in `quantize`; with `quant_key=None` this is `rms_norm`.

    Returns:
        `QuantizedActivation` of logical shape [..., N]; a Tensor where quant_key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    args = (x, weight, eps, norm_flags("rms_norm_quant", weight_bias, round_before_weight))
    if quant_key is None:
        out = plain_out("rms_norm_quant", quant)
        return invoke(_rms_norm, args, None if out is None else (out,))
    return run_quant(_rms_norm_quant, args, quant_key, quant)


def layer_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`layer_norm`, then `quantize`: arguments as in these two, result and errors as in `rms_norm_quant`."""
    args = (x, weight, bias, eps)
    if quant_key is None:
        out = plain_out("layer_norm_quant", quant)
        return invoke(_layer_norm, args, None if out is None else (out,))
    return run_quant(_layer_norm_quant, args, quant_key, quant)


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
    residual_out: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> tuple[QuantizedActivation | Tensor, Tensor]:
    """`fused_add_rms_norm`, then `quantize`, in one pass over memory; bit for bit what the two return.

    Args:
        x, residual, weight, eps, x_multiplier, weight_bias, round_before_weight, residual_out: as in
            `fused_add_rms_norm`.
        quant_key, **quant: as in `quantize`; with `quant_key=None` this is `fused_add_rms_norm`.

    Returns:
        (`QuantizedActivation` of the normed rows, new residual [..., N] in S).

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    args = (x, residual, weight, eps, norm_flags("fused_add_rms_norm_quant", weight_bias, round_before_weight))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    if quant_key is None:
        out = plain_out("fused_add_rms_norm_quant", quant)
        return invoke(_fused_add_rms_norm, args, both(out, residual_out), optional)
    outs = None if residual_out is None else {"residual": residual_out}
    return run_quant(_fused_add_rms_norm_quant, args, quant_key, quant, outs, optional)
