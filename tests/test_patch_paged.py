"""Patched models with a `PagedKVCache`: what stock computes, from blocks in place, and for o_proj as it wants it."""

import copy
import functools

import pytest
import torch
import transformers
from compare import assert_logits_close, assert_same_choice
from patching import FAMILIES, SIZES, UNLISTED, L, count, generate, quantize, tiny, tiny_model, tokens
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

import fused_ops
import models_patch
from models_patch.paged_cache import PagedKVCache, PagedLayer, kv_scales
from quant import formats
from quant.checkpoint import load_quantized, save_quantized

NAMES = ["Llama", "Mistral", "Qwen2", *FAMILIES]
BACKENDS = [backend for backend in ("reference", "cpu") if backend in fused_ops.OPS["paged_attention"].backends]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"), torch.no_grad():
        yield


@pytest.fixture
def no_gathering(monkeypatch):
    """Neither keys nor masks are asked for."""
    for owner, name in (PagedLayer, "read"), (PagedKVCache, "get_mask_sizes"):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes):
    if name in FAMILIES:
        return tiny_model(name, dtype, **changes)
    return tiny(name, dtype, num_hidden_layers=L, **({"sliding_window": 4} if name == "Mistral" else {}), **changes)


def paged(model, num_blocks: int = 64, block_size: int = 4) -> PagedKVCache:
    return PagedKVCache(model.config, num_blocks, block_size)


def attention_of(name: str) -> str:
    return "mla_attention" if name.startswith("Deepseek") else "paged_attention"


def in_chunks(model, ids: torch.Tensor, cache, ends=(7, 11, 12)) -> torch.Tensor:
    """Prefill, its continuation, and a token."""
    return torch.cat(
        [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip((0, *ends), ends, strict=False)], 1
    )


# What stock computes.


@every_backend
@every_model
def test_a_batch_in_chunks(name, backend, no_gathering):
    model, ids = model_of(name), tokens(12)
    expected = model(ids, past_key_values=DynamicCache()).logits
    report = models_patch.patch(model)
    with fused_ops.use_backend(backend):
        assert_logits_close(in_chunks(model, ids, paged(model)), expected)
    assert count(lambda: in_chunks(model, ids, paged(model)))[attention_of(name)] == 3 * L
    entries = [entry for entry in report if entry.operation == attention_of(name)]
    assert [(entry.quant_key, entry.feeds, entry.note) for entry in entries] == [(None, (), "with a PagedKVCache")] * L


@every_model
def test_a_batch_in_bfloat16_chooses_what_stock_does(name, no_gathering):
    model, ids = model_of(name, torch.bfloat16), tokens(32)
    expected = model(ids).logits
    models_patch.patch(model)
    assert_same_choice(in_chunks(model, ids, paged(model), ends=(20, 31, 32)), expected)


@every_backend
@every_model
def test_packed_sequences_take_neither_mask_nor_positions(name, backend, no_gathering):
    model, prompt, text = model_of(name), [5, 6, 7, 8, 9, 10], {}
    whole = {0: [*prompt, 11, 12], 1: [*prompt[:5], 20, 21, 22, 23]}
    alone = {sequence: model(torch.tensor([ids])).logits for sequence, ids in whole.items()}
    models_patch.patch(model)
    cache = paged(model)

    def step(new: dict[int, list[int]]) -> None:
        taken = cache.step({sequence: len(ids) for sequence, ids in new.items()})
        ids = torch.tensor([[token for sequence in new.values() for token in sequence]])
        for sequence, logits in zip(new, model(ids, past_key_values=cache).logits.split(taken.counts, 1), strict=True):
            text[sequence] = torch.cat((text[sequence], logits), 1) if sequence in text else logits

    with fused_ops.use_backend(backend):
        first = cache.add()
        step({first: prompt})
        second = cache.add(prefix_of=first, length=5)  # in the middle of a block
        text[second] = text[first][:, :5]
        step({second: [20, 21, 22], first: [11]})
        step({first: [12], second: [23]})
    for sequence, expected in alone.items():
        assert_logits_close(text[sequence], expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "DeepseekV3"])
