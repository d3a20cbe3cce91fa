"""The fused forwards of attention: what lies between its projections, in a call or two.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fused_ops import paged_attention, qk_norm_rope, qk_norm_rope_kv_cache_write, rope, rope_kv_cache_write
from quant import QuantizedActivation

from .caches import slots_of
from .paging import is_paged
from .ranks import qk_normed, workspace_of
from .roles import PAGED_OPTIONS, Attention, value_at

UNQUANTIZED: dict[str, Any] = {"output_quant_key": None}


def table(self: Any, x: Tensor, *args: Any, repeats: bool, **kwargs: Any) -> Tensor:
    """The model's cosines and sines as `fused_ops.rope` takes them: float32 [tokens, rotary_dim], a row a token.

    x: [batch, length, hidden_size]. The other arguments are those of the stock forward, which is called for float32.
    repeats: whether that has each angle twice. It may have one row for all sequences of a batch.
    """
    made = type(self).forward(self, torch.empty(0, dtype=torch.float32, device=x.device), *args, **kwargs)
    cos, sin = made if isinstance(made, tuple) else (made.real, made.imag)
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
    quantized: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention module's forward.

    hidden_states: [batch, length, hidden_size]. position_embeddings: what `table` returns.
    attention_mask: of no keys where `paging` found that keys are to be read from their blocks.
    role: what the stock forward does. eager: the attention function for `attn_implementation="eager"`.
    quantized: whether `o_proj` gets its input quantized as it wants it, from blocks.
    """
    shape, paged = hidden_states.shape[:-1], is_paged(attention_mask)
    q, k, v = _heads(self, hidden_states, role)
    keys, values = by_sequence(k, shape), by_sequence(v, shape)
    slots = slots_of(past_key_values, self.layer_idx, keys, values, kwargs) if paged or role.rotation else None
    if slots is not None:
        if role.rotation is None:
            slots.write(k, v)
        else:
            write = rope_kv_cache_write, qk_norm_rope_kv_cache_write
            caches = slots.k_cache, slots.v_cache, slots.slot_mapping
            scales: dict[str, Any] = {"k_scale": slots.k_scale, "v_scale": slots.v_scale}
            q = _fused(self, role, *write, (q, k, v, None, position_embeddings), caches, **scales)
        if paged:
            options = {PAGED_OPTIONS[name]: value_at(self, path) for name, path in role.options}
            options |= {"scale": self.scaling, "k_scale": slots.k_scale, "v_scale": slots.v_scale}
            quant = self.o_proj.input_quant("output_") if quantized else UNQUANTIZED
            tables, lengths, starts = slots.sequences
            output = paged_attention(q, slots.k_cache, slots.v_cache, tables, lengths, starts, **options, **quant)
            return self.o_proj(output).unflatten(0, shape), None
        keys, values = slots.read()
        kwargs |= slots.options
    else:
        if role.rotation is not None:
            q, k = _fused(self, role, rope, qk_norm_rope, (q, k, None, position_embeddings))
            keys = by_sequence(k, shape)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
    options = {name: value_at(self, path) for name, path in role.options}
    output, weights = attend(self, eager, by_sequence(q, shape), keys, values, attention_mask, **options, **kwargs)
    return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def attend(module: Any, eager: Callable, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The model's attention function of q, k, v and a mask, as every stock forward calls it."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    dropout = module.attention_dropout if module.training else 0.0
    return function(module, *inputs, dropout=dropout, scaling=module.scaling, **options)


def by_sequence(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[tokens, heads, head_dim] as [batch, heads, length, head_dim]."""
    return x.unflatten(0, shape).transpose(1, 2)


def _heads(module: Any, x: Tensor | QuantizedActivation, role: Attention) -> tuple[Tensor, ...]:
    """Queries, keys and values, [tokens, heads, head_dim] each."""
    if role.packed:
        qkv, keys = module.qkv_proj(x), module.num_key_value_heads * module.head_dim
        parts = qkv.split((qkv.shape[-1] - 2 * keys, keys, keys), dim=-1)
    else:
        parts = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    if role.norm_over_ranks is not None:
        q, k, v = parts
        q, k = qk_normed(q, k, module.q_norm, module.k_norm, role.norm_over_ranks, workspace_of(module))
        parts = q, k, v
    return tuple(part.flatten(0, 1).unflatten(-1, (-1, module.head_dim)) for part in parts)


def _fused(
    module: Any, role: Attention, plain: Callable, norming: Callable, inputs: tuple, caches: tuple = (), **scales: Any
) -> Any:
    """The operation without norms or the one with them."""
    assert role.rotation is not None
    if role.norm is None:
        return plain(*inputs, *caches, **scales, **role.rotation.options)
    norm = role.norm.of(module.k_norm)
    weights = module.q_norm.weight, norm.pop("weight"), norm.pop("eps")
    norm |= {"whole_vector": role.whole_vector, **role.rotation.options}
    return norming(*inputs, *weights, *caches, **scales, **norm)
