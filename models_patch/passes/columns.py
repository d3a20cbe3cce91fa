"""What each column of a tensor is, in columns of others: how slices, concatenations, signs and sums are seen through.

A rotation can be spelled in many ways: with halves or pairs, by chunk, slice, stack or `repeat_interleave`, and with
tables that have each angle once or twice. As columns all are x[a] * cos[i] - x[b] * sin[j].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .matcher import form, value

_WIDEST = 1024  # columns of what is looked into
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIGN, A, A_COLUMN, B, B_COLUMN = range(5)  # of a term: sign * a[.., column] * b[.., column]; leaf 0 is none
Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor that isn't looked into. rounded: the dtype that its values were rounded to on their way."""

    node: Node
    rounded: torch.dtype | None = None


@dataclass(frozen=True)
class Columns:
    """The last dimensions of a tensor, each element a sum of one or two terms.

    terms: int64 [*inner, one or two, 5], as above, of the last dimensions `inner`.
    axes: of each leaf, which dimension of it each of the tensor's others is; None where it has the same for all.
    products: the dtype in which terms of two factors were computed.
    """

    terms: np.ndarray
    axes: dict[int, Axes]
    products: torch.dtype | None = None

    @property
    def inner(self) -> tuple[int, ...]:
        return self.terms.shape[:-2]

    @property
    def summed(self) -> bool:
        """Whether elements are sums of products, or factors alone: none is a product that isn't in a sum yet."""
        if self.terms.shape[-2] == 1:
            return self.products is None
        return not ((self.terms[..., 0, B] > 0) & (self.terms[..., 1, A] == 0)).any()

    @property
    def factors(self) -> bool:
        """Whether each element is one of a leaf, but for its sign."""
        return self.terms.shape[-2] == 1 and self.products is None


class _Opaque(Exception):
    """This tensor isn't looked into."""


