"""The reference formats against independent sources: torch's dtypes, ml_dtypes, compressed-tensors, and by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NAMED_KEYS,
    NVFP4,
    QuantKey,
    ScaleLayout,
    formats,
)
from quant.key import E8M0, FP4, FP8, FP8_FNUZ

NUMPY = {FP8: ml_dtypes.float8_e4m3fn, FP8_FNUZ: ml_dtypes.float8_e4m3fnuz, FP4: ml_dtypes.float4_e2m1fn}
NAN, INF = float("nan"), float("inf")


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def boundaries(dtype) -> torch.Tensor:
    """Every code's value, every midpoint between neighbours, and the floats right beside each, in float32."""
    codes = np.arange(256 if dtype != FP4 else 16, dtype=np.uint8).view(NUMPY[dtype]).astype(np.float64)
    values = np.unique(codes[np.isfinite(codes)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(INF)), np.nextafter(points, np.float32(-INF))]
    return torch.from_numpy(np.concatenate(near))


@pytest.mark.parametrize("dtype", [FP8, FP8_FNUZ, FP4], ids=str)
def test_encoders_round_and_saturate_as_ml_dtypes_does(dtype):
    x = torch.cat([every_bfloat16(), boundaries(dtype)])
    limit = formats.MAX[dtype]
    expected = x.clamp(-limit, limit).numpy().astype(NUMPY[dtype]).view(np.uint8)
    expected = np.where(np.isnan(x.numpy()), formats.NAN_CODE[dtype], expected)
    actual = formats.encode(x, dtype).numpy()
    assert (actual == expected).all(), x[torch.from_numpy(actual != expected)][:10]


@pytest.mark.parametrize("dtype", [FP8, FP8_FNUZ], ids=str)
def test_decoding_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.numpy().view(NUMPY[dtype]).astype(np.float32)
    np.testing.assert_array_equal(formats.decode(codes.view(dtype), dtype).numpy(), expected)


def test_decoding_and_packing_fp4():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(formats.decode(formats.pack(codes), FP4).numpy(), expected)
    assert formats.pack(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [0x21]  # the even column is the low nibble
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 1.0]).reshape(1, 16)
    packed = formats.pack(formats.encode(values, FP4))
    assert torch.equal(packed, pack_fp4_to_uint8(values.bfloat16()))


def test_int8_rounds_to_nearest_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -128.5, -1e30, INF, -INF, NAN])
    codes = formats.encode(x, torch.int8).view(torch.int8)
    assert codes.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128, 0]
    shifted = formats.encode(torch.tensor([0.4, 250.0, -1.0]), torch.int8, torch.tensor(-128)).view(torch.int8)
    assert shifted.tolist() == [-128, 122, -128]


def test_powers_of_two_by_their_bits():
    exponents = torch.arange(-127, 128, dtype=torch.int32)
    expected = torch.tensor([2.0**e for e in range(-127, 128)], dtype=torch.float64).float()
    assert torch.equal(formats.power(exponents), expected)
    normal = expected[1:]
    assert torch.equal(formats.ceil_log2(normal), exponents[1:])
    assert torch.equal(formats.ceil_log2(torch.nextafter(normal[:-1], torch.tensor(INF))), exponents[2:])
    values = torch.rand(10_000) * 100 + 1e-6
    assert torch.equal(formats.ceil_log2(values), values.double().log2().ceil().int())


def one_group(*values: float, size: int = 128) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (size - len(values))]])


@pytest.mark.parametrize(
    ("key", "values", "scale", "codes"),
    [
        (FP8_DYNAMIC_TOKEN, (448.0, -224.0, 1.0), 1.0, (448.0, -224.0, 1.0)),
        (FP8_DYNAMIC_TOKEN, (4.48, 0.02), 4.48 / 448, (448.0, 2.0)),
        (FP8_DYNAMIC_TOKEN, (0.0,), 1 / (448 * 512), (0.0,)),
        (FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True), (449.0, 2.0), 2.0, (224.0, 1.0)),
        (FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True), (448.0, 2.0), 1.0, (448.0, 2.0)),
        (INT8_DYNAMIC_TOKEN, (127.0, -1.5, 2.5), 1.0, (127, -2, 2)),
        (INT8_DYNAMIC_TOKEN, (0.0,), 2.0**-23, (0,)),
        (MXFP8, (449.0, -3.0), 2.0, (224.0, -1.5)),
        (MXFP8, (448.0,), 1.0, (448.0,)),
        (MXFP4, (6.0, 1.0, -2.5), 1.0, (6.0, 1.0, -2.0)),
        (MXFP4, (6.5, 1.0), 2.0, (3.0, 0.5)),
    ],
    ids=str,
)
def test_known_scales_and_codes(key, values, scale, codes):
    data, made, _ = formats.quantize(one_group(*values), key)
    assert made.float()[0, 0] == torch.tensor(scale)
    assert formats.decode(data, key.dtype)[0, : len(codes)].tolist() == list(codes)


