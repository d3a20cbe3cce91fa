"""`scaled_linear` on GPUs: the products that torch has there, and FlashInfer where torch has none; which device has
which, and how they take their operands.

    y = round_out(sum_k x_k * w_k + bias)       float32 sums by cuBLAS, CUTLASS or cuDNN, int32 of INT8

Nothing is rearranged on the way. A layer (`quant.methods`) stores its weight as its product takes it, and asks for
activations as it takes them: layout of the scales, and memory for a multiple of so many rows.

A product that makes no float32 (`Product.results`) rounds before the bias is added, and once more behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import ScalingType, SwizzleType, pad

from quant import QuantKey, ScaleLayout, formats
from quant.key import E8M0, FP4, FP8, FP8_FNUZ, PER_TENSOR, PER_TOKEN, GroupShape

from . import _flashinfer_linear
from ._check import FLOATS
from ._op import OPS, Backend, kernels_of
from .linear import INFERRED, weight_key_of

SCALED_MM = torch.ops.aten._scaled_mm_v2
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

    def lacks(self) -> str:
        """What isn't installed here for a device that has it, or nothing."""
        if self.flashinfer:
            return _flashinfer_linear.missing(self.flashinfer)
        build, (low, high) = torch.version.hip or torch.version.cuda, self.builds
        if build is None or low <= tuple(map(int, build.split(".")[:2])) < high:
            return ""
        return self.needs


