"""What the stock modules compute whose place a fused operation may take.

Nothing here is ever run. A module is one of these if each function of the class has the same formula as the module's of
that name, and each other attribute the same value: `families.mismatch` compares. Of attention, `heads` and `rotate`
stand for what models do differently there; `attention_family` puts them together.
"""

# ruff: noqa: F821
from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

# Norms.


class LlamaNorm:
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(hidden_states.dtype)


class Olmo2Norm:
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * y).to(hidden_states.dtype)


class GemmaNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


# MLPs.


class GatedMLP:
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP:
    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class OaiExperts:
    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(min=None, max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


class PackedExperts:
    def _apply_gate(self, gate_up_out):
        gate, up = gate_up_out.chunk(2, dim=-1)
        return self.act_fn(gate) * up


# Activations: those of transformers, then torch's own.


class SiLUActivation:
    def forward(self, input):
        return nn.functional.silu(input)


class GELUTanh:
    act = partial(F.gelu, approximate="tanh")

    def forward(self, input):
        return self.act(input)


class SiLU:
    def forward(self, input):
        return F.silu(input, inplace=self.inplace)


class GELU:
    approximate = "tanh"

    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)


# Attention, but for the options that each model hands to the attention function.


class Attention:
    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
        query, key, value = heads(self, hidden_states)
        query, key = rotate(self, query, key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        output = attended[0].reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(output), attended[1]


def rotated(self, query, key, position_embeddings):
    cos, sin = position_embeddings
    return apply_rotary_pos_emb(query, key, cos, sin)


def rotated_in_some_layers(self, query, key, position_embeddings):
    if self.use_rope:
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key


# Attention over latents, which a cache holds instead of keys and values.


class Latent:
    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
        batch, length = hidden_states.shape[:-1]
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.view((batch, length, -1, self.qk_head_dim)).transpose(1, 2)
        q_nope, q_pe = torch.split(query, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_pe = torch.split(compressed, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, length, self.kv_lora_rank)
        k_pe = k_pe.view(batch, 1, length, self.qk_rope_head_dim)
        q_pe, k_pe = rotate(self, q_pe, k_pe, position_embeddings)
        if past_key_values is not None:
            latent, k_pe = past_key_values.update(latent, k_pe, self.layer_idx)
        query = torch.cat((q_nope, q_pe), dim=-1)
        key, value = self.expand_kv(latent, k_pe)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(attended[0].reshape(batch, length, -1).contiguous()), attended[1]

    def expand_kv(self, kv_nope, k_rot):  # compared as it stands: it assigns to parts of a tensor
        batch_size, _, seq_length, _ = kv_nope.shape
        key_shape = (batch_size, seq_length, -1, self.qk_nope_head_dim + self.v_head_dim)
        kv_nope = self.kv_b_proj(kv_nope).view(key_shape).transpose(1, 2)
        k_nope, value_states = torch.split(kv_nope, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot = k_rot.expand(-1, k_nope.shape[1], -1, -1)
        key_states = kv_nope.new_empty(*kv_nope.shape[:-1], self.qk_nope_head_dim + self.qk_rope_head_dim)
        key_states[..., : self.qk_nope_head_dim].copy_(k_nope)
        key_states[..., self.qk_nope_head_dim :].copy_(k_rot)
        return key_states, value_states


def rotated_as_complex(self, query, key, position_embeddings):
    return apply_rotary_emb(query, key, position_embeddings.to(query.device))


def rotated_as_asked(self, query, key, position_embeddings):
    cos, sin = position_embeddings
    if self.config.rope_interleave:
        query, key = apply_rotary_pos_emb_interleave(query, key, cos, sin)
    else:
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query, key


# What the attention function "eager" computes: plain, with a soft cap, with sinks.


def eager(module, query, key, value, attention_mask):
    weights = torch.matmul(query, repeat_kv(key, module.num_key_value_groups).transpose(2, 3)) * scaling
    return weighted(module, query, value, attention_mask, weights)


def eager_soft_capped(module, query, key, value, attention_mask):
    if scaling is None:
        scaling = module.head_dim**-0.5
    weights = torch.matmul(query, repeat_kv(key, module.num_key_value_groups).transpose(2, 3)) * scaling
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    return weighted(module, query, value, attention_mask, weights)


def weighted(module, query, value, attention_mask, weights):
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, repeat_kv(value, module.num_key_value_groups))
    return output.transpose(1, 2).contiguous(), weights


def eager_with_sinks(module, query, key, value, attention_mask):
    logits = torch.matmul(query, repeat_kv(key, module.num_key_value_groups).transpose(2, 3)) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    logits = torch.cat([logits, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    value = repeat_kv(value, module.num_key_value_groups)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# Its heads: plain, of one projection, and normed in several ways.


def separate(self, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
    key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
    return query, key, self.v_proj(hidden_states).view(shape).transpose(1, 2)


def packed(self, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    qkv = self.qkv_proj(hidden_states)
    queries = self.config.num_attention_heads * self.head_dim
    query = qkv[..., :queries].view(shape).transpose(1, 2)
    key = qkv[..., queries : queries + self.num_key_value_heads * self.head_dim].view(shape).transpose(1, 2)
    value = qkv[..., queries + self.num_key_value_heads * self.head_dim :].view(shape).transpose(1, 2)
    return query, key, value


def normed(self, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    return query, key, self.v_proj(hidden_states).view(shape).transpose(1, 2)


def normed_after_transpose(self, hidden_states):
    query, key, value = separate(self, hidden_states)
    return self.q_norm(query), self.k_norm(key), value


def normed_if_asked(self, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
    if self.use_qk_norm:
        query, key = self.q_norm(query), self.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2), self.v_proj(hidden_states).view(shape).transpose(1, 2)


def normed_whole(self, hidden_states):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query = self.q_norm(self.q_proj(hidden_states)).view(shape).transpose(1, 2)
    key = self.k_norm(self.k_proj(hidden_states)).view(shape).transpose(1, 2)
    return query, key, self.v_proj(hidden_states).view(shape).transpose(1, 2)


# Rotary embedding: the functions in the attention's module.


class Halves:
    def rotate_half(x):
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-second, first), dim=-1)

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class PartialHalves:
    rotate_half = Halves.rotate_half

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        rotary_dim = cos.shape[-1]
        q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
        k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
        q_rot, k_rot = q_rot * cos + rotate_half(q_rot) * sin, k_rot * cos + rotate_half(k_rot) * sin
        return torch.cat([q_rot, q_pass], dim=-1), torch.cat([k_rot, k_pass], dim=-1)


class PartialPairs:
    def rotate_half(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((-odd, even), dim=-1).flatten(-2)

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
        sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
        rotary_dim = cos.shape[-1]
        q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
        k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
        q_rot, k_rot = q_rot * cos + rotate_half(q_rot) * sin, k_rot * cos + rotate_half(k_rot) * sin
        return torch.cat([q_rot, q_pass], dim=-1), torch.cat([k_rot, k_pass], dim=-1)


class Float32Halves:
    rotate_half = Halves.rotate_half

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        q_embed, k_embed = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        return q_embed.to(q.dtype), k_embed.to(k.dtype)


class ChunkedHalves:
    def _apply_rotary_emb(x, cos, sin):
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _apply_rotary_emb(q, cos, sin), _apply_rotary_emb(k, cos, sin)


class SortedPairs:
    rotate_half = Halves.rotate_half
    apply_rotary_pos_emb = Halves.apply_rotary_pos_emb

    def apply_rotary_pos_emb_interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        cos = cos[..., : cos.shape[-1] // 2].unsqueeze(unsqueeze_dim)
        sin = sin[..., : sin.shape[-1] // 2].unsqueeze(unsqueeze_dim)
        q1, q2, k1, k2 = q[..., 0::2], q[..., 1::2], k[..., 0::2], k[..., 1::2]
        q_rot = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1)
        return q_rot, torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], dim=-1)


class ComplexPairs:
    def apply_rotary_emb(xq, xk, freqs_cis):
        q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
        k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
        turn = freqs_cis.unsqueeze(1).to(q.device)
        q = torch.view_as_real(q * turn).flatten(3).type_as(xq)
        return q, torch.view_as_real(k * turn).flatten(3).type_as(xk)


# The model's table of cosines and sines: each angle twice, or once; in S or in float32.


class TwiceInS:
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class TwiceInSForEachType:
    def forward(self, x, position_ids, layer_type):
        inv_freq = getattr(self, f"{layer_type}_inv_freq")
        attention_scaling = getattr(self, f"{layer_type}_attention_scaling")
        freqs = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos() * attention_scaling, emb.sin() * attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class TwiceInFloat32:
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling


class TwiceInFloat32ForEachType:
    def forward(self, x, position_ids, layer_type):
        inv_freq = getattr(self, f"{layer_type}_inv_freq")
        attention_scaling = getattr(self, f"{layer_type}_attention_scaling")
        freqs = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos() * attention_scaling, emb.sin() * attention_scaling


class Complex:
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return torch.polar(torch.ones_like(freqs), freqs) * self.attention_scaling


class OnceInS:
    def forward(self, x, position_ids):
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = freqs.cos() * self.attention_scaling, freqs.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
