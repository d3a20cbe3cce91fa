"""Products of quantized operands, on every path of the compiled kernels.

Few rows take another path than many (5 and more), and rows beyond 256 another pass over the weight.
"""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from compare import assert_same
from torch import Tensor

import fused_ops
from fused_ops.linear import decode_weight
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP8,
    QuantizedActivation,
    QuantKey,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT8_KEYS = [INT8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN]
FP8_KEYS = [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128]
KEYS = FP8_KEYS + INT8_KEYS
COLS = [1, 7, 31, 100, 129, 577, 1100]  # odd ones, short last groups and blocks, vectors that end within 32 codes
COMPILED = "cpu" in fused_ops.OPS["scaled_linear"].backends
compiled_only = pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")


def codes(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every code of the format is as likely as any other, NaN excepted."""
    random = torch.randint(0, 256, shape, dtype=torch.uint8)
    if dtype != torch.int8:
        random = random.where(random & 0x7F != 0x7F, random - 1)
    return random.view(dtype)


def activation(tokens: int, cols: int, key: QuantKey) -> QuantizedActivation:
    shape = (1,) if key.scale.static else (tokens, key.groups(cols))
    return QuantizedActivation(codes(tokens, cols, dtype=key.dtype), torch.rand(shape) + 0.01, key, torch.float32)


def weight(outs: int, cols: int, key: QuantKey) -> tuple[Tensor, Tensor]:
    grouped = key == FP8_DYNAMIC_GROUP_128
    shape = (-(-outs // 128), -(-cols // 128)) if grouped else (outs, 1)
    return codes(outs, cols, dtype=key.dtype), torch.rand(shape) + 0.01


def rows(x: QuantizedActivation, index) -> QuantizedActivation:
    scale = x.scale if x.quant_key.scale.static else x.scale[index].contiguous()
    return QuantizedActivation(x.data[index], scale, x.quant_key, x.orig_dtype)


def scaled(x: QuantizedActivation, scale: Tensor) -> QuantizedActivation:
    return QuantizedActivation(x.data, scale, x.quant_key, x.orig_dtype)


def decoded(x: QuantizedActivation) -> Tensor:
    """float64, exact: the product of a code and its scale has at most 32 bits."""
    scale = x.scale.double()
    if x.quant_key.scale.group_shape.cols == 128:
        scale = scale.repeat_interleave(128, 1)[:, : x.data.shape[1]]
    return x.data.double() * scale


def decoded_weight(w: Tensor, scale: Tensor) -> Tensor:
    return w.double() * decode_weight(torch.ones(w.shape), scale).double()


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["scaled_linear"].backends))
def test_against_float64(backend, key, cols):
    """Within the rounding of a float32 sum of so many terms."""
    for tokens, outs in product((1, 2, 3, 4, 5, 33), (1, 7, 130)):
        x, (w, scale) = activation(tokens, cols, key), weight(outs, cols, key)
        with fused_ops.use_backend(backend):
            y = fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32)
        exact_x, exact_w = decoded(x), decoded_weight(w, scale)
        terms = min(cols, 80) if backend == "cpu" else cols
        bound = (terms + 4) * 2.0**-24 * (exact_x.abs() @ exact_w.abs().t())
        assert ((y.double() - exact_x @ exact_w.t()).abs() <= bound).all()


@compiled_only
@pytest.mark.parametrize("cols", [*COLS, 200_000])
@pytest.mark.parametrize("key", INT8_KEYS, ids=str)
def test_int8_sums_are_exact(key, cols):
    """For every code, -128 on both sides included, and where the sum doesn't fit 32 bits."""
    for tokens in (1, 2, 6):
        x, (w, scale) = activation(tokens, cols, key), weight(9, cols, key)
        x.data[0], w[0] = -128, -128
        sums = x.data.double() @ w.double().t()  # integers below 2^53
        expected = (sums * (x.scale.double() * scale.double().t())).float()
        assert_same(fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32), expected)
    assert sums[0, 0] == 128 * 128 * cols


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["scaled_linear"].backends))
def test_every_product_of_two_codes(backend, dtype, tokens):
    key = INT8_STATIC_TENSOR if dtype == torch.int8 else FP8_STATIC_TENSOR
    every, one = torch.arange(256, dtype=torch.uint8).view(dtype)[:, None], torch.ones(1)
    for code in every.split(tokens):
        x = QuantizedActivation(code, one, key, torch.float32)
        with fused_ops.use_backend(backend):
            y = fused_ops.scaled_linear(x, every, one, out_dtype=torch.float32)
        torch.testing.assert_close(y, code.float() @ every.float().t(), rtol=0, atol=0, equal_nan=True)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_bias_and_rounding(key, dtype):
    """The float32 result, plus the bias in float32, rounded once."""
    for tokens, outs in (2, 131), (7, 35):
        x, (w, scale) = activation(tokens, 200, key), weight(outs, 200, key)
        plain = fused_ops.scaled_linear(x, w, scale * 1e-3, out_dtype=torch.float32)
        assert_same(fused_ops.scaled_linear(x, w, scale * 1e-3, out_dtype=dtype), plain.to(dtype))
        for bias_dtype in DTYPES:
            bias = torch.randn(outs).to(bias_dtype)
            y = fused_ops.scaled_linear(x, w, scale * 1e-3, bias, out_dtype=dtype)
            assert_same(y, (plain + bias.float()).to(dtype))


