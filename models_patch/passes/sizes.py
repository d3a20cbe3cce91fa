"""Sizes that a graph is compiled for any of, as nodes that give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .matcher import Miss, value
from .rewrite import aten, call


class Sizes:
    """What gives a size: a number, an input of the graph, or the shape of one."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inputs: dict[str, tuple[Node, int | None]] = {}
        for node in graph.find_nodes(op="placeholder"):
            known = value(node)
            if isinstance(known, torch.SymInt):
                self.inputs[str(known)] = node, None
            elif isinstance(known, Tensor):
                for dim, size in enumerate(known.shape):
                    if not isinstance(size, int):
                        self.inputs.setdefault(str(size), (node, dim))

    def of(self, size: Any, like: Node) -> Any:
        """`size`, or a node that gives it at the graph's insert point. Raises Miss."""
        if isinstance(size, int):
            return size
        if str(size) not in self.inputs:
            raise Miss(f"no input of the graph has the size {size}")
        node, dim = self.inputs[str(size)]
        return node if dim is None else call(self.graph, aten.sym_size.int, (node, dim), like)
