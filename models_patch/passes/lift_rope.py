"""The spellings of rotary embedding, each as one operation on q and k."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node

from fused_ops import OPS
from fused_ops.rope import IS_NEOX, ROUND_PRODUCTS

from .columns import A_COLUMN, B_COLUMN, SIGN, A, Axes, B, Reader
from .fusion import Outcome, Pass, register_fusion
from .matcher import Miss, form, value
from .rewrite import aten, call, item, path_of, place, replace
from .sizes import reshaped, size_of

HALVES, PAIRS, SORTED = "halves", "pairs", "pairs that are sorted into halves"


@dataclass(frozen=True)
class Table:
    """Where cosines and sines come from: (leaf, columns of it), the same for all that turn by them."""

    cos: int
    sin: int
    cos_columns: tuple[int, ...]
    sin_columns: tuple[int, ...]
    axes: tuple[Axes, Axes]
    rounded: torch.dtype | None  # the dtype to which products don't round it, but the model does


@dataclass(frozen=True)
class Rotation:
    """A tensor that is rotated.

    node: the result, [.., width]. x, first, axes: its columns `first` to `first + width` are those of leaf x, and its
    other dimensions these. heads: which of them tells heads, the others tell tokens.
    """

    node: Node
    x: int
    first: int
    width: int
    axes: Axes
    heads: int
    layout: str
    rounds: bool
    table: Table


@register_fusion("lift_rope", after="lift_norm")
class LiftRope(Pass):
    """Rotations of q and k by one table, of halves and of pairs, of whole heads and of their first columns."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        reader = Reader()
        candidates = [node for node in graph.nodes if _ends(node, reader)]
        found: list[Rotation] = []
        reasons: dict[Node, str] = {}
        inside: set[Node] = set()  # what rotations are made of
        parts: set[Node] = set()  # of what is none as a whole
        for node in reversed(candidates):
            if node in inside:
                continue
            try:
                found.append(rotation(node, reader))
                inside.update(_parts(node, reader))
            except Miss as miss:
                if miss.reason and node not in parts:
                    reasons[node] = miss.reason
                    parts.update(_parts(node, reader))
        emitter = _Emitter(graph, reader)
        for group in _groups(reversed(found)):
            for q, k in zip(group[::2], group[1::2], strict=False):
                try:
                    new = emitter.rope(q, k)
                except (Miss, TypeError, ValueError, RuntimeError) as error:
                    reasons[k.node] = error.reason if isinstance(error, Miss) else f"refused: {error}"
                else:
                    outcome.matched(new, "rope")
            if len(group) % 2:
                reasons[group[-1].node] = "only one tensor is rotated here, and rope takes q and k"
        turned = {one.node for one in found}
        for node, reason in reasons.items():
            if node in turned or (node not in inside and turned.isdisjoint(_parts(node, reader))):
                outcome.missed(node, reason)


def _ends(node: Node, reader: Reader) -> bool:
    """Whether a rotation may end there: with a sum, parts side by side, or a conversion, not where it is repeated."""
    columns, found = reader.read(node), form(node)
    if columns is None or columns.products is None or found is None:
        return False
    if found.name == "reshape":
        before = reader.read(node.args[0])
        if before is None or len(before.inner) != 2:
            return False
    elif found.name not in ("add", "sub", "cat", "convert"):
        return False
    return columns.terms.shape[-2] == 2 and len(columns.inner) == 1 and columns.summed


