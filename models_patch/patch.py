"""`patch` and `unpatch`: finds the roles in a model, decides what each can do, and binds the fused forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantKey

from .attention_family import NO_ROTATION, attentions_of, complex_rotation_of, eager_of, unpaged
from .binding import METHODS, is_ours, replaced
from .families import (
    GATED,
    Family,
    Gated,
    activation_of,
    expected_instead,
    family_of,
    mismatch,
    mismatch_stream,
    passes_on,
)
from .forwards import UNQUANTIZED, decoder_layer, last_norm, stock_of
from .mixtures import mixture, mixture_of
from .ranks import workspace_of
from .report import Entry, Report
from .roles import Attention, LatentAttention, value_at

DOWN = ("down_proj",)
OUTPUT = ("o_proj",)
Q_B = ("q_b_proj",)


def patch(model: nn.Module) -> Report:
    """Let a Hugging Face model call fused operations; same weights, same bits as before on the `reference` backend.

    (But attention from the blocks of a `PagedKVCache` keeps its weights in float32, so its bits are its own.)

    The models of transformers 5 in `models_patch.families.MODELS`, with a head or without, and those that aren't listed
    but made of the same layers. Additions of the residual are done by the norm that follows, across layers too, and so
    are norms before the addition; norms and activations quantize for the linear layers that take their result, once for
    those that take the same. In attention, the norms of queries and keys, the rotation and the write into the cache are
    one call, the write where the cache has a place for it: a static one, a `PagedKVCache`, that of `generate_batch`.
    With a `PagedKVCache` attention reads keys and values in its blocks and quantizes its result for `o_proj`. With any
    other cache the attention function stays the model's, and so it does in a call with a mask that isn't all ones, or
    with `output_attentions`, and in training (see `paging`). What can't be fused, because a stock forward isn't one of
    those known, is left as it was, and the report says why.

    Forwards are bound to the modules of this model; weights and `state_dict` are untouched, nothing is global. A copy
    (`copy.deepcopy`, `torch.save`) of a patched model is patched. It is for inference: a backward pass raises. Nor is
    it for autocast, whose residuals have another dtype than what is added to them: that raises too.

    How results are quantized is decided here, by the linear layers that the model has now. So quantize first; a model
    that is quantized after it was patched gives the same numbers, but its layers quantize for themselves until `patch`
    is called again, which decides anew. Where its `kv_b_proj` was quantized too, latents are gathered from blocks.

    Between layers a patched model passes `Pending` instead of a tensor. A decoder layer with forward hooks, such as
    those of `output_hidden_states=True`, which transformers leaves in place, returns the tensor, and its addition stays
    unfused. Hooks on norms of decoder layers don't run; other forward pre-hooks may see a `Pending` or a
    `QuantizedActivation`, and hooks on `rotary_emb` and attentions the rows that `fused_ops.rope` takes in the place of
    (cos, sin).

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
        raise ValueError(f"patch: model is {type(model).__name__}, {expected_instead(model)}")
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
        if not is_ours(method) and is_ours(inspect.unwrap(method)):
            raise ValueError(f"unpatch: something else has wrapped the patched {name} of {path}; undo that first")
    for _, module, name in own:
        if is_ours(getattr(module, name)):
            delattr(module, name)


