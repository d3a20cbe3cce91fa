"""Where a call's keys and values go in a cache, as the fused operations that write into caches take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Slots:
    """Where the keys and values of T tokens are written, and how they are read back.

    k_cache, v_cache: [blocks, block_size, kv_heads, D]. slot_mapping: int64 [T], block * block_size + offset.
    k_scale, v_scale: of caches that hold codes.
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
        """Keys and values [T, kv_heads, D] as they are."""
        size = self.k_cache.shape[1]
        for cache, new in (self.k_cache, k), (self.v_cache, v):
            cache[self.slot_mapping // size, self.slot_mapping % size] = new