def _parts(node: Node, reader: Reader) -> set[Node]:
    """The sums and products that a node is made of: what a rotation is made of is none itself."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        for before in todo.pop().all_input_nodes:
            if isinstance(value(before), (list, tuple)):  # parts of one
                todo.append(before)
                continue
            columns = reader.read(before)
            if before not in found and columns is not None and columns.products is not None:
                found.add(before)
                todo.append(before)
    return found


def _groups(found: Iterable[Rotation]) -> list[list[Rotation]]:
    """Those of one module by one table, in order."""
    groups: dict[Any, list[Rotation]] = {}
    for one in found:
        groups.setdefault((path_of(one.node), one.table, one.layout, one.rounds, one.width), []).append(one)
    return list(groups.values())


def rotation(node: Node, reader: Reader) -> Rotation:
    """What is rotated there. Raises Miss, without a reason where it doesn't look like a rotation at all."""
    columns = reader.read(node)
    assert columns is not None
    terms = columns.terms
    turned = terms[:, 1, A] > 0
    x = _common(terms, turned)
    rotary, width = int(turned.sum()), len(terms)
    if x is None or rotary % 2:
        raise Miss("")
    if not turned[:rotary].all():
        raise Miss("columns that pass come before those that turn")
    first = int(terms[rotary:, 0, A_COLUMN].min()) - rotary if rotary < width else int(_of(terms, x).min())
    if (terms[rotary:, 0, A_COLUMN] != np.arange(rotary, width) + first).any() or (terms[rotary:, 0, SIGN] != 1).any():
        raise Miss("columns that pass aren't where they were")
    terms = _with_x_first(terms[:rotary], x)
    minus = (terms[..., SIGN] == -1).sum(-1)
    ones, twos = (np.flatnonzero(minus == number) for number in (1, 0))
    if len(ones) != len(twos) or len(ones) != rotary // 2:
        raise Miss("signs aren't those of a rotation")
    one, two = terms[ones], terms[twos]
    one = np.where((one[:, 0, SIGN] == 1)[:, None, None], one, one[:, ::-1])  # + x[a] * cos - x[b] * sin
    two = np.where((two[:, 0, A_COLUMN] == one[:, 1, A_COLUMN])[:, None, None], two, two[:, ::-1])  # x[b] * cos + ..
    if (two[..., A_COLUMN] != one[:, ::-1, A_COLUMN]).any():
        raise Miss("pairs aren't those of a rotation")
    if ones[0] > twos[0]:
        raise Miss("it turns the other way round")
    layout = _layout(ones, one[..., A_COLUMN] - first, rotary)
    if layout == SORTED and rotary < width:
        raise Miss("pairs are sorted, and only some columns turn")
    for index, name in enumerate(("cosines", "sines")):
        leaf = one[:, index, B]
        same = (leaf == leaf[0]).all() and (two[:, index, B] == leaf[0]).all()
        if not same or not reader.same(int(leaf[0]), one[:, index, B_COLUMN], two[:, index, B_COLUMN]):
            raise Miss(f"nothing shows that both columns of a pair turn by equal {name}")
    cos, sin = int(one[0, 0, B]), int(one[0, 1, B])
    axes = columns.axes
    free = [i for i, (c, s) in enumerate(zip(axes[cos], axes[sin], strict=True)) if c is None and s is None]
    if not free:  # they may have a dimension of one there
        shapes = [value(leaf.node).shape for leaf in (reader.leaves[cos], reader.leaves[sin]) if leaf is not None]
        both = enumerate(zip(axes[cos], axes[sin], strict=True))
        free = [i for i, pair in both if all(a is None or shape[a] == 1 for a, shape in zip(pair, shapes, strict=True))]
    if not free:
        raise Miss("cosines and sines aren't the same for all heads")
    dtype = value(node).dtype
    of_x = reader.leaves[x]
    assert of_x is not None
    if dtype != (of_x.rounded or value(of_x.node).dtype):
        raise Miss(f"it is {value(of_x.node).dtype}, and {dtype} when it is rotated")
    rounds = columns.products == dtype
    leaves = [reader.leaves[leaf] for leaf in (cos, sin)]
    rounded = next((leaf.rounded for leaf in leaves if leaf is not None), None)
    if any(leaf is None or leaf.rounded != rounded for leaf in leaves) or (rounds and rounded not in (None, dtype)):
        raise Miss("cosines and sines are rounded differently")
    table = Table(
        cos, sin, tuple(one[:, 0, B_COLUMN].tolist()), tuple(one[:, 1, B_COLUMN].tolist()), (axes[cos], axes[sin]),
        None if rounds else rounded,
    )  # fmt: skip
    return Rotation(node, x, first, width, axes[x], free[-1], layout, rounds, table)


