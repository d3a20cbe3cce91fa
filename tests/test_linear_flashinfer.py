"""FlashInfer's products of linear layers by its double; test_linear_gpu.py has what all products do."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import flashinfer_linear_double as double
import pytest
import torch
from compare import assert_same
from flashinfer_calls import parameters
from linear_gpu_double import COLS, OUTS, quantized, stock

import fused_ops
from fused_ops import _flashinfer, _flashinfer_linear
from quant.key import FP8

MISSING = _flashinfer_linear.missing
PLACES = [("fp8_block", "sm_100"), ("fp8_block", "sm_120"), ("mxfp4", "sm_100")]


@pytest.mark.parametrize(("scheme", "arch"), PLACES)
def test_as_many_rows_as_are_safe_are_handed_over(scheme, arch, pretend, decoded):
    """On sm_100 a product of 1x128 scales never has 32 rows or less."""
    pretend(arch)
    layer = quantized(scheme, stock())[0]
    few = 36 if (scheme, arch) == PLACES[0] else None
    for tokens in 1, 32, 33, 35, 36, 37, 64:
        double.CALLED.clear()
        layer(torch.randn(tokens, COLS).bfloat16())
        assert [(double.NAMES[scheme], few if few and tokens < 33 else tokens)] == double.CALLED


@pytest.mark.parametrize(("scheme", "arch"), PLACES)
@pytest.mark.parametrize("bias", [False, True])
def test_given_results_are_written(scheme, arch, bias, pretend, decoded, monkeypatch):
    """By FlashInfer itself where they are as it needs them."""
    pretend(arch)
    layer, written = quantized(scheme, stock(bias=bias))[0], []
    call = getattr(double.LIBRARY.gemm, double.NAMES[scheme])
    module = SimpleNamespace(
        **{double.NAMES[scheme]: lambda *a, out, **o: written.append(out) or call(*a, out=out, **o)}
    )
    monkeypatch.setattr(_flashinfer, "library", lambda: SimpleNamespace(gemm=module))
    for tokens in 5, 40:
        q = fused_ops.quantize(torch.randn(tokens, COLS).bfloat16(), **layer.input_quant())
        expected = layer(q)
        memory = torch.full((tokens * OUTS + 1,), 7.0).bfloat16()
        apart = torch.full((tokens, OUTS + 8), 7.0).bfloat16()
        for out in memory[:-1].view(tokens, OUTS), memory[1:].view(tokens, OUTS), apart[:, :OUTS]:
            written.clear()
            fused_ops.scaled_linear(q, layer.weight, layer.weight_scale, layer.bias, out_dtype=q.orig_dtype, out=out)
            assert_same(out.contiguous(), expected)
            direct = not bias and out.is_contiguous() and out.data_ptr() % 16 == 0
            direct &= tokens == 40 or (scheme, arch) != PLACES[0]
            assert (written[0].data_ptr() == out.data_ptr()) == direct
        assert (apart[:, OUTS:] == 7).all()


def test_operands_with_gaps_are_refused(pretend, decoded):
    """Its kernels take sizes and pointers, and look at no stride."""
    pretend("sm_100")
    layer = quantized("fp8_block", stock(bias=False))[0]
    q = fused_ops.quantize(torch.randn(40, COLS).bfloat16(), **layer.input_quant())
    options = {"out_dtype": torch.bfloat16}
    wide = torch.zeros(40, COLS + 16).to(FP8)[:, :COLS]
    with pytest.raises(
        ValueError, match=r"rows of data are 656 bytes apart, the .* takes them 640 apart, without gaps"
    ):
        fused_ops.scaled_linear(replace(q, data=wide), layer.weight, layer.weight_scale, **options)
    wide = torch.zeros(OUTS, COLS + 16).to(FP8)[:, :COLS]
    with pytest.raises(ValueError, match="rows of weight are 656 bytes apart"):
        fused_ops.scaled_linear(q, wide, layer.weight_scale, **options)
    hopper = torch.ones(2, 8)[:, :5]  # rows as the product of sm_90 has them
    with pytest.raises(ValueError, match=r"weight_scale has strides \(8, 1\), flashinfer 1x128 sm_10x takes no gaps"):
        fused_ops.scaled_linear(q, layer.weight, hopper, **options)
    assert not double.CALLED


def test_scales_need_memory_for_the_rows_that_are_read(pretend, decoded):
    pretend("sm_100")
    layer = quantized("fp8_block", stock())[0]
    x = torch.randn(5, COLS).bfloat16()
    padded = fused_ops.quantize(x, **layer.input_quant())
    assert padded.scale.untyped_storage().nbytes() == 36 * 5 * 4
    plain = fused_ops.quantize(x, layer.input_quant_key)
    with pytest.raises(ValueError, match=r"scale is \[5, 5\].* reads 36 rows .* pad_rows=36"):
        layer(replace(plain, data=padded.data))


# --- what must be installed ---


@pytest.fixture
def found(monkeypatch):
    """FlashInfer and cuDNN are here."""
    MISSING.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_flashinfer, "library", lambda: double.LIBRARY)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    yield monkeypatch
    MISSING.cache_clear()


def test_nothing_is_missing_where_it_is_called_as_the_double(found):
    assert [MISSING(name) for name in double.NAMES.values()] == ["", ""]


def test_a_layer_says_what_to_install(found, pretend):
    pretend("sm_103", flashinfer=False)
    quantized("fp8_block", stock())
    MISSING.cache_clear()
    found.setattr(importlib.util, "find_spec", lambda name: None)
    how = (
        r"which needs FlashInfer, with nvcc and ninja: pip install 'flashinfer-python==0\.6\.13'; it has tensor, row, "
    )
    for scheme in "fp8_block", "mxfp4":
        with pytest.raises(ValueError, match=how):
            quantized(scheme, stock())


def test_mxfp4_needs_cudnn_too(found):
    found.setattr(importlib.util, "find_spec", lambda name: name if name != "cudnn" else None)
    assert "pip install nvidia-cudnn-frontend" in MISSING("mm_fp4")
    assert MISSING("gemm_fp8_nt_groupwise") == ""
    MISSING.cache_clear()
    found.setattr(importlib.util, "find_spec", lambda name: name)
    for version in 91300, None:
        MISSING.cache_clear()
        found.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert MISSING("mm_fp4") == f"cuDNN 9.14 or later ({version or 0} is here)"


def test_a_function_that_takes_something_else(found):
    other = SimpleNamespace(gemm_fp8_nt_groupwise=lambda a, b, a_scale, b_scale, out: 0)
    found.setattr(_flashinfer, "library", lambda: SimpleNamespace(gemm=other))
    assert "whose gemm.gemm_fp8_nt_groupwise has no scale_major_mode, scale_granularity_mnk, backend" in MISSING(
        "gemm_fp8_nt_groupwise"
    )
    assert "whose gemm.mm_fp4 is missing" in MISSING("mm_fp4")


@pytest.mark.parametrize("name", double.NAMES.values())
def test_the_double_has_flashinfers_signatures(name):
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        pytest.skip("FlashInfer isn't installed; they are recorded from 0.6.13")
    folder = Path(spec.submodule_search_locations[0]) / "gemm"
    assert f"import {name} as {name}\n" in (folder / "__init__.py").read_text()
    theirs = (folder / "gemm_base.py").read_text()
    assert parameters(Path(double.__file__).read_text(), name) == parameters(theirs, name)
