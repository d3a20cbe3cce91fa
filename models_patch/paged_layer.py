"""The memory of one layer of a key-value cache in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .blocks import Step


class PagedLayer(CacheLayerMixin):
    """The memory of one layer, made when its first keys and values are seen.

    k_cache, v_cache: [blocks, block_size, kv_heads, head_dim] in S.
    kv_cache: for latents [blocks, block_size, kv_lora_rank + rope_dim], whose parts the two are; None for others.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    k_cache: Tensor
    v_cache: Tensor
    kv_cache: Tensor | None = None

    def __init__(self, num_blocks: int, block_size: int, latent: bool = False) -> None:
        super().__init__()
        self.shape, self.latent = (num_blocks, block_size), latent
        self.device = torch.device("cpu")
        self.written: Step | None = None  # the last step whose tokens this layer has got

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: where a mask makes a probability zero, what it weighs must be finite.
        if self.latent and key_states.shape[1] == 1:
            widths = key_states.shape[-1], value_states.shape[-1]
            self.kv_cache = key_states.new_zeros((*self.shape, sum(widths)))
            self.k_cache, self.v_cache = self.kv_cache.unsqueeze(2).split(widths, -1)
        else:
            new = (key_states, value_states)
            self.k_cache, self.v_cache = (x.new_zeros((*self.shape, *x.shape[1::2])) for x in new)
        self.is_initialized = True

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks, from the first of each pair to the second."""
        if self.is_initialized and copies:
            source, target = torch.tensor(copies, device=self.device).unbind(1)
            for cache in self.k_cache, self.v_cache:
                cache[target] = cache[source]

    def read(self, step: Step, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a step's sequences: [batch, kv_heads, length, head_dim], or packed in one row."""
        k, v = (self._gathered(cache, step, batch).transpose(1, 2) for cache in (self.k_cache, self.v_cache))
        return k, v

    def _gathered(self, cache: Tensor, step: Step, batch: int) -> Tensor:
        tables = step.block_tables.to(cache.device)
        if batch == len(step.sequences):
            return cache[tables].flatten(1, 2)[:, : step.lengths[0]]
        each = zip(tables, step.lengths, strict=True)
        return torch.cat([cache[table].flatten(0, 1)[:length] for table, length in each])[None]

    def get_max_length(self) -> int:
        return self.shape[0] * self.shape[1]

    # What else `Cache` asks of its layers none can do alone: blocks are those of all.

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("PagedLayer: call update of the PagedKVCache")

    def get_mask_sizes(self, *args: Any) -> Any:
        raise NotImplementedError("PagedLayer: call get_mask_sizes of the PagedKVCache")

    def get_seq_length(self) -> Any:
        raise NotImplementedError("PagedLayer: call get_seq_length of the PagedKVCache")
