"""Which attentions can be patched: tables of what they are made of, and how one is recognised by its source."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import stock
from .families import NORMS, computes, mismatch, version
from .roles import Attention, Norm, Rotation
from .source import formula


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
_USUAL = ("dropout", "scaling", None)  # keywords of every attention function; None: **kwargs


def attention_of(module: nn.Module, table: nn.Module) -> tuple[Attention | None, str]:
    """(what `module` does, why that is unknown), of an attention module and the model's module for cosines and sines."""
    forward = inspect.unwrap(type(module).forward)
    name = type(module).__name__
    text, options = _attended(forward)
    found = [(heads, rotates) for heads in HEADS for rotates in _ROTATES if _stock_attention(heads, rotates) == text]
    if text is None or not found:
        return None, f"{name}.forward of {version()} is not a known attention"
    (heads, rotates), *_ = found
    rotation = None
    if rotates is stock.rotated or module.use_rope:
        rotation, problem = _rotation_of(forward, table)
        if problem:
            return None, problem
    norm = None
    if heads.norms and (heads.asked is None or getattr(module, heads.asked)):
        norm, problem = _norm_of(module)
        if problem:
            return None, problem
    paths = tuple((key, path) for key, path in options if path[0] != "config" or hasattr(module.config, path[1]))
    return Attention(rotation, heads.packed, norm, heads.whole_vector, paths), ""


def eager_of(module: nn.Module) -> Callable:
    """The attention function of a model's own, for `attn_implementation="eager"`."""
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


_ROTATES = (stock.rotated, stock.rotated_in_some_layers)


@functools.cache
def _stock_attention(heads: Heads, rotates: Callable) -> str | None:
    return formula(stock.Attention.forward, heads=heads.stock, rotate=rotates, separate=stock.separate)


@functools.cache
def _attended(forward: Callable) -> tuple[str | None, tuple[tuple[str, tuple[str, ...]], ...]]:
    """(the formula of an attention's forward without the options of the attention function, these options)"""
    text = formula(forward)
    if text is None:
        return None, ()
    tree, options = ast.parse(text, mode="eval"), {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and any(keyword.arg == "scaling" for keyword in call.keywords):
            paths = {str(keyword.arg): _path(keyword.value) for keyword in call.keywords if keyword.arg not in _USUAL}
            if None in paths.values():
                return None, ()
            options.update(paths)
            call.keywords = [keyword for keyword in call.keywords if keyword.arg in _USUAL]
    return ast.unparse(tree), tuple(options.items())


def _path(value: ast.expr) -> tuple[str, ...] | None:
    """The attribute of `self` that an expression reads: "self.sinks", "getattr(self.config, 'sliding_window', None)"."""
    match value:
        case ast.Attribute(ast.Name("self"), name):
            return (name,)
        case ast.Call(
            ast.Name("getattr"), [ast.Attribute(ast.Name("self"), "config"), ast.Constant(str(name)), ast.Constant(None)]
        ):
            return ("config", name)
    return None


def _rotation_of(forward: Any, table: nn.Module) -> tuple[Rotation | None, str]:
    functions = forward.__globals__
    for rotation in ROTATIONS:
        expected = {name: value for name, value in vars(rotation.stock).items() if not name.startswith("__")}
        if all(computes(functions.get(name), formula(value)) for name, value in expected.items()):
            problems = [mismatch(table, stock_table, "table of cosines and sines") for stock_table in rotation.tables]
            return (rotation, "") if None in problems else (None, str(problems[0]))
    return None, f"apply_rotary_pos_emb of {forward.__globals__['__name__']} of {version()} is not a known rotation"


def _norm_of(module: Any) -> tuple[Norm | None, str]:
    """(the kind of both norms, why they can't be fused)"""
    norms = [next((norm for norm in NORMS if mismatch(m, norm.stock, "") is None), None) for m in _norms(module)]
    if None in norms:
        return None, str(mismatch(_norms(module)[norms.index(None)], NORMS[0].stock, "norm"))
    q, k = (norm.of(m) for norm, m in zip(norms, _norms(module), strict=True))
    if norms[0] != norms[1] or q["eps"] != k["eps"]:
        return None, f"q_norm and k_norm of this {type(module).__name__} differ"
    return norms[0], ""


def _norms(module: Any) -> tuple[nn.Module, nn.Module]:
    return module.q_norm, module.k_norm
