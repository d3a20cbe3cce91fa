"""The reference formats against independent sources: numpy and ml_dtypes, compressed-tensors, and values by hand."""

import numpy as np
import pytest
import torch
from compare import raw
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as compressed
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from keys import EVERY_KEY, KEYS, given_tensors
from numpy_formats import LIMIT, NAN_CODE, NUMPY, decoded, encoded, expected, rounded_up
from torch import Tensor

from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantKey,
    ScaleDesc,
    formats,
)
from quant.key import E8M0, FP4, FP8, FP8_FNUZ

NAN, INF = float("nan"), float("inf")
f32 = np.float32


def assert_as_expected(x: Tensor, key: QuantKey, **tensors: Tensor) -> None:
    """`quantize` and `dequantize` give the bits of the numpy version."""
    codes, scales, zeros = expected(x, key, **tensors)
    data, scale, zero = formats.quantize(x, key, **tensors)
    assert data.shape == (*x.shape[:-1], x.shape[-1] // key.packing)
    assert data.is_contiguous()
    actual = raw(formats.unpack(data) if key.packing == 2 else data).numpy().reshape(codes.shape)
    wrong = actual != codes
    assert not wrong.any(), f"{wrong.sum()} codes differ: {actual[wrong][:5]}, not {codes[wrong][:5]}"
    np.testing.assert_array_equal(scale.float().numpy().reshape(scales.shape), scales)
    if not key.symmetric:
        np.testing.assert_array_equal(zero.numpy().reshape(zeros.shape), zeros)
    size = key.group_size(codes.shape[1]) or 1
    spread = [a.repeat(size, axis=1)[:, : codes.shape[1]] for a in (scales, zeros.astype(f32))]
    with np.errstate(all="ignore"):
        values = (decoded(codes, key.dtype) - (0 if key.symmetric else spread[1])) * spread[0]
        values = values * tensors["scale2"].numpy() if "scale2" in tensors else values
    back = formats.dequantize(data, scale, key, scale2=tensors.get("scale2"), zero_point=zero)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    np.testing.assert_array_equal(back.numpy().reshape(values.shape), values)


def all_sorts(cols: int, dtype: torch.dtype) -> Tensor:
    """Rows of normal, heavy-tailed, zero, denormal, tiny, huge, tied and infinite values, and one with an outlier."""
    normal = torch.randn(11, cols)
    normal[1] **= 5
    normal[2] *= 0
    normal[3] *= 1e-40
    normal[4] *= 1e-12
    normal[5] *= 1e37
    normal[6] = torch.randint(-16, 17, (cols,)) / 4 * 0.03
    normal[7, 3] = 1e4
    normal[8, 5], normal[8, -1] = NAN, INF
    normal[9, 40] = -INF
    normal[10] = normal[10].abs()
    return normal.to(dtype)


@EVERY_KEY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_bit_is_as_numpy_computes_it(dtype, key):
    x = all_sorts(576, dtype)
    for rows in (x[:8], x[10:]) if key.per_tensor and not key.scale.static else (x,):
        assert_as_expected(rows, key, **given_tensors(key))


def beside_boundaries(key: QuantKey, amax: float, size: int, **tensors: Tensor) -> Tensor:
    """Rows of groups with this largest magnitude, of what lies at and right beside the boundaries between codes."""
    front = torch.tensor([amax, -amax / 2])
    _, scale, zero = expected(torch.cat([front, torch.zeros(size - 2)])[None], key, **tensors)
    step = scale.astype(np.float64) * (tensors["scale2"].double().numpy() if "scale2" in tensors else 1)
    values = torch.from_numpy((boundaries(key.dtype).numpy() - zero) * step).float().flatten()
    values = torch.cat([values, values.nextafter(torch.tensor(INF)), values.nextafter(torch.tensor(-INF))])
    values = values[(values <= amax) & (values >= -amax / 2)]
    values = torch.cat([values, torch.zeros(-len(values) % (size - 2))]).reshape(-1, size - 2)
    return torch.cat([front.expand(len(values), 2), values], dim=1)


@EVERY_KEY
def test_at_the_boundaries_between_codes(key):
    """Where one ulp in the scale, its reciprocal or the product makes another code."""
    size = key.group_size(64)
    for amax in 1.75, 0.3, *(10 ** torch.randn(6)).tolist():
        tensors = given_tensors(key)
        if "scale2" in tensors:
            tensors["scale2"] = torch.tensor([amax * 1.3 / 2688])
        assert_as_expected(beside_boundaries(key, amax, size, **tensors), key, **tensors)


@EVERY_KEY
def test_shapes_and_strides(key):
    x = torch.randn(6, 5, 160)
    for view in x, x[:, 1], x[::2, :, 64:128], x[0, 0], x[:0], x.transpose(0, 1):
        assert_as_expected(view, key, **given_tensors(key))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(KEYS)), st.lists(st.floats(width=32), min_size=1, max_size=64), st.integers(0, 4))
