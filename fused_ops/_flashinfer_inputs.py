"""What FlashInfer takes: which arguments of attention it serves, and a batch as its wrappers want it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quant.key import FP8

HALVES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128, 256)
RANK, ROPE = 512, 64  # of latents: what its MLA kernels are made for
ALIGNED = 16  # bytes: its loads


class Paged(NamedTuple):
    """The arguments of `paged_attention`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    causal: bool
    sliding_window: int
    soft_cap: float
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class Latent(NamedTuple):
    """The arguments of `mla_attention`."""

    q_nope: Tensor
    q_pe: Tensor
    kv_cache: Tensor
    w_uk: Tensor
    w_uv: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    kv_scale: Tensor | None


# --- what it serves ---


def refuses_paged(*args) -> str:
    """Why FlashInfer doesn't serve these arguments, or nothing."""
    a = Paged(*args)
    size, held = a.q.shape[-1], a.k_cache.dtype
    if reason := _refuses(a.q.device, q=a.q):
        return reason
    if size not in HEAD_SIZES or a.v_cache.shape[-1] != size:
        return f"heads are of {size} and {a.v_cache.shape[-1]} columns, it takes {HEAD_SIZES} of both"
    if held not in (a.q.dtype, FP8):
        return f"k_cache is {held}, it takes {a.q.dtype} and {FP8}"
    if a.k_cache.stride() != a.v_cache.stride():
        return f"k_cache has strides {a.k_cache.stride()} and v_cache {a.v_cache.stride()}, it takes the same"
    if a.sinks is not None:
        return "its wrappers ignore sinks"
    if any(s is not None and s.numel() != 1 for s in (a.k_scale, a.v_scale)):
        return "k_scale and v_scale are those of heads, it takes one each"
    return _refuses_scale(a.scale) or _strides(k_cache=a.k_cache)


def refuses_latent(*args) -> str:
    """The same of MLA."""
    a = Latent(*args)
    rank, rope = a.w_uk.shape[-1], a.q_pe.shape[-1]
    if reason := _refuses(a.q_pe.device, q_pe=a.q_pe):
        return reason
    if (rank, rope) != (RANK, ROPE):
        return f"latents have {rank} + {rope} columns, it takes {RANK} + {ROPE}"
    if a.kv_cache.dtype != a.q_pe.dtype:
        return f"kv_cache is {a.kv_cache.dtype}, it takes {a.q_pe.dtype}"
    return _refuses_scale(a.scale) or _strides(kv_cache=a.kv_cache)


def _refuses(device: torch.device, **queries: Tensor) -> str:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    for name, q in queries.items():
        if q.dtype not in HALVES:
            return f"{name} is {q.dtype}, it takes bfloat16 and float16"
    return _strides(**queries)


def _refuses_scale(scale: float) -> str:
    """It looks for the largest product and multiplies afterwards."""
    return "" if scale > 0 else f"scale is {scale}, it takes a positive one"


def _strides(**tensors: Tensor) -> str:
    for name, t in tensors.items():
        if any(stride * t.element_size() % ALIGNED for stride in t.stride()[:-1]):
            return f"{name} has strides {t.stride()}, it takes multiples of {ALIGNED} bytes"
        if max(t.stride()) >= 1 << 32:
            return f"{name} has strides {t.stride()}, it takes less than 2**32"
    return ""


# --- a batch as it takes it ---


class Batch(NamedTuple):
    """The sequences that FlashInfer is asked for: those in range that have queries.

    rows: of q, where they aren't simply the first; qo_indptr says which are whose.
    kv_indptr, kv_indices, kv_lens: on the host, as are the others; the blocks that a sequence's queries see, one after
        the other, and how many of its tokens are in these.
    broken: rows of the sequences that are out of range.
    """

    rows: Tensor | None
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    kv_lens: Tensor
    broken: list[slice]

    def last_page_len(self, size: int) -> Tensor:
        return (self.kv_lens - 1) % size + 1

    @property
    def queries(self) -> int:
        return int(self.qo_indptr[-1])


def batch_of(
    tokens: int,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    sliding_window: int = 0,
) -> Batch:
    """FlashInfer isn't told of blocks before the window of all of a sequence's queries: it counts from the end."""
    starts, lengths, tables = (t.cpu().long() for t in (query_start_loc, seq_lens, block_tables))
    blocks, size = cache.shape[0], max(cache.shape[1], 1)
    begin, end, most = starts[:-1], starts[1:], tables.shape[1] * cache.shape[1]
    unseen = torch.zeros_like(lengths)
    if sliding_window:
        unseen = (lengths - (end - begin) + 1 - sliding_window).clamp_min(0) // size
    behind = (lengths + size - 1) // size
    place = torch.arange(tables.shape[1])
    used = (place >= unseen[:, None]) & (place < behind[:, None])
    ahead = (begin == starts.cummax(0).values[:-1]) & (begin <= end)
    inside = ahead & (begin >= 0) & (end <= tokens) & (end - begin <= lengths) & (lengths <= most)
    inside &= ((tables >= 0) & (tables < blocks) | ~used).all(1)
    asked = inside & (end > begin)
    qo_indptr, kv_indptr = (_indptr(n[asked]) for n in (end - begin, behind - unseen))
    rows = None
    if not torch.equal(begin[asked], qo_indptr[:-1].long()):
        each = [torch.arange(b, e) for b, e in zip(begin[asked].tolist(), end[asked].tolist(), strict=True)]
        rows = torch.cat(each)
    outside = zip(begin[~inside].tolist(), end[~inside].tolist(), strict=True)
    broken = [slice(max(b, 0), max(e, 0)) for b, e in outside]
    indices = tables[asked][used[asked]].int()
    return Batch(rows, qo_indptr, kv_indptr, indices, (lengths - unseen * size)[asked].int(), broken)


def _indptr(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
