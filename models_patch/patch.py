"""`patch` and `unpatch`: finds the roles in a model, decides what each can do, and binds the fused forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantKey

from .families import MODELS, Family, family_of, mismatch, mismatch_loop, passes_on
from .forwards import BODIES, UNQUANTIZED, decoder_layer, gated_mlp, last_norm
from .report import Entry, Report

ATTENTION, MLP, DOWN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)  # who shares an input


def patch(model: nn.Module) -> Report:
    """Let a Hugging Face model call fused operations; same weights, same bits as before on the `reference` backend.

    Llama, Mistral, Qwen2 and SmolLM models of transformers 5, with a head or without. Additions of the residual are
    done by the norm that follows, across layers too; norms and activations quantize for the linear layers that take
    their result, once for those that take the same. Attention and caches stay as they are. What can't be fused, because
    a stock forward isn't one of those known, is left as it was, and the report says why.

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
    for module, forward in plan.forwards.items():
        module.forward = forward
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module has its class's forward again. A model that isn't patched stays as it is.

    Raises:
        TypeError: model is not a torch module.
        ValueError: something else has wrapped a patched forward since; that has to be undone first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is {type(model).__name__}, expected a torch.nn.Module")
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if not _is_patched(module) and forward is not None and _is_ours(inspect.unwrap(forward)):
            raise ValueError(f"unpatch: something else has wrapped the patched forward of {path}; undo that first")
    for module in model.modules():
        if _is_patched(module):
            del module.forward


class _Plan:
    """What to bind where, and the report on it; nothing is touched while it is made."""

    def __init__(self) -> None:
        self.forwards: dict[nn.Module, partial] = {}
        self.entries: list[Entry] = []

    def add(self, path: str, base: Any, family: Family) -> None:
        # Layers and last norm hand each other Pendings, so it's all of them or none.
        problem = _stream_problem(base, family)
        if problem is not None:
            self.leave(_join(path, "layers"), base.layers, problem)
        for index, layer in enumerate(base.layers):
            name = _join(path, f"layers.{index}")
            if problem is None:
                self.add_layer(name, layer, first=index == 0)
            if hasattr(layer, "mlp"):
                self.add_mlp(f"{name}.mlp", layer.mlp, family)
        if problem is None:
            self.bind(last_norm, base.norm)
            self.call(_join(path, "norm"), base.norm, "fused_add_rms_norm" if len(base.layers) else "rms_norm")

    def add_layer(self, path: str, layer: Any, first: bool) -> None:
        attention_key, attention_note = _shared_key(layer.self_attn, "hidden_states", ATTENTION)
        mlp_key, mlp_note = _shared_key(layer.mlp, "x", MLP)
        quantize = {"quantize_attention": attention_key is not None, "quantize_mlp": mlp_key is not None}
        self.bind(decoder_layer, layer, **quantize)
        norm = "rms_norm" if first else "fused_add_rms_norm"
        self.call(f"{path}.input_layernorm", layer.input_layernorm, norm, attention_key, ATTENTION, attention_note)
        self.leave(f"{path}.self_attn", layer.self_attn, "attention, rotary embedding and cache are the model's own")
        norm, module = "fused_add_rms_norm", layer.post_attention_layernorm
        self.call(f"{path}.post_attention_layernorm", module, norm, mlp_key, MLP, mlp_note)

    def add_mlp(self, path: str, mlp: Any, family: Family) -> None:
        problem = _problem(mlp, family.mlp)
        if problem is None and not isinstance(mlp.act_fn, nn.SiLU):
            problem = mismatch(mlp.act_fn, family.activation)
        if problem is not None:
            self.leave(path, mlp, problem)
            return
        key, note = _agreed_key(mlp, DOWN)
        self.bind(gated_mlp, mlp, quantize=key is not None)
        self.call(path, mlp, "silu_mul", key, DOWN, note)

    def bind(self, body: Callable, module: nn.Module, **decisions: bool) -> None:
        # A partial, since a bound method can't be pickled under another name.
        self.forwards[module] = partial(body, module, **decisions)

    def call(
        self,
        path: str,
        module: nn.Module,
        operation: str,
        key: QuantKey | None = None,
        linears: tuple[str, ...] = (),
        note: str = "",
    ) -> None:
        operation, feeds = (f"{operation}_quant", linears) if key else (operation, ())
        self.entries.append(Entry(path, type(module).__name__, operation, key, feeds, note))

    def leave(self, path: str, module: nn.Module, note: str) -> None:
        self.entries.append(Entry(path, type(module).__name__, None, note=note))


def _stream_problem(base: Any, family: Family) -> str | None:
    """Why the additions between the layers of `base` can't be fused; None where they can."""
    problems = [_replaced(base) or mismatch_loop(base, family)]
    for layer in base.layers:
        problems.append(_problem(layer, family.layer))
        if problems[-1] is None:
            problems += [_problem(n, family.norm) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    problems.append(_problem(base.norm, family.norm))
    return next(filter(None, problems), None)


def _problem(module: nn.Module, stock: Callable) -> str | None:
    return _replaced(module) or mismatch(module, stock)


def _replaced(module: nn.Module) -> str | None:
    if "forward" not in vars(module) or _is_patched(module):
        return None
    return f"the forward of this {type(module).__name__} has been replaced by something else already"


def _is_patched(module: nn.Module) -> bool:
    return _is_ours(vars(module).get("forward"))


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in BODIES


def _shared_key(module: nn.Module, argument: str, linears: tuple[str, ...]) -> tuple[QuantKey | None, str]:
    """`_agreed_key` of linear layers that get their input through the stock forward of `module`."""
    key, note = _agreed_key(module, linears)
    if key is not None and (_replaced(module) or not passes_on(module, argument, linears)):
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
