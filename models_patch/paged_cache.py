"""A key-value cache in blocks, for the models of transformers and for engines that keep many sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .blocks import BlockTables, OutOfBlocks, Step
from .paged_layer import PagedLayer, Scales, checked_scales, kv_scales
from .slots import Slots

__all__ = ["OutOfBlocks", "PagedKVCache", "PagedLayer", "Step", "kv_scales"]


class PagedKVCache(Cache):
    """Keys and values of many sequences in blocks of one memory, which sequences share where they have the same past.

        cache = PagedKVCache(model.config, num_blocks=256)
        model.generate(**inputs, past_key_values=cache)

    In `generate` the rows of a batch are its sequences; a beam search's share blocks. Other sequences may be there at
    the same time and stay. An engine names the sequences itself, and packs their tokens into one row:

        first = cache.add()
        second = cache.add(prefix_of=first, length=100)
        step = cache.step({first: 1, second: 20})  # block tables, lengths and slots, for all layers
        model(packed[None], past_key_values=cache)

    The next call of the model writes this step, and there is no other before it has. A patched model whose report names
    `paged_attention` knows by the step which keys each token may see, and where it stands; it reads keys and values
    where they are. Any other model takes `position_ids=step.positions[None]` and a mask [1, 1, tokens, all keys] that
    lets each token see its own sequence, unless the step is of one sequence, or a batch of equals, one a row; it gets
    all keys and values gathered.

    A step that isn't written, because a call failed or a request was cancelled, is dropped as a whole: `truncate` or
    `free` of one of its sequences takes back the tokens of all. Once a sequence was added each call needs a step, until
    `set_rows` or `reset` say that a batch follows; `set_rows` lets `generate` go on from sequences, whose prefixes may
    be shared. `fused_ops`' cache writes and attentions take `layers[i].k_cache`, `.v_cache` and a step's tensors as
    they are, after `slots` for each layer; models that aren't patched go through `update`. Layers with a sliding window
    keep the whole past, and mask or attention do the sliding.

    Args:
        config: the model's; it says how many layers there are, and whether they hold latents (`kv_lora_rank`): the
            keys of one head and, beside them, what is rotated. Heads, S and device come from the first keys.
        num_blocks, block_size: the memory, in blocks and in tokens of each.
        dtype: FP8 or int8, to hold codes, sat(round(k * (1 / k_scale))), and v likewise; None: S. Latents are in S.
        scales: of codes, (k_scale, v_scale) of each layer: numbers, or float32 [1] or [kv_heads]; a checkpoint's are
            `kv_scales(model)`.

    Raises:
        TypeError, ValueError: an argument isn't as above; num_blocks or block_size isn't a positive int.
        OutOfBlocks: by whatever needs blocks; see `step`.
    """

    layers: list[PagedLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        num_blocks: int,
        block_size: int = 16,
        *,
        dtype: torch.dtype | None = None,
        scales: Sequence[Scales | tuple[float, float]] | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"PagedKVCache: config is {type(config).__name__}, expected the model's config")
        self.tables = BlockTables(num_blocks, block_size)
        text = config.get_text_config(decoder=True)
        latent = getattr(text, "kv_lora_rank", None) is not None
        each = checked_scales(dtype, scales, text.num_hidden_layers, latent)
        super().__init__(layers=[PagedLayer(num_blocks, block_size, latent, dtype, pair) for pair in each])
        self.rows: list[int] = []  # the sequences of a batch
        self.current: Step | None = None
        self._named = False  # whether sequences were added since a batch was announced: calls come with steps
        self._dropped = ""  # why the last step can't be written any more

    # Sequences.

    @property
    def free_blocks(self) -> int:
        return self.tables.free_blocks

    @property
    def pending(self) -> Step | None:
        """The step that was taken and that no layer has got yet."""
        step = self.current
        return None if step is None or any(layer.written is step for layer in self.layers) else step

    def add(self, prefix_of: int | None = None, length: int | None = None) -> int:
        """The number of a new sequence, empty or with the first `length` tokens of another (None: all), shared.

        Raises ValueError where the other doesn't exist, has fewer, or has them from a step that is still to be written.
        """
        new = self.tables.add(prefix_of, length)
        written = self._unwritten().get(prefix_of) if prefix_of is not None else None
        if written is not None and self.tables.length(new) > written:
            got = self.tables.length(new)
            self.tables.free(new)
            raise ValueError(
                f"add: length is {got}, expected 0 to {written}: the other tokens of sequence {prefix_of} are still to "
                "be written, by a call of the model"
            )
        self._named = True
        return new

    def free(self, sequence: int) -> None:
        """Forget the sequence; its blocks are free where nobody shares them. A row of the batch is one no more.

        Raises ValueError where there is none.
        """
        self.tables.length(sequence)  # that there is one
        self._drop_step_of(sequence, "freed")
        self.tables.free(sequence)
        self.rows = [row for row in self.rows if row != sequence]

    def length(self, sequence: int) -> int:
        """Its tokens, those of a step that is still to be written included. Raises ValueError where there is none."""
        return self.tables.length(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep its first `length` tokens, after rejected drafts, say.

        Where a step with this sequence is still to be written, it is dropped: none of its sequences gets its tokens.

        Raises TypeError or ValueError where it has fewer, doesn't exist, or would keep some of those tokens.
        """
        self.tables.check_length("truncate", sequence, length)
        before = self._unwritten().get(sequence)
        if length == self.tables.length(sequence):
            return
        if before is not None and length > before:
            raise ValueError(
                f"truncate: length is {length}, expected 0 to {before}: the other tokens of sequence {sequence} are "
                "still to be written, all or none"
            )
        self._drop_step_of(sequence, "truncated")
        self.tables.truncate(sequence, length)

    def step(self, tokens: Mapping[int, int]) -> Step:
        """Make room for so many more tokens of each sequence; the model's next call brings them, in this order.

        Raises:
            OutOfBlocks: there are too few free blocks; no sequence has changed.
            TypeError, ValueError: there is no such sequence, one gets no token, or the step before is still to be
                written; no sequence has changed.
        """
        step = self._taken("step", tokens)
        self._named = True
        return step

    def set_rows(self, sequences: Sequence[int]) -> None:
        """Let these be the rows of the next batch.

        Raises TypeError or ValueError where their lengths differ, one is there twice or isn't there, or a step is still
        to be written.
        """
        if not isinstance(sequences, Sequence) or isinstance(sequences, str):
            raise TypeError(f"set_rows: sequences is {type(sequences).__name__}, expected a list of their numbers")
        self._check_written("set_rows")
        lengths = [self.tables.length(sequence) for sequence in sequences]
        if len(set(lengths)) > 1:
            raise ValueError(f"set_rows: sequences have lengths {lengths}, expected one for all")
        if len(set(sequences)) < len(lengths):
            raise ValueError(
                f"set_rows: sequences are {list(sequences)}, expected each once; add(prefix_of=) shares one"
            )
        self.rows = list(sequences)
        self._expect_batch()

    # What a model calls, patched or not.

    @torch.compiler.disable  # which blocks are whose is kept in Python
    def slots(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Slots:
        """Where a layer's new keys and values, [batch, kv_heads, length, head_dim], go; they needn't be known yet.

        Raises:
            OutOfBlocks: there are too few free blocks; no sequence has changed.
            ValueError: there are other rows than before, other tokens than those of the step, or more layers than the
                config has.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"PagedKVCache: got keys of layer {layer_idx}, counted from 0, but its config has "
                f"{len(self.layers)} layers; expected the model's"
            )
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        batch, _, length, _ = key_states.shape
        step = self.current
        if step is None or layer.written is step:  # a call's first layer, and no engine has said which step
            step = self._step_of_batch(batch, length)
        rows = len(set(step.lengths)) == 1 and step.counts == (length,) * batch
        if not rows and (batch, length) != (1, sum(step.counts)):
            got, expected = f"{batch} x {length}", f"{' + '.join(map(str, step.counts))} in one row"
            raise ValueError(f"PagedKVCache: keys are of {got} tokens, expected those of the step, {expected}")
        layer.written = step
        tables = (step.block_tables, step.seq_lens, step.query_start_loc)
        slot_mapping, *sequences = (tensor.to(layer.device) for tensor in (step.slot_mapping, *tables))

        def read() -> tuple[Tensor, Tensor]:
            return layer.read(step, batch)

        caches = layer.k_cache, layer.v_cache, slot_mapping, read, layer.k_scale, layer.v_scale
        return Slots(*caches, sequences=tuple(sequences), kv_cache=layer.kv_cache)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, length, head_dim]; returns all keys and values of these sequences, gathered.

        Raises as `slots`.
        """
        slots = self.slots(key_states, value_states, layer_idx)
        slots.write(*(new.transpose(1, 2).flatten(0, 1) for new in (key_states, value_states)))
        return slots.read()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        step = self.pending
        if step is not None and step.is_batch:
            return step.lengths[0] - step.counts[0]
        return self.tables.length(self.rows[0]) if self.rows else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.layers[0].get_max_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        step = self.pending
        if step is not None and not step.is_batch_of(query_length):
            raise ValueError(
                "PagedKVCache: tokens of several sequences in one row take an attention_mask [1, 1, tokens, all keys], "
                "since each may see its own sequence alone; or no mask at all, where `patch` reports paged_attention"
            )
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
        if type(tokens_to_remove) is not int:
            raise TypeError(f"crop: tokens_to_remove is {type(tokens_to_remove).__name__}, expected an int")
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove is {tokens_to_remove}, expected a negative int or 0")
        lengths = {row: self.tables.length(row) for row in self.rows}
        for row, length in lengths.items():
            if length + tokens_to_remove < 0:
                raise ValueError(f"crop: tokens_to_remove is {tokens_to_remove}, but row {row} has {length} tokens")
        for row, length in lengths.items():
            self.tables.truncate(row, length + tokens_to_remove)

    def reset(self) -> None:
        """Free the rows of the batch; other sequences stay, without the tokens of a step that isn't written."""
        self._take_back()
        for row in self.rows:
            self.tables.free(row)
        self.rows = []
        self._expect_batch()

    def _select(self, indices: list[int]) -> None:
        kept = [self.tables.add(prefix_of=self.rows[index]) for index in indices]
        self.reset()
        self.rows = kept

    # Steps.

    def _taken(self, name: str, tokens: Mapping[int, int]) -> Step:
        self._check_written(name)
        copies = self.tables.grow(tokens)
        for layer in self.layers:
            layer.copy(copies)
        self.current, self._dropped = self.tables.step(tokens, self.layers[0].device), ""
        return self.current

    def _unwritten(self) -> dict[int, int]:
        """How many tokens the sequences of a step had before it, if a layer that has tokens is still to get the step.

        There may be layers that never get any, so those that have none yet don't count beside one that has.
        """
        step = self.current
        if step is None or (self.pending is None and all(_has(layer, step) for layer in self.layers)):
            return {}
        before = (length - count for length, count in zip(step.lengths, step.counts, strict=True))
        return dict(zip(step.sequences, before, strict=True))

    def _check_written(self, name: str) -> None:
        unwritten = self._unwritten()
        if unwritten:
            sequence, before = next(iter(unwritten.items()))
            raise ValueError(
                f"{name}: the step before, of sequences {list(unwritten)}, is still to be written by a call of the "
                f"model; truncate({sequence}, {before}) drops it and takes the tokens of all of them back"
            )

    def _drop_step_of(self, sequence: int, why: str) -> None:
        """The sequence is about to lose tokens: a step with it can't be written any more."""
        if self.current is not None and sequence in self.current.sequences:
            if self._unwritten():
                self._dropped = f"sequence {sequence} was {why}"
            self._take_back()
            self._forget_step()

    def _take_back(self) -> None:
        for sequence, before in self._unwritten().items():
            self.tables.truncate(sequence, before)

    def _expect_batch(self) -> None:
        self._forget_step()
        self._named, self._dropped = False, ""

    def _forget_step(self) -> None:
        self.current = None
        for layer in self.layers:
            layer.written = None

    def _step_of_batch(self, batch: int, length: int) -> Step:
        if self._dropped:
            raise ValueError(
                f"PagedKVCache: the step was dropped when {self._dropped}; its other sequences have the tokens of "
                "before, call step() anew"
            )
        if self._named and not self.rows:
            raise ValueError("PagedKVCache: called without a step; call step(), set_rows() or reset() first")
        if self.rows and len(self.rows) != batch:
            raise ValueError(f"PagedKVCache: keys are of {batch} rows, expected {len(self.rows)}; reset() forgets them")
        rows = self.rows or [self.tables.add() for _ in range(batch)]
        try:
            step = self._taken("PagedKVCache", dict.fromkeys(rows, length))
        except Exception:
            if not self.rows:
                for row in rows:
                    self.tables.free(row)
            raise
        self.rows = rows
        return step


def _has(layer: PagedLayer, step: Step) -> bool:
    return layer.written is step or not layer.is_initialized
