"""The Triton kernels of attention: in Triton's interpreter, or with FUSED_OPS_TEST_DEVICE=cuda on a GPU."""

import pairwise
import pytest
import torch
from compare import assert_attends, assert_same
from keys import EVERY_KEY_BY_ROW, layouts
from promises import on_device
from test_ops import as_tuple, cases, fresh, functional, spread
from torch import Tensor
from triton_attention import BOTH, MLA, PAGED, SEGMENT, arguments, by_triton, launches, place, quantized
from triton_attention import segments as segments

import fused_ops
from fused_ops import OPS
from fused_ops._op import describe
from fused_ops.attention import sequences
from quant import FP8_DYNAMIC_GROUP_64, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, ScaleLayout
from quant.key import FP8, FP8_FNUZ

LONG = ((1, SEGMENT + 28), (0, 0), (2, 30))  # decoding, over several segments


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
    for args in some[:: max(1, len(some) // (len(some) if pairwise.everything else 8))]:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [40, SEGMENT + 60])
def test_values_near_the_end_of_float32_have_a_mean(dtype, length):
    """Their sum is beyond it. What lies in other columns is as it is without them."""
    args = arguments(PAGED, ((2, length),), dtype)
    clean = by_triton(PAGED, args).view(2, 4, 32)
    v = args[2]
    v[..., 3], v[..., 5], v[..., 7] = 3e38, -3e38, 3e38 * torch.ones_like(v[..., 7]).bernoulli().mul(2).sub(1)
    actual = by_triton(PAGED, args)
    assert actual.isfinite().all()
    assert_attends(actual, *exact(PAGED, args))
    columns = [column for column in range(32) if column not in (3, 5, 7)]
    assert_same(actual.view(2, 4, 32)[..., columns], clean[..., columns])


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 3e38), ("scale", -3e38), ("soft_cap", 3e38), ("soft_cap", 1e-37)]
)
def test_logits_and_scales_near_the_end_of_float32(name, value):
    """Products of numbers alone are beyond it where a logit isn't, and a logit times log2(e) may be."""
    small = 2.0**-61 if name == "scale" else 1.0  # of queries and keys
    args = list(arguments(PAGED, ((2, 40), (1, SEGMENT + 60)), torch.float32, **{name: value}))
    args[0], args[1] = args[0] * small, args[1] * small
    assert_attends(by_triton(PAGED, args), *exact(PAGED, args))


def test_the_largest_logits_have_all_weight():
    """From -3.4e38 to 3.4e38; equal ones share it."""
    args = list(arguments(PAGED, ((1, SEGMENT + 60),), torch.float32, scale=1.0))
    args[0], args[1] = torch.zeros_like(args[0]), torch.full_like(args[1], -2.0)
    args[0][..., 0] = 1.7e38
    for key in 3, 20, SEGMENT + 5:
        block, slot = place(PAGED, args, 0, key)
        args[1][block, slot] = 2.0
    assert_attends(by_triton(PAGED, args), *exact(PAGED, args))


# --- promise 1 ---


@EVERY_KEY_BY_ROW
@BOTH
def test_fused_is_unfused(op, key):
    """By the epilogue of either kernel, and where a scale is shared by heads."""
    short, long = ((1, 20), (3, 17)), ((2, SEGMENT + 8),)
    for i, each in enumerate(layouts(key)[: None if op is PAGED or pairwise.everything else 1]):
        swizzled = each.scale.layout is ScaleLayout.SWIZZLED_128X4  # of which 128 rows are written
        calls = [(short, {}) if op is MLA or swizzled else (short, {"v_cols": 128})]
        if op is PAGED and i == 0 and not launches.quantized_apart(launches.Results(each.code), 128, 4):
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
