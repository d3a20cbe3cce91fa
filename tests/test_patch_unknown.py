"""What a patch doesn't know it leaves alone, and says so by name."""

import functools
import gc
import threading
import time

import pytest
import torch
import transformers
from patching import LAYERS, tiny, tokens
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

import fused_ops
import models_patch
from models_patch.families import PRE_NORM
from models_patch.source import first_argument, formula, parsed, reads


@pytest.fixture
def model():
    return tiny()


def _python_gelu():
    return ACT2FN["gelu_python_tanh"]


def _replaced_silu():
    activation = nn.SiLU()
    activation.forward = torch.tanh
    return activation


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.GELU, "GELU.forward of transformers {} is not a known activation"),
        (_python_gelu, "GELUTanh.forward of transformers {} is not a known activation"),
        (_replaced_silu, "the forward of this SiLU has been replaced by something else already"),
    ],
)
def test_another_activation_is_left(model, activation, reason):
    for layer in model.model.layers:
        layer.mlp.act_fn = activation()
    with fused_ops.use_backend("reference"):
        expected = model(tokens()).logits
        report = models_patch.patch(model)
        assert torch.equal(model(tokens()).logits, expected)
    left = [entry for entry in report.left if entry.module == "LlamaMLP"]
    assert [entry.path for entry in left] == [f"model.layers.{index}.mlp" for index in range(LAYERS)]
    assert {entry.note for entry in left} == {reason.format(transformers.__version__)}


class _Scaled(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention * 0.5
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _Doubled(llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 2


class _Peeking(llama.LlamaModel):
    def forward(self, input_ids=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(hidden_states, **kwargs)
            hidden_states = hidden_states.clamp(-1, 1)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)


class _Bidirectional(llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, is_causal=False, **kwargs)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Phimoe", {"num_local_experts": 4}, "LayerNorm.forward of transformers {} is not a known norm"),
        (
            "Llama4Text",
            {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64},
            "Llama4TextDecoderLayer.forward of transformers {} is not a known layer",
        ),
        (
            "OPT",
            {"ffn_dim": 64, "word_embed_proj_dim": 64},
            "OPTDecoder.forward of transformers {} is not a known loop",
        ),
        ("GPT2", {}, "no module in it has layers by that name"),
    ],
)
def test_a_model_of_no_family_is_refused_with_the_reason(name, options, reason):
    with pytest.raises(ValueError, match=f"or of the same layers; {reason.format(transformers.__version__)}"):
        models_patch.patch(tiny(name, **options))


@pytest.mark.parametrize(
    ("module", "cls", "reason"),
    [
        ("model.layers.2", _Scaled, "_Scaled.forward of transformers {} is not a known layer"),
        (
            "model.layers.0.post_attention_layernorm",
            _Doubled,
            "_Doubled.forward of transformers {} is not a known norm",
        ),
        ("model.norm", _Doubled, "_Doubled.forward of transformers {} is not a known norm"),
        ("model", _Peeking, "_Peeking.forward of transformers {} is not a known loop over layers"),
    ],
)
def test_an_unknown_forward_is_left_by_name(model, module, cls, reason):
    model.get_submodule(module).__class__ = cls
    report = models_patch.patch(model)
    assert report.left[0].path == "model.layers"
    assert report.left[0].note == reason.format(transformers.__version__)
    left = {"silu_mul"} | ({"rope", "paged_attention"} if module != "model" else set())
    assert {entry.operation for entry in report.replaced} == left
    assert "forward" not in vars(model.model.layers[0])


