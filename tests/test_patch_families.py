"""Patched models of the families whose layers aren't Llama's: stock's bits too, and the operations that fit each."""

import copy
import functools
import pickle
from collections import Counter

import pytest
import torch
import transformers
from patching import L, assert_equal, count, quantize, tiny_model, tokens, without_blocks
from transformers.activations import ACT2FN
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.granite import modeling_granite as granite
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi3 import modeling_phi3 as phi3

import fused_ops
import models_patch
from quant import INT8_DYNAMIC_TOKEN

PRE_NORM = {"rms_norm": 1, "fused_add_rms_norm": 2 * L, "silu_mul": L, "rope": L}
NORMED = PRE_NORM | {"rope": 0, "qk_norm_rope": L}
SANDWICH = {"rms_norm": 1, "rms_norm_add_rms_norm": 2 * L, "rope": L}
CALLS = {
    "Qwen3": NORMED,
    "Qwen3Moe": NORMED,
    "SmolLM3": PRE_NORM | {"rope": 1},
    "Granite": PRE_NORM,
    "Phi3": PRE_NORM,
    "Glm4": SANDWICH | {"silu_mul": L},
    "Glm4Moe": NORMED | {"silu_mul": L + 1},  # a layer with experts has shared ones too
    "Gemma2": SANDWICH | {"gelu_tanh_mul": L},
    "Gemma3Text": SANDWICH | {"gelu_tanh_mul": L, "rope": 0, "qk_norm_rope": L},
    "Olmo2": {"rms_norm_add": 2 * L - 1, "rms_norm_add_rms_norm": 1, "silu_mul": L, "qk_norm_rope": L},
    "GptOss": {"rms_norm": 1, "fused_add_rms_norm": 2 * L, "swiglu_oai_mul": L, "rope": L},
    "DeepseekV2": PRE_NORM | {"rms_norm": 1 + L, "silu_mul": L + 1, "rope": 0},  # rotated as complex numbers
    "DeepseekV3": PRE_NORM | {"dual_rms_norm": L, "silu_mul": L + 1},
    "MiniMaxM2": NORMED,
}
CALLS = {name: Counter({operation: n for operation, n in calls.items() if n}) for name, calls in CALLS.items()}
every_family = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"):
        yield


# The numbers are stock's.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_family
def test_logits_and_hidden_states_are_stocks_bit_for_bit(name, dtype):
    model = tiny_model(name, dtype)
    plain, expected = model(tokens()).logits, copy.deepcopy(model)(tokens(), output_hidden_states=True)
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, plain)
    assert count(lambda: model(tokens())) == CALLS[name] == without_blocks(report)
    actual = model(tokens(), output_hidden_states=True)
    assert torch.equal(actual.logits, expected.logits)
    assert_equal(actual.hidden_states, expected.hidden_states)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # in transformers' experts
@every_family
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(Counter(getattr(node.target, "_opname", "") for node in graph.graph.nodes))
        return graph.forward

    model = tiny_model(name)
    models_patch.patch(model)
    assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(tokens()).logits, model(tokens()).logits)
    assert len(graphs) == 1
    assert graphs[0].items() >= CALLS[name].items()


@pytest.mark.parametrize("name", ["Granite", "Gemma2", "Olmo2"])
def test_layers_compile_one_by_one(name):
    torch._dynamo.reset()
    model = quantize(tiny_model(name), "int8_token")
    models_patch.patch(model)
    expected = model(tokens()).logits
    for layer in model.model.layers:  # so each gets and returns a Pending
        layer.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_by_each_implementation(implementation):
    model = tiny_model("GptOss")
    model.set_experts_implementation(implementation)
    expected = model(tokens()).logits
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    assert count(lambda: model(tokens()))["swiglu_oai_mul"] >= L


@torch.no_grad()
def test_dropout_is_stocks_in_training_mode():
    model = tiny_model("Phi3").train()

    def logits():
        torch.manual_seed(3)
        return model(tokens()).logits

    expected = logits()
    assert not torch.equal(expected, model.eval()(tokens()).logits)
    models_patch.patch(model.train())
    assert torch.equal(logits(), expected)


