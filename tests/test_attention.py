"""Attention over a paged cache: its values, and that a row's bits follow from what it sees alone."""

import math

import pytest
import torch
from compare import assert_attention, assert_same, raw
from keys import EVERY_KEY_BY_ROW, given_tensors, layouts

import fused_ops
from fused_ops import paged_attention, quantize
from fused_ops.attention_inputs import batch, blocks_of, filled
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, MXFP8, ScaleLayout
from quant.key import FP8, FP8_FNUZ

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = [FP8, FP8_FNUZ, torch.int8]
BACKENDS = sorted(set(fused_ops.OPS["paged_attention"].backends) & {"cpu", "reference"})
needs_kernels = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels on this machine")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MIXED = ((5, 5), (1, 300), (0, 9), (70, 530), (1, 1), (2, 257))  # (queries, tokens)


def inputs(lengths=MIXED, heads=4, kv_heads=2, cols=64, v_cols=None, dtype=torch.bfloat16, held=None, block_size=16):
    """The arguments of paged_attention by name."""
    tokens, blocks = sum(queries for queries, _ in lengths), blocks_of(lengths, block_size)
    q = torch.randn(tokens, heads, cols).to(dtype)
    caches = [filled((blocks, block_size, kv_heads, c), held or dtype, "cpu") for c in (cols, v_cols or cols)]
    tables, seq_lens, starts = batch(lengths, block_size, "cpu")
    return {
        "q": q, "k_cache": caches[0][0], "v_cache": caches[1][0], "block_tables": tables, "seq_lens": seq_lens,
        "query_start_loc": starts, "scale": cols**-0.5, "k_scale": caches[0][1], "v_scale": caches[1][1],
    }  # fmt: skip


def gathered(call, cache, i):
    """The cached rows of sequence i, as the values that they stand for, in float64."""
    size, length = call[cache].shape[1], int(call["seq_lens"][i])
    places = torch.arange(length)
    rows = call[cache][call["block_tables"][i, places // size].long(), places % size].double()
    scale = call[f"{cache[0]}_scale"]
    return rows if scale is None else rows * scale.double().view(-1, 1)


def by_torch(call, dtype):
    """Rows of every sequence in turn by torch's own attention, in `dtype`."""
    found = [call["q"].new_empty(0, call["q"].shape[1], call["v_cache"].shape[-1], dtype=dtype)]
    group = call["q"].shape[1] // call["k_cache"].shape[2]
    for i, (start, end) in enumerate(zip(call["query_start_loc"], call["query_start_loc"][1:], strict=False)):
        if start == end:
            continue
        q = call["q"][start:end].to(dtype).transpose(0, 1)
        k, v = (
            gathered(call, c, i).to(dtype).transpose(0, 1).repeat_interleave(group, 0) for c in ("k_cache", "v_cache")
        )
        ahead = torch.arange(k.shape[1]) - torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        seen = ahead <= 0 if call.get("causal", True) else torch.ones_like(ahead, dtype=torch.bool)
        if window := call.get("sliding_window"):
            seen &= ahead > -window
        if call.get("soft_cap") or call.get("sinks") is not None:
            logits = q @ k.transpose(1, 2) * call["scale"]
            if cap := call.get("soft_cap"):
                logits = torch.tanh(logits / cap) * cap
            logits = logits.masked_fill(~seen, -math.inf)
            if (sinks := call.get("sinks")) is not None:
                logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(*logits.shape[:2], 1)], -1)
            y = logits.softmax(-1)[..., : k.shape[1]] @ v
        else:
            y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=call["scale"])[
                0
            ]
        found.append(y.transpose(0, 1))
    return torch.cat(found).flatten(1)


