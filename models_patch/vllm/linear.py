"""vLLM's INT8 product on CPUs, which takes its input quantized; and its contract, in this package's words."""

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    as_quantized_activation,
    expose_input_quant_key,
    get_input_quant_key,
)
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import PlatformEnum

import quant
from fused_ops import quantize

# What layers may ask for: scales row by row, or the layer's own one, in the layout that both sides mean.
KEYS: dict[quant_utils.QuantKey, quant.QuantKey] = {
    quant_utils.kInt8DynamicTokenSym: quant.INT8_DYNAMIC_TOKEN,
    quant_utils.kInt8StaticTensorSym: quant.INT8_STATIC_TENSOR,
    quant_utils.kInt8StaticTensorAsym: quant.INT8_STATIC_TENSOR_ASYM,
    quant_utils.kFp8DynamicTokenSym: quant.FP8_DYNAMIC_TOKEN,
    quant_utils.kFp8StaticTensorSym: quant.FP8_STATIC_TENSOR,
}
_INT8 = {  # (static, symmetric)
    (False, True): quant_utils.kInt8DynamicTokenSym,
    (True, True): quant_utils.kInt8StaticTensorSym,
    (True, False): quant_utils.kInt8StaticTensorAsym,
}


def input_quant(linear: Any) -> tuple[dict[str, Any], Any]:
    """(what a producer needs, by the names of operations; vLLM's key): of a layer of vLLM, or None."""
    key = None if linear is None else get_input_quant_key(linear)
    ours = KEYS.get(key)
    if ours is None:
        return {"quant_key": None}, None
    return _options(ours, linear.input_scale if ours.scale.static else None, linear), key


def _options(key: quant.QuantKey, scale: Tensor | None, layer: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"quant_key": key}
    if key.scale.static:
        options["scale"] = scale.view(1)
    if not key.symmetric:
        options["zero_point"] = layer.input_zero_point.view(1)
    return options


def as_vllms(y: Any, key: Any) -> Any:
    """The same in vLLM's type, where it is quantized."""
    if not isinstance(y, quant.QuantizedActivation):
        return y
    return QuantizedActivation(
        data=y.data, scale=y.scale, orig_dtype=y.orig_dtype, orig_shape=y.data.shape, quant_key=key
    )


class FusedInt8Kernel(CPUInt8ScaledMMLinearKernel):
    """oneDNN's product as vLLM calls it, of what a norm, an activation or attention has quantized, or `quantize` does.

    Where vLLM has a product for AMX tiles it takes plain tensors, and no key is shown.
    """

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        if (c.is_static_input_scheme, c.input_symmetric) not in _INT8:
            return False, "takes no zero points by token, for which the contract has no place"
        return super().can_implement(c)

    def input_quant_key(self) -> Any:
        if self.linear_method != self._apply_weights_onednn:
            return None
        return _INT8[self.config.is_static_input_scheme, self.config.input_symmetric]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        expose_input_quant_key(layer, self)

    def _apply_weights_onednn(self, layer: Any, x: Any, bias: Tensor | None = None) -> Tensor:
        _, _, scale, zero_point, adjustment = self._get_layer_params(layer)
        key = self.input_quant_key()
        given = as_quantized_activation(x, key)
        if given is None:
            given = quantize(x, **_options(KEYS[key], scale, layer))
        data, dtype = given.data, given.orig_dtype
        scales = given.scale if scale is None else scale
        out = torch.empty(data.shape[:-1].numel(), self.dnnl_handler.n, dtype=dtype)
        ops.onednn_scaled_mm(self.dnnl_handler, data.flatten(0, -2), out, scales, zero_point, adjustment, bias)
        return out.view(*data.shape[:-1], -1)


def register(parts: frozenset[str]) -> None:
    if "linear" in parts:
        possible = kernels._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
        possible.insert(possible.index(CPUInt8ScaledMMLinearKernel), FusedInt8Kernel)
