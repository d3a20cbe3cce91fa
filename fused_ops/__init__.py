"""Fused operations for LLM inference. See `quant` for the tensors they make, `quant.methods` for who takes them."""

import os as _os

from . import attention_inputs as _attention_inputs  # noqa: F401  declares them
from . import collective_inputs as _collective_inputs  # noqa: F401
from . import heads_inputs as _heads_inputs  # noqa: F401
from ._cpu import load as _load_cpu
from ._cuda import load as _load_cuda
from ._cuda import warmup
from ._flashinfer import load as _load_flashinfer
from ._op import OPS, use_backend
from ._triton import load as _load_triton
from .activation import (
    gelu_tanh_mul,
    gelu_tanh_mul_quant,
    relu2,
    relu2_quant,
    silu_mul,
    silu_mul_quant,
    swiglu_oai_mul,
    swiglu_oai_mul_quant,
)
from .attention import OutputOptions, paged_attention
from .collective import (
    all_reduce,
    all_reduce_fused_add_rms_norm_quant,
    all_reduce_rms_norm_quant,
    qk_all_reduce_rms_norm,
)
from .dual_norm import dual_rms_norm
from .experts import sort_by_expert, sum_experts
from .gather import all_gather, all_gather_quantized
from .grouped_linear import grouped_scaled_linear
from .kv_cache import qk_norm_rope_kv_cache_write, rope_kv_cache_write
from .linear import scaled_linear
from .linear_gpu import load as _load_linear_gpu
from .mla import mla_attention, mla_rope_kv_cache_concat
from .norm import (
    fused_add_rms_norm,
    fused_add_rms_norm_pad,
    fused_add_rms_norm_quant,
    layer_norm,
    layer_norm_quant,
    rms_norm,
    rms_norm_quant,
)
from .post_norm import rms_norm_add, rms_norm_add_rms_norm_quant
from .quantize import QuantOptions, quantize
from .rope import RotaryOptions, qk_norm_rope, rope
from .sequence_parallel import (
    all_gather_matmul,
    matmul_reduce_scatter,
    reduce_scatter,
    reduce_scatter_fused_add_rms_norm_quant,
    reduce_scatter_rms_norm_quant,
)
from .workspace import AllReduceWorkspace

_load_cpu()
_load_cuda()
_load_linear_gpu()
_load_triton()  # after CUDA: what that serves stays with it
_load_flashinfer()
if _name := _os.environ.get("FUSED_OPS_BACKEND"):
    use_backend(_name, "FUSED_OPS_BACKEND").__enter__()

__all__ = [
    "OPS",
    "AllReduceWorkspace",
    "OutputOptions",
    "QuantOptions",
    "RotaryOptions",
    "all_gather",
    "all_gather_matmul",
    "all_gather_quantized",
    "all_reduce",
    "all_reduce_fused_add_rms_norm_quant",
    "all_reduce_rms_norm_quant",
    "dual_rms_norm",
    "fused_add_rms_norm",
    "fused_add_rms_norm_pad",
    "fused_add_rms_norm_quant",
    "gelu_tanh_mul",
    "gelu_tanh_mul_quant",
    "grouped_scaled_linear",
    "layer_norm",
    "layer_norm_quant",
    "matmul_reduce_scatter",
    "mla_attention",
    "mla_rope_kv_cache_concat",
    "paged_attention",
    "qk_all_reduce_rms_norm",
    "qk_norm_rope",
    "qk_norm_rope_kv_cache_write",
    "quantize",
    "reduce_scatter",
    "reduce_scatter_fused_add_rms_norm_quant",
    "reduce_scatter_rms_norm_quant",
    "relu2",
    "relu2_quant",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm_quant",
    "rms_norm_quant",
    "rope",
    "rope_kv_cache_write",
    "scaled_linear",
    "silu_mul",
    "silu_mul_quant",
    "sort_by_expert",
    "sum_experts",
    "swiglu_oai_mul",
    "swiglu_oai_mul_quant",
    "use_backend",
    "warmup",
]
