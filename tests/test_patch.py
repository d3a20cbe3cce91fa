"""Patched models give stock's bits on the reference backend, however a model is used; `unpatch` leaves no trace."""

import copy
import io
from collections import Counter

import pytest
import torch
from patching import LAYERS, assert_equal, count, generate, quantize, tiny, tokens, without_blocks
from torch import nn
from transformers.models.llama import modeling_llama as llama

import fused_ops
import models_patch
from models_patch.pending import Pending
from quant import FP8_STATIC_TENSOR
from quant.methods import SCHEMES

MODELS = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Llama, biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def tiny_llama(name: str, dtype: torch.dtype = torch.bfloat16):
    return tiny(name.split(",")[0], dtype, **MODELS[name])


def quantized(scheme: str, **changes):
    return quantize(tiny(**changes), scheme)


@pytest.fixture
def reference():
    with fused_ops.use_backend("reference"):
        yield


@pytest.fixture
def model():
    return tiny()


# The numbers are stock's.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_stocks_bit_for_bit(reference, name, dtype):
    model = tiny_llama(name, dtype)
    expected = model(tokens()).logits
    models_patch.patch(model)
    operations = {"rms_norm": 1, "fused_add_rms_norm": 2 * LAYERS, "silu_mul": LAYERS, "rope": LAYERS}
    assert count(lambda: model(tokens())) == operations
    assert torch.equal(model(tokens()).logits, expected)


