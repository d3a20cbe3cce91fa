"""Products of vLLM's quantized layers on CPUs that take their input quantized, and its contract in our own words."""

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.scaled_mm import FP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import PerTensorTorchFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    as_quantized_activation,
    expose_input_quant_key,
    get_input_quant_key,
)
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import PlatformEnum

import quant
from fused_ops import quantize, scaled_linear
from fused_ops.linear import BLOCKS

# What layers may ask for: row-major scales, or the layer's own one.
KEYS: dict[quant_utils.QuantKey, quant.QuantKey] = {
    quant_utils.kInt8DynamicTokenSym: quant.INT8_DYNAMIC_TOKEN,
    quant_utils.kInt8StaticTensorSym: quant.INT8_STATIC_TENSOR,
    quant_utils.kInt8StaticTensorAsym: quant.INT8_STATIC_TENSOR_ASYM,
    quant_utils.kFp8DynamicTokenSym: quant.FP8_DYNAMIC_TOKEN,
    quant_utils.kFp8StaticTensorSym: quant.FP8_STATIC_TENSOR,
    quant_utils.kFp8Dynamic128Sym: quant.FP8_DYNAMIC_GROUP_128,
    quant_utils.kFp8Dynamic64Sym: quant.FP8_DYNAMIC_GROUP_64,
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


def _hide_key(layer: Any) -> None:
    """From producers, where the layer rotates its input first (Hadamard transforms) or takes a rank's part of it."""
    rotates = getattr(layer.quant_method, "input_transform", None) is not None
    if rotates or not getattr(layer, "input_is_parallel", True):
        layer.requires_unquantized_input = True


def _options(key: quant.QuantKey, scale: Any, layer: Any) -> dict[str, Any]:
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

    key: quant_utils.QuantKey | None = None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        if (c.is_static_input_scheme, c.input_symmetric) not in _INT8:
            return False, "takes no zero points by token, for which the contract has no place"
        return super().can_implement(c)

    def input_quant_key(self) -> Any:
        return self.key

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if self.linear_method == self._apply_weights_onednn:
            self.key = _INT8[self.config.is_static_input_scheme, self.config.input_symmetric]
        expose_input_quant_key(layer, self)
        _hide_key(layer)

    def _apply_weights_onednn(self, layer: Any, x: Any, bias: Tensor | None = None) -> Tensor:
        _, _, scale, zero_point, adjustment = self._get_layer_params(layer)
        given = as_quantized_activation(x, self.key)
        if given is None:
            given = quantize(x, **_options(KEYS[self.key], scale, layer))
        data, dtype = given.data, given.orig_dtype
        scales = given.scale if scale is None else scale
        out = torch.empty(data.shape[:-1].numel(), self.dnnl_handler.n, dtype=dtype)
        ops.onednn_scaled_mm(self.dnnl_handler, data.flatten(0, -2), out, scales, zero_point, adjustment, bias)
        return out.view(*data.shape[:-1], -1)


class FusedFp8Kernel(FP8ScaledMMLinearKernel):
    """`scaled_linear` of FP8 codes; where there are AMX tiles vLLM's own products, of plain tensors, come first."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None  # it stands among those of CPUs

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        group = tuple(c.weight_quant_key.scale.group_shape)
        if c.activation_quant_key not in KEYS or c.weight_quant_key.scale.dtype != torch.float32:
            return False, f"takes no activations of {c.activation_quant_key}, or no weights of {c.weight_quant_key}"
        if group not in _WHOLE and group not in _SQUARE:
            return False, f"takes no weights with scales of {group}"
        return True, None

    def input_quant_key(self) -> Any:
        return self.config.activation_quant_key

    def process_weights_after_loading(self, layer: Any) -> None:
        """[N, K], where vLLM turned the weight round, with float32 scales [1], [N, 1] or of blocks."""
        weight, scale = layer.weight, getattr(layer, "weight_scale_inv", None)
        scale = layer.weight_scale if scale is None else scale
        if tuple(self.config.weight_quant_key.scale.group_shape) in _WHOLE:
            weight, scale = weight.t(), scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1)
        layer.weight = torch.nn.Parameter(weight.data.contiguous(), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale.data.float().contiguous(), requires_grad=False)
        _hide_key(layer)

    def apply_weights(self, layer: Any, x: Any, bias: Tensor | None = None) -> Tensor:
        key = self.input_quant_key()
        given = as_quantized_activation(x, key)
        if given is None:
            given = quantize(x, **_options(KEYS[key], layer.input_scale, layer))
        ours = quant.QuantizedActivation(given.data, given.scale, KEYS[key], given.orig_dtype)
        return scaled_linear(ours, layer.weight, layer.weight_scale, bias, out_dtype=given.orig_dtype)

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        raise NotImplementedError("apply_weights does it all")


_WHOLE = ((-1, -1), (1, -1), (-1, 1))  # one scale, or one a row, by either of vLLM's names for that
_SQUARE = tuple((side, side) for side in BLOCKS)


def register(parts: frozenset[str]) -> None:
    if "linear" in parts:
        int8, fp8, blocks = (
            table[PlatformEnum.CPU]
            for table in (
                kernels._POSSIBLE_INT8_KERNELS, kernels._POSSIBLE_FP8_KERNELS, kernels._POSSIBLE_FP8_BLOCK_KERNELS
            )
        )  # fmt: skip
        int8.insert(int8.index(CPUInt8ScaledMMLinearKernel), FusedInt8Kernel)
        fp8.insert(fp8.index(PerTensorTorchFP8ScaledMMLinearKernel), FusedFp8Kernel)
        blocks.append(FusedFp8Kernel)
