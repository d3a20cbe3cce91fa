"""Arguments of the operations on heads, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant import FP8_STATIC_TENSOR, NAMED_KEYS, QuantKey
from quant.key import FP8, FP8_FNUZ

from ._check import FLOATS
from ._op import NO_KEY
from .kv_cache import CODES, _qk_norm_rope_kv_cache_write, _rope_kv_cache_write
from .mla import _mla_rope_kv_cache_concat
from .norm import ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE
from .quantize import key_inputs
from .rope import IS_NEOX, NORM_V, ROUND_PRODUCTS, WHOLE_VECTOR, _qk_norm_rope, _rope, mrope_code


def rope_inputs(tokens: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype, device) -> tuple:
    """q, k cut out of one packed projection, positions and a cos_sin_cache, for tests and benchmarks."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angles = torch.arange(4096, device=device)[:, None] * frequencies
    return q, k, torch.randint(0, 4096, (tokens,), device=device), torch.cat([angles.cos(), angles.sin()], dim=-1)


SHAPES = (  # tokens, heads, kv_heads, dim, rotary_dim
    (1, 9, 3, 64, 64),
    (4, 4, 1, 128, 64),
    (33, 2, 2, 128, 96),
    (5, 3, 1, 80, 80),
    (3, 2, 1, 256, 256),
    (2, 2, 1, 576, 64),
    (7, 2, 2, 192, 48),
    (0, 2, 1, 64, 64),
    (3, 1, 1, 10, 6),
)


