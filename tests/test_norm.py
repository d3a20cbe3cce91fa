import math
import subprocess

import pytest
import torch
from compare import assert_close, assert_same, steps

import fused_ops
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    NVFP4,
    QuantizedActivation,
    QuantKey,
    ScaleDesc,
)

KEYS = [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, INT8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN]
needs_kernels = pytest.mark.skipif(
    "cpu" not in fused_ops.OPS["quantize"].backends, reason="no compiled kernels on this machine"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def static(key):
    return {"scale": torch.tensor([0.03])} if key.scale.static else {}


def test_value_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    y = fused_ops.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    y = fused_ops.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0, weight_bias=1.0)
    torch.testing.assert_close(y, torch.tensor([[6.0, 12.0]]) / 12.5**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 31, 32, 576, 4096, 9000])
def test_against_float64(dtype, cols):
    """At most one step of S from the exact result; float32 within 2 ulp beyond the sum's own rounding error."""
    x, w = torch.randn(16, cols).to(dtype), torch.randn(cols).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    apart = steps(fused_ops.rms_norm(x, w, 1e-5), exact.to(dtype))
    assert apart.max() <= (1 if dtype != torch.float32 else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_two_rounding_orders_are_the_ones_of_torch_and_of_llama(dtype):
    x, w = torch.randn(64, 576).to(dtype), torch.randn(576).to(dtype)
    with fused_ops.use_backend("reference"):
        llama = fused_ops.rms_norm(x, w, 1e-5, round_before_weight=True)
        torch_order = fused_ops.rms_norm(x, w, 1e-5)
    variance = x.float().pow(2).mean(-1, keepdim=True)
    assert_same(llama, w * (x.float() * torch.rsqrt(variance + 1e-5)).to(dtype))
    assert_close(torch_order, torch.nn.functional.rms_norm(x, (576,), w, 1e-5))
    assert not torch.equal(llama, torch_order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_fused_is_the_composition_bit_for_bit(key, dtype):
    """Promise 1, through the public functions: add, norm and quantize one after the other."""
    for shape in (3, 576), (2, 2, 1000 if key.scale.group_shape.cols == -1 else 1152), (1, 32):
        x, residual, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
        y = fused_ops.rms_norm(x + residual, w, 1e-6, round_before_weight=True)
        expected = fused_ops.quantize(y, key, **static(key))
        q, r = fused_ops.fused_add_rms_norm_quant(
            x, residual, w, 1e-6, key, round_before_weight=True, keep_unquantized=True, **static(key)
        )
        assert_same(r, x + residual)
        assert_same(q.unquantized, y)
        assert_same(q.data, expected.data)
        assert_same(q.scale, expected.scale)


def test_without_a_key_it_is_the_unquantized_operation():
    x, residual, w = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    y, r = fused_ops.fused_add_rms_norm_quant(x, residual, w, 1e-6, None)
    for a, e in zip((y, r), fused_ops.fused_add_rms_norm(x, residual, w, 1e-6), strict=True):
        assert_same(a, e)
    assert_same(fused_ops.rms_norm_quant(x, w, 1e-6, None), fused_ops.rms_norm(x, w, 1e-6))


def test_the_residual_may_be_updated_in_place():
    x, residual, w = torch.randn(5, 576).bfloat16(), torch.randn(5, 576).bfloat16(), torch.randn(576).bfloat16()
    expected = fused_ops.fused_add_rms_norm_quant(x, residual, w, 1e-6, INT8_DYNAMIC_TOKEN)
    q, r = fused_ops.fused_add_rms_norm_quant(x, residual, w, 1e-6, INT8_DYNAMIC_TOKEN, residual_out=residual)
    assert r is residual
    assert_same(r, expected[1])
    assert_same(q.data, expected[0].data)


def test_x_multiplier_rounds_its_product_first():
    x, residual, w = (torch.randn(9, 96).bfloat16() for _ in range(3))
    y, r = fused_ops.fused_add_rms_norm(x, residual, w[0], 1e-6, x_multiplier=0.22)
    assert_same(r, x * 0.22 + residual)
    assert_same(y, fused_ops.rms_norm(r, w[0], 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, INT8_DYNAMIC_TOKEN], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_poisons_its_group(bad, key, dtype):
    """Promise 5: the norm spreads it over its row, and other rows don't notice."""
    x, w = torch.randn(3, 576).to(dtype), torch.ones(576, dtype=dtype)
    clean = fused_ops.rms_norm_quant(x, w, 1e-6, key)
    x[1, 200] = bad
    q = fused_ops.rms_norm_quant(x, w, 1e-6, key, keep_unquantized=True)
    expected = fused_ops.quantize(q.unquantized, key)
    with fused_ops.use_backend("reference"):
        reference = fused_ops.quantize(q.unquantized, key)
    for row in 0, 2:
        assert_same(q.data[row], clean.data[row])
        assert_same(q.scale[row], clean.scale[row])
    for other in expected, reference:
        assert_same(q.data, other.data)
        assert_same(q.scale, other.scale)
    assert q.scale[1].isnan().any()
    assert q.unquantized[1, 200].isnan()


def test_zero_rows_and_no_rows():
    w = torch.ones(64)
    q = fused_ops.rms_norm_quant(torch.zeros(2, 64), w, 1e-6, FP8_DYNAMIC_TOKEN)
    assert (q.data.view(torch.uint8) == 0).all()
    assert (q.scale == torch.tensor(1 / (448 * 512))).all()
    q = fused_ops.rms_norm_quant(torch.empty(0, 64), w, 1e-6, FP8_DYNAMIC_TOKEN)
    assert (q.data.shape, q.scale.shape) == ((0, 64), (0, 1))


@pytest.fixture
def huge_memory_is_not_filled():
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.mark.usefixtures("huge_memory_is_not_filled")
@pytest.mark.parametrize("key", [None, INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128], ids=str)
def test_more_than_2_31_elements(key, untouched_memory):
    """Rows a gigabyte apart, over memory that is never touched in between: 64-bit offsets."""
    x = torch.empty(2**32 - 2**30 + 64, dtype=torch.bfloat16).as_strided((4, 64), (2**30, 1))
    x.copy_(torch.randn(4, 64))
    w = torch.randn(64).bfloat16()
    y, expected = (fused_ops.rms_norm_quant(t, w, 1e-6, key) for t in (x, x.contiguous()))
    if key is not None:
        assert_same(y.scale, expected.scale)
        y, expected = y.data, expected.data
    assert_same(y, expected)
    out = torch.empty(2**32 - 2**30 + 64, dtype=torch.bfloat16).as_strided((4, 64), (2**30, 1))
    assert_same(fused_ops.rms_norm(x, w, 1e-6, out=out).contiguous(), fused_ops.rms_norm(x.contiguous(), w, 1e-6))


def test_leading_dimensions_need_not_collapse():
    x, w = torch.randn(5, 4, 64).transpose(0, 1), torch.randn(64)
    assert_same(fused_ops.rms_norm(x, w, 1e-6), fused_ops.rms_norm(x.contiguous(), w, 1e-6))


def test_a_backward_pass_raises_by_name():
    x, w = torch.randn(2, 64), torch.nn.Parameter(torch.ones(64))
    y = fused_ops.rms_norm(x, w, 1e-6)
    with pytest.raises(RuntimeError, match="rms_norm is for inference only"):
        y.sum().backward()
    with torch.no_grad():
        assert not fused_ops.rms_norm(x, w, 1e-6).requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fused_ops.fused_add_rms_norm(x, R, W, 1e-6, x_multiplier=0.5)[0],
        lambda x: fused_ops.rms_norm(x, W, 1e-6, out=torch.empty(2, 64)),
        lambda x: fused_ops.rms_norm_quant(x, W, 1e-6, FP8_DYNAMIC_TOKEN, keep_unquantized=True).unquantized,
        lambda x: fused_ops.relu2(x[None], tokens_per_expert=torch.tensor([2])),
    ],
)
def test_a_backward_pass_raises_where_outputs_were_written(call):
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="is for inference only and has no gradient"):
        (call(x).sum() + x.sum()).backward()
    with torch.no_grad():
        assert not call(x).requires_grad


