"""The pass manager: which passes run on a graph, in which order, and what came of it."""

from __future__ import annotations

import importlib
import inspect
import time
import weakref
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

import fused_ops

from .compiler import CustomGraphPass, TracingContext
from .config import PassConfig, Range, digest, overridden_range, use_config
from .fusion import HOOKS, POST_GRAD, FusionPass, Outcome, Pass, registered
from .matcher import value
from .report import GraphReport, PassReport, Ran


class PassManager(CustomGraphPass):
    """Ordered (id, pass) pairs that rewrite the graphs the compiler shows them.

        manager = PassManager.from_config(PassConfig())
        compiled = torch.compile(model, options={manager.hook: manager})
        compiled(tokens)
        print(manager.report())

    Subclass it and override `default_pass_pipeline` for another platform.

    Args:
        passes: (id, pass) in order; ids are distinct.
        hook: the compiler's, one of `models_patch.passes.HOOKS`.
        config: what passes read as theirs while they run.

    Raises:
        TypeError: one isn't a Pass. ValueError: an id is there twice, or the hook isn't known.
    """

    def __init__(
        self,
        passes: Iterable[tuple[str, Pass]] = (),
        hook: str = POST_GRAD,
        config: PassConfig | None = None,
    ) -> None:
        self.config = PassConfig() if config is None else config
        if not isinstance(self.config, PassConfig):
            raise TypeError(f"PassManager: config is {type(config).__name__}, expected a PassConfig")
        self.passes: list[tuple[str, Any]] = []
        self.bind_to_hook(hook)
        self.ran = Ran()
        for name, item in passes:
            self.add(item, name)

    @classmethod
    def from_config(cls, config: PassConfig | None = None, hook: str = POST_GRAD) -> PassManager:
        """The passes that a configuration asks for: its own pipeline, or the default one.

        Raises:
            TypeError, ValueError: its pipeline or its fusions name what isn't there; the message says which and why.
        """
        config = PassConfig() if config is None else config
        manager = cls(hook=hook, config=config)
        with use_config(config):
            if config.pass_pipeline is None:
                pairs = cls.default_pass_pipeline(config, hook)
            else:
                pairs = [_made(item, i) for i, item in enumerate(config.pass_pipeline)]
        for name, item in pairs:
            manager.add(item, name)
        return manager

    @classmethod
    def default_pass_pipeline(cls, config: PassConfig, hook: str = POST_GRAD) -> list[tuple[str, Pass]]:
        """The registered fusions that the configuration lets run, in order; on another hook than `POST_GRAD` none.

        Raises:
            ValueError: `config.fusions` names a fusion that isn't registered.
        """
        known = [item.name for item in registered()]
        for name in config.fusions:
            if name not in known:
                raise ValueError(f"PassConfig: fusions names {name!r}, expected some of {', '.join(known)}")
        if hook != POST_GRAD:
            return []
        return [(item.name, item.make()) for item in registered() if config.runs(item.name, item.default)]

    def bind_to_hook(self, hook: str) -> PassManager:
        """Let it be for another of the compiler's hooks; returns itself.

        Raises:
            ValueError: there is no such hook.
        """
        if hook not in HOOKS:
            raise ValueError(f"bind_to_hook: hook is {hook!r}, expected one of {', '.join(HOOKS)}")
        self.hook = hook
        return self

    def add(self, item: Any, name: str | None = None) -> PassManager:
        """Let a pass run after all that are there: a `Pass`, or what the compiler itself takes, a `CustomGraphPass`.

        Raises:
            TypeError: it is neither. ValueError: a pass of this name is there.
        """
        if not isinstance(item, (Pass, CustomGraphPass)):
            raise TypeError(f"add: pass is {_class_name(item)}, expected a Pass or a CustomGraphPass")
        if item is self:
            raise ValueError("add: pass is the manager itself")
        name = type(item).__name__ if name is None else name
        if name in dict(self.passes):
            raise ValueError(f"add: name is {name!r}, which {_class_name(dict(self.passes)[name])} has already")
        self.passes.append((name, item))
        return self

    def compute_config_hash(self) -> str:
        """Of the configuration where it makes the pipeline; of the passes themselves where it lists them."""
        if self.config.pass_pipeline is None:
            return self.config.compute_hash()
        return digest([name for name, _ in self.passes], self.config.compute_hash())

    def describe_pipeline(self) -> list[dict[str, str]]:
        """{"id", "pass", "hook", "uuid"} of each pass, in order."""
        return [
            {"id": name, "pass": _class_name(item), "hook": self.hook, "uuid": str(item.uuid())}
            for name, item in self.passes
        ]

    def __call__(self, graph: Graph) -> None:
        """Run the passes on the graph that the compiler shows."""
        tokens = overridden_range() or tokens_of(graph)
        report = GraphReport(self.hook, tokens, len(graph.nodes))
        with use_config(self.config):
            for name, item in self.passes:
                entry = PassReport(name)
                start = time.perf_counter()
                if not isinstance(item, Pass):
                    item(graph)
                elif item.is_applicable(tokens):
                    outcome = Outcome()
                    item(graph, outcome)
                    entry.matches, entry.misses = outcome.matches, outcome.misses
                    graph.eliminate_dead_code()  # also what a pass gave up
                else:
                    entry.skipped = f"not for {tokens}"
                entry.seconds = time.perf_counter() - start
                report.passes.append(entry)
        graph.lint()
        self.ran.graphs.append(report)
        self.ran.shown.add(current_compilation())

    def uuid(self) -> str | None:
        """What the compiler's cache knows the manager by; None where a pass says that its graphs mustn't be kept."""
        self.ran.asked.add(current_compilation())
        uuids = [(name, item.uuid()) for name, item in self.passes]
        if any(uuid is None for _, uuid in uuids):
            return None
        return digest(self.hook, self.compute_config_hash(), uuids, overridden_range(), sources(), versions())

    def report(self) -> Ran:
        """What was done to the graphs so far: a table when printed, `.json()` for programs."""
        return self.ran

    # The compiler copies and pickles its configuration, with the manager in it; what it found is to be seen in the one
    # that the user has.

    def __deepcopy__(self, _: dict) -> PassManager:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "ran": Ran()}


