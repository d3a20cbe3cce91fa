"""Products of quantized operands, on every path of the compiled kernels.

Few rows take another path than many (5 and more), and rows beyond 256 another pass over the weight.
"""

import subprocess
import sys
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from compare import assert_same
from linear_operands import (
    COLS,
    DTYPES,
    FP8_KEYS,
    INT8_KEYS,
    KEYS,
    WEIGHTS,
    activation,
    check_close,
    codes,
    compiled_only,
    decoded_activation,
    each_backend,
    each_key,
    linear,
    multiple,
    rows,
    weight,
)

import fused_ops
from fused_ops.linear import (
    block_key,
    decode_weight,
    exact_values,
    linear_inputs,
    quantize_weight,
    usual_weight,
)
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    formats,
)
from quant.key import FP4, FP8, FP8_FNUZ, PER_TENSOR

# --- values ---


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("key", FP8_KEYS + INT8_KEYS, ids=str)
@each_backend
def test_against_float64(backend, key, cols):
    for tokens, outs in product((1, 2, 3, 4, 5, 33), (1, 7, 130)):
        x, w = activation(tokens, cols, key), weight(outs, cols, usual_weight(key))
        with fused_ops.use_backend(backend):
            y = linear(x, w)
        check_close(y, decoded_activation(x), exact_values(*w), min(cols, 80) if backend == "cpu" else cols)


@each_key
@each_backend
def test_every_activation_with_every_weight(backend, key):
    """In any layout, for few and for many rows, with short last groups and vectors, and tiny powers of two."""
    shapes = cycle([(1, 1), (5, 577), (2, 1130), (130, 150), (4, 230), (3, 100), (9, 640)])
    for w_key in WEIGHTS:
        for outs in 5, 150:
            tokens, cols = next(shapes)
            cols += -cols % multiple(key, w_key)
            x, w = activation(tokens, cols, key, exponents=(-50, -40)), weight(outs, cols, w_key)
            with fused_ops.use_backend(backend):
                y = linear(x, w)
            terms = min(cols, 80) if backend == "cpu" else cols
            check_close(y, decoded_activation(x), exact_values(*w), terms, f"{w_key} {tokens} x {cols} x {outs}")


@pytest.mark.parametrize("key", [k for k in KEYS if k.scale.dtype != torch.float32 or k.scale.group_shape.cols == 64])
def test_what_quantize_and_quantize_weight_make(key):
    """Not codes at random but the real producers', and the weight's key inferred."""
    for tokens in 1, 33:
        x, w, w_scale, w_scale2 = linear_inputs(tokens, 320, 130, key, "cpu")
        y = fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32, weight_scale2=w_scale2)
        check_close(y, decoded_activation(x), exact_values(w, w_scale, usual_weight(key), w_scale2), 80)
        assert_same(linear(x, (w, w_scale, usual_weight(key), w_scale2)), y)


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128], ids=str)
@each_backend
def test_amds_codes_give_the_bits_of_e4m3fn(backend, key):
    """Theirs are halves with twice the scale, quantized or converted."""
    fnuz, w_key = replace(key, dtype=FP8_FNUZ), usual_weight(key)
    weight = torch.randn(150, 576)
    w, w_scale, _ = quantize_weight(weight, w_key)
    half, twice, _ = quantize_weight(weight, replace(w_key, dtype=FP8_FNUZ))
    assert_same(half, formats.halved(w))
    assert_same(twice, 2 * w_scale)
    for tokens in 1, 33:
        x = torch.randn(tokens, 576).bfloat16()
        with fused_ops.use_backend(backend):
            y = fused_ops.scaled_linear(fused_ops.quantize(x, key), w, w_scale, out_dtype=torch.float32)
            q = fused_ops.quantize(x, fnuz)
            assert_same(fused_ops.scaled_linear(q, half, twice, out_dtype=torch.float32), y)


@pytest.mark.parametrize("key", WEIGHTS, ids=str)
def test_a_weight_is_close_to_what_was_quantized(key):
    values = torch.randn(150, 1120) * torch.logspace(-1, 1, 150)[:, None]
    data, scale, scale2 = quantize_weight(values, key)
    error = (decode_weight(data, scale, key, scale2) - values).norm() / values.norm()
    assert error < {torch.int8: 0.03, FP8: 0.06, FP8_FNUZ: 0.06, FP4: 0.25}[key.dtype]
    step = (decode_weight(data, scale, key, scale2) - values).abs() / values.abs().amax()
    assert step.max() < 0.2
    one = None if scale2 is None else torch.ones(1)
    assert_same(exact_values(data, scale, key).float(), decode_weight(data, scale, key, one))


