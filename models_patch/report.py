"""What `patch` did to a model, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quant import QuantKey

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_TITLES = ("module", "class", "calls", "quantized as", "for", "note")


@dataclass(frozen=True)
class Entry:
    """One place of the model.

    path, module: the module's name in the model, and that of its class.
    operation: the fused operation that it calls now; None where it was left as it was.
    quant_key: how the operation quantizes its result; None where it doesn't.
    feeds: the linear layers that take this result.
    note: why it was left, why the result is not quantized, or which other module's work is included.
    """

    path: str
    module: str
    operation: str | None
    quant_key: QuantKey | None = None
    feeds: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The places of `model` that matter, in order; prints as a table in which equal layers share a line.

    summary: what was done, with places for how many were replaced and how many left.
    """

    model: str
    entries: tuple[Entry, ...]
    summary: str = "fused operations in {} places, {} left as they were"

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self if entry.operation is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self if entry.operation is None)

    def __str__(self) -> str:
        rows = [
            (e.path, e.module, e.operation or "-", str(e.quant_key or ""), ", ".join(e.feeds), e.note)
            for e in _merged(self.entries)
        ]
        columns = [column for column in zip(_TITLES, *rows, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True)]
        head = f"{self.model}: {self.summary.format(len(self.replaced), len(self.left))}"
        return "\n".join([head, *lines])


def _merged(entries: tuple[Entry, ...]) -> list[Entry]:
    """Entries that differ only in the number of their layer as one, with a range: "model.layers.1-29.mlp"."""
    layers: dict[Entry, list[int]] = {}
    for entry in entries:
        number = _LAYER.search(entry.path)
        layers.setdefault(replace(entry, path=_LAYER.sub("{}", entry.path)), []).extend(
            [int(number.group())] if number else []
        )
    return [replace(entry, path=entry.path.format(_ranges(numbers))) for entry, numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def by_layer(paths: list[str]) -> str:
    """Paths in words, those that differ only in the number of their layer as one, with a range."""
    layers: dict[str, list[int]] = {}
    for path in paths:
        number = _LAYER.search(path)
        layers.setdefault(_LAYER.sub("{}", path), []).extend([int(number.group())] if number else [])
    words = [path.replace("{}", _ranges(sorted(set(numbers)))) for path, numbers in layers.items()]
    return ", ".join(words if len(words) <= 5 else [*words[:4], f"and {len(words) - 4} more"])
