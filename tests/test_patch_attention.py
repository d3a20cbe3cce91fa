"""Attention of patched models: what is recognised, what is fused with which cache, and what is left by name."""

import functools
from collections import Counter

import pytest
import torch
import transformers
from patching import (
    FAMILIES,
    UNLISTED,
    L,
    assert_equal,
    changed_copy,
    count,
    generate,
    quantize,
    tiny,
    tiny_model,
    tokens,
    without_blocks,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import fused_ops
import models_patch
from models_patch import attention as bodies
from models_patch import stock
from models_patch.attention_family import attentions_of

VERSION = transformers.__version__


def tiny_or_llama(name: str, dtype: torch.dtype = torch.bfloat16):
    return tiny_model(name, dtype) if name in FAMILIES else tiny(name, dtype, num_hidden_layers=L)


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"), torch.no_grad():
        yield


# What is recognised.

LLAMA, GEMMA, OLMO = stock.LlamaNorm, stock.GemmaNorm, stock.Olmo2Norm
SLIDING = ("sliding_window",)
ROLES = {  # rotation, norm, packed, whole vector, options of the attention function
    "Llama": (stock.Halves, None, False, False, ()),
    "Mistral": (stock.Halves, None, False, False, SLIDING),
    "Qwen2": (stock.Halves, None, False, False, SLIDING),
    "Qwen3": (stock.Halves, LLAMA, False, False, SLIDING),
    "Qwen3Moe": (stock.Halves, LLAMA, False, False, SLIDING),
    "SmolLM3": (stock.Halves, None, False, False, SLIDING),
    "Granite": (stock.Halves, None, False, False, ()),
    "Phi3": (stock.PartialHalves, None, True, False, SLIDING),
    "Glm4": (stock.PartialPairs, None, False, False, ()),
    "Glm4Moe": (stock.PartialHalves, LLAMA, False, False, ()),
    "Gemma2": (stock.Halves, None, False, False, ("sliding_window", "softcap")),
    "Gemma3Text": (stock.Halves, GEMMA, False, False, SLIDING),
    "Olmo2": (stock.Float32Halves, OLMO, False, True, ()),
    "GptOss": (stock.ChunkedHalves, None, False, False, ("s_aux", "sliding_window")),
    "MiniMaxM2": (stock.PartialHalves, LLAMA, False, True, ()),
}


@pytest.mark.parametrize("name", ROLES)
def test_an_attention_is_known_by_its_source(name):
    role, _ = attentions_of(tiny_or_llama(name).model)[0]
    options = tuple(option for option, _ in role.options)
    assert (role.rotation.stock, role.norm and role.norm.stock, role.packed, role.whole_vector, options) == ROLES[name]


def test_norms_and_rotations_that_a_layer_does_without():
    model = tiny_model("Glm4Moe", use_qk_norm=False)
    expected = model(tokens()).logits
    models_patch.patch(model)
    calls = count(lambda: model(tokens()))
    assert (calls["rope"], calls["qk_norm_rope"]) == (L, 0)
    assert torch.equal(model(tokens()).logits, expected)
    entries = [entry for entry in models_patch.patch(tiny_model("SmolLM3")) if entry.path == "model.layers.1.self_attn"]
    assert [entry.operation for entry in entries] == ["paged_attention"]
    model = tiny_model("SmolLM3")
    model.model.layers[0].self_attn.is_causal = False
    (entry,) = (entry for entry in models_patch.patch(model) if entry.path == "model.layers.1.self_attn")
    assert (entry.operation, entry.note) == (None, "it doesn't rotate: nothing to fuse")


@pytest.mark.parametrize("name", UNLISTED)
def test_a_model_that_nobody_listed_is_patched_like_its_kin(name):
    model = tiny(name, num_hidden_layers=L, **UNLISTED[name])
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert type(model.model).__name__ not in models_patch.families.MODELS
    calls = count(lambda: model(tokens()))
    assert calls == without_blocks(report)
    assert calls["rope"] + calls["qk_norm_rope"] == L
    assert torch.equal(model(tokens()).logits, expected)


# With which cache.


def fused(function) -> Counter:
    return Counter({name: n for name, n in count(function).items() if "rope" in name})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ROLES)
