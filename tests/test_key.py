import copy

import pytest
import torch

import quant
from quant import (
    FP8_DYNAMIC_GROUP_128,
    NAMED_KEYS,
    NVFP4,
    QuantizedActivation,
    QuantKey,
    ScaleDesc,
    ScaleLayout,
    formats,
)
from quant.key import FP8


def variants():
    for key in NAMED_KEYS.values():
        for layout in ScaleLayout:
            for power_of_two in False, True:
                try:
                    yield key.with_scale(layout=layout, power_of_two=power_of_two)
                except ValueError:
                    continue


def test_codes_are_unique_and_decode():
    keys = list(variants())
    assert len(keys) > 50
    assert len({key.code for key in keys}) == len(keys)
    for key in keys:
        assert QuantKey.from_code(key.code) == key


def test_names():
    assert str(FP8_DYNAMIC_GROUP_128) == "FP8_DYNAMIC_GROUP_128"
    tma = FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.TMA_ALIGNED, power_of_two=True)
    assert str(tma) == "FP8_DYNAMIC_GROUP_128[power_of_two, TMA_ALIGNED]"
    assert tma != FP8_DYNAMIC_GROUP_128
    assert all(str(key) for key in variants())


def test_a_weights_key_has_no_code():
    assert QuantKey(FP8, ScaleDesc(torch.float32, True, (128, 128))).code == -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleDesc(torch.float16, False, (1, 128)), "dtype is torch.float16"),
        (lambda: ScaleDesc(torch.float32, False, (1, 0)), r"group_shape is \(1, 0\)"),
        (lambda: ScaleDesc(torch.float8_e8m0fnu, False, (1, 32), power_of_two=True), "power_of_two rounds float32"),
        (lambda: FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.PACKED_UE8M0), "needs power_of_two"),
        (lambda: QuantKey(torch.int4, FP8_DYNAMIC_GROUP_128.scale), "dtype is torch.int4"),
        (lambda: QuantKey(FP8, FP8_DYNAMIC_GROUP_128.scale, symmetric=False), "symmetric=False needs int8"),
        (lambda: QuantKey(FP8, FP8_DYNAMIC_GROUP_128.scale, NVFP4.scale2), "scale2 goes with"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def activation():
    x = torch.randn(2, 3, 64).bfloat16()
    data, scale, _ = formats.quantize(x, NVFP4, scale2=torch.tensor([4 / 2688]))
    return QuantizedActivation(data, scale, NVFP4, x.dtype, torch.tensor([4 / 2688]), unquantized=x)


def test_the_activation(activation):
    assert activation.orig_shape == (2, 3, 64)
    assert activation.dequantize().dtype == torch.bfloat16
    error = activation.dequantize(torch.float32) - activation.unquantized
    assert error.abs().max() < 0.6
    moved = activation.to("meta")
    assert {t.device.type for t in (moved.data, moved.scale, moved.scale2, moved.unquantized)} == {"meta"}
    with pytest.raises(TypeError, match="use dequantize"):
        activation.to(torch.float16)
    assert repr(activation) == "QuantizedActivation(NVFP4, [2, 3, 64], from torch.bfloat16)"
    with pytest.raises(AttributeError):
        activation.data = None
    assert copy.deepcopy(activation).quant_key == NVFP4


def test_it_is_a_pytree_and_traces(activation):
    doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.clone(), activation)
    assert torch.equal(doubled.data, activation.data)
    assert doubled.zero_point is None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def passes(q):
        assert q.quant_key == NVFP4
        return QuantizedActivation(q.data, q.scale, q.quant_key, q.orig_dtype, q.scale2), q.dequantize()

    out, decoded = passes(activation)
    assert torch.equal(out.data, activation.data)
    assert torch.equal(decoded, activation.dequantize())


def test_importing_quant_loads_the_data_types_only():
    import subprocess
    import sys

    code = "import sys, quant; print([m for m in sys.modules if m.startswith(('fused_ops', 'quant.methods'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert quant.__all__
