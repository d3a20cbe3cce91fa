"""The two norms of multi-head latent attention, of queries and of keys and values, as one call."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fused_ops import OPS
from fused_ops._op import NO_KEY

from .add_norm import fuse
from .calls import Call, behind_views, call_of
from .fusion import Outcome, Pass, register_fusion
from .matcher import Miss, form

_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
_PARTS = ("getitem", "slice", "aten.split_with_sizes.default", "aten.split.Tensor")


@register_fusion("dual_norm", after="quantized")
class DualNorm(Pass):
    """rms_norm of what a projection gives, and of a part of what another one of the same input gives."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        waiting: dict[Node, Call] = {}  # by what is projected: the queries' norm
        for node in list(graph.nodes):
            call = call_of(node)
            if call is None or call.op not in (OPS["rms_norm"], OPS["rms_norm_quant"]):
                continue
            source, is_part = _projected(call.args["x"])
            if source is None:
                continue
            if source in waiting and is_part:
                with outcome.trying(node):
                    _fuse(graph, outcome, waiting.pop(source), call)
            elif _feeds_product(call):
                waiting[source] = call


def _projected(x: Any) -> tuple[Node | None, bool]:
    """(what x is a projection of, whether x is some of its columns); None where it is none."""
    node, is_part = behind_views(x), False
    while isinstance(node, Node) and form(node) is not None and str(form(node)) in _PARTS:
        source = node.args[0]
        call = call_of(source)
        if call is not None and node in call.results.values():
            break
        node, is_part = behind_views(source), True
    linear = call_of(node) or (call_of(node.args[0]) if isinstance(node, Node) and node.args else None)
    if linear is not None and linear.op is OPS["scaled_linear"]:
        source = behind_views(linear.args["data"])
    elif isinstance(node, Node) and str(node.target) in _PRODUCTS:
        source = behind_views(node.args[1 if "addmm" in str(node.target) else 0])
    else:
        return None, False
    return (source, is_part) if isinstance(source, Node) else (None, False)


def _feeds_product(call: Call) -> bool:
    """Whether a norm's result goes into a product, and not, as those of heads, into a rotation."""
    todo = list(call.results.values())
    while todo:
        for user in todo.pop().users:
            other = call_of(user)
            if str(user.target) in _PRODUCTS or (other is not None and other.op is OPS["scaled_linear"]):
                return True
            quantizes = other is not None and other.op is OPS["quantize"]
            if quantizes or str(form(user)) in ("reshape", "alias", "getitem"):
                todo.append(user)
    return False


def _fuse(graph: Graph, outcome: Outcome, q: Call, kv: Call) -> None:
    if q.args["flags"] != kv.args["flags"]:
        raise Miss("the norms of q and kv round in another order")
    args: dict[str, Any] = {"flags": q.args["flags"]}
    places: dict[str, Node] = {}
    for side, call in ("q", q), ("kv", kv):
        given = call.args
        args |= {side: given["x"], f"{side}_weight": given["weight"], f"{side}_eps": given["eps"]}
        args |= {f"{side}_{name}": given.get(name, none) for name, none in _NO_QUANTIZATION.items()}
        for name, node in call.results.items():
            places[side if name in ("y", "data") else f"{side}_{name}"] = node
    fuse(graph, outcome, "dual_rms_norm", args, places, q.node, {q.node, kv.node})


_NO_QUANTIZATION = {"key": NO_KEY, "given": None, "zero_point": None}