@_rope.declares("cases")
def cases(device: str) -> Iterator[tuple]:
    for shape in SHAPES:
        for dtype in FLOATS:
            q, k, positions, table = rope_inputs(*shape, dtype, device)
            for flags in IS_NEOX, ROUND_PRODUCTS:
                yield q, k, positions, table, flags, 0
                yield q, k, None, table[: shape[0]], flags ^ ROUND_PRODUCTS, 0
                third = shape[4] // 6
                mrope = mrope_code([shape[4] // 2 - 2 * third, third, third], flags == IS_NEOX)
                yield q, k, torch.randint(0, 4096, (3, shape[0]), device=device), table, flags, mrope


@_qk_norm_rope.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, (q, k, positions, table, flags, mrope) in enumerate(cases(device)):
        gate = torch.randn(*q.shape[:-1], 2 * q.shape[-1], device=device).to(q.dtype)[..., q.shape[-1] :]
        flags |= (ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE, WHOLE_VECTOR, 0)[i % 4]
        yield q, k, positions, table, *weights(q, k, flags, i), 1e-6, flags, mrope, *([gate] if i % 5 == 0 else [])


def weights(q: Tensor, k: Tensor, flags: int, i: int) -> list[Tensor | None]:
    """Of q's and k's norms, for tests."""
    made: list[Tensor | None] = []
    for x in q, k:
        cols = x.shape[-1] * (x.shape[1] if flags & WHOLE_VECTOR else 1)
        made.append(torch.randn(cols, device=x.device).to(torch.float32 if i % 3 else x.dtype))
    return [None, None] if i % 7 == 6 else made


@_rope.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return *heads_workload(tokens, cols, dtype, device), IS_NEOX, 0


@_qk_norm_rope.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    weight = torch.ones(128, dtype=dtype, device=device)
    return *heads_workload(tokens, cols, dtype, device), weight, weight, 1e-6, IS_NEOX | ROUND_BEFORE_WEIGHT, 0


def heads_workload(tokens: int, cols: int, dtype: torch.dtype, device: str) -> tuple:
    return rope_inputs(tokens, cols // 128, max(1, cols // 512), 128, 128, dtype, device)


def caches_for(k: Tensor, v: Tensor, dtype: torch.dtype, order: int = 0) -> tuple:
    """(k_cache, v_cache, slot_mapping, k_scale, v_scale) in one of several memory orders, for tests."""
    tokens, heads = k.shape[:2]
    block, blocks = (16, 5, 1)[order % 3], tokens + 3

    def cache(cols: int) -> Tensor:
        if order % 2:  # heads outermost in a block
            return torch.zeros(blocks, heads, block, cols, device=k.device).to(dtype).transpose(1, 2)
        return torch.zeros(blocks, block, heads, cols, device=k.device).to(dtype)

    if order in (2, 3) and k.shape == v.shape:  # both in one
        both = torch.zeros(blocks, block, 2, heads, k.shape[-1], device=k.device).to(dtype)
        k_cache, v_cache = both.unbind(2)
    else:
        k_cache, v_cache = cache(k.shape[-1]), cache(v.shape[-1])
    slots = torch.randperm(blocks * block, device=k.device)[: tokens - tokens // 8]
    slots[1::7] = -1
    if dtype not in CODES:
        return k_cache, v_cache, slots, None, None
    scales = torch.rand(2, heads, device=k.device) / 8 + 0.01
    return k_cache, v_cache, slots.int(), scales[0], scales[1, :1]


Q_KEYS = [NO_KEY, *(key.code for key in NAMED_KEYS.values() if key.symmetric and key.scale2 is None)]


def _q_key(i: int, dim: int, device: str) -> tuple:
    """(code, given) of one of the keys that serve heads of `dim`."""
    key = None if Q_KEYS[i % len(Q_KEYS)] == NO_KEY else QuantKey.from_code(Q_KEYS[i % len(Q_KEYS)])
    if key is None or (key.per_tensor and not key.scale.static) or dim % 32:
        return ()
    return key_inputs(key, device)[:2]


def write_cases(device: str) -> Iterator[tuple]:
    for i, (q, k, positions, table, flags, mrope) in enumerate(cases(device)):
        v = torch.randn(*k.shape[:2], k.shape[2] // 2 if i % 4 == 3 else k.shape[2], device=device).to(k.dtype)
        dtype = (k.dtype, FP8, torch.int8, k.dtype, FP8_FNUZ)[i % 5]
        yield q, k, v, positions, table, caches_for(k, v, dtype, i % 6), flags, mrope


@_rope_kv_cache_write.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, (*inputs, caches, flags, mrope) in enumerate(write_cases(device)):
        yield *inputs, *caches, flags, mrope, *(_q_key(i, inputs[0].shape[-1], device) if i % 3 == 0 else ())


@_qk_norm_rope_kv_cache_write.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, (args, write) in enumerate(zip(_qk_norm_rope.cases(device), write_cases(device), strict=True)):
        q, k, positions, table, q_weight, k_weight, eps, flags, mrope, *gate = args
        v, caches = write[2], write[5]
        flags |= NORM_V * (i % 2)
        more = _q_key(i, q.shape[-1], device) if i % 3 == 0 else ()
        more = (*(more or (NO_KEY, None)), *gate) if gate else more
        yield q, k, v, positions, table, q_weight, k_weight, eps, *caches, flags, mrope, *more


def _workload(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    q, k, positions, table = heads_workload(tokens, cols, dtype, device)
    v = torch.randn(k.shape, device=device).to(dtype)
    blocks, held = -(-tokens // 16), FP8 if key == FP8_STATIC_TENSOR else dtype
    caches = [torch.zeros(blocks, 16, *k.shape[1:], device=device).to(held) for _ in range(2)]
    scales = [None if held is dtype else torch.full((1,), 0.02, device=device)] * 2
    return q, k, v, positions, table, *caches, torch.randperm(blocks * 16, device=device)[:tokens], *scales


@_rope_kv_cache_write.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    return *_workload(tokens, cols, key, dtype, device), IS_NEOX, 0


@_qk_norm_rope_kv_cache_write.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    *inputs, k_cache, v_cache, slots, k_scale, v_scale = _workload(tokens, cols, key, dtype, device)
    weight = torch.ones(128, dtype=dtype, device=device)
    return *inputs, weight, weight, 1e-6, k_cache, v_cache, slots, k_scale, v_scale, IS_NEOX, 0


@_mla_rope_kv_cache_concat.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for i, (q, k, v, positions, table, caches, flags, mrope) in enumerate(write_cases(device)):
        if mrope:
            continue
        rank = 512 if i % 2 else v.shape[-1]
        kv_c = torch.randn(q.shape[0], rank + 8, device=device).to(q.dtype)[:, :rank]
        k_cache, _, slots, _, scale = caches
        cache = torch.zeros(*k_cache.shape[:2], rank + q.shape[-1], device=device).to(k_cache.dtype)
        yield q, k[:, 0], kv_c, positions, table, cache, slots, scale, flags


@_mla_rope_kv_cache_concat.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    q, *_, positions, table = heads_workload(tokens, cols, dtype, device)
    kv_c, k_pe = torch.randn(tokens, 512 + 64, device=device).to(dtype).split([512, 64], dim=-1)
    coded = key == FP8_STATIC_TENSOR
    cache = torch.zeros(-(-tokens // 16), 16, 512 + 64, device=device).to(FP8 if coded else dtype)
    scale = torch.full((1,), 0.02, device=device) if coded else None
    slots = torch.randperm(cache.shape[0] * 16, device=device)[:tokens]
    return q[..., :64], k_pe, kv_c, positions, table[:, :64].contiguous(), cache, slots, scale, 0
