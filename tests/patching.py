"""Tiny random models for the tests of `models_patch`, and how often they call what."""

import importlib
import inspect
import sys
from collections import Counter

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models_patch import Report
from quant.methods import SCHEMES, quantize_model

LAYERS, VOCABULARY = 3, 97
SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
L = 2
FAMILIES = {  # by `<name>Config`, with what its tiny model needs
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, **_EXPERTS},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.3},
    "Phi3": {"resid_pdrop": 0.1, "partial_rotary_factor": 0.5},
    "Glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "Glm4Moe": {
        "head_dim": 16, "use_qk_norm": True, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, **_EXPERTS,
    },
    "Gemma2": {"head_dim": 16, "sliding_window": 4},
    "Gemma3Text": {
        "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "Olmo2": {},
    "GptOss": {
        "head_dim": 16, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "swiglu_alpha": 1.5, "swiglu_limit": 2.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "DeepseekV2": {"q_lora_rank": None, "topk_method": "greedy", **_DEEPSEEK},
    "DeepseekV3": {"q_lora_rank": 24, **_DEEPSEEK},
    "MiniMaxM2": {"head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
UNLISTED = {  # the same of models that are made of the same layers
    "Mixtral": {"num_local_experts": 4},
    "Gemma": {"head_dim": 16},
    "Glm": {"head_dim": 16},
    "Olmo3": {"sliding_window": 4},
    "Cwm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def tiny(name: str = "Llama", dtype: torch.dtype = torch.bfloat16, **changes):
    """A causal language model of the class that `<name>Config` belongs to."""
    torch.manual_seed(1)
    config = getattr(transformers, name + "Config")(**{**SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
        parameter.data.normal_(std=0.3).add_(parameter.dim() == 1)
    return model.requires_grad_(False)


def tiny_model(name: str, dtype: torch.dtype = torch.bfloat16, **changes):
    """One of L layers, of `FAMILIES`."""
    return tiny(name, dtype, **{"num_hidden_layers": L, **FAMILIES[name], **changes})


def tokens(length: int = 7, batch: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def quantize(model: nn.Module, scheme: str, **options) -> nn.Module:
    return quantize_model(model, scheme, [tokens(9)] if SCHEMES[scheme].calibrated else None, **options)


def generate(model: nn.Module, cache: str | None = None, **options):
    """Greedy, with logits, of two prompts of which the first is padded on its left."""
    prompts, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return model.generate(
        prompts, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


class CountOps(TorchDispatchMode):
    """Counts calls of fused operations."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_ops":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count(function) -> Counter:
    with CountOps() as counter:
        function()
    return counter.calls


def without_blocks(report: Report) -> Counter:
    """The operations of a call without a `PagedKVCache`."""
    return Counter(entry.operation for entry in report.replaced if "with a PagedKVCache" not in entry.note[:20])


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"{index}: {int((a != e).sum())} of {e.numel()} elements differ"


def changed_copy(module, cls: str, change: str, to: str, folder, monkeypatch):
    """A copy of a modeling file of transformers whose class `cls`, and what follows it, has one change."""
    package, name = module.__name__.rpartition(".")[0], f"changed_{cls.lower()}"
    source = inspect.getsource(module).replace("from ... import", "from transformers import")
    source = source.replace("from ...", "from transformers.").replace(
        "from .configuration", f"from {package}.configuration"
    )
    begin = source.index(f"class {cls}")
    assert change in source[begin:]
    (folder / f"{name}.py").write_text(source[:begin] + source[begin:].replace(change, to))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)