GROUP_48 = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 48))
WEIGHTS = QuantKey(torch.int8, ScaleDesc(torch.float32, True, (128, 128)))
X, R, W = torch.ones(2, 64), torch.ones(2, 64), torch.ones(64)
GOOD = {"x": X, "residual": R, "weight": W, "eps": 1e-6, "quant_key": INT8_DYNAMIC_TOKEN}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x is torch.int32, expected"),
        ({"x": X[:, ::2]}, ValueError, r"x has strides \(64, 2\), expected a contiguous last dimension"),
        ({"x": [1.0]}, TypeError, "x is list, expected a Tensor"),
        ({"x": None}, TypeError, "x is None, expected a Tensor"),
        ({"residual": R[:1]}, ValueError, r"residual is \[1, 64\], expected \[2, 64\]"),
        ({"residual": R.half()}, TypeError, "residual is torch.float16, expected torch.float32 as x"),
        ({"weight": W[:7]}, ValueError, r"weight is \[7\], expected \[64\]"),
        ({"weight": X.to("meta")[0]}, ValueError, "weight is on meta, expected cpu as x"),
        ({"eps": "small"}, TypeError, "eps is str, expected a number"),
        ({"eps": -1e-6}, ValueError, "eps is -1e-06, expected at least 0"),
        ({"eps": math.nan}, ValueError, "eps is nan, expected at least 0"),
        ({"weight_bias": 0.5}, ValueError, "weight_bias is 0.5"),
        ({"scale": torch.ones(1)}, ValueError, "scale is given, but INT8_DYNAMIC_TOKEN takes none"),
        ({"quant_key": FP8_STATIC_TENSOR}, ValueError, "scale is None, FP8_STATIC_TENSOR takes"),
        ({"quant_key": FP8_STATIC_TENSOR, "scale": 1.0}, TypeError, "scale is float"),
        ({"quant_key": FP8_STATIC_TENSOR, "scale": torch.ones(2)}, ValueError, r"scale is \[2\]"),
        ({"quant_key": FP8_STATIC_TENSOR, "scale": torch.ones(1).double()}, TypeError, "scale is torch.float64"),
        ({"scale_ub": torch.ones(1)}, ValueError, "scale_ub is given, but INT8_DYNAMIC_TOKEN takes none"),
        ({"quant_key": NVFP4}, ValueError, "scale2 is None, NVFP4 takes"),
        ({"quant_key": "int8"}, TypeError, "quant_key is str, expected a QuantKey"),
        ({"quant_key": WEIGHTS}, ValueError, "quant_key has groups that span rows"),
        ({"quant_key": None, "scale": torch.ones(1)}, ValueError, "scale is given, but quant_key is None"),
        ({"quant_key": None, "keep_unquantized": True}, ValueError, "keep_unquantized is given, but quant_key is None"),
        ({"zero_point": torch.zeros(1).int()}, ValueError, "zero_point is given, but INT8_DYNAMIC_TOKEN takes none"),
        ({"residual_out": W.view(1, 64).expand(2, 64)}, ValueError, "its rows share memory"),
        pytest.param({"quant_key": GROUP_48}, ValueError, "the cpu backend does not serve .*48", marks=needs_kernels),
        ({"pad_rows": 0}, ValueError, "pad_rows is 0, expected an int of at least 1"),
        ({"out": torch.empty(2, 64)}, TypeError, "out is Tensor, expected a QuantizedActivation"),
        ({"residual_out": torch.empty(2, 65)}, ValueError, r"residual_out is \[2, 65\]"),
        ({"residual_out": torch.empty(64).expand(2, 64)}, ValueError, "its rows share memory"),
        ({"residual_out": W.expand(2, 64)}, ValueError, "its rows share memory"),
    ],
)
def test_errors_name_argument_got_and_expected(change, error, message):
    with pytest.raises(error, match="fused_add_rms_norm_quant: .*" + message):
        fused_ops.fused_add_rms_norm_quant(**GOOD | change)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_the_weight_is_never_lost(dtype, weight_dtype):
    """Whatever its payload: one with every bit set could carry over into a zero when it is rounded."""
    x, w = torch.randn(2, 96).to(dtype), torch.ones(96).to(weight_dtype)
    w.view(torch.int32 if weight_dtype == torch.float32 else torch.int16)[[5, 40]] = (
        0x7FFFFFFF if weight_dtype == torch.float32 else 0x7FFF
    )
    for round_before_weight in False, True:
        y = fused_ops.rms_norm(x, w, 1e-6, round_before_weight=round_before_weight)
        assert y.isnan().nonzero().tolist() == [[0, 5], [0, 40], [1, 5], [1, 40]]


