"""Rows that cross between ranks, which are threads of this process."""

import pytest
import torch
from compare import assert_same
from keys import KEYS, given_tensors, layouts
from ranks import everywhere, workspaces
from test_collective import rows_of_ranks

import fused_ops
from fused_ops import OPS
from fused_ops.collective import summed
from quant import FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN

pytestmark = pytest.mark.skipif("cpu" not in OPS["all_gather"].backends, reason="no compiled kernels on this machine")
GATHERED = [k for key in KEYS.values() if key.scale.static or not key.per_tensor for k in layouts(key)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 16])
def test_rows_of_any_dtype(world):
    made = workspaces(world, 3, 64)
    for tokens in 0, 1, 2, 7, 24, 33:
        for dtype in torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64, torch.complex64:
            whole = torch.randint(-100, 100, (tokens, 24)).to(dtype)
            wide = torch.cat([whole, whole], -1)[:, :24]  # strided
            for y in everywhere(made, lambda w, x=wide, n=tokens: fused_ops.all_gather(x[w.rows(n)], w, rows=n)):
                assert y.dtype == dtype
                assert torch.equal(y, whole), f"{tokens} rows of {dtype}"
    even = torch.randn(4 * world, 5)
    for y in everywhere(made, lambda w: fused_ops.all_gather(even[w.rank * 4 :][:4], w)):
        assert_same(y, even)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("world", [1, 3])
def test_codes_and_scales_are_those_of_all_rows(world, backend):
    """Every key in every layout: what `quantize` makes of all rows at once, but for what pads a layout's rows."""
    made = workspaces(world, 40, 160)
    keys = GATHERED if backend == "cpu" else GATHERED[::3]
    with fused_ops.use_backend(backend):
        for i, key in enumerate(keys):
            tokens = (5, 133, 0, 4, 1, 12)[i % 6]
            x, given = torch.randn(tokens, 160), given_tensors(key)
            expected = fused_ops.quantize(x, key, **given)

            def call(w, x=x, key=key, given=given, tokens=tokens):
                return fused_ops.all_gather_quantized(
                    fused_ops.quantize(x[w.rows(tokens)], key, **given), w, rows=tokens
                )

            for q in everywhere(made, call):
                for name in "data", "scale", "scale2", "zero_point":
                    assert_same(getattr(q, name), getattr(expected, name), f"{key} {tokens} rows: {name}")
                assert (q.quant_key, q.orig_dtype, q.unquantized) == (key, x.dtype, None)


@pytest.mark.parametrize("world", [2, 3])
def test_products(world):
    made = workspaces(world, 8, 64)
    x, weight, bias = torch.randn(7, 64), torch.randn(24, 64), torch.randn(24)
    for y in everywhere(made, lambda w: fused_ops.all_gather_matmul(x[w.rows(7)], weight, w, bias=bias, rows=7)):
        assert_same(y, torch.nn.functional.linear(x, weight, bias))
    q = fused_ops.quantize(x, INT8_DYNAMIC_TOKEN)
    codes = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    scale = torch.rand(24, 1)
    product = fused_ops.scaled_linear(q, codes, scale, bias, out_dtype=torch.float32)

    def gathered(w):
        mine = fused_ops.quantize(x[w.rows(7)], INT8_DYNAMIC_TOKEN)
        return fused_ops.all_gather_matmul(mine, codes, w, weight_scale=scale, bias=bias, rows=7)

    for y in everywhere(made, gathered):
        assert_same(y, product)

    parts = rows_of_ranks(world, 7, 64, torch.float32)
    own = everywhere(made, lambda w: fused_ops.matmul_reduce_scatter(parts[w.rank], weight, w))
    assert_same(torch.cat(own), summed([torch.nn.functional.linear(t, weight) for t in parts]))

    def scattered(w):
        mine = fused_ops.quantize(parts[w.rank], INT8_DYNAMIC_TOKEN)
        return fused_ops.matmul_reduce_scatter(mine, codes, w, weight_scale=scale)

    each = [fused_ops.quantize(t, INT8_DYNAMIC_TOKEN) for t in parts]
    each = [fused_ops.scaled_linear(t, codes, scale, out_dtype=torch.float32) for t in each]
    assert_same(torch.cat(everywhere(made, scattered)), summed(each))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_columns(backend):
    """However many, since none has a byte to exchange."""
    made = workspaces(2, 3, 64, timeout=5)
    with fused_ops.use_backend(backend):
        for count in (0, 1, 5, *([1 << 40] if backend == "cpu" else [])):
            x = torch.empty(count, 0, dtype=torch.int8)
            for y in everywhere(made, lambda w, x=x: fused_ops.all_gather(x, w)):
                assert (y.shape, y.dtype) == ((2 * count, 0), torch.int8)
    for y in everywhere(made, lambda w: fused_ops.all_gather(torch.ones(1, 2), w)):
        assert_same(y, torch.ones(2, 2))


