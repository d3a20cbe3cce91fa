"""Which passes run: a configuration, the current one, and the sizes a graph is compiled for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

_UNBOUNDED = 1 << 62


class Range(NamedTuple):
    """The numbers of tokens that a graph is compiled for, both ends included."""

    lower: int = 0
    upper: int = _UNBOUNDED

    def __str__(self) -> str:
        if self.lower == self.upper:
            return f"{self.lower} tokens"
        return f"{self.lower} to {'any number of' if self.upper >= _UNBOUNDED else self.upper} tokens"


@dataclass(frozen=True)
class PassConfig:
    """What a `PassManager` is made from. Subclass it (a frozen dataclass) to add options for passes of your own.

    fusions: {name: bool}, which registered fusions run; one that isn't named runs as it was registered to.
    pass_pipeline: exactly the passes that run, in order, as classes, instances, or "package.module.Class"; `fusions`
        has no say then. None: the default pipeline.

    Raises:
        TypeError: fusions isn't a mapping of names to bools, or pass_pipeline no sequence of passes.
    """

    fusions: Mapping[str, bool] = field(default_factory=dict)
    pass_pipeline: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fusions, Mapping):
            raise TypeError(f"PassConfig: fusions is {type(self.fusions).__name__}, expected {{name: bool}}")
        for name, runs in self.fusions.items():
            if not isinstance(name, str) or not isinstance(runs, bool):
                raise TypeError(f"PassConfig: fusions has {name!r}: {runs!r}, expected a name and a bool")
        object.__setattr__(self, "fusions", MappingProxyType(dict(self.fusions)))
        if self.pass_pipeline is not None:
            if isinstance(self.pass_pipeline, str):
                raise TypeError(f"PassConfig: pass_pipeline is {self.pass_pipeline!r}, expected a list of passes")
            object.__setattr__(self, "pass_pipeline", tuple(self.pass_pipeline))

    def runs(self, name: str, default: bool) -> bool:
        """Whether the registered fusion of this name is to run."""
        return self.fusions.get(name, default)

    def compute_hash(self) -> str:
        """Of the class and all its fields: the same in every process, another where any of them differs."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return digest(f"{type(self).__module__}.{type(self).__qualname__}", values)

    def __reduce__(self) -> tuple:  # a mapping proxy can't be pickled
        return _remade, (type(self), {f.name: _unproxied(getattr(self, f.name)) for f in fields(self)})


def _remade(cls: type, values: dict[str, Any]) -> Any:
    return cls(**values)


def _unproxied(value: Any) -> Any:
    return dict(value) if isinstance(value, MappingProxyType) else value


def _plain(value: Any) -> Any:
    """As JSON has it, whatever the process."""
    if isinstance(value, Mapping):
        return sorted((str(k), _plain(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, map(_plain, value)))
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    uuid = getattr(value, "uuid", None)
    return str(uuid()) if callable(uuid) else repr(value)


def digest(*parts: Any) -> str:
    """A SHA-256 of what JSON makes of these."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_config: ContextVar[PassConfig] = ContextVar("fused_ops_pass_config")
_range: ContextVar[Range | None] = ContextVar("fused_ops_compile_range", default=None)


def current_config() -> PassConfig:
    """That of the manager which is being made or run; outside of one, the default."""
    return _config.get(PassConfig())


@contextmanager
def use_config(config: PassConfig) -> Iterator[PassConfig]:
    """Let passes that are made in this block read this configuration.

    Raises:
        TypeError: config is no PassConfig.
    """
    if not isinstance(config, PassConfig):
        raise TypeError(f"use_config: config is {type(config).__name__}, expected a PassConfig")
    token = _config.set(config)
    try:
        yield config
    finally:
        _config.reset(token)


@contextmanager
def compile_range(lower: int, upper: int) -> Iterator[Range]:
    """What is compiled in this block is for so many tokens, whatever its shapes say; it counts in `uuid`.

    Raises:
        ValueError: 0 <= lower <= upper doesn't hold.
    """
    if not 0 <= lower <= upper:
        raise ValueError(f"compile_range: lower is {lower} and upper {upper}, expected 0 <= lower <= upper")
    token = _range.set(Range(lower, upper))
    try:
        yield Range(lower, upper)
    finally:
        _range.reset(token)


def overridden_range() -> Range | None:
    """That of `compile_range`, in such a block."""
    return _range.get()
