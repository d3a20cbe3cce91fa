"""What a pass is, and those that find a pattern and put an operation in its place."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, Node

from .compiler import CustomGraphPass, is_fake
from .config import PassConfig, Range, current_config, digest
from .matcher import Miss, Pattern, form
from .rewrite import insert, path_of

POST_GRAD = "post_grad_custom_post_pass"
HOOKS = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    POST_GRAD,
)


REFUSALS = TypeError, ValueError, RuntimeError  # of an operation, asked for its results
_NEAR = 3  # parts of a pattern that are there, for the rest to be missed
_WHOLE = 1 << 30  # as many as none has: what is there and must stay is nearer than any part of another pattern


class Site(NamedTuple):
    """A place of the graph: the module it comes from, the node, and what was put there, or why nothing was."""

    path: str
    node: str
    operation: str = ""
    reason: str = ""


@dataclass
class Outcome:
    """What a pass did to a graph. wants_numbers: whether a pattern was left for a number that is an input there."""

    matches: list[Site] = field(default_factory=list)
    misses: list[Site] = field(default_factory=list)
    wants_numbers: bool = False

    def matched(self, node: Node, operation: str) -> None:
        self.matches.append(Site(path_of(node), node.name, operation))

    def missed(self, node: Node, reason: str) -> None:
        self.misses.append(Site(path_of(node), node.name, reason=reason))

    @contextmanager
    def trying(self, node: Node) -> Iterator[None]:
        """A block that rewrites what is at this node, or finds why it must stay, which is noted."""
        try:
            yield
        except Miss as miss:
            self.missed(node, miss.reason)
        except REFUSALS as error:
            self.missed(node, f"refused: {error}")


class Pass(ABC):
    """A step of a `PassManager`.

    It is made without arguments, and reads options from `self.config`, the manager's. It must keep nothing of a graph:
    a graph that the compiler has in its cache is never shown to it.
    """

    def __init__(self) -> None:
        self.config: PassConfig = current_config()

    @abstractmethod
    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        """Rewrite the graph, and note in `outcome` what was done and what nearly was."""

    def is_applicable(self, tokens: Range) -> bool:
        """Whether it is to run on a graph for so many tokens."""
        return True

    def uuid(self) -> str:
        """Changes with the sources of its classes and what it was made with."""
        mine = {name: item for name, item in vars(self).items() if name != "config"}
        classes = [_described_class(cls) for cls in _classes(type(self))]
        return digest(classes, _described(mine), self.config.compute_hash())


@dataclass(frozen=True)
class Function(CustomGraphPass):
    """A plain function of a graph, which the compiler takes too. It keeps no graph then, since nothing tells functions
    apart."""

    function: Callable[[Graph], Any]

    def __call__(self, graph: Graph) -> None:
        self.function(graph)

    def uuid(self) -> None:
        return None


class FusionPass(Pass):
    """A pass of patterns and their replacements, in order of registration.

    class MyFusion(FusionPass):
        def __init__(self):
            super().__init__()
            self.register(MyPattern())
    """

    def __init__(self) -> None:
        super().__init__()
        self.replacements: list[PatternReplacement] = []

    def register(self, replacement: PatternReplacement) -> None:
        """Let it be looked for, after those before it.

        Raises:
            TypeError: it is no PatternReplacement.
        """
        if not isinstance(replacement, PatternReplacement):
            raise TypeError(f"register: replacement is {type(replacement).__name__}, expected a PatternReplacement")
        self.replacements.append(replacement)

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        starting: dict[str, list[PatternReplacement]] = {}
        for replacement in self.replacements:
            for name in dict.fromkeys(pattern.anchor_name for pattern in replacement.patterns()):
                starting.setdefault(name, []).append(replacement)
        for node in list(graph.nodes):
            if node.op != "call_function" or node._erased:
                continue
            here = starting.get(str(form(node)), ())
            matches, nearest = 0, _replaced(graph, node, here, outcome)
            while nearest is None:  # one anchor may have several users
                matches += 1
                nearest = Miss("") if node._erased else _replaced(graph, node, here, outcome)
            if not matches and nearest.matched >= _NEAR:
                outcome.missed(node, nearest.reason)


def _replaced(graph: Graph, node: Node, here: Iterable[PatternReplacement], outcome: Outcome) -> Miss | None:
    """Replace the first pattern whose anchor this node is; returns None, or the nearest miss."""
    nearest = Miss("")
    for miss in (miss for replacement in here for miss in replacement.at(graph, node, outcome)):
        if miss is None:
            return None
        nearest = miss if miss.matched > nearest.matched else nearest
    return nearest


@contextmanager
def _named(of: PatternReplacement, method: str, *others: type[Exception]) -> Iterator[None]:
    """Errors of somebody's pattern by its class and method; not these others."""
    try:
        yield
    except others:
        raise
    except Exception as error:
        raise ValueError(f"{type(of).__qualname__}.{method}: {type(error).__name__}: {error}") from error