@compiled_only
@pytest.mark.parametrize("cols", [*COLS, 200_000])
@pytest.mark.parametrize("key", [*INT8_KEYS, INT8_STATIC_TENSOR_ASYM, INT8_DYNAMIC_TOKEN_ASYM], ids=str)
def test_int8_sums_are_exact(key, cols):
    """For every code, the largest products included, and where the sum doesn't fit 32 bits."""
    for tokens in (1, 2, 6):
        x, w = activation(tokens, cols, key), weight(9, cols, block_key(torch.int8, 1, -1))
        x.data[0], w[0][0] = -128, -128
        zero = 0 if key.symmetric else x.zero_point.fill_(127).double()
        sums = (x.data.double() - zero) @ w[0].double().t()  # integers below 2^53
        expected = (sums * (x.scale.double() * w[1].double().t())).float()
        assert_same(linear(x, w), expected)
    assert sums[0, 0] == (128 if key.symmetric else 255) * 128 * cols


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [FP8, FP8_FNUZ, torch.int8], ids=str)
@each_backend
def test_every_product_of_two_codes(backend, dtype, tokens):
    key = replace(FP8_STATIC_TENSOR, dtype=dtype)
    every, one = torch.arange(256, dtype=torch.uint8).view(dtype)[:, None], torch.ones(1)
    for code in every.split(tokens):
        x = QuantizedActivation(code, one, key, torch.float32)
        with fused_ops.use_backend(backend):
            y = fused_ops.scaled_linear(x, every, one, out_dtype=torch.float32)
        torch.testing.assert_close(y, code.float() @ every.float().t(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("key", [MXFP8, MXFP4, NVFP4], ids=str)
@each_backend
def test_every_code_with_every_scale(backend, key):
    """On either side, what isn't representable included: infinite, subnormal, NaN, as `dequantize` decodes it."""
    cols, ones = key.scale.group_shape.cols, torch.ones(1) if key.scale2 else None
    scale = torch.arange(256, dtype=torch.uint8).view(key.scale.dtype)[:, None]
    unit = torch.zeros(6, cols, dtype=torch.int8)
    unit[:, 0] = 1
    one = torch.ones(1)
    for code in range(16 if key.dtype == FP4 else 256):
        data = torch.zeros(256, cols // key.packing, dtype=torch.uint8)
        data[:, 0] = code
        data = data.view(key.storage_dtype)
        expected = formats.dequantize(data, scale, key, scale2=ones)[:, 0] + torch.zeros(256)  # no -0
        x = QuantizedActivation(data, scale, key, torch.float32, ones)
        with fused_ops.use_backend(backend):
            y = linear(x, (unit[:1], one, block_key(torch.int8, *PER_TENSOR), None))
            assert_same(y[:, 0].contiguous(), expected)
            for tokens in 1, 6:
                some = QuantizedActivation(unit[:tokens], one, INT8_STATIC_TENSOR, torch.float32)
                assert_same(linear(some, (data, scale, key, ones))[0], expected)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_key
def test_bias_and_rounding(key, dtype):
    """The float32 result, plus the bias in float32, rounded once."""
    for tokens, outs in (2, 131), (7, 35):
        x, (w, scale, w_key, scale2) = activation(tokens, 192, key), weight(outs, 192, usual_weight(key))
        scale = scale * 1e-3 if scale.dtype == torch.float32 else scale
        plain = linear(x, (w, scale, w_key, scale2))
        assert_same(linear(x, (w, scale, w_key, scale2), dtype=dtype), plain.to(dtype))
        for bias_dtype in DTYPES:
            bias = torch.randn(outs).to(bias_dtype)
            assert_same(linear(x, (w, scale, w_key, scale2), bias, dtype), (plain + bias.float()).to(dtype))


@compiled_only
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@each_key
def test_one_scale_for_the_whole_weight(key, shape):
    dtype = FP8 if key.dtype == FP4 else key.dtype
    x, w = activation(6, 320, key), codes(130, 320, block_key(dtype, *PER_TENSOR))
    expected = linear(x, (w, torch.full((130, 1), 0.3), block_key(dtype, 1, -1), None))
    assert_same(fused_ops.scaled_linear(x, w, torch.full(shape, 0.3), out_dtype=torch.float32), expected)
    assert_same(linear(x, (w, torch.full(shape, 0.3), block_key(dtype, *PER_TENSOR), None)), expected)


# --- values that aren't numbers, or hardly ---

NAN = {FP8: (0x7F, 0xFF), FP8_FNUZ: (0x80, 0x80)}  # codes


@pytest.mark.parametrize("key", [k for k in KEYS if k.dtype in NAN], ids=str)
@each_backend
def test_nan_reaches_its_row_or_column_and_no_other(backend, key):
    cols = 576 + 1 - multiple(key) % 2
    cols += -cols % multiple(key)
    for tokens, at in product((1, 3, 6), (0, 299, cols - 1)):
        x, w = activation(tokens, cols, key), weight(70, cols, usual_weight(key))
        w[0].view(torch.uint8)[[41, 66], at] = torch.tensor(NAN[w[0].dtype], dtype=torch.uint8)
        expected = torch.zeros(tokens, 70, dtype=torch.bool)
        expected[:, [41, 66]] = True
        if tokens == 6:
            x.data.view(torch.uint8)[2, at] = NAN[key.dtype][1]
            expected[2] = True
        for dtype in DTYPES:
            with fused_ops.use_backend(backend):
                y = linear(x, w, dtype=dtype)
            assert torch.equal(y.isnan(), expected)


@compiled_only
@each_key
def test_an_activation_that_is_not_finite_gives_nan(key):
    """From the input to the product: where codes have no NaN, their scale has."""
    x = torch.randn(6, 320)
    x[1, 7], x[3, 200], x[5] = float("nan"), float("inf"), 0
    w = weight(20, 320, usual_weight(key))
    if key.scale.static or (key.per_tensor and not key.symmetric):
        pytest.skip("a static scale doesn't know its inputs; no kernel makes dynamic asymmetric tensors")
    q = fused_ops.quantize(x, key, **({"scale2": torch.ones(1)} if key.scale2 else {}))
    y = linear(q, w, dtype=torch.bfloat16)
    if key.per_tensor:
        assert y.isnan().all()
        return
    assert torch.equal(y.isnan(), torch.tensor([0, 1, 0, 1, 0, 0]).bool()[:, None].expand(6, 20))
    assert (y[5] == 0).all()


@compiled_only
@each_key
def test_subnormals_count_even_where_the_caller_flushes_them(key):
    x, w = activation(6, 320, key), weight(40, 320, usual_weight(key))
    small = {FP4: 0x99, FP8_FNUZ: 0x07}.get(key.dtype, 0x87)
    for tensor in x.data, w[0]:
        tensor.view(torch.uint8).bitwise_and_(small)  # small codes are left
    few = rows(x, slice(1))
    expected = [linear(some, w) for some in (x, few)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        actual = [linear(some, w) for some in (x, few)]
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert e.count_nonzero() > 0
        assert_same(a, e)
    assert_same(actual[1], actual[0][:1])


@each_key
@each_backend
def test_no_rows_or_no_columns(backend, key):
    for tokens, outs in [(0, 7)] + ([(3, 0), (9, 0)] if backend == "cpu" else []):
        x, w = activation(tokens, 160, key), weight(outs, 160, usual_weight(key))
        with fused_ops.use_backend(backend):
            y = linear(x, w, dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == ((tokens, outs), torch.bfloat16)


def test_scales_mean_the_same_where_subnormals_were_flushed_at_import():
    script = (
        "import torch; torch.set_flush_denormal(True); import fused_ops; torch.set_flush_denormal(False)\n"
        "from quant import NVFP4; from fused_ops.linear import quantize_weight\n"
        "torch.manual_seed(0); x, w = torch.randn(2, 64), torch.randn(8, 64) * torch.logspace(-6, 0, 64)\n"
        "q = fused_ops.quantize(x * torch.logspace(-6, 0, 64), NVFP4, scale2=torch.tensor([1e-3]))\n"
        "data, scale, scale2 = quantize_weight(w, NVFP4)\n"
        "print(fused_ops.scaled_linear(q, data, scale, out_dtype=torch.float32, weight_scale2=scale2).tolist())"
    )
    flushed, kept = (
        subprocess.run([sys.executable, "-c", s], capture_output=True, text=True, check=True).stdout
        for s in (script, script.replace("(True)", "(False)"))
    )
    assert flushed == kept