HALVES = (torch.bfloat16, torch.float16)
_ROWS = (PER_TOKEN, PER_TENSOR)
_BLOCKS_128 = ((GroupShape(1, BLOCK),), (GroupShape(BLOCK, BLOCK),))
_BY_32 = ((GroupShape(1, 32),),) * 2
_ONE, _ROW, _LONG = [ScalingType.TensorWise], [ScalingType.RowWise], [ScalingType.BlockWise1x128]
_SQUARE, _MX = [ScalingType.BlockWise128x128], [ScalingType.BlockWise1x32]
_NV = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
_FP8 = "tensor cores for float8_e4m3fn: sm_89 and later, gfx950"
_FNUZ = "tensor cores for float8_e4m3fnuz: gfx942"
_BLACKWELL = "Blackwell's block scales: sm_100, sm_103, sm_120, sm_121"
_ROCM = "ROCm 7.0 to 7.12 on gfx950"  # later ones want scales in tiles of 32 x 8
SWIZZLED = ScaleLayout.SWIZZLED_128X4
_GROUPWISE = Product(
    "flashinfer 1x128 sm_12x", FP8, torch.float32, _BLOCKS_128, None, "FlashInfer on sm_120 or sm_121",
    cols=BLOCK, outs=BLOCK, results=HALVES, flashinfer="gemm_fp8_nt_groupwise",
)  # fmt: skip
_GFX950 = Product(
    "rocm mxfp8", FP8, E8M0, _BY_32, (_MX, _MX), _ROCM,
    cols=128, outs=32, pad_rows=32, enough=inf, results=HALVES, builds=((7, 0), (7, 13)),
)  # fmt: skip
PRODUCTS = {
    product.name: product
    for product in (  # the first of a device that takes a pair of keys is theirs
        Product("tensor", FP8, torch.float32, ((PER_TENSOR,), (PER_TENSOR,)), (_ONE, _ONE), _FP8),
        Product("row", FP8, torch.float32, (_ROWS, _ROWS), (_ROW, _ROW), _FP8),
        Product("fnuz tensor", FP8_FNUZ, torch.float32, ((PER_TENSOR,), (PER_TENSOR,)), (_ONE, _ONE), _FNUZ),
        Product("fnuz row", FP8_FNUZ, torch.float32, (_ROWS, _ROWS), (_ROW, _ROW), _FNUZ),
        Product(
            "1x128", FP8, torch.float32, _BLOCKS_128, (_LONG, _SQUARE),
            "cuBLAS 12.9 or later on sm_90, the only one it has this for", ScaleLayout.TMA_ALIGNED,
            cols=BLOCK, pad_rows=4, enough=inf,  # columns of the activation's scales begin at 16 bytes
            builds=((12, 9), (inf,)),
        ),
        # Up to 32 rows FlashInfer 0.6.13 takes a kernel that sometimes reads a scale before it is there.
        replace(
            _GROUPWISE, name="flashinfer 1x128 sm_10x", needs="FlashInfer on sm_100 or sm_103",
            outs=16, pad_rows=36, enough=33,
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


def product_of(x: QuantKey, w: QuantKey, arch: str) -> Product:
    """The product of activations and weights of these keys, in whatever layout; ValueError where there is none."""
    theirs = [product for product in PRODUCTS.values() if product.takes(x, w)]
    there = [product for product in theirs if product.name in DEVICES.get(arch, ())]
    if product := next((p for p in there if not p.lacks()), None):
        return product
    reasons = [p.lacks() for p in there] or [p.needs for p in theirs]
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


# --- the product ---


class Operands(NamedTuple):
    """The operation's arguments."""

    data: Tensor
    scale: Tensor
    key: int
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype
    scale2: Tensor | None = None
    zero_point: Tensor | None = None
    weight_code: int = INFERRED
    weight_scale2: Tensor | None = None
    weight_sums: Tensor | None = None

    @property
    def keys(self) -> tuple[QuantKey, QuantKey]:
        """The activation's and the weight's."""
        return QuantKey.from_code(self.key), weight_key_of(self.weight, self.weight_scale, self.weight_code)


def refusal(*args) -> str:
    """Why there is no product of these arguments, or nothing."""
    o = Operands(*args)
    x, w = o.keys
    try:
        product = product_of(x, w, architecture(o.data.device) or "a CPU")
        product.check_sizes(o.weight.shape[1] * w.packing, o.weight.shape[0])
    except ValueError as error:
        return str(error)
    for name, key, taken in ("activation", x, product.activation(x)), ("weight", w, product.weight(w)):
        if key != taken:
            return f"{name} is {key}, the {product.name} product takes {taken}"
    if not x.symmetric and o.weight_sums is None:
        return "weight_sums is None, and zero points take weight.sum(1, dtype=torch.int32)"
    if o.out_dtype not in product.results:
        made = " and ".join(map(str, product.results))
        return f"out_dtype is {o.out_dtype}, the {product.name} product makes {made}"
    return ""


def multiply(args: tuple, out: Tensor | None = None) -> Tensor:
    """The result, in `out` where that is given; everything else about the arguments has been checked."""
    o = Operands(*args)
    product = product_of(*o.keys, architecture(o.data.device) or "a CPU")
    count, outs = o.data.shape[:-1].numel(), o.weight.shape[0]
    shape = (*o.data.shape[:-1], outs)
    if not (count and outs):
        return o.data.new_empty(shape, dtype=o.out_dtype) if out is None else out
    o = o._replace(data=_rows(o, product, count))
    direct = out is not None and out.is_contiguous() and o.data.shape[0] == count
    place = out.view(count, outs) if out is not None and direct else None
    if product.flashinfer:
        y = _flashinfer(o, product, place)
    else:
        y = _int8(o, count) if product.recipe is None else _scaled(o, product, place)
    y = y[:count].view(shape)
    if out is None:
        return y.to(o.out_dtype)
    return out if y.data_ptr() == out.data_ptr() else out.copy_(y)


def _rows(o: Operands, product: Product, count: int) -> Tensor:
    """The activation as [rows, K]: as many rows as the product reads, those behind the last whatever they hold."""
    try:
        data = o.data.view(count, -1)
    except RuntimeError:
        strides = o.data.stride()
        raise ValueError(f"scaled_linear: data has strides {strides}, expected rows at one distance") from None
    stride = data.stride(0) if count > 1 else data.shape[1]
    for name, step, start in ("data", stride, data), ("weight", o.weight.stride(0), o.weight):
        if product.flashinfer and step != data.shape[1]:
            raise ValueError(
                f"scaled_linear: rows of {name} are {step} bytes apart, the {product.name} product takes them "
                f"{data.shape[1]} apart, without gaps"
            )
        if step % product.step or start.data_ptr() % product.step:
            raise ValueError(
                f"scaled_linear: rows of {name} are {step} bytes apart and begin at {start.data_ptr():#x}, "
                f"the {product.name} product takes multiples of {product.step}"
            )
    return _memory(o.data, "data", (product.rows(count), data.shape[1]), (stride, 1), product)


def _memory(tensor: Tensor, name: str, shape: tuple[int, int], strides: tuple[int, int], product: Product) -> Tensor:
    """The memory of a tensor, with rows beyond its own."""
    end = tensor.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if end * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"scaled_linear: {name} is {list(tensor.shape)}, and the {product.name} product reads {shape[0]} rows of "
            f"memory: make the activation with pad_rows={product.pad_rows}, as **layer.input_quant() does"
        )
    return tensor.as_strided(shape, strides)


def _scaled(o: Operands, product: Product, out: Tensor | None) -> Tensor:
    """By `scaled_mm`; unrounded, in float32 if it can, where it can't add the bias or make the result's dtype."""
    fused = o.bias is None or o.bias.dtype == o.out_dtype == torch.bfloat16
    dtype = o.out_dtype if fused or torch.float32 not in product.results else torch.float32
    if product.recipe == (_ROW, _ROW) and (dtype == torch.float32 or (torch.version.hip and dtype != torch.bfloat16)):
        dtype = torch.float32  # which not every device makes of scales by row, but of one scale
        one = [torch.ones(1, device=o.data.device)]
        return _rescaled(_scaled_mm(o, (one, one), (_ONE, _ONE), None, dtype, None), o)
    added = None if fused else o.bias
    y = _scaled_mm(o, _scales(o, product), product.recipe, o.bias if fused else None, dtype, out if fused else None)
    return y if added is None else y + added


def _scales(o: Operands, product: Product) -> tuple[list[Tensor], list[Tensor]]:
    """What the recipes of either side ask for."""
    rows, outs = o.data.shape[0], o.weight.shape[0]
    x, w = o.scale, o.weight_scale
    if product.recipe == (_ROW, _ROW):  # one scale for all of them is handed over as one for each
        x, w = x.reshape(-1, 1).expand(rows, 1).contiguous(), w.reshape(1, -1).expand(1, outs).contiguous()
    elif product.name == "1x128":
        high, groups = w.shape
        wide = -(-groups // L4) * L4
        x = _memory(x, "scale", (rows, groups), (1, rows), product)
        w = _memory(w, "weight_scale", (wide, high), (1, wide), product)
    elif product.pad_rows > 1 and product.layout == ScaleLayout.ROW_MAJOR:
        x = _memory(x, "scale", (rows, x.shape[1]), (x.shape[1], 1), product)
    if o.scale2 is None or o.weight_scale2 is None:
        return [x], [w]
    return [x, o.scale2.reshape(1)], [w, o.weight_scale2.reshape(1)]


def _scaled_mm(o: Operands, scales, recipes, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`torch.nn.functional.scaled_mm`, which takes no `out`; sums in full float32 rather than by `use_fast_accum`."""
    x, w = o.data, o.weight
    if x.dtype == torch.uint8:
        x, w = x.view(FP4), w.view(FP4)
    sides = []
    for each, recipe in zip(scales, recipes, strict=True):
        swizzled = [s.dtype != torch.float32 and s.ndim == 1 for s in each]
        swizzles = [SwizzleType.SWIZZLE_32_4_4 if s else SwizzleType.NO_SWIZZLE for s in swizzled]
        sides += [each, [kind.value for kind in recipe], [kind.value for kind in swizzles]]
    args = (x, w.t(), *sides, bias, dtype)
    return SCALED_MM.default(*args) if out is None else SCALED_MM.out(*args, out=out)


def _flashinfer(o: Operands, product: Product, out: Tensor | None) -> Tensor:
    """By FlashInfer, which rounds to the result's dtype; a bias is added to that, in float32."""
    (x_scale,), (w_scale,) = _scales(o, product)
    shape = o.data.shape[0], o.weight.shape[0]
    aligned = out is not None and o.bias is None and out.data_ptr() % product.step == 0
    y = out if out is not None and aligned else o.data.new_empty(shape, dtype=o.out_dtype)
    _flashinfer_linear.RUN[product.flashinfer](o.data, o.weight, x_scale, w_scale, y)
    return y if o.bias is None else y + o.bias


def _int8(o: Operands, count: int) -> Tensor:
    sums = torch._int_mm(o.data, o.weight.t())[:count]
    if o.zero_point is not None and o.weight_sums is not None:
        sums = sums - o.zero_point.reshape(-1, 1) * o.weight_sums
    return _rescaled(sums, o)


def _rescaled(sums: Tensor, o: Operands) -> Tensor:
    """sums * (x_scale * w_scale) + bias, in float32."""
    y = sums * (o.scale.reshape(-1, 1) * o.weight_scale.reshape(1, -1))
    return y if o.bias is None else y.add_(o.bias)


# --- the backend ---

_registered: list[Library] = []


def backend(devices: tuple[str, ...] = ("CUDA",)) -> Backend:
    """The products as a backend of `scaled_linear`."""

    def write(args: tuple, outs: dict[str, Tensor]) -> None:
        multiply(args, outs["y"])

    return Backend(
        "cuda",
        write,
        devices,
        lambda *args: not refusal(*args),
        refusal,
        make=multiply,
    )


def load() -> None:
    """Make them the backend of CUDA tensors, where torch was built for a GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return
    op = OPS["scaled_linear"]
    op.backend(backend())
    _registered.append(Library("fused_ops", "IMPL"))
    for overload, kernel in kernels_of(op, op.backends["cuda"]):
        _registered[0].impl(overload, kernel, "CUDA")