class _Plan:
    """What to bind where, and the report on it; nothing is touched while it is made."""

    def __init__(self) -> None:
        self.forwards: dict[tuple[nn.Module, str], partial] = {}
        self.entries: list[Entry] = []
        self.after: tuple[str, nn.Module] | None = None  # the norm that the next addition comes after
        self.part: tuple[str, nn.Module] | None = None  # whose result is still to be summed over ranks
        self.unpaged = ""  # why attentions of the model don't read the blocks of a cache

    def add(self, path: str, base: Any, family: Family) -> None:
        # Layers and last norm hand each other Pendings, so it's all of them or none.
        problem = _stream_problem(base, family)
        if problem is not None:
            self.leave(_join(path, "layers"), base.layers, problem)
        attentions = self.plan_attentions(base)
        for index, layer in enumerate(base.layers):
            name = _join(path, f"layers.{index}")
            if problem is None:
                self.add_layer(name, layer, family, *attentions[index], first=index == 0)
            else:
                self.add_attention(f"{name}.{family.attention.module}", layer, *attentions[index])
            for place, kinds in GATED.items():
                self.add_gated(f"{name}.{place}", layer, place, kinds)
        if problem is None:
            self.bind(last_norm, base.norm, norm=family.norm)
            self.add_norm(_join(path, "norm"), base.norm, first=not len(base.layers))

    def plan_attentions(self, base: Any) -> list[tuple[Attention | LatentAttention | None, str]]:
        """(what it does, why it is left) of each layer's attention; binds what those that aren't need of the model."""
        attentions = attentions_of(base)
        # The model makes one mask for all its layers, so blocks are read by all of them or none.
        problems = [role.unpaged if role else note for role, note in attentions]
        self.unpaged = next(filter(None, problems), "") or unpaged(base, [role for role, _ in attentions])
        if self.unpaged:
            attentions = [(None, NO_ROTATION) if role and not role.rotation else (role, n) for role, n in attentions]
        else:
            from .paging import model  # which imports transformers, as who has a model does

            self.bind(model, base)
        rotations = [role.rotation for role, _ in attentions if role is not None and role.rotation is not None]
        if rotations:
            from .attention import table

            self.bind(table, base.rotary_emb, repeats=rotations[0].repeats)
        return attentions

    def add_attention(self, path: str, layer: Any, role: Attention | LatentAttention | None, note: str) -> None:
        module: Any = getattr(layer, path.rpartition(".")[2], None)
        if module is not None and role is None:
            self.leave(path, module, note)
        elif role is not None:
            key, note = _row_key(module, OUTPUT)
            decided = {"role": role, "eager": eager_of(module), "quantized": key is not None}
            if isinstance(role, LatentAttention):
                self.add_latents(path, module, role, decided)
                operation = "mla_attention"
            else:
                self.add_heads(path, module, role, decided)
                operation = "paged_attention"
            if not self.unpaged:
                note = "; ".join(filter(None, ("with a PagedKVCache", note)))
                self.call(path, module, operation + ("_quant" if key else ""), key, OUTPUT if key else (), note)

    def add_heads(self, path: str, module: Any, role: Attention, decided: dict[str, Any]) -> None:
        from .attention import attention

        if role.norm is not None and role.whole_vector and workspace_of(module) is not None:
            role = replace(role, norm=None, norm_over_ranks=role.norm)
            decided = {**decided, "role": role}
            self.call(path, module, "qk_all_reduce_rms_norm")
        self.bind(attention, module, **decided)
        if role.operation is not None:
            write = f"{role.operation}_kv_cache_write into static and paged caches"
            self.call(path, module, role.operation, note=self.with_reason(write))

    def add_latents(self, path: str, module: Any, role: LatentAttention, decided: dict[str, Any]) -> None:
        from .latent_attention import latent_attention

        key, note = _agreed_key(module, Q_B) if role.low_rank else (None, "")
        rotate = complex_rotation_of(module, role)
        self.bind(latent_attention, module, q_quantized=key is not None, rotate=rotate, **decided)
        norm = "dual_rms_norm" if role.low_rank else "rms_norm"
        self.call(path, module, norm, key, Q_B if key else (), self.with_reason(note))
        if rotate is None:
            self.call(path, module, "rope", note="" if self.unpaged else "mla_rope_kv_cache_concat with a PagedKVCache")

    def with_reason(self, note: str) -> str:
        kept = f"the attention function is the model's: {self.unpaged}" if self.unpaged else ""
        return "; ".join(filter(None, (note, kept)))

    def add_layer(
        self,
        path: str,
        layer: Any,
        family: Family,
        attention: Attention | LatentAttention | None,
        attention_note: str,
        first: bool,
    ) -> None:
        sublayers, fed, routed = (family.attention, family.mlp), [], False
        for sublayer in sublayers:
            module = getattr(layer, sublayer.module)
            if hasattr(getattr(module, "experts", None), "input_quant"):
                key, note, linears = self.plan_mixture(module)
                routed = True
            else:
                key, note, linears = _shared_key(module, sublayer.linears)
            if self.part and not self.after and key is not None and _is_of_tensor(key):
                key, note = None, f"{linears[0]} takes one scale for the whole tensor, so each quantizes its input"
            feeds = linears if key else ()
            routed = routed and key is not None
            fed.append(feeds[0] if key else None)
            if sublayer.before is not None:
                norm = getattr(layer, sublayer.before)
                self.add_norm(f"{path}.{sublayer.before}", norm, first, key, feeds, note)
            else:
                self.add_sum(f"{path}.{sublayer.module}", module, key, feeds, note)
            if sublayer is family.attention:
                self.add_attention(f"{path}.{sublayer.module}", layer, attention, attention_note)
            if sublayer.after is not None:
                self.after = f"{path}.{sublayer.after}", getattr(layer, sublayer.after)
            if workspace_of(module) is not None:
                self.part = f"{path}.{sublayer.module}", module
            first = False
        self.bind(decoder_layer, layer, sublayers=sublayers, norm=family.norm, fed=tuple(fed), routed=routed)

    def plan_mixture(self, module: Any) -> tuple[QuantKey | None, str, tuple[str, ...]]:
        """`_shared_key` of a block whose experts are quantized, which the router's input is for too; binds its body."""
        role, problem = mixture_of(module)
        problem = replaced(module, "forward") or problem
        if role is None or problem:
            return None, f"{problem}, so its experts quantize their input", ()
        linears: tuple[str, ...] = ("experts",)
        note = "the router reads it unquantized"
        if role.shared is not None:
            shared = getattr(module, role.shared)
            key, reason, names = _shared_key(shared, ("gate_proj", "up_proj"))
            together = (*linears, *(f"{role.shared}.{name}" for name in names))
            if key is not None:
                key, reason = _agreed_key(module, together)
            if key is not None:
                linears = together
            elif reason:
                note += f"; {reason}"
        self.bind(mixture, module, role=role, shares=len(linears) > 1)
        return _agreed_key(module, linears)[0], note, linears

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
        if self.part is not None and self.after is None:
            operation = "all_reduce_fused_add_rms_norm"
        elif self.part is not None:
            self.call(*self.part, "all_reduce")
        self.part = None
        if self.after is not None:
            operation = "rms_norm_add_rms_norm"
            note = "; ".join(filter(None, (f"{self.after[0].rpartition('.')[2]} included", note)))
        self.after = None
        self.call(path, module, operation + ("_quant" if key else ""), key, feeds, note)

    def add_sum(self, path: str, module: nn.Module, key: QuantKey | None, feeds: tuple[str, ...], note: str) -> None:
        """The input of a module with no norm before it: an addition, and a quantization of its own."""
        if self.part is not None:
            self.call(*self.part, "all_reduce")
        self.part = None
        if self.after is not None:  # the model's first adds nothing
            self.call(*self.after, "rms_norm_add")
        if key is not None:
            self.call(path, module, "quantize", key, feeds)
        elif note:
            self.leave(path, module, note)

    def add_gated(self, path: str, layer: Any, place: str, kinds: tuple[Gated, ...]) -> None:
        try:
            module: Any = layer.get_submodule(place)
        except AttributeError:
            return
        if hasattr(module, "experts"):
            if (module, "forward") not in self.forwards:
                self.leave(path, module, "the router and the products of the experts are the model's own")
            return
        stock = stock_of(module)
        problems = [replaced(module, *vars(gated.stock)) or _problem(stock, gated.stock, "MLP") for gated in kinds]
        if None not in problems:
            self.leave(path, module, str(problems[0]))
            return
        gated, decided, problem = kinds[problems.index(None)], {}, None
        activate = gated.operation
        if gated.activation is not None:
            activation = getattr(stock, gated.activation)
            problem = replaced(activation, "forward")
            if problem is None:
                activate, problem = activation_of(activation)
            decided["activate"] = activate
        if activate is None:
            self.leave(path, module, str(problem))
        else:
            key, note = _agreed_key(module, DOWN)
            self.bind(gated.body, module, gated.method, **decided, quantized=key is not None)
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
    names = [*family.attention.norms, *family.mlp.norms]
    norms = [getattr(layer, name) for layer in base.layers for name in names if hasattr(layer, name)]
    problems = (replaced(module) for module in (base, *base.layers, *norms, base.norm))
    return next(filter(None, problems), None) or mismatch_stream(base, family)


