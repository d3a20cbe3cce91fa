"""Triton's attention: a row depends on its query and the keys it sees, and all of what it sees reaches it."""

import itertools

import pairwise
import pytest
import torch
from compare import assert_same
from keys import given_tensors
from promises import on_device
from test_ops import fresh
from torch import Tensor
from triton_attention import (
    BOTH,
    MIXED,
    MLA,
    PAGED,
    SEGMENT,
    alone,
    arguments,
    by_triton,
    launches,
    place,
    rows_of,
)
from triton_attention import segments as segments

import fused_ops
from fused_ops import OPS
from fused_ops._triton import mla
from quant import FP8_DYNAMIC_GROUP_64, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, NVFP4, ScaleLayout
from quant.key import FP8

VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 9},
    "cap": {"soft_cap": 20.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 4)},
    "wide": {"cols": 80, "v_cols": 160},
    "FP8": {"held": FP8},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}
PAIRED = ("window sinks", "cap FP8", "wide float16", "float32")
SEQUENCES = ((1, 40), (6, 33), (5, 60), (36, SEGMENT + 60))  # the last: more queries than a tile, two segments


@pytest.mark.parametrize("variant", VARIANTS if pairwise.everything else PAIRED)
def test_a_row_depends_on_its_query_and_the_keys_it_sees(variant, monkeypatch):
    """In a batch, alone, in one piece, in chunks, token by token; by one kernel, and in segments that another folds."""
    changes = {name: value for word in variant.split() for name, value in VARIANTS[word].items()}
    args = arguments(PAGED, SEQUENCES, **changes)
    whole = by_triton(PAGED, args)
    for i, chunks in ((0, [0, 1]), (1, [0, 1, 6]), (3, [0, 1, 34, 36])):
        rows = rows_of(args, PAGED, i)
        for first, end in itertools.pairwise(chunks):
            expected = whole[rows.start + first : rows.start + end]
            for spare in (0, 40)[: 1 + (i == 1)]:  # a table that has room for several segments
                assert_same(by_triton(PAGED, alone(PAGED, args, i, first, end, spare)), expected, f"{i} {first} {end}")
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    assert_same(by_triton(PAGED, args), whole)


def test_a_row_of_mla_depends_on_its_query_and_the_keys_it_sees(monkeypatch):
    args = arguments(MLA, SEQUENCES)
    whole = by_triton(MLA, args)
    for i, chunks in ((1, [0, 1, 6]), (3, [0, 1, 36])):
        rows = rows_of(args, MLA, i)
        for first, end in itertools.pairwise(chunks):
            expected = whole[rows.start + first : rows.start + end]
            assert_same(by_triton(MLA, alone(MLA, args, i, first, end)), expected)
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    assert_same(by_triton(MLA, args), whole)


@pytest.fixture
def started(monkeypatch):
    """Names of what is launched."""
    names, start = [], launches.Plan.start

    def spy(plan, name, *args):
        names.append(name)
        start(plan, name, *args)

    monkeypatch.setattr(launches.Plan, "start", spy)
    return names


def test_both_kernels_are_reached(started, monkeypatch):
    """Else the tests of their agreement would compare one with itself."""
    by_triton(PAGED, arguments(PAGED, MIXED))
    assert started == ["attend", "finish"]
    started.clear()
    args = arguments(PAGED, SEQUENCES)
    by_triton(PAGED, args)
    assert started == ["attend", "share", "fold"]
    started.clear()
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    by_triton(PAGED, args)
    assert started == ["attend"] + ["share", "fold"] * 4


def test_long_keys_are_shared_out_however_many_sequences_there_are():
    """And however long they might be: a table is as wide as the longest sequence that is served."""
    for count in 1, 7, 300, 5000:
        for most in 2, 256, 4096:
            each = 32 * most * 130 * 4
            few, at_once = launches.shares(count, count, most, each, 16)
            assert 1 <= few <= 16
            assert 1 <= at_once <= count
            assert few * at_once * each <= launches.WORKSPACE or few * at_once == 1
    assert launches.shares(4 * 64, 64, 256, 1 << 20, 16)[0] == 8
    assert launches.shares(3, 3, 9999, launches.WORKSPACE + 1, 16) == (1, 1)
    assert launches.shares(4 * 64, 64, 256, 1 << 26, 16) == (4, 2)  # all queries of a sequence, if not of all at once
    assert launches.shares(64, 64, 1, 1, 16) == launches.shares(0, 5, 9, 1, 16) == (0, 0)


def test_tokens_of_mla_may_be_worked_through_in_slices(started, monkeypatch):
    calls = [arguments(MLA, lengths) for lengths in ((*SEQUENCES, (0, 4), (17, 17)), ((40, 60),))]
    wholes = [by_triton(MLA, args) for args in calls]
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    monkeypatch.setattr(mla, "SLICE", 32)
    for args, whole, slices in zip(calls, wholes, (3, 2), strict=True):
        started.clear()
        assert_same(by_triton(MLA, args), whole)
        assert started.count("project") == 2 * slices


SLICED = [
    NVFP4.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
    FP8_STATIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_GROUP_64.with_scale(layout=ScaleLayout.COLUMN_MAJOR),
]


