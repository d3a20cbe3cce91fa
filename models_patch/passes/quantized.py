"""A quantization of what a fused operation made, as part of that operation."""

from __future__ import annotations

from functools import partial

from torch.fx import Graph, Node

from fused_ops import OPS
from fused_ops._op import Op

from .add_norm import fuse
from .calls import Call, behind_views, call_of, maker_of
from .fusion import Outcome, Pass, register_fusion
from .matcher import value
from .sizes import reshaped

_OF_KEY = ["key", "given", "zero_point"]


def quantizing(op: Op) -> Op | None:
    """The operation that also quantizes `op`'s first result."""
    fused = OPS.get(f"{op.name}_quant")
    expected = [*op.arguments[: op.required], *_OF_KEY, *op.arguments[op.required :]]
    return fused if fused is not None and fused.arguments == expected else None


@register_fusion("quantized", after="collective_norm")
class Quantized(Pass):
    """Any operation with a `_quant` form, followed by `quantize`; views between keep their last dimension."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        for node in list(graph.nodes):
            quantize = call_of(node)
            if quantize is None or quantize.op is not OPS["quantize"]:
                continue
            y: Node = behind_views(quantize.args["x"])
            producer = call_of(maker_of(y))
            fused = None if producer is None else quantizing(producer.op)
            if producer is None or fused is None or producer.result(producer.op.outputs[0]) is not y:
                continue
            with outcome.trying(node):
                _fuse(graph, outcome, quantize, y, producer, fused)


def _fuse(graph: Graph, outcome: Outcome, quantize: Call, y: Node, producer: Call, fused: Op) -> None:
    first = producer.op.outputs[0]
    places = {name: result for name, result in producer.results.items() if name != first}  # and memory of ranks
    places |= quantize.results
    inside = _between(y, quantize)
    if any(user not in inside for user in y.users):
        places["unquantized"] = y
    args = producer.args | {name: quantize.args[name] for name in _OF_KEY}
    shaped = partial(_shaped, graph)
    fuse(graph, outcome, fused.name, args, places, producer.node, inside | {producer.node, quantize.node, y}, shaped)


def _between(y: Node, quantize: Call) -> set[Node]:
    """The quantization of y, and the views of y that only lead to it."""
    found, view = {quantize.node}, quantize.args["x"]
    while view is not y and all(user in found for user in view.users):
        found.add(view)
        view = view.args[0]
    return found


def _shaped(graph: Graph, new: Node, old: Node) -> Node:
    """The same elements in the shape that they had behind the views."""
    before, after = value(old), value(new)
    if str(before.shape) == str(after.shape):
        return new
    with graph.inserting_after(new):
        return reshaped(graph, new, before.shape, new)
