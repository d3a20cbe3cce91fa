"""What a public call costs on a tensor so small that nothing else counts, as a multiple of one `torch.add`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fused_ops
from quant import INT8_DYNAMIC_TOKEN

from .timing import interleaved


def measure(*, budget: float) -> Iterator[dict]:
    """One result for each function, on one row of 576 bfloat16; all are timed in turns."""
    x, r, w = torch.randn(3, 1, 576).bfloat16()
    w, key = w[0], INT8_DYNAMIC_TOKEN
    contestants = {
        "torch.add": lambda: torch.add(x, r),
        "rms_norm": lambda: fused_ops.rms_norm(x, w, 1e-5),
        "fused_add_rms_norm": lambda: fused_ops.fused_add_rms_norm(x, r, w, 1e-5),
        "rms_norm_quant": lambda: fused_ops.rms_norm_quant(x, w, 1e-5, key),
        "fused_add_rms_norm_quant": lambda: fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-5, key),
    }
    with torch.no_grad():
        timing = interleaved(contestants, budget=budget)
    for name in contestants:
        yield {
            "call": name,
            "microseconds": timing.seconds(name) * 1e6,
            "times_add": timing.ratio(name, "torch.add"),
        }
