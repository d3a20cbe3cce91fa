"""Passes over rows: every family gets the operations that `patch` gives it, at the same modules, with the same bits."""

import copy

import pairwise
import pytest
import torch
from passes import Compiled, by_hand, by_passes, heads_by_hand, heads_put_in, same_on_both_backends
from patching import FAMILIES, UNLISTED, quantize, tiny, tokens, without_blocks
from tensor_parallel import cut, on_ranks

import models_patch
from quant.methods import SCHEMES


def both(model):
    """(compiled, patched, the report on the latter)"""
    patched = copy.deepcopy(model)
    report = models_patch.patch(patched)
    return Compiled(model), patched, report


def assert_same_bits(compiled, patched):
    run = lambda model: model(tokens(), use_cache=False).logits  # noqa: E731
    assert same_on_both_backends(lambda: run(compiled), lambda: run(patched))


# Of those that are alike, one or two; with --full all.
SOME = ["Llama", "Qwen3", "Gemma3Text", "DeepseekV3", "Granite", "Phi3", "GptOss", "MiniMaxM2", "Olmo2", "SmolLM3"]
SOME_SCHEMES = ["int8_token", "int8_static_asym", "fp8_static", "fp8_block", "nvfp4"]


@pytest.mark.parametrize("name", ["Llama", *FAMILIES, *UNLISTED] if pairwise.everything else SOME)
def test_as_by_hand(name):
    model = tiny(name, **{"num_hidden_layers": 2, **{**FAMILIES, **UNLISTED}.get(name, {})})
    compiled, patched, report = both(model)
    assert_same_bits(compiled, patched)
    assert by_passes(compiled.sites) == by_hand(report)
    assert heads_put_in(compiled.manager.report()) == heads_by_hand(report)


@pytest.mark.parametrize("scheme", SCHEMES if pairwise.everything else SOME_SCHEMES)
def test_as_by_hand_quantized(scheme):
    model = quantize(tiny("Qwen3", **FAMILIES["Qwen3"], num_hidden_layers=1), scheme)
    compiled, patched, report = both(model)
    assert_same_bits(compiled, patched)
    assert by_passes(compiled.sites) == by_hand(report)
    # Equal static scales are one to `patch`, which reads them; to a graph they are several.
    shared = not SCHEMES[scheme].calibrated
    assert compiled.calls["quantize"] == (1 if shared else 4)  # of the attention's result; and k's, v's, up's


@pytest.mark.parametrize(
    "name", ["DeepseekV3", "Gemma2", "Olmo2", "Granite", "Phi3"][: 5 if pairwise.everything else 2]
)
def test_at_least_as_by_hand_quantized(name):
    # Passes quantize in more places: for `kv_b_proj`, and for those experts that aren't routed.
    model = quantize(tiny(name, **FAMILIES[name], num_hidden_layers=2), "int8_token")
    compiled, patched, report = both(model)
    assert_same_bits(compiled, patched)
    found, expected = by_passes(compiled.sites), by_hand(report)
    for path, operation in expected:
        assert {(path, operation), (path, operation + "_quant")} & set(found), (path, operation)


def test_zero_points_of_granite():
    model = quantize(tiny("Granite", **FAMILIES["Granite"], num_hidden_layers=1), "int8_static_asym")
    compiled, patched, report = both(model)
    assert_same_bits(compiled, patched)
    assert by_passes(compiled.sites) == by_hand(report)


CUT = ["Llama", "MiniMaxM2", "Gemma3Text", "Qwen3", "DeepseekV3"]


@pytest.mark.parametrize("name", CUT if pairwise.everything else CUT[:1])
def test_cut_over_ranks_as_by_hand(name):
    model = tiny(name, **FAMILIES.get(name, {}), num_hidden_layers=2)

    def run(group):
        part, _ = cut(model, group)
        compiled, patched, report = both(part)
        made, expected = (function(tokens(), use_cache=False).logits for function in (compiled, patched))
        return torch.equal(made, expected), compiled, report

    for same, compiled, report in on_ranks(2, run):
        assert same
        assert by_passes(compiled.sites) == by_hand(report)
        assert heads_put_in(compiled.manager.report()) == heads_by_hand(report)
        assert {n: t for n, t in compiled.calls.items() if "reduce" in n} == {
            n: t for n, t in without_blocks(report).items() if "reduce" in n
        }


def test_any_number_of_tokens():
    model = tiny("Llama", num_hidden_layers=1)
    patched = copy.deepcopy(model)
    report = models_patch.patch(patched)
    compiled = Compiled(model, dynamic=True)
    for length in 7, 5:
        expected = patched(tokens(length), use_cache=False).logits
        assert torch.equal(compiled(tokens(length), use_cache=False).logits, expected)
    assert by_passes(compiled.sites) == by_hand(report)  # in one graph
