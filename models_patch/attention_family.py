"""Which attentions can be patched: tables of what they are made of, and how one is recognised by its source."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import stock
from .binding import changed_linear, replaced
from .families import NORMS, computes, mismatch, version
from .masks import windows
from .roles import Attention, LatentAttention, Norm, Rotation, value_at
from .source import formula, parsed, reads, statements


@dataclass(frozen=True)
class Heads:
    """A way to make queries, keys and values.

    stock: what it computes.
    norms: whether `q_norm` and `k_norm` are in it. asked: the attribute that says whether they are used; None: always.
    packed, whole_vector: as in `Attention`.
    """

    stock: Callable
    norms: bool = False
    asked: str | None = None
    packed: bool = False
    whole_vector: bool = False


HEADS = (
    Heads(stock.separate),
    Heads(stock.packed, packed=True),
    Heads(stock.normed, norms=True),
    Heads(stock.normed_after_transpose, norms=True),
    Heads(stock.normed_if_asked, norms=True, asked="use_qk_norm"),
    Heads(stock.normed_whole, norms=True, whole_vector=True),
)
ROTATIONS = (
    Rotation(stock.Halves, (stock.TwiceInS, stock.TwiceInSForEachType)),
    Rotation(stock.PartialHalves, (stock.TwiceInS,)),
    Rotation(stock.PartialPairs, (stock.TwiceInS,), is_neox=False),
    Rotation(stock.Float32Halves, (stock.TwiceInFloat32, stock.TwiceInFloat32ForEachType), round_products=False),
    Rotation(stock.ChunkedHalves, (stock.OnceInS,), repeats=False),
)
# Of latents, with how the attention's forward calls them.
LATENT_ROTATIONS = (
    (stock.rotated_as_asked, Rotation(stock.SortedPairs, (stock.TwiceInS,))),
    (
        stock.rotated_as_complex,
        Rotation(stock.ComplexPairs, (stock.Complex,), repeats=False, is_neox=False, round_products=False),
    ),
)
# The attention functions whose place `paged_attention` may take, with what they take beside the usual.
EAGER: tuple[tuple[Callable, frozenset[str]], ...] = (
    (stock.eager, frozenset()),
    (stock.eager_soft_capped, frozenset({"softcap"})),
    (stock.eager_with_sinks, frozenset({"s_aux"})),
)
NO_ROTATION = "it doesn't rotate: nothing to fuse"


def attentions_of(model: Any) -> list[tuple[Attention | LatentAttention | None, str]]:
    """(what it does, why it is left) of each layer's attention.

    One that isn't known leaves all, since all get the same table of cosines and sines.
    """
    problem = _table_problem(model)
    if problem is None:
        found: list[Any] = [_attention_of(layer, model.rotary_emb) for layer in model.layers]
        problem = next((note for role, note in found if role is None and note is not NO_ROTATION), None)
    return found if problem is None else [(None, problem)] * len(model.layers)


def eager_of(module: nn.Module) -> Callable:
    """The attention function of a model's own, for `attn_implementation="eager"`."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


def complex_rotation_of(module: nn.Module, role: LatentAttention) -> Callable | None:
    """The function that rotates in an attention of a model's own, where it does so by complex numbers."""
    functions = inspect.unwrap(type(module).forward).__globals__
    return functions["apply_rotary_emb"] if role.rotation.stock is stock.ComplexPairs else None


def unpaged(model: Any, roles: Sequence[Any]) -> str:
    """Why the attentions of `model`, which are known, can't read keys from a `PagedKVCache`'s blocks; "" if they can.

    Its forward must hand the mask to nobody but those who make masks, which pass one of four dimensions on as it is.
    What they make must let each layer see what its attention says: some slide by the mask alone.
    """
    forward = type(model).forward
    parameters = tuple(inspect.signature(inspect.unwrap(forward)).parameters)[1 : len(_PARAMETERS) + 1]
    if parameters != _PARAMETERS or not _MASK_MAKERS.issuperset(reads(forward, "attention_mask") or ("unknown",)):
        return f"{type(model).__name__}.forward reads attention_mask elsewhere too"
    seen = windows(model)
    if seen is None:
        return f"{type(model).__name__}.forward makes masks that aren't known"
    for layer, role, window in zip(model.layers, roles, seen, strict=True):
        paths = [path for name, path in getattr(role, "options", ()) if name == "sliding_window"]
        handed = value_at(layer.self_attn, paths[0]) if paths else None
        if handed != window:
            return f"a mask lets {type(layer.self_attn).__name__} see {_keys(window)}, its arguments {_keys(handed)}"
    return ""