@dataclass
class Reader:
    """Of one graph, whose nodes are read in order."""

    leaves: list[Leaf | None] = field(default_factory=lambda: [None])
    _known: dict[Node, Columns | None] = field(default_factory=dict)
    _ids: dict[Leaf, int] = field(default_factory=dict)

    def read(self, node: Any) -> Columns | None:
        """None of what has no columns that could be told apart."""
        if not isinstance(node, Node) or not isinstance(value(node), Tensor):
            return None
        if node not in self._known:
            found = form(node)
            rule = _RULES.get(found.name) if found else None
            try:
                self._known[node] = rule(self, node, dict(found.args)) if rule and found else self._leaf(node)
            except _Opaque:
                self._known[node] = self._leaf(node)
        return self._known[node]

    def same(self, leaf: int, first: np.ndarray, second: np.ndarray) -> bool:
        """Whether these columns of a leaf have equal values, since each is computed of equal ones alone."""
        node: Any = self._of(leaf).node
        while not (first == second).all():
            columns = self._known.get(node)
            if columns is not None and columns.factors and columns.inner == value(node).shape[-1:]:
                terms = columns.terms[:, 0]
                within = self._of(int(terms[0, A])).node
                one = (terms[:, A] == terms[0, A]).all() and (terms[:, SIGN] == 1).all()
                if one and within is not node:
                    node, first, second = within, terms[first, A_COLUMN], terms[second, A_COLUMN]
                    continue
            found = form(node)
            if found is None or found.name not in _ELEMENTWISE:
                return False
            tensors = [a for _, a in found.args if isinstance(value(a), Tensor)]
            if len(tensors) != 1 or not isinstance(tensors[0], Node) or value(tensors[0]).dim() != value(node).dim():
                return False
            node = tensors[0]
        return True

    def _of(self, leaf: int) -> Leaf:
        found = self.leaves[leaf]
        assert found is not None
        return found

    def _id(self, leaf: Leaf) -> int:
        if leaf not in self._ids:
            self._ids[leaf] = len(self.leaves)
            self.leaves.append(leaf)
        return self._ids[leaf]

    def _leaf(self, node: Node) -> Columns | None:
        tensor = value(node)
        size = tensor.shape[-1] if tensor.dim() else None
        if not isinstance(size, int) or not 0 < size <= _WIDEST or tensor.dtype not in _FLOATS:
            return None
        terms = np.zeros((size, 1, 5), dtype=np.int64)
        terms[:, 0, SIGN], terms[:, 0, A], terms[:, 0, A_COLUMN] = 1, self._id(Leaf(node)), np.arange(size)
        return Columns(terms, {int(terms[0, 0, A]): tuple(range(tensor.dim() - 1))})

    def _needed(self, node: Any) -> Columns:
        columns = self.read(node)
        if columns is None:
            raise _Opaque
        return columns

    # Rules: the columns of a node of some form.

    def _as_it_is(self, node: Node, args: dict[str, Any]) -> Columns:
        return self._needed(args["self"])

    def _convert(self, node: Node, args: dict[str, Any]) -> Columns:
        columns, before, after = self._needed(args["self"]), value(args["self"]).dtype, value(node).dtype
        if not columns.summed or after not in _FLOATS:
            raise _Opaque
        if before == after or after == torch.float32:
            if columns.products is not None and before != after:
                raise _Opaque
            return columns
        if before != torch.float32 or (columns.products is not None and columns.products != torch.float32):
            raise _Opaque
        if columns.products is not None:
            return columns
        terms, axes = columns.terms.copy(), {}
        for leaf, of_leaf in columns.axes.items():
            known = self._of(leaf)
            exact = value(known.node).dtype == after
            if known.rounded not in (None, after):
                raise _Opaque
            new = leaf if exact else self._id(replace(known, rounded=after))
            terms[..., A][columns.terms[..., A] == leaf] = new
            axes[new] = of_leaf
        return replace(columns, terms=terms, axes=axes)

    def _neg(self, node: Node, args: dict[str, Any]) -> Columns:
        columns = self._needed(args["self"])
        terms = columns.terms.copy()
        terms[..., SIGN] *= -1
        return replace(columns, terms=terms)

    def _slice(self, node: Node, args: dict[str, Any]) -> Columns:
        columns = self._needed(args["self"])
        bounds = args["start"], args["end"], args.get("step", 1)
        if args["dim"] != -1 or any(isinstance(bound, Node) for bound in bounds):
            raise _Opaque
        return replace(columns, terms=columns.terms[..., slice(*bounds), :, :])

    def _select(self, node: Node, args: dict[str, Any]) -> Columns:
        return self._taken(self._needed(args["self"]), args["dim"], args["index"])

    def _taken(self, columns: Columns, dim: int, index: Any) -> Columns:
        if dim != -1 or not isinstance(index, int) or len(columns.inner) < 2:
            raise _Opaque
        return replace(columns, terms=columns.terms[..., index, :, :])

    def _getitem(self, node: Node, args: dict[str, Any]) -> Columns:
        split, index = node.args
        found = form(split) if isinstance(split, Node) else None
        if found is None or found.name not in _SPLITS or not isinstance(index, int):
            raise _Opaque
        args = dict(found.args)
        columns = self._needed(args["self"])
        if found.name == "aten.unbind.int":
            return self._taken(columns, args["dim"], index)
        if args["dim"] != -1:
            raise _Opaque
        sizes = [part.shape[-1] for part in value(split)]
        begin = sum(sizes[:index])
        return replace(columns, terms=columns.terms[..., begin : begin + sizes[index], :, :])

    def _unsqueeze(self, node: Node, args: dict[str, Any]) -> Columns:
        columns = self._needed(args["self"])
        behind, inner = -args["dim"] - 1, len(columns.inner)
        if behind < max(inner, 1) and (behind == 0 or inner > 1):
            return replace(columns, terms=np.expand_dims(columns.terms, inner - behind))
        at = value(node).dim() - inner - 1 - (behind - inner)
        return replace(columns, axes={leaf: (*axes[:at], None, *axes[at:]) for leaf, axes in columns.axes.items()})

    def _expand(self, node: Node, args: dict[str, Any]) -> Columns:
        columns, shape = self._needed(args["self"]), value(node).shape
        inner = shape[len(shape) - len(columns.inner) :]
        if not all(isinstance(size, int) for size in inner):
            raise _Opaque
        terms = np.broadcast_to(columns.terms, (*inner, *columns.terms.shape[-2:]))
        return replace(columns, terms=terms, axes=_padded(columns.axes, len(shape) - len(inner)))

    def _permute(self, node: Node, args: dict[str, Any]) -> Columns:
        columns, dims = self._needed(args["self"]), args["dims"]
        inner = len(columns.inner)
        outer, within = [d + len(dims) for d in dims[:-inner]], [d + inner for d in dims[-inner:]]
        if min(within) < 0:
            raise _Opaque
        terms = columns.terms.transpose(*within, inner, inner + 1)
        return replace(
            columns, terms=terms, axes={k: tuple(axes[d] for d in outer) for k, axes in columns.axes.items()}
        )

    def _reshape(self, node: Node, args: dict[str, Any]) -> Columns:
        columns = self._needed(args["self"])
        shape = tuple(value(args["self"]).shape)
        outer = shape[: len(shape) - len(columns.inner)]
        try:
            return self._reshaped(columns, outer, value(node).shape)
        except _Opaque:  # a dimension that all columns have in common may become one of them
            if (
                not outer
                or not isinstance(outer[-1], int)
                or any(axes[-1] is not None for axes in columns.axes.values())
            ):
                raise
            terms = np.broadcast_to(columns.terms, (outer[-1], *columns.terms.shape))
            joined = replace(columns, terms=terms, axes={k: axes[:-1] for k, axes in columns.axes.items()})
            return self._reshaped(joined, outer[:-1], value(node).shape)

    def _reshaped(self, columns: Columns, outer: tuple, shape: Any) -> Columns:
        for inner in range(1, len(shape) + 1):
            sizes = tuple(shape[len(shape) - inner :])
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) == math.prod(columns.inner):
                break
        else:
            raise _Opaque
        if inner > 1 and sizes != columns.inner and sizes[-1] != 2:  # heads, not pairs
            raise _Opaque
        to = tuple(shape[: len(shape) - inner])
        axes = {leaf: _aligned(outer, to, axes) for leaf, axes in columns.axes.items()}
        return replace(columns, terms=columns.terms.reshape(*sizes, *columns.terms.shape[-2:]), axes=axes)

    def _cat(self, node: Node, args: dict[str, Any]) -> Columns:
        parts = [self._needed(part) for part in args["tensors"]]
        if args["dim"] not in (-1, value(node).dim() - 1) or len({len(part.inner) for part in parts}) > 1:
            raise _Opaque
        products = {part.products for part in parts} - {None}
        if len(products) > 1 or not all(part.summed or part.products for part in parts):
            raise _Opaque
        deep = max(part.terms.shape[-2] for part in parts)
        terms = [np.pad(p.terms, [(0, 0)] * len(p.inner) + [(0, deep - p.terms.shape[-2]), (0, 0)]) for p in parts]
        axes = _merged([part.axes for part in parts])
        return Columns(np.concatenate(terms, axis=-3), axes, next(iter(products), None))

    def _mul(self, node: Node, args: dict[str, Any]) -> Columns:
        a, b = (self._needed(args[name]) for name in ("self", "other"))
        if not (a.factors and b.factors and a.inner == b.inner):
            raise _Opaque
        terms = a.terms.copy()
        terms[..., SIGN] *= b.terms[..., SIGN]
        terms[..., B], terms[..., B_COLUMN] = b.terms[..., A], b.terms[..., A_COLUMN]
        rank = value(node).dim() - len(a.inner)
        return Columns(terms, _merged([_padded(a.axes, rank), _padded(b.axes, rank)]), value(node).dtype)

    def _add(self, node: Node, args: dict[str, Any], sign: int = 1) -> Columns:
        if "alpha" in args:
            raise _Opaque
        a, b = (self._needed(args[name]) for name in ("self", "other"))
        single = a.terms.shape[-2] == b.terms.shape[-2] == 1
        if not single or a.inner != b.inner or not (a.products == b.products == value(node).dtype):
            raise _Opaque
        if not ((a.terms[..., B] > 0).all() and (b.terms[..., B] > 0).all()):
            raise _Opaque
        second = b.terms.copy()
        second[..., SIGN] *= sign
        rank = value(node).dim() - len(a.inner)
        axes = _merged([_padded(a.axes, rank), _padded(b.axes, rank)])
        return Columns(np.concatenate((a.terms, second), axis=-2), axes, a.products)

    def _sub(self, node: Node, args: dict[str, Any]) -> Columns:
        return self._add(node, args, -1)


