"""vLLM's norms and gated activations as fused operations, which quantize for the linear layer that follows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.config import get_cached_compilation_config
from vllm.model_executor.layers import activation, layernorm
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.platforms.cpu import CpuPlatform

from fused_ops import (
    fused_add_rms_norm,
    fused_add_rms_norm_quant,
    gelu_tanh_mul_quant,
    rms_norm,
    rms_norm_quant,
    silu_mul_quant,
)
from fused_ops._check import FLOATS

from .linear import KEYS, as_vllms, input_quant

PROVIDER = "fused_ops"
NAMES = ("rms_norm", "fused_add_rms_norm")  # of its IR


class Fused:
    """One of vLLM's custom ops whose work `fused` does, in eager mode and in compiled graphs.

    feeds: (module, name of the linear layer in it) that alone takes the result, and gets it as its `input_quant_key`
    says. By name, since LoRA puts a layer of its own there.
    """

    feeds: tuple[torch.nn.Module, str] | None = None
    is_fused = False
    name: str
    _forward_method: Callable

    def take_over(self) -> None:
        """Unless the user has switched this op off, as in custom_ops=["-rms_norm"]."""
        if f"-{self.name}" not in get_cached_compilation_config().custom_ops:
            self._forward_method, self.is_fused = self.fused, True

    def fused(self, *args: Any) -> Any:
        raise NotImplementedError

    @property
    def consumer(self) -> Any:
        """The layer that `feeds` names, or None."""
        return None if self.feeds is None else getattr(*self.feeds)


class FusedRMSNorm(Fused, layernorm.RMSNorm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.variance_size_override is None:
            self.take_over()

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Any:
        weight = self.weight.data if self.has_weight else None
        options, key = input_quant(self.consumer)
        options["round_before_weight"] = _rounds(x, weight)
        if residual is None:
            return as_vllms(rms_norm_quant(x, weight, self.variance_epsilon, **options), key)
        y, residual = fused_add_rms_norm_quant(x, residual, weight, self.variance_epsilon, **options)
        return as_vllms(y, key), residual


class FusedSiluAndMul(Fused, activation.SiluAndMul):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.take_over()

    def fused(self, x: Tensor) -> Any:
        return _gated(silu_mul_quant, x, self.consumer)


class FusedGeluAndMul(Fused, activation.GeluAndMul):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.approximate == "tanh":
            self.take_over()

    def fused(self, x: Tensor) -> Any:
        return _gated(gelu_tanh_mul_quant, x, self.consumer)


def _gated(operation: Callable, x: Tensor, linear: Any) -> Any:
    """Of gates and ups side by side, rounded between as in eager code, for the layer that takes the result."""
    options, key = input_quant(linear)
    gate, up = x.chunk(2, -1)
    return as_vllms(operation(gate, up, round_activation=True, **options), key)


def _rounds(x: Tensor, weight: Tensor | None) -> bool:
    """Whether vLLM's norm rounds before the weight, as Hugging Face's Llama; Gemma's has a float32 weight."""
    return weight is not None and weight.dtype == x.dtype


# --- what vLLM looks up ---


def register(parts: frozenset[str]) -> None:
    if "norm" in parts:
        _replace(layernorm.RMSNorm, FusedRMSNorm)
        _provide()
    if "activation" in parts:
        _replace(activation.SiluAndMul, FusedSiluAndMul)
        _replace(activation.GeluAndMul, FusedGeluAndMul)
        for key in KEYS:
            fused_act_quant._FUSED_ACT_QUANT[FusedSiluAndMul, key] = partial(_gated, silu_mul_quant)
            fused_act_quant._FUSED_ACT_QUANT_SUPPORT[FusedSiluAndMul, key] = lambda act, x, linear: act.is_fused


def _replace(stock: Any, fused: Any) -> None:
    name = stock.name  # that users switch it by; registering gives it the class's
    stock.register_oot(fused)
    fused.name = name


def _provide() -> None:
    """The norms of vLLM's IR, which Gemma's layers and others call, ahead of its own."""
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_serves)(_ir_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_serves_add)(_ir_fused_add_rms_norm)
    stock = CpuPlatform.get_default_ir_op_priority

    def priority(cls: type, vllm_config: Any) -> Any:
        default = stock(vllm_config)
        for name in NAMES:
            setattr(default, name, [PROVIDER, *getattr(default, name)])
        return default

    CpuPlatform.get_default_ir_op_priority = classmethod(priority)


def _serves(x, weight, epsilon, variance_size=None) -> bool:
    weights = (None, x.dtype, torch.float32)
    return variance_size is None and x.dtype in FLOATS and (None if weight is None else weight.dtype) in weights


def _serves_add(x, x_residual, weight, epsilon, variance_size=None) -> bool:
    return x_residual.dtype == x.dtype and _serves(x, weight, epsilon, variance_size)


def _ir_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return rms_norm(x, weight, epsilon, round_before_weight=_rounds(x, weight))


def _ir_fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return fused_add_rms_norm(x, x_residual, weight, epsilon, round_before_weight=_rounds(x, weight))
