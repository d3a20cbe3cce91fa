"""The Triton kernels of attention: in Triton's interpreter, or with FUSED_OPS_TEST_DEVICE=cuda on a GPU."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pairwise
import pytest
import torch
from compare import assert_attends, assert_same
from keys import EVERY_KEY_BY_ROW, given_tensors, layouts
from promises import DEVICE, on_device
from test_ops import as_tuple, cases, fresh, functional, outputs_for, spread
from torch import Tensor

import fused_ops
from fused_ops import OPS
from fused_ops._op import describe
from fused_ops.attention import sequences
from fused_ops.attention_inputs import batch, blocks_of, filled
from quant import FP8_DYNAMIC_GROUP_64, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR
from quant.key import FP8, FP8_FNUZ

pytest.importorskip("triton", reason="Triton is not installed")

from fused_ops._triton import attention_launch as launches

PAGED, MLA = OPS["paged_attention"], OPS["mla_attention"]
BOTH = pytest.mark.parametrize("op", [PAGED, MLA], ids=lambda op: op.name)
INT64 = torch.iinfo(torch.int64)
LONG = ((1, 540), (0, 0), (2, 30))  # decoding, over several segments
MIXED = ((1, 40), (33, 33), (5, 60))


def by_triton(op, args) -> Tensor:
    with fused_ops.use_backend("triton"):
        return op.default(*map(on_device, args)).cpu()


def arguments(op, lengths, dtype=torch.bfloat16, held=None, block_size=16, **changes) -> tuple:
    """Of a model with two heads to a head of keys, or of MLA, by the operation's names where `changes` has any."""
    tokens, blocks = sum(queries for queries, _ in lengths), blocks_of(lengths, block_size)
    tables = batch(lengths, block_size, "cpu")
    if op.name.startswith("mla"):
        q = torch.randn(tokens, 3, 40).to(dtype)
        kv_b = (torch.randn(3, 64, 48) / 7).to(dtype)
        cache, scale = filled((blocks, block_size, 48 + 8), held or dtype, "cpu")
        args = (q[..., :32], q[..., 32:], cache, kv_b[:, :32], kv_b[:, 32:], *tables, 40**-0.5, scale)
    else:
        cols, v_cols = changes.pop("cols", 32), changes.pop("v_cols", 32)
        q = torch.randn(tokens, 4, cols).to(dtype)
        (k, k_scale), (v, v_scale) = (filled((blocks, block_size, 2, c), held or dtype, "cpu") for c in (cols, v_cols))
        args = (q, k, v, *tables, cols**-0.5, True, 0, 0.0, None, k_scale, v_scale)
    return tuple((dict(zip(op.arguments, args, strict=True)) | changes).values())


def exact(op, args) -> tuple[Tensor, Tensor]:
    """In float64: the results, and what they would be if all terms of values had one sign."""
    named = dict(zip(op.arguments, args, strict=True))
    tables = [named[name] for name in ("block_tables", "seq_lens", "query_start_loc")]
    if op.name.startswith("mla"):
        rank = named["w_uk"].shape[2]
        scale = 1.0 if named["kv_scale"] is None else named["kv_scale"].double()
        rows = named["kv_cache"].flatten(0, 1).double() * scale
        c, k_pe = rows[:, :rank], rows[:, rank:]
        k = torch.cat([torch.einsum("kr,hdr->khd", c, named["w_uk"].double()), expand(k_pe, named["w_uk"])], -1)
        v = torch.einsum("kr,hdr->khd", c, named["w_uv"].double())
        v_terms = torch.einsum("kr,hdr->khd", c.abs(), named["w_uv"].double().abs())
        q = torch.cat([named["q_nope"], named["q_pe"]], -1).double()
        cache, causal, window, cap, sinks = named["kv_cache"], True, 0, 0.0, None
    else:
        q, cache = named["q"].double(), named["k_cache"]
        ratio = q.shape[1] // cache.shape[2]
        k, v = (
            (t.double() if s is None else t.double() * s.double().view(-1, 1)).flatten(0, 1).repeat_interleave(ratio, 1)
            for t, s in ((cache, named["k_scale"]), (named["v_cache"], named["v_scale"]))
        )
        v_terms = v.abs()
        causal, window, cap, sinks = (named[name] for name in ("causal", "sliding_window", "soft_cap", "sinks"))
    y, terms = (q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float64) for _ in range(2))
    for rows, slots in sequences(q.shape[0], cache, *tables):
        s = torch.einsum("qhd,khd->hqk", q[rows], k[slots]) * named["scale"]
        s = torch.tanh(s / cap) * cap if cap else s
        places = torch.arange(len(slots))
        ahead = places - places[len(slots) - s.shape[1] :, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        hidden |= (ahead > 0) & causal
        hidden |= (ahead <= -window) & bool(window)
        s = s.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.double()[:, None, None].expand(*s.shape[:2], 1)], -1)
        p = s.softmax(-1)[..., : len(slots)]
        y[rows], terms[rows] = (torch.einsum("hqk,khd->qhd", p, x) for x in (v[slots], v_terms[slots]))
    return y.flatten(1), terms.flatten(1)


