"""GPUs' products on the CPU: layers are laid out for a GPU that isn't there, and torch's products are decoded."""

import copy

import flashinfer_linear_double
import pytest
import torch
from torch import Tensor, nn
from torch.library import Library
from torch.nn.functional import ScalingType, SwizzleType

from fused_ops import OPS, _flashinfer, _flashinfer_linear, linear_gpu, linear_products
from fused_ops._op import kernels_of
from fused_ops.linear import exact_values
from quant import QuantizedActivation, formats
from quant.key import FP4, FP8
from quant.methods import SCHEMES, QuantLinear, quantize_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COLS, OUTS = 640, 256  # five groups of 128, which is no multiple of four
INT8 = {"int8_token", "int8_static", "int8_static_asym"}
ROWWISE = {"fp8_static", "fp8_token"}
BLACKWELL = ROWWISE | {"mxfp8", "nvfp4"}
SERVED = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_87"), INT8),
    "sm_89": INT8 | ROWWISE,
    "sm_90": INT8 | ROWWISE | {"fp8_block"},
    **dict.fromkeys(("sm_100", "sm_120", "sm_121"), INT8 | BLACKWELL),
    "sm_103": BLACKWELL,
    "gfx942": ROWWISE,
    "gfx950": ROWWISE | {"mxfp8", "mxfp4"},
}
PLACES = [  # each product
    *((scheme, "sm_90") for scheme in sorted(SERVED["sm_90"])),
    *((scheme, "sm_100") for scheme in ("fp8_block", "mxfp4", "mxfp8", "nvfp4")),
    ("fp8_block", "sm_120"),
    *((scheme, "gfx942") for scheme in sorted(ROWWISE)),
    *((scheme, "gfx950") for scheme in ("mxfp4", "mxfp8")),
]
needs_products = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"), reason="torch 2.11 has none here"
)
each_place = pytest.mark.parametrize(("scheme", "arch"), PLACES)


def served(arch: str) -> set[str]:
    """Schemes that it has a product for, with what is installed here."""
    found = SERVED.get(arch, set())
    if "mxfp8" not in found or arch.startswith("gfx"):
        return found
    return found | {
        scheme for scheme, name in flashinfer_linear_double.NAMES.items() if not _flashinfer_linear.missing(name)
    }


def halves_only(scheme: str, arch: str) -> bool:
    """Whether its product makes no float32."""
    return arch == "gfx950" or (arch != "sm_90" and scheme in flashinfer_linear_double.NAMES)


class Decoded:
    """`_scaled_mm_v2` by the meaning of what it is given, after torch's own check of shapes, strides and dtypes."""

    def default(self, x, w, x_scales, x_recipe, x_swizzle, w_scales, w_recipe, w_swizzle, bias, dtype):
        recipes = x_recipe, x_swizzle, w_recipe, w_swizzle
        meta = [[as_meta(s) for s in scales] for scales in (x_scales, w_scales)]
        sides = meta[0], *recipes[:2], meta[1], *recipes[2:]
        if torch.version.hip:
            check_rocm(x, w, x_scales[0], w_scales[0], x_recipe, dtype)
        if not (torch.version.hip and x_recipe == [MX]):  # whose scales torch 2.13's own check miscounts
            linear_gpu_mm.default(as_meta(x), as_meta(w), *sides, bias, dtype)
        assert set(x_swizzle + w_swizzle) <= {SWIZZLED, PLAIN}
        left = operand(x, x_scales, x_recipe, x_swizzle)
        by_row = [s.t() if s.ndim == 2 and s.dtype == torch.float32 else s for s in w_scales]
        right = operand(w.t(), by_row, w_recipe, w_swizzle)
        y = left @ right.t()
        if bias is not None:
            assert bias.dtype == dtype == torch.bfloat16
            y = y + bias.double()
        return y.to(dtype)

    def out(self, *args, out):
        assert out.is_contiguous()
        return out.copy_(self.default(*args))


linear_gpu_mm = linear_gpu.SCALED_MM
MX = ScalingType.BlockWise1x32.value
SWIZZLED, PLAIN = SwizzleType.SWIZZLE_32_4_4.value, SwizzleType.NO_SWIZZLE.value
GROUPS = {  # columns and rows of a scale
    ScalingType.BlockWise1x16.value: (16, 1),
    MX: (32, 1),
    ScalingType.BlockWise1x128.value: (128, 1),
    ScalingType.BlockWise128x128.value: (128, 128),
}


