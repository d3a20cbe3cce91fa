"""Models cut over ranks: the same bits on all of them, patched as unpatched, and what one process computes.

Ranks are threads here, which costs no process; `bench.demo_tp`, run in test_tensor_parallel_real.py, has processes.
"""

import copy
import pickle

import pytest
import torch
from compare import assert_as_near, assert_logits_close
from patching import FAMILIES, assert_equal, count, generate, quantize, tiny, tiny_model, tokens, without_blocks
from tensor_parallel import cut, on_ranks, stepwise
from torch import nn
from transformers import DynamicCache

import fused_ops
import models_patch
from fused_ops.workspace import AllReduceWorkspace
from models_patch import patch
from models_patch.paged_cache import PagedKVCache
from models_patch.pending import Pending
from quant import FP8_DYNAMIC_TENSOR
from quant.checkpoint import save_quantized
from quant.methods import quantize_model

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture
def reference():
    with fused_ops.use_backend("reference"):
        yield


def tiny_of(name, dtype=torch.float32):
    if name == "Llama, biases":
        return tiny("Llama", dtype, **BIASES)
    return tiny_model(name, dtype) if name in FAMILIES else tiny(name, dtype)


# What is computed.


ONCE = ["Llama", "Qwen3", "Glm4", "Granite", "Olmo2", "DeepseekV2", "SmolLM3", "Mixtral"]
TWICE = ["Llama, biases", "Gemma3Text", "Phi3", "MiniMaxM2", "GptOss", "DeepseekV3"]  # and keys that ranks share


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in ONCE + TWICE] + [(4, name) for name in TWICE])
def test_ranks_compute_what_one_process_does(reference, world, name):
    model = tiny_of(name)
    expected, in_parts = model(tokens()).logits, stepwise(model, DynamicCache(config=model.config))

    def run(group):
        part, _ = cut(model, group)
        plain = part(tokens()).logits, generate(part).logits
        report = patch(part)
        fused = part(tokens()).logits, generate(part).logits
        calls = count(lambda: part(tokens()))
        paged = stepwise(part, PagedKVCache(part.config, 16))
        models_patch.unpatch(part)
        return *plain, *fused, calls, without_blocks(report), paged, part(tokens()).logits

    first, *others = on_ranks(world, run)
    plain, written, fused, fused_written, calls, reported, paged, unpatched = first
    assert_logits_close(plain, expected)
    assert torch.equal(fused, plain)
    assert_equal(fused_written, written)
    assert torch.equal(unpatched, plain)
    assert calls == reported
    assert_logits_close(paged, in_parts)
    for other in others:
        assert_equal([*other[:1], *other[1], *other[2:3], other[6]], [plain, *written, fused, paged])


@pytest.mark.parametrize("scheme", [None, "int8_token"])
@pytest.mark.parametrize("name", ["Llama, biases", "Gemma3Text", "MiniMaxM2"])
def test_one_rank_has_the_bits_of_a_model_that_is_not_cut(name, scheme):
    model = tiny_of(name, torch.bfloat16)

    def logits(model):
        if scheme is not None:
            quantize(model, scheme)
        patch(model)
        return model(tokens()).logits

    (actual,) = on_ranks(1, lambda group: logits(cut(model, group)[0]))
    assert torch.equal(actual, logits(model))


def test_a_rank_has_its_heads_and_columns_alone(reference):
    model = tiny("Llama", **BIASES)

    def run(group):
        part, report = cut(model, group)
        return part, report

    parts = on_ranks(2, run)
    attentions = [part.model.layers[1].self_attn for part, _ in parts]
    mlps = [part.model.layers[1].mlp for part, _ in parts]
    whole = model.model.layers[1]
    for name in "q_proj", "k_proj", "v_proj":
        both = [getattr(attention, name) for attention in attentions]
        assert torch.equal(torch.cat([linear.weight for linear in both]), getattr(whole.self_attn, name).weight)
        assert torch.equal(torch.cat([linear.bias for linear in both]), getattr(whole.self_attn, name).bias)
        assert both[0].out_features == len(both[0].weight)
    for linears, stock in (
        ([attention.o_proj for attention in attentions], whole.self_attn.o_proj),
        ([mlp.down_proj for mlp in mlps], whole.mlp.down_proj),
    ):
        assert torch.equal(torch.cat([linear.weight for linear in linears], 1), stock.weight)
        assert torch.equal(linears[0].bias, stock.bias)
        assert linears[1].bias is None
    assert "rank 1 of 2, 6 modules cut over the ranks, 0 left whole" in str(parts[1][1])
    assert {entry.note for entry in parts[0][1]} == {"2 of 4 heads, 1 of 2 of keys", "80 of 160 columns"}
    assert parts[0][1].entries == parts[1][1].entries


