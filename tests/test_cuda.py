"""The CUDA backend: its kernels on the host (tests/host_cuda), or with FUSED_OPS_TEST_DEVICE=cuda on a GPU."""

import itertools
from contextlib import contextmanager

import host_cuda
import promises
import pytest
import torch
from compare import assert_close, assert_same
from keys import EVERY_SERVED_KEY_AND_SOME_ACTIVATION
from promises import DEVICE, on_device
from test_ops import ALL, ATTENTION, COLLECTIVES, HEADS, cases, results

import fused_ops
from fused_ops import OPS, _cuda
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    ScaleLayout,
)

ELSEWHERE = (*HEADS, *ATTENTION, *COLLECTIVES, "scaled_linear")  # which have files of their own
ROW_OPS = [p for p in ALL if p.id not in ELSEWHERE]
PER_OP = 6 if DEVICE == "cpu" else 60  # kernels to compile take a third of a second each


LONG = 65536 + 32  # columns of 16 bits that no block's registers hold


def some(op) -> list[tuple]:
    every = cases(op)
    return every[:: max(1, len(every) // PER_OP)]


@contextmanager
def by_cuda():
    """On a GPU, or on the host."""
    with host_cuda.on_host() if DEVICE == "cpu" else fused_ops.use_backend("cuda"):
        yield


def run(op, args) -> dict[str, torch.Tensor]:
    with by_cuda():
        return {name: out.cpu() for name, out in results(op, tuple(map(on_device, args))).items()}


@pytest.mark.parametrize("op", ROW_OPS)
def test_results_are_the_cpus(op):
    promises.results_are_the_cpus(run, op, some(op))


@pytest.mark.parametrize("op", [p for p in ROW_OPS if p.id.endswith("_quant")])
def test_fused_is_unfused(op):
    promises.fused_is_unfused(run, op, some(op))


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


@pytest.mark.parametrize("cols", [32, 160, 576, 5120, 16384, 65536, LONG])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_quantize_at_every_row_length(key, cols):
    x = torch.randn(3, cols).bfloat16() * torch.tensor([[1.0], [0.0], [300.0]]).bfloat16()
    x[2, cols // 2] = float("nan")
    options = {"scale2": torch.tensor([0.01])} if key.scale2 else {}
    expected = fused_ops.quantize(x, key, **options)
    with by_cuda():
        actual = fused_ops.quantize(on_device(x), key, **{k: on_device(v) for k, v in options.items()}).to("cpu")
    for name in "data", "scale", "zero_point":
        assert_same(getattr(actual, name), getattr(expected, name), name)


def around(values: list[float]) -> torch.Tensor:
    """These, and their neighbours in float32, of both signs."""
    bits = torch.tensor(values).view(torch.int32)
    x = torch.cat([bits - 1, bits, bits + 1]).clamp_min(0).view(torch.float32)
    return torch.cat([x, -x])


@pytest.mark.parametrize("key", [MXFP4, NVFP4], ids=str)
def test_fp4_by_the_hardware_is_the_same(key, monkeypatch):
    """On the host by what PTX says of the instruction. Of 992 columns, which nobody else asks for."""
    monkeypatch.setattr(_cuda, "HARDWARE_FP4", True)
    ties = around([0, 2**-149, 2**-126, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])
    groups = torch.cat([ties, torch.randn(31 * 31 - len(ties)) * 2]).clamp(-6, 6).view(31, 31)
    one = torch.cat([groups, torch.full((31, 1), 6.0)], dim=1).view(1, 992)  # the scale of each is one
    beyond = one * torch.tensor([[2.0**40], [1e-38]])  # what NVFP4's scales can't follow
    x = torch.cat([one, beyond, torch.randn(3, 992), torch.zeros(1, 992)])
    x[4, 5], x[4, 400], x[5, 900] = float("nan"), float("inf"), -float("inf")
    options = {"scale2": torch.tensor([1 / 448])} if key.scale2 else {}
    with by_cuda():
        actual = fused_ops.quantize(on_device(x), key, **{k: on_device(v) for k, v in options.items()}).to("cpu")
    expected = fused_ops.quantize(x, key, **options)
    assert_same(actual.data, expected.data)
    assert_same(actual.scale, expected.scale)


def test_rows_of_a_warp_that_are_left_out():
    """Short rows share a warp: what comes before the first that is worked on counts for nothing."""
    x, tokens = torch.randn(3, 5, 64), torch.tensor([0, 5, 2])
    x[0] = 1e30
    args = (x, FP8_DYNAMIC_TENSOR.code, None, None, tokens)
    expected, actual = results(OPS["relu2_quant"], args), run(OPS["relu2_quant"], args)
    assert_same(actual["scale"], expected["scale"])
    assert_same(actual["data"][1], expected["data"][1])
    x = torch.ones(3, 64)
    x[:, ::2] = -1
    args = (x, -100 * x[0], torch.full((64,), 100.0), 1e-6, FP8_DYNAMIC_TENSOR.code, None)
    assert run(OPS["layer_norm_quant"], args)["scale"] < 1e-3  # rows that aren't there would be normed to 100


@pytest.mark.parametrize("cols", [1, 31, 577, 4097, LONG + 1])
def test_rows_that_no_pack_divides(cols):
    x, r, w = torch.randn(5, cols), torch.randn(5, cols), torch.randn(cols)
    expected = fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True)
    with by_cuda():
        moved = map(on_device, (x, r, w))
        actual = fused_ops.fused_add_rms_norm_quant(*moved, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True)
        again = fused_ops.quantize(actual[0].unquantized, INT8_DYNAMIC_TOKEN).to("cpu")
        actual = actual[0].to("cpu"), actual[1].cpu()
    assert_same(actual[1], expected[1])
    assert_close(actual[0].unquantized, expected[0].unquantized)
    assert_same(actual[0].data, again.data)
    assert_same(actual[0].scale, again.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cols", [64, 576, LONG])
def test_a_row_depends_on_nothing_but_itself(dtype, cols):
    """Promise 2: alone, in a batch, at an odd address, with gaps between rows."""
    x, w = on_device(torch.randn(9, cols).to(dtype)), on_device(torch.randn(cols))
    shifted = on_device(torch.empty(9 * (cols + 3) + 1, dtype=dtype))[1:].view(9, cols + 3)[:, :cols]
    shifted.copy_(x)
    with by_cuda():
        whole = fused_ops.rms_norm(x, w, 1e-6)
        for i in 0, 4, 8:
            assert_same(fused_ops.rms_norm(x[i : i + 1], w, 1e-6), whole[i : i + 1])
        assert_same(fused_ops.rms_norm(shifted, w, 1e-6), whole)


LONG_KEYS = itertools.cycle([FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN_ASYM, FP8_STATIC_TENSOR, FP8_DYNAMIC_GROUP_128])
LONG_CALLS = [pytest.param(p.values[0], next(LONG_KEYS), id=p.id) for p in ROW_OPS if p.id.endswith("_quant")]


@pytest.mark.parametrize(("op", "key"), LONG_CALLS)
def test_long_rows(op, key):
    """Rows that are read again for every reduction."""
    args = op.workload(2, LONG, key, torch.float16, "cpu")
    promises.results_are_the_cpus(run, op, [args])
    promises.fused_is_unfused(run, op, [args])


@EVERY_SERVED_KEY_AND_SOME_ACTIVATION
def test_activations_of_long_rows(name, key):
    args = OPS[name].workload(2, LONG, key, torch.bfloat16, "cpu")
    promises.results_are_the_cpus(run, OPS[name], [args])
    promises.fused_is_unfused(run, OPS[name], [args])


def test_columns_behind_a_long_row():
    args = OPS["fused_add_rms_norm"].workload(2, LONG, None, torch.bfloat16, "cpu")
    expected, actual = run(OPS["fused_add_rms_norm"], args), run(OPS["fused_add_rms_norm_pad"], (*args, 256))
    assert_same(actual["residual"], expected["residual"])
    assert_same(actual["y"], torch.nn.functional.pad(expected["y"], (0, -LONG % 256)))


def test_a_group_longer_than_what_threads_hold():
    key = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 49152))
    x = torch.randn(2, LONG + 1).half()
    with by_cuda():
        actual = fused_ops.quantize(on_device(x), key).to("cpu")
    expected = fused_ops.quantize(x, key)
    assert_same(actual.data, expected.data)
    assert_same(actual.scale, expected.scale)


@pytest.mark.parametrize(
    "key", [None, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 96))], ids=str
)
def test_a_long_row_is_written_where_it_is_read(key):
    """By the last pass over it."""
    x, r, w = (on_device(torch.randn(*shape, LONG).half()) for shape in ((2,), (2,), ()))
    with by_cuda():
        expected, summed = fused_ops.rms_norm_add_rms_norm_quant(x, r, w, w, 1e-6, 1e-6, key)
        actual, _ = fused_ops.rms_norm_add_rms_norm_quant(x, r, w, w, 1e-6, 1e-6, key, residual_out=r)
        assert_same(r, summed)
        assert_same(*((codes if key is None else codes.data) for codes in (actual, expected)))
        normed = fused_ops.rms_norm(summed, w, 1e-6)
        assert_same(fused_ops.rms_norm(r, w, 1e-6, out=r), normed)


def test_without_rows_a_static_scale_is_returned_all_the_same():
    x, scales = on_device(torch.zeros(0, 64)), on_device(torch.tensor([0.25, 0.5]))
    with by_cuda():
        one = fused_ops.rms_norm_quant(x, None, 1e-6, FP8_STATIC_TENSOR, scale=scales[:1])
        args = (x, x.clone(), None, None, 1e-6, 1e-6, 0, *[FP8_STATIC_TENSOR.code] * 2, scales[:1], scales[1:])
        _, q_scale, _, kv_scale = OPS["dual_rms_norm"].default(*args)
    assert (one.scale.item(), q_scale.item(), kv_scale.item()) == (0.25, 0.25, 0.5)


def test_a_given_scale_must_not_lie_in_the_output():
    """Every block reads it while others write."""
    x, scale = on_device(torch.randn(64, 128)), on_device(torch.ones(64, 1))
    out = QuantizedActivation(torch.empty_like(x, dtype=torch.float8_e4m3fn), scale, FP8_DYNAMIC_TOKEN, x.dtype)
    with by_cuda(), pytest.raises(ValueError, match="overlaps another argument in memory"):
        fused_ops.quantize(x, FP8_DYNAMIC_TOKEN, scale_ub=scale[0], out=out)
