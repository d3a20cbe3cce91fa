"""`patch` and `unpatch`: finds the roles in a model, decides what each can do, and binds the fused forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantKey

from .families import (
    MODELS,
    Family,
    Gated,
    activation_of,
    family_of,
    mismatch,
    mismatch_layer,
    mismatch_loop,
    passes_on,
)
from .forwards import BODIES, UNQUANTIZED, decoder_layer, last_norm
from .report import Entry, Report

METHODS = ("forward", "_apply_gate")  # what is bound in the place of a class's own
DOWN = ("down_proj",)


def patch(model: nn.Module) -> Report:
    """Let a Hugging Face model call fused operations; same weights, same bits as before on the `reference` backend.

    The models of transformers 5 in `models_patch.families.MODELS`, with a head or without: Llama, Mistral, Qwen2,
    SmolLM, Granite, Phi3, GLM4, Gemma2, Gemma3, OLMo2, gpt-oss. Additions of the residual are done by the norm that
    follows, across layers too, and so are norms before the addition; norms and activations quantize for the linear
    layers that take their result, once for those that take the same. Attention, experts' products and caches stay as
    they are. What can't be fused, because a stock forward isn't one of those known, is left as it was, and the report
    says why.

    Forwards are bound to the modules of this model; weights and `state_dict` are untouched, nothing is global. A copy
    (`copy.deepcopy`, `torch.save`) of a patched model is patched. It is for inference: a backward pass raises. Nor is
    it for autocast, whose residuals have another dtype than what is added to them: that raises too.

    How results are quantized is decided here, by the linear layers that the model has now. So quantize first; a model
    that is quantized after it was patched gives the same numbers, but its layers quantize for themselves until `patch`
    is called again, which decides anew.

    Between layers a patched model passes `Pending` instead of a tensor. A decoder layer with forward hooks, such as
    those of `output_hidden_states=True`, which transformers leaves in place, returns the tensor, and its addition stays
    unfused. Hooks on norms of decoder layers don't run; other forward pre-hooks may see a `Pending` or a
    `QuantizedActivation`.

    Returns:
        `Report`: iterable, and a table when printed.

    Raises:
        TypeError: model is not a torch module.
        ValueError: no model that is known is in it, or nothing in it can be patched; it is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is {type(model).__name__}, expected a torch.nn.Module")
    bases = [(path, module, family) for path, module in model.named_modules() if (family := family_of(module))]
    if not bases:
        known = ", ".join(MODELS)
        raise ValueError(f"patch: model is {type(model).__name__}, expected one of {known}, or one around it")
    plan = _Plan()
    for path, base, family in bases:
        plan.add(path, base, family)
    report = Report(type(model).__name__, tuple(plan.entries))
    if not plan.forwards:
        reasons = "; ".join(dict.fromkeys(entry.note for entry in report.left))
        raise ValueError(f"patch: nothing in {type(model).__name__} can be patched: {reasons}")
    unpatch(model)
    for (module, method), forward in plan.forwards.items():
        setattr(module, method, forward)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module has its class's forward again. A model that isn't patched stays as it is.

    Raises:
        TypeError: model is not a torch module.
        ValueError: something else has wrapped a patched forward since; that has to be undone first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is {type(model).__name__}, expected a torch.nn.Module")
    own = [(path, module, name) for path, module in model.named_modules() for name in METHODS if name in vars(module)]
    for path, module, name in own:
        method = getattr(module, name)
        if not _is_ours(method) and _is_ours(inspect.unwrap(method)):
            raise ValueError(f"unpatch: something else has wrapped the patched {name} of {path}; undo that first")
    for _, module, name in own:
        if _is_ours(getattr(module, name)):
            delattr(module, name)