def test_what_does_not_divide_stays_whole(reference):
    model = tiny("Llama", torch.float32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=96)
    expected = model(tokens()).logits

    def run(group):
        part, report = cut(model, group)
        patched = patch(part)
        return part(tokens()).logits, report, patched, count(lambda: part(tokens()))

    logits, report, patched, calls = on_ranks(3, run)[1]
    assert_logits_close(logits, expected)
    assert [entry.note for entry in report.left] == ["its 4 heads on 4 of keys don't divide by 3 ranks"] * 3
    assert [entry.note for entry in report.replaced] == ["32 of 96 columns"] * 3
    assert calls == without_blocks(patched)
    assert calls["all_reduce_fused_add_rms_norm"] == calls["fused_add_rms_norm"] == 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_left_padding(cache):
    model = tiny_model("Qwen3")

    def run(group):
        part, _ = cut(model, group)
        patch(part)
        return generate(part, cache)

    first, second = on_ranks(2, run)
    assert torch.equal(first.sequences, second.sequences)
    assert_equal(first.logits, second.logits)


def test_hidden_states_are_sums(reference):
    model = tiny()

    def run(group):
        part, _ = cut(model, group)
        expected = part(tokens(), output_hidden_states=True).hidden_states
        patch(part)
        return part(tokens(), output_hidden_states=True).hidden_states, expected

    first, second = on_ranks(2, run)
    assert_equal(first[0], first[1])
    assert_equal(first[0], second[0])


def test_who_gets_a_pending_has_the_sum_by_asking(reference):
    model = tiny()

    def run(group):
        part, _ = cut(model, group)
        seen = []
        part.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        part(tokens())
        patch(part)
        part.model.layers[0]._forward_hooks.clear()
        part.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        part(tokens())
        assert isinstance(seen[1], Pending)
        return seen[0], seen[1].sum()

    for expected, actual in on_ranks(2, run):
        assert torch.equal(actual, expected)


# Quantized layers.


@pytest.mark.parametrize("scheme", ["int8_token", "fp8_static", "int8_static_asym", "mxfp8", "nvfp4"])
def test_quantized_after_it_was_cut(reference, scheme):
    model = tiny("Llama", torch.float32, intermediate_size=128)
    exact = model(tokens()).logits
    whole = quantize(copy.deepcopy(model), scheme)(tokens()).logits

    def run(group):
        part, _ = cut(model, group)
        quantize(part, scheme)
        expected = part(tokens()).logits
        report = patch(part)
        calls = count(lambda: part(tokens()))
        del calls["scaled_linear"], calls["quantize"]  # which is o_proj's, whose input isn't from blocks here
        return part(tokens()).logits, expected, calls, without_blocks(report)

    results = on_ranks(2, run)
    for actual, expected, calls, reported in results:
        assert torch.equal(actual, expected)
        assert calls == reported
        assert calls["all_reduce_fused_add_rms_norm_quant"] == 5  # two a layer, but for the last norm
    assert torch.equal(results[0][0], results[1][0])
    assert_as_near(results[0][0], exact, whole)


