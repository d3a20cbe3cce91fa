"""MLA over a paged cache of latents: its values, absorbed and expanded, and what a row depends on."""

import math

import pytest
import torch
from attention_calls import run_alone
from compare import assert_attention, assert_same, raw
from keys import EVERY_KEY_BY_ROW, given_tensors, layouts

import fused_ops
from fused_ops import mla_attention, quantize
from fused_ops.attention import sequences
from fused_ops.attention_inputs import batch, blocks_of, filled
from fused_ops.mla import _mla_attention, absorbs
from quant.key import FP8

BACKENDS = sorted(set(fused_ops.OPS["mla_attention"].backends) & {"cpu", "reference"})
needs_kernels = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels on this machine")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(4, 32, 16, 64, 32), (2, 128, 64, 512, 128), (3, 20, 6, 43, 12), (70, 8, 8, 16, 8)]
MIXED = ((5, 5), (1, 300), (0, 9), (70, 530), (1, 1), (2, 257))  # (queries, tokens)


def inputs(lengths=MIXED, sizes=SIZES[0], dtype=torch.bfloat16, held=None, block_size=16):
    """The arguments of mla_attention by name."""
    heads, nope, rope, rank, v = sizes
    q = torch.randn(sum(queries for queries, _ in lengths), heads, nope + rope).to(dtype)
    kv_b = (torch.randn(heads, nope + v, rank) * rank**-0.5).to(dtype)
    cache, scale = filled((blocks_of(lengths, block_size), block_size, rank + rope), held or dtype, "cpu")
    tables, seq_lens, starts = batch(lengths, block_size, "cpu")
    return {
        "q_nope": q[..., :nope], "q_pe": q[..., nope:], "kv_cache": cache,
        "w_uk": kv_b[:, :nope], "w_uv": kv_b[:, nope:],
        "block_tables": tables, "seq_lens": seq_lens, "query_start_loc": starts,
        "scale": (nope + rope) ** -0.5, "kv_scale": scale,
    }  # fmt: skip


def by_torch(call, dtype):
    """Keys and values projected, and torch's own attention, in `dtype`."""
    heads, found = call["q_nope"].shape[1], []
    rank, cache = call["w_uk"].shape[-1], call["kv_cache"].unsqueeze(2)
    tables = (call["block_tables"], call["seq_lens"], call["query_start_loc"])
    for rows, slots in sequences(call["q_nope"].shape[0], cache, *tables):
        c = call["kv_cache"].flatten(0, 1)[slots].double()
        c = (c if call["kv_scale"] is None else c * call["kv_scale"].double()).to(dtype)
        latent, k_pe = c[:, :rank], c[:, rank:].unsqueeze(0).expand(heads, -1, -1)
        k, v = (torch.einsum("kr,hdr->hkd", latent, call[w].to(dtype)) for w in ("w_uk", "w_uv"))
        q = torch.cat([call["q_nope"][rows], call["q_pe"][rows]], -1).to(dtype).transpose(0, 1)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        k = torch.cat([k, k_pe], -1)
        y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=call["scale"])
        found.append(y[0].transpose(0, 1))
    return torch.cat(found).flatten(1)


