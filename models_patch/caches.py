"""The caches of transformers that have a place for keys and values before these are computed, as `Slots`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from .paged_cache import PagedKVCache
from .slots import Slots


def slots_of(cache: Cache | None, layer_idx: int, k: Tensor, v: Tensor, options: dict[str, Any]) -> Slots | None:
    """Where keys and values [batch, kv_heads, length, D], still to be computed, go; None where only `update` knows.

    cache: what the model got as `past_key_values`; options: what else, where continuous batching puts its cache.
    A cache that grows by concatenation has no such place, and a sliding window's has none that stays.
    """
    if isinstance(cache, PagedKVCache):
        return cache.slots(k, v, layer_idx)
    if cache is not None:
        layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) and not cache.offloading else None
        own = type(cache).update is Cache.update and type(layer) is StaticLayer
        return _static(layer, k, v) if own else None
    paged = options.get("cache")
    if isinstance(paged, PagedAttentionCache) and options.get("block_table") is None:
        return _continuous(paged, layer_idx, options)
    return None


def _static(layer: Any, k: Tensor, v: Tensor) -> Slots:
    """A row of the batch is a block."""
    if not layer.is_initialized:
        layer.lazy_initialization(k, v)
    batch, _, length, _ = k.shape
    slots = torch.arange(length, device=k.device) + layer.cumulative_length
    if batch > 1:
        rows = torch.arange(batch, device=k.device)[:, None] * layer.max_cache_len
        beyond = slots >= layer.max_cache_len  # in no row, not in the next one
        slots = torch.where(beyond, batch * layer.max_cache_len, rows + slots).flatten()

    def read() -> tuple[Tensor, Tensor]:
        layer.cumulative_length.add_(length)
        return layer.keys, layer.values

    return Slots(layer.keys.transpose(1, 2), layer.values.transpose(1, 2), slots, read)


def _continuous(cache: PagedAttentionCache, layer_idx: int, options: dict[str, Any]) -> Slots | None:
    """A block holds a page of keys and one of values for each layer; rows are numbered through all of it."""
    allocator = cache.layer_to_allocator[layer_idx]
    if type(allocator) is not FullAttentionCacheAllocator or torch.compiler.is_compiling():
        return None
    pages = allocator.get_cache_for_block_table(layer_idx)  # from the layer's first on, those of others included
    stride = allocator.block_physical_stride
    k_cache, v_cache = (page[:: stride // allocator.tokens_per_page] for page in pages)
    rows, read_rows = (options[name][allocator.index] for name in ("write_index", "read_index"))
    slots = rows // stride * allocator.tokens_per_page + rows % stride

    def read() -> tuple[Tensor, Tensor]:
        wanted = read_rows if read_rows.numel() else rows
        k, v = (page.flatten(0, 1).index_select(0, wanted).transpose(0, 1)[None] for page in pages)
        return k, v

    return Slots(k_cache, v_cache, slots, read, options={"cache": _Written(cache)})


class _Written(PagedAttentionCache):
    """Stands for a cache that has got this call's keys and values: an attention function asks it to `update`."""

    def __init__(self, cache: PagedAttentionCache) -> None:
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple:
        layer_type = self.cache.layer_to_allocator[layer_idx].layer_type
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"][layer_type].to(torch.int32)
        kwargs["max_length_k"] = kwargs["max_length_k"][layer_type]
        return key_states, value_states