@compiled_only
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("key", [k for k in KEYS if k != FP8_DYNAMIC_GROUP_128], ids=str)
def test_one_scale_for_the_whole_weight(key, shape):
    x, (w, _) = activation(6, 300, key), weight(130, 300, key)
    expected = fused_ops.scaled_linear(x, w, torch.full((130, 1), 0.3), out_dtype=torch.float32)
    assert_same(fused_ops.scaled_linear(x, w, torch.full(shape, 0.3), out_dtype=torch.float32), expected)


@compiled_only
@pytest.mark.parametrize("shape", [(1,), (300, 1), (3, 5)], ids=str)
@pytest.mark.parametrize(
    "key", [INT8_DYNAMIC_GROUP_128, FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True)], ids=str
)
def test_groups_with_any_scale_of_the_weight(key, shape):
    for tokens in (1, 7):
        x, w = activation(tokens, 577, key), codes(300, 577, dtype=key.dtype)
        scale = torch.rand(shape) + 0.01
        y = fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32)
        exact_x, exact_w = decoded(x), decoded_weight(w, scale)
        bound = 20 * 2.0**-24 * (exact_x.abs() @ exact_w.abs().t())
        assert ((y.double() - exact_x @ exact_w.t()).abs() <= bound).all()


@compiled_only
@pytest.mark.parametrize("cols", [7, 577, 1100])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(key, cols):
    """Promise 2: in a batch of any size, wherever it stands, strided, with leading dimensions, on one thread or two."""
    x, (w, scale) = activation(260, cols, key), weight(203, cols, key)

    def run(some: QuantizedActivation) -> Tensor:
        return fused_ops.scaled_linear(some, w, scale, out_dtype=torch.float32)

    whole = run(x)
    for first, size in (0, 1), (131, 1), (259, 1), (1, 2), (2, 3), (5, 4), (250, 5), (7, 33), (3, 256):
        here = slice(first, first + size)
        assert_same(run(rows(x, here)), whole[here], f"rows {first} to {first + size}")
    gaps = torch.stack([x.data, x.data], dim=1).flatten(1)[:, :cols]
    assert gaps.stride(0) == 2 * cols
    assert_same(run(QuantizedActivation(gaps, x.scale, key, x.orig_dtype)), whole)
    wide = torch.cat([w, w], dim=1)[:, :cols]
    assert_same(fused_ops.scaled_linear(x, wide, scale, out_dtype=torch.float32), whole, "weight with a row stride")
    cube = gaps.unflatten(0, (13, 20)).transpose(0, 1)
    vector = QuantizedActivation(x.data[3], rows(x, slice(3, 4)).scale, key, x.orig_dtype)
    assert_same(run(vector), whole[3])
    order = torch.arange(260).unflatten(0, (13, 20)).t().flatten()
    turned = rows(x, order)
    assert_same(run(QuantizedActivation(cube, turned.scale, key, x.orig_dtype)).flatten(0, 1), whole[order])
    before = torch.get_num_threads()
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            assert_same(run(x), whole, f"{threads} threads")
            assert_same(run(rows(x, slice(4, 5))), whole[4:5], f"{threads} threads, one row")
    finally:
        torch.set_num_threads(before)


@compiled_only
def test_instruction_sets_give_the_same_bits():
    """Promise 2: every path, by the portable kernels and the AVX2 ones in processes of their own."""
    script = """
import hashlib, torch, fused_ops
from compare import raw
from test_linear import COLS, KEYS, activation, weight
torch.manual_seed(0)
for key in KEYS:
    digest = hashlib.sha256()
    for cols in COLS:
        for tokens in 1, 2, 3, 4, 8:
            x, (w, scale) = activation(tokens, cols, key), weight(37, cols, key)
            w.view(torch.uint8)[5, cols // 2] = 0xFF  # NaN in FP8
            digest.update(raw(fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32)).numpy().tobytes())
    print(key, digest.hexdigest())
"""
    printed = [run_python(script, FUSED_OPS_ISA=isa) for isa in ("base", "")]
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) == len(KEYS)


