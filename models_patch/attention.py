"""The fused forwards of attention: what is between its projections and the attention function, in one call.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops import rope
from quant import QuantizedActivation

from .roles import Attention


def table(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The model's cosines and sines as `fused_ops.rope` takes them: float32 [tokens, rotary_dim], a row a token.

    x: [batch, length, hidden_size]. The other arguments are those of the stock forward, which is called for float32;
    it may repeat each angle, and have one row for all sequences of a batch.
    """
    cos, sin = type(self).forward(self, torch.empty(0, device=x.device), *args, **kwargs)
    if self.repeats:
        cos, sin = (half.chunk(2, dim=-1)[0] for half in (cos, sin))
    rows = torch.cat((cos, sin), dim=-1)
    return rows.expand(*x.shape[:-1], -1).flatten(0, 1)


def attention(
    self: Any,
    hidden_states: Tensor | QuantizedActivation,
    position_embeddings: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    role: Attention,
    eager: Callable,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention module's forward.

    hidden_states: [batch, length, hidden_size]. position_embeddings: what `table` returns.
    role: what the stock forward does. eager: the attention function for `attn_implementation="eager"`.
    """
    batch = hidden_states.shape[0]
    q, k, v = _heads(self, hidden_states, role)
    q, k = rope(q, k, None, position_embeddings, **role.rotation.options)
    q, k, v = (_by_sequence(x, batch) for x in (q, k, v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    dropout = self.attention_dropout if self.training else 0.0
    options = {name: _at(self, path) for name, path in role.options}
    attend = _attention_function(self, eager)
    output, weights = attend(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options, **kwargs
    )
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _heads(module: Any, x: Tensor | QuantizedActivation, role: Attention) -> tuple[Tensor, ...]:
    """Queries, keys and values, [tokens, heads, head_dim] each."""
    if not role.packed:
        parts = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    else:
        qkv, keys = module.qkv_proj(x), module.num_key_value_heads * module.head_dim
        parts = qkv.split((qkv.shape[-1] - 2 * keys, keys, keys), dim=-1)
    return tuple(part.flatten(0, 1).unflatten(-1, (-1, module.head_dim)) for part in parts)


def _by_sequence(x: Tensor, batch: int) -> Tensor:
    """[tokens, heads, head_dim] as [batch, heads, length, head_dim]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def _attention_function(module: Any, eager: Callable) -> Callable:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # needed by those who have a model only

    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
