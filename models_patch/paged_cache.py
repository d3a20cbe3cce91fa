"""A key-value cache in blocks, for the models of transformers and for engines that keep many sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .blocks import BlockTables, OutOfBlocks, Step
from .slots import Slots

__all__ = ["OutOfBlocks", "PagedKVCache", "Step"]


class PagedLayer(CacheLayerMixin):
    """The memory of one layer, made when its first keys and values are seen.

    keys, values: [blocks, block_size, kv_heads, head_dim] in S. A cache in FP8 or INT8 would hold codes here, and have
    `k_scale` and `v_scale` for `Slots` to hand on.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, tables: BlockTables) -> None:
        super().__init__()
        self.tables = tables
        self.written: Step | None = None  # the last step that this layer has got the tokens of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = self.tables.num_blocks, self.tables.block_size, key_states.shape[1]
        # Zeros: where a mask makes a probability zero, what it weighs must be finite.
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def copy(self, copies: list[tuple[int, int]]) -> None:
        if self.is_initialized and copies:
            source, target = torch.tensor(copies, device=self.device).unbind(1)
            for cache in self.keys, self.values:
                cache[target] = cache[source]

    def gather(self, cache: Tensor, step: Step, batch: int) -> Tensor:
        """[batch, kv_heads, length, head_dim]: each sequence of the step, or with batch 1 one after the other."""
        if batch == len(step.sequences) and len(set(step.lengths)) == 1:
            rows = cache[step.block_tables].flatten(1, 2)[:, : step.lengths[0]]
        else:
            each = zip(step.block_tables, step.lengths, strict=True)
            rows = torch.cat([cache[table].flatten(0, 1)[:length] for table, length in each])[None]
        return rows.transpose(1, 2)

    # What `Cache` asks of its layers. A layer can't do these alone: blocks are those of all layers.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("PagedLayer.update: call that of the PagedKVCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("PagedLayer.get_mask_sizes: call that of the PagedKVCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("PagedLayer.get_seq_length: call that of the PagedKVCache")

    def get_max_length(self) -> int:
        return self.tables.num_blocks * self.tables.block_size


