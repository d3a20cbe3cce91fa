"""Attention over a paged cache: its values, that nothing is hidden, its quantized outputs and its errors."""

import math

import pytest
import torch
from attention_calls import CODES, DTYPES, MIXED, by_torch, every_backend, inputs, needs_kernels
from compare import assert_attention, assert_attention_close, assert_same, raw
from keys import EVERY_KEY_BY_ROW, given_tensors, layouts

import fused_ops
from fused_ops import paged_attention, quantize
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, MXFP8
from quant.key import FP8, FP8_FNUZ


def close(call):
    """Whether the call is as good as torch's in float32, rounded once."""
    actual = paged_attention(**call)
    assert_attention(actual, by_torch(call, torch.float64), by_torch(call, torch.float32), str(actual.dtype))
    return actual


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_values_near_the_dtypes_end_do_not_overflow(backend, dtype):
    """No sum is larger than the largest value, but for rounding, to which float32's own last values leave no room."""
    largest = torch.finfo(dtype).max * (1 - (2**-16 if dtype == torch.float32 else 0))
    for lengths in ((3, 700), (300, 300)), ((1, 5000),):  # the last one's blocks are spread over threads
        call = inputs(lengths, kv_heads=1, dtype=dtype)
        call["v_cache"][:] = largest * torch.tensor([1, -1]).repeat(32).to(dtype)
        expected = (largest * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(128)).expand(call["q"].shape[0], -1)
        with fused_ops.use_backend(backend):
            assert_attention_close(paged_attention(**call), expected.to(dtype))
            halves = paged_attention(**{**call, "q": call["q"] * 0, "sinks": torch.tensor([math.log(5000.0)] * 4)})
        assert halves.isfinite().all()


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

CACHE = inputs()["k_cache"]
NARROW = {"v_cache": CACHE[..., :33]}
BAD = [
    ({"q": torch.zeros(3, 4, 64)}, TypeError, "k_cache is torch.bfloat16"),
    ({"q": torch.zeros(80, 4, 65).bfloat16()}, ValueError, "k_cache is"),
    ({"q": torch.zeros(80, 3, 64).bfloat16()}, ValueError, "q has 3 heads, expected a multiple of k_cache's 2"),
    ({"q": None}, TypeError, r"q is None, expected a Tensor \[T, heads, D\]"),
    ({"q": torch.zeros(79, 0, 64).bfloat16()}, ValueError, r"q is \[79, 0, 64\], expected at least one head"),
    ({"k_cache": CACHE[:, :, :0], "v_cache": CACHE[:, :, :0]}, ValueError, "k_cache is .* expected at least one head"),
    ({"v_cache": CACHE[..., :0]}, ValueError, "v_cache is .* expected at least one head and column"),
    ({"k_cache": CACHE.flatten(2)}, ValueError, r"\[blocks, block_size, kv_heads, 64\], a permuted view"),
    ({"k_cache": CACHE.transpose(1, 2), "v_cache": CACHE.transpose(1, 2)}, ValueError, "multiple of .* permuted view"),
    ({"k_cache": CACHE[:0], "v_cache": CACHE[:0]}, ValueError, r"at \[0, 0\], expected none"),
    ({"k_cache": CACHE.to(FP8), "v_cache": CACHE.to(FP8)}, TypeError, r"k_scale is None, .* \[1\] or \[2\]"),
    ({"block_tables": torch.zeros(6, 0).int()}, ValueError, "seq_lens has 5 at 0, expected at most .* 0 columns x 16"),
    ({"output_quant_key": MXFP8, **NARROW}, ValueError, "the result has 132 columns, MXFP8 expects a multiple of 32"),
    ({"scale": math.inf}, ValueError, "scale is inf"),
    ({"scale": "1"}, (TypeError, ValueError), "scale"),
    ({"soft_cap": -1.0}, ValueError, "soft_cap is -1.0"),
    ({"soft_cap": 0.0}, ValueError, "soft_cap is 0.0"),
    ({"sliding_window": 0}, ValueError, "sliding_window is 0"),
    ({"sliding_window": 3, "causal": False}, ValueError, "sliding_window is 3 with causal=False"),
    ({"sliding_window": -1}, ValueError, "sliding_window is -1, expected at least 1, or None"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks is"),
    ({"k_scale": torch.ones(1)}, ValueError, "k_scale is given"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 1])}, ValueError, "has 1 at 5, expected at least its 2 queries"),
    ({"seq_lens": torch.tensor([5, 300, 9, 530, 1, 10**6])}, ValueError, "has 1000000 at 5, .* 35 columns x 16 tokens"),
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
        with fused_ops.use_backend(backend), pytest.raises(ValueError, match=rf"has {block} at \[3, 33\]"):
            paged_attention(**{**call, "block_tables": tables}, out=out)
        assert (out == 7).all()


@needs_kernels
def test_a_kernel_alone_says_what_it_got():
    """As in a compiled graph, where nobody looks at the arguments again."""
    call = inputs(((3, 3), (1, 40)))
    wrong = {
        "block_tables": (torch.tensor([[0, 0, 0], [1, 99, 2]]), r"has 99 at \[1, 1\], expected a block of"),
        "seq_lens": (torch.tensor([3, 99]), "has 99 at 1, .* at least the 1 queries, and no more than 4 blocks of 16"),
        "query_start_loc": (torch.tensor([0, 3, 5]), "goes from 3 to 5 at 1, expected no less, up to 4"),
    }
    for name, (tensor, says) in wrong.items():
        first = list({**call, name: tensor}.values())[:7]  # up to the scale
        with pytest.raises(RuntimeError, match=f"{name}: {says}"):
            fused_ops.OPS["paged_attention"].call(*first, True, 0, 0.0, None, None, None)


@every_backend
def test_outputs_lie_over_no_input(backend):
    call = inputs()
    for name, tensor in ("q", call["q"].flatten(1)), ("k_cache", call["k_cache"].flatten()[: 79 * 256].view(79, 256)):
        before = raw(call[name]).clone()
        with fused_ops.use_backend(backend), pytest.raises(ValueError, match=r"out:? overlaps another argument"):
            paged_attention(**call, out=tensor)
        assert torch.equal(raw(call[name]), before)
