"""Quantizing the linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fused_ops._check import FLOATS

from .calibration import Calibration, check_batches, observe
from .experts import PROJECTIONS, experts_of, observed, quantized_experts, routes, strip, weights_of
from .linear import QuantLinear, ScaledLinearMethod
from .scheme import SCHEMES, Scheme


def quantize_model(
    model: nn.Module,
    scheme: str,
    calibration: Iterable[Tensor | Mapping[str, Any]] | Calibration | None = None,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
) -> nn.Module:
    """Replace every `nn.Linear` of `model` by a `QuantLinear`, in place, and experts by `QuantExperts`.

    Experts are those of transformers 5 that hold gates and ups, and downs, in one weight each: Qwen3-MoE, Mixtral,
    DeepSeek, MiniMax-M2, GLM4-MoE, gpt-oss, ... Each expert's weight is quantized for itself; a calibrated scale of
    their input is one for all of them. Routers stay as they are (Phimoe's too, which is a kind of `nn.Linear`), but for
    an `nn.Linear` in one (HunYuan's, AFMoE's), which is a layer as others are: ignore it.

    Args:
        model: any module; its weights and biases are bfloat16, float16 or float32.
        scheme: a name in `quant.methods.SCHEMES`: "int8_token", "int8_static", "int8_static_asym", "fp8_static",
            "fp8_token", "fp8_block", "fp8_group64", "mxfp8", "mxfp4", "nvfp4".
        calibration: batches for the schemes that are calibrated (the static ones and nvfp4): what `model(batch)` takes,
            or keyword arguments. Each layer's scale comes from the least and the largest value of its input over them.
            Or these values, as `quant.checkpoint.calibrate` returns them.
        ignore: layers left alone, by path or last part of it; a name that fits no module raises, but for "lm_head".
            Models with latents (MLA) want ("lm_head", "kv_b_proj"): attention over blocks takes that weight itself.

    Returns:
        model, whose `save_pretrained` raises RuntimeError: `quant.checkpoint.save_quantized` writes what can be loaded.

    Raises:
        TypeError, ValueError: an argument is not as above, a weight isn't finite or is shared with another module, its
            columns are no multiple of the scheme's group (32 of mxfp8 and mxfp4, 16 of nvfp4), experts aren't those
            that transformers' interface serves (Llama4's), it is on a GPU that has no such product, or none that makes
            its dtype (`fused_ops.linear_products.DEVICES`; for experts that is without Triton), or all of it is
            quantized already; the model is left as it was.
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
    layers, experts = layers_of("quantize_model", model, ignore)
    spans = _spans(model, layers, experts, calibration)
    made: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        made[path] = _quantized(path, layer, chosen, spans.get(path))
    for path, module in experts.items():
        inputs = {name: spans.get(f"{path}.{name}") for name in PROJECTIONS}
        with _named(path):
            made[path] = quantized_experts(path, module, chosen, inputs)
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    for module in experts.values():
        strip(module)
    refuse_save_pretrained(model)
    return model


def refuse_save_pretrained(model: nn.Module) -> None:
    """Have transformers' `save_pretrained` raise, on the model and models in it: nothing would load what it writes.

    Where it raises already, since the model is cut over ranks, it says so on.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained") and "save_pretrained" not in vars(module):
            vars(module)["save_pretrained"] = _save_pretrained


def _save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained: the model is quantized, and nothing would load what it wrote: save it by "
        "quant.checkpoint.save_quantized, or its state_dict(), which loads into a model that was quantized alike"
    )


def calibrated_inputs(
    caller: str,
    name: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    experts: dict[str, nn.Module],
    batches: Iterable[Any],
    *after: Any,
) -> Calibration:
    """`observe` of linear layers, and of the projections of experts."""
    with observed(experts) as probes:
        return observe(caller, name, model, {**layers, **probes}, batches, *after)


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"quantize_model: {path}: {error}") from None


def layers_of(
    caller: str, model: nn.Module, ignore: tuple[str, ...]
) -> tuple[dict[str, nn.Linear], dict[str, nn.Module]]:
    """The linear layers and the modules of experts to quantize, by path.

    Raises TypeError or ValueError where one of them can't be, or there is none.
    """
    if not isinstance(ignore, (tuple, list, set)) or not all(isinstance(name, str) for name in ignore):
        raise TypeError(f"{caller}: ignore is {ignore!r}, expected a tuple of names")
    for name in set(ignore) - {"lm_head"}:  # the default, which not every model has
        if not any(name in (path, path.rpartition(".")[2]) for path, _ in model.named_modules()):
            raise ValueError(f"{caller}: ignore names {name!r}, and model has no module of that name")
    ignored = set(ignore)
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not {path, path.rpartition(".")[2]} & ignored:
            if type(module) is not nn.Linear:
                if routes(model.get_submodule(path.rpartition(".")[0])):
                    continue
                raise ValueError(f"{caller}: {path} is {type(module).__name__}, expected nn.Linear (or ignore it)")
            layers[path] = module
    experts = experts_of(caller, model, ignored)
    if not (layers or experts) or "" in layers:
        already = ", quantized already," if any(isinstance(each, QuantLinear) for each in model.modules()) else ""
        raise ValueError(f"{caller}: model is {type(model).__name__}{already} and contains no nn.Linear to replace")
    weights = {path: layer.weight for path, layer in layers.items()}
    weights |= {f"{path}.{name}": getattr(module, name) for path, module in experts.items() for name in PROJECTIONS}
    biases: dict[str, Tensor | None] = {path: layer.bias for path, layer in layers.items()}
    for path, module in experts.items():
        biases |= {f"{path}.{name}": weights_of(module, name)[1] for name in PROJECTIONS}
    _check_dtypes(caller, "weight", weights)
    _check_dtypes(caller, "bias", biases)
    _check_weights(caller, model, weights)
    return layers, experts


def _check_dtypes(caller: str, kind: str, tensors: Mapping[str, Tensor | None]) -> None:
    for path, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{caller}: the {kind} of {path} is {tensor.dtype}, expected bfloat16, float16 or float32")


def _check_weights(caller: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"{caller}: the weight of {path} is on meta, expected one with values")
        if len(shared := owners[id(weight)]) > 1:
            raise ValueError(f"{caller}: the weight of {path} is shared by {shared}; ignore that layer")


def _spans(
    model: nn.Module, layers: dict[str, nn.Linear], experts: dict[str, nn.Module], calibration: Any
) -> Mapping[str, Tensor]:
    if calibration is None:
        return {}
    if not isinstance(calibration, Calibration):
        return calibrated_inputs("quantize_model", "calibration", model, layers, experts, calibration)
    for path in (*layers, *(f"{path}.{name}" for path in experts for name in PROJECTIONS)):
        span = calibration.get(path)
        if not (isinstance(span, Tensor) and span.shape == (2,) and span.isfinite().all()):
            got = "nothing" if span is None else repr(span)
            raise ValueError(f"quantize_model: calibration has {got} of {path}, expected its least and largest input")
    return calibration


def _quantized(path: str, layer: nn.Linear, scheme: Scheme, span: Tensor | None) -> QuantLinear:
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    method = ScaledLinearMethod(scheme)
    with _named(path):
        quantized = QuantLinear(
            layer.in_features, layer.out_features, method, bias, name=path, device=weight.device, dtype=weight.dtype
        )
        made = scheme.quantize_weight(weight)
    if span is not None:
        made |= scheme.calibrate(*span)
    for name, tensor in made.items():
        quantized.get_buffer(name).copy_(tensor)
    method.process_weights_after_loading(quantized)
    return quantized.train(layer.training)