def current_compilation() -> Any:
    """What tells this compilation from others; None outside of one."""
    context = TracingContext.try_get()
    return None if context is None else weakref.ref(context)


_BASES = (Pass, FusionPass, CustomGraphPass, PassManager)


def _made(item: Any, index: int) -> tuple[str, Any]:
    """(id, pass) of an entry of a pipeline. Raises TypeError or ValueError that names it."""
    where = f"PassConfig: pass_pipeline[{index}]"
    if isinstance(item, str):
        module, _, name = item.rpartition(".")
        if not module:
            raise ValueError(f"{where} is {item!r}, expected 'package.module.Class'")
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"{where} is {item!r}, but {module} can't be imported: {error}") from error
        except Exception as error:
            raise ValueError(f"{where} is {item!r}, but importing {module} raises {_told(error)}") from error
        if not hasattr(imported, name):
            raise ValueError(f"{where} is {item!r}, but {module} has no {name}")
        found = getattr(imported, name)
        if not inspect.isclass(found):
            raise TypeError(f"{where} is {item!r}, which is {type(found).__name__}, expected a class")
        item = found
    if inspect.isclass(item):
        if not issubclass(item, (Pass, CustomGraphPass)):
            raise TypeError(f"{where} is {item.__qualname__}, expected a Pass or a CustomGraphPass")
        if item in _BASES or inspect.isabstract(item):
            raise TypeError(f"{where} is {item.__qualname__}, a base class, which does nothing: expected a subclass")
        try:
            item = item()
        except TypeError as error:
            raise TypeError(f"{where} is {item.__qualname__}, which takes arguments: {error}") from error
        except Exception as error:
            raise ValueError(f"{where} is {item.__qualname__}, and making it raises {_told(error)}") from error
    if not isinstance(item, (Pass, CustomGraphPass)):
        raise TypeError(f"{where} is {_class_name(item)}, expected a pass, its class or its name")
    return next((r.name for r in registered() if r.make is type(item)), type(item).__name__), item


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _class_name(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def tokens_of(graph: Graph) -> Range:
    """How many tokens a graph is for: those of its first input of whole numbers, or any where there is none."""
    for node in graph.find_nodes(op="placeholder"):
        tensor = value(node)
        if isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32) and tensor.dim():
            return _bounds(tensor.numel())
    return Range()


def _bounds(size: Any) -> Range:
    if isinstance(size, int):
        return Range(size, size)
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    lower, upper = (int(e) if e.is_Integer else no for e, no in zip((bounds.lower, bounds.upper), Range(), strict=True))
    return Range(max(lower, 0), min(upper, Range().upper))


@lru_cache(1)
def sources() -> str:
    """Of this package's files, since all of them have a part in what a pass does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest([file.read_text() for file in files])


@lru_cache(1)
def versions() -> str:
    """Of the library: its number, and which operations with which schemas there are, for what is being worked on."""
    try:
        number = metadata.version("fused-ops")
    except metadata.PackageNotFoundError:
        number = "unknown"
    return digest(number, torch.__version__, [str(op.default._schema) for op in fused_ops.OPS.values()])
