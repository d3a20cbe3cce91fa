"""Latent attention of patched models: what is recognised, what is fused, and a cache of latents."""

import pytest
import torch
import transformers
from compare import assert_logits_close
from patching import L, assert_equal, changed_copy, count, generate, quantize, tiny_model, tokens, without_blocks
from transformers import DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import fused_ops
import models_patch
from models_patch import stock
from models_patch.attention_family import attentions_of
from models_patch.paged_cache import PagedKVCache

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
KINDS = {  # what the tiny model of a class may be changed to
    "V2": ("DeepseekV2", {}),
    "V2 of low rank": ("DeepseekV2", {"q_lora_rank": 24}),
    "V2 with yarn": ("DeepseekV2", {"rope_parameters": YARN}),
    "V3": ("DeepseekV3", {}),
    "V3 in halves": ("DeepseekV3", {"rope_interleave": False}),
    "V3 of full rank": ("DeepseekV3", {"q_lora_rank": None}),
    "V3 with yarn": ("DeepseekV3", {"rope_parameters": YARN}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"), torch.no_grad():
        yield


def model_of(kind: str, dtype: torch.dtype = torch.float32):
    name, changes = KINDS[kind]
    return tiny_model(name, dtype, **changes)


@every_kind
def test_it_is_known_by_its_source(kind):
    role, _ = attentions_of(model_of(kind).model)[0]
    rotation = stock.ComplexPairs if kind.startswith("V2") else stock.SortedPairs
    low_rank = KINDS[kind][1].get("q_lora_rank", 24 if kind.startswith("V3") else None) is not None
    expected = (rotation, stock.LlamaNorm, low_rank, kind.startswith("V3") and "halves" not in kind, "")
    assert (role.rotation.stock, role.norm.stock, role.low_rank, role.sorts_pairs, role.unpaged) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_kind
def test_with_other_caches_it_has_stocks_bits(kind, cache, dtype):
    model = model_of(kind, dtype)
    expected = generate(model, cache)
    report = models_patch.patch(model)
    assert_equal(generate(model, cache).logits, expected.logits)
    calls = count(lambda: model(tokens()))
    assert calls == without_blocks(report)
    assert calls["rope"] == (0 if kind.startswith("V2") else L)


@every_kind
def test_a_cache_holds_latents(kind):
    model, ids = model_of(kind), tokens(9)
    stocks, cache = DynamicCache(), PagedKVCache(model.config, 16, 4)
    expected = model(ids, past_key_values=stocks).logits
    models_patch.patch(model)
    calls = count(lambda: model(ids, past_key_values=cache))
    assert (calls["mla_rope_kv_cache_concat"], calls["mla_attention"], calls["rope"]) == (L, L, 0)
    assert calls["dual_rms_norm"] == (L if attentions_of(model.model)[0][0].low_rank else 0)
    for layer, latents in zip(cache.layers, stocks.layers, strict=True):
        assert layer.kv_cache.shape == (16, 4, 40)
        rows = layer.kv_cache[cache.current.block_tables.long()].flatten(1, 2)[:, :9]
        assert_logits_close(rows, torch.cat((latents.keys, latents.values), -1).squeeze(1))  # in stock's order
    cache.truncate(cache.rows[0], 5)
    cache.truncate(cache.rows[1], 5)
    assert_logits_close(model(ids[:, 5:], past_key_values=cache).logits, expected[:, 5:])


def test_a_cache_for_another_model_is_refused():
    model = tiny_model("DeepseekV3")
    models_patch.patch(model)
    cache = PagedKVCache(tiny_model("Qwen3").config, 16, 4)
    with pytest.raises(ValueError, match="it holds no latents: its config has no kv_lora_rank, expected the model's"):
        model(tokens(), past_key_values=cache)


@pytest.mark.parametrize("scheme", ["int8_token", "fp8_static"])
def test_queries_are_quantized_by_the_norm_of_their_latents(scheme):
    model = quantize(tiny_model("DeepseekV3"), scheme, ignore=("lm_head", "kv_b_proj"))
    ids, cache = tokens(9), PagedKVCache(model.config, 16, 4)
    expected = model(ids).logits
    report = models_patch.patch(model)
    assert torch.equal(model(ids).logits, expected)
    key = model.model.layers[0].self_attn.q_b_proj.input_quant_key
    assert [(e.quant_key, e.feeds) for e in report if e.operation == "dual_rms_norm"] == [(key, ("q_b_proj",))] * L
    calls = count(lambda: model(ids, past_key_values=cache))
    assert calls["mla_attention_quant"] == L
    assert calls["quantize"] == 0


def test_a_quantized_kv_b_proj_leaves_attention_to_the_model():
    model = quantize(tiny_model("DeepseekV3"), "int8_token")
    ids = tokens(9)
    expected = model(ids, past_key_values=DynamicCache()).logits
    report = models_patch.patch(model)
    reason = "kv_b_proj is QuantLinear, and mla_attention takes its weight alone"
    assert sum(reason in entry.note for entry in report) == L
    cache = PagedKVCache(model.config, 16, 4)
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_one_that_is_quantized_after_the_patch_does_too():
    model, ids = tiny_model("DeepseekV3"), tokens(9)
    models_patch.patch(model)
    quantize(model, "int8_token")
    cache = PagedKVCache(model.config, 16, 4)
    expected = model(ids, past_key_values=DynamicCache()).logits
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)
    assert count(lambda: model(ids[:, :1], past_key_values=cache))["mla_attention"] == 0


def _with_bias(attention):
    attention.kv_b_proj.bias = torch.nn.Parameter(torch.randn(attention.kv_b_proj.out_features), requires_grad=False)


def _with_another_forward(attention):
    linear = attention.kv_b_proj
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)


