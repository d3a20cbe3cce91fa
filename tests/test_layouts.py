"""Where scales lie in memory, and what `empty` and torch.compile make of it."""

import numpy as np
import pytest
import torch
from compare import assert_same, raw
from keys import EVERY_KEY, KEYS, given_tensors, layouts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fused_ops
from quant import (
    FP8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    ScaleLayout,
    formats,
)
from quant.key import E8M0

NAN = float("nan")


def offset_128x4(m: int, k: int, groups: int) -> int:
    return ((m // 128) * -(-groups // 4) + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


def test_a_few_offsets_of_the_swizzled_layout():
    offsets = formats.logical(torch.arange(2048).to(torch.uint8), 140, 5, MXFP8.with_scale(layout=4).scale)
    flat = {(0, 0): 0, (0, 3): 3, (1, 0): 16, (31, 0): 496, (32, 0): 4, (96, 1): 13, (127, 3): 511}
    flat |= {(0, 4): 512, (128, 0): 1024, (129, 4): 1024 + 512 + 16}
    for (m, k), offset in flat.items():
        assert (int(offsets[m, k]), offset_128x4(m, k, 5)) == (offset % 256, offset)


@pytest.mark.parametrize("rows", [0, 1, 4, 129, 300])
@pytest.mark.parametrize("groups", [1, 4, 5, 36])
def test_layouts_element_by_element(rows, groups):
    power = 2.0 ** torch.randint(-40, 40, (rows, groups))
    power[rows // 2 :, -1] = NAN
    for key in *layouts(KEYS["FP8_GROUP_POWER"]), *layouts(MXFP8), *layouts(MXFP4):
        scale = power.to(key.scale.dtype)
        out = formats.arrange(scale, key.scale)
        np.testing.assert_array_equal(formats.logical(out, rows, groups, key.scale), power)
        match key.scale.layout:
            case ScaleLayout.ROW_MAJOR:
                assert out.stride() == (groups, 1)
            case ScaleLayout.COLUMN_MAJOR:
                assert out.stride() == (1, rows)
            case ScaleLayout.TMA_ALIGNED:
                assert out.stride() == (1, -(-rows // 4) * 4)
            case ScaleLayout.PACKED_UE8M0:
                assert (out.dtype, out.shape) == (torch.int32, (rows, -(-groups // 4)))
                assert out.stride() == (1, -(-rows // 4) * 4)
                for m in range(rows):
                    stored = b"".join(int(four).to_bytes(4, "little", signed=True) for four in out[m])
                    assert list(stored[:groups]) == power[m].to(E8M0).view(torch.uint8).tolist()
                    assert not any(stored[groups:])
            case ScaleLayout.SWIZZLED_128X4:
                wanted = bytearray(-(-rows // 128) * 128 * -(-groups // 4) * 4)
                for m in range(rows):
                    for k in range(groups):
                        wanted[offset_128x4(m, k, groups)] = int(scale.view(torch.uint8)[m, k])
                assert bytes(out.view(torch.uint8).tolist()) == bytes(wanted)


@EVERY_KEY
def test_a_layout_changes_no_value(key):
    x = torch.randn(133, 160 if key.scale.dtype != torch.float32 else 576)
    x[1, 7] = NAN
    plain = formats.quantize(x, key, **given_tensors(key))
    values = formats.dequantize(*plain[:2], key, scale2=given_tensors(key).get("scale2"), zero_point=plain[2])
    one_more = key.scale.power_of_two or key.scale.dtype != torch.float32  # packed or swizzled
    assert len(layouts(key)) == (1 if key.per_tensor else 3 + one_more)
    for variant in layouts(key):
        data, scale, zero = formats.quantize(x, variant, **given_tensors(key))
        assert torch.equal(raw(data), raw(plain[0]))
        assert zero is None or zero.stride() == scale.stride()
        back = formats.dequantize(data, scale, variant, scale2=given_tensors(key).get("scale2"), zero_point=zero)
        np.testing.assert_array_equal(back, values)


def described(results) -> list:
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in results]


@EVERY_KEY
def test_empty_allocates_what_quantize_returns(key):
    for variant in layouts(key):
        for shape in (5, 640), (2, 3, 64), (64,), (0, 64), (130, 128), (1, 160):
            made = described(formats.quantize(torch.randn(shape), variant, **given_tensors(key)))
            made = [made[0], None, None] if key.scale.static else made
            assert described(formats.empty(shape, variant, "cpu")) == made
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = formats.quantize(torch.empty(shape), variant, **given_tensors(key))
                assert key.scale.static or described(fake) == made


@EVERY_KEY
def test_empty_takes_any_number_of_rows_at_once(key):
    """With a symbolic T no guard is set: one compiled graph serves every T."""
    for variant in layouts(key):
        shapes = ShapeEnv()
        with FakeTensorMode(shape_env=shapes, static_shapes=False) as mode:
            x = mode.from_tensor(torch.empty(6, 640))
            made = formats.empty(x.shape, variant, "cpu")
        assert made[0].shape[0] is x.shape[0] or made[0].shape[0] == x.shape[0]
        assert made[0].dtype == key.storage_dtype


@pytest.mark.parametrize(
    "key",
    [
        FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.PACKED_UE8M0, power_of_two=True),
        NVFP4.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
        INT8_DYNAMIC_TOKEN_ASYM.with_scale(layout=ScaleLayout.TMA_ALIGNED),
    ],
    ids=str,
)
def test_compiles_to_one_graph_for_any_number_of_rows(key):
    def there_and_back(x, tensors):
        data, scale, zero = formats.quantize(x, key, **tensors)
        return data, scale, zero, formats.dequantize(data, scale, key, scale2=tensors.get("scale2"), zero_point=zero)

    torch.compiler.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, stance in (5, "default"), (130, "fail_on_recompile"), (7, "fail_on_recompile"):
        x, tensors = torch.randn(rows, 160).bfloat16(), given_tensors(key)
        with torch.compiler.set_stance(stance):
            actual = compiled(x, tensors)
        wanted = there_and_back(x, tensors)
        assert described(actual) == described(wanted)
        for a, w in zip(actual, wanted, strict=True):
            assert a is w is None or torch.equal(raw(a), raw(w))


@EVERY_KEY
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign(key, sign):
    """A zero point's range includes zero. Rows of so many groups that several are worked on at once."""
    x = sign * (torch.rand(3, 32 * 72) + 0.5)
    for dtype in torch.bfloat16, torch.float32:
        assert_as_the_reference(x.to(dtype), key, **given_tensors(key))


@pytest.mark.parametrize("group", [16, 32, 96])
@pytest.mark.parametrize("sign", [1, -1])
def test_short_asymmetric_groups_of_one_sign(group, sign):
    key = KEYS["INT8_GROUP_ASYM"].with_scale(group_shape=(1, group))
    assert_as_the_reference(sign * (torch.rand(3, 96 * 24) + 0.5), key)


@pytest.mark.parametrize("scale2", [1e-3, 2e-37, 1e-37, 1e-38, 3e-39])
def test_tiny_scale2(scale2):
    """Its reciprocal, times a block's, reaches infinity."""
    x = torch.randn(4, 1024) * torch.logspace(-45, 10, 1024)
    x[:, ::5] = 0
    assert_as_the_reference(x, NVFP4, scale2=torch.tensor([scale2]))


def assert_as_the_reference(x, key, **given):
    if not key.symmetric and key.per_tensor and not key.scale.static:
        return  # no kernel serves it
    actual = fused_ops.quantize(x, key, **given)
    with fused_ops.use_backend("reference"):
        expected = fused_ops.quantize(x, key, **given)
    for name in "data", "scale", "zero_point":
        assert_same(getattr(actual, name), getattr(expected, name), f"{name} {key}")