def test_a_forward_that_something_else_replaced_is_left(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    report = models_patch.patch(model)
    left = next(entry for entry in report.left if entry.path == "model.layers.1.mlp")
    assert left.note == "the forward of this LlamaMLP has been replaced by something else already"
    assert "\nmodel.layers.0,2.mlp " in str(report)
    models_patch.unpatch(model)
    assert "forward" in vars(mlp)


@pytest.mark.parametrize("path", ["model", "model.layers.1", "model.layers.2.input_layernorm", "model.norm"])
def test_layers_are_left_where_one_forward_was_replaced(model, path):
    module = model.get_submodule(path)
    module.forward = functools.partial(type(module).forward, module)
    report = models_patch.patch(model)
    assert report.left[0].path == "model.layers"
    assert report.left[0].note.startswith(f"the forward of this {type(module).__name__} has been replaced")
    left = {"silu_mul"} | ({"rope", "paged_attention"} if path.endswith("norm") else set())
    assert {entry.operation for entry in report.replaced} == left


def test_a_forward_that_something_else_wrapped_is_left(model, monkeypatch):
    forward = llama.LlamaRMSNorm.forward
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", functools.wraps(forward)(lambda self, x: forward(self, x) * 2))
    report = models_patch.patch(model)
    assert report.left[0].note.startswith("LlamaRMSNorm.forward of transformers")


def test_a_wrapped_patch_is_not_undone_by_halves(model):
    models_patch.patch(model)
    layer = model.model.layers[1]
    wrapped = layer.forward
    layer.forward = functools.wraps(wrapped)(lambda *args, **kwargs: wrapped(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"unpatch: something else has wrapped the patched forward of model\.layers\.1;"
    ):
        models_patch.unpatch(model)
    assert "forward" in vars(model.model.layers[0])


def test_nothing_known_raises(model):
    for layer in model.model.layers:
        layer.__class__, layer.mlp.act_fn, layer.self_attn.__class__ = _Scaled, nn.GELU(), _Bidirectional
    reasons = r"_Scaled\.forward .*; _Bidirectional\.forward .*; GELU\.forward"
    with pytest.raises(ValueError, match=f"nothing in LlamaForCausalLM can be patched: {reasons}"):
        models_patch.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("function", [models_patch.patch, models_patch.unpatch])
def test_what_is_no_model_raises(function):
    with pytest.raises(TypeError, match=r"model is dict, expected a torch\.nn\.Module"):
        function({})


def test_a_model_that_is_not_in_the_table_raises():
    with pytest.raises(ValueError, match="model is Linear, expected one of LlamaModel, MistralModel, Qwen2Model,"):
        models_patch.patch(nn.Linear(2, 2))


def test_source_comparison():
    class Norm(nn.Module):
        def forward(self, hidden_states):
            """Other names, other statements, the same formula."""
            x = hidden_states.to(torch.float32)
            mean, _unused = x.pow(2).mean(-1, keepdim=True), 0
            x = x * torch.rsqrt(mean + self.variance_epsilon)
            return self.weight * x.to(hidden_states.dtype)

        def fp32_weight(self, hidden_states):
            x = hidden_states.to(torch.float32)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * x).to(hidden_states.dtype)

        def branching(self, x):
            if x.dim() == 2:
                x = x[None]
            return self.weight * x

        def looping(self, x):
            for weight in self.weight:
                x = x * weight
            return x

    expected = formula(PRE_NORM.norm.stock.forward)
    assert formula(llama.LlamaRMSNorm.forward) == formula(Norm.forward) == expected
    assert formula(Norm.fp32_weight) != expected
    assert formula(llama.LlamaDecoderLayer.forward) == PRE_NORM.layer
    assert formula(Norm.branching) == "self.weight * (x[None] if x.dim() == 2 else x)"
    assert formula(Norm.looping) is None
    assert formula(torch.relu) is None
    assert reads(Norm.branching, "x") == ("x.dim", "x[None]", "self.weight * x")
    assert first_argument(llama.LlamaMLP.forward) == "x"
    assert reads(llama.LlamaMLP.forward, "x") == ("self.gate_proj(x)", "self.up_proj(x)")


def test_sources_are_parsed_in_threads_at_once():
    """Python 3.11's parser counts its depth for all threads together, and fails where they come between each other."""
    text, failed = "x = [a, (b, c), f(d)]\n" * 300, []

    def parse() -> None:
        try:
            for _ in range(3):
                parsed(text)
        except SystemError as error:
            failed.append(error)

    def let_others_run(*_) -> None:
        time.sleep(0)

    threads, threshold = [threading.Thread(target=parse) for _ in range(4)], gc.get_threshold()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(50)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*threshold)
    assert not failed