@pytest.mark.parametrize("key", SLICED if pairwise.everything else SLICED[:1], ids=str)
def test_slices_of_tokens_are_quantized_as_the_whole(key, monkeypatch):
    given = next(iter(given_tensors(key).values()), None)
    args = tuple(map(on_device, (*arguments(MLA, ((130, 130), (2, 30))), key.code, given)))
    made = []
    for _ in range(2):
        outs = fresh(OPS["mla_attention_quant"], args)
        with fused_ops.use_backend("triton"):
            OPS["mla_attention_quant"].out(*args, **outs)
        made.append(outs)
        monkeypatch.setattr(launches, "WORKSPACE", 0)  # slices of 128
    for name, value in made[1].items():
        assert_same(value, made[0][name], name)


@BOTH
def test_blocks_may_lie_anywhere(op):
    args = arguments(op, MIXED)
    whole, named = by_triton(op, args), dict(zip(op.arguments, args, strict=True))
    caches = [name for name in named if name.endswith("cache")]
    order = torch.randperm(named[caches[0]].shape[0])
    named["block_tables"] = torch.where(named["block_tables"] < 0, -7, order.argsort()[named["block_tables"].long()])
    for name in caches:
        cache = named[name][order]
        wide = torch.full((*cache.shape[:1], 3, *cache.shape[1:]), float("nan")).to(cache.dtype)
        axes = range(1, cache.ndim - 1)
        wide = wide.permute(0, 1, *(a + 1 for a in reversed(axes)), cache.ndim).contiguous()
        wide = wide.permute(0, 1, *(a + 1 for a in reversed(axes)), cache.ndim)
        named[name] = wide[:, 1].copy_(cache)
    for name in "q", "q_nope", "q_pe":
        if name in named:
            x = named[name]
            named[name] = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), float("nan"), dtype=x.dtype)
            named[name] = named[name][:, 1:, 1:-2].copy_(x)
    assert_same(by_triton(op, tuple(named.values())), whole)


# --- what isn't seen, and what is ---


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@BOTH
def test_what_is_unseen_changes_nothing(op, poison):
    """Later tokens, rows behind the last, blocks of nobody, keys before a window."""
    window = {"sliding_window": 9} if op is PAGED else {}
    args = arguments(op, ((20, 30), (1, SEGMENT + 88), (2, 17)), torch.float16, **window)
    before, named = by_triton(op, args), dict(zip(op.arguments, args, strict=True))
    caches = [named[name] for name in named if name.endswith("cache")]
    used = named["block_tables"][named["block_tables"] >= 0].long()
    unused = [b for b in range(caches[0].shape[0]) if b not in used.tolist()]
    assert unused
    dirty = [(b, slice(None)) for b in unused]
    for i, length in enumerate(named["seq_lens"].tolist()):
        block, slot = place(op, args, i, length - 1)
        dirty.append((block, slice(slot + 1, None)))
    dirty.append(place(op, args, 0, 29))  # its last token, which only the last query sees
    dirty += [place(op, args, 1, key) for key in range(SEGMENT + 78)] if window else []
    for cache in caches:
        for at in dirty:
            cache[at] = poison
    after, last = by_triton(op, args), rows_of(args, op, 0).stop - 1
    keep = [row for row in range(after.shape[0]) if row != last]
    assert_same(after[keep], before[keep])
    assert not after[last].isfinite().any()


@pytest.mark.parametrize("length", [40, SEGMENT + 88])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_seen_reaches_the_output(length, poison):
    """A value: its column of the rows that see it, as it is. A key, a query: whole rows, unless the logit is -inf."""
    args = arguments(PAGED, ((6, length),))
    clean = by_triton(PAGED, args).view(6, 4, 32)
    for key, first in (3, 0), (length - 3, 3):
        block, slot = place(PAGED, args, 0, key)
        for name in "v_cache", "k_cache", "q":
            named = {n: a.clone() if isinstance(a, Tensor) else a for n, a in zip(PAGED.arguments, args, strict=True)}
            expected = clean.clone()
            if name == "q":
                named["q"][3, 0, 5] = poison
                expected[3, 0] = float("nan")
            else:
                named[name][block, slot, 1, 5] = poison
            if name == "v_cache":
                expected[first:, 2:, 5] = poison
            actual = by_triton(PAGED, tuple(named.values())).view(6, 4, 32)
            if name == "k_cache":
                weightless = (named["q"][:, :, 5] * poison == -torch.inf)[..., None]
                weightless[:first], weightless[:, :2] = False, False
                expected[first:, 2:] = float("nan")
                assert actual[weightless.expand_as(actual)].isfinite().all()
                actual, expected = (t.masked_fill(weightless, 0.0) for t in (actual, expected))
            assert_same(actual, expected, f"{name} {key}")


def test_infinities_of_both_signs_make_nan():
    args = arguments(PAGED, ((2, 30),))
    for key, value in (3, float("inf")), (20, float("inf")), (28, -float("inf")):
        block, slot = place(PAGED, args, 0, key)
        args[2][block, slot, 0, 5] = value
    actual = by_triton(PAGED, args).view(2, 4, 32)[:, :2, 5]
    assert actual.isnan().all()
    args[2][block, slot, 0, 5] = 1.0
    assert (by_triton(PAGED, args).view(2, 4, 32)[:, :2, 5] == float("inf")).all()