def test_one_call_rotates_and_writes_where_the_cache_has_a_place(name, cache):
    model = tiny_or_llama(name)
    expected = generate(model, cache)
    models_patch.patch(model)
    actual = generate(model, cache)
    assert_equal(actual.logits, expected.logits)
    operation = "rope" if ROLES[name][1] is None else "qk_norm_rope"
    # A layer with a sliding window has no place that stays.
    layers = (StaticCache(model.config, 16) if cache == "static" else DynamicCache(config=model.config)).layers
    writing = sum(type(layer).__name__ == "StaticLayer" for layer in layers)
    rotating, times = L - (name == "SmolLM3"), len(actual.logits)
    calls = {f"{operation}_kv_cache_write": times * min(writing, rotating), operation: times * (rotating - writing)}
    assert fused(lambda: generate(model, cache)) == Counter({op: n for op, n in calls.items() if n > 0})


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_a_compiled_model_writes_into_a_static_cache(name):
    torch._dynamo.reset()
    graphs, model = [], tiny_or_llama(name)
    models_patch.patch(model)

    def backend(graph, inputs):
        graphs.append(Counter(getattr(node.target, "_opname", "") for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    caches = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
    for length in 7, 1, 1:
        actual, expected = (
            m(tokens(length), past_key_values=c) for m, c in zip((compiled, model), caches, strict=True)
        )
        assert torch.equal(actual.logits, expected.logits)
    operation = "rope_kv_cache_write" if name == "Llama" else "qk_norm_rope_kv_cache_write"
    assert [graph[operation] for graph in graphs] == [L if name == "Llama" else 1] * 2


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3Text", "Glm4"])
def test_continuous_batching_writes_through_its_slot_mapping(name, monkeypatch):
    writes = Counter()
    for operation in "rope_kv_cache_write", "qk_norm_rope_kv_cache_write":

        def counting(*args, operation=operation, **options):  # in another thread, where no mode counts
            writes[operation] += 1
            return getattr(fused_ops, operation)(*args, **options)

        monkeypatch.setattr(bodies, operation, counting)

    def attend(module, query, key, value, mask, cache=None, **options):  # as flash attention does it
        if cache is not None:
            keys = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx, "kwargs": options}
            key, value = cache.update(**keys)
            seen.append((options["cu_seq_lens_k"].tolist(), options["cu_seq_lens_k"].dtype, options["max_length_k"]))
        return sdpa(module, query, key, value, mask, **options)

    seen, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)

    def batched():
        seen.clear()
        results = model.generate_batch(
            [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 45))],
            generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(page_size=8, num_blocks=16, max_batch_tokens=16),
            progress_bar=False,
        )
        return [result.generated_tokens for result in results.values()], list(seen)

    model = tiny_or_llama(name)
    expected = batched()
    models_patch.patch(model)
    assert batched() == expected
    assert writes.total() % (1 if name == "Gemma3Text" else L) == 0
    assert set(writes) == {"qk_norm_rope_kv_cache_write" if name in ("Qwen3", "Gemma3Text") else "rope_kv_cache_write"}


class _Cosines(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.aten.cos.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "tables"), [("Llama", 1), ("GptOss", 1), ("Gemma3Text", 2)])
def test_cosines_are_made_once_for_all_layers(name, tables):
    model = tiny_or_llama(name)
    models_patch.patch(model)
    with _Cosines() as cosines:
        model(tokens())
    assert cosines.calls == tables
    rows = model.model.rotary_emb(torch.empty(2, 7, 64), torch.arange(7)[None], *["full_attention"][: tables - 1])
    assert rows.dtype == torch.float32
    assert rows.shape == (14, 16)
    assert torch.equal(rows[:7], rows[7:])


def test_every_kind_of_scaled_rotation():
    longrope = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 8}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3}
    for kind, more in {"yarn": yarn, "longrope": {**longrope, "factor": 8.0}, "dynamic": {"factor": 2.0}}.items():
        model = tiny(num_hidden_layers=1, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more})
        for length in 5, 70:  # within and beyond what it was trained for
            models_patch.unpatch(model)
            expected = model(tokens(length)).logits
            models_patch.patch(model)
            assert torch.equal(model(tokens(length)).logits, expected), kind


def test_eager_attention_is_the_models_own():
    model = tiny_model("Gemma2", attn_implementation="eager")
    expected = model(tokens(), output_attentions=True)
    models_patch.patch(model)
    actual = model(tokens(), output_attentions=True)
    assert_equal(actual.attentions, expected.attentions)
    assert torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("name", ["Qwen3", "Phi3"])
def test_projections_share_what_was_quantized_once(name):
    model = quantize(tiny_model(name), "int8_token")
    expected = generate(model, "static")
    models_patch.patch(model)
    assert_equal(generate(model, "static").logits, expected.logits)
    calls = count(lambda: model(tokens()))
    assert calls["quantize"] == L  # for o_proj


# What isn't known is left.


class _Peeking(llama.LlamaDecoderLayer):
    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        cos, _ = position_embeddings
        return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs) * cos.mean()


