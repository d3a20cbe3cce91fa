"""Attention over a paged cache: a row's bits follow from what it sees, and from nothing else."""

import math

import pytest
import torch
from attention_calls import CODES, MIXED, every_backend, inputs, needs_kernels, run_alone
from compare import assert_same, raw
from linear_operands import run_python

import fused_ops
from fused_ops import paged_attention
from fused_ops.attention_inputs import batch, blocks_of
from quant.key import FP8, FP8_FNUZ


def reordered(call, order):
    """The same sequences in another order of the batch."""
    starts = call["query_start_loc"].tolist()
    rows = [torch.arange(starts[i], starts[i + 1]) for i in order]
    lengths = torch.tensor([len(r) for r in rows])
    changed = {
        "q": call["q"][torch.cat(rows)],
        "block_tables": call["block_tables"][list(order)],
        "seq_lens": call["seq_lens"][list(order)],
        "query_start_loc": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    }
    return {**call, **changed}, torch.cat(rows)


EVERY_CACHE = pytest.mark.parametrize("held", [None, *CODES], ids=str)
EVERY_GROUP = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1), (8, 1), (70, 1)], ids=str)
OPTIONS = [{}, {"sliding_window": 33}, {"causal": False}, {"soft_cap": 5.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@EVERY_GROUP
@EVERY_CACHE
@needs_kernels
def test_batches_chunks_and_decoding_give_the_same_bits(held, heads, options):
    """A prefill; each sequence alone; in chunks; the last token by itself."""
    lengths = ((90, 90), (300, 300), (20, 530))
    call = inputs(lengths, *heads, cols=48, held=held) | options
    whole = paged_attention(**call)
    other, rows = reordered(call, (2, 0, 1))
    assert_same(paged_attention(**other), whole[rows])
    for i, (queries, length) in enumerate(lengths):
        start = int(call["query_start_loc"][i])
        for end in (length,) if options.get("causal") is False else (length, length - 13, length - queries + 1):
            for count in {1, 5, min(queries, end - length + queries)}:
                first = start + queries - (length - end) - count
                if first < start:
                    continue
                one = {
                    "q": call["q"][first : first + count],
                    "block_tables": call["block_tables"][i : i + 1],
                    "seq_lens": torch.tensor([end]),
                    "query_start_loc": torch.tensor([0, count]),
                }
                assert_same(paged_attention(**{**call, **one}), whole[first : first + count], f"{i} {end} {count}")


@EVERY_CACHE
@needs_kernels
def test_blocks_may_lie_anywhere_and_be_of_any_size(held):
    call = inputs(held=held)
    expected = paged_attention(**call)
    for size in 1, 7, 64, 1024:
        tables, seq_lens, starts = batch(MIXED, size, "cpu")
        blocks = blocks_of(MIXED, size)
        moved = {"block_tables": tables, "seq_lens": seq_lens, "query_start_loc": starts}
        for name in "k_cache", "v_cache":
            old = raw(call[name])
            new = torch.full((blocks, size, *old.shape[2:]), 3, dtype=old.dtype)
            for i, (_, length) in enumerate(MIXED):
                places = torch.arange(length)
                source = old[call["block_tables"][i, places // 16].long(), places % 16]
                new[tables[i, places // size].long(), places % size] = source
            moved[name] = new.view(call[name].dtype)
        assert_same(paged_attention(**{**call, **moved}), expected, str(size))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}], ids=str)
@pytest.mark.parametrize("held", [None, FP8, FP8_FNUZ], ids=str)
@needs_kernels
def test_what_a_row_does_not_see_may_be_anything(held, options):
    lengths = ((40, 40), (30, 290), (1, 300))
    call = inputs(lengths, held=held) | options
    whole = paged_attention(**call)
    for i, (queries, length) in enumerate(lengths):
        place = length - queries // 2 - 1  # of the query that is looked at
        row = int(call["query_start_loc"][i]) + queries - queries // 2 - 1
        seen = torch.arange(max(0, place + 1 - options.get("sliding_window", place + 1)), place + 1)
        poisoned = {}
        for name in "k_cache", "v_cache":
            old = raw(call[name])
            nan = {FP8: 0x7F, FP8_FNUZ: 0x80}.get(held, torch.tensor(math.nan).to(torch.bfloat16).view(torch.int16))
            new = torch.full_like(old, int(nan))
            at = call["block_tables"][i, seen // 16].long(), seen % 16
            new[at] = old[at]
            poisoned[name] = new.view(call[name].dtype)
        changed = paged_attention(**{**call, **poisoned})
        assert_same(changed[row : row + 1], whole[row : row + 1], f"sequence {i}")


@pytest.mark.parametrize("window", [1, 16, 20, 300])
@every_backend
def test_blocks_before_the_window_may_be_gone(backend, window):
    """An entry is read if a query of the call sees one of its keys."""
    call = inputs() | {"sliding_window": window}
    tables, bad = call["block_tables"].clone(), -1
    for i, (queries, length) in enumerate(MIXED):
        if not queries:
            continue
        first = max(0, length - queries + 1 - window) // 16
        tables[i, :first] = torch.tensor([-1, 2**31 - 1, -(2**31)])[torch.arange(first) % 3]
        bad = i if first else bad
    assert bad >= 0
    with fused_ops.use_backend(backend):
        expected = paged_attention(**call)
        assert_same(paged_attention(**{**call, "block_tables": tables}), expected)
        for i, (queries, length) in enumerate(MIXED):
            if queries:
                seen = tables.clone()
                seen[i, max(0, length - queries + 1 - window) // 16] = -1
                with pytest.raises(ValueError, match=rf"block_tables has .* at \[{i}, "):
                    paged_attention(**{**call, "block_tables": seen})


@needs_kernels
def test_a_small_call_wakes_no_threads():
    """Torch's threads start with the first call that needs them."""
    script = """
import os, torch
from attention_calls import inputs
from fused_ops import paged_attention
torch.set_num_threads(1)
small, large = inputs(((1, 64),), 8, 8), inputs(((1, 64),) * 9, 8, 8)
torch.set_num_threads(4)
threads = []
for call in small, large:
    paged_attention(**call)
    threads.append(len(os.listdir("/proc/self/task")))
assert threads[1] == threads[0] + 3, threads
"""
    run_alone(script)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads"),
    [(((1, 5000),), 4, 1), (((1, 700), (3, 1500)), 4, 1), (MIXED, 4, 1), (((1, 1500),), 80, 40)],  # the last: in groups
    ids=str,
)
@needs_kernels
def test_threads_share_a_long_sequence_without_changing_a_bit(lengths, heads, kv_heads, threads):
    before = torch.get_num_threads()
    call = inputs(lengths, heads, kv_heads) | {"sinks": torch.randn(heads)}
    try:
        torch.set_num_threads(1)
        expected = paged_attention(**call)
        torch.set_num_threads(threads)
        assert_same(paged_attention(**call), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_caches_beyond_two_to_the_31(untouched_memory):
    """Two blocks, 2^31 elements apart."""
    small = inputs(((2, 9),), kv_heads=1, cols=32, block_size=8)
    call = dict(small)
    for name in "k_cache", "v_cache":
        at = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 8, 1, 32), (2**31, 32, 32, 1))
        at.copy_(small[name][small["block_tables"][0, :2].long()])
        call[name] = at
    call["block_tables"] = torch.tensor([[0, 1]])
    assert_same(paged_attention(**call), paged_attention(**small))


ISA_SCRIPT = """
import hashlib, torch
from attention_calls import CODES, inputs
from compare import raw
from fused_ops import paged_attention

def note(name, call):
    print(name, hashlib.sha256(raw(paged_attention(**call)).numpy().tobytes()).hexdigest())

torch.manual_seed(0)
lengths = (1, 70), (5, 40)
for cols in 40, 128:
    for heads in 2, 4, 8, 24:  # 1, 2, 4 and 12 rows that share keys
        call = inputs(lengths, heads, cols=cols)
        note("values", call)
        # Products below float32's normal numbers, of all keys or of one.
        tiny = call | {"q": call["q"] * 2.0**-60, "scale": 2.0**126}
        note("tiny", tiny | {"k_cache": call["k_cache"] * 2.0**-68})
        note("large", call | {"q": call["q"] * 2.0**62, "k_cache": call["k_cache"] * 2.0**62, "scale": 2.0**-126})
        one = call["k_cache"].clone()
        one[:, 3] *= 2.0**-68
        note("one tiny", tiny | {"k_cache": one, "scale": 2.0**58})
        for held in CODES:
            call = inputs(lengths, heads, cols=cols, held=held)
            note(held, call)
            note(held, call | {"q": call["q"].float()})
            every = torch.arange(call["k_cache"].numel()).to(torch.uint8).view(held).view_as(call["k_cache"])
            note(held, call | {"k_cache": every})
            note(held, call | {"v_cache": every})
"""


@needs_kernels
def test_instruction_sets_agree_on_what_is_tiny_and_on_every_code():
    """AVX-512 multiplies bfloat16 where that flushes nothing, and looks codes up."""
    printed = [run_python(ISA_SCRIPT, FUSED_OPS_ISA=isa) for isa in ("base", "v3", "")]
    assert printed[0] == printed[1] == printed[2]
    assert len(printed[0].splitlines()) == 2 * 4 * (4 + 4 * len(CODES))
