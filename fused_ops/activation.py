"""Gated activations, alone and fused with the quantization after them.

    y = round_S(act(gate) * up)         in float32; S is gate's dtype

`round_activation=True` rounds every step to S, as eager model code does.

With `tokens_per_expert` the inputs are [experts, rows, N], and of each expert only so many first rows are worked on:
those of `out` beyond are left as they were, fresh ones are uninitialized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey, formats

from ._check import FLOAT32_MAX, FLOATS, INDICES, boolean, check, number
from ._op import Op, invoke, op
from .quantize import QuantOptions, plain_out, quantizing, run_quant

SHAPES = (1, 8), (7, 576), (2, 3, 1536), (0, 64), (33, 1000), (2, 1), (1, 32)


@op("y")
def _silu_mul(gate: Tensor, up: Tensor, round_activation: bool, tokens_per_expert: Tensor | None = None):
    dtype = gate.dtype if round_activation else torch.float32
    return _of_experts((F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype), tokens_per_expert)


@op("y")
def _gelu_tanh_mul(gate: Tensor, up: Tensor, round_activation: bool, tokens_per_expert: Tensor | None = None):
    if round_activation:  # in S, as the model code writes it
        a = F.gelu(gate, approximate="tanh")
    else:  # the same function without its 1 + tanh(..), which loses most of float32's bits where gate is negative
        g = gate.double()
        exponent = 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        a, up = gate.float() / (1 + torch.exp(-exponent).float()), up.float()
    return _of_experts((a * up).to(gate.dtype), tokens_per_expert)


@op("y")
def _swiglu_oai_mul(
    gate: Tensor,
    up: Tensor | None,
    alpha: float,
    limit: float,
    round_activation: bool,
    tokens_per_expert: Tensor | None = None,
):
    gate, up = (gate[..., ::2], gate[..., 1::2]) if up is None else (gate, up)
    dtype = gate.dtype if round_activation else torch.float32
    limit = limit if limit <= torch.finfo(dtype).max else float("inf")
    g, u = gate.to(dtype).clamp(max=limit), up.to(dtype).clamp(-limit, limit)
    return _of_experts(((u + 1) * (g * torch.sigmoid(g * alpha))).to(gate.dtype), tokens_per_expert)


@op("y")
def _relu2(x: Tensor, tokens_per_expert: Tensor | None = None):
    return _of_experts(x.clamp_min(0).square(), tokens_per_expert)


def _of_experts(y: Tensor, tokens_per_expert: Tensor | None) -> Tensor:
    """y, with zeros where it isn't worked on, so that what lies there has no part in a scale."""
    return y if tokens_per_expert is None else torch.where(_used(y, tokens_per_expert), y, 0)


