"""vLLM's attention on CPUs: rotation, the write into its cache and attention over its blocks, in two operations.

vLLM's own kernels keep keys in an order of their own inside a block, which nothing else reads. Here a block of a head
holds the rows of its keys, then those of its values, in the same memory. So the two are replaced together or not.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from fused_ops import RotaryOptions, paged_attention, qk_norm_rope_kv_cache_write, rope_kv_cache_write
from fused_ops._op import NO_KEY
from quant import QuantizedActivation, QuantKey, formats

from ..source import first_argument
from .dataflow import computes
from .linear import as_vllms, input_quant

# What forwards compute that are served (see `dataflow.computes`), and whether they have norms of q and k.
_SPLIT = "self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)"


def _attention_of(q: str, k: str) -> str:
    rotated = f"self.rotary_emb(positions, {q}, {k})"
    return f"self.o_proj(self.attn({rotated}[0], {rotated}[1], {_SPLIT}[2]))[0]"


def _heads(norm: str, heads: str, part: int) -> tuple[str, str]:
    """Each head normed, in Qwen3's words and in Gemma3's."""
    x = f"{_SPLIT}[{part}]"
    return (
        f"self.{norm}({x}.view(*{x}.shape[:-1], {x}.shape[-1] // self.head_dim, self.head_dim)).view({x}.shape)",
        f"self.{norm}({x}.unflatten(-1, (self.{heads}, self.head_dim))).flatten(-2, -1)",
    )


FORMULAS: dict[str | None, bool] = {_attention_of(f"{_SPLIT}[0]", f"{_SPLIT}[1]"): False}
FORMULAS |= {
    _attention_of(q, k): True
    for q, k in zip(_heads("q_norm", "num_heads", 0), _heads("k_norm", "num_kv_heads", 1), strict=True)
}

_library = torch.library.Library("fused_ops_vllm", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin_cache, bool is_neox, str layer, "
    "int key, Tensor? scale, Tensor? zero_point, Tensor? q_weight, Tensor? k_weight, float eps, float weight_bias) "
    "-> (Tensor, Tensor)"
)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, is_neox: bool, layer_name: str, code: int,
    scale: Tensor | None, zero_point: Tensor | None, *norms: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rows, their scales): in S and empty where `code` is NO_KEY."""
    metadata, layer, cache, slots = get_attention_context(layer_name)
    if metadata is None:  # vLLM measures memory
        return _empty(q, k, v, positions, table, is_neox, layer_name, code, scale, zero_point, *norms)
    if metadata.dynamic_causal is not None:
        raise NotImplementedError(f"{layer_name}: a mask that isn't causal for each sequence; {_SWITCH_OFF}")
    impl, tokens = layer.impl, metadata.num_actual_tokens
    if tokens < len(q):  # padding
        q, k, v, positions = q[:tokens], k[:tokens], v[:tokens], positions[:tokens]
    if tokens < len(slots):
        slots = slots[:tokens]
    q, k, v = (x.view(tokens, -1, impl.head_size) for x in (q, k, v))
    k_cache, v_cache = _caches(layer, cache)
    heads, caches = (q, k, v, positions, table), (k_cache, v_cache, slots)
    rotary: RotaryOptions = {"is_neox": is_neox, "round_products": True}  # as in Hugging Face's models
    q_weight, k_weight, eps, bias = norms
    if q_weight is None:
        q = rope_kv_cache_write(*heads, *caches, **rotary)
    else:
        order: dict[str, Any] = {"weight_bias": bias, "round_before_weight": not bias and q_weight.dtype == q.dtype}
        q = qk_norm_rope_kv_cache_write(*heads, q_weight, k_weight, eps, *caches, **order, **rotary)
    output: dict[str, Any] = {}
    if code != NO_KEY:
        output = {"output_quant_key": QuantKey.from_code(code), "output_scale": scale, "output_zero_point": zero_point}
    y = paged_attention(
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        scale=impl.scale,
        causal=metadata.causal,
        sliding_window=impl.sliding_window if impl.sliding_window > 0 else None,
        soft_cap=impl.logits_soft_cap or None,
        sinks=impl.sinks,
        **output,
    )
    return (y.data, y.scale) if isinstance(y, QuantizedActivation) else (y, y.new_empty(0))