def test_generation_without_padding(name, options, no_gathering):
    model, prompt = model_of(name), tokens(7, batch=1).repeat(1, 3)
    options = {**options, "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(prompt, past_key_values=DynamicCache(), **options)
    models_patch.patch(model)
    assert torch.equal(model.generate(prompt, past_key_values=paged(model), **options), expected)


# Caches that hold codes.

SCALES = [(0.02 + layer / 100, torch.tensor([0.03, 0.04])) for layer in range(L)]  # of a layer, and of each head


def coded(model, dtype: torch.dtype) -> PagedKVCache:
    return PagedKVCache(model.config, 64, 4, dtype=dtype, scales=SCALES)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "SmolLM3"])  # rotated, normed too, and neither in some layers
def test_a_cache_of_codes(name, dtype, backend):
    """Patched, it reads codes where they are; unpatched, their values: both are what the scales say."""
    model, ids = model_of(name), tokens(12)
    exact = model(ids).logits
    expected = in_chunks(model, ids, stock := coded(model, dtype))
    assert not torch.equal(expected, exact)
    models_patch.patch(model)
    caches = [coded(model, dtype), paged(model)]
    with fused_ops.use_backend(backend):
        actual, _ = (in_chunks(model, ids, cache) for cache in caches)
    assert_logits_close(actual, expected)
    held, whole = (cache.layers[0] for cache in caches)  # whose keys and values depend on no code
    for name, scale in zip(("k_cache", "v_cache"), SCALES[0], strict=True):
        codes, values = getattr(held, name), getattr(whole, name)
        assert codes.dtype == getattr(stock.layers[0], name).dtype == dtype
        expected = formats.encode(values * (1 / torch.as_tensor(scale)).view(-1, 1), dtype)
        assert torch.equal(codes.view(torch.uint8), expected)


def test_sequences_share_blocks_of_codes():
    model, prompt = model_of("Llama"), [5, 6, 7, 8, 9, 10]
    models_patch.patch(model)
    cache, alone = coded(model, torch.float8_e4m3fn), coded(model, torch.float8_e4m3fn)
    first, other = cache.add(), alone.add()
    cache.step({first: 6})
    model(torch.tensor([prompt]), past_key_values=cache)
    second = cache.add(prefix_of=first, length=5)  # in the middle of a block, which is copied when it is written
    cache.step({second: 2})
    shared = model(torch.tensor([[20, 21]]), past_key_values=cache).logits
    alone.step({other: 7})
    expected = model(torch.tensor([[*prompt[:5], 20, 21]]), past_key_values=alone).logits[:, 5:]
    assert_logits_close(shared, expected)


def test_a_checkpoints_scales_are_its_caches(tmp_path):
    model = quantize(tiny("Llama", torch.float32, num_hidden_layers=L), "fp8_token")
    with pytest.raises(ValueError, match=r"kv_scales: model has scales of layers \[\], expected all"):
        kv_scales(model)
    for number, layer in enumerate(model.model.layers):
        for name in "k_scale", "v_scale":
            layer.self_attn.register_buffer(name, torch.tensor([0.02 + number / 100]))
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", torch.float32)
    scales = kv_scales(loaded)
    assert [k.item() for k, _ in scales] == torch.tensor([0.02 + number / 100 for number in range(L)]).tolist()

    def logits() -> torch.Tensor:
        cache = PagedKVCache(loaded.config, 64, dtype=torch.float8_e4m3fn, scales=scales)
        return loaded(tokens(), past_key_values=cache).logits

    expected = logits()
    models_patch.patch(loaded)
    assert_logits_close(logits(), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scales": SCALES}, ValueError, "scales are given, but dtype is None"),
        ({"dtype": torch.bfloat16, "scales": SCALES}, TypeError, "dtype is torch.bfloat16, expected None or one of"),
        ({"dtype": torch.int8}, TypeError, r"scales is NoneType, expected \(k_scale, v_scale\) of each layer"),
        ({"dtype": torch.int8, "scales": SCALES[1:]}, ValueError, f"scales has {L - 1}, expected {L}, "),
        ({"dtype": torch.int8, "scales": [1.0] * L}, ValueError, r"scales has 1.0 for layer 0, expected \(k_scale, v"),
        ({"dtype": torch.int8, "scales": [(1.0,) * 3] * L}, ValueError, r"scales has \(1.0, 1.0, 1.0\) for layer 0"),
        ({"dtype": torch.int8, "scales": [("1", 1.0)] * L}, TypeError, "scales has str, expected numbers or float32"),
        ({"dtype": torch.int8, "scales": [(torch.ones(1).double(), 1.0)] * L}, TypeError, "scales has torch.float64"),
        ({"dtype": torch.int8, "scales": [(10**400, 1.0)] * L}, ValueError, "expected what is positive and finite"),
        ({"dtype": torch.int8, "scales": [(1.0, torch.zeros(1))] * L}, ValueError, "expected what is positive and"),
        ({"dtype": torch.int8, "scales": [(1e-46, 1.0)] * L}, ValueError, "scales has 1e-46, expected what is"),
        ({"dtype": torch.int8, "scales": [(torch.ones(0), 1.0)] * L}, ValueError, "expected what is positive and"),
    ],
)
def test_codes_that_are_refused(options, error, message):
    with pytest.raises(error, match=f"PagedKVCache: .*{message}"):
        PagedKVCache(model_of("Llama").config, 64, **options)