class _Plan:
    """What to bind where, and the report on it; nothing is touched while it is made."""

    def __init__(self) -> None:
        self.forwards: dict[tuple[nn.Module, str], partial] = {}
        self.entries: list[Entry] = []
        self.after: tuple[str, nn.Module] | None = None  # the norm that the next addition comes after

    def add(self, path: str, base: Any, family: Family) -> None:
        # Layers and last norm hand each other Pendings, so it's all of them or none.
        problem = _stream_problem(base, family)
        if problem is not None:
            self.leave(_join(path, "layers"), base.layers, problem)
        for index, layer in enumerate(base.layers):
            name = _join(path, f"layers.{index}")
            if problem is None:
                self.add_layer(name, layer, family, first=index == 0)
            self.add_gated(name, layer, family.gated)
        if problem is None:
            self.bind(last_norm, base.norm, norm=family.norm)
            self.add_norm(_join(path, "norm"), base.norm, first=not len(base.layers))

    def add_layer(self, path: str, layer: Any, family: Family, first: bool) -> None:
        sublayers, quantized = (family.attention, family.mlp), []
        for sublayer in sublayers:
            module = getattr(layer, sublayer.module)
            key, note = _shared_key(module, sublayer.linears)
            quantized.append(key is not None)
            feeds = sublayer.linears if key else ()
            if sublayer.before is not None:
                norm = getattr(layer, sublayer.before)
                self.add_norm(f"{path}.{sublayer.before}", norm, first, key, feeds, note)
            else:
                self.add_sum(f"{path}.{sublayer.module}", module, key, feeds, note)
            for left, reason in family.left:
                if left == sublayer.module:
                    self.leave(f"{path}.{left}", module, reason)
            if sublayer.after is not None:
                self.after = f"{path}.{sublayer.after}", getattr(layer, sublayer.after)
            first = False
        self.bind(decoder_layer, layer, sublayers=sublayers, norm=family.norm, quantized=tuple(quantized))

    def add_norm(
        self,
        path: str,
        module: nn.Module,
        first: bool,
        key: QuantKey | None = None,
        feeds: tuple[str, ...] = (),
        note: str = "",
    ) -> None:
        """A norm, with the addition before it, and the norm before that; the model's first adds nothing."""
        operation = "rms_norm" if first else "fused_add_rms_norm"
        if self.after is not None:
            operation = "rms_norm_add_rms_norm"
            note = "; ".join(filter(None, (f"{self.after[0].rpartition('.')[2]} included", note)))
        self.after = None
        self.call(path, module, operation + ("_quant" if key else ""), key, feeds, note)

    def add_sum(self, path: str, module: nn.Module, key: QuantKey | None, feeds: tuple[str, ...], note: str) -> None:
        """The input of a module with no norm before it: an addition, and a quantization of its own."""
        if self.after is not None:  # the model's first adds nothing
            self.call(*self.after, "rms_norm_add")
        if key is not None:
            self.call(path, module, "quantize", key, feeds)
        elif note:
            self.leave(path, module, note)

    def add_gated(self, path: str, layer: Any, gated: Gated) -> None:
        try:
            module: Any = layer.get_submodule(gated.path)
        except AttributeError:
            return  # the layer isn't a known one either
        path = f"{path}.{gated.path}"
        problem, activate = _problem(module, gated.stock, "MLP"), None
        if problem is None and gated.activation is not None:
            activation = getattr(module, gated.activation)
            problem = _replaced(activation, "forward")
            if problem is None:
                activate, problem = activation_of(activation)
        if problem is not None:
            self.leave(path, module, problem)
        elif activate is None:
            self.bind(gated.body, module, gated.method)
            self.call(path, module, gated.operation)
        else:
            key, note = _agreed_key(module, DOWN)
            self.bind(gated.body, module, activate=activate, quantized=key is not None)
            name = activate.__name__ if key else activate.__name__.removesuffix("_quant")
            self.call(path, module, name, key, DOWN if key else (), note)

    def bind(self, body: Callable, module: nn.Module, method: str = "forward", **decisions: Any) -> None:
        # A partial, since a bound method can't be pickled under another name.
        self.forwards[module, method] = partial(body, module, **decisions)

    def call(
        self,
        path: str,
        module: nn.Module,
        operation: str,
        key: QuantKey | None = None,
        feeds: tuple[str, ...] = (),
        note: str = "",
    ) -> None:
        self.entries.append(Entry(path, type(module).__name__, operation, key, feeds, note))

    def leave(self, path: str, module: nn.Module, note: str) -> None:
        self.entries.append(Entry(path, type(module).__name__, None, note=note))


def _stream_problem(base: Any, family: Family) -> str | None:
    """Why the additions between the layers of `base` can't be fused; None where they can."""
    norms = [*family.attention.norms, *family.mlp.norms]
    problems = [_replaced(base, "forward") or mismatch_loop(base, family)]
    for layer in base.layers:
        problems.append(_replaced(layer, "forward") or mismatch_layer(layer, family))
        if problems[-1] is None:
            problems += [_problem(getattr(layer, name), family.norm.stock, "norm") for name in norms]
    problems.append(_problem(base.norm, family.norm.stock, "norm"))
    return next(filter(None, problems), None)


def _problem(module: nn.Module, expected: type, role: str) -> str | None:
    return _replaced(module, *vars(expected)) or mismatch(module, expected, role)


def _replaced(module: nn.Module, *methods: str) -> str | None:
    for name in methods:
        if callable(own := vars(module).get(name)) and not _is_ours(own):
            return f"the {name} of this {type(module).__name__} has been replaced by something else already"
    return None


def _is_ours(method: Any) -> bool:
    return isinstance(method, partial) and method.func in BODIES


def _shared_key(module: nn.Module, linears: tuple[str, ...]) -> tuple[QuantKey | None, str]:
    """`_agreed_key` of linear layers that get their input through the stock forward of `module`."""
    key, note = _agreed_key(module, linears) if linears else (None, "")
    if key is not None and (_replaced(module, "forward") or not passes_on(module, linears)):
        return None, f"{type(module).__name__}.forward reads its input elsewhere too, so each quantizes its input"
    return key, note


def _agreed_key(module: nn.Module, linears: tuple[str, ...]) -> tuple[QuantKey | None, str]:
    """The key in which one activation serves all these linear layers, or None, and why not where they do quantize."""
    first, *others = [_input_quant(getattr(module, name)) for name in linears]
    for name, other in zip(linears[1:], others, strict=True):
        for field in dict.fromkeys([*first, *other]):
            if not _equal(first.get(field), other.get(field)):
                return None, f"{linears[0]} and {name} differ in {field}, so each quantizes its input"
    return first["quant_key"], ""


def _input_quant(linear: Any) -> dict[str, Any]:
    return linear.input_quant() if hasattr(linear, "input_quant") else UNQUANTIZED


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
