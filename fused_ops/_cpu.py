"""The C++ backend: loads the compiled library, and knows what its kernels serve."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from quant import QuantKey

from ._op import OPS, Backend, Op

LIMITS = "keys in groups of 16 or multiples of 32 columns; dynamic asymmetric ones by token or group"


def load() -> None:
    """Load the compiled kernels, if they were built, and make `cpu` a backend of the operations they serve."""
    library = library_path()
    if library is None:
        warnings.warn(
            "fused_ops: no compiled kernels found (a C++ compiler was missing at installation): "
            "operations run on the reference backend, correct but slow",
            stacklevel=3,
        )
    else:
        torch.ops.load_library(str(library))
        _check_complete(library)
    for op in OPS.values():
        if _has_kernel(op):
            op.backend(Backend("cpu", None, ("CPU",), _supports(op), LIMITS))


def _has_kernel(op: Op) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op.name}", "CPU")


def _check_complete(library: Path) -> None:
    """Raise ImportError unless the library has every operation: an older build would leave some to the reference."""
    absent = [op.name for op in OPS.values() if not _has_kernel(op)]
    if absent:
        raise ImportError(
            f"fused_ops: {library} was built from other sources, it has no {', '.join(absent)}; build it again: "
            "`make build` in a checkout, else `pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


def library_path() -> Path | None:
    """The compiled kernels, if they were built."""
    return next(Path(__file__).parent.glob("_C.*so"), None)


def serves(code: int) -> bool:
    """Whether the row kernels quantize to this key; `set_key` in csrc/scales.cpp says the same."""
    key = QuantKey.from_code(code)
    group = key.scale.group_shape.cols
    return (
        (group == -1 or group == 16 or group % 32 == 0)
        and (key.scale.dtype == torch.float32 or group > 0)
        and (key.symmetric or key.scale.static or not key.per_tensor)
    )


def _supports(op: Op):
    return lambda *args: args[0].device.type == "cpu" and all(map(serves, op.keys(args)))
