"""The fused forwards of attention: what lies between its projections and the attention function, in one call.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fused_ops import qk_norm_rope, qk_norm_rope_kv_cache_write, rope, rope_kv_cache_write
from quant import QuantizedActivation

from .caches import slots_of
from .roles import Attention


def table(self: Any, x: Tensor, *args: Any, repeats: bool, **kwargs: Any) -> Tensor:
    """The model's cosines and sines as `fused_ops.rope` takes them: float32 [tokens, rotary_dim], a row a token.

    x: [batch, length, hidden_size]. The other arguments are those of the stock forward, which is called for float32.
    repeats: whether that has each angle twice. It may have one row for all sequences of a batch.
    """
    cos, sin = type(self).forward(self, torch.empty(0, dtype=torch.float32, device=x.device), *args, **kwargs)
    if repeats:
        cos, sin = (both.chunk(2, dim=-1)[0] for both in (cos, sin))
    return torch.cat((cos, sin), dim=-1).expand(*x.shape[:-1], -1).flatten(0, 1)


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
    shape = hidden_states.shape[:-1]
    q, k, v = _heads(self, hidden_states, role)
    keys, values = _by_sequence(k, shape), _by_sequence(v, shape)
    slots = slots_of(past_key_values, self.layer_idx, keys, values, kwargs)
    if slots is not None:
        write = rope_kv_cache_write, qk_norm_rope_kv_cache_write
        caches = slots.k_cache, slots.v_cache, slots.slot_mapping
        scales: dict[str, Any] = {"k_scale": slots.k_scale, "v_scale": slots.v_scale}
        q = _fused(self, role, *write, (q, k, v, None, position_embeddings), caches, **scales)
        keys, values = slots.read()
        kwargs |= slots.options
    else:
        q, k = _fused(self, role, rope, qk_norm_rope, (q, k, None, position_embeddings))
        keys = _by_sequence(k, shape)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
    options |= {name: _at(self, path) for name, path in role.options}
    output, weights = attend(self, _by_sequence(q, shape), keys, values, attention_mask, **options, **kwargs)
    return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def _heads(module: Any, x: Tensor | QuantizedActivation, role: Attention) -> tuple[Tensor, ...]:
    """Queries, keys and values, [tokens, heads, head_dim] each."""
    if role.packed:
        qkv, keys = module.qkv_proj(x), module.num_key_value_heads * module.head_dim
        parts = qkv.split((qkv.shape[-1] - 2 * keys, keys, keys), dim=-1)
    else:
        parts = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    return tuple(part.flatten(0, 1).unflatten(-1, (-1, module.head_dim)) for part in parts)


def _fused(
    module: Any, role: Attention, plain: Callable, norming: Callable, inputs: tuple, caches: tuple = (), **scales: Any
) -> Any:
    """The operation without norms or the one with them."""
    if role.norm is None:
        return plain(*inputs, *caches, **scales, **role.rotation.options)
    norm = role.norm.of(module.k_norm)
    weights = module.q_norm.weight, norm.pop("weight"), norm.pop("eps")
    norm |= {"whole_vector": role.whole_vector, **role.rotation.options}
    return norming(*inputs, *weights, *caches, **scales, **norm)


def _by_sequence(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[tokens, heads, head_dim] as [batch, heads, length, head_dim]."""
    return x.unflatten(0, shape).transpose(1, 2)


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module
