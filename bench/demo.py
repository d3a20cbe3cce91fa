"""A real model, stock and through fused operations and quantized layers: `python -m bench.demo` (`make demo`).

SmolLM2-135M-Instruct, or Gemma3-270M with `--model gemma3`, reads a page of English and writes an answer: as it is,
patched, and with the schemes that most checkpoints have, or those after `--schemes`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import models_patch
from quant.methods import SCHEMES, quantize_model

from . import machine, models
from .table import table

QUESTION = "Explain in two sentences why the sky is blue."
BEGINNING = "Once upon a time, in a small village by the sea,"  # for a model that only goes on
READ = {"smollm2": 1000, "gemma3": 400}  # tokens; of Gemma's 262,144 logits each
TURNS, TOKENS_A_TURN = 5, 10
STOCK = "stock, bfloat16"  # what all others are compared with
USUAL = ("int8_token", "fp8_static", "fp8_token", "fp8_block", "mxfp8", "nvfp4")
NOTE = """Ratios are to the stock model in bfloat16. Without bfloat16 instructions torch reads faster in float32.
Kernels sum in another order than torch, which turns a word now and then: patched text may differ from stock text."""
NOTES = {  # on what a scheme does to the figures
    ("int8_static", "int8_static_asym"): "one scale for all tokens of an activation, which its outliers stretch",
    ("fp8_block",): "weights by 128x128, activations by 1x128",
    tuple(name for name in SCHEMES if "fp" in name): "codes decoded by the kernel before it multiplies them",
    ("mxfp4", "nvfp4"): "weights and activations rounded to 4 bits as they are, hence the perplexity",
}


@dataclass
class Variant:
    """One form of the model, and what was measured of it."""

    name: str
    model: PreTrainedModel
    perplexity: float = 0.0
    prefill: float = 0.0  # tokens per second
    tokens: list[int] = field(default_factory=list)  # written so far
    seconds: list[float] = field(default_factory=list)  # that each of them took
    cache: object = None

    @property
    def decode(self) -> float:
        """Tokens per second, one at a time."""
        return 1 / median(self.seconds)

    @property
    def megabytes(self) -> float:
        """Weights, scales included; the embedding, which is the output layer too, counts once."""
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers()]) / 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=models.MODELS, default="smollm2", help="(default: smollm2)")
    parser.add_argument("--tokens", type=int, help="how many tokens are read (default: 1000; by Gemma3 400)")
    parser.add_argument("--schemes", nargs="+", default=USUAL, choices=[*SCHEMES, "all"], help="(default: the usual)")
    options = parser.parse_args(arguments)
    schemes = [name for name in SCHEMES if name in options.schemes or "all" in options.schemes]
    length = options.tokens or READ[options.model]
    start = time.perf_counter()

    def progress(text: str, **kwargs) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {text}", flush=True, **kwargs)

    print(machine.sentence(machine.describe("transformers")))
    stock, tokenizer = models.load(options.model)
    reading = models.tokens(tokenizer)[:, :length]
    calibration = [models.tokens(tokenizer, models.CALIBRATION)[:, : length // 2]]
    variants = []
    for name, make in recipes(stock, calibration, schemes).items():
        progress(f"{name}: ", end="")
        model, report = make()
        variants.append(Variant(name, model))
        read(variants[-1], reading)
        print(f"perplexity {variants[-1].perplexity:.2f}, reads {variants[-1].prefill:.0f} tokens/s", flush=True)

    asked, prompt = prompted(tokenizer)
    for turn in range(TURNS):
        progress(f"all write in turns, {turn + 1} of {TURNS}")
        for variant in variants:
            write(variant, prompt, TOKENS_A_TURN)
    print(f"\nWhat `patch` replaced in the last of them ({variants[-1].name.removeprefix('patched, ')}):\n\n{report}")
    print(f"\n{asked}")
    for variant in variants:
        answer = takewhile(lambda token: token != tokenizer.eos_token_id, variant.tokens)
        print(f"\n{variant.name}:\n  {tokenizer.decode(list(answer))}")
    print(f"\n{summary(variants)}\n\n{notes(schemes, reading)}\n")
    progress("done")


def prompted(tokenizer: PreTrainedTokenizerBase) -> tuple[str, Tensor]:
    """(what the model is asked, as text and as tokens)"""
    if not tokenizer.chat_template:
        return BEGINNING, tokenizer(BEGINNING, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return QUESTION, chat["input_ids"]


def recipes(
    stock: PreTrainedModel, calibration: list[Tensor], schemes: Iterable[str] = SCHEMES
) -> dict[str, Callable[[], tuple]]:
    """How to make each variant: name -> function that returns (model, patch report or None)."""

    embedding = stock.get_input_embeddings().weight  # most of a small model; no scheme changes it

    def copied():
        return copy.deepcopy(stock, {id(embedding): embedding})

    def patched(model):
        return model, models_patch.patch(model)

    def quantized(scheme: str):
        batches = calibration if SCHEMES[scheme].calibrated else None
        return patched(quantize_model(copied(), scheme, batches))

    return {
        STOCK: lambda: (stock, None),
        "stock, float32": lambda: (copy.deepcopy(stock).float(), None),
        "patched, bfloat16": lambda: patched(copied()),
        **{f"patched, {scheme}": lambda scheme=scheme: quantized(scheme) for scheme in schemes},
    }


@torch.inference_mode()
def read(variant: Variant, ids: Tensor) -> None:
    """Perplexity of `ids`, and the rate at which they are read, up to the next token's logits."""
    began = time.perf_counter()
    hidden = variant.model.model(ids).last_hidden_state
    variant.model.lm_head(hidden[:, -1:])
    variant.prefill = ids.shape[1] / (time.perf_counter() - began)
    variant.perplexity = models.losses(variant.model, ids, hidden).mean().exp().item()