def test_nvfp4_by_hand():
    x = one_group(6.0, -3.0, 0.5, size=32)  # the second block is zero
    data, block, _ = formats.quantize(x, NVFP4, scale2=torch.tensor([0.25]))
    assert block.float().tolist() == [[4.0, 0.0]]  # g * amax / 6 = 4 * 6 / 6
    assert formats.decode(data, FP4)[0, :3].tolist() == [6.0, -3.0, 0.5]
    assert (data[0, 8:] == 0).all()
    assert formats.dequantize(data, block, NVFP4, scale2=torch.tensor([0.25]))[0, :3].tolist() == [6.0, -3.0, 0.5]


def test_asymmetric_by_hand():
    x = one_group(0.0, 255.0, 100.4)
    data, scale, zero = formats.quantize(x, INT8_DYNAMIC_TOKEN_ASYM)
    assert (scale.item(), zero.item()) == (1.0, -128)
    assert data[0, :3].tolist() == [-128, 127, -28]
    _, scale, zero = formats.quantize(one_group(-1.0, -255.0), INT8_DYNAMIC_TOKEN_ASYM)
    assert (scale.item(), zero.item()) == (1.0, 127)
    static = {"scale": torch.tensor([0.5]), "zero_point": torch.tensor([3], dtype=torch.int32)}
    data, _, _ = formats.quantize(one_group(1.0, 1000.0), INT8_STATIC_TENSOR_ASYM, **static)
    assert data[0, :2].tolist() == [5, 127]


def test_scale_ub_bounds_the_magnitude():
    data, scale, _ = formats.quantize(one_group(896.0, 1.0), FP8_DYNAMIC_TOKEN, scale_ub=torch.tensor([448.0]))
    assert scale.item() == 1.0
    assert data.float()[0, :2].tolist() == [448.0, 1.0]


def given_tensors(key: QuantKey) -> dict:
    tensors = {}
    if key.scale.static:
        tensors["scale"] = torch.tensor([0.03])
    if key.scale2 is not None:
        tensors["scale2"] = torch.tensor([4 / 2688])
    if key.scale.static and not key.symmetric:
        tensors["zero_point"] = torch.tensor([3], dtype=torch.int32)
    return tensors


