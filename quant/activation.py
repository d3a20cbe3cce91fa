"""`QuantizedActivation`: what a fused operation hands to the linear layer that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import formats
from .key import QuantKey

_TENSORS = ("data", "scale", "scale2", "zero_point", "unquantized")


@dataclass(frozen=True, eq=False, init=False)
class QuantizedActivation:
    """A quantized tensor of logical shape [..., N], with what is needed to decode it.

    data: the codes, [..., N], or uint8 [..., N // 2] for four-bit formats (the low nibble is the even column).
    scale: in the layout that `quant_key.scale.layout` names; see `ScaleLayout`.
    quant_key: the scheme; a layer that wants another one refuses the activation.
    orig_dtype: dtype of the tensor that was quantized.
    scale2: NVFP4's per-tensor scale, float32.
    zero_point: int32, asymmetric keys.
    unquantized: the tensor before quantization, [..., N] in `orig_dtype`, where it was asked for.
    """

    data: Tensor
    scale: Tensor
    quant_key: QuantKey
    orig_dtype: torch.dtype
    scale2: Tensor | None = None
    zero_point: Tensor | None = None
    unquantized: Tensor | None = None

    # A frozen dataclass's own __init__ costs three times as much, on every call of a fused operation.
    def __init__(self, data, scale, quant_key, orig_dtype, scale2=None, zero_point=None, unquantized=None):
        fields = self.__dict__
        fields["data"] = data
        fields["scale"] = scale
        fields["quant_key"] = quant_key
        fields["orig_dtype"] = orig_dtype
        fields["scale2"] = scale2
        fields["zero_point"] = zero_point
        fields["unquantized"] = unquantized

    @property
    def orig_shape(self) -> torch.Size:
        """The logical shape [..., N]."""
        *rows, stored = self.data.shape
        return torch.Size([*rows, stored * self.quant_key.packing])

    @property
    def shape(self) -> torch.Size:
        """`orig_shape`, for model code that asks its input for leading dimensions."""
        return self.orig_shape

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """`data * scale` (`* scale2`; `(data - zero_point) * scale`) as [..., N], in `orig_dtype` or `dtype`.

        Computed in float32, rounded once.
        """
        return formats.dequantize(
            self.data, self.scale, self.quant_key, scale2=self.scale2, zero_point=self.zero_point
        ).to(dtype or self.orig_dtype)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> QuantizedActivation:
        """The same on another device. Dtypes are what the key says and can't be changed here."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"QuantizedActivation.to: device is {device}; use dequantize(dtype) to change the dtype")
        tensors = {name: getattr(self, name) for name in _TENSORS}
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None}
        for name in moved.keys() & {"scale", "zero_point"}:
            here = tensors[name]
            if moved[name].stride() != here.stride():  # a layout's padding, which Tensor.to closes up
                there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device=device)
                moved[name] = there.copy_(here, non_blocking=non_blocking)
        return replace(self, **moved)

    def __repr__(self) -> str:
        return f"QuantizedActivation({self.quant_key}, {list(self.orig_shape)}, from {self.orig_dtype})"


def _flatten(q: QuantizedActivation):
    names = tuple(name for name in _TENSORS if getattr(q, name) is not None)
    return [getattr(q, name) for name in names], (names, q.quant_key, q.orig_dtype)


def _unflatten(tensors, context) -> QuantizedActivation:
    names, quant_key, orig_dtype = context
    return QuantizedActivation(quant_key=quant_key, orig_dtype=orig_dtype, **dict(zip(names, tensors, strict=True)))


pytree.register_pytree_node(QuantizedActivation, _flatten, _unflatten, serialized_type_name="quant.QuantizedActivation")