def _with_a_hook(attention):
    attention.kv_b_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def _with_a_pre_hook(attention):
    attention.kv_b_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


@pytest.mark.parametrize("after", [False, True], ids=["before the patch", "after it"])
@pytest.mark.parametrize("change", [_with_bias, _with_another_forward, _with_a_hook, _with_a_pre_hook])
def test_a_kv_b_proj_that_does_more_is_called(change, after):
    model, ids = model_of("V3"), tokens(9)
    if after:
        models_patch.patch(model)
    change(model.model.layers[1].self_attn)
    expected = model(ids).logits
    if not after:
        reason = (
            f"kv_b_proj has a {'bias' if change is _with_bias else 'forward or hooks of its own'}, and mla_attention"
        )
        assert any(reason in entry.note for entry in models_patch.patch(model))
    assert_logits_close(model(ids, past_key_values=PagedKVCache(model.config, 16, 4)).logits, expected)


def test_an_expansion_that_was_replaced_is_called():
    model, ids = model_of("V3"), tokens(9)
    attention = model.model.layers[1].self_attn
    attention.expand_kv = lambda *latents: [2 * x for x in type(attention).expand_kv(attention, *latents)]
    expected = model(ids).logits
    report = models_patch.patch(model)
    note = "the expand_kv of this DeepseekV3Attention has been replaced by something else already"
    assert note in {entry.note for entry in report.left}
    assert_logits_close(model(ids, past_key_values=PagedKVCache(model.config, 16, 4)).logits, expected)


CHANGES = [  # in DeepSeek-V3's source
    ("q_pass, q_rot = torch.split(q_states", "q_rot, q_pass = torch.split(q_states"),
    ("self.kv_a_layernorm(kv_nope)", "self.kv_a_layernorm(kv_nope) * 2"),
    ("if self.config.rope_interleave:", "if not self.config.rope_interleave:"),
    (".copy_(k_nope)", ".copy_(k_nope * 2)"),
    (".update(kv_nope, k_rot, self.layer_idx)", ".update(k_rot, kv_nope, self.layer_idx)"),
    ("scaling=self.scaling,", "scaling=self.scaling * 2,"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "to"), CHANGES, ids=range(len(CHANGES)))
def test_a_changed_one_is_left(change, to, tmp_path, monkeypatch):
    model = tiny_model("DeepseekV3")
    module = changed_copy(v3, "DeepseekV3Attention", change, to, tmp_path, monkeypatch)
    model.model.layers[1].self_attn.__class__ = module.DeepseekV3Attention
    reason = (
        f"DeepseekV3Attention.forward of transformers {transformers.__version__} is not a known attention over latents"
    )
    assert attentions_of(model.model) == [(None, reason)] * L
    report = models_patch.patch(model)
    assert [entry.note for entry in report.left if "self_attn" in entry.path] == [reason] * L


@pytest.mark.parametrize(("name", "module", "rotation"), [
    ("DeepseekV2", v2, "apply_rotary_emb"), ("DeepseekV3", v3, "apply_rotary_pos_emb_interleave")
])  # fmt: skip
def test_another_rotation_is_left(name, module, rotation, monkeypatch):
    monkeypatch.setattr(module, rotation, lambda q, k, *angles: (q, k))
    report = models_patch.patch(tiny_model(name))
    notes = {entry.note for entry in report.left if "self_attn" in entry.path}
    assert notes == {
        f"apply_rotary_pos_emb of {module.__name__} of transformers {transformers.__version__} is not a known rotation"
    }


def test_norms_that_differ_are_left():
    class Doubled(v3.DeepseekV3RMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    model = tiny_model("DeepseekV3")
    model.model.layers[0].self_attn.q_a_layernorm.__class__ = Doubled
    expected = model(tokens()).logits
    report = models_patch.patch(model)
    assert any("Doubled.forward" in entry.note for entry in report.left if "self_attn" in entry.path)
    assert torch.equal(model(tokens()).logits, expected)
