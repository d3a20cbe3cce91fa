"""The fused forward of multi-head latent attention (MLA), DeepSeek-V2's and V3's.

Modules are `Any` here, since torch types whatever hangs on a module as `Tensor | Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_ops import dual_rms_norm, mla_attention, mla_rope_kv_cache_concat, rms_norm, rope
from quant import QuantizedActivation

from .attention import UNQUANTIZED, attend, by_sequence
from .paging import is_paged
from .roles import LatentAttention


def latent_attention(
    self: Any,
    hidden_states: Tensor | QuantizedActivation,
    position_embeddings: Any = None,  # what `table` returns
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    role: LatentAttention,
    eager: Callable,
    q_quantized: bool,
    quantized: bool,
    rotate: Callable | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As `attention.attention`, of latents; caches hold these, and the rotated key that all heads share.

    q_quantized: whether `q_b_proj` gets its input quantized as it wants it; quantized: `o_proj`, from blocks.
    rotate: the model's function of complex numbers, whose products torch rounds in its own way, for what isn't read
        from blocks; None where `rope` gives the same bits.
    """
    shape, rotary = hidden_states.shape[:-1], role.rotation
    q, kv_c, k_pe = (x.flatten(0, 1) for x in _projected(self, hidden_states, role, q_quantized))
    q_nope, q_pe = q.unflatten(-1, (-1, self.qk_head_dim)).split((self.qk_nope_head_dim, self.qk_rope_head_dim), -1)
    if role.sorts_pairs:
        q_pe, k_pe = _evens_first(q_pe), _evens_first(k_pe)
    if is_paged(attention_mask):
        new = by_sequence(kv_c[:, None], shape), by_sequence(k_pe[:, None], shape)
        slots = past_key_values.slots(*new, self.layer_idx)
        if slots.kv_cache is None:
            raise ValueError("PagedKVCache: it holds no latents: its config has no kv_lora_rank, expected the model's")
        written = slots.kv_cache, slots.slot_mapping
        q_pe = mla_rope_kv_cache_concat(q_pe, k_pe, kv_c, None, position_embeddings, *written, **rotary.options)
        heads = self.kv_b_proj.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        w_uk, w_uv = heads.split((self.qk_nope_head_dim, self.v_head_dim), 1)
        quant = self.o_proj.input_quant("output_") if quantized else UNQUANTIZED
        inputs = q_nope, q_pe, slots.kv_cache, w_uk, w_uv, *slots.sequences
        return self.o_proj(mla_attention(*inputs, scale=self.scaling, **quant)).unflatten(0, shape), None
    q_nope, latents = by_sequence(q_nope, shape), by_sequence(kv_c[:, None], shape)
    if rotate is None:
        rotated = rope(q_pe, k_pe[:, None], None, position_embeddings, **rotary.options)
        q_pe, k_pe = (by_sequence(x, shape) for x in rotated)
    else:
        turns = torch.complex(*position_embeddings.chunk(2, -1)).unflatten(0, shape)
        q_pe, k_pe = rotate(by_sequence(q_pe, shape), by_sequence(k_pe[:, None], shape), turns)
    if past_key_values is not None:
        latents, k_pe = past_key_values.update(latents, k_pe, self.layer_idx)
    keys, values = self.expand_kv(latents, k_pe)
    output, weights = attend(self, eager, torch.cat((q_nope, q_pe), dim=-1), keys, values, attention_mask, **kwargs)
    return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def _projected(module: Any, x: Any, role: LatentAttention, q_quantized: bool) -> tuple[Any, Any, Any]:
    """Queries, normed latents, and keys still to be rotated, of all heads side by side."""
    kv = role.norm.of(module.kv_a_layernorm)
    kv_c, k_pe = module.kv_a_proj_with_mqa(x).split((module.kv_lora_rank, module.qk_rope_head_dim), -1)
    if not role.low_rank:
        return module.q_proj(x), rms_norm(kv_c, **kv), k_pe
    q, norm = module.q_a_proj(x), role.norm.of(module.q_a_layernorm)
    weights = norm.pop("weight"), kv["weight"], norm.pop("eps"), kv["eps"]
    quant: Any = module.q_b_proj.input_quant() if q_quantized else {}
    key = quant.pop("quant_key", None)
    q, kv_c = dual_rms_norm(q, kv_c, *weights, q_quant_key=key, q_options=quant, **norm)
    return module.q_b_proj(q), kv_c, k_pe


def _evens_first(x: Tensor) -> Tensor:
    """Pairs of neighbours as two halves: DeepSeek-V3 rotates the former and leaves the latter."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
