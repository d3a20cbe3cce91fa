"""The CUDA backend's kernels, executed on the host: see tests/host_cuda."""

import host_cuda
import pytest
import torch
from compare import assert_close, assert_same
from test_ops import ALL, BITWISE, cases, outputs_for, results, terms_of, tokens_of

import fused_ops
from fused_ops._op import OPS, describe
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP8,
    NVFP4,
    ScaleLayout,
)

ROW_OPS = [p for p in ALL if p.id not in ("rope", "scaled_linear")]
PER_OP = 6  # kernels to compile take a third of a second each


def some(op) -> list[tuple]:
    every = cases(op)
    return every[:: max(1, len(every) // PER_OP)]


@pytest.mark.parametrize("op", ROW_OPS)
def test_results_are_the_cpus(op):
    """Promise 4: what rounds nothing in another order is bitwise the same, sums differ by a step."""
    for args in some(op):
        expected = results(op, args)
        with host_cuda.on_host():
            actual = results(op, args)
        for name in outputs_for(op, args):
            a, e, context = actual[name], expected[name], f"{op.name} {name} {describe(args)}"
            if op.name in BITWISE or "norm" not in op.name:
                assert_same(a, e, context)
            elif "_quant" not in op.name and op.name != "dual_rms_norm":  # what they quantize differs by a step
                assert_close(a, e, context, roundings=2, terms=terms_of(op, args))


@pytest.mark.parametrize("op", [p for p in ROW_OPS if p.id.endswith("_quant")])
def test_fused_is_unfused(op):
    """Promise 1."""
    plain, quantize = OPS[op.name.removesuffix("_quant")], OPS["quantize"]
    for args in some(op):
        n = plain.required
        if tokens_of(op, args) is not None:
            continue
        with host_cuda.on_host():
            fused = results(op, args)
            y = results(plain, (*args[:n], *args[n + 3 :]))
            first, *others = y.values()
            expected = results(quantize, (first, *args[n : n + 3]))
        expected |= {"unquantized": first, **dict(zip(op.outputs[2:-2], others, strict=True))}
        for name, value in expected.items():
            assert_same(fused[name], value, f"{op.name} {name} {describe(args)}")


KEYS = [
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_TENSOR,
    INT8_DYNAMIC_TOKEN_ASYM,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 96)),
    FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 1024)),
    FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True, layout=ScaleLayout.PACKED_UE8M0),
    MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
    NVFP4.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
]


@pytest.mark.parametrize("cols", [32, 576, 5120, 16384, 65536])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_quantize_at_every_row_length(key, cols):
    x = torch.randn(3, cols).bfloat16() * torch.tensor([[1.0], [0.0], [300.0]]).bfloat16()
    x[2, cols // 2] = float("nan")
    options = {"scale2": torch.tensor([0.01])} if key.scale2 else {}
    expected = fused_ops.quantize(x, key, **options)
    with host_cuda.on_host():
        actual = fused_ops.quantize(x, key, **options)
    for name in "data", "scale", "zero_point":
        assert_same(getattr(actual, name), getattr(expected, name), name)


@pytest.mark.parametrize("cols", [1, 31, 577, 4097])
def test_rows_that_no_pack_divides(cols):
    x, r, w = torch.randn(5, cols), torch.randn(5, cols), torch.randn(cols)
    expected = fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True)
    with host_cuda.on_host():
        actual = fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True)
        again = fused_ops.quantize(actual[0].unquantized, INT8_DYNAMIC_TOKEN)
    assert_same(actual[1], expected[1])
    assert_close(actual[0].unquantized, expected[0].unquantized)
    assert_same(actual[0].data, again.data)
    assert_same(actual[0].scale, again.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_row_depends_on_nothing_but_itself(dtype):
    """Promise 2: alone, in a batch, at an odd address, with gaps between rows."""
    cols = 576
    x, w = torch.randn(9, cols).to(dtype), torch.randn(cols)
    shifted = torch.empty(9 * (cols + 3) + 1, dtype=dtype)[1:].view(9, cols + 3)[:, :cols]
    shifted.copy_(x)
    with host_cuda.on_host():
        whole = fused_ops.rms_norm(x, w, 1e-6)
        for i in 0, 4, 8:
            assert_same(fused_ops.rms_norm(x[i : i + 1], w, 1e-6), whole[i : i + 1])
        assert_same(fused_ops.rms_norm(shifted, w, 1e-6), whole)


def test_rows_too_long_for_a_block_are_refused():
    x = torch.zeros(1, 65536 + 8, dtype=torch.bfloat16)
    with host_cuda.on_host(), pytest.raises(ValueError, match="the cuda backend serves rows of up to 65536 columns"):
        fused_ops.relu2(x)
