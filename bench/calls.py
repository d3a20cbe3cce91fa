"""What a public call costs on a tensor so small that nothing else counts, as a multiple of one `torch.add`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fused_ops
from quant import INT8_DYNAMIC_TOKEN

from .timing import interleaved


def measure(*, budget: float) -> Iterator[dict]:
    """One result for each function, on one row of 576 bfloat16; all are timed in turns."""
    x, residual, weight = torch.randn(3, 1, 576).bfloat16()
    norm = (weight[0], 1e-5)
    contestants = {
        "torch.add": partial(torch.add, x, residual),
        "rms_norm": partial(fused_ops.rms_norm, x, *norm),
        "fused_add_rms_norm": partial(fused_ops.fused_add_rms_norm, x, residual, *norm),
        "rms_norm_quant": partial(fused_ops.rms_norm_quant, x, *norm, INT8_DYNAMIC_TOKEN),
        "fused_add_rms_norm_quant": partial(fused_ops.fused_add_rms_norm_quant, x, residual, *norm, INT8_DYNAMIC_TOKEN),
    }
    timing = interleaved(contestants, budget=budget)
    for name in contestants:
        yield {
            "call": name,
            "microseconds": timing.seconds(name) * 1e6,
            "times_add": timing.ratio(name, "torch.add"),
        }
