"""From an operation's arguments to its pipelines: what csrc's norm.cpp, activation.cpp and dual_norm.cpp are in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._op import NO_KEY
from .launch import Pipeline
from .launch import run as run_pipeline


def rms_norm(x: Tensor, weight, eps, flags) -> Pipeline:
    return Pipeline(x, norm="rms", weight=weight, eps=eps, flags=flags)


def layer_norm(x: Tensor, weight, bias, eps) -> Pipeline:
    return Pipeline(x, norm="layer", weight=weight, bias=bias, eps=eps)


def fused_add_rms_norm(x: Tensor, residual, weight, eps, flags, x_multiplier=1.0) -> Pipeline:
    p = rms_norm(x, weight, eps, flags)
    p.load, p.other, p.x_multiplier = "add", residual, x_multiplier
    return p


def fused_add_rms_norm_pad(x: Tensor, residual, weight, eps, flags, multiple) -> Pipeline:
    return fused_add_rms_norm(x, residual, weight, eps, flags)  # the output's width says the rest


def rms_norm_add(x: Tensor, residual, weight, eps, flags) -> Pipeline:
    return Pipeline(x, other=residual, post_weight=weight, post_eps=eps, flags=flags)


def rms_norm_add_rms_norm(x: Tensor, residual, post_weight, weight, post_eps, eps, flags) -> Pipeline:
    p = rms_norm(x, weight, eps, flags)
    p.other, p.post_weight, p.post_eps = residual, post_weight, post_eps
    return p


def silu_mul(gate: Tensor, up, round_activation, tokens_per_expert=None) -> Pipeline:
    return Pipeline(gate, "silu", up, round_activation=round_activation, tokens_per_expert=tokens_per_expert)


def gelu_tanh_mul(gate: Tensor, up, round_activation, tokens_per_expert=None) -> Pipeline:
    return Pipeline(gate, "gelu_tanh", up, round_activation=round_activation, tokens_per_expert=tokens_per_expert)


def swiglu_oai_mul(gate: Tensor, up, alpha, limit, round_activation, tokens_per_expert=None) -> Pipeline:
    p = Pipeline(gate, "swiglu_oai", up, round_activation=round_activation, tokens_per_expert=tokens_per_expert)
    p.alpha, p.limit = alpha, limit
    return p


def relu2(x: Tensor, tokens_per_expert=None) -> Pipeline:
    return Pipeline(x, "relu2", tokens_per_expert=tokens_per_expert)


ROW_OPERATIONS: dict[str, Callable[..., Pipeline]] = {
    make.__name__: make
    for make in (
        *(rms_norm, layer_norm, fused_add_rms_norm, fused_add_rms_norm_pad, rms_norm_add, rms_norm_add_rms_norm),
        *(silu_mul, gelu_tanh_mul, swiglu_oai_mul, relu2),
    )
}


def row_operation(name: str, required: int) -> Callable[[tuple, dict[str, Any]], None]:
    """What runs a row operation, or its `..._quant`, of which so many inputs come before the key."""
    make = Pipeline if name == "quantize" else ROW_OPERATIONS[name.removesuffix("_quant")]

    def run(args: tuple, outs: dict[str, Any]) -> None:
        if name in ROW_OPERATIONS:
            p = make(*args)
        else:
            code, given, *rest = args[required:]
            p = make(*args[:required], *rest[1:])
            set_key(p, code, given, *rest[:1])
        set_outputs(p, outs)
        run_pipeline(p)

    return run


def set_key(p: Pipeline, code: int, given: Tensor | None, zero_point: Tensor | None = None) -> None:
    p.key, p.given, p.given_zero = code, given, zero_point


def set_outputs(p: Pipeline, outs: dict[str, Any]) -> None:
    p.y = outs.get("y", outs.get("unquantized"))
    p.data, p.scale, p.zero_point, p.residual = map(outs.get, ("data", "scale", "zero_point", "residual"))


def dual_rms_norm(args: tuple, outs: dict[str, Any]) -> None:
    """Both norms, one after the other."""
    q, kv, q_weight, kv_weight, q_eps, kv_eps, flags, q_key, kv_key, q_given, kv_given, *zeros = args
    q_zero, kv_zero, *_ = *zeros, None, None  # PyTorch leaves trailing defaults out
    for name, x, weight, eps, key, given, zero in (
        ("q", q, q_weight, q_eps, q_key, q_given, q_zero),
        ("kv", kv, kv_weight, kv_eps, kv_key, kv_given, kv_zero),
    ):
        p = rms_norm(x, weight, eps, flags)
        parts = {part: outs.get(f"{name}_{part}") for part in ("scale", "zero_point", "unquantized")}
        if key == NO_KEY:
            p.y = outs.get(name)
        else:
            set_key(p, key, given, zero)
            set_outputs(p, parts | {"data": outs.get(name)})
        run_pipeline(p)
