"""Does the real model give the perplexity of its scheme? `python -m bench.emulate` (about five minutes).

Each scheme's model, quantized, patched and in bfloat16, is compared with a float64 emulation of the scheme: weights are
decoded exactly from a layer's codes and scales; what reaches a layer is quantized by `quant.formats`, the reference,
and decoded exactly; everything else is float64 (but for norms and rotary tables, which transformers computes in
float32). Nothing is rounded to bfloat16: a scheme doesn't ask for that, the real model's memory does.

The last bit of a value near the boundary of two codes decides between them, and each code changes those after it. So
any two computations of one scheme have rounding errors of their own, and the perplexities of one text differ by a
percent or two for no other reason. Hence several texts, and the standard error of the mean over their tokens.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import models_patch
from fused_ops.linear import exact_values
from quant import formats
from quant.methods import SCHEMES, QuantLinear, quantize_model

from . import machine, models
from .table import table

TEXTS = ("objects", "import", "customization", "debugger", "formatstrings", "assignment", "comparisons", "calls")
BOUND = 0.003  # of the emulation's perplexity


class EmulatedLinear(nn.Module):
    """A `QuantLinear` in float64."""

    def __init__(self, layer: QuantLinear):
        super().__init__()
        weight_key, scale2 = layer.method.scheme.weight_key, layer._buffers.get("weight_scale2")
        self.weight = exact_values(layer.weight, layer.weight_scale, weight_key, scale2)
        self.bias = None if layer.bias is None else layer.bias.double()
        self.input_quant = layer.input_quant()

    def forward(self, x: Tensor) -> Tensor:
        key, given = self.input_quant["quant_key"], {n: self.input_quant[n] for n in ("scale", "scale2", "zero_point")}
        data, scale, zero_point = formats.quantize(x.float(), key, **given)
        return linear(exact_values(data, scale, key, given["scale2"], zero_point), self.weight, self.bias)


def emulate(model: nn.Module) -> nn.Module:
    """A float64 copy of a quantized model that isn't patched."""
    emulated = copy.deepcopy(model).double()
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            parent, _, name = path.rpartition(".")
            setattr(emulated.get_submodule(parent), name, EmulatedLinear(layer))
    return emulated


def compare(scheme: str, texts: list[Tensor], calibration: list[Tensor]) -> dict[str, float]:
    """Perplexities over all texts, their relative difference, and its standard error."""
    model, _ = models.load()
    quantize_model(model, scheme, calibration if SCHEMES[scheme].calibrated else None)
    expected = torch.cat([models.losses(emulated, ids) for emulated in [emulate(model)] for ids in texts])
    models_patch.patch(model)
    actual = torch.cat([models.losses(model, ids) for ids in texts])
    change = actual - expected
    return {
        "emulated": expected.mean().exp().item(),
        "real": actual.mean().exp().item(),
        "difference": change.mean().expm1().item(),
        "error": change.std().item() / len(change) ** 0.5,
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(prog="python -m bench.emulate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "schemes", nargs="*", default=list(SCHEMES), help=f"some of {', '.join(SCHEMES)} (default: all)"
    )
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="how many, of a thousand tokens each")
    options = parser.parse_args(arguments)
    print(machine.sentence(machine.describe("transformers")))
    _, tokenizer = models.load()
    texts = [models.tokens(tokenizer, topic) for topic in TEXTS[: options.texts]]
    found = {}
    for scheme in options.schemes:
        print(f"{scheme}: ", end="", flush=True)
        found[scheme] = compare(scheme, texts, [models.tokens(tokenizer, models.CALIBRATION)])
        print(f"{100 * found[scheme]['difference']:+.2f} % from the emulation", flush=True)
    print(f"\n{sum(ids.numel() for ids in texts)} tokens; the bound is {100 * BOUND} %\n{summary(found)}")
    return found


def summary(found: dict[str, dict[str, float]]) -> str:
    header = ("scheme", "emulated", "real", "difference", "standard error", "")
    return table(
        header,
        [
            (
                scheme,
                f"{f['emulated']:.3f}",
                f"{f['real']:.3f}",
                f"{100 * f['difference']:+.2f} %",
                f"{100 * f['error']:.2f} %",
                "pass"
                if abs(f["difference"]) <= BOUND
                else "noise"
                if abs(f["difference"]) < 2 * f["error"]
                else "FAIL",
            )
            for scheme, f in found.items()
        ],
    )


if __name__ == "__main__":
    main()
