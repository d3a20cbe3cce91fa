"""A graph's nodes in one spelling, and patterns found among them.

A pattern is a plain function of tensors and floats. It is traced as the compiler traces models; both graphs are then
read through `form`, in which the many spellings of one computation are the same. Matching starts at the pattern's
rarest node, the anchor, and goes on to its arguments and its users; sizes and the number of dimensions are free.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .compiler import FakeTensorMode, make_fx, select_decompositions, tracing, unset_fake_temporarily

aten, prims = torch.ops.aten, torch.ops.prims

# Those that compute the same, by the name that `form` has for them.
_SPELLINGS = {
    aten.add.Tensor: "add", aten.add.Scalar: "add",
    aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul",
    aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.square.default: "square", aten.pow.Tensor_Scalar: "pow", aten.rsqrt.default: "rsqrt",
    aten.mean.dim: "mean", aten.neg.default: "neg", aten.exp.default: "exp",
    prims.convert_element_type.default: "convert", aten._to_copy.default: "convert",
    aten.view.default: "reshape", aten.reshape.default: "reshape", aten._unsafe_view.default: "reshape",
    aten.slice.Tensor: "slice", aten.cat.default: "cat", aten.unsqueeze.default: "unsqueeze",
    aten.permute.default: "permute", aten.clone.default: "clone", aten.alias.default: "alias",
    operator.getitem: "getitem",
}  # fmt: skip
_COMMUTATIVE = {"add", "mul"}
_DIMS = {"dim", "dims", "dim0", "dim1"}
# How much a name says of a pattern, where operations of other libraries say more; the anchor is the first of these.
_TELLING = ("rsqrt", "mean", "exp", "square", "cat", "div", "sub", "neg", "slice", "convert", "mul", "add",
            "clone", "reshape", "unsqueeze", "permute", "getitem")  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A node as `name(args)`: arguments by the order of the schema, without those that have their default."""

    name: str
    args: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return self.name


def value(node: Any) -> Any:
    """What a node gives when it is traced: a fake tensor, a size, a number; and of what isn't a node, that itself."""
    return node.meta.get("val") if isinstance(node, Node) else node


def form(node: Node) -> Form | None:
    """The node in the one spelling; None of what isn't a call of a function."""
    if node.op != "call_function":
        return None
    found = node.meta.get("fused_ops_form")
    if found is None or found[0] != (node.target, node.args, node.kwargs):
        found = (node.target, node.args, node.kwargs), _form(node)
        node.meta["fused_ops_form"] = found
    return found[1]


def _form(node: Node) -> Form:
    name = _SPELLINGS.get(node.target, str(node.target))  # type: ignore[call-overload]
    args = _arguments(node)
    first = args.get("self", args.get("a", args.get("input")))
    if name in ("add", "sub") and args.get("alpha", 1) == 1:
        args.pop("alpha", None)
    if (name == "pow" and args.get("exponent") == 2) or (name == "mul" and args["self"] is args["other"]):
        name, args = "square", {"self": args["self"]}
    if name == "convert":
        args = {"self": first, "dtype": args.get("dtype")}
    rank = _rank(node if name == "unsqueeze" else first)
    for key in _DIMS & args.keys():
        args[key] = _from_the_end(args[key], rank)
    if name == "slice":
        size = value(first).shape[args["dim"]] if rank else None
        args["start"] = args.get("start") or 0
        if args.get("end") is None or (isinstance(args["end"], int) and isinstance(size, int) and args["end"] >= size):
            args["end"] = None
    return Form(name, tuple(args.items()))


