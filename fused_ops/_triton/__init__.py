"""The Triton backend: row operations and rope, on NVIDIA and AMD GPUs.

Importing this doesn't import Triton; the first call does.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from torch.library import Library

from quant import QuantKey

from .._op import OPS, Backend, Op, kernels_of

MAX_COLS = 65536  # of a row: its elements stay in the registers of one block
LIMITS = f"rows of up to {MAX_COLS} columns, and asymmetric keys that are static or by token or group"
ELSEWHERE = (
    "scaled_linear",
    "qk_norm_rope",
    "rope_kv_cache_write",
    "qk_norm_rope_kv_cache_write",
    "mla_rope_kv_cache_concat",
)
_defaults: list[Library] = []


def load() -> None:
    """Make `triton` a backend of the operations it serves, and PyTorch's own choice where there are no CUDA kernels."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = ("CPU", "CUDA") if interpreted else ("CUDA",)
    for op in OPS.values():
        if op.name not in ELSEWHERE:
            op.backend(Backend("triton", _runs(op), devices, _supports(op), LIMITS, missing))
    if missing() is None and not interpreted and (torch.version.hip or torch.version.cuda):
        _defaults.append(Library("fused_ops", "IMPL"))
        for op in OPS.values():
            served = torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op.name}", "CUDA")
            if "triton" in op.backends and not served:
                for overload, kernel in kernels_of(op, op.backends["triton"]):
                    _defaults[0].impl(overload, kernel, "CUDA")


def missing() -> str | None:
    """What must be installed for this backend."""
    found = importlib.util.find_spec("triton")
    return None if found else "the triton backend needs Triton: pip install 'triton>=3.6'"


def _runs(op: Op) -> Callable:
    @cache
    def implementation() -> Callable:
        from . import operations

        if op.name == "rope":
            from .rope import rope

            return rope
        if op.name == "dual_rms_norm":
            return operations.dual_rms_norm
        return operations.row_operation(op.name, op.argument("key") or op.required)

    return lambda args, outs: implementation()(args, outs)


def _supports(op: Op) -> Callable[..., bool]:
    rows = [i for i, name in enumerate(op.arguments) if name in ("x", "gate", "q", "kv")]
    halves = op.argument("up")

    def supports(*args) -> bool:
        interleaved = halves is not None and args[halves] is None
        short = all(args[i].shape[-1] <= MAX_COLS * (1 + interleaved) for i in rows)
        return short and all(map(serves, op.keys(args)))

    return supports


@cache
def serves(code: int) -> bool:
    """Whether the kernels quantize to this key."""
    key = QuantKey.from_code(code)
    whole_bytes = key.packing == 1 or key.scale.group_shape.cols % key.packing == 0
    return whole_bytes and (key.symmetric or key.scale.static or not key.per_tensor)