def test_a_model_without_head(reference, model):
    expected = model.model(tokens()).last_hidden_state
    report = models_patch.patch(model.model)
    assert torch.equal(model.model(tokens()).last_hidden_state, expected)
    assert [entry.path for entry in report][:2] == ["layers.0.input_layernorm", "layers.0.self_attn"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_generation_with_left_padding(reference, name, cache):
    model = tiny_llama(name)
    expected = generate(model, cache)
    models_patch.patch(model)
    actual = generate(model, cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(actual.logits, expected.logits)


@pytest.mark.parametrize("asked_by", ["argument", "config"])
def test_hidden_states_and_attentions_are_tensors(reference, asked_by):
    model = tiny(attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    if asked_by == "config":
        model.config.update(asked)
        asked = {}
    expected = model(tokens(), **asked)
    models_patch.patch(model)
    actual = model(tokens(), **asked)
    assert len(actual.hidden_states) == LAYERS + 1
    assert_equal(actual.hidden_states, expected.hidden_states)
    assert_equal(actual.attentions, expected.attentions)
    assert torch.equal(model(tokens()).logits, expected.logits)  # transformers leaves its hooks in place


def test_a_forward_hook_sees_and_may_change_the_tensor(reference, model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    expected = model(tokens()).logits
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)


def test_layers_may_be_skipped_at_the_end(reference, model):
    model.config.num_hidden_layers = 2
    expected = model(tokens()).logits
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)


def test_embeddings_given_by_the_caller_are_not_written(reference, model):
    embeddings = model.model.embed_tokens(tokens())
    kept = embeddings.clone()
    models_patch.patch(model)
    model(inputs_embeds=embeddings)
    assert torch.equal(embeddings, kept)


@pytest.mark.parametrize("scheme", [None, "fp8_static"])
def test_compiles_to_one_graph(scheme):
    torch._dynamo.reset()  # the models of all tests share their code, and so a limit of recompilations
    graphs = []

    def backend(graph, inputs):
        graphs.append(Counter(getattr(node.target, "_opname", "") for node in graph.graph.nodes))
        return graph.forward

    model = quantized(scheme) if scheme else tiny()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(tokens())
    models_patch.patch(model)
    for length in 7, 5, 11:  # the first as before: the stock model's graph must not be used again
        assert torch.equal(compiled(tokens(length)).logits, model(tokens(length)).logits)
    assert graphs[-1]["silu_mul_quant" if scheme else "silu_mul"] == LAYERS


def test_layers_compile_one_by_one(model):
    models_patch.patch(model)
    expected = model(tokens()).logits
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(model(tokens()).logits, expected)


def test_backward_raises():
    model = tiny(dtype=torch.float32).requires_grad_()
    models_patch.patch(model)
    with pytest.raises(RuntimeError, match="inference only"):
        model(tokens(), labels=tokens()).loss.backward()


# Quantized models.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_a_quantized_model_keeps_its_bits(reference, name, scheme):
    model = quantize(tiny_llama(name), scheme)
    expected = model(tokens()).logits
    assert count(lambda: model(tokens()))["quantize"] == 7 * LAYERS
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    calls = count(lambda: model(tokens()))
    assert calls.pop("quantize") == LAYERS  # for o_proj; all others share what norms and activations quantized
    assert calls.pop("scaled_linear") == 7 * LAYERS
    assert calls == without_blocks(report)
    assert calls == {"rms_norm_quant": 1, "fused_add_rms_norm_quant": 2 * LAYERS - 1, "silu_mul_quant": LAYERS,
                     "fused_add_rms_norm": 1, "rope": LAYERS}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_patched_model_may_be_quantized_and_patched_again(model, scheme):
    report = models_patch.patch(model)
    assert {entry.quant_key for entry in report} == {None}
    quantize(model, scheme)
    assert count(lambda: model(tokens()))["quantize"] == 7 * LAYERS
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert {entry.quant_key for entry in report} == {SCHEMES[scheme].input_quant_key, None}
    assert count(lambda: model(tokens()))["quantize"] == LAYERS
    assert torch.equal(model(tokens()).logits, expected)


def test_generation_of_a_quantized_model(reference):
    model = quantized("int8_token")
    expected = model.generate(tokens(), max_new_tokens=6, do_sample=False, cache_implementation="static")
    models_patch.patch(model)
    actual = model.generate(tokens(), max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(actual, expected)


def test_one_activation_serves_only_layers_that_agree(reference):
    model = quantized("fp8_static")
    attentions = [layer.self_attn for layer in model.model.layers]
    attentions[1].k_proj.input_scale.mul_(2)
    attentions[2].v_proj = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    expected = model(tokens()).logits
    report = {entry.path: entry for entry in models_patch.patch(model)}
    inputs = [report[f"model.layers.{index}.input_layernorm"] for index in range(LAYERS)]
    assert [entry.quant_key for entry in inputs] == [FP8_STATIC_TENSOR, None, None]
    assert inputs[0].feeds == ("q_proj", "k_proj", "v_proj")
    assert inputs[1].note == "q_proj and k_proj differ in scale, so each quantizes its input"
    assert inputs[2].note == "q_proj and v_proj differ in quant_key, so each quantizes its input"
    assert [entry.operation for entry in inputs[1:]] == ["fused_add_rms_norm"] * 2
    assert torch.equal(model(tokens()).logits, expected)


def test_an_attention_that_reads_its_input_gets_it_unquantized(reference):
    class Gated(llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            output, weights = super().forward(hidden_states, **kwargs)
            return output * hidden_states.sigmoid(), weights

    model = quantized("int8_token")
    model.model.layers[1].self_attn.__class__ = Gated
    expected = model(tokens()).logits
    report = {entry.path: entry for entry in models_patch.patch(model)}
    assert torch.equal(model(tokens()).logits, expected)
    entry = report["model.layers.1.input_layernorm"]
    assert entry.quant_key is None
    assert entry.note == "Gated.forward reads its input elsewhere too, so each quantizes its input"


# The patch itself.


def test_unpatch_leaves_no_trace(reference, model):
    other = tiny()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    names, expected = list(model.state_dict()), model(tokens()).logits
    models_patch.patch(model)
    assert list(model.state_dict()) == names
    assert not count(lambda: other(tokens()))  # nothing is global
    models_patch.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert all(module.forward.__func__ is type(module).forward for module in model.modules())
    assert not count(lambda: model(tokens()))
    assert torch.equal(model(tokens()).logits, expected)
    models_patch.unpatch(model)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_patched_and_stands_alone(reference, copied):
    model = quantized("fp8_static")
    models_patch.patch(model)
    expected = model(tokens()).logits
    twin = copied(model)
    models_patch.unpatch(model)
    model.model.layers[1].mlp.down_proj.weight_scale.zero_()
    assert torch.equal(twin(tokens()).logits, expected)
    assert count(lambda: twin(tokens()))["silu_mul_quant"] == LAYERS
    models_patch.unpatch(twin)
    assert "silu_mul_quant" not in count(lambda: twin(tokens()))


def test_patching_twice_is_patching_once(reference, model):
    first = models_patch.patch(model)
    expected = count(lambda: model(tokens()))
    assert models_patch.patch(model) == first
    assert count(lambda: model(tokens())) == expected


def test_patching_again_undoes_what_no_longer_fits(reference, model):
    models_patch.patch(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    models_patch.patch(model)
    assert "silu_mul" not in count(lambda: model(tokens()))


def test_the_report_is_a_table():
    lines = str(models_patch.patch(quantized("int8_token"))).splitlines()
    assert lines[0] == "LlamaForCausalLM: fused operations in 16 places, 0 left as they were"
    assert lines[1].split() == ["module", "class", "calls", "quantized", "as", "for", "note"]
    assert lines[2].split()[:4] == [
        "model.layers.0.input_layernorm",
        "LlamaRMSNorm",
        "rms_norm_quant",
        "INT8_DYNAMIC_TOKEN",
    ]
    mlp = next(line for line in lines if line.startswith("model.layers.0-2.mlp "))
    assert mlp.split()[1:] == ["LlamaMLP", "silu_mul_quant", "INT8_DYNAMIC_TOKEN", "down_proj"]
    starts = {line.index(cell) for line in lines[1:] for cell in ("class", "Llama") if cell in line}
    assert len(starts) == 1


def test_pending_moves_and_adds():
    pending = Pending(torch.ones(2), torch.full((2,), 2.0)).to("cpu")
    assert torch.equal(pending.sum(), torch.full((2,), 3.0))
