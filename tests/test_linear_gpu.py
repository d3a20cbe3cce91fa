"""GPUs' products without a GPU: what is handed to torch, by its own rules and decoded; test_gpu_linear.py has the rest.

Layers are laid out on the CPU as for a GPU, and `scaled_linear` runs GPUs' products there, in the place of the kernels.
"""

from dataclasses import replace

import pytest
import torch
from compare import assert_close, assert_same
from linear_gpu_double import (
    COLS,
    DTYPES,
    INT8,
    OUTS,
    PLACES,
    ROWWISE,
    Decoded,
    check,
    check_close,
    each_place,
    halves_only,
    needs_products,
    quantized,
    served,
    stock,
)

import fused_ops
from fused_ops import _flashinfer_linear, linear_products
from fused_ops.linear import exact_values, linear_inputs
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP8,
    ScaleLayout,
)
from quant.key import FP8, FP8_FNUZ
from quant.methods import SCHEMES

# --- which ---


@pytest.mark.parametrize("arch", linear_products.DEVICES)
@pytest.mark.parametrize("flashinfer", [False, True])
def test_a_layer_is_built_or_refused_with_what_would_work(arch, flashinfer, pretend, monkeypatch):
    if not flashinfer:
        monkeypatch.setattr(_flashinfer_linear, "missing", lambda name: "FlashInfer")
    pretend(arch, flashinfer=flashinfer)
    model = stock()
    for scheme in SCHEMES:
        if scheme in served(arch):
            quantized(scheme, model)
            continue
        with pytest.raises(ValueError, match=f"quantize_model: 0: {arch} has no product of .*; it has .*;") as refused:
            quantized(scheme, model)
        named = str(refused.value).rpartition("there: ")[2]
        assert set(named.split(", ")) == served(arch)


def test_an_unknown_gpu_and_an_old_cuda_have_what_is_known_of_them(pretend, monkeypatch):
    pretend("sm_75")
    with pytest.raises(ValueError, match=r"sm_75 has no product of .*; it has none;"):
        quantized("int8_token", stock())
    pretend("sm_90")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match=r"which needs cuBLAS 12.9 or later on sm_90.*; it has tensor, row, int8;"):
        quantized("fp8_block", stock())
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    quantized("fp8_block", stock())
    pretend("sm_120")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match=r"which needs FlashInfer and CUDA 12\.9 on sm_120 or sm_121; it has tensor"):
        quantized("fp8_block", stock())
    monkeypatch.setattr(torch.version, "cuda", None)
    pretend("gfx950")
    for version in "6.4.1", "7.13.0":
        monkeypatch.setattr(torch.version, "hip", version)
        with pytest.raises(ValueError, match=r"which needs ROCm 7.0 to 7.12 on gfx950; it has tensor, row;"):
            quantized("mxfp8", stock())


@pytest.mark.parametrize(
    ("arch", "scheme", "cols", "outs", "message"),
    [
        ("sm_90", "fp8_token", 648, 256, "K is 648, the row product takes multiples of 16"),
        ("sm_90", "fp8_token", 640, 264, "N is 264, the row product takes multiples of 16"),
        ("sm_90", "fp8_block", 576, 256, "K is 576, the 1x128 product takes multiples of 128"),
        ("sm_90", "int8_token", 640, 258, "N is 258, the int8 product takes multiples of 8"),
        ("sm_100", "nvfp4", 656, 256, "K is 656, the nvfp4 product takes multiples of 32"),
        ("sm_100", "fp8_block", 640, 264, "N is 264, the flashinfer 1x128 sm_10x product takes multiples of 16"),
        ("sm_121", "fp8_block", 640, 576, "N is 576, the flashinfer 1x128 sm_12x product takes multiples of 128"),
        ("sm_100", "mxfp4", 640, 264, "N is 264, the flashinfer mxfp4 product takes multiples of 16"),
        ("gfx950", "mxfp8", 672, 256, "K is 672, the rocm mxfp8 product takes multiples of 128"),
        ("gfx950", "mxfp4", 640, 272, "N is 272, the rocm mxfp4 product takes multiples of 32"),
        ("gfx942", "fp8_token", 648, 256, "K is 648, the fnuz row product takes multiples of 16"),
    ],
)
def test_sizes_that_a_product_does_not_take(arch, scheme, cols, outs, message, pretend):
    pretend(arch)
    with pytest.raises(ValueError, match=f"quantize_model: 0: {message}"):
        quantized(scheme, stock(cols=cols, outs=outs))


