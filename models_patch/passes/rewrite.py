"""Putting calls into a graph, with the fake results that later passes read."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .compiler import FakeTensor, FakeTensorMode, make_fx
from .matcher import Match, Miss, decompositions, value

aten = torch.ops.aten
_MODULE = "nn_module_stack"
# A module that Dynamo comes to first as one of the layer that a hook of `models_patch.shard` knows.
_HOOK = re.compile(r"\.\w+\._forward_hooks\[.*\]\.owner")


def path_of(node: Node) -> str:
    """The module whose forward a node comes from, as `named_modules` calls it; "" where the graph doesn't say."""
    stack = node.meta.get(_MODULE) or {}
    paths = [entry[0] for entry in stack.values()]
    return _plain(paths[-1]) if paths else ""


def _plain(path: str) -> str:
    """Dynamo's "L['self'].model.layers[0].mlp" as "model.layers.0.mlp"."""
    path = _HOOK.sub("", path).removeprefix("L['self']").removeprefix("L['fn']").lstrip(".")
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").replace("_modules.", "")


def mode_of(nodes: Iterable[Any]) -> FakeTensorMode:
    """The mode that the values of these nodes belong to."""
    for node in nodes:
        values = value(node)
        for fake in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(fake, FakeTensor):
                return fake.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def call(graph: Graph, target: Callable, args: tuple, like: Node, kwargs: dict[str, Any] | None = None) -> Node:
    """A call at the graph's insert point, which takes the place of `like`: its source is the new node's.

    Raises what the operation raises of such arguments; nothing is inserted then.
    """
    kwargs = kwargs or {}
    flat: list[Node] = []
    map_arg((args, kwargs), flat.append)
    with mode_of([*flat, like]), torch.no_grad():
        fake_args, fake_kwargs = map_arg((args, kwargs), value)
        made = target(*fake_args, **fake_kwargs)
    node = graph.call_function(target, args, kwargs)
    node.meta = _meta(like, made)
    return node


def results_of(node: Node) -> dict[int, Node]:
    """Those of several results that anybody has asked for."""
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}  # type: ignore[misc]


def item(graph: Graph, node: Node, index: int) -> Node:
    """One of several results."""
    if (found := results_of(node).get(index)) is not None:
        return found
    new = graph.call_function(operator.getitem, (node, index))
    new.meta = _meta(node, value(node)[index])
    return new


def _meta(like: Node, made: Any) -> dict[str, Any]:
    kept = {key: like.meta[key] for key in (_MODULE, "stack_trace", "source_fn_stack") if key in like.meta}
    return kept | {"val": made}


def check_alike(old: Node, made: Any) -> None:
    """Raise Miss where a result can't take the place of another: shape and dtype are what the graph was traced with."""
    before = value(old)
    if isinstance(before, Tensor) and not (before.dtype == made.dtype and _same_sizes(before.shape, made.shape)):
        raise Miss(f"its result is {_kind(made)}, where the graph has {_kind(before)}")
    if isinstance(before, Tensor) and not _same_strides(before, made) and _reads_memory(old):
        raise Miss("its memory is read by strides (as_strided), and the operation's result has others")


def _same_strides(a: Tensor, b: Tensor) -> bool:
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(str(x) == str(y) for size, x, y in pairs if str(size) != "1")


def _reads_memory(node: Node) -> bool:
    """Whether `as_strided` reads it, or what is made of it: most operations hand on the order of their input."""
    readers = {each for each in node.graph.nodes if "as_strided" in str(each.target)}
    found: set[Node] = set()
    left = [node] if readers else []
    while left:
        users = left.pop().users.keys() - found
        found |= users
        left += users
    return not readers.isdisjoint(found)


def replace(old: Node, new: Node) -> None:
    """Let everyone who uses `old` use `new`. Raises Miss where they aren't alike."""
    check_alike(old, value(new))
    old.replace_all_uses_with(new)


def _same_sizes(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b, strict=True))


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def place(graph: Graph, inputs: Iterable[Any], outputs: Iterable[Node], inside: Iterable[Node] = ()) -> Node:
    """The node before which what takes the place of `outputs` may stand: right behind the last of its inputs.

    Inputs move before the first that uses an output: compilers put users early. inside: nodes that the replacement
    makes unneeded. Raises Miss where an input depends on an output.
    """
    given = [node for node in inputs if isinstance(node, Node)]
    within = set(inside)
    users = {user for output in outputs for user in output.users} - within
    if given and users and min(users) <= max(given):
        hoist(given, min(users), users)
    node: Node = max(given).next if given else next(iter(graph.nodes))
    while node.op == "placeholder":
        node = node.next
    return node


def hoist(nodes: Iterable[Node], before: Node, users: Iterable[Node] = ()) -> None:
    """Move nodes, and what they are made of, before another. Raises Miss where they depend on it, or one of `users`."""
    barred = {before, *users}
    needed: set[Node] = set()
    todo = [(node, node) for node in nodes]
    while todo:
        node, of = todo.pop()
        if node in needed or node < before:
            continue
        if node in barred:
            raise Miss(f"{of}, which is an input, depends on {node}, which uses a result")
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise Miss(f"{of}, which is an input, depends on {node}, which writes in place")
        needed.add(node)
        todo += [(source, of) for source in node.all_input_nodes]
    for node in sorted(needed):
        before.prepend(node)


def insert(graph: Graph, match: Match, function: Callable) -> None:
    """What `function` makes of the match's inputs, in the place of the match's outputs."""
    nodes = list(match.inputs.values())
    at = place(graph, nodes, match.outputs, match.nodes)
    with mode_of(nodes), torch.no_grad():
        traced = make_fx(lambda *args: function(*args), decompositions())(*map(value, nodes)).graph
    if traced.find_nodes(op="get_attr"):
        raise Miss("the replacement holds a tensor of its own")
    written = [n for n in traced.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    if written:
        raise Miss(f"the replacement writes in place, by {written[0].target}")
    results = traced.output_node().args[0]
    results = results if isinstance(results, (list, tuple)) else (results,)
    if len(results) != len(match.outputs):
        raise Miss(f"the replacement has {len(results)} results, and the pattern {len(match.outputs)}")
    for old, result in zip(match.outputs, results, strict=True):
        if not isinstance(result, Node):
            raise Miss(f"a result of the replacement is {result}, expected a tensor")
        check_alike(old, value(result))
    new: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    with graph.inserting_before(at):
        for node in traced.nodes:
            if node.op == "call_function":
                new[node] = graph.node_copy(node, new.__getitem__)
                new[node].meta = _meta(match.outputs[-1], value(node))
    for old, result in zip(match.outputs, results, strict=True):
        old.replace_all_uses_with(new[result])
    for node in reversed(match.nodes):  # or it would be found again
        if not node.users:
            graph.erase_node(node)
