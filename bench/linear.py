"""`scaled_linear` against torch's linear layer on the same, decoded, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

import fused_ops
from fused_ops.linear import decode_weight, linear_inputs, usual_weight
from quant import QuantKey

from .timing import interleaved

COPIES = 4  # weights in turn, as in a model: none stays in the last-level cache until it comes again


def measure(key: QuantKey, rows: list[int], size: int, *, budget: float) -> Iterator[dict]:
    """One result for each number of rows, with square weights of `size`."""
    for count in rows:
        activation, weight, weight_scale, scale2 = linear_inputs(count, size, size, key, "cpu")
        decoded = decode_weight(weight, weight_scale, usual_weight(key), scale2)

        def quantized(w: Tensor, activation=activation, weight_scale=weight_scale, scale2=scale2) -> Tensor:
            return fused_ops.scaled_linear(activation, w, weight_scale, out_dtype=torch.bfloat16, weight_scale2=scale2)

        contestants = {"fused_ops": _in_turn(quantized, weight)}
        for name, dtype in ("bfloat16 linear", torch.bfloat16), ("float32 linear", torch.float32):
            x = activation.dequantize(dtype)
            contestants[name] = _in_turn(lambda w, x=x: linear(x, w), decoded.to(dtype))
        timing = interleaved(contestants, budget=budget)
        yield {
            "op": "scaled_linear",
            "key": str(key),
            "tokens": count,
            "cols": size,
            "dtype": "bfloat16",
            "microseconds": {name: timing.seconds(name) * 1e6 for name in contestants},
            "times_faster": {n: timing.ratio(n, "fused_ops") for n in contestants if n != "fused_ops"},
        }


def _in_turn(product: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[], Tensor]:
    weights = cycle([weight, *(weight.clone() for _ in range(COPIES - 1))])
    return lambda: product(next(weights))