class _Scaled(llama.LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output * 2, weights


class _Table(llama.LlamaRotaryEmbedding):
    def forward(self, x, position_ids):
        cos, sin = super().forward(x, position_ids)
        return cos, -sin


class _Model(llama.LlamaModel):
    def forward(self, input_ids=None, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        position_embeddings = self.rotary_emb(hidden_states, torch.arange(7)[None])
        position_embeddings = tuple(half * 0.5 for half in position_embeddings)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(hidden_states, position_embeddings=position_embeddings)
        hidden_states = self.norm(hidden_states)
        return transformers.modeling_outputs.BaseModelOutputWithPast(hidden_states)


@pytest.mark.parametrize(
    ("module", "cls", "reason"),
    [
        ("model", _Model, "_Model.forward reads position_embeddings elsewhere too"),
        ("model.layers.1", _Peeking, "_Peeking.forward reads position_embeddings elsewhere too"),
        ("model.layers.1.self_attn", _Scaled, "_Scaled.forward of transformers {} is not a known attention"),
        ("model.rotary_emb", _Table, "_Table.forward of transformers {} is not a known table of cosines and sines"),
    ],
)
def test_an_unknown_forward_leaves_all_attentions(module, cls, reason):
    model = tiny()
    model.get_submodule(module).__class__ = cls
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    left = [entry.note for entry in report.left if entry.path.endswith("self_attn")]
    assert left == [reason.format(VERSION)] * 3
    assert torch.equal(model(tokens()).logits, expected)


def _other_rotation(q, k, cos, sin, unsqueeze_dim=1):
    return q * cos.unsqueeze(unsqueeze_dim), k * cos.unsqueeze(unsqueeze_dim)


def test_another_rotation_is_left(monkeypatch):
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", _other_rotation)
    model = tiny()
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    notes = {entry.note for entry in report.left}
    name = "transformers.models.llama.modeling_llama"
    assert notes == {f"apply_rotary_pos_emb of {name} of transformers {VERSION} is not a known rotation"}
    assert torch.equal(model(tokens()).logits, expected)


class _Doubled(qwen3.Qwen3RMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 2


def _doubled(norm):
    norm.__class__ = _Doubled


def _other_eps(norm):
    norm.variance_epsilon = 1.0


def _replaced(norm):
    norm.forward = functools.partial(type(norm).forward, norm)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_doubled, f"_Doubled.forward of transformers {VERSION} is not a known norm"),
        (_other_eps, "q_norm and k_norm of this Qwen3Attention differ"),
        (_replaced, "the forward of this Qwen3RMSNorm has been replaced by something else already"),
    ],
)
def test_other_norms_of_heads_are_left(change, reason):
    model = tiny_model("Qwen3")
    change(model.model.layers[1].self_attn.k_norm)
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert {entry.note for entry in report.left} == {reason}
    assert torch.equal(model(tokens()).logits, expected)


def test_a_model_with_other_layers_is_left_whole():
    model = tiny("Cohere2", num_hidden_layers=L)
    with pytest.raises(ValueError, match="model is Cohere2ForCausalLM, expected one of LlamaModel"):
        models_patch.patch(model)


CHANGES = {
    "query_states = self.q_proj(hidden_states)": "query_states = self.k_proj(hidden_states)",
    "(query_states, key_states, cos, sin)": "(query_states, key_states, sin, cos)",
    "if past_key_values is not None:": "if past_key_values is None:",
    "(key_states, value_states, self.layer_idx)": "(value_states, value_states, self.layer_idx)",
    "            key_states,\n            value_states,": "            value_states,\n            key_states,",
    "            attention_mask,\n": "            None,\n",
    "scaling=self.scaling,": "scaling=self.scaling * 2,",
    "scaling=self.scaling,\n": "scaling=self.scaling, softcap=30.0,\n",
    "0.0 if not self.training": "0.0 if self.training",
    "attn_output = self.o_proj(attn_output)": "attn_output = self.o_proj(attn_output * 2)",
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_attention_with_one_change_is_unknown(change, tmp_path, monkeypatch):
    model = tiny()
    module = changed_copy(llama, "LlamaAttention", change, CHANGES[change], tmp_path, monkeypatch)
    model.model.layers[0].self_attn.__class__ = module.LlamaAttention
    reason = f"LlamaAttention.forward of transformers {VERSION} is not a known attention"
    assert attentions_of(model.model) == [(None, reason)] * 3


def test_an_attention_in_other_words_is_known(tmp_path, monkeypatch):
    model = tiny()
    expected = attentions_of(model.model)
    module = changed_copy(llama, "LlamaAttention", "attn_output", "attended", tmp_path, monkeypatch)
    model.model.layers[0].self_attn.__class__ = module.LlamaAttention
    assert attentions_of(model.model) == expected
    assert expected[0][0] is not None
