"""What passes did to the graphs they saw, as data, as JSON and as a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import distributed

from ..report import by_layer
from .config import Range
from .fusion import Site


@dataclass
class PassReport:
    """A pass on a graph: what it put where, what nearly matched and why it didn't, and how long it took."""

    name: str
    matches: list[Site] = field(default_factory=list)
    misses: list[Site] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""


@dataclass
class GraphReport:
    """All passes on a graph of so many nodes, for so many tokens."""

    hook: str
    tokens: Range
    nodes: int
    passes: list[PassReport] = field(default_factory=list)


@dataclass
class Ran:
    """What a manager did: one entry a graph that the compiler showed it. Prints as a table.

    A graph that the compiler has in its cache is not shown: its matches aren't here, and `from_cache` says so.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    asked: set[Any] = field(default_factory=set, repr=False)  # compilations that looked into the compiler's cache
    shown: set[Any] = field(default_factory=set, repr=False)  # those that then showed their graph

    @property
    def from_cache(self) -> int:
        """How many compilations found all their graphs in the compiler's cache, as they were rewritten before."""
        return len(self.asked - self.shown - {None})

    @property
    def operations(self) -> Counter[str]:
        """How many of each were put in."""
        return Counter(site.operation for site in self.sites)

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for item in graph.passes for site in item.matches]

    @property
    def misses(self) -> list[Site]:
        return [site for graph in self.graphs for item in graph.passes for site in item.misses]

    def json(self) -> str:
        """Everything, for programs."""
        return json.dumps({"from_cache": self.from_cache, "graphs": [_described(graph) for graph in self.graphs]})

    def __getstate__(self) -> dict[str, Any]:
        return {"graphs": self.graphs, "asked": set(range(self.from_cache)), "shown": set()}

    def gathered(self, group: Any = None) -> list[Ran]:
        """Every rank's, on all ranks of a `torch.distributed` group."""
        every: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(every, self, group)
        return every

    def __str__(self) -> str:
        matches = sum(len(item.matches) for graph in self.graphs for item in graph.passes)
        seconds = sum(item.seconds for graph in self.graphs for item in graph.passes)
        lines = [f"{len(self.graphs)} graphs, {matches} matches, {1e3 * seconds:.0f} ms in passes"]
        if self.from_cache:
            lines.append(f"{self.from_cache} more from the compiler's cache, rewritten before")
        for graph in self.graphs:
            lines.append(f"{graph.hook}, {graph.nodes} nodes, {graph.tokens}:")
            rows = [row for item in graph.passes for row in _rows(item)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines)


def _described(graph: GraphReport) -> dict[str, Any]:
    found = asdict(graph)
    for item, described in zip(graph.passes, found["passes"], strict=True):
        described |= {name: [site._asdict() for site in getattr(item, name)] for name in ("matches", "misses")}
    return found | {"tokens": list(graph.tokens)}


def _rows(item: PassReport) -> list[tuple[str, str, str]]:
    """(pass, operation or why not, where), with equal layers in one."""
    if item.skipped:
        return [(item.name, item.skipped, "")]
    rows = [(f"{len(paths)} x {name}", by_layer(paths)) for name, paths in _grouped(item.matches, "operation")]
    rows += [(f"left {len(paths)}: {reason}", by_layer(paths)) for reason, paths in _grouped(item.misses, "reason")]
    return [(item.name if i == 0 else "", *row) for i, row in enumerate(rows or [("nothing", "")])]


def _grouped(sites: list[Site], by: str) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(getattr(site, by), []).append(site.path or site.node)
    return list(groups.items())
