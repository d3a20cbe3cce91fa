"""Block tables: sequences share blocks and never see each other's tokens."""

import random

import pytest
import torch

from models_patch.blocks import BlockTables
from models_patch.paged_cache import OutOfBlocks


def test_a_step_by_hand():
    tables = BlockTables(num_blocks=8, block_size=4)
    first = tables.add()
    tables.grow({first: 6})
    second = tables.add(prefix_of=first, length=5)
    assert tables.blocks(first) == tables.blocks(second) == (0, 1)
    copies = tables.grow(
        {second: 4, first: 1}
    )  # the second writes into what the first holds too, which then has it alone
    assert copies == [(1, 2)]
    assert (tables.blocks(first), tables.blocks(second)) == ((0, 1), (0, 2, 3))
    step = tables.step({second: 4, first: 1}, torch.device("cpu"))
    assert step.block_tables.tolist() == [[0, 2, 3], [0, 1, 0]]
    assert (step.seq_lens.tolist(), step.query_start_loc.tolist()) == ([9, 7], [0, 4, 5])
    assert step.positions.tolist() == [5, 6, 7, 8, 6]
    assert step.slot_mapping.tolist() == [9, 10, 11, 12, 6]
    dtypes = [
        t.dtype for t in (step.block_tables, step.seq_lens, step.query_start_loc, step.positions, step.slot_mapping)
    ]
    assert dtypes == [torch.int32] * 3 + [torch.int64] * 2


def test_the_last_holder_of_a_block_keeps_it():
    tables = BlockTables(num_blocks=8, block_size=4)
    beams = [tables.add()]
    tables.grow({beams[0]: 2})
    beams += [tables.add(prefix_of=beams[0]) for _ in range(2)]
    assert len(tables.grow(dict.fromkeys(beams, 1))) == 2
    assert sorted(tables.blocks(beam) for beam in beams) == [(0,), (1,), (2,)]
    assert not tables.grow(dict.fromkeys(beams, 1))


class Simulation:
    """Sequences at random, in a memory of slots whose content is written as a cache writes it."""

    def __init__(self, seed: int, num_blocks: int, block_size: int):
        self.random, self.tables = random.Random(seed), BlockTables(num_blocks, block_size)
        self.memory, self.expected, self.written = {}, {}, 0

    def grow(self):
        some = self.random.sample(list(self.expected), min(len(self.expected), 3))
        counts = {sequence: self.random.randint(1, 9) for sequence in some}
        before = self.state()
        if not counts:
            return
        try:
            copies = self.tables.grow(counts)
        except OutOfBlocks:
            assert self.state() == before
            self.free()
            return
        size = self.tables.block_size
        for source, target in copies:
            self.memory |= {target * size + i: self.memory.get(source * size + i) for i in range(size)}
        step = self.tables.step(counts, torch.device("cpu"))
        assert len(set(step.slot_mapping.tolist())) == sum(counts.values())
        new = list(range(self.written, self.written + sum(counts.values())))
        self.written += len(new)
        self.memory |= dict(zip(step.slot_mapping.tolist(), new, strict=True))
        for sequence, n in counts.items():
            self.expected[sequence] = self.expected[sequence] + new[:n]
            del new[:n]

    def add(self):
        other = self.random.choice([None, *self.expected])
        length = None if other is None else self.random.randint(0, len(self.expected[other]))
        self.expected[self.tables.add(other, length)] = [] if other is None else self.expected[other][:length]

    def free(self):
        sequence = self.random.choice(list(self.expected))
        self.tables.free(sequence)
        del self.expected[sequence]

    def crop(self):
        if self.expected:
            sequence = self.random.choice(list(self.expected))
            length = self.random.randint(0, len(self.expected[sequence]))
            self.tables.truncate(sequence, length)
            self.expected[sequence] = self.expected[sequence][:length]

    def state(self):
        tables = [(sequence, self.tables.blocks(sequence), self.tables.length(sequence)) for sequence in self.expected]
        return tables, self.tables.free_blocks

    def check(self):
        held, size = set(), self.tables.block_size
        for sequence, content in self.expected.items():
            blocks = self.tables.blocks(sequence)
            held |= set(blocks)
            assert [self.memory[blocks[i // size] * size + i % size] for i in range(len(content))] == content
        assert self.tables.free_blocks == self.tables.num_blocks - len(held)


@pytest.mark.parametrize("seed", range(20))
def test_sequences_keep_their_tokens_whatever_others_do(seed):
    simulation = Simulation(seed, num_blocks=24, block_size=1 + seed % 4)
    for _ in range(150):
        simulation.random.choice([simulation.grow] * 4 + [simulation.add] * 2 + [simulation.crop])()
        simulation.check()
    assert simulation.written > 100