def _used(y: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """bool [experts, rows, 1]: whether a row is worked on."""
    return (torch.arange(y.shape[1], device=y.device) < tokens_per_expert.unsqueeze(1)).unsqueeze(2)


def _check_experts(name: str, first: str, x: Tensor, tokens_per_expert: Tensor | None) -> None:
    if tokens_per_expert is not None:
        check(name, **{first: (x, "experts rows N", FLOATS)}, tokens_per_expert=(tokens_per_expert, "experts", INDICES))


@_gelu_tanh_mul.declares("check")
@_silu_mul.declares("check")
def _check_gated(gate, up, round_activation, tokens_per_expert=None, *, name) -> int:
    sizes = check(name, gate=(gate, "... N", FLOATS), up=(up, "... N", "gate"))
    boolean(name, round_activation=round_activation)
    _check_experts(name, "gate", gate, tokens_per_expert)
    return sizes["N"]


@_swiglu_oai_mul.declares("check")
def _(gate, up, alpha, limit, round_activation, tokens_per_expert=None, *, name) -> int:
    number(name, alpha=alpha, limit=limit)
    if not limit >= 0:
        raise ValueError(f"{name}: limit is {limit}, expected at least 0")
    if not abs(alpha) <= FLOAT32_MAX:
        raise ValueError(f"{name}: alpha is {alpha}, expected a finite float32")
    if up is not None:
        return _check_gated(gate, up, round_activation, tokens_per_expert, name=name)
    cols = _check_gated(gate, gate, round_activation, tokens_per_expert, name=name)
    if cols % 2:
        raise ValueError(f"{name}: gate has {cols} columns, expected an even number where up is None")
    return cols // 2


@_relu2.declares("check")
def _(x, tokens_per_expert=None, *, name) -> int:
    cols = check(name, x=(x, "... N", FLOATS))["N"]
    _check_experts(name, "x", x, tokens_per_expert)
    return cols


def _empty(x, *_):
    return x.new_empty(x.shape)


def _store(args: tuple, name: str, target: Tensor, value: Tensor) -> None:
    tokens_per_expert = args[-1] if isinstance(args[-1], Tensor) and args[-1].dtype in INDICES else None
    if tokens_per_expert is None or target.shape == (1,):
        target.copy_(value)
        return
    used = _used(args[0], tokens_per_expert)
    if target.ndim == 3:
        used = used.expand(target.shape)
    elif target.ndim == 2:  # scales
        used = used.view(-1, 1).expand(target.shape)
    else:
        used = formats.swizzled_rows(used.flatten(), target.numel())
    bits = (target.view(torch.uint8), value.view(torch.uint8)) if target.element_size() == 1 else (target, value)
    bits[0].copy_(torch.where(used, bits[1], bits[0]))


def _gated_cases(*options: Any, rounded=(torch.bfloat16, torch.float16)):
    def cases(device: str) -> Iterator[tuple]:
        for shape in SHAPES:
            for dtype in FLOATS:
                packed = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
                yield *packed.chunk(2, dim=-1), *options, dtype in rounded
                yield packed[..., : shape[-1]] * 20, packed[..., shape[-1] :], *options, False
                if len(shape) == 3:
                    yield *packed.chunk(2, dim=-1), *options, False, torch.tensor([1, 3], device=device)

    return cases


def _gated_workload(*options: Any):
    def workload(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
        return *torch.randn(tokens, 2 * cols, device=device).to(dtype).chunk(2, dim=-1), *options, True

    return workload


@_swiglu_oai_mul.declares("empty")
def _(gate, up, *_):
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1))


@_swiglu_oai_mul.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for gate, up, *options in _gated_cases(1.702, 7.0)(device):
        yield gate, up, *options
        if options[2]:
            yield torch.stack([gate, up], dim=-1).flatten(-2), None, *options


@_relu2.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for gate, _, _, *tokens_per_expert in _gated_cases()(device):
        yield gate, *tokens_per_expert


@_relu2.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return (torch.randn(tokens, cols, device=device).to(dtype),)


_silu_mul.declares("cases")(_gated_cases())
# torch's own gelu is too far from its formula in float16 to be compared with, for the reason above.
_gelu_tanh_mul.declares("cases")(_gated_cases(rounded=(torch.bfloat16,)))
for _op in _silu_mul, _gelu_tanh_mul:
    _op.declares("workload")(_gated_workload())
_swiglu_oai_mul.declares("workload")(_gated_workload(1.702, 7.0))
for _op in _silu_mul, _gelu_tanh_mul, _relu2:
    _op.declares("empty")(_empty)
for _op in _silu_mul, _gelu_tanh_mul, _swiglu_oai_mul, _relu2:
    _op.declares("store")(_store)

_silu_mul_quant = quantizing(_silu_mul)
_gelu_tanh_mul_quant = quantizing(_gelu_tanh_mul)
_swiglu_oai_mul_quant = quantizing(_swiglu_oai_mul)
_relu2_quant = quantizing(_relu2)


