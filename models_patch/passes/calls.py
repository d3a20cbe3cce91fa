"""Calls of fused operations in a graph, as `torch.compile` shows them: read, and written in the same form.

An operation that writes into nothing is a plain call. One that has options or writes into memory of ranks is what
functionalization makes of it, `auto_functionalized_v2`, whose results are the operation's, then the tensors written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fused_ops import OPS
from fused_ops._op import Op

from .compiler import auto_functionalized_v2
from .matcher import Miss, form, value
from .rewrite import call, item, mode_of, results_of
from .sizes import size_of

aten = torch.ops.aten
_OPS = {overload: (op, index) for op in OPS.values() for index, overload in enumerate((op.default, op.out))}
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default)


@dataclass(frozen=True)
class Call:
    """A call of a fused operation: its arguments by name, those with a default too, and where its results are."""

    node: Node
    op: Op
    args: dict[str, Any]
    places: dict[str, int | None]  # of a result: its index; None: the node itself

    def result(self, name: str) -> Node | None:
        """The node of a result; None where nobody has asked for it."""
        if name not in self.places:
            return None
        index = self.places[name]
        return self.node if index is None else results_of(self.node).get(index)

    @property
    def results(self) -> dict[str, Node]:
        """Those that are used."""
        found = {name: self.result(name) for name in self.places}
        return {name: node for name, node in found.items() if node is not None and node.users}


def call_of(node: Any) -> Call | None:
    """The call that this node is, if it is one of a fused operation."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    functional = node.target is auto_functionalized_v2
    op, out = _OPS.get(node.args[0] if functional else node.target, (None, 0))  # type: ignore[arg-type, call-overload]
    if op is None or (out and not functional):
        return None
    names = op.arguments if out else op.arguments[: op.required]
    if not functional:
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        places = {name: None if op.returns == 1 else i for i, name in enumerate(op.outputs[: op.returns])}
        return Call(node, op, {**defaults(op), **given}, places)
    bases, first = node.kwargs["_all_bases"], 1 if out else op.returns
    args, places = dict(defaults(op)), {} if out else {name: i for i, name in enumerate(op.outputs[: op.returns])}
    for name in names:
        if name in node.kwargs:
            args[name] = node.kwargs[name]
        elif isinstance(index := node.kwargs.get(f"_{name}_base_index"), int):
            args[name], places[name] = bases[index], first + index  # type: ignore[index]
        else:
            return None  # a view of what is written
    for name in op.outputs if out else ():
        if isinstance(index := node.kwargs.get(f"_{name}_out_base_index"), int):
            places[name] = first + index
    return Call(node, op, args, places)


def defaults(op: Op) -> dict[str, Any]:
    """Of the arguments that only the `out` overload has."""
    return {a.name: a.default_value for a in op.out._schema.arguments if a.name in op.arguments[op.required :]}


def emit(graph: Graph, op: Op, args: dict[str, Any], wanted: set[str], like: Node) -> Call:
    """A call at the graph's insert point that gives at least the wanted results, in the plainest form there is.

    Raises what the operation raises of such arguments, and Miss where a result has sizes that no node gives.
    """
    optional = defaults(op)
    written = [a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    fresh = wanted - set(written)
    plain = fresh <= set(op.outputs[: op.returns]) and all(args.get(n, d) == d for n, d in optional.items())
    if plain and not written:
        made = call(graph, op.default, tuple(args[name] for name in op.arguments[: op.required]), like)
    else:
        made = _functional(graph, op, {**optional, **args}, None if plain else fresh, written, like)
    found = call_of(made)
    assert found is not None
    for name in wanted:
        index = found.places[name]
        if index is not None:
            item(graph, made, index)
    return found


def _functional(
    graph: Graph, op: Op, args: dict[str, Any], wanted: set[str] | None, written: list[str], like: Node
) -> Node:
    """wanted: the results that the `out` overload writes; None: the default one, which returns all."""
    names = op.arguments[: op.required] if wanted is None else op.arguments
    memory: dict[str, Memory | None] = {name: Memory(args[name]) for name in written}
    if wanted is not None:
        with mode_of([*args.values(), like]), torch.no_grad():
            fake = [value(args[name]) for name in names]
            op.check(*fake)
            made = op.empty(*fake)
        fresh: dict[str, Any] = dict(zip(op.outputs, made if isinstance(made, tuple) else (made,), strict=False))
        for name in op.outputs:
            if name in wanted and fresh.get(name) is None:
                raise Miss(f"{op.name} has no {name} of such arguments")
            given = name in wanted
            memory[f"{name}_out"] = Memory(_empty(graph, fresh[name], args, like)) if given else None
    given_args = {name: args[name] for name in names if name not in written}
    return functionalized(graph, op.default if wanted is None else op.out, given_args, memory, like)


class Memory(NamedTuple):
    """What an argument that is written is: a node, or a view of it, as which this tensor is one of the node's."""

    base: Node
    view: Tensor | None = None


def functionalized(
    graph: Graph, overload: Any, args: dict[str, Any], written: Mapping[str, Memory | None], like: Node
) -> Node:
    """What functionalization makes of a call that writes, at the graph's insert point.

    written: by argument; None where nothing is given. Raises what the operation raises.
    """
    bases: list[Any] = []
    kwargs = dict(args)
    for name, memory in written.items():
        kwargs[f"_{name}_base_index"] = None if memory is None else len(bases)
        if memory is not None:
            bases.append(memory.base)
        if memory is not None and (view := memory.view) is not None:
            of_view = {"size": tuple(view.shape), "stride": view.stride(), "storage_offset": view.storage_offset()}
            kwargs |= {f"_{name}_{kind}": number for kind, number in of_view.items()}
    return call(graph, auto_functionalized_v2, (overload,), like, {**kwargs, "_all_bases": bases})


def _empty(graph: Graph, tensor: Tensor, args: dict[str, Any], like: Node) -> Node:
    """Uninitialized memory like a fake tensor."""
    sizes = [size_of(graph, size, like, args.values()) for size in tensor.shape]
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device, "pin_memory": False}
    if tensor.is_contiguous():
        return call(graph, aten.empty.memory_format, (sizes,), like, options)
    if all(isinstance(n, int) for n in (*sizes, *tensor.stride())):
        return call(graph, aten.empty_strided.default, (sizes, list(tensor.stride())), like, options)
    raise Miss("scales in this layout need sizes that are known")


def maker_of(node: Any) -> Any:
    """The call that a node is a result of."""
    return node.args[0] if isinstance(node, Node) and str(form(node)) == "getitem" else node


def behind_views(node: Any) -> Any:
    """What a node is a view of, as long as the last dimension stays what it is."""
    while isinstance(node, Node) and node.target in _VIEWS:
        source = node.args[0]
        before, after = value(source), value(node)
        if not before.dim() or str(before.shape[-1:]) != str(after.shape[-1:]):
            return node
        node = source
    return node