def _padded(axes: dict[int, Axes], rank: int) -> dict[int, Axes]:
    return {leaf: (None,) * (rank - len(of_leaf)) + of_leaf for leaf, of_leaf in axes.items()}


def _merged(all_axes: list[dict[int, Axes]]) -> dict[int, Axes]:
    merged: dict[int, Axes] = {}
    for axes in all_axes:
        for leaf, of_leaf in axes.items():
            if merged.setdefault(leaf, of_leaf) != of_leaf:
                raise _Opaque
    return merged


def _aligned(before: tuple, after: tuple, axes: Axes) -> Axes:
    """Axes of a shape that is another one but for dimensions of one element."""
    rest = list(zip(before, axes, strict=True))
    found: list[int | None] = []
    for size in after:
        while rest and str(rest[0][0]) != str(size) and str(rest[0][0]) == "1":
            rest.pop(0)
        if rest and str(rest[0][0]) == str(size):
            found.append(rest.pop(0)[1])
        elif str(size) == "1":
            found.append(None)
        else:
            raise _Opaque
    if any(str(size) != "1" for size, _ in rest):
        raise _Opaque
    return tuple(found)


_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int")
_ELEMENTWISE = ("aten.cos.default", "aten.sin.default", "mul", "div", "neg", "convert", "clone", "alias")
_RULES: dict[str, Callable[[Reader, Node, dict[str, Any]], Columns]] = {
    "alias": Reader._as_it_is, "clone": Reader._as_it_is, "convert": Reader._convert, "neg": Reader._neg,
    "slice": Reader._slice, "aten.select.int": Reader._select, "getitem": Reader._getitem,
    "unsqueeze": Reader._unsqueeze, "aten.expand.default": Reader._expand, "permute": Reader._permute,
    "reshape": Reader._reshape, "cat": Reader._cat, "mul": Reader._mul, "add": Reader._add, "sub": Reader._sub,
}  # fmt: skip