@torch.inference_mode()
def write(variant: Variant, prompt: Tensor, count: int) -> None:
    """Add `count` tokens to what the variant has written, each the likeliest one."""
    for _ in range(count):
        began = time.perf_counter()
        ids = torch.tensor([variant.tokens[-1:]]) if variant.tokens else prompt
        out = variant.model(ids, past_key_values=variant.cache, use_cache=True)
        new, variant.cache = int(out.logits[0, -1].argmax()), out.past_key_values
        if variant.tokens:  # the first comes with the reading of the prompt
            variant.seconds.append(time.perf_counter() - began)
        variant.tokens.append(new)


def notes(schemes: Sequence[str], reading: Tensor) -> str:
    """What was measured, and on what."""
    lines = [f"Perplexity of {reading.shape[1]} tokens of {models.SOURCE}, {reading.shape[1] - 1} of them predicted."]
    for names, what in NOTES.items():
        if shown := [name for name in names if name in schemes]:
            lines.append(f"{', '.join(shown)}: {what}.")
    return "\n".join([*lines, NOTE])


def summary(variants: list[Variant]) -> str:
    """The figures of all variants, each with its ratio to the stock model in bfloat16."""
    base = next(variant for variant in variants if variant.name == STOCK)

    def ratio(variant: Variant, figure: str) -> str:
        return f"x {getattr(variant, figure) / getattr(base, figure):.2f}"

    header = ("model", "perplexity", "", "prefill tok/s", "", "decode tok/s", "", "weights MB", "")
    return table(
        header,
        [
            (
                v.name,
                f"{v.perplexity:.3f}",
                f"{100 * (v.perplexity / base.perplexity - 1):+.1f} %",
                *(f"{v.prefill:.0f}", ratio(v, "prefill")),
                *(f"{v.decode:.1f}", ratio(v, "decode")),
                *(f"{v.megabytes:.0f}", ratio(v, "megabytes")),
            )
            for v in variants
        ],
    )


if __name__ == "__main__":
    main()