def bits(x):
    return None if x is None else x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("key", NAMED_KEYS.values(), ids=NAMED_KEYS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_what_is_not_finite_poisons_its_group_alone(bad, key):
    x = torch.randn(3, 256)
    clean = formats.quantize(x, key, **given_tensors(key))
    x[1, 5] = bad
    data, scale, _ = formats.quantize(x, key, **given_tensors(key))
    values = formats.decode(data, key.dtype)
    if key.scale.static:
        limit = {torch.int8: 127.0, FP8: 448.0}[key.dtype]
        saturated = limit if bad > 0 else -limit - (key.dtype == torch.int8)
        expected = (0.0 if key.dtype == torch.int8 else NAN) if bad != bad else saturated
        assert values[1, 5].item() == expected or (values[1, 5].isnan() and expected != expected)
        return
    group = values[1, : min(key.group_size(256), 256)]
    assert group.isnan().all() if key.dtype == FP8 else (group == 0).all()
    if key.dtype == FP8:
        assert (data[1, : len(group)].view(torch.uint8) == 0x7F).all()
    assert scale.float().reshape(-1)[0 if key.per_tensor else key.groups(256)].isnan()
    if not key.per_tensor:
        for row in 0, 2:
            assert torch.equal(bits(data[row]), bits(clean[0][row]))


@pytest.mark.parametrize("cols", [576, 100, 129])
def test_a_short_last_group_is_quantized_like_a_row_of_its_own(cols):
    x = torch.randn(4, cols).bfloat16()
    data, scale, _ = formats.quantize(x, FP8_DYNAMIC_GROUP_128)
    assert scale.shape == (4, -(-cols // 128))
    for g in range(scale.shape[1]):
        part, one, _ = formats.quantize(x[:, 128 * g : 128 * (g + 1)], FP8_DYNAMIC_TOKEN)
        assert torch.equal(bits(part), bits(data[:, 128 * g : 128 * (g + 1)]))
        assert torch.equal(one[:, 0], scale[:, g])


def test_per_tensor_is_one_token_of_all_elements():
    x = torch.randn(3, 5, 64)
    data, scale, _ = formats.quantize(x, FP8_DYNAMIC_TENSOR)
    flat, one, _ = formats.quantize(x.reshape(1, -1), FP8_DYNAMIC_TOKEN)
    assert (scale.shape, scale.item()) == ((1,), one.item())
    assert torch.equal(bits(data.reshape(1, -1)), bits(flat))


def swizzled_offset(m: int, k: int, groups: int) -> int:
    return ((m // 128) * -(-groups // 4) + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4


@pytest.mark.parametrize("rows", [1, 4, 129, 300])
@pytest.mark.parametrize("key", [MXFP8, NVFP4, MXFP4], ids=str)
def test_the_swizzled_layout_element_by_element(key, rows):
    x = torch.randn(rows, 160)
    plain = formats.quantize(x, key, **given_tensors(key))[1]
    flat = formats.quantize(x, key.with_scale(layout=ScaleLayout.SWIZZLED_128X4), **given_tensors(key))[1]
    groups = plain.shape[1]
    assert flat.numel() == -(-rows // 128) * 128 * -(-groups // 4) * 4
    source, bytes_ = plain.view(torch.uint8), flat.view(torch.uint8).clone()
    for m in range(rows):
        for k in range(groups):
            assert bytes_[swizzled_offset(m, k, groups)] == source[m, k]
            bytes_[swizzled_offset(m, k, groups)] = 0
    assert (bytes_ == 0).all()  # padding


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_strided_and_packed_layouts(rows):
    x = torch.randn(rows, 5 * 128 + 7)
    key = FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True)
    plain = formats.quantize(x, key)[1]
    up = -(-rows // 4) * 4
    for layout, stride in (ScaleLayout.COLUMN_MAJOR, rows), (ScaleLayout.TMA_ALIGNED, up):
        scale = formats.quantize(x, key.with_scale(layout=layout))[1]
        assert (scale.stride(), torch.equal(scale, plain)) == ((1, stride), True)
    packed = formats.quantize(x, key.with_scale(layout=ScaleLayout.PACKED_UE8M0))[1]
    assert (packed.dtype, packed.shape, packed.stride()) == (torch.int32, (rows, 2), (1, up))
    for m in range(rows):
        exponents = b"".join((int(v) & 0xFFFFFFFF).to_bytes(4, "little") for v in packed[m])
        expected = [int(np.log2(v)) + 127 for v in plain[m].tolist()]
        assert list(exponents) == [*expected, 0, 0]


@pytest.mark.parametrize("key", NAMED_KEYS.values(), ids=NAMED_KEYS)
def test_empty_allocates_what_quantize_returns(key):
    for layout in ScaleLayout:
        try:
            variant = key.with_scale(layout=layout)
            formats.quantize(torch.zeros(1, 64), variant, **given_tensors(variant))
        except ValueError:
            continue
        for shape in (5, 640), (2, 3, 64):
            made = formats.quantize(torch.randn(shape), variant, **given_tensors(variant))
            for name, e, q in zip(("data", "scale", "zero"), formats.empty(shape, variant, "cpu"), made, strict=True):
                if e is not None:
                    assert (e.shape, e.dtype, e.stride()) == (q.shape, q.dtype, q.stride()), (name, layout)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(NAMED_KEYS)), st.integers(0, 9), st.integers(1, 5), st.floats(-30, 30), st.integers(0, 99)
)
def test_dequantizing_is_within_half_a_step(name, rows, groups, exponent, seed):
    """Any scale of values: the error is at most half a step of the format, relative to its group's largest element."""
    key = NAMED_KEYS[name]
    if key.scale.static or key.scale2 is not None:
        return
    x = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    data, scale, zero = formats.quantize(x, key)
    error = (formats.dequantize(data, scale, key, zero_point=zero) - x).abs()
    step = {torch.int8: 1 / 127, FP8: 2 * 32 / 448, FP4: 2 * 2 / 6}[key.dtype] * (2 if not key.symmetric else 1)
    floor = 2.0**-23 * 127 / 100 if key.dtype == torch.int8 else 2.0**-9 / (448 * 512)
    largest = x.abs().amax() if x.numel() else torch.tensor(0.0)
    assert (error <= step / 2 * largest * 1.01 + floor).all()


X = torch.zeros(2, 48)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: formats.quantize(X, MXFP8), "x has 48 columns, MXFP8 expects a multiple of 32"),
        (lambda: formats.quantize(X, FP8_STATIC_TENSOR), "scale is missing, FP8_STATIC_TENSOR takes one"),
        (lambda: formats.quantize(X, NVFP4), "scale2 is missing"),
        (
            lambda: formats.quantize(X, FP8_DYNAMIC_TOKEN, scale=X[:1, 0]),
            "scale is given, FP8_DYNAMIC_TOKEN takes none",
        ),
        (lambda: formats.quantize(X, INT8_STATIC_TENSOR_ASYM, scale=X[:1, 0]), "zero_point is missing"),
        (lambda: formats.quantize(X, INT8_STATIC_TENSOR, scale=X[:1, 0], scale_ub=X[:1, 0]), "scale_ub is given"),
        (
            lambda: formats.quantize(X, FP8_DYNAMIC_TOKEN.with_scale(layout=ScaleLayout.SWIZZLED_128X4)),
            "swizzles float32 scales",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_e8m0_scales_are_torchs_dtype():
    scale = formats.quantize(one_group(3.0, size=32), MXFP8)[1]
    assert scale.dtype == E8M0
    assert scale.float().item() == 2.0 ** np.ceil(np.log2(3 / 448))
