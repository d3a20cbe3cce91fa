"""`QuantLinear`: a linear layer that takes its input quantized, and says how it wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_ops
from fused_ops import _triton, linear_products
from fused_ops._check import FLOATS
from fused_ops.linear import scale_shape

from .. import formats
from ..activation import QuantizedActivation
from ..key import FP8, FP8_FNUZ, QuantKey
from .scheme import Scheme, served_by

_PREFIXES = ("", "output_")  # that operations have


class QuantMethod:
    """What a `QuantLinear` does with its weight and its input.

    input_quant_key: what the layer wants its input to be; a producer that hands over such a `QuantizedActivation`
        saves the layer from quantizing. None: a plain tensor.
    pad_rows: its rows lie in memory for a multiple of so many.
    """

    input_quant_key: QuantKey | None = None
    pad_rows: int = 1

    def create_weights(self, layer: QuantLinear, device: torch.device | str | None) -> None:
        """Register the layer's buffers, uninitialized."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: QuantLinear) -> None:
        """Check, and lay out, what was loaded."""

    def check_device(self, layer: QuantLinear, device: torch.device, dtype: torch.dtype | None) -> None:
        """Raise ValueError where the layer can't work on a device, or not with activations of this dtype."""

    def lay_out(self, layer: QuantLinear) -> None:
        """Arrange the layer's buffers as the device they are on takes them."""

    def to_checkpoint(self, layer: QuantLinear, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some of the layer's buffers as state dicts hold them, whatever the device."""
        return buffers

    def from_checkpoint(self, layer: QuantLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse."""
        return tensors

    def dtype_in_checkpoint(self, buffer: Tensor) -> torch.dtype:
        """Of what one of the layer's buffers is in state dicts."""
        return buffer.dtype

    def apply(self, layer: QuantLinear, x: Tensor | QuantizedActivation, bias: Tensor | None = None) -> Tensor:
        """The layer's product."""
        raise NotImplementedError


class ScaledLinearMethod(QuantMethod):
    """Codes times codes, by `fused_ops.scaled_linear`, for the schemes of `quant.methods.SCHEMES`.

    On a GPU by one of the products in `fused_ops.linear_products`: scales of weight and activation are laid out as it
    reads them, and INT8 with zero points gets the sums of the weight's rows. On gfx942 codes of float8_e4m3fn become
    halves in float8_e4m3fnuz, with twice the scale. State dicts are those of a CPU, but for the sign of zeros there.
    """

    input_quant_key: QuantKey
    product: linear_products.Product | None = None

    def __init__(self, scheme: Scheme):
        self.scheme, self.input_quant_key = scheme, scheme.input_quant_key

    def create_weights(self, layer: QuantLinear, device: torch.device | str | None) -> None:
        self.scheme.check(layer.in_features)
        self.check_device(layer, torch.empty(0, device=device).device, layer.dtype)
        shape = (layer.out_features, layer.in_features)
        key, weight_key = self.input_quant_key, self.scheme.weight_key
        each = () if layer.experts is None else (layer.experts,)
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((*each, shape[0], shape[1] // weight_key.packing), weight_key.storage_dtype),
            "weight_scale": ((*each, *scale_shape(shape, weight_key.scale.group_shape)), weight_key.scale.dtype),
        }
        if weight_key.scale2 is not None:
            buffers["weight_scale2"] = (*each, 1), torch.float32
        if key.scale.static:
            buffers["input_scale"] = (1,), torch.float32
            if not key.symmetric:
                buffers["input_zero_point"] = (1,), torch.int32
        if key.scale2 is not None:
            buffers["input_scale2"] = (1,), torch.float32
        if self.scheme.bounded:
            buffers["input_scale_ub"] = (1,), torch.float32
        for name, (size, dtype) in buffers.items():
            layer.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def process_weights_after_loading(self, layer: QuantLinear) -> None:
        for name, buffer in layer.named_buffers(recurse=False):
            if name == "input_zero_point":
                if not -128 <= int(buffer) <= 127:
                    raise ValueError(f"{layer.name}: {name} is {int(buffer)}, expected -128 to 127")
            elif "scale" in name:
                # A block of zeros has an e4m3 scale of zero.
                scale, zero = buffer.float(), buffer.dtype == FP8
                if not (scale.isfinite() & ((scale >= 0) if zero else (scale > 0))).all():
                    raise ValueError(f"{layer.name}: {name} has values that aren't positive and finite")
                if name in ("input_scale", "input_scale2") and not (1 / scale).isfinite().all():
                    raise ValueError(f"{layer.name}: {name} has values whose reciprocal isn't finite")
        self.lay_out(layer)

    def check_device(self, layer: QuantLinear, device: torch.device, dtype: torch.dtype | None) -> None:
        product = self._product_on(layer, device)
        if product is not None and dtype is not None:
            product.check_result("the activations' dtype", dtype)

    def _product_on(self, layer: QuantLinear, device: torch.device) -> linear_products.Product | None:
        if (arch := linear_products.architecture(device)) is None:
            return None
        if layer.experts is not None:
            if reason := _triton.missing():
                raise ValueError(f"{layer.name}: {layer.experts} experts on {device} are left to Triton: {reason}")
            return None  # it takes every layout
        try:
            product = self.scheme.product(arch)
            product.check_sizes(layer.in_features, layer.out_features)
        except ValueError as error:
            raise ValueError(f"{error}; schemes with a product there: {served_by(arch)}") from None
        return product

    def lay_out(self, layer: QuantLinear) -> None:
        device, names = layer.weight.device, ("weight", "weight_scale", "input_scale")
        kept = {name: layer._buffers[name] for name in names if name in layer._buffers}
        plain = self.to_checkpoint(layer, kept)  # type: ignore[arg-type]
        product = self._product_on(layer, device)
        wanted = linear_products.native(self.scheme.input_quant_key, linear_products.architecture(device))
        self.product, self.pad_rows = product, product.pad_rows if product else 1
        self.input_quant_key = product.activation(wanted) if product else wanted
        layer._buffers.update(self.from_checkpoint(layer, plain))
        sums = layer.weight.sum(1, dtype=torch.int32) if product and not wanted.symmetric else None
        layer.register_buffer("weight_sums", sums, persistent=False)

    @property
    def halved(self) -> bool:
        """Whether the layer holds halves in float8_e4m3fnuz of what state dicts have in float8_e4m3fn."""
        return self.input_quant_key.dtype == FP8_FNUZ != self.scheme.input_quant_key.dtype

    def to_checkpoint(self, layer: QuantLinear, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(buffers)
        if "weight_scale" in made:
            shape = layer.out_features, layer.in_features
            made["weight_scale"] = linear_products.row_major(
                made["weight_scale"], shape, self.scheme.weight_key, self.product
            )
        return _rescaled(made, 0.5, formats.doubled) if self.halved else made

    def from_checkpoint(self, layer: QuantLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = _rescaled(tensors, 2, formats.halved) if self.halved else dict(tensors)
        if "weight_scale" in made and made["weight_scale"].ndim == 2:
            made["weight_scale"] = linear_products.arrange(made["weight_scale"], self.scheme.weight_key, self.product)
        return made

    def dtype_in_checkpoint(self, buffer: Tensor) -> torch.dtype:
        return FP8 if self.halved and buffer.dtype == FP8_FNUZ else buffer.dtype

    def taken(self, layer: QuantLinear, x: Tensor | QuantizedActivation) -> QuantizedActivation:
        """The layer's input quantized as it wants it: as it is, or by the layer. Raises ValueError for another key."""
        if isinstance(x, QuantizedActivation):
            if x.quant_key != self.input_quant_key:
                raise ValueError(f"{layer.name}: x is quantized as {x.quant_key}, expected {self.input_quant_key}")
        elif isinstance(x, Tensor) and x.shape[-1:] != (layer.in_features,):
            raise ValueError(f"{layer.name}: x is {list(x.shape)}, expected [..., {layer.in_features}]")
        else:
            x = fused_ops.quantize(x, **layer.input_quant())
        return x

    def apply(self, layer: QuantLinear, x: Tensor | QuantizedActivation, bias: Tensor | None = None) -> Tensor:
        x = self.taken(layer, x)
        buffers: dict[str, Any] = layer._buffers  # nn.Module's attribute lookup would cost as much as a small product
        return fused_ops.scaled_linear(
            x,
            buffers["weight"],
            buffers["weight_scale"],  # whose dtype and shape say what its key is
            bias,
            out_dtype=x.orig_dtype,
            weight_scale2=buffers.get("weight_scale2"),
            weight_sums=buffers.get("weight_sums"),
        )


def _rescaled(buffers: dict[str, Tensor], factor: float, converted: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Buffers with other codes of the weight, and so many times its scale and the input's."""
    change = {"weight": converted} | dict.fromkeys(("weight_scale", "input_scale"), lambda scale: scale * factor)
    return {name: change[name](tensor) if name in change else tensor for name, tensor in buffers.items()}


def _check_bias(name: str, bias: Tensor | None, shape: list[int]) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{name}: bias is {got}, expected {FLOATS}")
    if list(bias.shape) != shape:
        raise ValueError(f"{name}: bias is {list(bias.shape)}, expected {shape}")


class QuantLinear(nn.Module):
    """A linear layer whose weight is stored, and whose input is taken, quantized.

    It accepts a `QuantizedActivation` whose key is `input_quant_key`, with whatever scale it carries, since codes and
    scale describe themselves; another key raises ValueError. A plain tensor is quantized first, by the same
    operation a producer uses. The result has the dtype that the activation had before it was quantized.

    It is laid out for the device it is on. `.to("cuda")` lays it out anew, so that `input_quant_key` may change, or
    raises the ValueError that building it there raises: before this layer moves, but not before those ahead of it.

    Args:
        in_features, out_features: K and N.
        method: what to do with weight and input.
        bias: [N] or None.
        name: the layer's path, for messages.
        device: where its buffers live.
        dtype: of the activations, where it is known, and as casts of the model change it: a product that doesn't make
            it is refused where the layer is built, moved or cast, and otherwise when it is called.
    """

    experts: int | None = None  # that have a weight each, in QuantGroupedLinear
    weight: Tensor
    weight_scale: Tensor
    weight_scale2: Tensor  # these six where the scheme asks for them
    weight_sums: Tensor
    input_scale: Tensor
    input_scale2: Tensor
    input_scale_ub: Tensor
    input_zero_point: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        method: QuantMethod,
        bias: Tensor | None = None,
        *,
        name: str = "QuantLinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_bias(name, bias, [out_features] if self.experts is None else [self.experts, out_features])
        self.in_features, self.out_features, self.method, self.name = in_features, out_features, method, name
        self.dtype = dtype
        self.register_buffer("bias", bias)
        method.create_weights(self, device)

    @property
    def input_quant_key(self) -> QuantKey | None:
        """What this layer wants its input to be."""
        return self.method.input_quant_key

    def input_quant(self, prefix: str = "") -> dict[str, Any]:
        """What a producer needs: `fused_add_rms_norm_quant(x, r, w, eps, **layer.input_quant())`.

        prefix: of the names, for a producer whose own arguments would clash: attention, which has a scale of its own,
        takes `**o_proj.input_quant("output_")`. Raises ValueError for any other.
        """
        if prefix not in _PREFIXES:
            raise ValueError(f'{self.name}: prefix is {prefix!r}, expected "output_" (for attention) or none')
        options = {
            "quant_key": self.method.input_quant_key,
            "scale": self._buffers.get("input_scale"),
            "scale2": self._buffers.get("input_scale2"),
            "zero_point": self._buffers.get("input_zero_point"),
            "scale_ub": self._buffers.get("input_scale_ub"),
            "pad_rows": self.method.pad_rows,
        }
        return {prefix + name: value for name, value in options.items()} if prefix else options

    def forward(self, x: Tensor | QuantizedActivation) -> Tensor:
        return self.method.apply(self, x, self._buffers["bias"])

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # The codes of another scheme have the same names and shapes, and would be cast.
        buffers = dict(self.named_buffers(recurse=False))
        own = {name: state_dict[prefix + name] for name in buffers if name != "bias" and prefix + name in state_dict}
        for name, loaded in own.items():
            if loaded.dtype != (wanted := self.method.dtype_in_checkpoint(buffers[name])):
                errors.append(f"{prefix}{name} is {loaded.dtype}, expected {wanted} as {self.input_quant_key}")
                return
        made = self.method.from_checkpoint(self, own)
        state_dict.update({prefix + name: tensor for name, tensor in made.items()})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if (sums := self._buffers.get("weight_sums")) is not None:
            sums.copy_(self.weight.sum(1, dtype=torch.int32))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        names = [name for name in self._buffers if name != "bias" and prefix + name in destination]
        own = self.method.to_checkpoint(self, {name: destination[prefix + name] for name in names})
        destination.update({prefix + name: tensor for name, tensor in own.items()})

    def _apply(self, fn, recurse=True):
        # A change of dtype (model.half()) means the activations': codes and scales stay what the key says they are.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        sample = fn(self.weight.new_empty(0, dtype=self.dtype))
        dtype = None if self.dtype is None else sample.dtype
        moves, bias = sample.device != self.weight.device, self.bias
        if moves or dtype != self.dtype:
            self.method.check_device(self, sample.device, dtype)
        self._buffers["bias"] = None
        super()._apply(moved, recurse)
        self._buffers["bias"], self.dtype = None if bias is None else fn(bias), dtype
        if moves:
            self.method.lay_out(self)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, input={self.input_quant_key}"
