"""Quantizing the linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantLinear, ScaledLinearMethod
from .scheme import SCHEMES, Scheme, static_scale


def quantize_model(
    model: nn.Module,
    scheme: str,
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Replace every `nn.Linear` of `model` by a `QuantLinear`, in place.

    Args:
        model: any module; its weights are bfloat16, float16 or float32.
        scheme: a name in `quant.methods.SCHEMES`: "int8_token", "fp8_static", "fp8_token", "fp8_block".
        calibration: batches for the static schemes: what `model(batch)` takes, or keyword arguments. Each layer's scale
            comes from the largest magnitude that its input has over them.
        ignore: layers left alone, by path or last part of it.

    Returns:
        model.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight isn't finite or is shared with another module;
            the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model is {type(model).__name__}, expected a torch.nn.Module")
    if scheme not in SCHEMES:
        raise ValueError(f"quantize_model: scheme is {scheme!r}, expected one of {list(SCHEMES)}")
    chosen = SCHEMES[scheme]
    if chosen.calibrated != (calibration is not None):
        needs = "takes batches to calibrate with" if chosen.calibrated else "computes its scales and takes none"
        got = "missing" if calibration is None else "given"
        raise ValueError(f"quantize_model: calibration is {got}, {scheme} {needs}")
    if isinstance(calibration, (Tensor, Mapping, str)) or not (
        calibration is None or isinstance(calibration, Iterable)
    ):
        kind = type(calibration).__name__
        raise TypeError(f"quantize_model: calibration is {kind}, expected a list (or another iterable) of batches")
    layers = _linear_layers(model, ignore)
    amax = {} if calibration is None else _input_amax(model, layers, calibration)
    made = {path: _quantized(path, layer, chosen, amax.get(path)) for path, layer in layers.items()}
    for path, layer in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


def _linear_layers(model: nn.Module, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not {path, path.rpartition(".")[2]} & set(ignore):
            if type(module) is not nn.Linear:
                raise ValueError(
                    f"quantize_model: {path} is {type(module).__name__}, expected nn.Linear (or ignore it)"
                )
            layers[path] = module
    if not layers or "" in layers:
        raise ValueError(f"quantize_model: model is {type(model).__name__} and contains no nn.Linear to replace")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        if len(shared := owners[id(layer.weight)]) > 1:
            raise ValueError(f"quantize_model: the weight of {path} is shared by {shared}; ignore that layer")
    return layers


def _input_amax(model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable) -> dict[str, Tensor]:
    """The largest magnitude of each layer's input over all batches."""
    amax: dict[str, Tensor] = {}

    def record(path: str):
        def hook(_, args):
            largest = args[0].detach().abs().amax().float()
            amax[path] = torch.maximum(amax[path], largest) if path in amax else largest

        return hook

    hooks = [layer.register_forward_pre_hook(record(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for path in layers:
        if path not in amax or not amax[path].isfinite():
            state = amax.get(path, "never run")
            raise ValueError(f"quantize_model: calibration gives {path} an input of magnitude {state}, expected finite")
    return amax


def _quantized(path: str, layer: nn.Linear, scheme: Scheme, amax: Tensor | None) -> QuantLinear:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    method = ScaledLinearMethod(scheme)
    quantized = QuantLinear(layer.in_features, layer.out_features, method, bias, name=path, device=weight.device)
    try:
        codes, scale = scheme.quantize_weight(weight)
    except ValueError as error:
        raise ValueError(f"quantize_model: {path}: {error}") from None
    quantized.weight.copy_(codes)
    quantized.weight_scale.copy_(scale)
    if amax is not None:
        quantized.input_scale.copy_(static_scale(amax, scheme.input_quant_key))
    method.process_weights_after_loading(quantized)
    return quantized.train(layer.training)