class PatternReplacement(ABC):
    """A computation, and what is to stand in its place.

        class DoubledRelu(PatternReplacement):
            def inputs(self):
                return [{"x": torch.empty(5, 7)}]

            def pattern(self, x):
                return torch.relu(x) * 2

            def replacement(self, x):
                return my_library.doubled_relu(x)

    Both functions take the same arguments and return as many results. The pattern is found in any spelling that the
    compiler's decompositions, the order of sums and products and the names of views don't tell apart, whatever the
    sizes; nodes in its midst may have other users.
    """

    name = ""  # for the report; the class's where there is none

    @abstractmethod
    def inputs(self) -> list[dict[str, Any]]:
        """Examples of the arguments, one for each combination of dtypes: tensors; and floats for any number, of a value
        that the pattern has nowhere else."""

    @abstractmethod
    def pattern(self, *inputs: Any) -> Any:
        """What is looked for."""

    @abstractmethod
    def replacement(self, *inputs: Any) -> Any:
        """What takes its place: a tensor for each result."""

    def check(self, *_: Any, **inputs: Any) -> str:
        """Why the pattern, found with these nodes and numbers, must stay; "" where it needn't."""
        return ""

    def patterns(self) -> list[Pattern]:
        """What is looked for, traced once in a process for each version of it."""
        if self not in _patterns:
            version = type(self), self.uuid()
            if version not in _traced:
                with _named(self, "pattern"):
                    _traced[version] = [Pattern(self.pattern, example) for example in self.inputs()]
            _patterns[self] = _traced[version]
        return _patterns[self]

    def at(self, graph: Graph, node: Node, outcome: Outcome) -> Iterator[Miss | None]:
        """Replace the pattern whose anchor this node is; yields None if it was there, or why it isn't, if it could."""
        found = form(node)
        for pattern in self.patterns():
            if found is None or pattern.anchor_name != found.name:
                continue
            try:
                match = pattern.find(node)
                with _named(self, "check", Miss):
                    reason = self.check(**match.inputs)
                if reason:
                    numbers = [match.inputs[i.name] for i in pattern.inputs if isinstance(i.example, float)]
                    outcome.wants_numbers |= any(isinstance(number, Node) for number in numbers)
                    raise Miss(reason, _WHOLE)
                with _named(self, "replacement", Miss):
                    try:
                        insert(graph, match, self.replacement)
                    except Miss as miss:
                        raise Miss(miss.reason, _WHOLE) from None
                    except REFUSALS as error:
                        raise Miss(f"refused: {error}", _WHOLE) from error
            except Miss as miss:
                yield miss
            else:
                outcome.matched(match.outputs[-1], self.name or type(self).__name__)
                yield None
                return

    def uuid(self) -> str:
        with _named(self, "inputs"):
            examples = [{name: _example(of) for name, of in example.items()} for example in self.inputs()]
        classes = [_described_class(cls) for cls in _classes(type(self))]
        return digest(classes, _described(vars(self)), _described(examples))


_traced: dict[tuple[type, str], list[Pattern]] = {}
_patterns: WeakKeyDictionary[PatternReplacement, list[Pattern]] = WeakKeyDictionary()  # a uuid takes a while