# Quantized models.


@every_family
def test_a_quantized_model_keeps_its_bits_and_quantizes_once(name):
    model = quantize(tiny_model(name), "int8_token")
    expected = model(tokens()).logits
    stock = count(lambda: model(tokens()))
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    calls = count(lambda: model(tokens()))
    products = ("scaled_linear", "grouped_scaled_linear")
    assert sum(stock[product] for product in products) == stock["quantize"]  # each for itself
    for layers_own in *products, "sort_by_expert", "sum_experts":
        assert calls.pop(layers_own, 0) == stock[layers_own]
    # All share what a norm or an activation quantized, but o_proj; a post-norm layer's input no norm can quantize, and
    # kv_b_proj gets its from a cache.
    latent = name.startswith("Deepseek")
    alone = L + L * latent
    assert calls.pop("quantize") == alone + sum(entry.operation == "quantize" for entry in report)
    expected = without_blocks(report)
    del expected["quantize"]
    assert calls == expected
    fed = Counter(linear for entry in report for linear in entry.feeds)
    assert fed.pop("o_proj", 0) == (0 if latent else L)
    assert fed.total() == stock["quantize"] - alone
    assert set(fed.values()) == {L} or name in ("Qwen3Moe", "Glm4Moe", "DeepseekV2", "DeepseekV3")


def test_one_quantization_serves_the_projections_after_a_post_norm():
    model = quantize(tiny_model("Olmo2"), "int8_token")
    quantizing = [entry for entry in models_patch.patch(model) if entry.operation == "quantize"]
    assert [entry.path for entry in quantizing] == [
        f"model.layers.{i}.{m}" for i in range(L) for m in ("self_attn", "mlp")
    ]
    assert [entry.feeds for entry in quantizing[:2]] == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    assert {entry.quant_key for entry in quantizing} == {INT8_DYNAMIC_TOKEN}


@pytest.mark.parametrize("name", ["Olmo2", "Gemma2"])
def test_projections_that_disagree_quantize_for_themselves(name):
    model = quantize(tiny_model(name), "fp8_static")
    model.model.layers[1].self_attn.k_proj.input_scale.mul_(2)
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    (entry,) = [entry for entry in report if "differ" in entry.note]
    assert entry.quant_key is None
    assert entry.note.endswith("q_proj and k_proj differ in scale, so each quantizes its input")


@every_family
def test_a_patched_model_may_be_quantized_and_patched_again(name):
    model = tiny_model(name)
    models_patch.patch(model)
    quantize(model, "int8_token")
    expected = model(tokens()).logits
    alone = count(lambda: model(tokens()))["quantize"]
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    assert count(lambda: model(tokens()))["quantize"] < alone


# The patch itself.


@every_family
def test_unpatch_leaves_no_trace(name):
    model = tiny_model(name)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    names, expected = list(model.state_dict()), model(tokens()).logits
    first = models_patch.patch(model)
    assert models_patch.patch(model) == first
    assert list(model.state_dict()) == names
    models_patch.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert not count(lambda: model(tokens()))
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["Glm4", "GptOss"])
def test_a_copy_is_patched_and_stands_alone(name, copied):
    model = tiny_model(name)
    models_patch.patch(model)
    expected = model(tokens()).logits
    twin = copied(model)
    models_patch.unpatch(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert count(lambda: twin(tokens())) == CALLS[name]
    assert torch.equal(twin(tokens()).logits, expected)


@every_family
def test_a_forward_hook_sees_and_may_change_the_tensor(name):
    model = tiny_model(name)
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    expected = model(tokens()).logits
    models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["Granite", "Gemma2"])