def _arguments(node: Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): arg for i, arg in enumerate(node.args)} | dict(node.kwargs)
    names = [a.name for a in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    keeps = lambda name: name == "dim" or name not in defaults or given[name] != defaults[name]  # noqa: E731
    given = {name: given.get(name, defaults.get(name)) for name in names if name in given or name == "dim"}
    return {name: arg for name, arg in given.items() if isinstance(arg, Node) or keeps(name)}


def _rank(node: Any) -> int:
    tensor = value(node[0] if isinstance(node, (list, tuple)) and node else node)
    return tensor.dim() if isinstance(tensor, Tensor) else 0


def _from_the_end(dims: Any, rank: int) -> Any:
    """Dimensions as negative numbers, which don't depend on how many come before."""
    if isinstance(dims, (list, tuple)):
        return tuple(_from_the_end(d, rank) for d in dims)
    return dims - rank if isinstance(dims, int) and dims >= 0 else dims


@dataclass(frozen=True)
class Input:
    """An argument of a pattern. example: a tensor on the meta device, or a float that stands for any number."""

    name: str
    example: Any


class Miss(Exception):
    """Why a pattern isn't here; matched: how many of its nodes were, before."""

    def __init__(self, reason: str, matched: int = 0):
        super().__init__(reason)
        self.reason, self.matched = reason, matched


@dataclass
class Match:
    """A pattern found.

    inputs: the pattern's arguments, by name: nodes, and numbers. outputs: the nodes that give the pattern's results.
    nodes: all that it found.
    """

    inputs: dict[str, Any]
    outputs: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @property
    def last_input(self) -> Node | None:
        nodes = [node for node in self.inputs.values() if isinstance(node, Node)]
        return max(nodes) if nodes else None


Bound = dict[Any, Any]  # nodes and inputs of the pattern -> nodes and numbers of the graph


class Pattern:
    """A function, traced on examples of its arguments.

    inputs: {argument: tensor or float}. A float stands for any number; choose one that the function has nowhere else.
    Integers and other constants of the function, and dtypes, are as they are.
    """

    def __init__(self, function: Callable, inputs: dict[str, Any]):
        graph = trace(function, list(inputs.values()))
        if graph.find_nodes(op="get_attr"):
            raise ValueError("it holds a tensor of its own, expected only its inputs and numbers")
        placeholders = graph.find_nodes(op="placeholder")
        tensors = {n: Input(name, example) for n, (name, example) in zip(placeholders, inputs.items(), strict=True)}
        self.inputs = list(tensors.values())
        self.numbers = {i.example: i for i in self.inputs if isinstance(i.example, float)}
        self._of: dict[Node, Any] = dict(tensors)
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        outputs: Any = graph.output_node().args[0]
        self.outputs: tuple[Node, ...] = tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
        self.graph = graph
        for node in self.outputs:
            if node not in self.nodes:
                raise ValueError(f"it returns {node}, expected only what it computes of its inputs")
        self.anchor = min(self.nodes, key=lambda node: (_telling(str(form(node))), node))
        self.anchor_name = str(form(self.anchor))

    def find(self, node: Node) -> Match:
        """The match whose anchor is this node. Raises Miss, with how far the best try came."""
        best = Miss("", -1)

        def fail(reason: str, bound: Bound) -> None:
            nonlocal best
            if len(bound) > best.matched:
                best = Miss(reason, len(bound))

        for bound in self._complete(self._match(self.anchor, node, {}, fail), fail):
            missing = [i.name for i in self.inputs if i not in bound]
            if missing:
                raise Miss(f"nothing tells {', '.join(missing)}")
            nodes = tuple(sorted(bound[n] for n in self.nodes if n in bound))
            return Match({i.name: bound[i] for i in self.inputs}, tuple(bound[n] for n in self.outputs), nodes)
        raise best

    def _complete(self, found: Iterator[Bound], fail: Callable) -> Iterator[Bound]:
        """What `found` yields, with those nodes of the pattern that aren't before its anchor."""
        for bound in found:
            rest = [(n, self._part(a)) for n in self.nodes if n not in bound for a in n.all_input_nodes]
            following, before = next(((n, part) for n, part in rest if part in bound), (None, None))
            if following is None:
                yield bound
                continue
            wanted = form(following)
            users = [u for u in bound[before].users if (f := form(u)) and wanted and f.name == wanted.name]
            if not users:
                fail(f"{bound[before]} isn't followed by {wanted}", bound)
            for user in users:
                yield from self._complete(self._match(following, user, bound, fail), fail)

    def _part(self, item: Any) -> Any:
        """An input of the pattern instead of the node that stands for it; anything else as it is."""
        return self._of.get(item, item) if isinstance(item, Node) else item

    def _match(self, wanted: Any, found: Any, bound: Bound, fail: Callable) -> Iterator[Bound]:
        """Ways in which a node, input or constant of the pattern is this one of the graph."""
        wanted = self._part(wanted)
        if isinstance(wanted, float) and wanted in self.numbers:
            wanted = self.numbers[wanted]
        if isinstance(wanted, (list, tuple)):
            if isinstance(found, (list, tuple)) and len(wanted) == len(found):
                yield from self._all(list(zip(wanted, found, strict=True)), bound, fail)
            else:
                fail(f"expected {len(wanted)} of them, found {found}", bound)
        elif not isinstance(wanted, (Node, Input)):
            if type(wanted) is type(found) and wanted == found:
                yield bound
            else:
                fail(f"expected {wanted}, found {_named(found)}", bound)
        elif wanted in bound:
            if bound[wanted] is found or (isinstance(wanted, Input) and bound[wanted] == source_of_number(found)):
                yield bound
            else:
                fail(f"{_named(found)} is not {_named(bound[wanted])}", bound)
        elif reason := _differs(wanted, found):
            fail(reason, bound)
        elif isinstance(wanted, Input):
            yield bound | {wanted: source_of_number(found) if isinstance(wanted.example, float) else found}
        else:
            yield from self._arguments(wanted, found, bound | {wanted: found}, fail)

    def _arguments(self, wanted: Node, found: Node, bound: Bound, fail: Callable) -> Iterator[Bound]:
        expected, actual = form(wanted), form(found)
        assert expected is not None
        assert actual is not None
        if expected.name == "reshape":
            for more in self._match(expected.args[0][1], actual.args[0][1], bound, fail):
                if self._is_reshaped_alike(wanted, found, more):
                    yield more
                else:
                    fail(f"{found} has other sizes than the reshape of the pattern", more)
            return
        if reason := _other_arguments(found, dict(expected.args), dict(actual.args)):
            fail(reason, bound)
            return
        pairs = [(e, a) for (_, e), (_, a) in zip(expected.args, actual.args, strict=True)]
        yield from self._all(pairs, bound, fail)
        if expected.name in _COMMUTATIVE:
            (e0, e1), (a0, a1) = zip(*pairs[:2], strict=True)
            yield from self._all([(e0, a1), (e1, a0), *pairs[2:]], bound, fail)

    def _is_reshaped_alike(self, wanted: Node, found: Node, bound: Bound) -> bool:
        """To the shape of an input, or rows of the source's length, where the pattern's is; else of the pattern's."""
        sizes = list(value(wanted).shape)
        for known in self.inputs:
            if known in bound and isinstance(known.example, Tensor) and list(known.example.shape) == sizes:
                return list(map(str, value(bound[known]).shape)) == list(map(str, value(found).shape))
        before, after = value(form(wanted).args[0][1]).shape, value(form(found).args[0][1]).shape  # type: ignore[union-attr]
        if sizes and before and before[-1] == sizes[-1]:
            return bool(after) and str(after[-1]) == str(value(found).shape[-1])
        return value(found).shape[-1:] == tuple(sizes[-1:])

    def _all(self, pairs: list[tuple[Any, Any]], bound: Bound, fail: Callable) -> Iterator[Bound]:
        if not pairs:
            yield bound
            return
        for more in self._match(*pairs[0], bound, fail):
            yield from self._all(pairs[1:], more, fail)


def _differs(wanted: Node | Input, found: Any) -> str:
    """Why this can't be what the pattern has there, whatever its arguments are; "" where it can."""
    if isinstance(wanted, Input):
        expected: Any = wanted.example
        if isinstance(expected, float):
            number = value(source_of_number(found))
            given = isinstance(number, (int, float, torch.SymFloat)) or _is_number(number)
            return "" if given else f"{_named(found)} is no number"
    else:
        expected, name = value(wanted), form(wanted)
        actual = form(found) if isinstance(found, Node) else None
        if actual is None or name is None or actual.name != name.name:
            return f"{_named(found)} is {actual or 'an input'}, expected {name}"
    tensor = value(found)
    if isinstance(expected, Tensor):
        if not isinstance(tensor, Tensor):
            return f"{_named(found)} is no tensor"
        if tensor.dtype != expected.dtype:
            return f"{_named(found)} is {tensor.dtype}, expected {expected.dtype}"
        if isinstance(wanted, Input) and expected.dim() < 2 and tensor.dim() != expected.dim():
            return f"{_named(found)} has {tensor.dim()} dimensions, expected {expected.dim()}"
    return ""


def _other_arguments(found: Node, expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """An argument that one of two forms has and the other, which has its default, hasn't."""
    for name, wanted in expected.items():
        if name not in actual:
            return f"{found} has the default {name}, expected {_named(wanted)}"
    more = (
        f"{found} has {name} {_named(given)}, expected none" for name, given in actual.items() if name not in expected
    )
    return next(more, "")


def source_of_number(found: Any) -> Any:
    """The input of the graph that `torch.compile(dynamic=True)` makes of a float: a tensor, which it converts."""
    while isinstance(found, Node) and found.op == "call_function" and str(form(found)) == "convert":
        found = found.args[0]
    return found


def _is_number(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 0 and tensor.dtype == torch.float64


def _named(found: Any) -> str:
    return found.name if isinstance(found, Node) else repr(found)


def _telling(name: str) -> int:
    return _TELLING.index(name) if name in _TELLING else -1


def trace(function: Callable, inputs: list[Any]) -> Graph:
    """A function as the compiler sees it behind its decompositions."""
    # Apart from whatever is being compiled: sizes of examples would become symbols there, which nothing explains.
    with tracing(None), unset_fake_temporarily(), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        examples = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
        # make_fx counts the arguments of a method wrong.
        traced = make_fx(lambda *args: function(*args), decompositions())(*examples)
    traced.graph.eliminate_dead_code()
    return traced.graph


decompositions = lru_cache(1)(select_decompositions)
