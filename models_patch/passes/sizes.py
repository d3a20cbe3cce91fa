"""Sizes that a graph is compiled for any of, as nodes that give them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .matcher import Miss, value
from .rewrite import aten, call


def size_of(graph: Graph, size: Any, like: Node, near: Iterable[Any] = ()) -> Any:
    """`size`, or a node at the graph's insert point that gives it: that of an input of the graph or a node `near`, or
    the product of a near one's leading ones. Raises Miss."""
    if isinstance(size, int):
        return size
    tensors = [node for node in near if isinstance(node, Node) and isinstance(value(node), Tensor)]
    for node in (*tensors, *graph.find_nodes(op="placeholder")):
        known = value(node)
        if isinstance(known, torch.SymInt) and str(known) == str(size):
            return node
        sizes = list(map(str, known.shape)) if isinstance(known, Tensor) else []
        if str(size) in sizes:
            return _size(graph, node, sizes.index(str(size)), like)
    for node in tensors:
        rows = value(node).shape[:-1]
        if str(rows.numel()) == str(size):
            product = _size(graph, node, 0, like)
            for dim in range(1, len(rows)):
                product = call(graph, operator.mul, (product, _size(graph, node, dim, like)), like)
            return product
    raise Miss(f"nothing in the graph gives the size {size}")


def _size(graph: Graph, node: Node, dim: int, like: Node) -> Any:
    known = value(node).shape[dim]
    return known if isinstance(known, int) else call(graph, aten.sym_size.int, (node, dim), like)


def reshaped(graph: Graph, node: Node, shape: Iterable[Any], like: Node) -> Node:
    """A node in a shape of as many elements, at the graph's insert point. Raises Miss."""
    sizes = list(shape)
    unknown = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    known = [-1] if len(unknown) == 1 else [size_of(graph, sizes[i], like, [node]) for i in unknown]
    for i, size in zip(unknown, known, strict=True):
        sizes[i] = size
    return call(graph, aten.reshape.default, (node, sizes), like)