class PagedKVCache(Cache):
    """Keys and values of many sequences in blocks of one memory, which sequences share where they have the same past.

        cache = PagedKVCache(model.config, num_blocks=256)
        model.generate(**inputs, past_key_values=cache)

    In `generate` the rows of a batch are its sequences; a beam search's share blocks. Other sequences may be there at
    the same time and stay. An engine names the sequences itself, and packs their tokens into one row:

        first = cache.add()
        second = cache.add(prefix_of=first, length=100)
        step = cache.step({first: 1, second: 20})  # block tables, lengths and slots, for all layers
        model(packed[None], position_ids=step.positions[None], past_key_values=cache, attention_mask=mask_4d)

    The next call of the model writes this step. `set_rows` lets `generate` go on from sequences, whose prefixes may be
    shared. `fused_ops`' cache writes take `layers[i].keys`, `.values` and
    `step.slot_mapping` as they are; models that aren't patched go through `update`. Layers with a sliding window keep
    the whole past, and the model's mask does the sliding.

    Args:
        config: the model's; only the number of its layers is read. Heads, dtype and device come from the first keys.
        num_blocks, block_size: the memory, in blocks and in tokens of each.

    Raises:
        ValueError: num_blocks or block_size isn't a positive int. OutOfBlocks, by whatever needs blocks.
    """

    def __init__(self, config: PreTrainedConfig, num_blocks: int, block_size: int = 16) -> None:
        self.tables = BlockTables(num_blocks, block_size)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[PagedLayer(self.tables) for _ in range(layers)])
        self.rows: list[int] = []  # the sequences of a batch
        self.current: Step | None = None

    # Sequences.

    @property
    def free_blocks(self) -> int:
        return self.tables.free_blocks

    def add(self, prefix_of: int | None = None, length: int | None = None) -> int:
        """The number of a new sequence, empty or with the first `length` tokens of another (None: all), which it shares.

        Raises ValueError where the other doesn't exist or has fewer.
        """
        return self.tables.add(prefix_of, length)

    def free(self, sequence: int) -> None:
        """Forget the sequence; its blocks are free where nobody shares them. Raises ValueError where there is none."""
        self.tables.free(sequence)

    def step(self, tokens: Mapping[int, int]) -> Step:
        """Make room for so many more tokens of each sequence; the model's next call brings them.

        Raises:
            OutOfBlocks: there are too few free blocks; no sequence has changed.
            ValueError: there is no such sequence, or one gets no token.
        """
        copies = self.tables.grow(tokens)
        for layer in self.layers:
            layer.copy(copies)
        device = next((layer.device for layer in self.layers if layer.is_initialized), torch.device("cpu"))
        self.current = self.tables.step(tokens, device)
        return self.current

    def set_rows(self, sequences: Sequence[int]) -> None:
        """Let these be the rows of the next batch. Raises ValueError where their lengths differ."""
        lengths = [self.tables.length(sequence) for sequence in sequences]
        if len(set(lengths)) > 1:
            raise ValueError(f"set_rows: sequences have lengths {lengths}, expected one for all")
        self.rows = list(sequences)
        self._forget_step()

    # What a model calls, patched or not.

    def slots(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Slots:
        """Where a layer's new keys and values go: [batch, kv_heads, length, head_dim], not yet written."""
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        if layer.written is self.current:  # the first layer of a call that is no step of an engine's
            self._next_of_batch(batch, length)
        step = self.current
        assert step is not None
        layer.written = step
        if batch * length != len(step.slot_mapping):
            raise ValueError(
                f"PagedKVCache: keys are of {batch} x {length} tokens, expected {len(step.slot_mapping)}, those of the step"
            )
        slots = step.slot_mapping.to(layer.device)
        return Slots(
            layer.keys,
            layer.values,
            slots,
            lambda: tuple(layer.gather(cache, step, batch) for cache in (layer.keys, layer.values)),
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, length, head_dim]; returns all keys and values of these sequences, gathered."""
        slots = self.slots(key_states, value_states, layer_idx)
        for cache, new in (slots.k_cache, key_states), (slots.v_cache, value_states):
            cache.flatten(0, 1)[slots.slot_mapping] = new.transpose(1, 2).flatten(0, 1)
        return slots.read()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tables.length(self.rows[0]) if self.rows else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.layers[0].get_max_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    # What `generate` does with a batch.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row beam_idx[i] was, and shares its blocks."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of each row."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove is {tokens_to_remove}, expected a negative int or 0")
        for row in self.rows:
            self.tables.crop(row, self.tables.length(row) + tokens_to_remove)

    def reset(self) -> None:
        """Free the rows of the batch; other sequences stay."""
        for row in self.rows:
            self.tables.free(row)
        self.rows = []
        self._forget_step()

    def _select(self, indices: list[int]) -> None:
        kept = [self.tables.add(prefix_of=self.rows[index]) for index in indices]
        self.reset()
        self.rows = kept

    def _forget_step(self) -> None:
        self.current = None
        for layer in self.layers:
            layer.written = None

    def _next_of_batch(self, batch: int, length: int) -> None:
        if self.current is not None and not self.rows:
            raise ValueError("PagedKVCache: a model is called without a step; call step(), set_rows() or reset() before")
        rows = self.rows or [self.tables.add() for _ in range(batch)]
        if len(rows) != batch:
            raise ValueError(f"PagedKVCache: keys are of {batch} rows, expected {len(rows)} as before, or reset() first")
        try:
            self.step(dict.fromkeys(rows, length))
        except OutOfBlocks:
            if not self.rows:
                for row in rows:
                    self.tables.free(row)
            raise
        self.rows = rows