def test_scales_over_columns_are_those_of_a_ranks_own():
    model = tiny("Llama", torch.float32)
    whole = quantize(copy.deepcopy(model), "int8_token").model.layers[0]

    def run(group):
        part, _ = cut(model, group)
        return quantize(part, "int8_token").model.layers[0]

    parts = on_ranks(2, run)
    for name in "weight", "weight_scale":
        ups = torch.cat([getattr(part.mlp.up_proj, name) for part in parts])
        assert torch.equal(ups, getattr(whole.mlp.up_proj, name))
    downs = torch.stack([part.mlp.down_proj.weight_scale for part in parts])
    assert torch.equal(downs.amax(0), whole.mlp.down_proj.weight_scale)
    assert not torch.equal(downs[0], downs[1])


def test_one_dynamic_scale_for_the_tensor_is_left_to_the_layer(reference):
    """A norm that sums over ranks has rows, never the whole tensor; one after that may quantize so."""

    model = tiny(num_hidden_layers=1)

    def run(group):
        part, _ = cut(model, group)
        for layer in part.model.layers:
            for linears in layer.self_attn, layer.mlp:
                for child in linears.children():
                    if isinstance(child, nn.Linear):
                        child.input_quant = lambda prefix="": {prefix + "quant_key": FP8_DYNAMIC_TENSOR}
        return patch(part)

    report = on_ranks(1, run)[0]
    by_path = {entry.path: entry for entry in report if entry.operation and "norm" in entry.operation}
    assert by_path["model.layers.0.input_layernorm"].operation == "rms_norm_quant"
    after = by_path["model.layers.0.post_attention_layernorm"]
    assert after.operation == "all_reduce_fused_add_rms_norm"
    assert after.note == "gate_proj takes one scale for the whole tensor, so each quantizes its input"


def test_so_are_experts_whose_router_then_reads_a_plain_tensor(reference):
    model = tiny_model("Qwen3Moe", num_hidden_layers=1)

    def run(group):
        part, _ = cut(model, group)
        quantize(part, "fp8_token")
        part.model.layers[0].mlp.experts.input_quant = lambda prefix="": {prefix + "quant_key": FP8_DYNAMIC_TENSOR}
        expected = part(tokens()).logits
        patch(part)
        return torch.equal(part(tokens()).logits, expected)

    assert on_ranks(1, run) == [True]


# Copies, state dicts, refusals.


def test_a_copy_shares_the_memory_and_loads_state_dicts(reference):
    model = tiny_model("MiniMaxM2")

    def run(group):
        part, _ = cut(model, group)
        patch(part)
        expected = part(tokens()).logits
        other = copy.deepcopy(part)
        for parameter in other.parameters():
            parameter.data.zero_()
        changed = other(tokens()).logits
        other.load_state_dict(part.state_dict())
        with pytest.raises(TypeError, match=r"can't be pickled.*state_dict"):
            pickle.dumps(part)
        loaded = other(tokens()).logits
        models_patch.unpatch(other)  # the first stays patched
        return expected, loaded, other(tokens()).logits, changed

    for expected, loaded, unpatched, changed in on_ranks(2, run):
        assert torch.equal(loaded, expected)
        assert torch.equal(unpatched, expected)
        assert not torch.equal(changed, expected)


def refusal(model, columns=64, dtype=torch.bfloat16):
    """What `shard` says to this model, which must stay as it was."""
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    def run(group):
        workspace = AllReduceWorkspace(group, 4, columns, dtype)
        with pytest.raises((TypeError, ValueError)) as caught:
            models_patch.shard(model, workspace)
        return str(caught.value)

    message = on_ranks(1, run)[0]
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    return message


def test_refusals_name_the_argument():
    assert refusal(nn.Linear(4, 4)).startswith("shard: model is Linear, expected one of LlamaModel")
    assert "; LayerNorm.forward of transformers" in refusal(tiny("Phimoe", num_local_experts=4))
    assert "workspace has rows of 64 bytes, expected at least the 128 of" in refusal(tiny(), columns=32)
    patched = tiny()
    models_patch.patch(patched)
    assert "model is patched" in refusal(patched)
    assert "q_proj is quantized: shard the model first, then quantize it" in refusal(quantize(tiny(), "int8_token"))
    with pytest.raises(TypeError, match="shard: workspace is NoneType, expected an AllReduceWorkspace"):
        models_patch.shard(tiny(), None)
    with pytest.raises(TypeError, match=r"shard: model is str, expected a torch\.nn\.Module"):
        models_patch.shard("model", None)


