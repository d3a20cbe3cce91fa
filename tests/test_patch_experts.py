"""Patched mixtures of experts: a norm quantizes once for all experts, and the router reads what it quantized."""

from collections import Counter

import pytest
import torch
import transformers
from compare import assert_same
from patching import FAMILIES, UNLISTED, L, count, generate, quantize, tiny, tiny_model, tokens
from transformers.models.minimax_m2 import modeling_minimax_m2 as minimax_m2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

import fused_ops
import models_patch
from quant import QuantizedActivation
from quant.methods import QuantExperts

MIXTURES = ["Qwen3Moe", "Glm4Moe", "GptOss", "DeepseekV2", "DeepseekV3", "MiniMaxM2", "Mixtral"]
SHARED = ["Glm4Moe", "DeepseekV2", "DeepseekV3"]


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"):
        yield


def mixture_model(name: str, scheme: str, **changes):
    sizes = {"num_hidden_layers": L, **(FAMILIES | UNLISTED)[name], **changes}
    return quantize(tiny(name, **sizes), scheme, ignore=("lm_head", "kv_b_proj") if "Deep" in name else ("lm_head",))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_reads_what_the_experts_get_quantized(name):
    model = mixture_model(name, "int8_token")
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    block = model.model.layers[-1].mlp
    seen = {}
    for part in "gate", "router", "experts", "shared_experts":
        if hasattr(block, part):
            getattr(block, part).register_forward_pre_hook(lambda _, args, part=part: seen.update({part: args[0]}))
    assert torch.equal(model(tokens()).logits, expected)
    read, taken = seen.get("gate", seen.get("router")), seen["experts"]
    assert isinstance(taken, QuantizedActivation)
    assert read.data_ptr() == taken.unquantized.data_ptr()
    assert_same(taken.data, fused_ops.quantize(taken.unquantized, taken.quant_key).data)
    assert seen.get("shared_experts", taken) is taken
    (entry,) = [e for e in report if e.path == f"model.layers.{L - 1}.post_attention_layernorm"]
    shared = ("shared_experts.gate_proj", "shared_experts.up_proj") if name in SHARED else ()
    assert (entry.operation, entry.feeds) == ("fused_add_rms_norm_quant", ("experts", *shared))
    assert entry.note == "the router reads it unquantized"
    (entry,) = [e for e in report if e.path == f"model.layers.{L - 1}.mlp.experts"]
    gate = "swiglu_oai_mul_quant" if name == "GptOss" else "silu_mul_quant"
    assert (entry.module, entry.operation, entry.feeds) == ("QuantExperts", gate, ("down_proj",))
    assert not report.left


@pytest.mark.parametrize("scheme", ["fp8_static", "int8_static_asym", "fp8_block", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss"])
def test_every_scheme_keeps_its_bits(name, scheme):
    model = mixture_model(name, scheme, kv_lora_rank=32, q_lora_rank=32)
    expected = model(tokens()).logits
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    calls = count(lambda: model(tokens()))
    assert calls["quantize"] == L  # for o_proj
    models_patch.unpatch(model)
    assert torch.equal(model(tokens()).logits, expected)


def test_shared_experts_that_want_another_scale_quantize_for_themselves():
    model = mixture_model("Glm4Moe", "fp8_static")
    shared = model.model.layers[1].mlp.shared_experts
    for projection in shared.gate_proj, shared.up_proj:
        projection.input_scale.mul_(2)
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    (entry,) = [e for e in report if e.feeds == ("experts",)]
    assert entry.note == (
        "the router reads it unquantized; experts and shared_experts.gate_proj differ in scale, "
        "so each quantizes its input"
    )


class _Twice(qwen3_moe.Qwen3MoeSparseMoeBlock):
    def forward(self, hidden_states):
        return super().forward(hidden_states * 2)


def test_an_unknown_mixture_is_left_and_its_experts_quantize_for_themselves():
    model = mixture_model("Qwen3Moe", "int8_token")
    model.model.layers[1].mlp.__class__ = _Twice
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    reason = f"_Twice.forward of transformers {transformers.__version__} is not a known mixture of experts"
    (entry,) = [e for e in report if e.path == "model.layers.1.post_attention_layernorm"]
    assert (entry.quant_key, entry.note) == (None, f"{reason}, so its experts quantize their input")
    (entry,) = report.left
    assert (entry.path, entry.module) == ("model.layers.1.mlp", "_Twice")
    assert count(lambda: model(tokens()))["quantize"] == L + 1


def test_what_is_added_in_training_is_still_added():
    """Noise in front of MiniMax-M2's router; nor does the statement that adds it make its block unknown."""
    model = mixture_model("MiniMaxM2", "int8_token", router_jitter_noise=0.5).train()
    assert isinstance(model.model.layers[0].mlp, minimax_m2.MiniMaxM2SparseMoeBlock)

    def logits():
        torch.manual_seed(3)
        return model(tokens()).logits

    expected = logits()
    assert not torch.equal(expected, model.eval()(tokens()).logits)
    models_patch.patch(model.train())
    assert torch.equal(logits(), expected)


def test_a_quantized_mixture_compiles_to_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(Counter(getattr(node.target, "_opname", "") for node in graph.graph.nodes))
        return graph.forward

    model = mixture_model("DeepseekV3", "int8_token")
    models_patch.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(compiled(tokens()).logits, model(tokens()).logits)
    assert len(graphs) == 1
    assert graphs[0].items() >= {"sort_by_expert": 1, "grouped_scaled_linear": 2, "sum_experts": 1}.items()


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_generation_one_token_at_a_time(name):
    model = mixture_model(name, "int8_token")
    expected = generate(model)
    models_patch.patch(model)
    actual = generate(model)
    assert_same(actual.sequences, expected.sequences)
    for mine, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_same(mine, theirs)


def test_experts_that_are_not_quantized_stay_the_models():
    model = quantize(tiny_model("Qwen3Moe"), "int8_token", ignore=("lm_head", "experts"))
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    assert {e.note for e in report.left} == {"the router and the products of the experts are the model's own"}
    assert [e.operation for e in report if e.path.endswith("mlp.experts")] == ["silu_mul"] * L
    assert not any(isinstance(module, QuantExperts) for module in model.modules())