def run_python(script: str, **environment: str) -> str:
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **environment, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"exit status {done.returncode}"
    return done.stdout


@pytest.mark.skipif(not COMPILED or sys.platform != "linux", reason="needs compiled kernels and mprotect")
def test_nothing_behind_the_tensors_is_read():
    """Weight, activation and scales each end where an inaccessible page begins."""
    run_python("""
import ctypes, mmap, torch, fused_ops
from test_linear import COLS, KEYS, activation, weight
libc, page, kept = ctypes.CDLL(None), mmap.PAGESIZE, []
def guarded(tensor):
    bytes = tensor.contiguous().view(torch.uint8)
    size = (bytes.numel() + page - 1) // page * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size)[size - bytes.numel():]
    copy.copy_(bytes.flatten())
    return copy.view(tensor.dtype).view(tensor.shape)
for key in KEYS:
    for cols in COLS:
        for tokens in 1, 4, 7:
            x, (w, scale) = activation(tokens, cols, key), weight(37, cols, key)
            x.__dict__["data"], x.__dict__["scale"] = guarded(x.data), guarded(x.scale)
            bias = guarded(torch.zeros(37))
            fused_ops.scaled_linear(x, guarded(w), guarded(scale), bias, out_dtype=torch.float32)
""")


@pytest.mark.parametrize("key", FP8_KEYS, ids=str)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["scaled_linear"].backends))
def test_nan_reaches_its_row_or_column_and_no_other(backend, key):
    for tokens, at in product((1, 3, 6), (0, 299, 576)):
        x, (w, scale) = activation(tokens, 577, key), weight(70, 577, key)
        w.view(torch.uint8)[41, at] = 0x7F
        w.view(torch.uint8)[66, at] = 0xFF
        expected = torch.zeros(tokens, 70, dtype=torch.bool)
        expected[:, [41, 66]] = True
        if tokens == 6:
            x.data.view(torch.uint8)[2, at] = 0xFF
            expected[2] = True
            if not key.scale.static:
                x.scale[4, at // 128 if x.scale.shape[1] > 1 else 0] = float("nan")
                expected[4] = True
        for dtype in DTYPES:
            with fused_ops.use_backend(backend):
                y = fused_ops.scaled_linear(x, w, scale * 1e-3, out_dtype=dtype)
            assert torch.equal(y.isnan(), expected)


@compiled_only
def test_an_activation_that_is_not_finite_gives_nan():
    """From the input to the product: INT8 has no code for NaN, its scale has."""
    for key in KEYS:
        if key.scale.static:
            continue
        x = torch.randn(6, 300)
        x[1, 7], x[3, 200], x[5] = float("nan"), float("inf"), 0
        w, scale = weight(20, 300, key)
        y = fused_ops.scaled_linear(fused_ops.quantize(x, key), w, scale, out_dtype=torch.bfloat16)
        assert torch.equal(y.isnan(), torch.tensor([0, 1, 0, 1, 0, 0]).bool()[:, None].expand(6, 20))
        assert (y[5] == 0).all()


@compiled_only
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_subnormals_count_even_where_the_caller_flushes_them(key):
    x, (w, scale) = activation(6, 300, key), weight(40, 300, key)
    for tensor in x.data, w:
        tensor.view(torch.uint8).bitwise_and_(0x87)  # of FP8, zeros and subnormals are left
    few = rows(x, slice(1))
    expected = [fused_ops.scaled_linear(some, w, scale, out_dtype=torch.float32) for some in (x, few)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormals")
    try:
        actual = [fused_ops.scaled_linear(some, w, scale, out_dtype=torch.float32) for some in (x, few)]
    finally:
        torch.set_flush_denormal(False)
    for a, e in zip(actual, expected, strict=True):
        assert e.count_nonzero() > 0
        assert_same(a, e)
    assert_same(actual[1], actual[0][:1])


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["scaled_linear"].backends))
def test_no_rows_or_no_columns(backend, key):
    for tokens, outs in [(0, 7)] + ([(3, 0), (9, 0)] if backend == "cpu" else []):
        x, (w, scale) = activation(tokens, 130, key), weight(outs, 130, key)
        with fused_ops.use_backend(backend):
            y = fused_ops.scaled_linear(x, w, scale, out_dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == ((tokens, outs), torch.bfloat16)


def test_out_is_written_and_nothing_beside_it():
    x, (w, scale) = activation(3, 64, INT8_DYNAMIC_TOKEN), weight(8, 64, INT8_DYNAMIC_TOKEN)
    expected = fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32)
    wide = torch.full((3, 20), 7.0)
    out = fused_ops.scaled_linear(x, w, scale, out_dtype=torch.float32, out=wide[:, 4:12])
    assert out.data_ptr() == wide[:, 4:].data_ptr()
    assert_same(out.contiguous(), expected)
    assert (wide[:, :4] == 7).all()
    assert (wide[:, 12:] == 7).all()