def close(call):
    """Whether the call is as good as torch, in its own dtype."""
    actual = paged_attention(**call)
    assert_attention(actual, by_torch(call, torch.float64), by_torch(call, call["q"].dtype), str(actual.dtype))
    return actual


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 2, 64, 64), (8, 1, 128, 128), (7, 1, 80, 96), (2, 2, 256, 256), (3, 3, 33, 7), (6, 2, 192, 128)],
    ids=str,
)
@needs_kernels
def test_it_is_as_exact_as_torch(shape, dtype):
    close(inputs(MIXED, *shape, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"sliding_window": 1}, {"sliding_window": 40}, {"sliding_window": 300}, {"soft_cap": 2.0},
     {"sinks": torch.tensor([0.5, -30.0, 4.0, -math.inf])},
     {"soft_cap": 20.0, "sinks": torch.tensor([1.0, 2, 3, 4], dtype=torch.float16), "sliding_window": 7}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_kernels
def test_options_are_as_exact_as_torch(options, dtype):
    close(inputs(dtype=dtype) | options)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("held", CODES, ids=str)
@needs_kernels
def test_codes_are_as_exact_as_their_values(held, per_head):
    call = inputs(dtype=torch.float32, held=held)
    if per_head:
        call |= {"k_scale": torch.tensor([0.02, 0.1]), "v_scale": torch.tensor([3.0, 0.01])}
    close(call)


@needs_kernels
def test_large_logits_are_exact():
    call = inputs(dtype=torch.float32)
    close(call | {"q": call["q"] * 100})
    close(call | {"scale": -3.0})
    close(call | {"scale": 0.0})


@pytest.mark.parametrize("order", ["heads outermost", "interleaved", "gaps"])
@pytest.mark.parametrize("held", [None, FP8], ids=str)
@needs_kernels
def test_memory_order_changes_no_bit(held, order):
    call = inputs(held=held)
    expected = paged_attention(**call)
    k, v = call["k_cache"], call["v_cache"]
    if order == "heads outermost":
        k, v = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v))
    elif order == "interleaved":
        k, v = torch.stack([raw(k), raw(v)], 1).view(k.dtype).unbind(1)
    else:
        k, v = (torch.cat([raw(c), raw(c)], -1).view(c.dtype)[..., : c.shape[-1]] for c in (k, v))
    packed = torch.cat([call["q"], call["q"]], 1)[:, :4]
    assert_same(paged_attention(**{**call, "q": packed, "k_cache": k, "v_cache": v}), expected)


@pytest.mark.parametrize("kinds", [(torch.int64, torch.int32, torch.int64), (torch.int32, torch.int64, torch.int32)])
@every_backend
def test_numbers_may_be_of_either_width(backend, kinds):
    call = inputs()
    with fused_ops.use_backend(backend):
        expected = paged_attention(**call)
        names = ("block_tables", "seq_lens", "query_start_loc")
        other = {name: call[name].to(kind) for name, kind in zip(names, kinds, strict=True)}
        assert_same(paged_attention(**{**call, **other}), expected)


# --- a row's bits follow from what it sees ---

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


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("lengths", [((1, 5000),), ((1, 700), (3, 1500)), MIXED], ids=str)
@needs_kernels
def test_threads_share_a_long_sequence_without_changing_a_bit(lengths, threads):
    before = torch.get_num_threads()
    sinks = torch.randn(4)
    call = inputs(lengths, kv_heads=1) | {"sinks": sinks}
    try:
        torch.set_num_threads(1)
        expected = paged_attention(**call)
        torch.set_num_threads(threads)
        assert_same(paged_attention(**call), expected)
    finally:
        torch.set_num_threads(before)


# --- nothing is hidden ---