def expand(k_pe: Tensor, w_uk: Tensor) -> Tensor:
    return k_pe[:, None].expand(-1, w_uk.shape[0], -1)


@BOTH
def test_results_are_those_of_float64(op):
    some = [args for args in cases(op) if args[0].shape[0] < 60]
    for args in some[:: max(1, len(some) // 10)]:
        assert_attends(by_triton(op, args), *exact(op, args), describe(args, op))


@pytest.mark.parametrize("held", [FP8, FP8_FNUZ, torch.int8], ids=str)
def test_codes_of_a_cache_are_decoded_exactly(held):
    """A query of one key gets its value."""
    codes = torch.arange(256, dtype=torch.uint8).view(held)
    cache = codes.view(8, 1, 1, 32)
    lengths = ((1, 1),) * 8
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        args = arguments(PAGED, lengths, dtype, block_size=1)
        zero = torch.zeros_like(args[0])
        tables = (torch.arange(8)[:, None], *args[4:6])
        one = torch.ones(1)
        call = (zero[:, :1], torch.zeros_like(cache), cache, *tables, 1.0, True, 0, 0.0, None, one, one)
        assert_same(by_triton(PAGED, call), codes.float().to(dtype).view(8, 32) + 0.0)


# --- promise 1 ---


def quantized(op, args, key, out: dict | None = None) -> dict[str, Tensor]:
    """What `op`_quant makes, and what `quantize` makes of `op`'s, by name."""
    fused = OPS[f"{op.name}_quant"]
    given = given_tensors(key)
    more = (key.code, next(iter(v for n, v in given.items() if n != "zero_point"), None), given.get("zero_point"))
    made = []
    with fused_ops.use_backend("triton"):
        y = op.default(*map(on_device, args))
        for each, inputs in (fused, args), (OPS["quantize"], (y,)):
            inputs = tuple(map(on_device, (*inputs, *more)))
            outs = fresh(each, inputs)
            each.out(*inputs, **outs)
            made.append({name: outs[f"{name}_out"] for name in outputs_for(each, inputs)})
    made[1]["unquantized"] = y
    return made


@EVERY_KEY_BY_ROW
@BOTH
def test_fused_is_unfused(op, key):
    """By the epilogue of either kernel, and where a scale is shared by heads."""
    short, long = ((1, 20), (3, 17)), ((2, 520),)
    for i, each in enumerate(layouts(key)[: None if op is PAGED or pairwise.everything else 1]):
        calls = [(short, {}) if op is MLA else (short, {"v_cols": 128})]
        if op is PAGED and i == 0:
            calls += [(long, {"v_cols": 128}), (short, {"v_cols": 32})]
        for lengths, changes in calls:
            args = arguments(op, lengths, **changes)
            fused, unfused = quantized(op, args, each)
            assert fused.keys() == unfused.keys()
            for name, value in fused.items():
                assert_same(value.cpu(), unfused[name].cpu(), f"{name} {each} {describe(args, op)}")


def test_which_keys_are_quantized_in_the_epilogue():
    def apart(key, cols):
        return launches.quantized_apart(launches.Results(key.code), cols, 4)

    assert not apart(FP8_STATIC_TENSOR, 80)
    assert apart(FP8_DYNAMIC_TOKEN, 128)
    assert not apart(FP8_DYNAMIC_GROUP_64, 64)
    assert not apart(FP8_DYNAMIC_GROUP_64, 192)
    assert apart(FP8_DYNAMIC_GROUP_64, 96)
    assert apart(FP8_DYNAMIC_GROUP_64, 32)


@pytest.mark.parametrize("name", ["paged_attention_quant", "mla_attention_quant", "paged_attention", "mla_attention"])
def test_the_functional_overload_returns_what_the_other_writes_and_nothing_lies_beside_it(name):
    op, plain = OPS[name], OPS[name.removesuffix("_quant")]
    for key in (FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN) if op is not plain else (None,):
        given = () if key is None else (key.code, torch.tensor([0.03]) if key.scale.static else None)
        args = tuple(map(on_device, (*arguments(plain, LONG), *given)))
        assert functional(op, args)
        with fused_ops.use_backend("triton"):
            returned = dict(zip(op.outputs, as_tuple(op.default(*args)), strict=False))
            outs = fresh(op, args, row_gap=5)
            bases = spread(outs)
            edges = {n: base[..., -5:].clone() for n, base in bases.items()}
            op.out(*args, **outs)
        for n, base in bases.items():
            assert_same(base[..., -5:].contiguous(), edges[n].contiguous(), n)
        for n, value in returned.items():
            written = args[-1] if n == "scale" and key.scale.static else outs[f"{n}_out"].contiguous()
            assert_same(value, written, n)


# --- promise 2 ---


def rows_of(args, op, i: int) -> slice:
    starts = args[op.argument("query_start_loc")].tolist()
    return slice(starts[i], starts[i + 1])


def alone(op, args, i: int, first: int, end: int, spare: int = 0) -> tuple:
    """Sequence i's queries from `first` to `end` as a call of their own, with the keys up to there."""
    named = dict(zip(op.arguments, args, strict=True))
    rows = rows_of(args, op, i)
    length = int(named["seq_lens"][i]) - (rows.stop - rows.start) + end
    for name in "q", "q_nope", "q_pe":
        if name in named:
            named[name] = named[name][rows.start + first : rows.start + end]
    named["block_tables"] = torch.nn.functional.pad(named["block_tables"][i : i + 1], (0, spare), value=-7)
    named["seq_lens"] = torch.tensor([length])
    named["query_start_loc"] = torch.tensor([0, end - first])
    return tuple(named.values())


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_depends_on_its_query_and_the_keys_it_sees(variant, monkeypatch):
    """In a batch, alone, in one piece, in chunks, token by token; by one kernel, and in segments that another folds."""
    changes = dict(VARIANTS[variant])
    args = arguments(PAGED, (*MIXED, (70, 560)), **changes)
    whole = by_triton(PAGED, args)
    for i, chunks in ((0, [0, 1]), (1, [0, 1, 20, 33]), (3, [0, 1, 40, 70])):
        rows = rows_of(args, PAGED, i)
        for first, end in itertools.pairwise(chunks):
            expected = whole[rows.start + first : rows.start + end]
            for spare in (0, 40)[: 1 + (i < 3)]:  # a table that has room for several segments
                assert_same(by_triton(PAGED, alone(PAGED, args, i, first, end, spare)), expected, f"{i} {first} {end}")
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    assert_same(by_triton(PAGED, args), whole)


def test_a_row_of_mla_depends_on_its_query_and_the_keys_it_sees(monkeypatch):
    args = arguments(MLA, (*MIXED, (30, 560)))
    whole = by_triton(MLA, args)
    for i, chunks in ((1, [0, 1, 33]), (3, [0, 1, 30])):
        rows = rows_of(args, MLA, i)
        for first, end in itertools.pairwise(chunks):
            expected = whole[rows.start + first : rows.start + end]
            assert_same(by_triton(MLA, alone(MLA, args, i, first, end)), expected)
    monkeypatch.setattr(launches, "WORKSPACE", 0)
    assert_same(by_triton(MLA, args), whole)


def test_both_kernels_are_reached(monkeypatch):
    """Else the tests of their agreement would compare one with itself."""
    taken = []
    shares = launches.shares

    def spy(*args):
        taken.append(shares(*args))
        return taken[-1]

    monkeypatch.setattr(launches, "shares", spy)
    by_triton(PAGED, arguments(PAGED, (*MIXED, (70, 560))))
    assert 33 > taken[-1][0] >= 5
    by_triton(PAGED, arguments(PAGED, MIXED))
    assert taken[-1] == (0, 0)


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


# --- what isn't seen, what is, and what isn't there ---


def place(op, args, i: int, key: int) -> tuple[int, int]:
    """The block of a sequence's key, and its slot."""
    size = args[op.argument(next(name for name in op.arguments if name.endswith("cache")))].shape[1]
    return int(args[op.argument("block_tables")][i, key // size]), key % size


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@BOTH
def test_what_is_unseen_changes_nothing(op, poison):
    """Later tokens, rows behind the last, blocks of nobody, keys before a window."""
    window = {"sliding_window": 9} if op is PAGED else {}
    args = arguments(op, ((20, 30), (1, 600), (2, 17)), torch.float16, **window)
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
    dirty += [place(op, args, 1, key) for key in range(590)] if window else []
    for cache in caches:
        for at in dirty:
            cache[at] = poison
    after, last = by_triton(op, args), rows_of(args, op, 0).stop - 1
    keep = [row for row in range(after.shape[0]) if row != last]
    assert_same(after[keep], before[keep])
    assert not after[last].isfinite().any()


@pytest.mark.parametrize("length", [40, 600])
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


HOSTILE = {  # of sequences whose rows are 0 and 1, 2 to 4, 5 to 7: what is changed, and the rows that become NaN
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
    args = dict(zip(op.arguments, arguments(op, ((2, 40), (3, 40), (3, 60))), strict=True))
    args["block_tables"] = torch.tensor([[0, 1, 2, 3]] * 3)
    good = by_triton(op, tuple(args.values()))
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
    for lengths in ((20, 40),), ((20, 600),):
        args = arguments(PAGED, lengths)
        good, tables = by_triton(PAGED, args), args[3].clone()
        tables[0, (lengths[0][1] - 1) // 16] = 10**6
        y = torch.empty_like(good, device=DEVICE)
        PAGED.backends["triton"].run(tuple(map(on_device, (*args[:3], tables, *args[4:]))), {"y": y})
        first = 20 - (lengths[0][1] - 1) % 16 - 1  # whose own key lies in that block
        assert_same(y[:first].cpu(), good[:first])
        assert y[first:].isnan().all()


def test_what_is_refused():
    args = [on_device(a) for a in arguments(PAGED, ((1, 1),), cols=264, v_cols=8)]
    with fused_ops.use_backend("triton"):
        with pytest.raises(ValueError, match=r"the triton backend does not serve .* but heads of up to 256 columns"):
            PAGED.default(*args)
        with pytest.raises(ValueError, match="block_tables is"):
            PAGED.default(*args[:3], args[3][0], *args[4:])
        args = [on_device(a) for a in arguments(PAGED, ((1, 1),))]
        with pytest.raises(ValueError, match=r"out (shares|overlaps)"):
            PAGED.out(*args, y_out=args[0].flatten(1))


def test_programs_follow_from_the_model():
    """Tiles, of which segments are whole numbers; sizes that a GPU has."""
    for heads, kv_heads in (32, 8), (3, 1), (128, 1), (5, 5):
        for cols, v_cols, element in (64, 64, 2), (80, 96, 2), (256, 256, 2), (128, 128, 4), (1, 1, 4):
            tile = launches.tile_for(heads, kv_heads, 16, cols, 0, v_cols, False, element, "", True, 0, False)
            assert tile.segment % tile.keys == 0
            assert tile.queries * tile.shared == tile.rows
            assert tile.parts * tile.shared >= tile.ratio


# --- for GPUs that aren't there ---

PAGED_CALL = "paged_attention_quant:FP8_DYNAMIC_GROUP_128:4096:bfloat16:long"
MLA_CALL = "mla_attention_quant:FP8_DYNAMIC_GROUP_128:2048:bfloat16:long"
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}  # KiB of a program
COMPILED = [(arch, PAGED_CALL + "+codes" * (i % 2 == 0)) for i, arch in enumerate(SHARED)]
COMPILED += [("sm_90", MLA_CALL), ("gfx942", MLA_CALL)]
COMPILED = COMPILED if pairwise.everything else COMPILED[1:8:3]  # sm_90, gfx942, and MLA's on gfx942


@pytest.mark.parametrize(("arch", "call"), COMPILED)
def test_kernels_of_real_sizes_fit_their_targets(arch, call, tmp_path):
    """By the matrix instructions of the target, in its shared memory."""
    folder = Path(__file__).parent
    paths = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, str(folder / "compile_triton.py"), f"{arch}={call}"],
        env={**os.environ, "TRITON_INTERPRET": "0", **paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (kernels,) = json.loads(done.stdout)
    names = [kernel["name"] for kernel in kernels]
    if call == MLA_CALL:  # tiles of two queries: a sequence of 16 isn't cut into segments, but might be
        assert names == ["project_kernel", "attend_kernel", "attend_kernel", "finish_kernel", "project_kernel"]
    else:
        assert names == ["attend_kernel", "finish_kernel"]
    for kernel in kernels:
        asm = kernel["asm"]
        assert kernel["shared"] <= SHARED[arch] << 10
        if kernel["name"] != "finish_kernel":
            assert re.search(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", asm)
        assert not re.search(r"\b(atom|red)\.|atomic", asm), "an order that isn't fixed"
        assert not re.search(r"div\.(full|approx)|fma\.rn\.f32", asm), "IEEE, and nothing contracted"
