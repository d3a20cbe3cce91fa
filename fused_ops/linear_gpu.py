"""`scaled_linear` on GPUs, by the products in `linear_products`.

    y = round_out(sum_k x_k * w_k + bias)       float32 sums by cuBLAS, CUTLASS or cuDNN, int32 of INT8

Nothing is rearranged on the way. A layer (`quant.methods`) stores its weight as its product takes it, and asks for
activations as it takes them: layout of the scales, and memory for a multiple of so many rows.

A product that makes no float32 (`Product.results`) rounds before the bias is added, and once more behind it, unless
torch adds it: bfloat16 to bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.functional import SwizzleType

from quant import QuantKey, ScaleLayout
from quant.key import FP4

from . import _flashinfer_linear, linear_products
from ._op import OPS, Backend, kernels_of
from .linear import INFERRED, weight_key_of
from .linear_products import L4, LONG, ONE, ROW, Product, product_of

SCALED_MM = torch.ops.aten._scaled_mm_v2


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
        product = product_of(x, w, linear_products.architecture(o.data.device) or "a CPU")
        product.check_sizes(o.weight.shape[1] * w.packing, o.weight.shape[0])
        product.check_result("out_dtype", o.out_dtype)
    except ValueError as error:
        return str(error)
    for name, key, taken in ("activation", x, product.activation(x)), ("weight", w, product.weight(w)):
        if key != taken:
            return f"{name} is {key}, the {product.name} product takes {taken}"
    if not x.symmetric and o.weight_sums is None:
        return "weight_sums is None, and zero points take weight.sum(1, dtype=torch.int32)"
    return ""


def multiply(args: tuple, out: Tensor | None = None) -> Tensor:
    """The result, in `out` where that is given; everything else about the arguments has been checked."""
    o = Operands(*args)
    product = product_of(*o.keys, linear_products.architecture(o.data.device) or "a CPU")
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
    if product.recipe == (ROW, ROW) and (dtype == torch.float32 or (torch.version.hip and dtype != torch.bfloat16)):
        dtype = torch.float32  # which not every device makes of scales by row, but of one scale
        one = [torch.ones(1, device=o.data.device)]
        return _rescaled(_scaled_mm(o, (one, one), (ONE, ONE), None, dtype, None), o)
    added = None if fused else o.bias
    y = _scaled_mm(o, _scales(o, product), product.recipe, o.bias if fused else None, dtype, out if fused else None)
    return y if added is None else y + added


def _scales(o: Operands, product: Product) -> tuple[list[Tensor], list[Tensor]]:
    """What the recipes of either side ask for."""
    rows, outs = o.data.shape[0], o.weight.shape[0]
    x, w = o.scale, o.weight_scale
    if product.recipe == (ROW, ROW):  # one scale for all of them is handed over as one for each
        x, w = x.reshape(-1, 1).expand(rows, 1).contiguous(), w.reshape(1, -1).expand(1, outs).contiguous()
    elif product.recipe and product.recipe[0] == LONG:
        high, groups = w.shape
        wide = -(-groups // L4) * L4
        x = _memory(x, "scale", (rows, groups), (1, rows), product)
        w = _memory(w, "weight_scale", (wide, high), (1, wide), product)
    elif product.pad_rows > 1 and product.layout == ScaleLayout.ROW_MAJOR:
        x = _memory(x, "scale", (rows, x.shape[1]), (x.shape[1], 1), product)
    if product.flashinfer and not w.is_contiguous():
        raise ValueError(f"scaled_linear: weight_scale has strides {w.stride()}, {product.name} takes no gaps in it")
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