def _caches(layer: Any, cache: Tensor) -> tuple[Tensor, ...]:
    """[blocks, block_size, kv_heads, D] of keys and of values, of vLLM's [blocks, kv_heads, block_size, 2 * D].

    Made once for a layer, since views take as long as a small batch.
    """
    known = getattr(layer, "fused_ops_caches", None)
    if known is None or known[0] is not cache:
        blocks, heads, size, dims = cache.shape
        rows = cache.view(blocks, heads, 2 * size, dims // 2).transpose(1, 2)
        known = layer.fused_ops_caches = cache, rows.split(size, 1)
    return known[1]


def _empty(q, k, v, positions, table, is_neox, layer_name, code, *_):
    if code == NO_KEY:
        return q.new_empty(q.shape), q.new_empty(0)
    data, scales, _ = formats.empty(q.shape, QuantKey.from_code(code), q.device)
    return data, (q.new_empty(1, dtype=torch.float32) if scales is None else scales)


_library.impl("attention", _attention, "CPU")
torch.library.register_fake("fused_ops_vllm::attention", _empty, lib=_library)


def forward(self: Any, positions: Tensor, hidden_states: Any, *, table: Tensor, norms: tuple, **_: Any) -> Tensor:
    """Of a module with `qkv_proj`, `rotary_emb`, `attn` and `o_proj`; attention quantizes for the last.

    norms: (weight of q's, of k's, eps, what is added to the weights); weights are None where there are none.
    """
    q, k, v = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    options, key = input_quant(self.o_proj)
    wanted = options["quant_key"]
    code = NO_KEY if wanted is None else wanted.code
    run = torch.ops.fused_ops_vllm.attention if torch.compiler.is_compiling() else _attention
    given = (self.attn.layer_name, code, options.get("scale"), options.get("zero_point"), *norms)
    y, scales = run(q, k, v, positions, table, self.rotary_emb.is_neox_style, *given)
    return self.o_proj(y if wanted is None else as_vllms(QuantizedActivation(y, scales, wanted, q.dtype), key))[0]


def _hidden_states_first(self: Any, hidden_states: Any, positions: Tensor, **options: Any) -> Tensor:
    """The same for callers that hand these over in the other order, as gpt-oss's."""
    return forward(self, positions, hidden_states, **options)


_SWITCH_OFF = "FUSED_OPS_VLLM=norm,activation,linear leaves attention to vLLM"


def problem(module: Any) -> str | None:
    """Why attention is left to vLLM in a module that holds an `Attention`; None where `bind` may be called."""
    normed = FORMULAS.get(computes(module))
    if normed is None:
        return "its forward is none that is known"
    attn, rotary, impl = module.attn, module.rotary_emb, module.attn.impl
    if type(attn) is not Attention or type(impl) is not CPUAttentionBackendImpl:
        return f"its attention is {type(attn).__name__} by {type(impl).__name__}"
    for method in "forward_native", "forward_cpu":
        if getattr(type(rotary), method, None) is not getattr(RotaryEmbedding, method):
            return f"its rotation is {type(rotary).__name__}'s own"
    checks = {
        f"its attention is {impl.attn_type}": impl.attn_type == AttentionType.DECODER,
        f"its cache is {impl.kv_cache_dtype}": not impl.is_fp8_kv_cache and attn.query_quant is None,
        "it reads another layer's cache": attn.kv_sharing_target_layer_name is None,
        "it has ALiBi slopes": impl.alibi_slopes is None,
        "its values have another size": attn.head_size == attn.head_size_v,
        "its norms are others": not normed or None not in _norms(module),
    }
    return next((text for text, served in checks.items() if not served), None)


def _norms(module: Any) -> tuple:
    """What `forward` takes; Nones where they aren't two norms of a kind with weights."""
    nothing = (None, None, 0.0, 0.0)
    both: list[Any] = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if all(isinstance(norm, GemmaRMSNorm) for norm in both):
        bias = 1.0
    elif all(isinstance(norm, RMSNorm) and norm.has_weight and norm.variance_size_override is None for norm in both):
        bias = 0.0
    else:
        return nothing
    (q, k), (eps, other) = both, (norm.variance_epsilon for norm in both)
    return (q.weight.data, k.weight.data, eps, bias) if eps == other else nothing


def bind(module: Any) -> str:
    """Bind `forward` to a module that has no `problem`; returns the operation that it calls besides attention."""
    normed = FORMULAS[computes(module)]
    norms = _norms(module) if normed else (None, None, 0.0, 0.0)
    run = forward if first_argument(type(module).forward) == "positions" else _hidden_states_first
    module.forward = partial(run, module, table=_table(module.rotary_emb), norms=norms)
    return "qk_norm_rope_kv_cache_write" if normed else "rope_kv_cache_write"


def _table(rotary: Any) -> Tensor:
    """Its cosines and sines in float32: once for all the modules that share it, since this may be 64 MiB."""
    if not hasattr(rotary, "fused_ops_table"):
        rotary.fused_ops_table = rotary.cos_sin_cache.float()
    return rotary.fused_ops_table


def register(parts: frozenset[str]) -> None:
    """Attention is bound to the modules of a loaded model."""
