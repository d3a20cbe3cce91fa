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
from quant import QuantKey


def rms_norm(x, weight, eps, flags):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (weight * y.to(x.dtype) if flags & ROUND_BEFORE_WEIGHT else (weight * y).to(x.dtype),)


def fused_add_rms_norm(x, residual, weight, eps, flags):
    residual = x + residual
    return *rms_norm(residual, weight, eps, flags), residual


def silu_mul(gate, up, round_activation):
    return (F.silu(gate) * up,)


def quantize(x: Tensor, key: QuantKey, given: Tensor | None):
    limit, smallest = (127.0, 2.0**-23) if key.dtype == torch.int8 else (448.0, 1 / (448 * 512))
    cols, group = x.shape[-1], key.group_size(x.shape[-1])
    y = F.pad(x.float(), (0, -cols % group)).unflatten(-1, (-1, group))
    scale = given if key.scale.static else (y.abs().amax(-1, keepdim=True) / limit).clamp_min(smallest)
    y = y / scale
    y = (y.round() if key.dtype == torch.int8 else y).clamp(-limit, limit)
    codes = y.to(key.dtype).flatten(-2)[..., :cols]
    return (codes,) if key.scale.static else (codes, scale.squeeze(-1))


def rms_norm_quant(x, weight, eps, flags, key, given):
    return quantize(*rms_norm(x, weight, eps, flags), key, given)


def fused_add_rms_norm_quant(x, residual, weight, eps, flags, key, given):
    y, residual = fused_add_rms_norm(x, residual, weight, eps, flags)
    return *quantize(y, key, given), residual


def silu_mul_quant(gate, up, round_activation, key, given):
    return quantize(*silu_mul(gate, up, round_activation), key, given)


def rope(q, k, positions, cos_sin_cache, is_neox, round_products):
    dtype = q.dtype if round_products else torch.float32
    cos, sin = cos_sin_cache[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return rotate(q), rotate(k)


_ALL = (
    quantize,
    rms_norm,
    fused_add_rms_norm,
    rms_norm_quant,
    fused_add_rms_norm_quant,
    silu_mul,
    silu_mul_quant,
    rope,
)
FUNCTIONS: dict[str, Callable[..., tuple]] = {function.__name__: function for function in _ALL}