def _common(terms: np.ndarray, turned: np.ndarray) -> int | None:
    """The leaf that is a factor of every term."""
    first = terms[0, 0]
    for leaf in int(first[A]), int(first[B]):
        inside = (terms[..., A] == leaf) | (terms[..., B] == leaf)
        if leaf and inside[:, 0].all() and inside[turned, 1].all() and turned.any():
            return leaf
    return None


def _with_x_first(terms: np.ndarray, x: int) -> np.ndarray:
    swapped = terms[..., [SIGN, B, B_COLUMN, A, A_COLUMN]]
    return np.where((terms[..., A] == x)[..., None], terms, swapped)


def _of(terms: np.ndarray, x: int) -> np.ndarray:
    """The columns of x."""
    return _with_x_first(terms, x)[..., A_COLUMN]


def _layout(ones: np.ndarray, pairs: np.ndarray, rotary: int) -> str:
    """pairs: the columns of x that the results in columns `ones` are made of."""
    half, steps = np.arange(rotary // 2), np.arange(0, rotary, 2)
    known = {
        HALVES: (half, half, half + rotary // 2),
        PAIRS: (steps, steps, steps + 1),
        SORTED: (half, steps, steps + 1),
    }
    for name, (results, a, b) in known.items():
        if (ones == results).all() and (pairs[:, 0] == a).all() and (pairs[:, 1] == b).all():
            return name
    raise Miss("pairs are neither halves nor neighbours")


class _Emitter:
    """Puts calls of `rope` into a graph, and their tables, one for all that turn by the same."""

    def __init__(self, graph: Graph, reader: Reader) -> None:
        self.graph, self.reader = graph, reader
        self.tables: dict[Any, Node] = {}

    def rope(self, q: Rotation, k: Rotation) -> Node:
        """q and k, rotated in one call, which take the place of what was there. Raises Miss."""
        inputs = [self._node(one.x) for one in (q, k)]
        tokens = [str(self._tokens(one)) for one in (q, k)]
        if tokens[0] != tokens[1]:
            raise Miss(f"q and k are of other tokens, {tokens[0]} and {tokens[1]}")
        known = self.tables.get(self._key(q))  # perhaps made behind these
        at = place(self.graph, [*inputs, self._node(q.table.cos), self._node(q.table.sin), known], [q.node, k.node])
        with self.graph.inserting_before(at):
            table = self._table(q)
            heads = [self._heads(one) for one in (q, k)]
            flags = IS_NEOX * (q.layout != PAIRS) | ROUND_PRODUCTS * q.rounds
            args = (*heads, None, table, flags, 0)
            new = call(self.graph, OPS["rope"].default, args, q.node)
            for index, one in enumerate((q, k)):
                replace(one.node, self._as_before(item(self.graph, new, index), one))
        return new

    def _node(self, leaf: int) -> Node:
        found = self.reader.leaves[leaf]
        assert found is not None
        return found.node

    def _tokens(self, one: Rotation) -> list[Any]:
        return [size for i, size in enumerate(value(one.node).shape[:-1]) if i != one.heads]

    def _heads(self, one: Rotation) -> Node:
        """[tokens, heads, D] of what is rotated: views, where the graph had views."""
        leaf = self.reader.leaves[one.x]
        assert leaf is not None
        node, shape = leaf.node, value(leaf.node).shape
        order = [axis for i, axis in enumerate(one.axes) if axis is not None and i != one.heads]
        at_heads = one.axes[one.heads]
        order += [] if at_heads is None else [at_heads]
        sizes = [value(one.node).shape[i] for i in range(len(one.axes))]
        known = ["1" if axis is None else str(shape[axis]) for axis in one.axes]
        if sorted(order) != list(range(len(shape) - 1)) or known != list(map(str, sizes)):
            raise Miss("rows of what is rotated aren't those of the result")
        heads = sizes[one.heads]
        if not isinstance(heads, int):
            raise Miss("the number of heads isn't constant")
        if leaf.rounded is not None:
            node = self._call(torch.ops.prims.convert_element_type.default, (node, leaf.rounded), one)
        if order != sorted(order):
            node = self._call(aten.permute.default, (node, [*order, len(order)]), one)
        if (one.first, one.width) != (0, shape[-1]):
            node = self._call(aten.slice.Tensor, (node, len(order), one.first, one.first + one.width), one)
        if one.layout == SORTED:  # neighbours as two halves
            node = self._call(aten.reshape.default, (node, [-1, heads, one.width // 2, 2]), one)
            node = self._call(aten.permute.default, (node, [0, 1, 3, 2]), one)
        return self._call(aten.reshape.default, (node, [-1, heads, one.width]), one)

    def _as_before(self, rotated: Node, one: Rotation) -> Node:
        shape, axes = value(one.node).shape, [i for i in range(len(one.axes)) if i != one.heads]
        order = [*axes, one.heads]
        rotated = reshaped(self.graph, rotated, [shape[i] for i in [*order, len(order)]], one.node)
        if order == sorted(order):
            return rotated
        back = [order.index(i) for i in range(len(order))]
        return self._call(aten.permute.default, (rotated, [*back, len(order)]), one)

    def _key(self, one: Rotation) -> Any:
        return one.table, one.heads, str(self._tokens(one))

    def _table(self, one: Rotation) -> Node:
        """float32 [tokens, rotary_dim]: cosines, then sines, of each token; built once."""
        key = self._key(one)
        if key not in self.tables:
            table = one.table
            halves = [
                self._rows(leaf, columns, axes, table.rounded, one)
                for leaf, columns, axes in zip(
                    (table.cos, table.sin), (table.cos_columns, table.sin_columns), table.axes, strict=True
                )
            ]
            rows = self._call(aten.cat.default, (halves, -1), one)
            shape, tokens = value(rows).shape, self._tokens(one)
            if list(map(str, shape[:-1])) != list(map(str, tokens)):
                sizes = [size_of(self.graph, size, one.node) for size in tokens]
                rows = self._call(aten.expand.default, (rows, [*sizes, -1]), one)
            self.tables[key] = self._call(aten.reshape.default, (rows, [-1, 2 * len(table.cos_columns)]), one)
        return self.tables[key]

    def _rows(self, leaf: int, columns: tuple[int, ...], axes: Axes, rounded: Any, one: Rotation) -> Node:
        """[*tokens, columns] in float32, of one for what is the same for all."""
        node = self._node(leaf)
        order = [axis for i, axis in enumerate(axes) if i != one.heads]
        shared = axes[one.heads]
        if shared is not None:  # of one element
            node = self._call(aten.select.int, (node, shared, 0), one)
            order = [axis if axis is None or axis < shared else axis - 1 for axis in order]
        there = [axis for axis in order if axis is not None]
        if sorted(there) != list(range(value(node).dim() - 1)):
            raise Miss("rows of cosines and sines aren't those of tokens")
        step = columns[1] - columns[0] if len(columns) > 1 else 1
        bounds = columns[0], columns[-1] + 1, step
        if step < 1 or list(columns) != list(range(*bounds)):
            raise Miss("cosines and sines aren't in the order of the pairs")
        if bounds != (0, value(node).shape[-1], 1):
            node = self._call(aten.slice.Tensor, (node, value(node).dim() - 1, *bounds), one)
        if there != sorted(there):
            node = self._call(aten.permute.default, (node, [*there, len(there)]), one)
        for i, axis in enumerate(order):
            if axis is None:
                node = self._call(aten.unsqueeze.default, (node, i), one)
        for dtype in (rounded, torch.float32):
            if dtype is not None and value(node).dtype != dtype:
                node = self._call(torch.ops.prims.convert_element_type.default, (node, dtype), one)
        return node

    def _call(self, target: Any, args: tuple, one: Rotation) -> Node:
        return call(self.graph, target, args, one.node)