def test_a_closed_workspace_is_refused_before_anything_is_cut():
    model = tiny()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    def run(group):
        workspace = AllReduceWorkspace(group, 4, 64, torch.bfloat16)
        workspace.close()
        with pytest.raises(ValueError, match="shard: workspace is closed, expected one that is open"):
            models_patch.shard(model, workspace)

    on_ranks(1, run)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before


def test_what_takes_the_model_for_whole_is_refused(tmp_path):
    """Also on a copy, inside of the model, patched and unpatched."""
    whole = tiny()

    def run(group):
        part, _ = cut(whole, group)
        patch(part)
        copied = copy.deepcopy(part)
        models_patch.unpatch(copied)
        quantized = quantize_model(copy.deepcopy(copied), "int8_token")
        for model in part, part.model, copied, quantized:
            with pytest.raises(
                RuntimeError, match=r"save_pretrained: the model is cut over 2 ranks.*save before shard"
            ):
                model.save_pretrained(tmp_path)
        for model in part, copied:
            with pytest.raises(RuntimeError, match=r"generate_batch: the model is cut over 2 ranks.*PagedKVCache"):
                model.generate_batch([[1, 2, 3]])
            with pytest.raises(RuntimeError, match="init_continuous_batching: the model is cut"):
                model.init_continuous_batching()
        quantize(copied, "int8_token")
        with pytest.raises(ValueError, match=r"save_quantized: model is cut over 2 ranks"):
            save_quantized(copied, tmp_path / "model")

    on_ranks(2, run)
    assert not list(tmp_path.iterdir())
    whole.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir())


def test_a_model_is_cut_once():
    model = tiny()

    def run(group):
        part, _ = cut(model, group)
        with pytest.raises(ValueError, match=r"shard: model is cut already, at model\.layers\.0\.self_attn"):
            models_patch.shard(part, AllReduceWorkspace(group, 4, 64, torch.bfloat16))

    on_ranks(1, run)


class Adapted(nn.Linear):
    """A layer that adds something of its own."""


def test_layers_that_are_more_than_a_product_are_left_by_name(reference):
    model = tiny("Llama", torch.float32)
    layers = model.model.layers
    layers[0].mlp.up_proj.__class__ = Adapted
    layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: 2 * output)
    layers[1].mlp.down_proj.weight = layers[2].mlp.down_proj.weight
    layers[1].mlp.act_fn = nn.Softmax(-1)
    expected = model(tokens()).logits

    def run(group):
        part, report = cut(model, group)
        return part(tokens()).logits, report

    first, second = on_ranks(2, run)
    assert_logits_close(first[0], expected)
    assert torch.equal(first[0], second[0])
    notes = {entry.path.removeprefix("model.layers."): entry.note for entry in first[1].left}
    assert notes["0.self_attn"] == "k_proj has a forward or hooks of its own"
    assert notes["0.mlp"] == "up_proj is Adapted"
    assert notes["1.mlp"].startswith("Softmax.forward")
    assert notes["2.mlp"] == "down_proj shares its weight with another module"
    assert {entry.path for entry in first[1].replaced} == {"model.layers.1.self_attn", "model.layers.2.self_attn"}


def test_experts_and_unknown_attentions_are_left_by_name():
    experts, other = tiny_model("Qwen3Moe"), tiny()
    other.model.layers[1].self_attn.forward = lambda *args, **kwargs: None

    def run(group):
        return cut(experts, group)[1], cut(other, group)[1]

    moe, unknown = on_ranks(2, run)[0]
    assert {entry.note for entry in moe.left} == {"router and experts stay whole on every rank"}
    assert len(moe.left) == len(moe.replaced) == 2
    assert {entry.path.rpartition(".")[2] for entry in unknown.left} == {"self_attn"}
    assert all("has been replaced by something else" in entry.note for entry in unknown.left)
