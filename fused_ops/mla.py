"""Multi-head latent attention (MLA): rotary embedding of its decoupled heads, and its cache.

    kv_cache[slot // block_size, slot % block_size] = [kv_c[t], rope(k_pe[t])]

A token's row of the cache is the latent, from which keys and values are projected, and one rotated key for all heads.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from torch import Tensor

from ._check import FLOATS, check
from ._op import Written, invoke, op
from .kv_cache import _rope_kv_cache_write, check_write
from .rope import check_rope, rotary_code


@op("q_pe")
def _mla_rope_kv_cache_concat(
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    kv_cache: Written,
    slot_mapping: Tensor,
    kv_scale: Tensor | None,
    flags: int,
):
    k_cache, v_cache = halves(kv_cache, kv_c.shape[-1])
    inputs = (q_pe, k_pe.unsqueeze(1), kv_c.unsqueeze(1), positions, cos_sin_cache, k_cache, v_cache, slot_mapping)
    return _rope_kv_cache_write.reference(*inputs, kv_scale, kv_scale, flags, 0)[0]


def halves(kv_cache: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rotated keys, latents) as caches of one head."""
    cache = kv_cache.unsqueeze(2)
    return cache[..., rank:], cache[..., :rank]


@_mla_rope_kv_cache_concat.declares("check")
def _(q_pe, k_pe, kv_c, positions, cos_sin_cache, kv_cache, slot_mapping, kv_scale, flags, *, name):
    check(name, q_pe=(q_pe, "T H D", FLOATS), k_pe=(k_pe, "T D", "q_pe"), kv_c=(kv_c, "T R", "q_pe"))
    sizes = check_rope(q_pe, k_pe.unsqueeze(1), positions, cos_sin_cache, flags, 0, name=name)
    sizes["C"] = kv_c.shape[1] + sizes["D"]
    caches = {"kv_cache": (kv_cache, "B P C", "kv_scale", kv_scale)}
    inputs = {"q_pe": q_pe, "k_pe": k_pe, "kv_c": kv_c, "positions": positions, "cos_sin_cache": cos_sin_cache}
    check_write(name, sizes, caches, slot_mapping, inputs)


@_mla_rope_kv_cache_concat.declares("empty")
def _(q_pe, *_):
    return q_pe.new_empty(q_pe.shape)


def mla_rope_kv_cache_concat(
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scale: Tensor | None = None,
    is_neox: bool = False,
    round_products: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`rope` of q_pe and k_pe, and [kv_c, k_pe] into a paged cache of latents, in one launch.

    Args:
        q_pe: [T, heads, P] bfloat16, float16 or float32 (S); a view of q's last columns passes.
        k_pe: [T, P] in S, the one rotated key of all heads. kv_c: [T, kv_lora_rank] in S, normed.
        positions, cos_sin_cache, round_products: as in `rope`; is_neox too, but pairs are interleaved by default.
        kv_cache: [blocks, block_size, kv_lora_rank + P] in S, FP8 or int8; written.
        slot_mapping: as in `rope_kv_cache_write`. kv_scale: float32 [1], of an FP8 or int8 cache.
        out: written instead of a fresh tensor; may be q_pe.

    Returns:
        q_pe rotated, [T, heads, P] in S, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a position or a slot is out of range;
            nothing is written.
    """
    flags, _ = rotary_code("mla_rope_kv_cache_concat", is_neox=is_neox, round_products=round_products)
    args = (q_pe, k_pe, kv_c, positions, cos_sin_cache, kv_cache, slot_mapping, kv_scale, flags)
    return invoke(_mla_rope_kv_cache_concat, args, None if out is None else (out,))
