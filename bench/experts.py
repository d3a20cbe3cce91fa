"""A block of routed experts, quantized, against transformers' own: `python -m bench.experts` (a minute on two cores).

Sizes are those of Qwen3-30B-A3B's blocks with half the experts: 64 of 2048 -> 768 -> 2048, of which a token goes to 8.
Prints a table, and writes it to `bench/results/cpu-experts-<date>.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import machine
from .table import table
from .timing import interleaved, keep_freed_memory

HERE = Path(__file__).parent
SCHEMES = ("int8_token", "fp8_token", "fp8_block", "mxfp8", "mxfp4")
STOCK = ("eager", "batched_mm", "grouped_mm")  # transformers' ways
TOKENS = (1, 16, 256)
MOST_COPIES = 128  # of an expert's weights, one for each of its rows, that "batched_mm" makes


def model(hidden: int, inner: int, experts: int, top_k: int) -> Any:
    """A layer of Qwen3-MoE in bfloat16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_hidden_layers": 1, "vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes |= {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": experts}
    made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=top_k)).bfloat16()
    return made.requires_grad_(False).eval()


def experts_of(model: Any) -> nn.Module:
    return model.model.layers[0].mlp.experts


def measure(stock: Any, *, budget: float) -> Iterator[dict[str, Any]]:
    """One result for each scheme and number of tokens; rate: gigabytes a second of the weights that are hit."""
    import models_patch
    from quant.methods import quantize_model

    config, top_k = stock.config, stock.config.num_experts_per_tok
    experts = experts_of(stock)
    for scheme in SCHEMES:
        patched = quantize_model(copy.deepcopy(stock), scheme)
        models_patch.patch(patched)  # whose activation quantizes for the second product
        layer = experts_of(patched)
        for tokens in TOKENS:
            x = torch.randn(tokens, config.hidden_size).bfloat16()
            index = torch.rand(tokens, config.num_experts).topk(top_k).indices
            weights = torch.rand(tokens, top_k).bfloat16()
            contestants = {"fused_ops": partial(layer, x, index, weights)}
            ways = [way for way in STOCK if tokens * top_k <= MOST_COPIES or way != "batched_mm"]
            for way in ways:
                contestants[way] = partial(_stock, experts, way, x, index, weights)
            with torch.no_grad():
                timing = interleaved(contestants, budget=budget)
            hit = sum(b.nbytes for b in layer.buffers() if b.ndim > 2) * len(index.unique()) / config.num_experts
            yield {
                "scheme": scheme,
                "tokens": tokens,
                "microseconds": {name: timing.seconds(name) * 1e6 for name in contestants},
                "times_faster": {name: timing.ratio(name, "fused_ops") for name in ways},
                "gigabytes_per_second": hit / timing.seconds("fused_ops") / 1e9,
            }


def _stock(experts: Any, way: str, *args: torch.Tensor) -> torch.Tensor:
    experts.config._experts_implementation = way
    return experts(*args)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=4, default=(2048, 768, 64, 8), help="hidden, inner, experts, k")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each result")
    parser.add_argument("--output", type=Path, help="instead of bench/results/cpu-experts-<date>.json")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    facts = machine.describe("transformers")
    print(machine.sentence(facts), flush=True)
    found = list(measure(model(*options.sizes), budget=options.budget))
    rows = [
        (
            *(r["scheme"], r["tokens"], r["microseconds"]["fused_ops"], r["gigabytes_per_second"]),
            *(r["times_faster"].get(way) for way in STOCK),
        )
        for r in found
    ]
    print(table(("scheme", "tokens", "us", "GB/s of weights", *(f"over {way}" for way in STOCK)), rows, left=1))
    output = options.output or HERE / "results" / f"cpu-experts-{facts['date']}.json"
    output.write_text(json.dumps({**facts, "sizes": options.sizes, "experts": found}, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