def test_scales_of_other_heads_are_refused_before_anything_is_written():
    model = model_of("Llama")
    cache = PagedKVCache(model.config, 64, dtype=torch.int8, scales=[(1.0, torch.ones(3))] * L)
    with pytest.raises(ValueError, match=r"scales has a v_scale of \[3\], expected \[1\] or the \[2\] of this layer's"):
        model(torch.tensor([[1, 2]]), past_key_values=cache)
    assert cache.free_blocks == 64
    assert cache.pending is None


def test_latents_are_no_codes():
    with pytest.raises(ValueError, match=r"dtype is torch.int8, expected None: latents are held in S"):
        PagedKVCache(model_of("DeepseekV3").config, 64, dtype=torch.int8, scales=SCALES)


# Sliding windows, of which masks and attentions may say different things.

QWEN2_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
NEEDS = {"Llama": {}, "Mistral": {}, "Qwen2": {}, **FAMILIES, **UNLISTED, "Qwen2Moe": QWEN2_MOE}
CONFIGS = {name: getattr(transformers, name + "Config")() for name in NEEDS}
SLIDING = [
    (name, use)
    for name, config in CONFIGS.items()
    for use in ((True, False) if hasattr(config, "use_sliding_window") else (None,))
    if hasattr(config, "sliding_window")
]
BY_THE_MASK = [("SmolLM3", False), ("Qwen2Moe", True), ("Qwen2Moe", False)]


@pytest.mark.parametrize(("name", "use"), SLIDING)
def test_a_sliding_window_is_never_dropped(name, use):
    changes = {**NEEDS[name], "sliding_window": 4, "num_hidden_layers": L}
    if use is not None:
        changes |= {"use_sliding_window": use}
    if use or (name, use) in BY_THE_MASK:  # others have no mask for a window that isn't used
        changes |= {"layer_types": ["sliding_attention", "full_attention"]}
    model, ids = tiny(name, torch.float32, **changes), tokens(12)
    expected = model(ids, past_key_values=DynamicCache()).logits
    report = models_patch.patch(model)
    assert_logits_close(model(ids, past_key_values=paged(model)).logits, expected)
    notes = [entry.note for entry in report if entry.path.endswith("self_attn")]
    by_the_mask = (name, use) in BY_THE_MASK
    assert any("the model's: a mask lets" in note for note in notes) == by_the_mask
    assert any(entry.operation == "paged_attention" for entry in report) != by_the_mask


# Quantized for o_proj.


@pytest.mark.parametrize("scheme", ["int8_token", "fp8_static"])
@every_model
def test_attention_quantizes_for_o_proj(name, scheme, no_gathering):
    model, ids, operation = model_of(name, torch.bfloat16), tokens(9), f"{attention_of(name)}_quant"
    ignore = {"ignore": ("lm_head", "kv_b_proj")} if name.startswith("Deepseek") else {}
    models_patch.patch(model)
    quantize(model, scheme, **ignore)  # after which layers quantize for themselves
    alone = count(lambda: in_chunks(model, ids, paged(model), ends=(8, 9)))
    expected = in_chunks(model, ids, paged(model), ends=(8, 9))
    report = models_patch.patch(model)
    assert torch.equal(in_chunks(model, ids, paged(model), ends=(8, 9)), expected)
    calls = count(lambda: in_chunks(model, ids, paged(model), ends=(8, 9)))
    assert (calls[operation], calls[attention_of(name)]) == (2 * L, 0)
    fed = sum(len(entry.feeds) - (entry.operation == "quantize") for entry in report)
    assert alone["quantize"] - calls["quantize"] == 2 * fed
    entries = [entry for entry in report if entry.operation == operation]
    wanted = [layer.self_attn.o_proj.input_quant_key for layer in model.model.layers]
    assert [(entry.quant_key, entry.feeds) for entry in entries] == [(key, ("o_proj",)) for key in wanted]


