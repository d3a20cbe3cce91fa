"""`scaled_linear` against torch's linear layer: on a CPU on the same, decoded, values, on a GPU on any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

import fused_ops
from fused_ops.linear import decode_weight, linear_inputs, usual_weight
from quant import QuantKey
from quant.methods import SCHEMES, quantize_model

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


def layers(scheme: str, tokens: int, size: int, device: str) -> dict[str, list[Callable[[], Tensor]]]:
    """The product of a scheme's layer as its device has it, without and with quantizing, and bfloat16's."""

    def stock() -> torch.nn.Linear:
        return torch.nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16)

    x = torch.randn(tokens, size, device=device).bfloat16()
    batches = [x] if SCHEMES[scheme].calibrated else None
    made = [quantize_model(torch.nn.Sequential(stock()), scheme, batches)[0] for _ in range(COPIES)]
    activation = fused_ops.quantize(x, **made[0].input_quant())
    return {
        "product": [partial(layer, activation) for layer in made],
        "quantize + product": [partial(layer, x) for layer in made],
        "bfloat16 linear": [partial(linear, x, stock().weight) for _ in range(COPIES)],
    }
