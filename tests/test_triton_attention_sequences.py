"""Triton's attention by the numbers of sequences: those out of range, and rows that belong to none."""

import functools

import pytest
import torch
from compare import assert_same
from promises import DEVICE, on_device
from triton_attention import BOTH, MIXED, PAGED, SEGMENT, arguments, by_triton, quantized, unchecked
from triton_attention import segments as segments

from quant import FP8_STATIC_TENSOR

INT64 = torch.iinfo(torch.int64)


@BOTH
def test_rows_of_no_sequence_are_zeros(op):
    args = arguments(op, MIXED)
    padded = tuple(
        torch.cat([a, torch.full_like(a[:3], float("nan"))]) if name in ("q", "q_nope", "q_pe") else a
        for name, a in zip(op.arguments, args, strict=True)
    )
    actual = by_triton(op, padded)
    assert_same(actual[:-3].contiguous(), by_triton(op, args))
    assert not actual[-3:].any()
    none = tuple(
        a[:0] if name in ("block_tables", "seq_lens") else a[:1] if name == "query_start_loc" else a
        for name, a in zip(op.arguments, args, strict=True)
    )
    assert by_triton(op, none).count_nonzero() == 0
    empty = tuple(a[:0] if name in ("q", "q_nope", "q_pe") else a for name, a in zip(op.arguments, none, strict=True))
    assert by_triton(op, empty).shape[0] == 0
    _, same = quantized(op, empty, FP8_STATIC_TENSOR)
    assert same["data"].shape[0] == 0


@functools.cache
def three(op) -> tuple[dict, torch.Tensor]:
    """Arguments with sequences whose rows are 0 and 1, 2 to 4, 5 to 7, by name; and the results."""
    args = dict(zip(op.arguments, arguments(op, ((2, 40), (3, 40), (3, 60))), strict=True))
    args["block_tables"] = torch.tensor([[0, 1, 2, 3]] * 3)
    return args, by_triton(op, tuple(args.values()))


HOSTILE = {  # what is changed, and the rows that become NaN
    "starts go back": ("query_start_loc", [0, 5, 3, 8], ...),
    "starts beyond q": ("query_start_loc", [0, 2, 5, 9], [5, 6, 7]),
    "starts anywhere": ("query_start_loc", [INT64.min, INT64.max, -4, INT64.max], ...),
    "starts before q": ("query_start_loc", [-3, 2, 5, 8], [0, 1]),
    "starts late": ("query_start_loc", [3, 4, 5, 8], []),
    "too few tokens": ("seq_lens", [40, 1, 60], [2, 3, 4]),
    "too many tokens": ("seq_lens", [INT64.max, 40, 10**6], [0, 1, 5, 6, 7]),
    "no tokens": ("seq_lens", [INT64.min, 40, -1], [0, 1, 5, 6, 7]),
    "blocks": ("block_tables", [[0, 99, 1, 1], [0, 1, INT64.min, 0], [1, INT64.max, 2, 0]], range(8)),
    "negative blocks": ("block_tables", [[0, 2, -1, -7], [0, 1, 2, -7], [-7, 1, 2, 3]], [0, 1, 5, 6, 7]),
}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
@BOTH
def test_numbers_out_of_range_give_nan_and_touch_nothing(op, what, long):
    """A GPU can't refuse values, so the interpreter doesn't either. Other rows are right, and every row is written."""
    name, numbers, nan = HOSTILE[what]
    args, good = three(op)
    args = dict(args)
    args[name] = torch.tensor(numbers)
    if long:  # room for several segments
        args["block_tables"] = torch.nn.functional.pad(args["block_tables"], (0, 40), value=-7)
    memory = torch.full((3 * good.shape[0], good.shape[1]), 7.0, dtype=good.dtype, device=DEVICE)
    y = memory[good.shape[0] : 2 * good.shape[0]]
    y.fill_(5.0)
    op.backends["triton"].run(tuple(map(on_device, args.values())), {"y": y})
    assert (memory[: good.shape[0]] == 7).all()
    assert (memory[2 * good.shape[0] :] == 7).all()
    y = y.cpu()
    assert (y != 5).any(1).all()
    if nan is ...:  # which rows belong to whom has no answer
        return
    assert y.isnan().all(1).nonzero().flatten().tolist() == list(nan)
    if what == "starts late":
        assert not y[:3].any()
        assert y[3:].isfinite().all()
    else:
        right = [row for row in range(8) if row not in nan]
        assert_same(y[right], good[right])


def test_a_block_out_of_range_that_a_row_does_not_see_is_nothing_to_it():
    for lengths in ((20, 40),), ((20, SEGMENT + 88),):
        args = arguments(PAGED, lengths)
        good, tables = by_triton(PAGED, args), args[3].clone()
        tables[0, (lengths[0][1] - 1) // 16] = 10**6
        y = unchecked(PAGED, (*args[:3], tables, *args[4:]))
        first = 20 - (lengths[0][1] - 1) % 16 - 1  # whose own key lies in that block
        assert_same(y[:first], good[:first])
        assert y[first:].isnan().all()


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("length", [60, 2 * SEGMENT + 60])
def test_blocks_before_a_window_may_be_freed(queries, length):
    """What no query of the call sees isn't read, whatever its entry says; what one sees must be there, for that one."""
    args = arguments(PAGED, ((queries, length), (2, 40)), sliding_window=9)
    good, tables = by_triton(PAGED, args), args[3].long()
    seen = (length - queries - 8) // 16  # the first query's first block
    tables[0, :seen] = torch.tensor([-1, -7, 10**6, INT64.min, INT64.max]).repeat(seen)[:seen]
    tables[1, 0] = -1
    freed = (*args[:3], tables, *args[4:])
    assert_same(unchecked(PAGED, freed), good)
    tables[0, seen] = -1
    y = unchecked(PAGED, freed)
    first = (seen + 1) * 16 + 8 - (length - queries)  # the first query that sees nothing of that block
    assert y[: min(first, queries)].isnan().all()
    assert_same(y[first:], good[first:])
