"""The C++ backend: loads the compiled library, and knows what its kernels serve."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
)

from ._op import OPS, Backend, use_backend

KEYS = (FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, INT8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN)
_CODES = {key.code for key in KEYS}


def load() -> None:
    """Load the compiled kernels, if they were built, and make `cpu` a backend of the operations they serve."""
    library = next(Path(__file__).parent.glob("_C.*so"), None)
    if library is None:
        warnings.warn(
            "fused_ops: no compiled kernels found (a C++ compiler was missing at installation): "
            "operations run on the reference backend, correct but slow",
            stacklevel=3,
        )
    else:
        torch.ops.load_library(str(library))
    for op in OPS.values():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op.name}", "CPU"):
            op.backend(Backend("cpu", None, ("CPU",), _supports(op)))
    if name := os.environ.get("FUSED_OPS_BACKEND"):
        use_backend(name).__enter__()


def _supports(op):
    key = op.argument("key")
    return lambda *args: args[0].device.type == "cpu" and (key is None or args[key] in _CODES)
