"""What stands between computations and computes nothing, and what is computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .fusion import Outcome, Pass, register_fusion
from .matcher import Form, form, value

_SAME = {"alias", "convert", "reshape", "slice", "aten.expand.default", "permute"}
_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}
_VIEWS = {"alias", "reshape", "slice", "permute", "unsqueeze", "getitem", "aten.expand.default", "aten.squeeze.dim"}
aten = torch.ops.aten
_FRESH = {aten.clone.default, aten.full.default, aten.empty.memory_format, aten.empty_strided.default}


@register_fusion("no_op_elimination")
class NoOpElimination(Pass):
    """Views, conversions and sums that give what they got, and calls that are there twice."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        seen: dict[Any, Node] = {}
        for node in list(graph.nodes):
            found = form(node)
            if found is None:
                continue
            source = _unchanged(node, found) or _earlier(node, seen)
            if source is not None:
                outcome.matched(node, "removed")
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _unchanged(node: Node, found: Form) -> Node | None:
    """The argument that this node gives as it is, with the same strides."""
    if not found.args or not isinstance(source := found.args[0][1], Node):
        return None
    before, after = value(source), value(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if before.dtype != after.dtype or str(before.shape) != str(after.shape):
        return None
    if found.name not in _VIEWS and (_is_input(source) or _is_result(node)):
        return None  # a copy, which may be written, or outlive what it is one of
    if found.name in _NEUTRAL:
        other = found.args[1][1]
        keeps = found.name in ("mul", "div") or not after.is_floating_point()  # -0.0 + 0 is 0.0
        return source if keeps and type(other) in (int, float) and other == _NEUTRAL[found.name] else None
    if found.name == "permute":
        return source if list(found.args[1][1]) == list(range(-after.dim(), 0)) else None
    if found.name == "slice":
        args = dict(found.args)
        whole = args.get("start", 0) == 0 and args.get("end") is None and args.get("step", 1) == 1
        return source if whole else None
    return source if found.name in _SAME else None


def _earlier(node: Node, seen: dict[Any, Node]) -> Node | None:
    """A node that computed the same; where there is none, this one is remembered."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "c10d" in target.namespace:
            return None
    elif getattr(target, "__name__", "") != "getitem":
        return None
    if target in _FRESH:
        return None  # memory of its own
    first = seen.setdefault((target, _hashable(node.args), _hashable(node.kwargs)), node)
    shared = first is not node and _is_result(first) and _is_result(node)  # two results are two tensors
    return None if first is node or shared else first


def _is_input(node: Node) -> bool:
    """Whether a node is a view of an input of the graph, which may be written at its end."""
    while str(form(node)) in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "placeholder"


def _is_result(node: Node) -> bool:
    """Whether the graph returns a node or a view of it, or writes it into an input."""
    users = list(node.users)
    return any(
        user.op == "output" or user.target is aten.copy_.default or (str(form(user)) in _VIEWS and _is_result(user))
        for user in users
    )


def _hashable(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return tuple(map(_hashable, item))
    if isinstance(item, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in item.items()))
    return item if isinstance(item, Node) else (type(item).__name__, str(item))