def _keys(window: int | None) -> str:
    return "all keys" if window is None else f"{window} keys"


_PARAMETERS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_MAKER_ARGUMENTS = "'config': self.config, 'inputs_embeds': inputs_embeds, 'attention_mask': attention_mask, "
_MASK_MAKERS = {
    "create_causal_mask(attention_mask)",
    "mask_function(attention_mask)",
    "(causal_mask_mapping := attention_mask)",
    f"{{{_MAKER_ARGUMENTS}'past_key_values': past_key_values}}",
    f"{{{_MAKER_ARGUMENTS}'past_key_values': past_key_values, 'position_ids': position_ids}}",
}
_HANDED_TO_LAYERS = {
    "decoder_layer(position_embeddings)",
    "decoder_layer(position_embeddings[self.config.layer_types[i]])",
    "position_embeddings[layer_type] = self.rotary_emb(hidden_states, position_ids, layer_type)",
}
_HANDED_TO_ATTENTION = {"self.self_attn(position_embeddings)"}


def _table_problem(model: Any) -> str | None:
    """Why the model's cosines and sines can't be replaced by float32 rows; None where only attentions read them."""
    table = getattr(model, "rotary_emb", None)
    if table is None or not all(hasattr(layer, "self_attn") for layer in model.layers):
        return f"{type(model).__name__} has no rotary_emb, or a layer no self_attn"
    if not _HANDED_TO_LAYERS.issuperset(reads(type(model).forward, "position_embeddings") or ("unknown",)):
        return f"{type(model).__name__}.forward reads position_embeddings elsewhere too"
    return replaced(model) or replaced(table)


def _attention_of(layer: Any, table: nn.Module) -> tuple[Attention | LatentAttention | None, str]:
    """(what the attention of `layer` does, why that is unknown)"""
    module = layer.self_attn
    problem = next(filter(None, map(replaced, (layer, module, *_norms(module)))), None)
    if problem is None and set(reads(type(layer).forward, "position_embeddings") or ()) - _HANDED_TO_ATTENTION:
        problem = f"{type(layer).__name__}.forward reads position_embeddings elsewhere too"
    if problem is not None:
        return None, problem
    forward = inspect.unwrap(type(module).forward)
    if hasattr(module, "kv_a_proj_with_mqa"):
        return _latent_attention_of(module, table)
    text, options = _without_options(forward)
    found = [(heads, rotates) for heads in HEADS for rotates in _ROTATES if _stock_attention(heads, rotates) == text]
    if text is None or not found:
        return None, f"{type(module).__name__}.forward of {version()} is not a known attention"
    (heads, rotates), *_ = found
    options = tuple((key, path) for key, path in options if path[0] != "config" or hasattr(module.config, path[1]))
    kept = _unpaged(module, options)
    if rotates is stock.rotated_in_some_layers and not module.use_rope:
        if kept or _uses_norms(module, heads):
            return None, NO_ROTATION
        return Attention(None, heads.packed, options=options), ""
    rotation, rotation_problem = _rotation_of(forward, table, ROTATIONS)
    norm, norm_problem = _norm_of(module) if _uses_norms(module, heads) else (None, "")
    if rotation is None or norm_problem:
        return None, rotation_problem or norm_problem
    return Attention(rotation, heads.packed, norm, heads.whole_vector, options, kept), ""


def _latent_attention_of(module: Any, table: nn.Module) -> tuple[LatentAttention | None, str]:
    cls, forward = type(module), inspect.unwrap(type(module).forward)
    rotations = [rotation for rotates, rotation in LATENT_ROTATIONS if computes(forward, _stock_latent(rotates))]
    expands = getattr(cls, "expand_kv", None)
    if not rotations or expands is None or statements(expands) != statements(stock.Latent.expand_kv):
        return None, f"{cls.__name__}.forward of {version()} is not a known attention over latents"
    rotation, rotation_problem = _rotation_of(forward, table, rotations)
    norms = [module.kv_a_layernorm, *([] if module.q_lora_rank is None else [module.q_a_layernorm])]
    kinds, norm_problem = _kinds_of(norms)
    if rotation is None or norm_problem or len(set(kinds)) > 1:
        return None, rotation_problem or norm_problem or f"the norms of this {cls.__name__} differ"
    sorts = rotation.stock is stock.SortedPairs and module.config.rope_interleave
    kept = _unpaged(module, ()) or absorbs(module)
    return LatentAttention(rotation, kinds[0], module.q_lora_rank is not None, sorts, kept), ""