def test_a_static_scale_replaces_the_one_of_the_given_output():
    x = torch.randn(2, 64)
    out = fused_ops.quantize(x, FP8_STATIC_TENSOR, scale=torch.tensor([1.0]))
    again = fused_ops.quantize(x, FP8_STATIC_TENSOR, scale=torch.tensor([0.01]), out=out)
    assert again.data is out.data
    assert again.scale.item() == torch.tensor(0.01)
    assert (again.dequantize() - x).abs().max() < 0.2


@needs_kernels
@pytest.mark.parametrize("code", [-1, (-128 << 16) | 2, 2 | 1 << 6, 1 << 7 | 128 << 16, 15, 1 << 62], ids=hex)
def test_codes_of_no_key_are_refused_by_the_kernels(code):
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.fused_ops.quantize(torch.randn(4, 64), code, None)


def test_outputs_that_overlap_inputs_are_refused():
    one, weight = torch.ones(1, 64), torch.ones(64)
    with pytest.raises(ValueError, match="residual_out: overlaps another argument"):
        fused_ops.fused_add_rms_norm(one, one.clone(), weight, 1e-6, residual_out=weight.view(1, 64))
    memory = torch.ones(4, 64)
    with pytest.raises(ValueError, match="rms_norm: out: overlaps another argument"):
        fused_ops.rms_norm(memory[:3], W, 1e-6, out=memory[1:])
    packed = torch.randn(4, 128)
    expected = fused_ops.rms_norm(packed[:, :64], W, 1e-6)
    assert_same(fused_ops.rms_norm(packed[:, :64], W, 1e-6, out=packed[:, 64:]).contiguous(), expected)


