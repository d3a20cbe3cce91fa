"""Rows that Triton's kernels work on in parts: short ones, by kernels that take them for long, and really long ones."""

import promises
import pytest
import torch
from compare import assert_same
from keys import EVERY_KEY, EVERY_SERVED_KEY_AND_SOME_ACTIVATION
from promises import DEVICE, on_device
from test_triton import blocks, by_triton, hard_values_are_the_cpus, some, tree_sum

import fused_ops
from fused_ops import OPS
from fused_ops._triton import launch
from quant import FP8_DYNAMIC_GROUP_128, INT8_DYNAMIC_TOKEN

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def parts_of_16(monkeypatch):
    """Rows of more than 24 columns are long; the number of those that were."""
    launched, kernel = [], launch.long_row_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    for name, value in ("MAX_COLS", 24), ("PART", 16), ("long_row_kernel", Counted()):
        monkeypatch.setattr(launch, name, value)
    launch.stages.cache_clear()
    yield launched
    launch.stages.cache_clear()


def few(op) -> list[tuple]:
    long = [args for args in some(op) if args[0].shape[-1] > 24]
    return sorted(long, key=lambda args: blocks(op, args))[:3]


@EVERY_KEY
def test_quantize_of_hard_values(key, parts_of_16):
    hard_values_are_the_cpus(key, 160)
    assert parts_of_16


@pytest.mark.parametrize("name", ["swiglu_oai_mul_quant", "fused_add_rms_norm_pad", "layer_norm"])
def test_results_are_the_cpus(name, parts_of_16):
    promises.results_are_the_cpus(by_triton, OPS[name], few(OPS[name]))
    assert parts_of_16


@EVERY_SERVED_KEY_AND_SOME_ACTIVATION
def test_activations(name, key, parts_of_16):
    args = OPS[name].workload(2, 160, key, torch.bfloat16, "cpu")
    promises.results_are_the_cpus(by_triton, OPS[name], [args])
    promises.fused_is_unfused(by_triton, OPS[name], [args])
    assert parts_of_16


@pytest.mark.parametrize("name", ["rms_norm_add_rms_norm_quant", "layer_norm_quant"])
def test_fused_is_unfused(name, parts_of_16):
    promises.fused_is_unfused(by_triton, OPS[name], few(OPS[name]))
    assert len(parts_of_16) > 4


def test_parts_are_added_in_order_and_results_may_lie_in_the_inputs_place():
    cols = launch.MAX_COLS + 8
    x, r = torch.randn(2, 2, cols).unbind()
    total = torch.zeros(2, 1)
    for part in ((x + r) ** 2).split(launch.PART, dim=-1):
        total = total + tree_sum(torch.nn.functional.pad(part, (0, launch.PART - part.shape[-1])))
    expected = (x + r) * (1 / (total / cols + 1e-6).double().sqrt().float())
    moved = on_device(torch.stack([x, r], dim=1)).transpose(0, 1)  # rows lie apart
    with fused_ops.use_backend("triton"):
        q, new = fused_ops.fused_add_rms_norm_quant(
            *moved, None, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True, residual_out=moved[1]
        )
        assert_same(q.unquantized.cpu(), expected)
        assert_same(new.contiguous().cpu(), x + r)
        assert_same(q.data, fused_ops.quantize(q.unquantized, INT8_DYNAMIC_TOKEN).data)
        fused_ops.rms_norm(moved[1], None, 1e-6, out=moved[1])
    assert_same(moved[1].contiguous().cpu(), expected)


def test_what_is_refused():
    x = torch.zeros(1, 2 * launch.MAX_COLS + 2, device=DEVICE)
    with fused_ops.use_backend("triton"):
        wide = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, launch.MAX_COLS + 1))
        with pytest.raises(ValueError, match=r"but rows of up to 2\^30 columns, groups of up to 65536 or of the row"):
            fused_ops.quantize(x, wide)
