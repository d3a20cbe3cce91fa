"""A sum over ranks with the norm behind it, so that both are one pass over memory."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from fused_ops import OPS

from .add_norm import fuse
from .calls import Call, behind_views, call_of, maker_of
from .fusion import Outcome, Pass, register_fusion
from .matcher import Miss

_SUMS = (OPS["all_reduce"], OPS["reduce_scatter"])
_BOTH = OPS["qk_all_reduce_rms_norm"]
_NORMS = (OPS["rms_norm"], OPS["fused_add_rms_norm"])
_FOREIGN = "_c10d_functional.wait_tensor.default"


@register_fusion("collective_norm", after="add_norm_pad")
class CollectiveNorm(Pass):
    """all_reduce or reduce_scatter, then rms_norm or fused_add_rms_norm; `quantized` adds the codes. And the norms of
    queries and of keys whose rows ranks have columns of, each alone in a model that is cut, as one call."""

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        for node in list(graph.nodes):
            k = call_of(node)
            if k is not None and k.op is _BOTH:
                with outcome.trying(node):
                    _join(graph, outcome, k)
        for node in list(graph.nodes):
            norm = call_of(node)
            if norm is None or norm.op not in _NORMS:
                continue
            with outcome.trying(node):
                _fuse(graph, outcome, norm)


def _fuse(graph: Graph, outcome: Outcome, norm: Call) -> None:
    addends = [norm.args["x"]]
    if norm.args.get("residual") is not None and norm.args["x_multiplier"] == 1.0:
        addends.append(norm.args["residual"])  # additions commute
    if any(_is_foreign(behind_views(x)) for x in addends):
        raise Miss("the sum over ranks is torch's, which has no workspace to sum in: models_patch.shard uses one")
    found = [(x, total) for x in addends if (total := call_of(maker_of(x))) is not None and total.op in _SUMS]
    if not found:
        return
    x, total = found[0]
    if len(x.users) > 1:
        raise Miss("the sum over ranks has another user than the norm")
    args: dict[str, Any] = {**norm.args, **total.args}
    if x is not norm.args["x"]:
        args["residual"] = norm.args["x"]
    places = norm.results | {name: node for name, node in total.results.items() if name == "workspace"}
    fuse(graph, outcome, f"{total.op.name}_{norm.op.name}", args, places, norm.node, {x, total.node, norm.node})
    for node in x, total.node:
        if not node.users:
            graph.erase_node(node)


def _join(graph: Graph, outcome: Outcome, k: Call) -> None:
    """The norm of queries that is the exchange before this one, and this one, where each is of one tensor."""
    q = call_of(maker_of(k.args["workspace"]))
    alike = ("eps", "flags", "rank", "group")
    if q is None or q.op is not _BOTH or any(q.args[name] != k.args[name] for name in alike):
        return
    if not _is_of_one(q) or not _is_of_one(k) or len(k.args["workspace"].users) > 1:
        return
    args = q.args | {"k": k.args["q"], "k_weight": k.args["q_weight"]}
    places = {"q": q.results["q"], "k": k.results["q"]} | {n: r for n, r in k.results.items() if n == "workspace"}
    fuse(graph, outcome, _BOTH.name, args, places, q.node, {q.node, k.node, k.args["workspace"]})
    graph.eliminate_dead_code()  # not to be found once more


def _is_of_one(call: Call) -> bool:
    return call.args["q"] is call.args["k"] and "q" in call.results and "k" not in call.results


def _is_foreign(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and str(node.target) == _FOREIGN
