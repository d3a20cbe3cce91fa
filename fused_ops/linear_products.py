"""Products of linear layers on GPUs, torch's, and FlashInfer's where torch has none: which device has which, and how
their operands are laid out. `linear_gpu` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad

from quant import QuantKey, ScaleLayout, formats
from quant.key import E8M0, FP4, FP8, FP8_FNUZ, PER_TENSOR, PER_TOKEN, GroupShape

from . import _flashinfer_linear
from ._check import FLOATS

BLOCK, L4 = 128, 4  # of a weight; a row of its scales is padded to a multiple of four


@dataclass(frozen=True)
class Product:
    """A product of torch's or FlashInfer's, by the operands it takes.

    dtype, scale_dtype: of the codes and their scales, on both sides. groups: what shares a scale, of an activation and
        of a weight. layout: of the activation's scales, and of a weight's where it is swizzled.
    recipe: how `scaled_mm` is told of either side; None: `torch._int_mm`, or FlashInfer's function of this name.
    cols, outs, step: what K, N and the bytes between rows are multiples of.
    pad_rows, enough: rows of activation come in multiples of the first, or are at least so many.
    results: dtypes that it makes.
    needs: what a device lacks that doesn't have it. builds: from which CUDA or ROCm on, and before which.
    """

    name: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    groups: tuple[tuple[GroupShape, ...], tuple[GroupShape, ...]]
    recipe: tuple[list[ScalingType], list[ScalingType]] | None
    needs: str
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    cols: int = 16
    outs: int = 16
    step: int = 16
    pad_rows: int = 1
    enough: float = 0
    results: tuple[torch.dtype, ...] = FLOATS
    builds: tuple[tuple[float, ...], tuple[float, ...]] = ((0,), (inf,))
    flashinfer: str = ""

    def takes(self, x: QuantKey, w: QuantKey) -> bool:
        """Whether these are its operands, if they are laid out for it."""
        return all(
            (key.dtype, key.scale.dtype) == (self.dtype, self.scale_dtype) and key.scale.group_shape in groups
            for key, groups in zip((x, w), self.groups, strict=True)
        )

    def activation(self, key: QuantKey) -> QuantKey:
        """The key in the layout it takes."""
        return key if key.per_tensor else key.with_scale(layout=self.layout)

    def weight(self, key: QuantKey) -> QuantKey:
        """The same of a weight's key."""
        swizzled = self.layout == ScaleLayout.SWIZZLED_128X4
        return key.with_scale(layout=self.layout if swizzled else ScaleLayout.ROW_MAJOR)

    def rows(self, count: int) -> int:
        """How many rows it reads of an activation that has `count`."""
        return count if count >= self.enough else -(-count // self.pad_rows) * self.pad_rows

    def check_sizes(self, cols: int, outs: int) -> None:
        """Raise ValueError unless it takes weights [outs, cols]."""
        for name, size, step in ("K", cols, self.cols), ("N", outs, self.outs):
            if size % step:
                raise ValueError(f"{name} is {size}, the {self.name} product takes multiples of {step}")

    def check_result(self, name: str, dtype: torch.dtype) -> None:
        """Raise ValueError, which calls it `name`, unless it makes this dtype."""
        if dtype not in self.results:
            made = " and ".join(map(str, self.results))
            raise ValueError(f"{name} is {dtype}, the {self.name} product makes {made}")

    def lacks(self) -> str:
        """What isn't installed here for a device that has it, or nothing."""
        build, (low, high) = torch.version.hip or torch.version.cuda, self.builds
        if build is not None and not low <= tuple(map(int, build.split(".")[:2])) < high:
            return self.needs
        return _flashinfer_linear.missing(self.flashinfer) if self.flashinfer else ""


HALVES = (torch.bfloat16, torch.float16)
_ROWS = (PER_TOKEN, PER_TENSOR)
_BLOCKS_128 = ((GroupShape(1, BLOCK),), (GroupShape(BLOCK, BLOCK),))
_BY_32 = ((GroupShape(1, 32),),) * 2
ONE, ROW, LONG = [ScalingType.TensorWise], [ScalingType.RowWise], [ScalingType.BlockWise1x128]
_SQUARE, _MX = [ScalingType.BlockWise128x128], [ScalingType.BlockWise1x32]
_NV = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
_FP8 = "tensor cores for float8_e4m3fn: sm_89 and later, gfx950"
_FNUZ = "tensor cores for float8_e4m3fnuz: gfx942"
_BLACKWELL = "Blackwell's block scales: sm_100, sm_103, sm_120, sm_121"
_ROCM = "ROCm 7.0 to 7.12 on gfx950"  # later ones want scales in tiles of 32 x 8
SWIZZLED = ScaleLayout.SWIZZLED_128X4
_GROUPWISE = Product(
    "flashinfer 1x128 sm_12x", FP8, torch.float32, _BLOCKS_128, None, "FlashInfer and CUDA 12.9 on sm_120 or sm_121",
    cols=BLOCK, outs=BLOCK, results=HALVES, builds=((12, 9), (inf,)), flashinfer="gemm_fp8_nt_groupwise",
)  # fmt: skip
_GFX950 = Product(
    "rocm mxfp8", FP8, E8M0, _BY_32, (_MX, _MX), _ROCM,
    cols=128, outs=32, pad_rows=32, enough=inf, results=HALVES, builds=((7, 0), (7, 13)),
)  # fmt: skip
PRODUCTS = {
    product.name: product
    for product in (  # the first of a device that takes a pair of keys is theirs
        Product("tensor", FP8, torch.float32, ((PER_TENSOR,), (PER_TENSOR,)), (ONE, ONE), _FP8),
        Product("row", FP8, torch.float32, (_ROWS, _ROWS), (ROW, ROW), _FP8),
        Product("fnuz tensor", FP8_FNUZ, torch.float32, ((PER_TENSOR,), (PER_TENSOR,)), (ONE, ONE), _FNUZ),
        Product("fnuz row", FP8_FNUZ, torch.float32, (_ROWS, _ROWS), (ROW, ROW), _FNUZ),
        Product(
            "1x128", FP8, torch.float32, _BLOCKS_128, (LONG, _SQUARE),
            "cuBLAS 12.9 or later on sm_90, the only one it has this for", ScaleLayout.TMA_ALIGNED,
            cols=BLOCK, pad_rows=4, enough=inf,  # columns of the activation's scales begin at 16 bytes
            builds=((12, 9), (inf,)),
        ),
        # Up to 32 rows FlashInfer 0.6.13 takes a kernel that sometimes reads a scale before it is there.
        replace(
            _GROUPWISE, name="flashinfer 1x128 sm_10x", needs="FlashInfer and CUDA 12.8 on sm_100 or sm_103",
            builds=((12, 8), (inf,)), outs=16, pad_rows=36, enough=33,
        ),
        _GROUPWISE,
        Product("mxfp8", FP8, E8M0, _BY_32, (_MX, _MX), _BLACKWELL, SWIZZLED, cols=32),
        _GFX950,
        Product("nvfp4", FP4, FP8, ((GroupShape(1, 16),),) * 2, (_NV, _NV), _BLACKWELL, SWIZZLED, cols=32),
        Product(
            "flashinfer mxfp4", FP4, E8M0, _BY_32, None, "FlashInfer on Blackwell: sm_100, sm_103, sm_120, sm_121",
            SWIZZLED, cols=32, results=HALVES, flashinfer="mm_fp4",
        ),
        replace(_GFX950, name="rocm mxfp4", dtype=FP4),
        Product(
            "int8", torch.int8, torch.float32, (_ROWS, _ROWS), None,
            "cuBLAS's INT8: sm_80 to sm_100, sm_120, sm_121", cols=8, outs=8, step=8, pad_rows=32, enough=17,
        ),
    )
}  # fmt: skip
_BLOCKS = ("tensor", "row", "mxfp8", "nvfp4", "flashinfer mxfp4")
# What a device has; `Product.needs` says what the others lack. sm_103 has hardly any INT8 left.
DEVICES = {
    "sm_80": ("int8",),
    "sm_86": ("int8",),
    "sm_87": ("int8",),
    "sm_89": ("tensor", "row", "int8"),
    "sm_90": ("tensor", "row", "1x128", "int8"),
    "sm_100": (*_BLOCKS, "flashinfer 1x128 sm_10x", "int8"),
    "sm_103": (*_BLOCKS, "flashinfer 1x128 sm_10x"),
    "sm_120": (*_BLOCKS, "flashinfer 1x128 sm_12x", "int8"),
    "sm_121": (*_BLOCKS, "flashinfer 1x128 sm_12x", "int8"),
    "gfx942": ("fnuz tensor", "fnuz row"),
    "gfx950": ("tensor", "row", "rocm mxfp8", "rocm mxfp4"),
}


def architecture(device: torch.device) -> str | None:
    """Such as "sm_90" or "gfx950"; None where the kernels are not these products."""
    return _architecture(device.index) if device.type == "cuda" else None


@cache
def _architecture(index: int | None) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def available(arch: str) -> tuple[str, ...]:
    """Names of the products that the architecture has with what is installed."""
    return tuple(name for name in DEVICES.get(arch, ()) if not PRODUCTS[name].lacks())


def native(key: QuantKey, arch: str | None) -> QuantKey:
    """The key of the same values as the architecture multiplies them: gfx942's FP8 is float8_e4m3fnuz."""
    fnuz = arch == "gfx942" and key.dtype == FP8 and key.scale.dtype == torch.float32
    return replace(key, dtype=FP8_FNUZ) if fnuz else key


@cache
def _there(x: QuantKey, w: QuantKey, arch: str) -> tuple[Product, ...]:
    """Those of an architecture, whatever is installed."""
    return tuple(p for p in PRODUCTS.values() if p.name in DEVICES.get(arch, ()) and p.takes(x, w))


def product_of(x: QuantKey, w: QuantKey, arch: str) -> Product:
    """The product of activations and weights of these keys, in whatever layout; ValueError where there is none."""
    there = _there(x, w, arch)
    if product := next((p for p in there if not p.lacks()), None):
        return product
    reasons = [p.lacks() for p in there] or [p.needs for p in PRODUCTS.values() if p.takes(x, w)]
    needs = f", which needs {', or '.join(reasons)}" if reasons else ""
    has = ", ".join(available(arch)) or "none"
    raise ValueError(f"{arch} has no product of {x} with a weight of {w}{needs}; it has {has}")


# --- a weight's scales ---


def arrange(scale: Tensor, key: QuantKey, product: Product | None) -> Tensor:
    """Row-major scales of a weight as the product reads them, of the same shape but where swizzled.

    1x128: rows of a multiple of four, the rest zero.
    """
    if product is None:
        return scale
    if product.layout == SWIZZLED:
        return formats.arrange(scale, product.weight(key).scale)
    groups = scale.shape[-1]
    return pad(scale, (0, -groups % L4))[:, :groups] if product.name == "1x128" else scale


def row_major(scale: Tensor, shape: tuple[int, int], key: QuantKey, product: Product | None) -> Tensor:
    """The inverse of `arrange`, for a weight of this shape."""
    if product is not None and product.layout == SWIZZLED:
        return formats.unswizzled(scale, shape[0], key.groups(shape[1]))
    return scale.contiguous()
