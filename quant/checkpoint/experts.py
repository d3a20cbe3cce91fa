"""Experts in files: linear layers of their own, `experts.3.gate_proj`, of which layers here hold several in one.

A stacked layer has a scale for its input, and a second one for each weight, where the files' layers have their own. So
an input's is the largest of theirs, as in vLLM; second scales and zero points must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_ops.linear import block_key

from ..key import FP8
from ..methods import QuantExperts, QuantGroupedLinear, ScaledLinearMethod, Scheme
from ..methods.experts import PROJECTIONS, holds_experts, strip, weights_of
from .config import Recipe
from .formats import FLOATS, Format, cast

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Part:
    """What a layer of the files is in a stacked one: some rows of an expert's weight, or all of it."""

    expert: int | slice
    rows: slice

    def of(self, layer: QuantGroupedLinear, buffer: str, tensor: Tensor) -> Tensor:
        """Its view of the layer's tensor of this name."""
        if buffer.startswith("input"):
            return tensor
        own, high = tensor[self.expert], layer.method.scheme.weight_key.scale.group_shape.rows
        if buffer == "weight_scale2" or (buffer == "weight_scale" and high == -1):
            return own
        if buffer == "weight_scale" and high > 1:
            return own[self.rows.start // high : -(-self.rows.stop // high)]
        return own[self.rows]


class Slot(NamedTuple):
    """Where a tensor of the files goes: a stacked layer and its buffer, or experts and their parameter; which part."""

    path: str
    buffer: str
    part: Part


def parts_of(path: str, experts: Any) -> Iterator[tuple[str, str, Part]]:
    """(name of a layer in files, path of the stacked one, what it is there) of experts, quantized or not."""
    stock: Any = experts.stock if isinstance(experts, QuantExperts) else experts
    for name, names in PARTS.items():
        count, outs = _sizes(experts, name)
        for number, part in enumerate(names):
            if len(names) == 1 or stock.is_concatenated:
                size = outs // len(names)
                rows = slice(number * size, (number + 1) * size)
            else:
                rows = slice(number, outs, len(names))
            for expert in range(count):
                yield f"{path}.{expert}.{part}", f"{path}.{name}", Part(expert, rows)


def stacked_parts(path: str) -> Iterator[tuple[str, str, Part]]:
    """`parts_of` of files that have them stacked too."""
    for name in PARTS:
        yield f"{path}.{name}", f"{path}.{name}", Part(slice(None), slice(None))


def _sizes(experts: Any, name: str) -> tuple[int, int]:
    """How many, and how many rows each of their weights has."""
    if isinstance(experts, QuantExperts):
        layer: QuantGroupedLinear = getattr(experts, name)
        return layer.experts, layer.out_features
    count, outs, _ = weights_of(experts, name)[0].shape
    return count, outs


def format_of(path: str, experts: Any, recipe: Recipe, called: Callable[[str], tuple[str, ...]]) -> Format | None:
    """How the files have a model's experts, or None where they aren't quantized; ValueError where they differ.

    called: the names of a layer, here and in the files.
    """
    if recipe.stacked is not None:
        return None if any(recipe.ignored(each, experts) for each in called(path)) else recipe.stacked
    linear = nn.Linear(1, 1, device="meta")
    names = [name for name, *_ in parts_of(path, experts)]
    forms = [recipe.format_of(called(name), linear) for name in names]
    if any(form != forms[0] for form in forms):  # "re:.*gate" means the router of files that say w1, not gate_proj
        forms = [recipe.format_of(called(name)[1:] or called(name), linear) for name in names]
    for name, form in zip(names, forms, strict=True):
        if form != forms[0]:
            raise ValueError(
                f"quantization_config: {_called(names[0], forms[0], called)}, but {_called(name, form, called)}: "
                f"{path} has one format for all experts"
            )
    return forms[0]


def _called(name: str, form: Format | None, called: Callable[[str], tuple[str, ...]]) -> str:
    """For messages, by its usual name in files."""
    scheme = None if form is None else form.scheme
    said = "isn't quantized" if scheme is None else f"has {scheme.weight_key} weights for {scheme.input_quant_key}"
    return f"{called(name)[-1]} {said}"


def empty_experts(path: str, experts: Any, form: Format, dtype: torch.dtype) -> QuantExperts:
    """The experts, whose weights are on meta, with layers for the files' codes and scales."""
    scheme = form.scheme
    if scheme.weight_key.per_tensor:  # gates and ups have one each, so that rows have one
        scheme = replace(scheme, weight_key=block_key(scheme.weight_key.dtype, 1, -1))
    high, inner = scheme.weight_key.scale.group_shape.rows, weights_of(experts, "down_proj")[0].shape[2]
    if high > 1 and (inner % high or not experts.is_concatenated):
        raise ValueError(
            f"quantization_config: {path} has {inner} rows of gates and of ups, expected them one after the other and "
            f"a multiple of {high}: blocks of {high} would have both"
        )
    layers = {name: _empty_layer(path, experts, name, scheme, dtype) for name in PROJECTIONS}
    strip(experts)
    return QuantExperts(layers["gate_up_proj"], layers["down_proj"], experts)


def _empty_layer(path: str, experts: Any, name: str, scheme: Scheme, dtype: torch.dtype) -> QuantGroupedLinear:
    (weight, bias), method = weights_of(experts, name), ScaledLinearMethod(scheme)
    count, outs, cols = weight.shape
    bias = None if bias is None else torch.empty(bias.shape, dtype=dtype)
    try:
        layer = QuantGroupedLinear(count, cols, outs, method, bias, name=f"{path}.{name}", device="cpu")
    except ValueError as error:
        raise ValueError(f"quantization_config: {path}: {error}") from None
    for buffer, tensor in layer.named_buffers(recurse=False):
        if buffer.startswith("input_scale"):
            tensor.zero_()
        elif buffer == "weight_scale2":
            tensor.fill_(float("nan"))
        elif buffer == "input_zero_point":
            tensor.fill_(_UNSET)
    return layer


_UNSET = torch.iinfo(torch.int32).max


def put(layer: QuantGroupedLinear, slot: Slot, form: Format, tensor: Tensor) -> None:
    """Write a tensor of the files where it belongs. Raises ValueError where it can't be."""
    name, place = slot.buffer, slot.part.of(layer, slot.buffer, layer.get_buffer(slot.buffer))
    if name == "bias":
        _put_floats(place, tensor)
        return
    one = name == "weight_scale" and form.scheme.weight_key.per_tensor
    like = place[:1] if one else place
    stored = form.dialect.stored(name, form.scheme.weight_key)
    value = stored.value(tensor, like)
    if name == "weight" and value.dtype == FP8 and (value.view(torch.uint8) & 0x7F == 0x7F).any():
        raise ValueError("has values that aren't finite")
    if name in (given := dict(form.given)) and value.item() != given[name]:
        raise ValueError(f"is {value.item()}, the configuration says {given[name]}")
    if name in ("input_scale", "input_scale2", "weight_scale2") and not (value.isfinite() & (value > 0)).all():
        raise ValueError(f"is {tensor.item()}, expected a positive, finite scale, and so its reciprocal")
    if name in ("input_scale", "input_scale2"):
        value = torch.maximum(place, value)
    elif name in ("weight_scale2", "input_zero_point"):
        unset = place.isnan() if place.is_floating_point() else place == _UNSET
        if not unset.all() and not torch.equal(place, value):
            raise ValueError(
                f"is {tensor.item()}, and {stored.save(place).item()} elsewhere in {slot.path}, which has one"
            )
    place.copy_(value.expand_as(place))


def fill(experts: Any, slot: Slot, tensor: Tensor, dtype: torch.dtype) -> None:
    """`put` of experts that aren't quantized, whose parameter is made in this dtype when its first part comes."""
    stacked: nn.Parameter = getattr(experts, slot.buffer)
    if stacked.is_meta:
        stacked = nn.Parameter(torch.empty(stacked.shape, dtype=dtype), requires_grad=False)
        setattr(experts, slot.buffer, stacked)
    weight, bias = weights_of(experts, slot.buffer.removesuffix("_bias"))
    of = bias if slot.buffer.endswith("_bias") else weight
    assert of is not None
    _put_floats(of[slot.part.expert][slot.part.rows], tensor)


def _put_floats(place: Tensor, tensor: Tensor) -> None:
    if list(tensor.shape) != list(place.shape) or tensor.dtype not in FLOATS:
        raise ValueError(f"is {tensor.dtype} {list(tensor.shape)}, expected floats {list(place.shape)}")
    place.copy_(cast(tensor, place.dtype))


__all__ = ["PARTS", "Slot", "empty_experts", "fill", "format_of", "holds_experts", "parts_of", "put", "stacked_parts"]