def check_rocm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, recipe: list[int], dtype: torch.dtype) -> None:
    """What ScaledBlas.cpp asks for there: scales in rows, whole blocks of 32, and hipBLASLt's results."""
    assert recipe != [ScalingType.RowWise.value] or dtype == torch.bfloat16
    if recipe == [MX]:
        packing = 2 if x.dtype == FP4 else 1
        assert not any(size % 32 for size in (*x.shape, *w.shape))
        assert x_scale.shape == (x.shape[0], packing * x.shape[1] // 32)
        assert w_scale.shape == (w.shape[1], packing * w.shape[0] // 32)
        assert x_scale.is_contiguous()
        assert w_scale.is_contiguous()
        assert dtype != torch.float32
    else:
        assert x.dtype == w.dtype == torch.float8_e4m3fnuz


def as_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def operand(codes: Tensor, scales: list[Tensor], recipe: list[int], swizzle: list[int]) -> Tensor:
    """float64 values of [rows, K] codes."""
    values = formats.decode(codes.view(torch.uint8) if codes.dtype == FP4 else codes, codes.dtype).double()
    rows, cols = values.shape
    for scale, kind, order in zip(scales, recipe, swizzle, strict=True):
        scale = blocks(scale, rows) if order == SWIZZLED else scale.float()
        if kind in GROUPS:
            wide, high = GROUPS[kind]
            scale = scale.repeat_interleave(wide, 1)[:, :cols].repeat_interleave(high, 0)[:rows]
        values = values * scale.double()
    return values


def blocks(scale: Tensor, rows: int) -> Tensor:
    """Scales from cuBLAS's tiles: of 32 x 4 x 4 bytes, for rows 32 apart and four columns."""
    high = -(-rows // 128)
    tiles = scale.float().view(high, -1, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, -1)[:rows]


@pytest.fixture
def decoded(monkeypatch):
    """Products by their meaning, with the rules that they have on a GPU."""

    def int_mm(x: Tensor, w: Tensor) -> Tensor:
        assert x.shape[0] > 16
        assert not any(size % 8 for size in w.shape)
        return real(x, w)

    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(linear_gpu, "SCALED_MM", Decoded())
    monkeypatch.setattr(_flashinfer, "library", lambda: flashinfer_linear_double.LIBRARY)
    flashinfer_linear_double.CALLED.clear()


@pytest.fixture
def pretend(monkeypatch):
    """pretend("sm_90"): the CPU is such a GPU from now on, of ROCm 7.1 if it is AMD's; FlashInfer is there."""
    libraries = []

    def be(arch: str, device: str = "cpu", flashinfer: bool = True) -> None:
        monkeypatch.setattr(linear_products, "architecture", lambda d: arch if d.type == device else None)
        monkeypatch.setattr(torch.version, "hip", "7.1.25424-4179531dcd" if arch.startswith("gfx") else None)
        if flashinfer:
            monkeypatch.setattr(_flashinfer_linear, "missing", lambda name: "")
        if device == "cpu" and not libraries:
            libraries.append(Library("fused_ops", "IMPL"))
            op = OPS["scaled_linear"]
            for overload, kernel in kernels_of(op, linear_gpu.backend(("CPU",))):
                libraries[0].impl(overload, kernel, "CPU")

    yield be
    for library in libraries:
        library._destroy()


def stock(dtype=torch.bfloat16, bias=True, cols=COLS, outs=OUTS) -> nn.Sequential:
    return nn.Sequential(nn.Linear(cols, outs, bias=bias)).to(dtype)


def quantized(scheme: str, model: nn.Module, x: Tensor | None = None) -> nn.Sequential:
    x = torch.randn(4, model[0].in_features) if x is None else x
    model = copy.deepcopy(model)
    return quantize_model(model, scheme, [x.to(model[0].weight.dtype)] if SCHEMES[scheme].calibrated else None)


def exact(layer: QuantLinear, x: QuantizedActivation) -> tuple[Tensor, Tensor]:
    """The layer's result in float64 and, for its rounding, the sum of its terms' magnitudes."""
    state, key = layer.state_dict(), layer.method.scheme.weight_key
    w = exact_values(state["weight"], state["weight_scale"], key, state.get("weight_scale2"))
    x = exact_values(x.data, x.scale, x.quant_key, x.scale2, x.zero_point)
    y, size = x @ w.t(), x.abs() @ w.abs().t()
    return (y, size) if layer.bias is None else (y + layer.bias.double(), size + layer.bias.double().abs())


def unsigned_zeros(tensor: Tensor) -> Tensor:
    """gfx942's FP8 has no others."""
    return tensor.view(torch.uint8).where(tensor.float() != 0, 0) if tensor.dtype == FP8 else tensor


def check(
    y: Tensor, layer: QuantLinear, x: QuantizedActivation, context: str, error: float = 2.0**-20, sums: bool = False
) -> None:
    """Of the float64 result, rounded, at most one step of a 16-bit dtype beside what the sum's own error makes.

    sums: that are rounded too, before the bias is added.
    """
    check_close(y, *exact(layer, x), context, error + sums * torch.finfo(y.dtype).eps)


def check_close(y: Tensor, expected: Tensor, size: Tensor, context: str, error: float = 2.0**-20) -> None:
    step = torch.finfo(y.dtype).eps * expected.abs() if y.dtype != torch.float32 else 0
    assert ((y.double() - expected).abs() <= step + error * size).all(), context
