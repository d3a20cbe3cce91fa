"""Multi-head latent attention (MLA): rotary embedding of its decoupled heads, its cache, and attention over that.

    kv_cache[slot // block_size, slot % block_size] = [kv_c[t], rope(k_pe[t])]

A token's row of the cache is the latent, from which keys and values are projected, and one rotated key for all heads.

    s[i, j] = scale * (q_nope[i] . (w_uk c[j]) + q_pe[i] . k_pe[j])
    y[i] = sum_j softmax(s[i])[j] * (w_uv c[j])                                 in float32, then once to S

for each head, with its own w_uk and w_uv; c and k_pe are the two parts of a row. (w_uk c) may be computed for every
token, or both projections be moved to the queries and results (absorbed): `absorbs` says which, by the sequence alone.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1 and appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from ._check import FLOATS, check
from ._op import Written, invoke, op
from .attention import (
    OutputOptions,
    attended,
    cached,
    check_logits,
    check_sequences,
    run_attention,
    sequences,
    visible,
)
from .kv_cache import CODES, _rope_kv_cache_write, check_cache_scale, check_write
from .quantize import quantizing
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
    pe = {"q_pe": (q_pe, "T heads P", FLOATS), "k_pe": (k_pe, "T P", "q_pe")}
    check(name, **pe, kv_c=(kv_c, "T kv_lora_rank", "q_pe"))
    sizes = check_rope(q_pe, k_pe.unsqueeze(1), positions, cos_sin_cache, flags, 0, name=name)
    sizes["C"] = kv_c.shape[1] + sizes["D"]
    caches = {"kv_cache": (kv_cache, "blocks block_size C", "kv_scale", kv_scale)}
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
        slot_mapping: as in `rope_kv_cache_write`. kv_scale: float32 [1], of an FP8 or int8 cache; positive.
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


@op("y")
def _mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    kv_scale: Tensor | None,
):
    tokens, heads, _ = q_nope.shape
    rank = w_uk.shape[-1]
    y = q_nope.new_zeros(tokens, heads, w_uv.shape[1])
    for rows, slots in sequences(tokens, kv_cache, block_tables, seq_lens, query_start_loc):
        if slots is None:
            y[rows] = float("nan")
            continue
        latents, k_pe = cached(kv_cache.unsqueeze(2), slots, kv_scale).squeeze(1).split([rank, q_pe.shape[-1]], -1)
        k_nope, v = (torch.einsum("kr,hdr->khd", latents, w.float()) for w in (w_uk, w_uv))
        logits = torch.einsum("qhd,khd->hqk", q_nope[rows].float(), k_nope)
        logits = (logits + torch.einsum("qhd,kd->hqk", q_pe[rows].float(), k_pe)) * scale
        y[rows] = attended(logits, visible(logits, 0), v).to(y.dtype)
    return y.flatten(1)


def absorbs(queries: int, length: int, rank: int, nope: int, rope: int, v: int) -> bool:
    """Whether the projections are moved to the queries and results of a sequence: where that takes fewer products.

    Absorbed, a query takes (nope + v) * rank products, and 2 * rank + rope with each key; otherwise a key takes
    (nope + v) * rank, and nope + rope + v with each query.
    """
    pairs = queries * length
    absorbed = queries * (nope + v) * rank + pairs * (2 * rank + rope)
    return absorbed <= length * (nope + v) * rank + pairs * (nope + rope + v)


@_mla_attention.declares("check")
def _(
    q_nope, q_pe, kv_cache, w_uk, w_uv, block_tables, seq_lens, query_start_loc, scale, kv_scale, *, name
):  # fmt: skip
    sizes = check(
        name,
        q_nope=(q_nope, "T heads N", FLOATS),
        q_pe=(q_pe, "T heads P", "q_nope"),
        w_uk=(w_uk, "heads N kv_lora_rank", "q_nope"),
        w_uv=(w_uv, "heads V kv_lora_rank", "q_nope"),
    )
    rank, heads, cols = sizes["kv_lora_rank"], sizes["heads"], sizes["V"]
    held = {"kv_cache": (kv_cache, "blocks block_size C", (q_nope.dtype, *CODES))}
    check(name, {"C": rank + sizes["P"]}, q_nope=(q_nope, "T heads N", FLOATS), **held)
    check_logits(name, scale)
    check_cache_scale(name, "kv_scale", kv_scale, "kv_cache", kv_cache)
    check_sequences(name, q_nope, kv_cache, block_tables, seq_lens, query_start_loc)
    if not rank or not heads * cols:
        raise ValueError(f"{name}: w_uv is {list(w_uv.shape)}, expected at least one head, row and column")
    return heads * cols


@_mla_attention.declares("empty")
def _(q_nope, q_pe, kv_cache, w_uk, w_uv, *_):
    return q_nope.new_empty(q_nope.shape[0], w_uv.shape[0] * w_uv.shape[1])


_mla_attention_quant = quantizing(_mla_attention, "output_", one_scale=False, case_every=6)


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    kv_scale: Tensor | None = None,
    output_quant_key: QuantKey | None = None,
    **output: Unpack[OutputOptions],
) -> Tensor | QuantizedActivation:
    """Causal MLA of the last tokens of sequences over a paged cache of latents; see the module for the formula.

    Args:
        q_nope: [T, heads, N] bfloat16, float16 or float32 (S), the part of the queries that isn't rotated.
        q_pe: [T, heads, P] in S, rotated.
        kv_cache: [blocks, block_size, kv_lora_rank + P] in S, FP8 or int8, as `mla_rope_kv_cache_concat` writes it.
        w_uk, w_uv: [heads, N, kv_lora_rank] and [heads, V, kv_lora_rank] in S: views of `kv_b_proj.weight`.
        block_tables, seq_lens, query_start_loc, scale: as in `paged_attention`.
        kv_scale: float32 [1], of an FP8 or int8 cache; positive.
        output_quant_key, **output: as in `paged_attention`.

    On the CPU a row's bits also depend on how many queries its sequence has, by `absorbs`; Triton always absorbs.

    Returns:
        [T, heads * V] in S, or as a `QuantizedActivation`, bit for bit what `quantize` makes of the former.

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a number is out of range; nothing is
            written.
    """
    check_logits("mla_attention", scale)
    args = (q_nope, q_pe, kv_cache, w_uk, w_uv, block_tables, seq_lens, query_start_loc, scale, kv_scale)
    return run_attention(_mla_attention, _mla_attention_quant, args, output_quant_key, output)
