"""The spellings of a norm, each as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

import fused_ops

from .fusion import FusionPass, Outcome, PatternReplacement, register_fusion
from .matcher import form, value
from .rewrite import call, hoist

_EPS = 1.28379e-5  # stands for any
INPUT = (
    "{} is a tensor, expected a number: of a float that dynamic=True made an input, "
    "torch._dynamo.config.specialize_float = True makes one again"
)
_HALVES = (torch.bfloat16, torch.float16)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * _normed(x.float(), eps).to(x.dtype)


def _olmo(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight * _normed(x.float(), eps)).to(x.dtype)


def _gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_normed(x.float(), eps) * (1.0 + weight.float())).to(x.dtype)


def _weightless(x: Tensor, eps: float) -> Tensor:
    return _normed(x.float(), eps).to(x.dtype)


class OfEps(PatternReplacement):
    """A norm whose eps an operation can take: a number."""

    def check(self, eps: Any, **_: Any) -> str:
        return "" if isinstance(eps, (int, float)) else INPUT.format("eps")


class Norm(OfEps):
    """One order of a norm's roundings.

    dtypes: S. weights: dtypes of the weight besides S; None where there is no weight.
    """

    name = "rms_norm"

    def __init__(
        self,
        function: Callable,
        dtypes: tuple[torch.dtype, ...],
        weights: tuple[torch.dtype, ...] | None = (),
        **options: Any,
    ) -> None:
        self.function, self.dtypes, self.weights, self.options = function, dtypes, weights, options

    def inputs(self) -> list[dict[str, Any]]:
        examples = []
        for dtype in self.dtypes:
            x = torch.empty(3, 5, 7, dtype=dtype)
            if self.weights is None:
                examples.append({"x": x, "eps": _EPS})
                continue
            for of_weight in dict.fromkeys((dtype, *self.weights)):
                examples.append({"x": x, "weight": torch.empty(7, dtype=of_weight), "eps": _EPS})
        return examples

    def pattern(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)

    def replacement(self, x: Tensor, *rest: Any) -> Tensor:
        weight, eps = (None, *rest) if self.weights is None else rest
        return fused_ops.rms_norm(x, weight, eps, **self.options)


class LayerNorm(OfEps):
    """torch's own, with weight and bias, or without one or both."""

    name = "layer_norm"

    def __init__(self, weight: bool, bias: bool) -> None:
        self.weight, self.bias = weight, bias

    def inputs(self) -> list[dict[str, Any]]:
        examples = []
        for dtype in (*_HALVES, torch.float32):
            tensors = {name: torch.empty(7, dtype=dtype) for name in ("weight", "bias") if getattr(self, name)}
            examples.append({"x": torch.empty(3, 5, 7, dtype=dtype), **tensors, "eps": _EPS})
        return examples

    def _split(self, inputs: tuple) -> tuple:
        x, *tensors, eps = inputs
        given = iter(tensors)
        return x, *(next(given) if there else None for there in (self.weight, self.bias)), eps

    def pattern(self, *inputs: Any) -> Tensor:
        x, weight, bias, eps = self._split(inputs)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def replacement(self, *inputs: Any) -> Tensor:
        return fused_ops.layer_norm(*self._split(inputs))


@register_fusion("lift_norm")
class LiftNorm(FusionPass):
    """Llama's, OLMo2's (torch's own too) and Gemma's order, and a norm without weight; layer norms."""

    def __init__(self) -> None:
        super().__init__()
        for dtypes in _HALVES, (torch.float32,):  # a norm of float32 may be the middle of a norm of less
            self.register(Norm(_gemma, dtypes, (torch.float32,), weight_bias=1.0))
            self.register(Norm(_llama, dtypes, round_before_weight=True))
            self.register(Norm(_olmo, dtypes, (torch.float32,)))
            self.register(Norm(_weightless, dtypes, None))
        for weight, bias in (True, True), (True, False), (False, False):
            self.register(LayerNorm(weight, bias))

    def __call__(self, graph: Graph, outcome: Outcome) -> None:
        spelled = [pair for node in list(graph.nodes) for pair in _as_rsqrt(graph, node)]
        super().__call__(graph, outcome)
        for old, new in spelled:
            if not new._erased:  # of no norm, or used besides: it keeps its bits
                hoist([old], new)
                new.replace_all_uses_with(old)


def _as_rsqrt(graph: Graph, root: Node) -> Iterator[tuple[Node, Node]]:
    """1 / sqrt(mean of squares + eps), by reciprocal or division, and x / sqrt(..), beside it as x * rsqrt(..).

    In float32, where they differ by what the operation's own root, which is exact, may differ too. Yields what was
    there, which nothing uses then, and what is used in its place.
    """
    found = form(root)
    if found is None or found.name != "aten.sqrt.default" or value(root).dtype != torch.float32:
        return
    if not _is_mean_of_squares(found.args[0][1]):
        return
    for user in list(root.users):
        name, args = (str(form(user)), user.args) if form(user) else ("", ())
        if name == "aten.reciprocal.default":
            numerator: Any = 1
        elif name == "div" and args[1] is root:
            numerator = args[0]
        else:
            continue
        with graph.inserting_before(user):
            new = call(graph, torch.ops.aten.rsqrt.default, (root.args[0],), user)
            if numerator != 1:
                new = call(graph, torch.ops.aten.mul.Tensor, (numerator, new), user)
        user.replace_all_uses_with(new)
        yield user, new


def _is_mean_of_squares(node: Any) -> bool:
    """Whether it is mean(x^2) + eps."""
    total = form(node) if isinstance(node, Node) else None
    if total is None or total.name != "add":
        return False
    means = [form(a) for _, a in total.args if isinstance(a, Node)]
    squares = [form(m.args[0][1]) for m in means if m is not None and m.name == "mean"]  # type: ignore[arg-type]
    return any(square is not None and square.name == "square" for square in squares)
