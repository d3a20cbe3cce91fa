"""Real models, rewritten as graphs: the patched model's bits, by PyTorch's own kernels; by generated code, its own."""

import gc

import pairwise
import pytest
import torch
from compare import assert_as_near_as
from passes import Compiled, by_hand, by_passes, heads_by_hand, heads_put_in

import models_patch
from bench import models
from models_patch.passes import inductor_options

TOKENS, MORE = 20, 4


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    """(name, model, tokens)"""
    model, tokenizer = models.load(request.param, torch.bfloat16)
    yield request.param, model, models.tokens(tokenizer)[:, : TOKENS + MORE]
    del model
    gc.collect()


def continued(model, ids):
    """(tokens with the last ones the model's own choice, the logits behind them)"""
    ids = ids.clone()
    ids[:, TOKENS:] = 0  # of one length, so that there is one graph; no token sees those behind it
    for index in range(TOKENS, TOKENS + MORE):
        logits = model(ids, use_cache=False, logits_to_keep=MORE + 1).logits
        ids[:, index] = logits[:, index - TOKENS].argmax(-1)
    return ids, logits


@torch.no_grad()
def test_without_codegen_it_is_the_patched_model(real, monkeypatch):
    name, model, ids = real
    if name == "gemma3" and not pairwise.everything:  # five with a window, one without; `--full` takes all 18
        monkeypatch.setattr(model.model, "layers", model.model.layers[:6])
    compiled = Compiled(model)
    found, logits = continued(compiled, ids)
    report = models_patch.patch(model)
    expected, of_patched = continued(model, ids)
    models_patch.unpatch(model)
    assert torch.equal(logits, of_patched)
    assert torch.equal(found, expected)
    assert by_passes(compiled.sites) == by_hand(report)
    assert heads_put_in(compiled.manager.report()) == heads_by_hand(report)


# Generated code keeps the float32 that it has between operations that it fuses, where eager code rounds to bfloat16.
# What passes put in isn't fused by it, so there is less of that than without passes.
@pytest.mark.usefixtures("fresh_compiler")
def test_generated_code_is_as_near_to_the_patched_model_as_to_stock(real, monkeypatch):
    name, model, ids = real
    if name != "smollm2" and not pairwise.everything:
        pytest.skip("code is generated for one of them")
    monkeypatch.setattr(model.model, "layers", model.model.layers[:2])  # a whole model takes a minute

    def hidden(function):
        torch._dynamo.reset()
        return function(ids, use_cache=False).last_hidden_state

    options = inductor_options()
    rewritten, generated = (hidden(torch.compile(model.model, options=o)) for o in (options, None))
    stock = hidden(model.model)
    models_patch.patch(model)
    patched = hidden(model.model)
    models_patch.unpatch(model)
    assert models_patch.passes.report(options).operations["silu_mul" if name == "smollm2" else "gelu_tanh_mul"] == 2
    assert not torch.equal(generated, stock)
    assert_as_near_as(rewritten, patched, generated, stock)
