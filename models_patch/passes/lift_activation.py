"""The spellings of a gated activation, each as one operation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_ops

from .fusion import FusionPass, PatternReplacement, register_fusion
from .lift_norm import INPUT
from .matcher import value

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_HALVES = (torch.bfloat16, torch.float16)
_ALPHA, _LIMIT = 1.28379, 6.1283  # stand for any


class Gated(PatternReplacement):
    """activation(gate) * up, every step rounded, or in float32."""

    def __init__(self, operation: Callable, activation: Callable, rounded: bool = True) -> None:
        self.operation, self.activation, self.rounded = operation, activation, rounded
        self.name = operation.__name__

    def inputs(self) -> list[dict[str, Any]]:
        dtypes = _FLOATS if self.rounded else _HALVES
        return [{name: torch.empty(3, 5, dtype=dtype) for name in ("gate", "up")} for dtype in dtypes]

    def pattern(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.rounded:
            return self.activation(gate) * up
        return (self.activation(gate.float()) * up.float()).to(gate.dtype)

    def replacement(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.operation(gate, up, round_activation=self.rounded)

    def check(self, gate: Any, up: Any) -> str:
        return _broadcast(gate, up)


class Relu2(PatternReplacement):
    name = "relu2"

    def __init__(self, relu: Callable) -> None:
        self.relu = relu

    def inputs(self) -> list[dict[str, Any]]:
        return [{"x": torch.empty(3, 5, dtype=dtype)} for dtype in _FLOATS]

    def pattern(self, x: Tensor) -> Tensor:
        return self.relu(x).square()

    def replacement(self, x: Tensor) -> Tensor:
        return fused_ops.relu2(x)


class SwigluOai(PatternReplacement):
    """gpt-oss's, of a gate and an up, or of both in turn; scaled: by an alpha, which is no node where it is 1."""

    name = "swiglu_oai_mul"

    def __init__(self, alternating: bool, scaled: bool) -> None:
        self.alternating, self.scaled = alternating, scaled

    def inputs(self) -> list[dict[str, Any]]:
        numbers = ({"alpha": _ALPHA} if self.scaled else {}) | {"limit": _LIMIT, "lowest": -_LIMIT}
        tensors = {"gate": (3, 6)} if self.alternating else {"gate": (3, 5), "up": (3, 5)}
        return [{name: torch.empty(size, dtype=d) for name, size in tensors.items()} | numbers for d in _FLOATS]

    def pattern(self, *inputs: Any) -> Tensor:
        *tensors, limit, lowest = inputs
        alpha = tensors.pop() if self.scaled else None
        gate, up = (tensors[0][..., ::2], tensors[0][..., 1::2]) if self.alternating else tensors
        gate, up = gate.clamp(min=None, max=limit), up.clamp(min=lowest, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate if alpha is None else gate * alpha))

    def replacement(self, gate: Tensor, *rest: Any) -> Tensor:
        *up, limit, _ = rest
        alpha = up.pop() if self.scaled else 1.0
        return fused_ops.swiglu_oai_mul(gate, up[0] if up else None, alpha=alpha, limit=limit, round_activation=True)

    def check(self, gate: Any, limit: Any, lowest: Any, up: Any = None, alpha: Any = 1.0) -> str:
        if any(not isinstance(number, (int, float)) for number in (alpha, limit, lowest)):
            return INPUT.format("alpha or limit")
        if lowest != -limit:
            return f"up is clamped to {lowest} and {limit}, expected one limit"
        return "" if up is None else _broadcast(gate, up)


def _broadcast(gate: Any, up: Any) -> str:
    sizes = list(value(gate).shape), list(value(up).shape)
    return "" if str(sizes[0]) == str(sizes[1]) else f"gate is {sizes[0]}, up {sizes[1]}"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _clamped(x: Tensor) -> Tensor:
    return x.clamp_min(0)


@register_fusion("lift_activation", after="lift_norm")
class LiftActivation(FusionPass):
    """SwiGLU's and GeGLU's, gpt-oss's, and relu squared."""

    def __init__(self) -> None:
        super().__init__()
        for operation, activation in (fused_ops.silu_mul, F.silu), (fused_ops.gelu_tanh_mul, _gelu_tanh):
            self.register(Gated(operation, activation))
            if activation is F.silu:  # gelu's tanh form loses bits in float32, which the operation keeps
                self.register(Gated(operation, activation, rounded=False))
        for alternating, scaled in product((True, False), repeat=2):
            self.register(SwigluOai(alternating, scaled))
        self.register(Relu2(F.relu))
        self.register(Relu2(_clamped))
