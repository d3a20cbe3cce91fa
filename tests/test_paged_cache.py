"""A cache in blocks gives the bits of one that grows; sequences share blocks and never see each other's tokens.

A patched model that reads its blocks in place adds up in another order, so its logits are close.
"""

import pytest
import torch
from compare import assert_logits_close
from patching import assert_equal, count, generate, tiny, tiny_model, tokens
from transformers import DynamicCache

import fused_ops
import models_patch
from models_patch.paged_cache import OutOfBlocks, PagedKVCache


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"), torch.no_grad():
        yield


# As the cache of `generate`.


def paged(model, num_blocks: int = 64, block_size: int = 4) -> PagedKVCache:
    return PagedKVCache(model.config, num_blocks, block_size)


def assert_same_generation(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    assert_equal(actual.logits, expected.logits)


def assert_close_generation(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    for a, e in zip(actual.logits, expected.logits, strict=True):
        assert_logits_close(a, e)


GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
# Stock gets a cache whose sliding layers have the whole past too: sums over fewer keys have other bits.
FUSED = {"Llama": "rope", "Qwen3": "qk_norm_rope", "Gemma3Text": "qk_norm_rope", "SmolLM3": "rope", "GptOss": "rope"}


@pytest.mark.parametrize("name", FUSED)
def test_generation_with_left_padding(name):
    model = tiny(name, num_hidden_layers=2) if name == "Llama" else tiny_model(name)
    expected = generate(model, past_key_values=DynamicCache())
    cache = paged(model)
    assert_same_generation(generate(model, past_key_values=cache), expected)
    assert cache.free_blocks == 64 - 2 * 3  # 12 tokens each: the last one is never put in
    models_patch.patch(model)
    assert_same_generation(generate(model, past_key_values=paged(model)), expected)
    calls = count(lambda: generate(model, past_key_values=paged(model)))
    rotating = 1 if name == "SmolLM3" else 2
    assert {name: n for name, n in calls.items() if "rope" in name} == {f"{FUSED[name]}_kv_cache_write": 6 * rotating}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_beams_share_blocks_and_rejected_guesses_are_cropped(options, patched):
    model, prompt = tiny(dtype=torch.float32, num_hidden_layers=2), tokens(7, batch=1).repeat(1, 3)
    options = {
        **options,
        "max_new_tokens": 9,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(prompt, **options)
    if patched:
        models_patch.patch(model)
    cache = paged(model)
    actual = model.generate(prompt, past_key_values=cache, **options)
    (assert_close_generation if patched else assert_same_generation)(actual, expected)
    beams = options.get("num_beams", 1)
    assert cache.free_blocks >= 64 - 5 - 4 * beams  # five full blocks of the prompt once
    cache.reset()
    assert cache.free_blocks == 64


def test_rows_of_a_batch_are_repeated_selected_and_forgotten():
    cache = paged(tiny(), num_blocks=8)
    k = torch.arange(2 * 3.0)[:, None, None].expand(6, 2, 8).view(2, 3, 2, 8).transpose(1, 2)
    for layer in range(3):
        cache.update(k, -k, layer)
    cache.batch_repeat_interleave(2)
    assert (cache.batch_size, cache.free_blocks) == (4, 6)
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    keys, values = cache.update(k[:, :, :1] + 9, k[:, :, :1] - 9, 0)
    assert keys[..., 0, :, 0].tolist() == [[0, 1, 2, 9], [3, 4, 5, 12]]
    assert values[..., 1, :, 7].tolist() == [[0, -1, -2, -9], [-3, -4, -5, -6]]
    assert (cache.get_seq_length(), cache.get_mask_sizes(5, 0)) == (4, (9, 0))
    cache.reset()
    assert (cache.get_seq_length(), cache.free_blocks, cache.batch_size) == (0, 8, -1)
    assert cache.update(k, k, 0)[0].shape == k.shape


def test_a_compiled_model_takes_it_too():
    torch._dynamo.reset()
    model = tiny(dtype=torch.float32, num_hidden_layers=1)
    models_patch.patch(model)
    compiled, caches = torch.compile(model, backend="eager"), [paged(model), DynamicCache()]
    for length in 7, 1, 3:
        actual = compiled(tokens(length), past_key_values=caches[0])
        assert_logits_close(actual.logits, model(tokens(length), past_key_values=caches[1]).logits)


# With sequences that an engine names.


def engine_step(model, cache, new: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    """The logits of each sequence's new tokens, of all sequences in one row."""
    step = cache.step({sequence: len(ids) for sequence, ids in new.items()})
    owner = torch.arange(len(new)).repeat_interleave(step.seq_lens)
    position = torch.cat([torch.arange(length) for length in step.lengths])
    query = torch.arange(len(new)).repeat_interleave(torch.tensor(step.counts))
    mask = (owner == query[:, None]) & (position <= step.positions[:, None])
    ids = torch.tensor([[token for sequence in new.values() for token in sequence]])
    logits = model(
        ids, position_ids=step.positions[None], past_key_values=cache, attention_mask=mask[None, None]
    ).logits
    return dict(zip(new, logits[0].split(step.counts), strict=True))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_sequences_of_an_engine_are_what_each_is_alone(name, patched):
    model = tiny("Llama", torch.float32) if name == "Llama" else tiny_model(name, torch.float32)
    prompt, text = [5, 6, 7, 8, 9, 10], {}
    alone = {
        n: model(torch.tensor([ids])).logits[0]
        for n, ids in {0: [*prompt, 11, 12], 1: [*prompt[:5], 20, 21, 22, 23]}.items()
    }
    if patched:
        models_patch.patch(model)
    cache = paged(model)
    first = cache.add()
    text[first] = [engine_step(model, cache, {first: prompt})[first]]
    second = cache.add(prefix_of=first, length=5)
    text[second] = [text[first][0][:5]]
    for new in {second: [20, 21, 22], first: [11]}, {first: [12], second: [23]}:
        for sequence, logits in engine_step(model, cache, new).items():
            text[sequence].append(logits)
    for sequence, parts in text.items():
        # float32: sums over other sequences' keys, which weigh nothing, are in another order
        torch.testing.assert_close(torch.cat(parts), alone[sequence], rtol=1e-4, atol=1e-4)
    assert cache.free_blocks == 64 - 4  # one of five shared


def test_the_fused_write_takes_layers_and_steps_as_they_are():
    cache = paged(tiny())
    q, k, v = (torch.randn(5, heads, 8) for heads in (4, 2, 2))
    cache.step({cache.add(): 5})
    slots = cache.slots(k.transpose(0, 1)[None], v.transpose(0, 1)[None], 1)
    rows = torch.cat((torch.ones(5, 4), torch.zeros(5, 4)), dim=-1)  # turned by nothing
    layer = cache.layers[1]
    assert not layer.k_cache.any()  # nothing that a masked weight of zero would turn into NaN
    fused_ops.rope_kv_cache_write(q, k, v, None, rows, layer.k_cache, layer.v_cache, cache.current.slot_mapping)
    assert_equal(slots.read(), (k.transpose(0, 1)[None], v.transpose(0, 1)[None]))


def test_generate_goes_on_from_a_shared_prefix():
    model = tiny(dtype=torch.float32, num_hidden_layers=2)
    models_patch.patch(model)
    prefix = tokens(9, batch=1)
    prompts = torch.cat((prefix.repeat(2, 1), tokens(3)), dim=1)
    options = {**GREEDY, "max_new_tokens": 4}
    start = DynamicCache()
    model(prefix.repeat(2, 1), past_key_values=start)
    expected = model.generate(prompts, past_key_values=start, **options)
    cache = paged(model)
    system = cache.add()
    engine_step(model, cache, {system: prefix[0].tolist()})
    cache.set_rows([cache.add(prefix_of=system) for _ in range(2)])
    assert cache.free_blocks == 64 - 3
    assert_close_generation(model.generate(prompts, past_key_values=cache, **options), expected)
    cache.reset()
    assert cache.free_blocks == 64 - 3  # the prefix is there for others


# Out of blocks, and other mistakes.


@pytest.mark.parametrize("patched", [False, True])
def test_running_sequences_lose_nothing_when_blocks_run_out(patched):
    model = tiny(num_hidden_layers=2)
    if patched:
        models_patch.patch(model)
    whole, cache = paged(model), paged(model, num_blocks=6)
    running, expected = cache.add(), whole.add()
    for each, sequence in (cache, running), (whole, expected):
        engine_step(model, each, {sequence: [5, 6, 7, 8, 9, 10]})
    message = r"2 sequences need 6 more blocks of 4 tokens, and 4 of 6 are free; nothing has changed"
    with pytest.raises(OutOfBlocks, match=message):
        cache.step({running: 1, cache.add(): 24})
    cache.reset()
    with pytest.raises(OutOfBlocks, match="2 sequences need 2 more blocks"):
        generate(model, past_key_values=cache)
    cache.reset()
    assert cache.free_blocks == 4
    with pytest.raises(OutOfBlocks, match="4 sequences need 12 more"):  # at once: no rows are left behind
        model(tokens(9, batch=4), past_key_values=cache)
    assert (cache.free_blocks, cache.rows) == (4, [])
    actual = engine_step(model, cache, {running: [11, 12, 13]})[running]
    assert torch.equal(actual, engine_step(model, whole, {expected: [11, 12, 13]})[expected])
