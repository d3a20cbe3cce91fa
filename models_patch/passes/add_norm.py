"""A norm with the addition before it, the norm before that addition, and the padding behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fused_ops import OPS

from .calls import Call, call_of, emit, maker_of
from .fusion import Outcome, Pass, register_fusion
from .matcher import Miss, form, value
from .rewrite import item, place, replace

aten = torch.ops.aten


class Sum(NamedTuple):
    """`x * x_multiplier + residual`, of one shape and dtype; post: the norm that x is the result of."""

    node: Node
    x: Node
    residual: Node
    x_multiplier: float = 1.0
    post: Call | None = None


def sum_of(node: Any) -> Sum | None:
    """The residual addition that this node is; None where it is none. Raises Miss where it is nearly one."""
    found = form(node) if isinstance(node, Node) else None
    if found is None or found.name != "add" or len(found.args) != 2:
        return None
    a, b = (argument for _, argument in found.args)
    if not isinstance(a, Node) or not isinstance(b, Node) or not isinstance(value(node), Tensor):
        return None
    kinds = [_kind(n) for n in (a, b, node)]
    if any(kind is None for kind in kinds):
        return None
    if kinds[0] != kinds[1]:
        raise Miss(f"residual is {kinds[0]}, x {kinds[1]}")
    for x, residual in (b, a), (a, b):
        inner = form(x)
        if (norm := call_of(x)) is not None and norm.op is OPS["rms_norm"]:
            return Sum(node, x, residual, post=norm)
        if inner is not None and inner.name == "mul" and type(factor := inner.args[1][1]) in (int, float):
            return Sum(node, inner.args[0][1], residual, float(factor))
    return Sum(node, max(a, b), min(a, b))  # what is older is what is added to


def _kind(node: Node) -> str | None:
    tensor = value(node)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return None
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def fuse(
    graph: Graph,
    outcome: Outcome,
    op: str,
    args: dict[str, Any],
    places: dict[str, Node],
    at: Node,
    inside: set[Node] | None = None,
    shaped: Callable[[Node, Node], Node] = lambda new, old: new,
) -> Call:
    """Put a call of `op` in the place of nodes, by the result that takes each one's place; `at` is whose work it is.

    inside: other nodes that nobody needs then. shaped: a result as the node that it replaces was. Raises Miss, or what
    the operation refuses, where that can't be.
    """
    before = place(graph, args.values(), list(places.values()), {*places.values(), *(inside or ())})
    with graph.inserting_before(before):
        made = emit(graph, OPS[op], args, set(places), at)
    for name, old in places.items():
        new = made.result(name)
        assert new is not None
        replace(old, shaped(new, old))
    outcome.matched(made.node, op)
    return made


@register_fusion("add_norm", after="lift_activation")
class AddNorm(Pass):
    """add + rms_norm, rms_norm + add + rms_norm, and rms_norm + add."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        for node in list(graph.nodes):
            call = call_of(node)
            if call is not None and call.op is OPS["rms_norm"]:
                with outcome.trying(node):
                    self._before_norm(graph, outcome, node, call)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                with outcome.trying(node):
                    self._behind_norm(graph, outcome, node)

    def _before_norm(self, graph: Graph, outcome: Outcome, node: Node, norm: Call) -> None:
        total = sum_of(norm.args["x"])
        if total is None:
            return
        shared = {name: norm.args[name] for name in ("weight", "eps", "flags")}
        places = {"residual": total.node, "y": node}
        if total.post is not None and len(total.x.users) == 1 and total.post.args["flags"] == shared["flags"]:
            post = total.post.args
            args = {"x": post["x"], "residual": total.residual, "post_weight": post["weight"], "post_eps": post["eps"]}
            fuse(graph, outcome, "rms_norm_add_rms_norm", args | shared, places, node)
            return
        args = {"x": total.x, "residual": total.residual, "x_multiplier": total.x_multiplier}
        fuse(graph, outcome, "fused_add_rms_norm", args | shared, places, node)

    def _behind_norm(self, graph: Graph, outcome: Outcome, node: Node) -> None:
        try:
            total = sum_of(node)
        except Miss:
            return  # an addition of something else
        if total is None or total.post is None:
            return
        if len(total.x.users) > 1:
            raise Miss("the norm's result has another user than the addition")
        args = {name: total.post.args[name] for name in ("x", "weight", "eps", "flags")}
        fuse(graph, outcome, "rms_norm_add", args | {"residual": total.residual}, {"residual": node}, total.post.node)


@register_fusion("add_norm_pad", after="add_norm")
class AddNormPad(Pass):
    """fused_add_rms_norm, and zeros behind each row."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        for node in list(graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)):
            call = call_of(maker_of(node.args[0]))
            if call is not None and call.op is OPS["fused_add_rms_norm"]:
                with outcome.trying(node):
                    self._pad(graph, outcome, node, call)

    def _pad(self, graph: Graph, outcome: Outcome, node: Node, call: Call) -> None:
        y, amounts, fill = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else 0
        if y is not call.result("y"):
            return
        if len(amounts) != 2 or amounts[0] != 0 or fill != 0:  # type: ignore[arg-type, index]
            raise Miss(f"rows are padded by {amounts} with {fill}, expected zeros behind them")
        if call.args["x_multiplier"] != 1.0:
            raise Miss("x_multiplier isn't 1")
        cols, more = value(y).shape[-1], amounts[1]  # type: ignore[index]
        if not isinstance(cols, int) or not isinstance(more, int) or more < 1:
            raise Miss(f"{cols} columns are padded by {more}, expected numbers, the latter at least 1")
        wide = cols + more
        multiple = next((1 << i for i in range(more.bit_length(), 31) if wide % (1 << i) == 0), wide)
        args = {n: a for n, a in call.args.items() if n != "x_multiplier"} | {"multiple": multiple}
        places = {"y": node} | {n: r for n, r in call.results.items() if n == "residual"}
        made = fuse(graph, outcome, "fused_add_rms_norm_pad", args, places, node)
        rest = [user for user in y.users if user is not node]  # type: ignore[union-attr]
        if rest:
            padded = item(graph, made.node, 0)
            with graph.inserting_after(padded):
                rows = graph.call_function(aten.slice.Tensor, (padded, value(y).dim() - 1, 0, cols))
            rows.meta = {**y.meta}  # type: ignore[union-attr]
            for user in rest:
                user.replace_input_with(y, rows)  # type: ignore[arg-type]