def test_any_group(name, values, exponent):
    key, row = KEYS[name], torch.zeros(1, 64)
    row[0, : len(values)] = torch.tensor(values)
    tensors = given_tensors(key)
    for given_name in "scale", "scale2":
        if given_name in tensors:
            tensors[given_name] = tensors[given_name] * 1000.0**exponent
    assert_as_expected(row, key, **tensors)


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.7, 1e30])
@pytest.mark.parametrize("key", [FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128], ids=str)
def test_scale_ub_bounds_the_magnitude(key, bound):
    assert_as_expected(torch.randn(4, 576), key, scale_ub=torch.tensor([bound]))
    poisoned = torch.full((1, 8), INF)
    assert formats.quantize(poisoned, key, scale_ub=torch.tensor([bound]))[1].isnan().all()


# --- exhaustive ---


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def boundaries(dtype) -> Tensor:
    """Every code's value, every midpoint between neighbours, and the floats right beside each, in float32."""
    codes = np.arange(256 if dtype != FP4 else 16, dtype=np.uint8)
    values = decoded(codes, dtype)
    values = np.unique(values[np.isfinite(values)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    near = [points, np.nextafter(points, f32(INF)), np.nextafter(points, f32(-INF))]
    return torch.from_numpy(np.concatenate(near))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_encoders(dtype):
    x = torch.cat([every_bfloat16(), boundaries(dtype)])
    with np.errstate(invalid="ignore"):
        wanted = encoded(x.numpy(), dtype)
    actual = formats.encode(x, dtype).numpy()
    assert (actual == wanted).all(), x[torch.from_numpy(actual != wanted)][:10]
    assert NAN_CODE == formats.NAN_CODE


@pytest.mark.parametrize("dtype", [FP8, FP8_FNUZ], ids=str)
def test_decoding_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(formats.decode(codes.view(dtype), dtype).numpy(), decoded(codes.numpy(), dtype))


def test_amds_codes_of_half_the_value():
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    half = formats.halved(every)
    np.testing.assert_array_equal(half.float().numpy(), every.float().numpy() / 2)
    assert not raw(half).eq(0x7F).any()
    again = formats.doubled(half)
    np.testing.assert_array_equal(again.float().numpy(), every.float().numpy())
    assert formats.doubled(torch.tensor([0x7F, 0xFF], dtype=torch.uint8).view(FP8_FNUZ)).isnan().all()


def test_fp4_pairs():
    pairs = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten()  # the even column is the low nibble
    assert torch.equal(formats.pack(codes), pairs)
    assert torch.equal(formats.unpack(pairs), codes)
    values = formats.decode(pairs, FP4)
    assert raw(values).equal(raw(torch.from_numpy(decoded(codes.numpy(), FP4))))  # -0 too
    assert torch.equal(formats.encode(values, FP4), codes)
    assert torch.equal(pack_fp4_to_uint8(values.reshape(1, -1))[0], pairs)
    assert torch.equal(unpack_fp4_from_uint8(pairs.reshape(1, -1), 1, 512, torch.float32)[0], values)


@pytest.mark.parametrize("key", [MXFP8, MXFP4, NVFP4, FP8_DYNAMIC_TOKEN, KEYS["FP8_TOKEN_POWER"]], ids=str)
def test_the_scale_of_every_bfloat16(key):
    amax = every_bfloat16()
    amax = amax[amax >= 0]
    x = torch.zeros(len(amax), 32 if key.scale.dtype == E8M0 else 16)
    x[:, 7] = -amax
    scale2 = torch.tensor([1.75 / 2688])  # so that many blocks' scales lie at a tie
    scale = formats.quantize(x, key, **({"scale2": scale2} if key.scale2 else {}))[1].float().flatten().numpy()
    finite, limit = np.isfinite(amax.numpy()), f32(LIMIT[key.dtype])
    with np.errstate(all="ignore"):
        if key.scale2:
            block = f32(1) / scale2.numpy() * (amax.numpy() * (f32(1) / f32(6)))
            wanted = np.clip(block, 0, 448).astype(NUMPY[FP8]).astype(f32)
        elif key == FP8_DYNAMIC_TOKEN:
            wanted = np.maximum(amax.numpy() / limit, f32(1 / (448 * 512)))
        else:
            ratio = (np.maximum(amax.numpy(), f32(1e-10)) if key.scale.power_of_two else amax.numpy()) / limit
            wanted = np.array([2.0 ** rounded_up(r) if f else NAN for r, f in zip(ratio, finite, strict=True)], f32)
    np.testing.assert_array_equal(scale, np.where(finite, wanted, f32(NAN)))


def test_powers_of_two_by_their_bits():
    exponents = torch.arange(-127, 128, dtype=torch.int32)
    powers = torch.tensor([2.0**e for e in range(-127, 128)])
    assert torch.equal(formats.power(exponents), powers)
    assert formats.power(torch.tensor([128, -128], dtype=torch.int32)).isnan().all()
    normal = powers[1:]
    assert torch.equal(formats.ceil_log2(normal), exponents[1:])
    assert torch.equal(formats.ceil_log2(normal.nextafter(torch.tensor(INF))[:-1]), exponents[2:])
    assert formats.ceil_log2(torch.tensor([0.0, 1e-45, 2.0**-127])).tolist() == [-127, -126, -126]


# --- by hand ---


def one_group(*values: float, size: int = 128) -> Tensor:
    return torch.tensor([[*values, *[0.0] * (size - len(values))]])


@pytest.mark.parametrize(
    ("key", "values", "scale", "codes"),
    [
        (FP8_DYNAMIC_TOKEN, (448.0, -224.0, 1.0), 1.0, (448.0, -224.0, 1.0)),
        (FP8_DYNAMIC_TOKEN, (4.48, 0.02), 4.48 / 448, (448.0, 2.0)),
        (FP8_DYNAMIC_TOKEN, (0.0,), 1 / (448 * 512), (0.0,)),
        (KEYS["FNUZ_TOKEN"], (448.0, -2.0), 2.0, (224.0, -1.0)),
        (KEYS["FP8_GROUP_POWER"], (449.0, 2.0), 2.0, (224.0, 1.0)),
        (KEYS["FP8_GROUP_POWER"], (448.0, 2.0), 1.0, (448.0, 2.0)),
        (KEYS["FP8_GROUP_POWER"], (0.0,), 2.0**-42, (0.0,)),
        (INT8_DYNAMIC_TOKEN, (127.0, -1.5, 2.5), 1.0, (127, -2, 2)),
        (INT8_DYNAMIC_TOKEN, (0.0,), 2.0**-23, (0,)),
        (MXFP8, (449.0, -3.0), 2.0, (224.0, -1.5)),
        (MXFP8, (448.0,), 1.0, (448.0,)),
        (MXFP8, (0.0,), 2.0**-127, (0.0,)),
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
    x = one_group(6.0, -3.0, 0.5, size=48)
    x[0, 16:32] = -1e-6  # too small for a block of its own
    data, block, _ = formats.quantize(x, NVFP4, scale2=torch.tensor([0.25]))
    assert block.float().tolist() == [[4.0, 0.0, 0.0]]  # g * amax / 6 = 4 * 6 / 6
    assert formats.decode(data, FP4)[0, :3].tolist() == [6.0, -3.0, 0.5]
    assert (data[0, 8:] == 0).all()  # +0
    assert formats.dequantize(data, block, NVFP4, scale2=torch.tensor([0.25]))[0, :3].tolist() == [6.0, -3.0, 0.5]


def test_asymmetric_by_hand():
    x = torch.cat([one_group(0.0, 255.0, 100.4), one_group(-1.0, -255.0), one_group()])
    data, scale, zero = formats.quantize(x, INT8_DYNAMIC_TOKEN_ASYM)
    assert (scale[:, 0].tolist(), zero[:, 0].tolist()) == ([1.0, 1.0, 2.0**-23], [-128, 127, -128])
    assert data[:, :3].tolist() == [[-128, 127, -28], [126, -128, 127], [-128, -128, -128]]
    static = {"scale": torch.tensor([0.5]), "zero_point": torch.tensor([3], dtype=torch.int32)}
    data, scale, zero = formats.quantize(one_group(1.0, 1000.0, NAN), INT8_STATIC_TENSOR_ASYM, **static)
    assert data[0, :4].tolist() == [5, 127, 0, 3]
    assert scale is static["scale"]
    assert zero is static["zero_point"]


@EVERY_KEY
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_what_is_not_finite_poisons_its_group_alone(bad, key):
    x = torch.randn(3, 256)
    clean = formats.quantize(x, key, **given_tensors(key))[0]
    x[1, 5] = bad
    data, scale, _ = formats.quantize(x, key, **given_tensors(key))
    if key.scale.static:  # infinity saturates
        value = formats.decode(data, key.dtype)[1, 5].item()
        lowest = -128 if key.dtype == torch.int8 else -LIMIT[key.dtype]
        if bad == bad:
            assert value == (LIMIT[key.dtype] if bad > 0 else lowest)
        else:
            assert raw(data)[1, 5] == NAN_CODE[key.dtype]
        return
    size = key.group_size(256)
    assert (raw(data)[1, : size // key.packing] == NAN_CODE[key.dtype]).all()
    poisoned = scale.isnan() if scale.element_size() > 1 else raw(scale) == (0xFF if key.scale.dtype == E8M0 else 0x7F)
    assert poisoned.nonzero().tolist() == ([[0]] if key.per_tensor else [[1, 0]])
    if not key.per_tensor:
        raw(data)[1, : size // key.packing] = raw(clean)[1, : size // key.packing]
        assert torch.equal(raw(data), raw(clean))


@EVERY_KEY
def test_dequantizing_is_within_half_a_step(key):
    """Whatever the magnitude of the values: the formulas are about the right thing, not only computed alike."""
    for exponent in range(-18, 30, 6):
        x = torch.randn(5, 96) * 2.0**exponent
        tensors, limit = given_tensors(key), LIMIT[key.dtype]
        for name, most in ("scale", limit / (1 if key.symmetric else 2)), ("scale2", limit * 448):
            if name in tensors:
                tensors[name] = (x.abs().amax() / most).reshape(1)
        data, scale, zero = formats.quantize(x, key, **tensors)
        back = formats.dequantize(data, scale, key, scale2=tensors.get("scale2"), zero_point=zero)
        step = {torch.int8: 1 / 127, FP8: 2 * 32 / 448, FP8_FNUZ: 2 * 16 / 224, FP4: 2 * 2 / 6}[key.dtype]
        step *= 1 if key.symmetric else 2
        assert (back - x).abs().max() <= step / 2 * x.abs().max() * 1.01


# --- another library ---


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        (FP8_DYNAMIC_GROUP_128, {"type": "float", "strategy": "group", "group_size": 128}),
        (INT8_DYNAMIC_TOKEN_ASYM, {"strategy": "channel", "symmetric": False}),
        (NVFP4, {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": FP8}),
    ],
    ids=str,
)
def test_compressed_tensors_agrees(key, arguments):
    """Its scales, and its reading of our codes: where the second scale is a power of two, to the bit."""
    arguments = QuantizationArgs(**({"num_bits": 8, "symmetric": True} | arguments))
    x, scale2 = torch.randn(4, 256), torch.tensor([2.0**-9]) if key.scale2 else None
    theirs = None if scale2 is None else 1 / scale2
    data, scale, zero = formats.quantize(x, key, **({} if scale2 is None else {"scale2": scale2}))
    groups = x.unflatten(-1, (-1, key.group_size(256)))
    their_scale, their_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, theirs)
    assert torch.equal(their_scale, scale.float())
    codes = data if scale2 is None else unpack_fp4_from_uint8(data, 4, 256, torch.float32)
    read = compressed.dequantize(codes, scale.float(), zero, arguments, torch.float32, theirs)
    assert torch.equal(read, formats.dequantize(data, scale, key, scale2=scale2, zero_point=zero))
    if zero is not None:
        assert torch.equal(their_zero.int(), zero)


# --- errors ---

X, ONE = torch.zeros(2, 48), torch.ones(1)
WEIGHT = QuantKey(FP8, ScaleDesc(torch.float32, False, (128, 128)))
PER_TOKEN_STATIC = QuantKey(FP8, ScaleDesc(torch.float32, True, (1, -1)))


@pytest.mark.parametrize(
    ("key", "tensors", "message"),
    [
        (MXFP8, {}, "x has 48 columns, MXFP8 expects a multiple of 32"),
        (NVFP4.with_scale(group_shape=(1, 20)), {"scale2": ONE}, "expects a multiple of 20"),
        (FP8_STATIC_TENSOR, {}, "scale is missing, FP8_STATIC_TENSOR takes one"),
        (NVFP4, {}, "scale2 is missing, NVFP4 takes one"),
        (FP8_DYNAMIC_TOKEN, {"scale": ONE}, "scale is given, FP8_DYNAMIC_TOKEN takes none"),
        (FP8_DYNAMIC_TOKEN, {"scale2": ONE}, "scale2 is given"),
        (INT8_DYNAMIC_TOKEN_ASYM, {"zero_point": ONE.int()}, "zero_point is given"),
        (INT8_STATIC_TENSOR_ASYM, {"scale": ONE}, "zero_point is missing"),
        (FP8_STATIC_TENSOR, {"scale": ONE, "scale_ub": ONE}, "scale_ub is given, FP8_STATIC_TENSOR takes none"),
        (INT8_DYNAMIC_TOKEN, {"scale_ub": ONE}, "scale_ub is given"),
        (MXFP8, {"scale_ub": ONE}, "x has 48 columns"),
        (KEYS["FP8_TOKEN_POWER"], {"scale_ub": ONE}, "scale_ub is given"),
        (FP8_STATIC_TENSOR, {"scale": torch.ones(2)}, r"scale is \[2\], FP8_STATIC_TENSOR takes one element"),
        (FP8_STATIC_TENSOR, {"scale": ONE.double()}, "scale is torch.float64, FP8_STATIC_TENSOR takes torch.float32"),
        (INT8_STATIC_TENSOR_ASYM, {"scale": ONE, "zero_point": ONE}, "zero_point is torch.float32"),
        (WEIGHT, {}, r"has groups \(128, 128\)"),
        (PER_TOKEN_STATIC, {"scale": ONE}, r"has static groups \(1, -1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(key, tensors, message):
    with pytest.raises((ValueError, TypeError), match=f"quantize: .*{message}"):
        formats.quantize(X, key, **tensors)


def test_dequantize_wants_what_the_key_has():
    data, scale, zero = formats.quantize(torch.zeros(2, 32), NVFP4, scale2=ONE)
    with pytest.raises(ValueError, match="dequantize: scale2 is missing, NVFP4 takes one"):
        formats.dequantize(data, scale, NVFP4)
    data, scale, zero = formats.quantize(X, INT8_DYNAMIC_TOKEN_ASYM)
    with pytest.raises(ValueError, match="dequantize: zero_point is missing"):
        formats.dequantize(data, scale, INT8_DYNAMIC_TOKEN_ASYM)
    with pytest.raises(ValueError, match="dequantize: zero_point is given"):
        formats.dequantize(data, scale, INT8_DYNAMIC_TOKEN, zero_point=zero)
    with pytest.raises(ValueError, match="empty: x has 48 columns"):
        formats.empty(X.shape, MXFP8, "cpu")
