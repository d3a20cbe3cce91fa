"""Where a call's keys and values go in a cache, as the fused operations that write into caches take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant.formats import encode


@dataclass
class Slots:
    """Where the keys and values of T tokens are written, and how they are read back.

    k_cache, v_cache: [blocks, block_size, kv_heads, D]. slot_mapping: int64 [T], block * block_size + offset.
    k_scale, v_scale: of caches that hold codes, float32 [1] or [kv_heads].
    read: after the write, all keys and values that these tokens may attend to, [batch, kv_heads, length, D].
    options: what the attention function is handed in the place of what the model got.
    sequences: block_tables, seq_lens and query_start_loc of `fused_ops.paged_attention`; None where only `read` knows.
    kv_cache: [blocks, block_size, D + Dv], whose parts the two of one head are; None where they are two tensors.
    """

    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    read: Callable[[], tuple[Tensor, Tensor]]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sequences: Any = None
    kv_cache: Tensor | None = None

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keys and values [T, kv_heads, D] as they are, or their codes."""
        size = self.k_cache.shape[1]
        for cache, new, scale in (self.k_cache, k, self.k_scale), (self.v_cache, v, self.v_scale):
            if scale is not None:
                new = encode(new.float() * (1 / scale).view(-1, 1), cache.dtype)
                cache = cache.view(torch.uint8)
            cache[self.slot_mapping // size, self.slot_mapping % size] = new