def _classes(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__ not in ("builtins", "abc", __name__)]


def source_of(cls: type) -> str:
    """A class's name, since a file has several, and the text of the file, since what it calls there counts too; the
    class's own, where there is no file.
    """
    module = sys.modules.get(cls.__module__)
    try:
        text = inspect.getsource(module if module is not None and module.__name__ != "__main__" else cls)
    except (OSError, TypeError):
        text = cls.__module__
    return f"{cls.__qualname__}\n{text}"


def _described_class(cls: type) -> Any:
    """Its source, and what it holds: one text makes many classes, in a function, or in a notebook where no file is."""
    held = {name: getattr(item, "__func__", item) for name, item in vars(cls).items() if name != "_abc_impl"}
    return [source_of(cls), _described({name: item for name, item in held.items() if not _is_special(name, item)})]


def _is_special(name: str, item: Any) -> bool:
    return name.startswith("__") and not hasattr(item, "__code__")


def _described(item: Any) -> Any:
    """The same in every process, and another for what computes something else."""
    if isinstance(item, type):
        return f"{item.__module__}.{item.__qualname__}"
    if isinstance(item, dict):
        return {str(name): _described(of) for name, of in item.items()}
    if isinstance(item, (list, tuple)):
        return [_described(of) for of in item]
    if isinstance(item, torch.Tensor):
        return [_example(item), _bytes(item)]
    if callable(getattr(item, "uuid", None)):
        return str(item.uuid())
    if isinstance(item, functools.partial):
        return [_described(item.func), _described(item.args), _described(item.keywords)]
    if code := getattr(item, "__code__", None):
        cells = [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        return [item.__module__, item.__qualname__, _code(code), _described(cells), _described(item.__defaults__ or ())]
    return f"{item.__module__}.{item.__qualname__}" if callable(item) and hasattr(item, "__qualname__") else repr(item)


def _example(item: Any) -> Any:
    """Of a tensor only what it is, since an example's values don't count."""
    return f"{item.dtype}{list(item.shape)}" if isinstance(item, torch.Tensor) else item


def _bytes(tensor: torch.Tensor) -> str:
    """A digest of the values; "" of one that has none."""
    if tensor.is_meta or is_fake(tensor):
        return ""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _code(code: CodeType) -> list[Any]:
    """Functions of one name and one file may differ."""
    return [
        code.co_code.hex(),
        code.co_names,
        [_code(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts],
    ]


def _constant(item: Any) -> str:
    """A set has another order in each process."""
    return repr(sorted(map(repr, item)) if isinstance(item, frozenset) else item)


class Registered(NamedTuple):
    name: str
    make: Callable[[], Pass]
    default: bool


_registered: dict[str, Registered] = {}


def register_fusion(name: str, *, default: bool = True, after: str | None = None) -> Callable[[type], type]:
    """Class decorator: let this pass be part of the default pipeline, under a name that `PassConfig.fusions` knows.

        @register_fusion("my_fusion", after="quantized")
        class MyFusion(FusionPass): ...

    default: whether it runs where the configuration doesn't say. after: the one behind which it runs; None: the last.

    Raises:
        ValueError: another class has that name, or there is no fusion `after`.
        TypeError: what is decorated is no Pass.
    """

    def register(cls: type) -> type:
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise TypeError(f"register_fusion: {cls!r} is no Pass")
        known = _registered.get(name)
        if known is not None and known.make is not cls:
            there = known.make
            if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"register_fusion: name is {name!r}, which {there.__qualname__} has already")
        if after is not None and after not in _registered:
            raise ValueError(f"register_fusion: after is {after!r}, expected one of {', '.join(_registered)}")
        items = [item for item in _registered.values() if item.name != name]
        at = len(items) if after is None else 1 + [item.name for item in items].index(after)
        items.insert(at, Registered(name, cls, default))
        _registered.clear()
        _registered.update((item.name, item) for item in items)
        return cls

    return register


def registered() -> tuple[Registered, ...]:
    """All fusions, in the order of the default pipeline."""
    return tuple(_registered.values())