def absorbs(module: Any) -> str:
    """Why `mla_attention` can't take the weight of an attention's `kv_b_proj` for all that it does; "" where it can."""
    problem = changed_linear(module.kv_b_proj)
    return f"kv_b_proj {problem}, and mla_attention takes its weight alone" if problem else ""


@functools.cache
def _stock_latent(rotates: Callable) -> str | None:
    return formula(stock.Latent.forward, rotate=rotates)


def _unpaged(module: Any, options: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """Why `paged_attention` can't take the place of the module's attention function; "" where it can."""
    takes = {name for name, _ in options} - {"sliding_window"}
    eager = eager_of(module)
    for known, expected in EAGER:
        if computes(eager, formula(known, weighted=stock.weighted)) and expected - {"softcap"} <= takes <= expected:
            causal = getattr(module, "is_causal", True)
            return "" if causal else f"this {type(module).__name__} isn't causal"
    return f"eager_attention_forward of {eager.__module__} of {version()} is not a known attention function"


_ROTATES = (stock.rotated, stock.rotated_in_some_layers)
_USUAL = ("dropout", "scaling", None)  # keywords of every attention function; None: **kwargs


@functools.cache
def _stock_attention(heads: Heads, rotates: Callable) -> str | None:
    return formula(stock.Attention.forward, heads=heads.stock, rotate=rotates, separate=stock.separate)


@functools.cache
def _without_options(forward: Callable) -> tuple[str | None, tuple[tuple[str, tuple[str, ...]], ...]]:
    """(the formula of an attention's forward without the options of the attention function, these options)"""
    text, options = formula(forward), dict[str, tuple[str, ...]]()
    tree = parsed(text or "None", mode="eval")
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and any(keyword.arg == "scaling" for keyword in call.keywords):
            for keyword in [keyword for keyword in call.keywords if keyword.arg not in _USUAL]:
                path = _path(keyword.value)
                if path is None:
                    return None, ()
                options[str(keyword.arg)] = path
                call.keywords.remove(keyword)
    return text and ast.unparse(tree), tuple(options.items())


def _path(value: ast.expr) -> tuple[str, ...] | None:
    """The attribute of `self` that is read: of `self.sinks`, or of `getattr(self.config, "sliding_window", None)`."""
    match value:
        case ast.Attribute(ast.Name("self"), name):
            return (name,)
        case ast.Call(ast.Name("getattr"), [config, ast.Constant(str(name)), ast.Constant(None)]):
            return ("config", name) if ast.unparse(config) == "self.config" else None
    return None


def _rotation_of(forward: Any, table: nn.Module, known: Sequence[Rotation]) -> tuple[Rotation | None, str]:
    functions = forward.__globals__
    for rotation in known:
        expected = {name: value for name, value in vars(rotation.stock).items() if not name.startswith("__")}
        if all(computes(functions.get(name), formula(value)) for name, value in expected.items()):
            problems = [mismatch(table, stock_table, "table of cosines and sines") for stock_table in rotation.tables]
            return (rotation, "") if None in problems else (None, str(problems[0]))
    return None, f"apply_rotary_pos_emb of {forward.__globals__['__name__']} of {version()} is not a known rotation"


def _uses_norms(module: Any, heads: Heads) -> bool:
    return heads.norms and (heads.asked is None or getattr(module, heads.asked))


def _norm_of(module: Any) -> tuple[Norm | None, str]:
    """(the kind of `q_norm` and `k_norm`, why they can't be fused)"""
    norms = [module.q_norm, module.k_norm]
    kinds, problem = _kinds_of(norms)
    if problem:
        return None, problem
    if len({(kind, kind.of(norm)["eps"]) for kind, norm in zip(kinds, norms, strict=True)}) > 1:
        return None, f"q_norm and k_norm of this {type(module).__name__} differ"
    return kinds[0], ""


def _kinds_of(norms: list[nn.Module]) -> tuple[list[Norm], str]:
    """(the kind of each, why one is unknown)"""
    kinds = []
    for norm in norms:
        problems = [mismatch(norm, kind.stock, "norm") for kind in NORMS]
        if None not in problems:
            return [], str(problems[0])
        kinds.append(NORMS[problems.index(None)])
    return kinds, ""


def _norms(module: Any) -> list[nn.Module]:
    names = ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")
    return [norm for name in names if (norm := getattr(module, name, None)) is not None]