def test_products_refuse_before_anything_is_exchanged():
    """By one rank alone, which would wait for the other, and with the argument's name."""
    w, _ = workspaces(2, 4, 64, timeout=30)
    x, weight, bias = torch.randn(2, 64), torch.randn(24, 64), torch.randn(24)
    q, scale = fused_ops.quantize(x, INT8_DYNAMIC_TOKEN), torch.rand(24, 1)
    codes = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    gather, scatter = fused_ops.all_gather_matmul, fused_ops.matmul_reduce_scatter
    one_scale = fused_ops.quantize(x, FP8_DYNAMIC_TENSOR)
    for name, call, error, message in (
        ("x", lambda op: op([1.0], weight, w), TypeError, r"x is list, expected a Tensor \[T, K\]"),
        ("x's dtype", lambda op: op(x.long(), weight, w), TypeError, "x is torch.int64, expected"),
        ("x's shape", lambda op: op(x[0], weight, w), ValueError, r"x is \[64\], expected \[T, K\]"),
        ("no columns", lambda op: op(x[:, :0], weight[:, :0], w), ValueError, r"x is \[2, 0\]"),
        ("weight", lambda op: op(x, None, w), TypeError, r"weight is NoneType, expected a Tensor \[N, 64\]"),
        (
            "its dtype",
            lambda op: op(x, weight.bfloat16(), w),
            TypeError,
            "weight is torch.bfloat16, expected torch.flo",
        ),
        ("its shape", lambda op: op(x, weight[:, :60], w), ValueError, r"weight is \[24, 60\], expected \[N, 64\]"),
        ("its dimensions", lambda op: op(x, bias, w), ValueError, r"weight is \[24\], expected \[N, 64\]"),
        ("its layout", lambda op: op(x, weight.to_sparse(), w), TypeError, "weight is torch.sparse_coo, expected"),
        ("its device", lambda op: op(x, weight.to("meta"), w), ValueError, "weight is on meta, expected cpu as x"),
        ("no scale", lambda op: op(q, codes, w), ValueError, "weight_scale is None, but x is quantized"),
        ("a scale", lambda op: op(x, x, w, weight_scale=scale), ValueError, "weight_scale is given, but x isn't"),
        ("scale", lambda op: op(q, codes, w, weight_scale=1.0), TypeError, "weight_scale is float, expected a Tensor"),
        ("its shape", lambda op: op(q, codes, w, weight_scale=scale[:3]), ValueError, r"weight_scale is \[3, 1\]"),
        ("codes", lambda op: op(q, codes[:, :60], w, weight_scale=scale), ValueError, r"weight is \[24, 60\] of"),
        ("their dtype", lambda op: op(q, weight, w, weight_scale=scale), TypeError, "weight is torch.float32"),
        ("workspace", lambda op: op(x, weight, w.buffer), TypeError, "workspace is Tensor, expected an AllReduceWork"),
        ("bias", lambda op: gather(x, weight, w, bias=[0.0]), TypeError, r"bias is list, expected a Tensor \[24\]"),
        ("its dtype", lambda op: gather(x, weight, w, bias=bias.half()), TypeError, "bias is torch.float16, expected"),
        ("its shape", lambda op: gather(x, weight, w, bias=bias[:3]), ValueError, r"bias is \[3\], expected \[24\]"),
        ("of codes", lambda op: gather(q, codes, w, weight_scale=scale, bias=bias[:3]), ValueError, r"bias is \[3\]"),
        ("rows", lambda op: gather(x, weight, w, rows=9), ValueError, "expected 5 rows, rank 0's of 9"),
        ("key", lambda op: gather(one_scale, codes, w, weight_scale=scale), ValueError, "quant_key is FP8_DYNAMIC_TEN"),
    ):
        for op in gather, scatter:
            with pytest.raises(error, match=message) as caught:
                call(op)
            assert str(caught.value).startswith(("all_gather", op.__name__, "workspace is")), name


def test_products_take_any_strides():
    (w,) = workspaces(1, 4, 64)
    x, weight = torch.randn(3, 64), torch.randn(64, 24).t()
    assert_same(fused_ops.all_gather_matmul(x, weight, w), torch.nn.functional.linear(x, weight))
    y = torch.nn.functional.linear(x.t().contiguous().t(), weight)
    assert_same(fused_ops.matmul_reduce_scatter(x.t().contiguous().t(), weight, w), y)


def test_what_does_not_fit_is_refused():
    (w,) = workspaces(1, 4, 64)
    x, q = torch.randn(3, 64), fused_ops.quantize(torch.randn(3, 64), FP8_DYNAMIC_TOKEN)
    with pytest.raises(ValueError, match=r"expected 4 rows, rank 0's of 4"):
        fused_ops.all_gather(x, w, rows=4)
    with pytest.raises(ValueError, match="rows is -1"):
        fused_ops.all_gather(x, w, rows=-1)
    with pytest.raises(TypeError, match="rows is float"):
        fused_ops.all_gather(x, w, rows=3.0)
    with pytest.raises(ValueError, match=r"a row of 8192 bytes doesn't fit into it, expected at most 1024"):
        fused_ops.all_gather(torch.randn(1, 2048), w)
    with pytest.raises(TypeError, match="expected a QuantizedActivation"):
        fused_ops.all_gather_quantized(x, w)
    with pytest.raises(ValueError, match="expected static scales, or one a row or group"):
        fused_ops.all_gather_quantized(fused_ops.quantize(x, FP8_DYNAMIC_TENSOR), w)
    with pytest.raises(ValueError, match="weight_scale is None, but x is quantized"):
        fused_ops.all_gather_matmul(q, q.data, w)
    with pytest.raises(ValueError, match="weight_scale is given, but x isn't quantized"):
        fused_ops.matmul_reduce_scatter(x, x, w, weight_scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"residual is \[2, 64\], expected"):
        fused_ops.reduce_scatter_fused_add_rms_norm_quant(x, x[:2], None, 1e-6, None, w)
    assert_same(fused_ops.all_gather(x, w), x)
