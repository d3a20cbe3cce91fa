"""Quantizing the linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, check_batches, observe
from .linear import QuantLinear, ScaledLinearMethod
from .scheme import SCHEMES, Scheme


def quantize_model(
    model: nn.Module,
    scheme: str,
    calibration: Iterable[Tensor | Mapping[str, Any]] | Calibration | None = None,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Replace every `nn.Linear` of `model` by a `QuantLinear`, in place.

    Args:
        model: any module; its weights are bfloat16, float16 or float32.
        scheme: a name in `quant.methods.SCHEMES`: "int8_token", "int8_static", "int8_static_asym", "fp8_static",
            "fp8_token", "fp8_block", "fp8_group64", "mxfp8", "mxfp4", "nvfp4".
        calibration: batches for the schemes that are calibrated (the static ones and nvfp4): what `model(batch)` takes,
            or keyword arguments. Each layer's scale comes from the least and the largest value of its input over them.
            Or these values, as `quant.checkpoint.calibrate` returns them.
        ignore: layers left alone, by path or last part of it; a name that fits no module raises, but for "lm_head".
            Models with latents (MLA) want ("lm_head", "kv_b_proj"): attention over blocks takes that weight itself.

    Returns:
        model.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight isn't finite or is shared with another module, its
            columns are no multiple of the scheme's group (32 of mxfp8 and mxfp4, 16 of nvfp4), or it is on a GPU that
            has no such product (`fused_ops.linear_gpu.DEVICES`); the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: model is {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        error = ValueError if isinstance(scheme, str) else TypeError
        raise error(f"quantize_model: scheme is {scheme!r}, expected one of {list(SCHEMES)}")
    chosen = SCHEMES[scheme]
    if chosen.calibrated != (calibration is not None):
        needs = "takes batches to calibrate with" if chosen.calibrated else "computes its scales and takes none"
        got = "missing" if calibration is None else "given"
        raise ValueError(f"quantize_model: calibration is {got}, {scheme} {needs}")
    if calibration is not None and not isinstance(calibration, Calibration):
        check_batches("quantize_model", "calibration", calibration)
    layers = linear_layers("quantize_model", model, ignore)
    spans = _spans(model, layers, calibration)
    made = {path: _quantized(path, layer, chosen, spans.get(path)) for path, layer in layers.items()}
    for path, layer in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


def linear_layers(caller: str, model: nn.Module, ignore: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The layers to quantize, by path. Raises TypeError or ValueError where one of them can't be, or there is none."""
    if not isinstance(ignore, (tuple, list, set)) or not all(isinstance(name, str) for name in ignore):
        raise TypeError(f"{caller}: ignore is {ignore!r}, expected a tuple of names")
    for name in set(ignore) - {"lm_head"}:  # the default, which not every model has
        if not any(name in (path, path.rpartition(".")[2]) for path, _ in model.named_modules()):
            raise ValueError(f"{caller}: ignore names {name!r}, and model has no module of that name")
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not {path, path.rpartition(".")[2]} & set(ignore):
            if type(module) is not nn.Linear:
                raise ValueError(f"{caller}: {path} is {type(module).__name__}, expected nn.Linear (or ignore it)")
            if module.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise TypeError(
                    f"{caller}: the weight of {path} is {module.weight.dtype}, expected bfloat16, float16 or float32"
                )
            if module.weight.is_meta:
                raise ValueError(f"{caller}: the weight of {path} is on meta, expected one with values")
            layers[path] = module
    if not layers or "" in layers:
        raise ValueError(f"{caller}: model is {type(model).__name__} and contains no nn.Linear to replace")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        if len(shared := owners[id(layer.weight)]) > 1:
            raise ValueError(f"{caller}: the weight of {path} is shared by {shared}; ignore that layer")
    return layers


def _spans(model: nn.Module, layers: dict[str, nn.Linear], calibration: Any) -> Mapping[str, Tensor]:
    if calibration is None:
        return {}
    if not isinstance(calibration, Calibration):
        return observe("quantize_model", "calibration", model, layers, calibration)
    for path in layers:
        span = calibration.get(path)
        if not (isinstance(span, Tensor) and span.shape == (2,) and span.isfinite().all()):
            got = "nothing" if span is None else repr(span)
            raise ValueError(f"quantize_model: calibration has {got} of {path}, expected its least and largest input")
    return calibration


def _quantized(path: str, layer: nn.Linear, scheme: Scheme, span: Tensor | None) -> QuantLinear:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    method = ScaledLinearMethod(scheme)
    try:
        quantized = QuantLinear(layer.in_features, layer.out_features, method, bias, name=path, device=weight.device)
        made = scheme.quantize_weight(weight)
    except ValueError as error:
        raise ValueError(f"quantize_model: {path}: {error}") from None
    if span is not None:
        made |= scheme.calibrate(*span)
    for name, tensor in made.items():
        quantized.get_buffer(name).copy_(tensor)
    method.process_weights_after_loading(quantized)
    return quantized.train(layer.training)
