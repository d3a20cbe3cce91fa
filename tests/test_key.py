import contextlib
import copy

import pytest
import torch
from compare import raw
from keys import KEYS, layouts

import quant
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR_ASYM,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    QuantKey,
    ScaleDesc,
    ScaleLayout,
    formats,
)
from quant.key import FP8


def variants() -> set[QuantKey]:
    """Every key in every layout and rounding of its scales that exists."""
    found = set()
    for key in KEYS.values():
        for power_of_two in False, True:
            with contextlib.suppress(ValueError):
                found.update(layouts(key.with_scale(power_of_two=power_of_two)))
    return found


def test_codes_are_unique_and_decode():
    keys = variants()
    assert len(keys) == 68  # 5 x 7 FP8, 4 x 3 INT8, 3 x 4 MX and NVFP4, 9 per tensor
    assert len({key.code for key in keys}) == len(keys)
    for key in keys:
        assert QuantKey.from_code(key.code) == key


def test_the_code_bit_by_bit():
    """As csrc/quantize.h reads it."""
    assert FP8_DYNAMIC_GROUP_128.code == 128 << 16
    assert INT8_STATIC_TENSOR_ASYM.code == 2 | 1 << 4 | 1 << 5 | 1 << 7
    assert NVFP4.with_scale(layout=ScaleLayout.SWIZZLED_128X4).code == 3 | 2 << 8 | 4 << 12 | 16 << 16
    assert FP8_DYNAMIC_TOKEN.with_scale(layout=3, power_of_two=True).code == 1 << 6 | 3 << 12
    assert MXFP8.code == 1 << 8 | 32 << 16


@pytest.mark.parametrize("code", [-1, 4, 3 << 8, 1 << 10, 1 << 15, 6 << 12, 3 << 12, 3, 1 << 8 | 1 << 6])
def test_no_other_number_is_a_code(code):
    with pytest.raises(ValueError, match=r"QuantKey|ScaleDesc|ScaleLayout"):
        QuantKey.from_code(code)


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
        (lambda: FP8_DYNAMIC_GROUP_128.with_scale(layout=7), "layout is 7, expected one of ROW_MAJOR, COLUMN_MAJOR, "),
        (lambda: FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.PACKED_UE8M0), "needs power_of_two"),
        (lambda: QuantKey(torch.int4, FP8_DYNAMIC_GROUP_128.scale), "dtype is torch.int4"),
        (lambda: QuantKey(FP8, FP8_DYNAMIC_GROUP_128.scale, symmetric=False), "symmetric=False needs int8"),
        (lambda: QuantKey(FP8, FP8_DYNAMIC_GROUP_128.scale, NVFP4.scale2), "scale2 goes with"),
        (lambda: QuantKey(FP8, NVFP4.scale, NVFP4.scale2), "scale.dtype is torch.float8_e4m3fn"),
        (lambda: QuantKey(torch.float4_e2m1fn_x2, FP8_DYNAMIC_GROUP_128.scale), "scale.dtype is torch.float32"),
        (lambda: QuantKey(torch.int8, MXFP8.scale), "scale.dtype is torch.float8_e8m0fnu"),
        (lambda: FP8_DYNAMIC_TOKEN.with_scale(layout=ScaleLayout.SWIZZLED_128X4), "holds one-byte scales"),
        (lambda: FP8_DYNAMIC_TENSOR.with_scale(layout=ScaleLayout.COLUMN_MAJOR), "layout is COLUMN_MAJOR"),
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
    flat = formats.dequantize(activation.data, activation.scale, NVFP4, scale2=activation.scale2)
    assert torch.equal(activation.dequantize(), flat.bfloat16())
    moved = activation.to("meta")
    assert {t.device.type for t in (moved.data, moved.scale, moved.scale2, moved.unquantized)} == {"meta"}
    with pytest.raises(TypeError, match="use dequantize"):
        activation.to(torch.float16)
    assert repr(activation) == "QuantizedActivation(NVFP4, [2, 3, 64], from torch.bfloat16)"
    with pytest.raises(AttributeError):
        activation.data = None
    assert copy.deepcopy(activation).quant_key == NVFP4


def asymmetric(layout: ScaleLayout) -> QuantizedActivation:
    key = INT8_DYNAMIC_TOKEN_ASYM.with_scale(layout=layout)
    data, scale, zero_point = formats.quantize(torch.randn(3, 32), key)
    return QuantizedActivation(data, scale, key, torch.float32, zero_point=zero_point)


def test_moving_keeps_the_layout():
    key = FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.TMA_ALIGNED)
    data, scale, _ = formats.quantize(torch.randn(3, 640), key)
    assert scale.stride() == (1, 4)
    assert QuantizedActivation(data, scale, key, torch.float32).to("meta").scale.stride() == (1, 4)
    moved = asymmetric(ScaleLayout.TMA_ALIGNED).to("meta")
    assert moved.zero_point.stride() == moved.scale.stride() == (1, 4)
    assert (moved.zero_point.dtype, moved.scale2) == (torch.int32, None)
    stays = asymmetric(ScaleLayout.ROW_MAJOR)
    assert stays.to("cpu").scale is stays.scale


def test_it_is_a_pytree_and_traces(activation):
    leaves, _ = torch.utils._pytree.tree_flatten(asymmetric(ScaleLayout.ROW_MAJOR))
    assert [leaf.dtype for leaf in leaves] == [torch.int8, torch.float32, torch.int32]
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
    assert torch.equal(raw(out.scale), raw(activation.scale))
    assert (out.orig_dtype, out.orig_shape, out.unquantized) == (torch.bfloat16, (2, 3, 64), None)


def test_importing_quant_loads_the_data_types_only():
    import subprocess
    import sys

    code = "import sys, quant; print([m for m in sys.modules if m.startswith(('fused_ops', 'quant.methods'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert quant.__all__