def test_a_pending_moves_to_another_device(name):
    model = tiny_model(name)
    models_patch.patch(model)
    expected = model(tokens()).logits
    moved = []

    def move(module, inputs):
        moved.append(inputs[0].to("cpu"))
        return (moved[-1], *inputs[1:])

    model.model.norm.register_forward_pre_hook(move)
    assert torch.equal(model(tokens()).logits, expected)
    moved = moved[0].to("meta")
    assert {moved.delta.device.type, moved.residual.device.type} == {"meta"}
    assert moved.post is None or moved.post["weight"].is_meta


def test_models_beside_each_other_are_patched_each_for_itself():
    pair = torch.nn.ModuleList([tiny_model("Gemma2"), tiny_model("Olmo2")])
    reports = [models_patch.patch(model) for model in pair]
    operations = [entry.operation for report in reports for entry in report]
    assert [entry.operation for entry in models_patch.patch(pair)] == operations


def test_the_report_says_what_is_left_and_why():
    lines = {name: str(models_patch.patch(tiny_model(name))).splitlines() for name in ("Gemma3Text", "GptOss")}
    assert "0 left as they were" in lines["Gemma3Text"][0]
    assert any(line.endswith("post_feedforward_layernorm included") for line in lines["Gemma3Text"])
    assert any("router and the products of the experts" in line for line in lines["GptOss"])


# What isn't known is left alone.


class _LlamaOrder(gemma2.Gemma2RMSNorm):
    def _norm(self, x):
        return super()._norm(x).bfloat16().float()


class _Gate(gpt_oss.GptOssExperts):
    def _apply_gate(self, gate_up):
        return super()._apply_gate(gate_up) ** 2


class _Unscaled(granite.GraniteDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _UpFirst(phi3.Phi3MLP):
    def forward(self, hidden_states):
        up, gate = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class _PreNorm(olmo2.Olmo2DecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(hidden_states=self.post_attention_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_feedforward_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("name", "module", "cls", "left", "reason"),
    [
        ("Gemma2", "norm", _LlamaOrder, "layers", "_LlamaOrder._norm of transformers {} is not a known norm"),
        ("GptOss", "layers.0.mlp.experts", _Gate, None, "_Gate._apply_gate of transformers {} is not a known MLP"),
        ("Granite", "layers.1", _Unscaled, "layers", "_Unscaled.forward of transformers {} is not a known layer"),
        ("Phi3", "layers.1.mlp", _UpFirst, None, "_UpFirst.forward of transformers {} is not a known MLP"),
        ("Olmo2", "layers.0", _PreNorm, "layers", "_PreNorm.forward of transformers {} is not a known layer"),
    ],
)  # fmt: skip
def test_an_unknown_forward_is_left_by_name(name, module, cls, left, reason):
    model = tiny_model(name)
    model.model.get_submodule(module).__class__ = cls
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    entry = next(entry for entry in report.left if entry.path == f"model.{left or module}")
    assert entry.note == reason.format(transformers.__version__)
    assert torch.equal(model(tokens()).logits, expected)


def test_another_form_of_gelu_is_left():
    model = tiny_model("Gemma2")
    model.model.layers[1].mlp.act_fn = ACT2FN["gelu_new"]
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert torch.equal(model(tokens()).logits, expected)
    left = {entry.path for entry in report.left}
    assert "model.layers.1.mlp" in left
    assert "model.layers.0.mlp" not in left


def test_a_gate_that_something_else_has_replaced_or_wrapped():
    model = tiny_model("GptOss")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    first._apply_gate = lambda gate_up: gate_up[..., ::2]
    report = {entry.path: entry for entry in models_patch.patch(model)}
    note = "the _apply_gate of this GptOssExperts has been replaced by something else already"
    assert report["model.layers.0.mlp.experts"].note == note
    assert report["model.layers.1.mlp.experts"].operation == "swiglu_oai_mul"
    wrapped = second._apply_gate
    second._apply_gate = functools.wraps(wrapped)(lambda gate_up: wrapped(gate_up))
    with pytest.raises(ValueError, match=r"wrapped the patched _apply_gate of model\.layers\.1\.mlp\.experts;"):
        models_patch.unpatch(model)