@pytest.mark.parametrize("backend", fused_ops.OPS["fused_add_rms_norm"].backends)
def test_outputs_that_share_memory_are_refused_on_every_backend(backend):
    whole = torch.zeros(4 * 64)
    y = whole[:128].view(2, 64)
    sharing = {
        "the same": (y, y),
        "a row": (y, whole[64:192].view(2, 64)),
        "a view": (y, y[:]),
        "its own rows": (whole.as_strided((2, 64), (32, 1)), torch.empty(2, 64)),
    }
    with fused_ops.use_backend(backend):
        for name, (out, residual_out) in sharing.items():
            with pytest.raises(ValueError, match=r"shares? memory|overlaps?"):
                fused_ops.fused_add_rms_norm(X, R, W, 1e-6, out=out, residual_out=residual_out)
            assert not whole.any(), name
        packed = whole.view(2, 128)
        fused_ops.fused_add_rms_norm(X, R, W, 1e-6, out=packed[:, :64], residual_out=packed[:, 64:])


def test_pad_rows_and_out():
    x = torch.randn(5, 64)
    expected = fused_ops.rms_norm_quant(x, W, 1e-6, FP8_DYNAMIC_TOKEN)
    padded = fused_ops.rms_norm_quant(x, W, 1e-6, FP8_DYNAMIC_TOKEN, pad_rows=4)
    assert padded.data.untyped_storage().nbytes() == 8 * 64
    assert_same(padded.data, expected.data)
    out = QuantizedActivation(
        torch.empty_like(expected.data), torch.empty_like(expected.scale), FP8_DYNAMIC_TOKEN, x.dtype
    )
    assert fused_ops.rms_norm_quant(x, W, 1e-6, FP8_DYNAMIC_TOKEN, out=out) is out
    assert_same(out.data, expected.data)
    assert_same(out.scale, expected.scale)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [FP8_DYNAMIC_GROUP_128, INT8_DYNAMIC_TOKEN], ids=str)
def test_results_that_no_cache_holds(key, dtype):
    """Results larger than the last-level cache are written around it: the same bits as in pieces."""
    cache = int(subprocess.run(["getconf", "LEVEL3_CACHE_SIZE"], capture_output=True).stdout or 0)
    cols = 4096
    rows = (cache if cache > 0 else 32 << 20) // (cols * (dtype.itemsize + 1)) + 1
    x, residual, w = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype), torch.randn(cols)
    q, r = fused_ops.fused_add_rms_norm_quant(x, residual, w, 1e-6, key)
    for some in (slice(i, min(i + rows // 3 + 1, rows)) for i in range(0, rows, rows // 3 + 1)):
        expected, sums = fused_ops.fused_add_rms_norm_quant(x[some], residual[some], w, 1e-6, key)
        assert_same(q.data[some], expected.data)
        assert_same(q.scale[some], expected.scale)
        assert_same(r[some], sums)


def test_denormals_are_kept_where_the_caller_flushes_them():
    x = torch.full((2, 64), 1e-39)
    expected = fused_ops.rms_norm(x, None, 0.0), fused_ops.fused_add_rms_norm(x, x, None, 1e-6)[1]
    torch.set_flush_denormal(True)
    try:
        actual = fused_ops.rms_norm(x, None, 0.0), fused_ops.fused_add_rms_norm(x, x, None, 1e-6)[1]
    finally:
        torch.set_flush_denormal(False)
    assert expected[1].count_nonzero() == x.numel()
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


@pytest.mark.parametrize(
    "option", [{"keep_unquantized": 1}, {"out": 1}, {"out": False}, {"zero_point": 1}, {"pad_rows": False}], ids=str
)
def test_options_of_a_wrong_kind_are_not_taken_for_absent(option):
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        fused_ops.rms_norm_quant(torch.randn(4, 64), None, 1e-6, FP8_DYNAMIC_TOKEN, **option)
