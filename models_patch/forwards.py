"""The fused forwards, one a role. Each gives the bits of the stock forward that `roles` and `stock` describe.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_ops import quantize, rms_norm_quant, swiglu_oai_mul_quant
from quant import QuantizedActivation

from .pending import Pending
from .ranks import workspace_of
from .roles import Norm, Sublayer

UNQUANTIZED: dict[str, Any] = {"quant_key": None}


def decoder_layer(
    self: Any,
    hidden_states: Tensor | Pending,
    *,
    sublayers: tuple[Sublayer, Sublayer],
    norm: Norm,
    fed: tuple[str | None, str | None],
    routed: bool = False,
    **kwargs: Any,
) -> Tensor | Pending:
    """A layer whose additions happen in the norm that follows: in this layer, or in the next one.

    sublayers: attention and MLP. norm: the kind of all their norms.
    fed: the layer of each that says how the one activation for it and others is quantized; None: it isn't.
    routed: whether the MLP is a mixture, whose router reads what is quantized for the experts.
    """
    attention, mlp = sublayers
    x, residual = _enter(self, attention, hidden_states, norm, fed[0])
    pending = _leave(self, attention, self.self_attn(hidden_states=x, **kwargs), residual, norm)
    x, residual = _enter(self, mlp, pending, norm, fed[1], routed)
    pending = _leave(self, mlp, self.mlp(x), residual, norm)
    return pending.sum() if self._forward_hooks else pending  # a hook expects the tensor


def _enter(
    layer: Any, sublayer: Sublayer, x: Tensor | Pending, norm: Norm, fed: str | None, routed: bool = False
) -> tuple[Any, Tensor]:
    """(the input of the sublayer's module, residual)"""
    quant = UNQUANTIZED
    if fed is not None:
        quant = getattr(getattr(layer, sublayer.module), fed).input_quant()
    if routed:
        quant = {**quant, "keep_unquantized": True}
    if sublayer.before is not None:
        return _normed(norm.of(getattr(layer, sublayer.before)), x, quant)
    x = x.sum() if isinstance(x, Pending) else x
    return (x if fed is None else quantize(x, **quant)), x


def _leave(layer: Any, sublayer: Sublayer, output: Any, residual: Tensor, norm: Norm) -> Pending:
    delta = output[0] if isinstance(output, tuple) else output  # attention weights, a router's scores
    if sublayer.dropout is not None:
        delta = getattr(layer, sublayer.dropout)(delta)
    multiplier = 1.0 if sublayer.multiplier is None else getattr(layer, sublayer.multiplier)
    post = None if sublayer.after is None else norm.of(getattr(layer, sublayer.after))
    return Pending(delta, residual, multiplier, post, workspace_of(getattr(layer, sublayer.module)))


def last_norm(self: Any, hidden_states: Tensor | Pending, *, norm: Norm) -> Tensor:
    """The norm after the last layer, with that layer's addition."""
    return _normed(norm.of(self), hidden_states, UNQUANTIZED)[0]


def _normed(norm: dict[str, Any], x: Tensor | Pending, quant: dict[str, Any]) -> tuple[Any, Tensor]:
    """(normed and quantized, residual)"""
    return x.norm(norm, quant) if isinstance(x, Pending) else (rms_norm_quant(x, **norm, **quant), x)


def gated_mlp(self: Any, x: Tensor | QuantizedActivation, *, activate: Callable, quantized: bool) -> Tensor:
    """SwiGLU or GeGLU; the down projection gets its input quantized as it wants it."""
    return _down(self, self.gate_proj(x), self.up_proj(x), activate, quantized)


def packed_mlp(
    self: Any, hidden_states: Tensor | QuantizedActivation, *, activate: Callable, quantized: bool
) -> Tensor:
    """The same where one projection gives both halves."""
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return _down(self, gate, up, activate, quantized)


def _down(mlp: Any, gate: Tensor, up: Tensor, activate: Callable, quantized: bool) -> Tensor:
    return mlp.down_proj(activate(gate, up, round_activation=True, **_quant_of_down(mlp, quantized)))


def experts_gate(self: Any, gate_up: Tensor, *, activate: Callable, quantized: bool) -> Any:
    """The activation between the products of experts, of gates and then ups."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, up, round_activation=True, **_quant_of_down(self, quantized))


def oai_experts_gate(self: Any, gate_up: Tensor, *, quantized: bool) -> Any:
    """gpt-oss's, of gates and ups that alternate."""
    stock = stock_of(self)
    quant = _quant_of_down(self, quantized)
    return swiglu_oai_mul_quant(gate_up, None, alpha=stock.alpha, limit=stock.limit, round_activation=True, **quant)


def stock_of(experts: Any) -> Any:
    """The module that says how experts are activated: quantized ones keep the model's."""
    return getattr(experts, "stock", experts)


def _quant_of_down(module: Any, quantized: bool) -> dict[str, Any]:
    return module.down_proj.input_quant() if quantized else UNQUANTIZED