# --- what is handed over ---


@each_place
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_the_product_is_that_of_the_decoded_values(scheme, arch, dtype, bias, pretend, decoded):
    """By torch's rules or FlashInfer's, from memory whose padding holds NaN; a row depends on no other."""
    pretend(arch)
    halves, x = halves_only(scheme, arch), torch.randn(150, COLS).to(dtype)
    unmade = halves and dtype == torch.float32
    layer = quantized(scheme, stock(torch.bfloat16 if unmade else dtype, bias is not None))[0]
    layer.bias = None if bias is None else layer.bias.to(bias)
    if unmade:
        with pytest.raises(ValueError, match=r"out_dtype is torch.float32, the .* product makes torch.bfloat16 and"):
            layer(x)
        with pytest.raises(ValueError, match=r"0: the activations' dtype is torch.float32, the .* product makes"):
            quantized(scheme, stock(dtype))
        return
    whole = layer(x)
    for tokens in 1, 3, 4, 16, 17, 33, 150:
        q = fused_ops.quantize(x[:tokens], **layer.input_quant())
        y = layer(q)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((tokens, OUTS), dtype, True)
        check(y, layer, q, f"{tokens} rows", sums=halves and bias is not None)
        if scheme != "int8_static":
            assert_close(y, whole[:tokens])


@each_place
def test_a_producer_makes_what_the_layer_takes(scheme, arch, pretend, decoded):
    pretend(arch)
    x, w = torch.randn(2, 3, COLS).bfloat16(), torch.randn(COLS).bfloat16()
    layer = quantized(scheme, stock(), x)[0]
    q, r = fused_ops.fused_add_rms_norm_quant(x, x, w, 1e-6, **layer.input_quant())
    assert q.quant_key == layer.input_quant_key
    assert layer(q).shape == (2, 3, OUTS)
    assert_same(layer(q), layer(fused_ops.rms_norm(r, w, 1e-6)))


def test_what_layers_ask_for(pretend):
    layouts = {("fp8_block", "sm_90"): ScaleLayout.TMA_ALIGNED}
    layouts |= dict.fromkeys([(s, "sm_100") for s in ("mxfp8", "mxfp4", "nvfp4")], ScaleLayout.SWIZZLED_128X4)
    rows = {("fp8_block", "sm_90"): 4, ("fp8_block", "sm_100"): 36} | dict.fromkeys([(s, "sm_90") for s in INT8], 32)
    rows |= dict.fromkeys([(s, "gfx950") for s in ("mxfp8", "mxfp4")], 32)
    for scheme, arch in PLACES:
        pretend(arch)
        layer = quantized(scheme, stock())[0]
        key = SCHEMES[scheme].input_quant_key
        if arch == "gfx942":
            key = replace(key, dtype=FP8_FNUZ)
        assert layer.input_quant_key == key.with_scale(layout=layouts.get((scheme, arch), ScaleLayout.ROW_MAJOR))
        assert layer.input_quant()["pad_rows"] == rows.get((scheme, arch), 1)
        assert layer.weight.dtype == (FP8_FNUZ if arch == "gfx942" else SCHEMES[scheme].weight_key.storage_dtype)


@needs_products
@pytest.mark.parametrize("scheme", sorted(ROWWISE))
def test_torchs_own_product_on_the_cpu(scheme, pretend):
    pretend("sm_90")
    for dtype in DTYPES:
        layer = quantized(scheme, stock(dtype))[0]
        q = fused_ops.quantize(torch.randn(5, COLS).to(dtype), **layer.input_quant())
        check(layer(q), layer, q, str(dtype))


@needs_products
def test_one_scale_for_either_side(pretend):
    """The tensor product; and mixed with scales of rows."""
    pretend("sm_89")
    for key in FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN:
        x, w, _, _ = linear_inputs(5, COLS, OUTS, key, "cpu")
        one = torch.tensor([0.25])
        y = fused_ops.scaled_linear(x, w, one, out_dtype=torch.bfloat16)
        x, w = exact_values(x.data, x.scale, key), w.double() * 0.25
        check_close(y, x @ w.t(), x.abs() @ w.abs().t(), str(key))