def _problem(module: nn.Module, expected: type, role: str) -> str | None:
    return replaced(module, *vars(expected)) or mismatch(module, expected, role)


def _shared_key(module: nn.Module, names: tuple[str, ...]) -> tuple[QuantKey | None, str, tuple[str, ...]]:
    """`_agreed_key` of those of the linear layers that are there, which get their input by `module`'s stock forward."""
    linears = tuple(name for name in names if getattr(module, name, None) is not None)
    key, note = _agreed_key(module, linears) if linears else (None, "")
    if key is not None and (replaced(module, "forward") or not passes_on(module, names)):
        note = f"{type(module).__name__}.forward reads its input elsewhere too, so each quantizes its input"
        return None, note, linears
    return key, note, linears


def _agreed_key(module: nn.Module, linears: tuple[str, ...]) -> tuple[QuantKey | None, str]:
    """The key in which one activation serves all these linear layers, or None, and why not where they do quantize."""
    first, *others = [_input_quant(value_at(module, tuple(name.split(".")))) for name in linears]
    for name, other in zip(linears[1:], others, strict=True):
        for field in dict.fromkeys([*first, *other]):
            if not _equal(first.get(field), other.get(field)):
                return None, f"{linears[0]} and {name} differ in {field}, so each quantizes its input"
    return first["quant_key"], ""


def _row_key(module: nn.Module, linears: tuple[str, ...]) -> tuple[QuantKey | None, str]:
    """`_agreed_key` for attention, which makes a row's scales when it has the row."""
    key, note = _agreed_key(module, linears)
    if key is not None and _is_of_tensor(key):
        return None, f"{linears[0]} takes one scale for the whole tensor, so it quantizes its input"
    return key, note


def _is_of_tensor(key: QuantKey) -> bool:
    """Whether one scale, made of it, is for the whole tensor."""
    return key.per_tensor and not key.scale.static


def _input_quant(linear: Any) -> dict[str, Any]:
    return linear.input_quant() if hasattr(linear, "input_quant") else UNQUANTIZED


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