# Masks, and what only an attention function does.


def _padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def _windows(ids):
    places = torch.arange(ids.shape[1])
    return ((places <= places[:, None]) & (places > places[:, None] - 3))[None, None].expand(2, 1, -1, -1)


MASKS = {
    "none": (lambda ids: None, True),
    "ones": (torch.ones_like, True),
    "left padding": (_padded, False),
    "four dimensions": (_windows, False),
    "additive": (
        lambda ids: torch.zeros(2, 1, 9, 9).masked_fill(~_windows(ids), torch.finfo(torch.float32).min),
        False,
    ),
    "zeros": (torch.zeros_like, False),
    "dict": (lambda ids: dict.fromkeys(("full_attention", "sliding_attention"), _windows(ids)), False),
}
CASES = [(name, case) for name in ("Llama", "Gemma3Text", "DeepseekV3") for case in MASKS]


@pytest.mark.parametrize(("name", "case"), [each for each in CASES if each[1] != "dict" or each[0] == "Gemma3Text"])
def test_a_mask_is_never_ignored(name, case):
    model, ids, (make, from_blocks) = model_of(name), tokens(9), MASKS[case]
    mask = make(ids)
    expected = model(ids, attention_mask=mask, past_key_values=DynamicCache()).logits
    models_patch.patch(model)
    assert_logits_close(model(ids, attention_mask=mask, past_key_values=paged(model)).logits, expected)
    calls = count(lambda: model(ids, attention_mask=mask, past_key_values=paged(model)))
    assert calls[attention_of(name)] == L * from_blocks


def test_a_model_that_always_makes_a_dict_of_masks():
    text = {**SIZES, **FAMILIES["Gemma3Text"], "num_hidden_layers": L}
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    special = {"boi_token_index": 94, "eoi_token_index": 95, "image_token_index": 96, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **special)
    model, ids = transformers.Gemma3ForConditionalGeneration(config).eval(), tokens(9).clamp(max=93)
    expected = model(ids, past_key_values=DynamicCache()).logits
    models_patch.patch(model)
    assert_logits_close(model(ids, past_key_values=paged(model)).logits, expected)


def test_padded_and_whole_calls_may_follow_each_other():
    model, ids = model_of("DeepseekV3"), tokens(9)
    expected = model(ids).logits
    models_patch.patch(model)
    cache, whole = paged(model), (torch.arange(9) <= torch.arange(4, 6)[:, None])[None, None, :, :6]
    parts = [model(ids[:, :4], past_key_values=cache), model(ids[:, 4:6], attention_mask=whole, past_key_values=cache)]
    models_patch.unpatch(model)
    parts.append(model(ids[:, 6:8], past_key_values=cache))
    models_patch.patch(model)
    parts.append(model(ids[:, 8:], past_key_values=cache))
    assert_logits_close(torch.cat([part.logits for part in parts], 1), expected)


def _both_ways(module, query, key, value, mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": False})


@pytest.mark.parametrize("name", ["Llama", "DeepseekV3"])
def test_what_only_an_attention_function_does_is_left_to_it(name, monkeypatch):
    ids = tokens(9)

    def compare(model, **options):
        models_patch.unpatch(model)
        expected = model(ids, past_key_values=DynamicCache(), **options)
        models_patch.patch(model)
        calls = count(lambda: model(ids, past_key_values=paged(model), **options))
        assert calls[attention_of(name)] == 0
        actual = model(ids, past_key_values=paged(model), **options)
        assert torch.equal(actual.logits, expected.logits)
        return actual, expected

    eager = model_of(name, attn_implementation="eager")
    actual, expected = compare(eager, output_attentions=True)
    assert all(map(torch.equal, actual.attentions, expected.attentions))
    model = model_of(name)
    compare(model.train())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "both_ways", _both_ways)
    model.eval().config._attn_implementation = "both_ways"
    compare(model)
    model.config._attn_implementation = "sdpa"
    with monkeypatch.context() as registered:
        registered.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", _both_ways)
        compare(model)
    with monkeypatch.context() as registered:
        registered.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: sdpa_mask(*args, **kwargs))
        compare(model)
    model.config.is_causal = False
    compare(model, is_causal=False)


