"""Attention as it is written with PyTorch alone: over keys and values that were gathered from their blocks.

A `Group` is the sequences of a batch that have as many queries and tokens as each other: one call of
`scaled_dot_product_attention` serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fused_ops._flashinfer_inputs import Latent, Paged


class Group(NamedTuple):
    """rows: of q, [sequences, queries]. tables: [sequences, blocks]. tokens: of each of them."""

    rows: Tensor
    tables: Tensor
    tokens: int


def groups(a: Paged | Latent) -> list[Group]:
    """Of a batch, on its device."""
    starts, lengths = a.query_start_loc.tolist(), a.seq_lens.tolist()
    size = (a.k_cache if isinstance(a, Paged) else a.kv_cache).shape[1]
    found: dict[tuple[int, int], list[int]] = {}
    for i, tokens in enumerate(lengths):
        found.setdefault((starts[i + 1] - starts[i], tokens), []).append(i)
    device, made = a.seq_lens.device, []
    for (queries, tokens), members in found.items():
        begin = torch.tensor([starts[i] for i in members], device=device)
        tables = a.block_tables[torch.tensor(members, device=device), : -(-tokens // size)].long()
        made.append(Group(begin[:, None] + torch.arange(queries, device=device), tables, tokens))
    return made


def gathered(cache: Tensor, scale: Tensor | None, dtype: torch.dtype, group: Group) -> Tensor:
    """[sequences, heads, tokens, D] in S, contiguous."""
    rows = cache[group.tables].flatten(1, 2)[:, : group.tokens]
    if scale is not None:
        rows = (rows.float() * scale.view(-1, 1)).to(dtype)
    return rows.transpose(1, 2).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Tensor:
    """Causal; [sequences, queries, heads * Dv]. Heads that share keys are the queries where each has a single one."""
    queries, heads = q[group.rows].transpose(1, 2), q.shape[1]
    if queries.shape[2] == 1:
        folded = queries.reshape(len(queries), k.shape[1], heads // k.shape[1], -1)
        return F.scaled_dot_product_attention(folded, k, v, scale=scale).reshape(len(queries), 1, -1)
    whole = queries.shape[2] == group.tokens
    mask = None if whole else causal_lower_right(queries.shape[2], group.tokens)
    options = {"attn_mask": mask, "is_causal": whole, "scale": scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(queries, k, v, **options).transpose(1, 2).flatten(2)


def paged(a: Paged, every: list[Group]) -> Tensor:
    """`paged_attention` with gathering, of batches without options."""
    y = a.q.new_empty(a.q.shape[0], a.q.shape[1] * a.v_cache.shape[-1])
    for group in every:
        k, v = (gathered(c, s, a.q.dtype, group) for c, s in ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale)))
        y[group.rows] = attention(a.q, k, v, group, a.scale)
    return y


def contiguous(a: Paged, every: list[Group]) -> Callable[[], Tensor]:
    """The same of keys and values that are gathered already."""
    pairs = ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
    held = [[gathered(c, s, a.q.dtype, group) for c, s in pairs] for group in every]

    def run() -> Tensor:
        y = a.q.new_empty(a.q.shape[0], a.q.shape[1] * a.v_cache.shape[-1])
        for group, (k, v) in zip(every, held, strict=True):
            y[group.rows] = attention(a.q, k, v, group, a.scale)
        return y

    return run


def flex(sets: list[Paged]) -> list[Callable[[], Tensor]]:
    """`flex_attention` of keys and values that are gathered already, for each of these batches of the same lengths.

    They share what is compiled for their sizes, and what other batches had compiled is forgotten: it compiles anew for
    other sizes, a few times only.
    """
    torch._dynamo.reset()
    attend = torch.compile(flex_attention)
    masks = [causal_mask(group, sets[0].q.device) for group in groups(sets[0])]
    return [_flex(attend, a, groups(a), masks) for a in sets]


def causal_mask(group: Group, device: torch.device) -> BlockMask:
    queries = group.rows.shape[1]
    behind = group.tokens - queries
    return create_block_mask(lambda b, h, i, j: j <= i + behind, None, None, queries, group.tokens, device=device)


def _flex(attend: Callable, a: Paged, every: list[Group], masks: list[BlockMask]) -> Callable[[], Tensor]:
    pairs = ((a.k_cache, a.k_scale), (a.v_cache, a.v_scale))
    held = [[gathered(c, s, a.q.dtype, group) for c, s in pairs] for group in every]

    def run() -> Tensor:
        y = a.q.new_empty(a.q.shape[0], a.q.shape[1] * a.v_cache.shape[-1])
        for group, mask, (k, v) in zip(every, masks, held, strict=True):
            q = a.q[group.rows].transpose(1, 2)
            made = attend(q, k, v, block_mask=mask, scale=a.scale, enable_gqa=True)
            y[group.rows] = made.transpose(1, 2).flatten(2)
        return y

    return run


def absorbed(a: Latent) -> Tensor:
    """The queries in the space of latents, beside the rotated ones: [T, heads, rank + P]."""
    return torch.cat([torch.einsum("thn,hnr->thr", a.q_nope, a.w_uk), a.q_pe], -1)


def latent_rows(a: Latent, group: Group) -> Tensor:
    rows = a.kv_cache[group.tables].flatten(1, 2)[:, : group.tokens]
    return rows if a.kv_scale is None else (rows.float() * a.kv_scale).to(a.q_pe.dtype)


def latent(a: Latent, group: Group, rows: Tensor) -> Tensor:
    """`mla_attention` of single queries, absorbed; rows: what `latent_rows` makes."""
    q = absorbed(a)[group.rows].squeeze(1)
    weights = (torch.bmm(q, rows.mT).float() * a.scale).softmax(-1).to(q.dtype)
    return torch.einsum("thr,hvr->thv", torch.bmm(weights, rows[..., : a.w_uk.shape[-1]]), a.w_uv).flatten(1)


def gathered_latent(a: Latent, every: list[Group]) -> Tensor:
    """The same with gathering."""
    (group,) = every
    return latent(a, group, latent_rows(a, group))