@pytest.mark.parametrize("held", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@needs_kernels
def test_it_is_as_exact_as_torch(sizes, dtype, held):
    call = inputs(MIXED, sizes, dtype, held)
    absorbed = [absorbs(queries, length, *(sizes[i] for i in (3, 1, 2, 4))) for queries, length in MIXED if queries]
    assert any(absorbed)
    assert not all(absorbed)
    assert_attention(mla_attention(**call), by_torch(call, torch.float64), by_torch(call, torch.float32), str(sizes))


@pytest.mark.parametrize("held", [None, FP8], ids=str)
@needs_kernels
def test_the_kernels_absorb_where_absorbs_says_so(held):
    """Both ways of a sequence differ in their last bits: a row is that of one of the two."""
    sizes = SIZES[0]
    for queries in 1, 3, 7, 8, 9, 10, 12, 20, 40:
        length = 60
        call = inputs(((queries, length),), sizes, torch.float32, held)
        y = mla_attention(**call)
        _heads, nope, rope, rank, v = sizes
        same = []
        for count in range(1, queries + 1):  # the last tokens, in fewer queries
            some = {name: call[name][-count:] for name in ("q_nope", "q_pe")}
            fewer = mla_attention(**{**call, **some, "query_start_loc": torch.tensor([0, count])})
            same.append(torch.equal(fewer[-1], y[-1]))
        way = [absorbs(count, length, rank, nope, rope, v) for count in range(1, queries + 1)]
        assert same == [w == way[-1] for w in way]


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
@needs_kernels
def test_batches_blocks_and_threads_change_no_bit(sizes):
    call = inputs(MIXED, sizes)
    expected = mla_attention(**call)
    for i, (start, end) in enumerate(zip(call["query_start_loc"], call["query_start_loc"][1:], strict=False)):
        one = {
            **call, "q_nope": call["q_nope"][start:end], "q_pe": call["q_pe"][start:end],
            "block_tables": call["block_tables"][i : i + 1], "seq_lens": call["seq_lens"][i : i + 1],
            "query_start_loc": torch.tensor([0, int(end - start)]),
        }  # fmt: skip
        assert_same(mla_attention(**one), expected[start:end], str(i))
    order = torch.randperm(call["kv_cache"].shape[0])
    moved = call["kv_cache"][order]
    tables = torch.where(call["block_tables"] < 0, 99999, order.argsort()[call["block_tables"].clamp_min(0).long()])
    assert_same(mla_attention(**{**call, "kv_cache": moved, "block_tables": tables}), expected)
    before = torch.get_num_threads()
    try:
        for threads in 1, 3, 8:
            torch.set_num_threads(threads)
            assert_same(mla_attention(**call), expected, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_slices_of_queries_change_no_bit():
    """Queries of a sequence are worked on some at a time, where they are many: by themselves, too."""
    lengths = ((2600, 2600),)
    for sizes, absorbed in ((2, 20, 4, 512, 500), False), ((32, 500, 12, 32, 12), True):
        _heads, nope, rope, rank, v = sizes
        assert absorbs(*lengths[0], rank, nope, rope, v) == absorbed == absorbs(2500, 2600, rank, nope, rope, v)
        before = torch.get_num_threads()
        call = inputs(lengths, sizes)
        try:
            torch.set_num_threads(64)  # which have little memory each
            y = mla_attention(**call)
        finally:
            torch.set_num_threads(before)
        some = {name: call[name][-2500:] for name in ("q_nope", "q_pe")}
        assert_same(mla_attention(**{**call, **some, "query_start_loc": torch.tensor([0, 2500])}), y[-2500:])


@needs_kernels
def test_a_long_sequence_takes_little_memory():
    """Its queries in the latents' space would be 32 MiB."""
    script = """
import torch
from test_mla_attention import inputs
from fused_ops import mla_attention
def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
call = inputs(((512, 1024),), (32, 1000, 12, 500, 24))
mla_attention(**{**call, "q_nope": call["q_nope"][-1:], "q_pe": call["q_pe"][-1:],
                 "query_start_loc": torch.tensor([0, 1])})
held = torch.ones(peak() << 18)  # what was freed is in use again
before = peak()
mla_attention(**call)
assert peak() < before + 26, (before, peak())
"""
    run_alone(script)


@pytest.mark.parametrize("held", [None, FP8], ids=str)
@needs_kernels
def test_nothing_is_hidden_and_nothing_unseen_is_met(held):
    nan = 0x7F if held else int(torch.tensor(math.nan).bfloat16().view(torch.int16))
    for queries, length in (2, 300), (280, 280):
        call = inputs(((queries, length),), held=held)
        clean = mla_attention(**call)
        place = length - 2
        bits = raw(call["kv_cache"]).clone()
        bits[int(call["block_tables"][0, (length - 1) // 16]), (length - 1) % 16 + 1 :] = nan  # behind the last token
        for column in 3, 70:  # of the latent, of the rotated key
            changed = bits.clone()
            changed[int(call["block_tables"][0, (place + 1) // 16]), (place + 1) % 16, column] = nan
            y = mla_attention(**{**call, "kv_cache": changed.view(call["kv_cache"].dtype)})
            assert y[-1].isnan().all()
            assert_same(y[:-1], clean[:-1])


@pytest.mark.parametrize("sizes", [(4, 32, 16, 64, 32), (3, 16, 8, 32, 128)], ids=str)
@EVERY_KEY_BY_ROW
@every_backend
def test_codes_are_those_of_the_unfused_result(backend, key, sizes):
    call = inputs(((3, 3), (1, 40)), sizes)
    for name in "q_nope", "q_pe":
        call[name] = torch.cat([call[name], call[name][:2]])  # two of no sequence
    given = given_tensors(key)
    with fused_ops.use_backend(backend):
        y = mla_attention(**call)
        assert not y[4:].any()
        assert y[:4].any()
        for each in layouts(key):
            expected = quantize(y, each, **given)
            fused = mla_attention(**call, output_quant_key=each, **{f"output_{n}": value for n, value in given.items()})
            for name in "data", "scale", "zero_point":
                assert_same(getattr(fused, name), getattr(expected, name), f"{each} {name}")


BAD = [
    ({"q_pe": torch.zeros(79, 4, 16)}, TypeError, "q_pe is torch.float32"),
    ({"w_uv": torch.zeros(4, 32, 65).bfloat16()}, ValueError, "w_uv is"),
    ({"kv_cache": torch.zeros(99, 16, 81).bfloat16()}, ValueError, "kv_cache is"),
    ({"kv_scale": torch.ones(1)}, ValueError, "kv_scale is given"),
    ({"scale": math.nan}, ValueError, "scale is nan"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 1])}, ValueError, "seq_lens has 1 at 5"),
    ({"query_start_loc": torch.tensor([0, 5, 6, 6, 76, 77, 80])}, ValueError, "goes from 77 to 80 at 5"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), BAD, ids=[next(iter(w)) for w, *_ in BAD])
@every_backend
def test_errors_name_the_argument(backend, wrong, error, says):
    with fused_ops.use_backend(backend), pytest.raises(error, match=says):
        mla_attention(**{**inputs(), **wrong})


def test_the_reference_is_attention_over_projected_keys():
    call = inputs(MIXED, SIZES[2], torch.float32)
    y = _mla_attention.reference(*call.values())
    assert (y.double() - by_torch(call, torch.float64)).abs().max() < 1e-5