def silu_mul(
    gate: Tensor,
    up: Tensor,
    *,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SwiGLU's activation: `y = round_S(silu(gate) * up)`, `silu(g) = g / (1 + exp(-g))`, in float32.

    Args:
        gate, up: [..., N] of one dtype S (bfloat16, float16, float32); rows may be strided, so that halves of one
            projection pass as `gate_up.chunk(2, dim=-1)`.
        round_activation: round silu(gate) to S before the product, as eager model code does.
        tokens_per_expert: int32 or int64 [E] where gate is [E, M, N]: rows of each expert that are worked on, at least
            none and at most all. The others aren't written: their codes and scales are whatever lay there.
        out: [..., N] in S, written instead of a fresh tensor; may be gate or up.

    Returns:
        y, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    return _run_plain(_silu_mul, (gate, up, round_activation), out, tokens_per_expert)


def silu_mul_quant(
    gate: Tensor,
    up: Tensor,
    quant_key: QuantKey | None,
    *,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`silu_mul`, then `quantize`, in one pass over memory; bit for bit what the two return one after the other.

    Args:
        gate, up, round_activation, tokens_per_expert: as in `silu_mul`.
        quant_key, **quant: as in `quantize`; with `quant_key=None` this is `silu_mul`.

    Returns:
        `QuantizedActivation` of logical shape [..., N]; a Tensor where quant_key is None.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    return _run(_silu_mul, _silu_mul_quant, (gate, up, round_activation), quant_key, tokens_per_expert, quant)


def gelu_tanh_mul(
    gate: Tensor,
    up: Tensor,
    *,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """GeGLU's activation: `y = round_S(gelu(gate) * up)`, in float32, with the tanh form of gelu.

        gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))
                = g / (1 + exp(-2 * sqrt(2 / pi) * (g + 0.044715 * g^3)))

    It is computed in the second form, which keeps its bits where g is negative.

    Arguments, result and errors as in `silu_mul`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return _run_plain(_gelu_tanh_mul, (gate, up, round_activation), out, tokens_per_expert)


def gelu_tanh_mul_quant(
    gate: Tensor,
    up: Tensor,
    quant_key: QuantKey | None,
    *,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`gelu_tanh_mul`, then `quantize`: arguments, result and errors as in `silu_mul_quant`."""
    args = (gate, up, round_activation)
    return _run(_gelu_tanh_mul, _gelu_tanh_mul_quant, args, quant_key, tokens_per_expert, quant)


def swiglu_oai_mul(
    gate: Tensor,
    up: Tensor | None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """gpt-oss's activation: `y = round_S((clamp(up, -l, l) + 1) * g * sigmoid(alpha * g))`, `g = min(gate, l)`.

    Args:
        gate, up: as in `silu_mul`. With `up=None` gate is [..., 2N] and holds both, interleaved, gate first.
        alpha, limit: numbers, limit at least 0.
        round_activation: round every step to S, as eager model code does.
        tokens_per_expert, out: as in `silu_mul`; with `up=None` out has memory of its own.

    Returns:
        y, [..., N] in S.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
    """
    args = (gate, up, alpha, limit, round_activation)
    return _run_plain(_swiglu_oai_mul, args, out, tokens_per_expert)


def swiglu_oai_mul_quant(
    gate: Tensor,
    up: Tensor | None,
    quant_key: QuantKey | None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    round_activation: bool = False,
    tokens_per_expert: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`swiglu_oai_mul`, then `quantize`: arguments as in these two, result and errors as in `silu_mul_quant`."""
    args = (gate, up, alpha, limit, round_activation)
    return _run(_swiglu_oai_mul, _swiglu_oai_mul_quant, args, quant_key, tokens_per_expert, quant)


def relu2(x: Tensor, *, tokens_per_expert: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Squared ReLU: `y = round_S(max(x, 0)^2)`.

    Arguments, result and errors as in `silu_mul`, with one input.

    Source: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021.
    """
    return _run_plain(_relu2, (x,), out, tokens_per_expert)


def relu2_quant(
    x: Tensor,
    quant_key: QuantKey | None,
    *,
    tokens_per_expert: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> QuantizedActivation | Tensor:
    """`relu2`, then `quantize`: arguments, result and errors as in `silu_mul_quant`, with one input."""
    return _run(_relu2, _relu2_quant, (x,), quant_key, tokens_per_expert, quant)


def _run_plain(op: Op, args: tuple, out: Tensor | None, tokens_per_expert: Tensor | None) -> Any:
    _refuse_int(op, args)
    return invoke(op, args, None if out is None else (out,), _optional(tokens_per_expert))


def _run(plain: Op, fused: Op, args: tuple, quant_key, tokens_per_expert: Tensor | None, quant: QuantOptions) -> Any:
    if quant_key is None:
        return _run_plain(plain, args, plain_out(fused.name, quant), tokens_per_expert)
    _refuse_int(fused, args)
    return run_quant(fused, args, quant_key, quant, None, _optional(tokens_per_expert))


def _optional(tokens_per_expert: Tensor | None) -> tuple:
    return () if tokens_per_expert is None else (tokens_per_expert,)


def _refuse_int(op: Op, args: tuple) -> None:
    """`round_activation`, the last one where it is there: PyTorch would take 1 for True."""
    if type(args[-1]) is int:
        boolean(op.name, round_activation=args[-1])