@pytest.mark.parametrize("held", [None, FP8, FP8_FNUZ], ids=str)
@needs_kernels
def test_what_a_row_sees_reaches_it(held):
    """A NaN in its key makes the whole row one, a NaN in a value that column, from the first query that sees it on."""
    nan = {None: torch.tensor(math.nan).bfloat16().view(torch.int16), FP8: 0x7F, FP8_FNUZ: 0x80}[held]
    for name, place in ("k_cache", 20), ("v_cache", 20), ("v_cache", 0), ("k_cache", 270):
        call = inputs(((280, 280),), held=held)
        bits = raw(call[name]).clone()
        bits[int(call["block_tables"][0, place // 16]), place % 16, 1, 5] = int(nan)
        call[name] = bits.view(call[name].dtype)
        y = paged_attention(**call).view(280, 4, 64)
        expected = torch.zeros(280, 4, 64, dtype=torch.bool)
        expected[place:, 2:, slice(None) if name == "k_cache" else 5] = True
        assert torch.equal(y.isnan(), expected), (name, place)


@every_backend
def test_infinities_reach_the_result(backend):
    with fused_ops.use_backend(backend):
        call = inputs(((4, 300),), dtype=torch.float32)
        call["v_cache"][int(call["block_tables"][0, 2]), 3, 0, 1] = math.inf
        y = paged_attention(**call).view(4, 4, 64)
        assert (y[:, :2, 1] == math.inf).all()
        assert y[:, 2:].isfinite().all()
        call = inputs(((4, 300),), dtype=torch.float32)
        call["q"][1, 0, 0] = math.inf
        y = paged_attention(**call).view(4, 4, 64)
        assert y[1, 0].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()
        assert y[1, 1:].isfinite().all()
        call = inputs(((2, 300),), heads=1, kv_heads=1, cols=8, dtype=torch.float32)
        call["q"][:] = torch.tensor([1.0, *[0.0] * 7])
        call["k_cache"][..., 0] = -math.inf  # no key counts, until one does
        assert paged_attention(**call).isnan().all()
        call["k_cache"][int(call["block_tables"][0, 298 // 16]), 298 % 16, 0, 0] = 1.0
        seen = call["v_cache"][int(call["block_tables"][0, 298 // 16]), 298 % 16, 0]
        assert torch.equal(paged_attention(**call), seen.expand(2, 8))


@every_backend
def test_rows_of_no_sequence_are_zeros(backend):
    call = inputs(((3, 3), (0, 5), (1, 9)))
    call["q"] = torch.cat([call["q"], torch.full((5, 4, 64), math.nan).bfloat16()])
    with fused_ops.use_backend(backend):
        y = paged_attention(**call)
        assert y[:4].isfinite().all()
        assert not y[4:].any()
        none = {**call, "block_tables": call["block_tables"][:0], "seq_lens": call["seq_lens"][:0]}
        assert not paged_attention(**{**none, "query_start_loc": torch.zeros(1, dtype=torch.int32)}).any()
        empty = {**call, "q": call["q"][:0], "query_start_loc": torch.zeros(4, dtype=torch.int32)}
        assert paged_attention(**empty).shape == (0, 256)


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


# --- fused with the quantization ---

HEADS_AND_SLICES = [(4, 32), (3, 64), (2, 128), (5, 32), (1, 96), (4, 96)]


@pytest.mark.parametrize("shape", HEADS_AND_SLICES, ids=str)
@EVERY_KEY_BY_ROW
@every_backend
def test_codes_are_those_of_the_unfused_result(backend, key, shape):
    heads, cols = shape
    call = inputs(((3, 3), (1, 40)), heads, 1, cols)
    call["q"] = torch.cat([call["q"], call["q"][:2]])  # two of no sequence
    given = given_tensors(key)
    with fused_ops.use_backend(backend):
        y = paged_attention(**call)
        for each in layouts(key):
            try:
                expected = quantize(y, each, **given, keep_unquantized=True)
            except ValueError:
                continue  # no whole groups
            options = {f"output_{name}": value for name, value in given.items()}
            for kept in False, True:
                fused = paged_attention(**call, output_quant_key=each, **options, keep_unquantized=kept)
                for name in "data", "scale", "zero_point":
                    assert_same(getattr(fused, name), getattr(expected, name), f"{each} {name}")
                if kept:
                    assert_same(fused.unquantized, y)
                if each.scale.layout in (ScaleLayout.SWIZZLED_128X4, ScaleLayout.PACKED_UE8M0):
                    stored = [
                        raw(
                            a.scale.as_strided((a.scale.untyped_storage().nbytes() // a.scale.element_size(),), (1,), 0)
                        )
                        for a in (fused, expected)
                    ]
                    if each.scale.layout == ScaleLayout.SWIZZLED_128X4:
                        assert torch.equal(*stored), f"{each}: padding"


@needs_kernels
def test_given_outputs_padded_rows_and_bounds():
    call = inputs(((3, 3), (1, 40)), 2, 1, 128)
    y = paged_attention(**call)
    out = torch.empty(4, 300, dtype=torch.bfloat16)[:, 7:263]
    assert paged_attention(**call, out=out) is out
    assert_same(out.contiguous(), y)
    bound = torch.tensor([0.1])
    fused = paged_attention(**call, output_quant_key=FP8_DYNAMIC_GROUP_128, output_scale_ub=bound, output_pad_rows=32)
    expected = quantize(y, FP8_DYNAMIC_GROUP_128, scale_ub=bound, pad_rows=32)
    assert_same(fused.data, expected.data)
    assert_same(fused.scale, expected.scale)
    assert fused.data.untyped_storage().nbytes() == 32 * 256
    for key in FP8_DYNAMIC_TOKEN, MXFP8:
        again = paged_attention(**call, output_quant_key=key)
        given = paged_attention(**call, output_quant_key=key, out=quantize(y * 0, key))
        assert_same(given.data, again.data)
        assert_same(given.scale, again.scale)


# --- errors ---

BAD = [
    ({"q": torch.zeros(3, 4, 64)}, TypeError, "k_cache is torch.bfloat16"),
    ({"q": torch.zeros(80, 4, 65).bfloat16()}, ValueError, "k_cache is"),
    ({"q": torch.zeros(80, 3, 64).bfloat16()}, ValueError, "q has 3 heads, expected a multiple of k_cache's 2"),
    ({"q": None}, TypeError, "q is None"),
    ({"scale": math.inf}, ValueError, "scale is inf"),
    ({"scale": "1"}, (TypeError, ValueError), "scale"),
    ({"soft_cap": -1.0}, ValueError, "soft_cap is -1.0"),
    ({"soft_cap": 0.0}, ValueError, "soft_cap is 0.0"),
    ({"sliding_window": 0}, ValueError, "sliding_window is 0"),
    ({"sliding_window": 3, "causal": False}, ValueError, "sliding_window is 3"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks is"),
    ({"k_scale": torch.ones(1)}, ValueError, "k_scale is given"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 1])}, ValueError, "seq_lens has 1 at 5, expected 2 to"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 10**6])}, ValueError, "seq_lens has 1000000 at 5"),
    ({"seq_lens": torch.tensor([5.0, 300, 9, 530, 1, 257])}, TypeError, "seq_lens is torch.float32"),
    ({"query_start_loc": torch.tensor([1, 5, 6, 6, 76, 77, 79])}, ValueError, "query_start_loc starts with 1"),
    ({"query_start_loc": torch.tensor([0, 5, 4, 6, 76, 77, 79])}, ValueError, "goes from 5 to 4 at 1"),
    ({"query_start_loc": torch.tensor([0, 5, 6, 6, 76, 77, 80])}, ValueError, "goes from 77 to 80 at 5"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 2**63 - 1])}, ValueError, "seq_lens has 9223372036854775807 at 5"),
    ({"query_start_loc": torch.tensor([0, 5])}, ValueError, "query_start_loc is"),
    ({"output_quant_key": FP8_DYNAMIC_TENSOR}, ValueError, "output_quant_key is"),
    ({"output_scale": torch.ones(1)}, ValueError, "output_scale is given, but output_quant_key is None"),
    ({"output_sacle": torch.ones(1)}, TypeError, "output_sacle"),
    ({"output_quant_key": FP8_DYNAMIC_TOKEN, "output_pad_rows": 0}, ValueError, "output_pad_rows is 0"),
    ({"soft_cap": True}, TypeError, "soft_cap is bool"),
    ({"scale": True}, TypeError, "scale is bool"),
    ({"causal": 1}, TypeError, "causal is 1"),
    ({"sliding_window": True}, TypeError, "sliding_window is bool"),
    ({"sliding_window": 2**63}, ValueError, "sliding_window is 9223372036854775808"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "says"), BAD, ids=[f"{next(iter(w))} {i}" for i, (w, *_) in enumerate(BAD)])
@every_backend
def test_errors_name_the_argument(backend, wrong, error, says):
    with fused_ops.use_backend(backend), pytest.raises(error, match=says):
        paged_attention(**{**inputs(), **wrong})


@every_backend
def test_blocks_outside_the_cache_are_refused_before_anything_is_written(backend):
    call = inputs()
    for block in -1, call["k_cache"].shape[0], -(2**31):
        tables = call["block_tables"].clone()
        tables[3, 33] = block
        out = torch.full((79, 256), 7.0).bfloat16()
        with fused_ops.use_backend(backend), pytest.raises(ValueError, match=r"block_tables has .* at 3"):
            paged_attention(**{**call, "block_tables": tables}, out=out)
        assert (out == 7).all()


@needs_kernels
def test_outputs_lie_over_no_input():
    call = inputs()
    for name, tensor in ("q", call["q"].flatten(1)), ("k_cache", call["k_cache"].flatten()[: 79 * 256].view(79, 256)):
        before = raw(call[name]).clone()
        with pytest.raises(ValueError, match="overlaps another argument"):
            paged_attention(**call, out=tensor)
        assert torch.equal(raw(call[name]), before)
