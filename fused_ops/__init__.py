"""Fused operations for LLM inference. See `quant` for the tensors they make, `quant.methods` for who takes them."""

from ._cpu import load as _load
from ._op import OPS, use_backend
from .activation import silu_mul, silu_mul_quant
from .linear import scaled_linear
from .norm import fused_add_rms_norm, fused_add_rms_norm_quant, rms_norm, rms_norm_quant
from .quantize import quantize
from .rope import rope

_load()

__all__ = [
    "OPS",
    "fused_add_rms_norm",
    "fused_add_rms_norm_quant",
    "quantize",
    "rms_norm",
    "rms_norm_quant",
    "rope",
    "scaled_linear",
    "silu_mul",
    "silu_mul_quant",
    "use_backend",
]
