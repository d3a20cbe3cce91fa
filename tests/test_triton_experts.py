"""Experts in Triton: the order of rows, products with an expert's weight, and sums, of numbers that may be anything."""

import re
from dataclasses import replace

import pairwise
import pytest
import torch
from compare import assert_same
from linear_operands import KEYS, WEIGHTS, activation, changed, check_close, decoded_activation, multiple
from promises import DEVICE, on_device
from test_experts import quantized, routed
from test_grouped_linear import grouped, stacked
from test_triton_attention_compile import SHARED, compiled
from test_triton_heads import without_checks

import fused_ops
from fused_ops import OPS, linear_products
from fused_ops.linear import block_key, exact_values, usual_weight
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN, NVFP4

pytest.importorskip("triton", reason="Triton is not installed")

COUNTS = (0, 70, 1)  # rows of no tile, of more than one, and of one
INT64 = torch.iinfo(torch.int64)


def by_triton(x, w, counts, bias=None, rows=None, **options):
    counts, bias, rows, *w = map(on_device, (counts, bias, rows, *w))
    with fused_ops.use_backend("triton"):
        return grouped(x.to(counts.device), w, counts, bias, rows=rows, **options).cpu()


@pytest.mark.parametrize("number", range(len(KEYS)), ids=lambda n: str(KEYS[n]))
def test_products_of_every_key(number):
    """Against float64; int8 without groups has the CPU's bits. Each key meets some weights, each weight some keys."""
    key = KEYS[number]
    some = WEIGHTS if pairwise.everything else [WEIGHTS[5 * number % len(WEIGHTS)]]
    for w_key in dict.fromkeys((*some, usual_weight(key))):
        cols = 160 + -160 % multiple(key, w_key)
        x, (alone, w) = activation(12, cols, key), stacked(len(COUNTS), 35, cols, w_key)
        index, counts = torch.randint(12, (sum(COUNTS),)), torch.tensor(COUNTS)
        y = by_triton(x, w, counts, rows=index)
        for part, values, each in zip(y.split(COUNTS), decoded_activation(x)[index].split(COUNTS), alone, strict=True):
            check_close(part, values, exact_values(*each), cols, str(w_key))
        if w_key.scale.group_shape.cols == key.scale.group_shape.cols == -1 and key.dtype == w_key.dtype == torch.int8:
            assert_same(y, grouped(x, w, counts, rows=index), str(w_key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_of_int8_are_the_cpus_with_a_bias_in_any_memory(dtype):
    key, w_key = INT8_DYNAMIC_TOKEN, block_key(torch.int8, 1, -1)
    x, (_, w) = activation(6, 300, key), stacked(2, 150, 300, w_key)
    bias, counts = torch.randn(2, 150), torch.tensor([4, 3], dtype=torch.int32)
    index = torch.tensor([5, 0, 0, 3, 1, 2, 4])
    expected = grouped(x, w, counts, bias, dtype, rows=index)
    assert_same(by_triton(x, w, counts, bias, index, dtype=dtype), expected)
    wide = torch.stack([x.data, x.data], 1).unflatten(0, (2, 3))[:, :, 0]  # [2, 3, K], whose rows lie apart
    spread = [torch.stack([part, part], 1)[:, 0] for part in w[:2]]
    assert_same(by_triton(changed(x, data=wide), (*spread, w_key, None), counts, bias, index, dtype=dtype), expected)


def test_sums_of_int8_have_room_for_the_largest_codes_of_the_longest_rows():
    key, w_key, counts = replace(INT8_DYNAMIC_TOKEN, symmetric=False), block_key(torch.int8, 1, -1), torch.tensor([1])
    x, zero_point = activation(1, 65536, key), torch.tensor([[127]], dtype=torch.int32)
    x = changed(x, data=torch.full_like(x.data, -128), zero_point=zero_point)
    w = torch.full((1, 2, 65536), -128, dtype=torch.int8), torch.ones(1, 2, 1), w_key, None
    assert_same(by_triton(x, w, counts), grouped(x, w, counts))
    x = changed(x, data=torch.nn.functional.pad(x.data, (0, 1)))
    w = torch.nn.functional.pad(w[0], (0, 1)), *w[1:]
    with pytest.raises(ValueError, match="int8 times int8 in rows of up to 65536"):
        by_triton(x, w, counts)


def test_what_a_grid_or_an_int32_does_not_count_is_refused():
    """Without memory for it, but for a weight of one column, which is refused by name."""
    outs, int32 = 128 * 65535, {"dtype": torch.int32, "device": "meta"}
    sort, total, product = (
        OPS[name].backends["triton"].supports for name in ("sort_by_expert", "sum_experts", "grouped_scaled_linear")
    )
    x, w_key = activation(1, 1, INT8_DYNAMIC_TOKEN), block_key(torch.int8, 1, -1)
    for more in 0, 1:
        assert sort(torch.empty(2**31 - 1024 + more, 1, **int32), 4) != more
        y, positions = torch.empty(1, outs + more, device="meta"), torch.empty(1, 1, **int32)
        assert total(y, positions, torch.empty(1, 1, device="meta")) != more
        weight, scale = torch.empty(1, outs + more, 1, dtype=torch.int8), torch.ones(1).expand(1, outs + more, 1)
        args = x.data, x.scale, x.quant_key.code, weight, scale, torch.tensor([1]), None, None, torch.float32
        assert product(*args) != more
    with pytest.raises(ValueError, match="results of up to 8388480 columns"):
        by_triton(x, (weight, scale.contiguous(), w_key, None), torch.tensor([1]))


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, NVFP4], ids=str)
def test_a_row_does_not_depend_on_the_others_and_what_lies_beyond_is_left(key):
    counts, bias, out = torch.tensor([3, 0, 7, 1]), torch.randn(4, 35), on_device(torch.full((4, 7, 35), -7.0))
    x, (_, w) = activation(28, 320, key), stacked(4, 35, 320, usual_weight(key))
    used = torch.arange(7) < counts[:, None]
    x.data.view(torch.uint8)[~used.flatten()] = 0xFF  # NaN in FP8
    apart, index = changed(x, data=x.data.unflatten(0, (4, 7))), torch.arange(28).unflatten(0, (4, 7))[used]
    by_triton(apart, w, counts, bias, out=out)
    assert (out.cpu()[~used] == -7).all()
    whole = by_triton(x, w, counts, bias, index)
    assert_same(out.cpu()[used], whole)
    for row, expert in (0, 0), (9, 2), (10, 3):
        alone = torch.zeros(4, dtype=torch.int64).index_fill(0, torch.tensor([expert]), 1)
        assert_same(by_triton(x, w, alone, bias, index[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_over_experts_are_the_cpus(dtype):
    """Products are rounded to the weights' dtype; rows may lie apart and be wider than a program's columns."""
    y, positions = torch.randn(24, 1100).to(dtype)[:, 3:1092], torch.randperm(24).view(3, 8)
    for weights in torch.rand(3, 9)[:, 1:], torch.rand(3, 8).to(dtype):
        expected = fused_ops.sum_experts(y, positions, weights)
        with fused_ops.use_backend("triton"):
            assert_same(fused_ops.sum_experts(*map(on_device, (y, positions, weights))).cpu(), expected)


@pytest.mark.parametrize("name", OPS["sort_by_expert"].outputs)
def test_each_result_of_the_sort_may_be_asked_for_alone(name):
    op, index = OPS["sort_by_expert"], torch.randint(5, (9, 3))
    expected = dict(zip(op.outputs, fused_ops.sort_by_expert(index, 5), strict=True))[name]
    out = on_device(torch.full_like(expected, -7))
    with fused_ops.use_backend("triton"):
        op.out(on_device(index), 5, **{f"{name}_out": out})
    assert_same(out.cpu(), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's activation between the products has other bits there")
def test_a_layer_of_int8_experts_is_the_cpus(monkeypatch):
    layer, x = quantized("Qwen3Moe", "int8_token"), torch.randn(30, 64).bfloat16()
    index, weights = routed(30, torch.bfloat16, 3)
    expected = layer(x, index, weights)
    monkeypatch.setattr(linear_products, "architecture", lambda device: "gfx942")  # whatever its products are
    layer = quantized("Qwen3Moe", "int8_token")
    with fused_ops.use_backend("triton"):
        assert_same(layer(x, index, weights), expected)


# --- numbers that no one has checked ---


def test_an_expert_that_is_not_there_has_no_rows_and_its_tokens_are_nan():
    index = torch.tensor([[2, -1], [5, 0], [INT64.max, INT64.min], [0, 2]])
    found = without_checks(OPS["sort_by_expert"], (index, 5))
    assert found["tokens_per_expert"].tolist() == [2, 0, 2, 0, 0]
    assert found["rows"].tolist() == [1, 3, 0, 3, 0, 1, 2, 2]  # then those of no expert
    assert found["positions"].tolist() == [[2, -1], [-1, 0], [-1, -1], [1, 3]]
    y = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    positions = torch.cat([found["positions"].long(), torch.tensor([[8, 0], [INT64.max, 0], [INT64.min, 0]])])
    summed = without_checks(OPS["sum_experts"], (y, positions, torch.ones(7, 2)))["sum"]
    assert summed[3].tolist() == [4.0] * 3
    assert summed[[0, 1, 2, 4, 5, 6]].isnan().all()


def test_rows_of_numbers_that_cannot_be_are_nan():
    x, (_, w) = activation(6, 64, INT8_DYNAMIC_TOKEN), stacked(3, 8, 64, usual_weight(INT8_DYNAMIC_TOKEN))

    def run(counts, rows=None, data=x.data):
        shape = data.shape[:-1] if rows is None else rows.shape
        out = torch.full((*shape, 8), -7.0)
        args = (data, x.scale, x.quant_key.code, *w[:2], torch.tensor(counts), rows, None, torch.float32)
        OPS["grouped_scaled_linear"].backends["triton"].run(tuple(map(on_device, args)), {"y": (out := on_device(out))})
        return out.cpu()

    right = run([2, 1, 3])
    index = torch.tensor([0, 6, -1, INT64.max, 4, 5])
    found = run([2, 1, 3], index)
    assert found[1:4].isnan().all()
    assert_same(found[[0, 4, 5]], right[[0, 4, 5]])
    for counts in [2, 1, 4], [2, 1, INT64.max]:  # the last has more than there are
        found = run(counts)
        assert found[3:].isnan().all()
        assert_same(found[:3], right[:3])
    assert_same(run([2, INT64.min, 1])[:2], right[:2])
    assert (run([2, -1, 1])[3:] == -7).all()
    assert run([INT64.max, INT64.max, 1]).isnan().all()
    apart = run([1, 3, -1], data=x.data.unflatten(0, (3, 2)))
    assert_same(apart[0, :1], right[:1])
    assert apart[1].isnan().all()
    assert (apart[2] == -7).all()
    assert (apart[0, 1] == -7).all()


# --- what is compiled ---

MET = "FP8_DYNAMIC_GROUP_128", "NVFP4", "INT8_DYNAMIC_TOKEN"
CALLS = [f"grouped_scaled_linear:{key}:2048:bfloat16" for key in MET]
COMPILED = [(arch, call) for arch in SHARED for call in (*CALLS, "sort_by_expert::2048:bfloat16")]
COMPILED = COMPILED if pairwise.everything else [("sm_80", CALLS[0]), ("gfx942", CALLS[1])]


@pytest.mark.parametrize(("arch", "call"), COMPILED)
def test_kernels_of_real_sizes_fit_their_targets(arch, call, tmp_path):
    for kernel in compiled(arch, call, tmp_path):
        asm = kernel["asm"]
        assert kernel["shared"] <= SHARED[arch] << 10
        if kernel["name"] == "grouped_kernel":
            assert re.search(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", asm)
        assert not re.search(r"\b(atom|red)\.|atomic", asm), "an order that isn't fixed"
        assert not re.search(r"div\.(full|approx)|fma\.rn\.f32", asm), "IEEE, and nothing contracted"
        assert ".local" not in asm
