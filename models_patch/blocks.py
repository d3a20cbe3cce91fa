"""Which blocks of a paged cache hold which tokens of which sequence. Knows nothing of what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class OutOfBlocks(RuntimeError):
    """A cache has fewer free blocks than a step needs. Nothing has changed: free a sequence and take the step again."""


@dataclass(eq=False)
class Step:
    """The tokens that sequences are about to get, one sequence after the other, as operations on a paged cache want it.

    sequences: their numbers. counts: new tokens of each. lengths: all tokens of each, these included.
    block_tables: int32 [sequences, most blocks], the rows filled up with 0.
    seq_lens: int32 [sequences], `lengths`. query_start_loc: int32 [sequences + 1], where each one's new tokens start.
    positions: int64 [tokens], in their sequence. slot_mapping: int64 [tokens], block * block_size + offset.
    """

    sequences: tuple[int, ...]
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    positions: Tensor
    slot_mapping: Tensor

    @property
    def is_batch(self) -> bool:
        """Whether its sequences may be rows of a batch: all have the same length, and get as many tokens."""
        return len(set(self.lengths)) == len(set(self.counts)) == 1

    def is_batch_of(self, length: int) -> bool:
        """Whether rows of so many new tokens are its sequences, one a row; the same may come packed in one row."""
        return self.is_batch and (len(self.sequences) == 1 or length == self.counts[0])


@dataclass
class _Sequence:
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class BlockTables:
    """Sequences, the blocks of each, and the blocks that are free.

    Sequences share blocks: a block is free again when nobody holds it any more, and is copied when a sequence is about
    to write into one that others hold too (copy on write). So a prefix may be shared at any length, not only at whole
    blocks, and beams of a search share all but their last block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in ("num_blocks", num_blocks), ("block_size", block_size):
            if type(value) is not int or value < 1:
                raise ValueError(f"PagedKVCache: {name} is {value!r}, expected a positive int")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks))[::-1]
        self._holders = [0] * num_blocks
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def length(self, sequence: int) -> int:
        return self._of(sequence).length

    def blocks(self, sequence: int) -> tuple[int, ...]:
        """In order; the last may be filled in part."""
        return tuple(self._of(sequence).blocks)

    def add(self, prefix_of: int | None = None, length: int | None = None) -> int:
        """The number of a new sequence, empty or with the first `length` tokens of another (None: all), shared.

        Raises ValueError where the other has fewer.
        """
        new = _Sequence()
        if prefix_of is None and length is not None:
            raise ValueError(f"add: length is {length!r}, but prefix_of is None: an empty sequence has no length")
        if prefix_of is not None:
            other = self._of(prefix_of)
            new.length = other.length if length is None else length
            self.check_length("add", prefix_of, new.length)
            new.blocks = other.blocks[: self._blocks_for(new.length)]
            for block in new.blocks:
                self._holders[block] += 1
        self._next += 1
        self._sequences[self._next - 1] = new
        return self._next - 1

    def free(self, sequence: int) -> None:
        """Forget the sequence; blocks that nobody else holds are free."""
        self.truncate(sequence, 0)
        del self._sequences[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens."""
        self.check_length("truncate", sequence, length)
        state = self._of(sequence)
        for block in state.blocks[self._blocks_for(length) :]:
            self._release(block)
        del state.blocks[self._blocks_for(length) :]
        state.length = length

    def check_length(self, name: str, sequence: int, length: int) -> None:
        """Raise TypeError or ValueError where the sequence hasn't got so many tokens."""
        most = self.length(sequence)
        if type(length) is not int:
            raise TypeError(f"{name}: length is {type(length).__name__}, expected an int")
        if not 0 <= length <= most:
            raise ValueError(f"{name}: length is {length}, expected 0 to {most}, sequence {sequence}'s")

    def grow(self, tokens: Mapping[int, int]) -> list[tuple[int, int]]:
        """Give each of these sequences so many more tokens.

        Returns:
            (from, to) of the blocks whose content is to be copied, since their writer shared them.

        Raises:
            OutOfBlocks: there are too few; nothing has changed. ValueError: there is no such sequence, or no token.
        """
        _check_counts(tokens)
        shared = self._shared_ends(tokens)
        fresh = {s: self._blocks_for(self.length(s) + n) - len(self._of(s).blocks) for s, n in tokens.items()}
        needed = sum(fresh.values()) + len(shared)
        if needed > len(self._free):
            raise OutOfBlocks(
                f"PagedKVCache: {len(tokens)} sequences need {needed} more blocks of {self.block_size} tokens, and "
                f"{len(self._free)} of {self.num_blocks} are free; nothing has changed: free a sequence and try again"
            )
        copies = []
        for sequence, count in fresh.items():
            state = self._of(sequence)
            if sequence in shared:
                copies.append((state.blocks[-1], self._take()))
                self._release(state.blocks[-1])
                state.blocks[-1] = copies[-1][1]
            state.blocks += [self._take() for _ in range(count)]
            state.length += tokens[sequence]
        return copies

    def step(self, tokens: Mapping[int, int], device: torch.device) -> Step:
        """What `Step` says of the last tokens of these sequences, after `grow`."""
        lengths, counts = [self.length(s) for s in tokens], torch.tensor(list(tokens.values()))
        most = max(self._blocks_for(length) for length in lengths)
        rows = [self._of(s).blocks + [0] * (most - len(self._of(s).blocks)) for s in tokens]
        tables, starts = torch.tensor(rows), torch.tensor([0, *counts.cumsum(0).tolist()])
        within = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(counts)
        positions = within + (torch.tensor(lengths) - counts).repeat_interleave(counts)
        row = torch.arange(len(tokens)).repeat_interleave(counts)
        slots = tables[row, positions // self.block_size] * self.block_size + positions % self.block_size
        tables, seq_lens, starts = (t.to(device, torch.int32) for t in (tables, torch.tensor(lengths), starts))
        placed = positions.to(device), slots.to(device)
        return Step(tuple(tokens), tuple(tokens.values()), tuple(lengths), tables, seq_lens, starts, *placed)

    def _shared_ends(self, tokens: Mapping[int, int]) -> set[int]:
        """The sequences that are about to write into a block that another one holds, and will when they are done."""
        holders, found = dict[int, int](), set()
        for sequence in tokens:
            state = self._of(sequence)
            if state.length % self.block_size:
                end = state.blocks[-1]
                holders[end] = holders.get(end, self._holders[end])
                if holders[end] > 1:  # the last one to write may keep it
                    holders[end] -= 1
                    found.add(sequence)
        return found

    def _of(self, sequence: int) -> _Sequence:
        if type(sequence) is not int or sequence not in self._sequences:
            raise ValueError(f"PagedKVCache: there is no sequence {sequence!r}; there are {list(self._sequences)}")
        return self._sequences[sequence]

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _take(self) -> int:
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            self._free.append(block)


def _check_counts(tokens: Any) -> None:
    if not isinstance(tokens, Mapping):
        raise TypeError(f"step: tokens is {type(tokens).__name__}, expected how many each sequence gets, as a dict")
    if not tokens:
        raise ValueError("step: tokens is {}, expected at least one sequence")
    for sequence, count in tokens.items():
        if type(count) is not int:
            raise TypeError(f"step: tokens of sequence {sequence!r} are {type(count).__name__}, expected their number")
        if count < 1:
            raise ValueError(f"step: sequence {sequence!r} gets {count} tokens, expected at least one")
