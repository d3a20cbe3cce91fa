"""PyTorch as a model author writes it, one tensor operation after another; `compiled` fuses this same code.

`FUNCTIONS[op](*args)` takes an operation's arguments, with its key as a `QuantKey`, and returns what the
operation writes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.norm import ROUND_BEFORE_WEIGHT
from fused_ops.rope import IS_NEOX, ROUND_PRODUCTS
from quant import QuantKey, formats


def rms_norm(x, weight, eps, flags):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (weight * y.to(x.dtype) if flags & ROUND_BEFORE_WEIGHT else (weight * y).to(x.dtype),)


def fused_add_rms_norm(x, residual, weight, eps, flags):
    residual = x + residual
    return *rms_norm(residual, weight, eps, flags), residual


def fused_add_rms_norm_pad(x, residual, weight, eps, flags, multiple):
    y, residual = fused_add_rms_norm(x, residual, weight, eps, flags)
    return F.pad(y, (0, -y.shape[-1] % multiple)), residual


def dual_rms_norm(q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, *_):
    no_scale = q.new_empty(0, dtype=torch.float32)
    (q,), (kv,) = rms_norm(q, q_weight, q_eps, flags), rms_norm(kv, kv_weight, kv_eps, flags)
    return q, no_scale, kv, no_scale


def rms_norm_add(x, residual, weight, eps, flags):
    return (residual + rms_norm(x, weight, eps, flags)[0],)


def rms_norm_add_rms_norm(x, residual, post_weight, weight, post_eps, eps, flags):
    (residual,) = rms_norm_add(x, residual, post_weight, post_eps, flags)
    return *rms_norm(residual, weight, eps, flags), residual


def layer_norm(x, weight, bias, eps):
    return (F.layer_norm(x, x.shape[-1:], weight, bias, eps),)


def silu_mul(gate, up, round_activation):
    return (F.silu(gate) * up,)


def gelu_tanh_mul(gate, up, round_activation):
    return (F.gelu(gate, approximate="tanh") * up,)


def swiglu_oai_mul(gate, up, alpha, limit, round_activation):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(gate * alpha)),)


def relu2(x):
    return (F.relu(x).square(),)


def quantize(x: Tensor, key: QuantKey, given: Tensor | None):
    if key.packing == 2 or key.scale.dtype != torch.float32 or not key.symmetric or key.per_tensor > key.scale.static:
        return _reference_quantize(x, key, given)
    limit, smallest = (127.0, 2.0**-23) if key.dtype == torch.int8 else (448.0, 1 / (448 * 512))
    cols, group = x.shape[-1], key.group_size(x.shape[-1])
    y = F.pad(x.float(), (0, -cols % group)).unflatten(-1, (-1, group))
    scale = given if key.scale.static else (y.abs().amax(-1, keepdim=True) / limit).clamp_min(smallest)
    y = y / scale
    y = (y.round() if key.dtype == torch.int8 else y).clamp(-limit, limit)
    codes = y.to(key.dtype).flatten(-2)[..., :cols]
    return (codes,) if key.scale.static else (codes, scale.squeeze(-1))


def _reference_quantize(x: Tensor, key: QuantKey, given: Tensor | None):
    """Formats that nobody writes by hand in model code: this library's reference."""
    name = "scale2" if key.scale2 else "scale"
    options = {} if given is None else {name: given}
    data, scale, zero_point = formats.quantize(x, key, **options)
    return tuple(t for t in (data, None if key.scale.static else scale, zero_point) if t is not None)


def _quantized(operation: Callable[..., tuple]) -> Callable[..., tuple]:
    def run(*args):
        *inputs, key, given = args
        y, *others = operation(*inputs)
        return *quantize(y, key, given), *others

    run.__name__ = f"{operation.__name__}_quant"
    return run


def rope(q, k, positions, cos_sin_cache, flags, mrope):
    dtype = q.dtype if flags & ROUND_PRODUCTS else torch.float32
    cos, sin = cos_sin_cache[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)

    def rotate(x):
        if flags & IS_NEOX:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2).to(x.dtype)

    return rotate(q), rotate(k)


def qk_norm_rope(q, k, positions, cos_sin_cache, q_weight, k_weight, eps, flags, mrope):
    (q,), (k,) = rms_norm(q, q_weight, eps, flags), rms_norm(k, k_weight, eps, flags)
    return rope(q, k, positions, cos_sin_cache, flags, mrope)


def rope_kv_cache_write(
    q, k, v, positions, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, flags, mrope
):
    q, k = rope(q, k, positions, cos_sin_cache, flags, mrope)
    for cache, rows, scale in (k_cache, k, k_scale), (v_cache, v, v_scale):
        _write(cache.flatten(0, 1), rows, slot_mapping, scale)
    return (q,)


def qk_norm_rope_kv_cache_write(q, k, v, positions, cos_sin_cache, q_weight, k_weight, eps, *caches_and_flags):
    (q,), (k,) = rms_norm(q, q_weight, eps, caches_and_flags[-2]), rms_norm(k, k_weight, eps, caches_and_flags[-2])
    return rope_kv_cache_write(q, k, v, positions, cos_sin_cache, *caches_and_flags)


def mla_rope_kv_cache_concat(q_pe, k_pe, kv_c, positions, cos_sin_cache, kv_cache, slot_mapping, kv_scale, flags):
    q_pe, k_pe = rope(q_pe, k_pe.unsqueeze(1), positions, cos_sin_cache, flags, 0)
    _write(kv_cache.flatten(0, 1), torch.cat([kv_c, k_pe.squeeze(1)], dim=-1), slot_mapping, kv_scale)
    return (q_pe,)


def _write(cache, rows, slots, scale):
    if scale is not None:
        rows = (rows.float() / scale.view(-1, 1)).clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache[slots] = rows


_PLAIN = (
    rms_norm,
    layer_norm,
    fused_add_rms_norm,
    rms_norm_add_rms_norm,
    silu_mul,
    gelu_tanh_mul,
    swiglu_oai_mul,
    relu2,
)
_HEADS = (rope, qk_norm_rope, rope_kv_cache_write, qk_norm_rope_kv_cache_write, mla_rope_kv_cache_concat)
_ALL = (*_PLAIN, *map(_quantized, _PLAIN), quantize, fused_add_rms_norm_pad, dual_rms_norm, rms_norm_add, *_HEADS)
FUNCTIONS: dict[str, Callable[..., tuple]] = {function.__name__: function for function in _ALL}
