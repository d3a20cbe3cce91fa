"""The fused forwards, one a role. Each gives the bits of the stock forward that `families` describes.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_ops import fused_add_rms_norm_quant, rms_norm_quant, silu_mul_quant
from quant import QuantizedActivation

from .pending import Pending

UNQUANTIZED: dict[str, Any] = {"quant_key": None}


def decoder_layer(
    self: Any, hidden_states: Tensor | Pending, *, quantize_attention: bool, quantize_mlp: bool, **kwargs: Any
) -> Tensor | Pending:
    """A pre-norm layer whose additions happen in the norm that follows: in this layer, or in the next one.

    quantize_attention, quantize_mlp: the norm hands the projections one activation, quantized as the first wants it.
    """
    quant = self.self_attn.q_proj.input_quant() if quantize_attention else UNQUANTIZED
    x, residual = _add_norm(self.input_layernorm, hidden_states, quant)
    x, _ = self.self_attn(hidden_states=x, **kwargs)
    quant = self.mlp.gate_proj.input_quant() if quantize_mlp else UNQUANTIZED
    x, residual = _add_norm(self.post_attention_layernorm, Pending(x, residual), quant)
    pending = Pending(self.mlp(x), residual)
    return pending.sum() if self._forward_hooks else pending  # a hook expects the tensor


def last_norm(self: Any, hidden_states: Tensor | Pending) -> Tensor:
    """The norm after the last layer, with that layer's addition."""
    return _add_norm(self, hidden_states, UNQUANTIZED)[0]


def gated_mlp(self: Any, x: Tensor | QuantizedActivation, *, quantize: bool) -> Tensor:
    """SwiGLU; the down projection gets its input quantized as it wants it."""
    quant = self.down_proj.input_quant() if quantize else UNQUANTIZED
    return self.down_proj(silu_mul_quant(self.gate_proj(x), self.up_proj(x), round_activation=True, **quant))


def _add_norm(norm: Any, x: Tensor | Pending, quant: dict[str, Any]) -> tuple[Any, Tensor]:
    """(normed and quantized, residual)"""
    options = {"round_before_weight": True, **quant}
    if isinstance(x, Pending):
        return fused_add_rms_norm_quant(x.delta, x.residual, norm.weight, norm.variance_epsilon, **options)
    return rms_norm_quant(x, norm.weight, norm.variance_epsilon, **options), x


BODIES = (decoder_layer, last_norm, gated_mlp)