def _other_eager(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
    return llama.repeat_kv(value, 2).transpose(1, 2).contiguous(), None


class _Peeking(llama.LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None):
        shape = None if attention_mask is None else attention_mask.shape
        hidden_states = self.embed_tokens(input_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(hidden_states, position_embeddings=position_embeddings, shape=shape)
        hidden_states = self.norm(hidden_states)
        return llama.BaseModelOutputWithPast(hidden_states)


def _with_other_eager(model, monkeypatch):
    monkeypatch.setattr(llama, "eager_attention_forward", _other_eager)


def _with_a_joined_mask(model, monkeypatch):
    window = functools.partial(create_causal_mask, and_mask_function=lambda batch, head, q, k: q - k < 3)
    monkeypatch.setattr(llama, "create_causal_mask", window)


def _with_a_mask_of_its_own(model, monkeypatch):
    monkeypatch.setattr(llama, "create_causal_mask", lambda *args, **kwargs: create_causal_mask(*args, **kwargs))


def _with_a_reader_of_masks(model, monkeypatch):
    model.model.__class__ = _Peeking


def _looking_ahead(model, monkeypatch):
    model.model.layers[1].self_attn.is_causal = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with_other_eager, "eager_attention_forward of test_patch_paged of transformers {} is not a known attention"),
        (_with_a_joined_mask, "LlamaModel.forward makes masks that aren't known"),
        (_with_a_mask_of_its_own, "LlamaModel.forward makes masks that aren't known"),
        (_with_a_reader_of_masks, "_Peeking.forward reads attention_mask elsewhere too"),
        (_looking_ahead, "this LlamaAttention isn't causal"),
    ],
)
def test_an_unknown_attention_is_left_to_the_model_and_packed_steps_need_a_mask(change, reason, monkeypatch):
    model = model_of("Llama")
    change(model, monkeypatch)
    report = models_patch.patch(model)
    notes = {entry.note for entry in report if entry.operation == "rope"}
    reason = reason.format(models_patch.families.version().partition(" ")[2])
    assert all(f"the attention function is the model's: {reason}" in note for note in notes)
    assert not [entry for entry in report if entry.operation == "paged_attention"]
    if change is not _with_a_reader_of_masks:
        _packed_step_raises(model)


@pytest.mark.parametrize("counts", [(2, 1), (2, 2)], ids=str)  # equals too: one row is no batch of theirs
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", ["Llama", "DeepseekV3"])
def test_packed_steps_raise_where_a_mask_would_be_needed(name, patched, counts):
    model = model_of(name, attn_implementation="eager")
    if patched:
        models_patch.patch(model)
        length = sum(counts)
        ones = torch.ones(1, length)  # says nothing of sequences
        _packed_step_raises(model, counts, rf"attention_mask is \[1, {length}\], so", attention_mask=ones)
        _packed_step_raises(model, counts, "output_attentions asks for weights, so", output_attentions=True)
        _packed_step_raises(model, counts, "is_causal is given, so", is_causal=True)
        if name == "DeepseekV3":
            changed = copy.deepcopy(model)
            changed.model.layers[1].self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
            _packed_step_raises(changed, counts, "kv_b_proj is quantized or hooked, so")
        _packed_step_raises(model.train(), counts, r"the model is in training mode; eval\(\) ends it, so")
        model.eval().config._attn_implementation = "both_ways"
        _packed_step_raises(model, counts, "attention 'both_ways' isn't transformers' own, so")
    else:
        _packed_step_raises(model, counts)


def _packed_step_raises(model, counts=(2, 1), reason=None, **options):
    cache = paged(model)
    cache.step({cache.add(): count for count in counts})
    message = r"take an attention_mask .* or no mask at all, where `patch` reports"
    with pytest.raises(ValueError, match=message if reason is None else reason):
        model(tokens(sum(counts), batch=1), past_key_values=cache, **options)


def test_generation_with_padding_has_stocks_bits():
    model = model_of("DeepseekV3", torch.bfloat16)
    expected = generate(model, past_key_values=DynamicCache())
    models_patch.patch(model)
    assert torch.equal(generate(model, past_key_values=paged(model)).sequences, expected.sequences)
