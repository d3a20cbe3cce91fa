"""What stands around a rotation of q and k: their norms before it, and the write of keys and values behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from fused_ops import OPS
from fused_ops.rope import WHOLE_VECTOR

from .calls import Memory, functionalized
from .fusion import Outcome, Pass, register_fusion
from .matcher import Miss, form, value
from .rewrite import aten, call, item, path_of, place, replace, results_of

_VIEWS = ("reshape", "permute")


def views_before(node: Any) -> list[Node]:
    """The reshapes and permutations that end in this node, the first of them last; where they start is its argument."""
    chain: list[Node] = []
    while isinstance(node, Node) and (found := form(node)) is not None and found.name in _VIEWS:
        chain.append(node)
        node = node.args[0]
    return chain


def replayed(graph: Graph, chain: list[Node], source: Any, like: Node) -> Node:
    """The same views of another tensor, at the graph's insert point."""
    for view in reversed(chain):
        dims: Any = view.args[1]
        twice = view.target is aten.permute.default is source.target
        if twice and [source.args[1][d] for d in dims] == list(range(len(dims))):
            source = source.args[0]
            continue
        source = call(graph, view.target, (source, *view.args[1:]), like)  # type: ignore[arg-type]
    return source


@register_fusion("qk_norm_rope", after="lift_rope")
class QkNormRope(Pass):
    """Norms of every head, or of all heads of a token as one row, right before the rotation."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        for node in graph.find_nodes(op="call_function", target=OPS["rope"].default):
            q, k, positions, table, flags, mrope = node.args
            chains = [views_before(x) for x in (q, k)]
            norms = [_norm(chain[-1].args[0] if chain else x) for chain, x in zip(chains, (q, k), strict=True)]
            if norms == [None, None]:
                continue
            with outcome.trying(node):
                (x, q_weight, eps, kind), (y, k_weight, of_k, kind_of_k) = _of_both(norms)
                if (eps, kind) != (of_k, kind_of_k):
                    raise Miss(
                        f"the norms of q and k differ: eps is {eps} and {of_k}, flags are {kind} and {kind_of_k}"
                    )
                whole = WHOLE_VECTOR * _whole_vector(norms, (q, k), chains)
                with graph.inserting_before(node):
                    heads = [replayed(graph, c, source, node) for c, source in zip(chains, (x, y), strict=True)]
                    args = (*heads, positions, table, q_weight, k_weight, eps, flags | kind | whole, mrope)
                    new = call(graph, OPS["qk_norm_rope"].default, args, node)
                    for index, old in results_of(node).items():
                        replace(old, item(graph, new, index))
                outcome.matched(new, "qk_norm_rope")


def _norm(node: Any) -> Node | None:
    return node if isinstance(node, Node) and node.target is OPS["rms_norm"].default else None


def _of_both(norms: list[Node | None]) -> Iterator[tuple]:
    for name, norm in zip("qk", norms, strict=True):
        if norm is None:
            raise Miss(f"{name} isn't normed, and the other one is")
    return (norm.args for norm in norms if norm is not None)


def _whole_vector(norms: list[Node | None], rows: tuple, chains: list[Any]) -> bool:
    """Whether all heads are normed as one row, and not each. Raises Miss where q and k, or both, do otherwise."""
    kinds = {False, True}
    for norm, row, chain in zip(norms, rows, chains, strict=True):
        cols, (_, heads, size) = value(norm).shape[-1], value(row).shape
        orders = [list(view.args[1]) for view in chain if view.target is aten.permute.default]
        each = cols == size and all(value(view).shape[-1] == size for view in chain)
        each &= all(order[-1] in (-1, len(order) - 1) for order in orders)
        whole = cols == heads * size and not orders
        kinds &= {kind for kind, holds in ((False, each), (True, whole)) if holds}
    if not kinds:
        raise Miss("norms are neither of heads nor of all heads as one row")
    return min(kinds)


@register_fusion("rope_kv_cache_write", after="qk_norm_rope")
class RopeKVCacheWrite(Pass):
    """Keys and values that go into a cache of [batch, kv_heads, length, D] at positions that all rows have in common.

    It is the `StaticCache` of transformers: a row of the batch is a block. Positions count from the start; one beyond
    the cache isn't written.
    """

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        slots: dict[Any, Node] = {}
        for name in ("rope", "qk_norm_rope"):
            for node in graph.find_nodes(op="call_function", target=OPS[name].default):
                with outcome.trying(node):
                    put = _written(node)
                    if put is not None:
                        new = _fuse(graph, node, f"{name}_kv_cache_write", put, slots)
                        outcome.matched(new, f"{name}_kv_cache_write")


def _written(node: Node) -> Node | None:
    """The write of the rotated keys; None where no cache gets them. Raises Miss where they are put behind others."""
    key = results_of(node).get(1)
    for user in _behind(key) if key is not None else ():
        found = form(user)
        if user.target is aten.index_put.default:
            return user
        if found is not None and found.name == "cat" and dict(found.args)["dim"] in (-2, value(user).dim() - 2):
            raise Miss("keys are put behind those before by a copy of all: the cache has no place for them")
    return None


def _behind(node: Node) -> Iterator[Node]:
    """Who uses it, through views."""
    for user in node.users:
        yield user
        if (found := form(user)) is not None and found.name in _VIEWS:
            yield from _behind(user)


def _fuse(graph: Graph, node: Node, name: str, put: Any, known: dict[Any, Node]) -> Node:
    """`put` writes the keys that `node` rotates: both, and the write of the values, as one operation. Raises Miss."""
    results, slots = results_of(node), put.args[1][-1]
    _check_write(put)
    put_v = _write_of_values(put)
    if value(put).shape[-1] != value(put_v).shape[-1]:
        raise Miss(
            f"{value(put).shape[-1]} columns of rotated keys and {value(put_v).shape[-1]} of latents or values are two "
            "caches: rope_kv_cache_write takes equal ones, mla_rope_kv_cache_concat one for both"
        )
    keys, values = _by_token(put, "keys"), _by_token(put_v, "values")
    if views_before(keys) != [keys] or keys.args[0] is not results[1]:
        raise Miss("keys are written in another order than that of tokens")
    views = views_before(put.args[2])
    others = [user for user in _behind(results[1]) if user is not put and user not in views]
    if others:
        raise Miss(f"{others[0]} uses the rotated keys, besides the cache")
    rotated = results[0] if 0 in results else item(graph, node, 0)
    chain = _views_behind(rotated)
    last = chain[0] if chain else rotated
    bases: list[Any] = [put.args[0], put_v.args[0]]
    at = place(graph, [*node.all_input_nodes, slots, values, *bases], [last, put, put_v])
    with graph.inserting_before(at):
        _, heads, _, columns = value(put_v).shape
        v = call(graph, aten.reshape.default, (values, [-1, heads, columns]), node)
        if bases[0] is bases[1]:  # equal zeros; each is written
            bases[1] = call(graph, aten.clone.default, (bases[1],), node)
        before, operation = OPS[name.removesuffix("_kv_cache_write")], OPS[name].default
        given: dict[str, Any] = dict(zip(before.arguments, node.args, strict=False))
        given |= {"v": v, "k_scale": None, "v_scale": None}
        given["slot_mapping"] = _slots(graph, slots, tuple(value(put).shape), node, known)
        # [batch, heads, length, D] as [blocks, block_size, heads, D]
        caches = {
            f"{kind}_cache": Memory(base, value(base).transpose(1, 2)) for kind, base in zip("kv", bases, strict=True)
        }
        new = functionalized(graph, operation, given, caches, node)
        replace(last, replayed(graph, chain, item(graph, new, 0), node))
        for index, old in enumerate((put, put_v), 1):
            replace(old, item(graph, new, index))
    return new


def _views_behind(node: Node) -> list[Node]:
    """The views that it goes through alone, the first of them last."""
    chain: list[Node] = []
    while len(node.users) == 1 and (found := form(user := next(iter(node.users)))) and found.name in _VIEWS:
        chain.insert(0, user)
        node = user
    return chain


def _check_write(put: Any) -> None:
    """Raise Miss unless it writes all heads of a cache [batch, heads, length, D] at positions [length]."""
    cache, (*others, slots), written = value(put.args[0]), put.args[1], value(put.args[2])
    if others != [None, None] or cache.dim() != 4 or value(slots).dim() != 1 or True in put.args[3:]:
        raise Miss(f"{put} isn't a write at positions that all sequences have in common")
    if put.args[0].op != "placeholder" and put.args[0].target is not aten.full.default:
        raise Miss(f"{put} writes into {put.args[0]}, which is no cache but made in this call, as by a sliding window")
    expected = [*cache.shape[:2], value(slots).shape[0], cache.shape[3]]
    if list(map(str, written.shape)) != list(map(str, expected)):
        raise Miss(f"{list(written.shape)} is written to {expected} of the cache")
    if not all(isinstance(size, int) for size in (*cache.shape, *cache.stride())):
        raise Miss("the size of the cache isn't constant")


def _write_of_values(put: Any) -> Node:
    """The other write to these positions, in the same module. Raises Miss."""
    users = [user for user in put.args[1][-1].users if user is not put and user.target is put.target]
    others = [user for user in users if user.args[1] == put.args[1] and path_of(user) == path_of(put)]
    if len(others) != 1:
        raise Miss(f"{len(others)} other writes to these positions, expected that of the values")
    _check_write(others[0])
    return others[0]


def _by_token(put: Any, name: str) -> Node:
    """What is written, before it was permuted: [batch, length, heads, D]. Raises Miss."""
    written = put.args[2]
    if written.target is not aten.permute.default or list(written.args[1]) != [0, 2, 1, 3]:
        raise Miss(f"{name} are written in another order than that of tokens")
    return written.args[0]


def _slots(graph: Graph, positions: Node, shape: tuple, like: Node, known: dict[Any, Node]) -> Node:
    """Rows of the cache as blocks: those of sequence b from b * length on; one beyond the cache is in none."""
    batch, _, length, _ = shape
    key = positions, batch, length
    if key not in known:
        with graph.inserting_before(place(graph, [positions], [])):
            known[key] = _numbered(graph, positions, batch, length, like)
    return known[key]


def _numbered(graph: Graph, positions: Node, batch: int, length: int, like: Node) -> Node:
    device = value(positions).device
    negative = call(graph, aten.lt.Scalar, (positions, 0), like)  # they count from the end
    from_end = call(graph, aten.add.Tensor, (positions, length), like)
    positions = call(graph, aten.where.self, (negative, from_end, positions), like)
    if batch == 1:
        return positions
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    rows = call(graph, torch.ops.prims.iota.default, (batch,), like, options)
    rows = call(graph, aten.unsqueeze.default, (rows, 1), like)
    rows = call(graph, aten.mul.Tensor, (rows, length), like)
    slots = call(graph, aten.add.Tensor, (rows, positions), like)
    beyond = call(graph, aten.ge.Scalar, (positions, length), like)
    of_none = {"dtype": value(slots).dtype, "device": device}
    none = call(graph, aten.full.default, ([], batch * length), like, of_none)
    slots = call(graph, aten.where.self, (beyond, none, slots), like)
    return call(graph, aten.reshape.default, (slots, [-1]), like)
