"""A plug-in for vLLM on CPUs: its layers call fused operations. See docs/vllm.md.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`, before it builds a model.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

VERSIONS = ((0, 32), (0, 33))
PARTS = ("norm", "activation", "linear", "attention")
SWITCH = "FUSED_OPS_VLLM"  # the parts that are wanted, by name; all of them where it isn't set

# What is replaced or called, and its parameters. Where one of them is another, nothing is replaced.
_LAYERS = "vllm.model_executor.layers"
_KERNELS = "vllm.model_executor.kernels.linear.scaled_mm"
_INT8 = f"{_KERNELS}.cpu:CPUInt8ScaledMMLinearKernel"
_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
CONTRACTS = {
    "vllm.ir.ops.layernorm:rms_norm._py_signature": "x weight epsilon variance_size",
    "vllm.ir.ops.layernorm:fused_add_rms_norm._py_signature": "x x_residual weight epsilon variance_size",
    "vllm.platforms.cpu:CpuPlatform.get_default_ir_op_priority": "vllm_config",
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": "self load_dummy_weights",
    f"{_LAYERS}.layernorm:RMSNorm.forward_native": "self x residual",
    f"{_LAYERS}.activation:SiluAndMul.forward_native": "x",
    f"{_LAYERS}.activation:GeluAndMul.forward_native": "self x",
    f"{_LAYERS}.fusion.quant_activation:get_input_quant_key": "layer",
    f"{_LAYERS}.fusion.quant_activation:as_quantized_activation": "x expected_key",
    f"{_LAYERS}.fusion.quant_activation:expose_input_quant_key": "layer kernel",
    f"{_LAYERS}.fusion.quant_activation:QuantizedActivation": "data scale orig_dtype orig_shape quant_key",
    f"{_LAYERS}.fusion.fused_act_quant:maybe_fused_act_quant": "act_fn x linear",
    f"{_INT8}._apply_weights_onednn": "self layer x bias",
    f"{_INT8}.process_weights_after_loading": "self layer",
    f"{_KERNELS}:FP8ScaledMMLinearKernel": "c layer_param_names",
    f"{_KERNELS}:FP8ScaledMMLinearKernel.apply_weights": "self layer x bias",
    "vllm._custom_ops:onednn_scaled_mm": "dnnl_handler x output input_scale input_zp input_zp_adj bias",
    f"{_LAYERS}.attention.attention:get_attention_context": "layer_name",
    f"{_LAYERS}.rotary_embedding.base:RotaryEmbedding.forward_native": "self positions query key",
    f"{_ATTENTION}:CPUAttentionBackendImpl.do_kv_cache_update": "self layer key value kv_cache slot_mapping",
    f"{_ATTENTION}:CPUAttentionMetadata": (
        "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens block_table slot_mapping "
        "scheduler_metadata causal dynamic_causal use_sdpa_prefill num_decode_tokens sdpa_attn_masks sdpa_start_loc "
        "encoder_cache"
    ),
    "vllm.model_executor.custom_op:CustomOp.register_oot": "_decorated_op_cls name",
    "vllm.config:get_cached_compilation_config": "",
}
_LISTS = "vllm.model_executor.kernels.linear:_POSSIBLE"
LISTS = {  # of kernels, by platform, and which of a CPU's ours come before or after
    f"{_LISTS}_INT8_KERNELS": "CPUInt8ScaledMMLinearKernel",
    f"{_LISTS}_FP8_KERNELS": "PerTensorTorchFP8ScaledMMLinearKernel",
    f"{_LISTS}_FP8_BLOCK_KERNELS": "CPUFp8BlockScaledMMKernel",
}
LAYOUTS = f"{_ATTENTION}:CPUAttentionBackend.supported_kv_cache_layouts"
LAYOUT = "LBHNC"  # which `attention` reads blocks as

_registered = False


def register() -> None:
    """Let the vLLM of this process build its layers with fused operations; called again it does nothing.

    What was replaced in a model is logged once it is loaded. Where vLLM is of another version than `VERSIONS`, doesn't
    run on a CPU, or one of `CONTRACTS` isn't met, that is logged and nothing is changed; the same where this package
    was installed without its kernels.

    Raises:
        ValueError: the environment's FUSED_OPS_VLLM names something else than `PARTS`.
    """
    global _registered
    if _registered:
        return
    parts = wanted(os.environ.get(SWITCH))
    if not parts:
        return
    from vllm.logger import init_logger

    if (problem := refusal()) is not None:
        init_logger("vllm.fused_ops").warning("fused_ops: %s; nothing is changed", problem)
        return
    _registered = True
    keep_apart(parts)
    for module in ("layers", "linear", "attention", "loading"):
        importlib.import_module(f"{__name__}.{module}").register(parts)


def keep_apart(parts: frozenset[str]) -> None:
    """Make the parts a factor of the key that vLLM keeps compiled graphs by: other parts make other graphs."""
    from vllm import envs

    envs.environment_variables[SWITCH] = lambda: sorted(parts)


def wanted(names: str | None) -> frozenset[str]:
    """The parts that a value of FUSED_OPS_VLLM names; None: all of them.

    Raises ValueError for others.
    """
    parts = frozenset(PARTS if names is None else filter(None, map(str.strip, names.split(","))))
    if unknown := sorted(parts - set(PARTS)):
        raise ValueError(f"{SWITCH} names {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    return parts


def refusal() -> str | None:
    """Why this vLLM is left as it is; None where it isn't."""
    import vllm
    from vllm.platforms import PlatformEnum, current_platform

    import fused_ops

    if tuple(vllm.__version_tuple__[:2]) not in VERSIONS:
        known = " and ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        return f"vLLM is {vllm.__version__}, this plug-in is written for {known}"
    if not current_platform.is_cpu():
        return f"vLLM runs on {current_platform.device_name}, this plug-in serves CPUs"
    if "cpu" not in fused_ops.OPS["rms_norm"].backends:
        return "the compiled kernels are missing, and the reference backend would be slower than vLLM"
    for place, expected in CONTRACTS.items():
        if (found := parameters(place)) != expected:
            return f"{_dotted(place)} takes ({found}), expected ({expected})"
    for place, expected in LISTS.items():
        names = [kernel.__name__ for kernel in (_found(place) or {}).get(PlatformEnum.CPU, ())]
        if expected not in names:
            return f"{_dotted(place)} has {', '.join(names) or 'nothing'} for CPUs, expected {expected} among them"
    layouts = [layout.name for layout in (_found(LAYOUTS) or tuple)()]
    if layouts != [LAYOUT]:
        return f"caches are {' or '.join(layouts) or 'of no known layout'}, expected {LAYOUT}"
    return None


def parameters(place: str) -> str | None:
    """The names of the parameters of what stands at "module:name.name"; None where nothing does."""
    found = _found(place)
    if found is None:
        return None
    signature = found if isinstance(found, inspect.Signature) else inspect.signature(found)
    return " ".join(signature.parameters)


def _found(place: str) -> Any:
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


def _dotted(place: str) -> str:
    return place.replace(":", ".")