@compiled_only
@pytest.mark.parametrize("name", ["data", "weight", "scale", "weight_scale", "bias"])
def test_out_must_not_be_an_input(name):
    x, (w, scale) = activation(1, 64, INT8_DYNAMIC_TOKEN), weight(64, 64, INT8_DYNAMIC_TOKEN)
    inputs = {"data": x.data, "weight": w, "scale": x.scale, "weight_scale": scale, "bias": torch.randn(64)}
    storage, given = torch.zeros(1024), inputs[name]
    place = storage.view(given.dtype)[: given.numel()].view(given.shape)
    inputs[name] = place.copy_(given)
    x = QuantizedActivation(inputs["data"], inputs["scale"], INT8_DYNAMIC_TOKEN, torch.float32)
    with pytest.raises(ValueError, match="y_out"):
        fused_ops.scaled_linear(
            x, inputs["weight"], inputs["weight_scale"], inputs["bias"], out_dtype=torch.float32, out=storage[None, :64]
        )
    assert_same(place, given)


X, (W, W_SCALE) = activation(3, 300, FP8_DYNAMIC_TOKEN), weight(40, 300, FP8_DYNAMIC_TOKEN)
GROUPED = activation(3, 300, FP8_DYNAMIC_GROUP_128)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": X.data}, TypeError, "activation is Tensor, expected a QuantizedActivation"),
        ({"activation": activation(3, 320, MXFP8)}, ValueError, "activation is MXFP8"),
        ({"activation": activation(3, 299, FP8_DYNAMIC_TOKEN)}, ValueError, r"weight is \[40, 300\]"),
        ({"activation": activation(3, 300, INT8_DYNAMIC_TOKEN)}, TypeError, "weight is torch.float8_e4m3fn"),
        ({"activation": GROUPED, "weight_scale": torch.ones(1, 2)}, ValueError, r"weight_scale is \[1, 2\]"),
        ({"activation": scaled(X, torch.ones(2, 1))}, ValueError, r"scale is \[2, 1\]"),
        ({"activation": scaled(X, torch.ones(3, 2))}, ValueError, r"scale is \[3, 2\]"),
        ({"activation": scaled(X, torch.ones(3, 1).half())}, TypeError, "scale is torch.float16"),
        ({"weight": W[None]}, ValueError, r"weight is \[1, 40, 300\]"),
        ({"weight": codes(300, 40, dtype=W.dtype).t()}, ValueError, "weight has strides"),
        ({"weight_scale": W_SCALE[:39]}, ValueError, r"weight_scale is \[39, 1\]"),
        ({"weight_scale": W_SCALE.double()}, TypeError, "weight_scale is torch.float64, expected torch.float32"),
        ({"weight_scale": torch.ones(80, 1)[::2]}, ValueError, r"weight_scale is \[40, 1\] with strides \(2, 1\)"),
        ({"weight_scale": torch.ones(1, 3)}, ValueError, r"weight_scale is \[1, 3\]"),
        ({"bias": torch.ones(39)}, ValueError, r"bias is \[39\], expected \[40\]"),
        ({"bias": torch.ones(40).double()}, TypeError, "bias is torch.float64"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64"),
        ({"out": torch.ones(3, 41)}, ValueError, r"y is \[3, 41\]"),
        ({"out": torch.ones(3, 40).half()}, TypeError, "y is torch.float16"),
    ],
)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["scaled_linear"].backends))
def test_errors_name_argument_got_and_expected(backend, change, error, message):
    out = torch.full((3, 40), 7.0)
    arguments = {
        "activation": X,
        "weight": W,
        "weight_scale": W_SCALE,
        "out_dtype": torch.float32,
        "out": out,
        **change,
    }
    with fused_ops.use_backend(backend), pytest.raises(error, match=message):
        fused_ops.scaled_linear(**{**arguments, **change})
    assert (out == 7).all()