def test_given_results_are_written_without_a_copy_where_that_can_be(pretend, decoded, monkeypatch):
    pretend("sm_90")
    layer = quantized("fp8_block", stock(bias=False))[0]
    written = []
    monkeypatch.setattr(Decoded, "out", lambda self, *a, out: written.append(out) or out.copy_(self.default(*a)))
    for tokens in 4, 5:
        q = fused_ops.quantize(torch.randn(tokens, COLS).bfloat16(), **layer.input_quant())
        for wide in OUTS, OUTS + 16:
            memory = torch.full((tokens, wide), 7.0).bfloat16()
            out = memory[:, :OUTS]
            given = {"out_dtype": torch.bfloat16, "out": out}
            assert fused_ops.scaled_linear(q, layer.weight, layer.weight_scale, **given) is out
            assert_same(out.contiguous(), layer(q))
            assert (memory[:, OUTS:] == 7).all()
    assert len(written) == 1


@pytest.mark.parametrize("shape", [(0, COLS), (2, 0, COLS)], ids=str)
def test_no_rows(shape, pretend):
    for scheme, arch in PLACES:
        pretend(arch)
        y = quantized(scheme, stock())[0](torch.randn(shape).bfloat16())
        assert (y.shape, y.dtype) == ((*shape[:-1], OUTS), torch.bfloat16)


@each_place
def test_compiled(scheme, arch, pretend, decoded):
    """The padding survives what a compiler makes of the graph."""
    torch._dynamo.reset()
    pretend(arch)
    x = torch.randn(5, COLS).bfloat16()
    layer = quantized(scheme, stock(), x)[0]
    with torch.no_grad():
        assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# --- refusals ---


@pytest.mark.parametrize(("scheme", "tokens", "rows", "pads"), [("fp8_block", 5, 8, 4), ("int8_token", 16, 32, 32)])
def test_an_activation_without_padding_is_refused(scheme, tokens, rows, pads, pretend, decoded):
    pretend("sm_90")
    layer, x = quantized(scheme, stock())[0], torch.randn(tokens, COLS).bfloat16()
    q = fused_ops.quantize(x, layer.input_quant_key)
    with pytest.raises(ValueError, match=rf"data is \[{tokens}, 640\].* reads {rows} rows .* pad_rows={pads}"):
        layer(q)
    padded = fused_ops.quantize(x, layer.input_quant_key, pad_rows=pads)
    q = replace(q, data=padded.data)
    if scheme == "fp8_block":
        with pytest.raises(ValueError, match=rf"scale is \[{tokens}, 5\].* pad_rows={pads}"):
            layer(q)


def test_what_the_product_does_not_take(pretend, decoded):
    pretend("sm_90")
    x, w, w_scale, _ = linear_inputs(4, COLS, OUTS, FP8_DYNAMIC_GROUP_128, "cpu")
    with pytest.raises(ValueError, match=r"but activation is FP8_DYNAMIC_GROUP_128, the 1x128 product takes .*TMA_"):
        fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32)
    x, w, w_scale, _ = linear_inputs(4, COLS, OUTS, FP8_DYNAMIC_TOKEN, "cpu")
    odd, apart = torch.zeros(4, COLS + 8).to(FP8)[:, :COLS], torch.zeros(2, 3, COLS).to(FP8)[:, :2]
    for data, message in (odd, "rows of data are 648 bytes apart"), (apart, "data has strides .*, expected rows at"):
        strided = replace(x, data=data)
        with pytest.raises(ValueError, match=message):
            fused_ops.scaled_linear(strided, w, w_scale, out_dtype=torch.float32)
    x, w, w_scale, _ = linear_inputs(40, COLS, OUTS, INT8_DYNAMIC_TOKEN_ASYM, "cpu")
    with pytest.raises(ValueError, match="weight_sums is None, and zero points take"):
        fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32)
    for sums, error in (w.sum(1), TypeError), (torch.zeros(3).int(), ValueError):
        with pytest.raises(error, match="scaled_linear: weight_sums is "):
            fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32, weight_sums=sums)
    pretend("sm_100")
    x, w, w_scale, _ = linear_inputs(4, COLS, OUTS, MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4), "cpu")
    with pytest.raises(ValueError, match=r"but weight is MXFP8, the mxfp8 product takes MXFP8\[SWIZZLED_128X4\]"):
        fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32)


def test_zero_points_of_rows(pretend):
    pretend("sm_80")
    x, w, w_scale, _ = linear_inputs(40, COLS, OUTS, INT8_DYNAMIC_TOKEN_ASYM, "cpu")
    y = fused_ops.scaled_linear(x, w, w_scale, out_dtype=torch.float32, weight_sums=w.sum(1, dtype=torch.int32))
    sums = (x.data.double() - x.zero_point) @ w.double().t()
    assert_close(y, (sums * (x.scale * w_scale.t())).float())
