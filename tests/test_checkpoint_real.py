"""SmolLM2's weights in checkpoints of several formats, against decoding them and running in float32."""

import pytest
import torch
from checkpoints import reference, write, write_compressed_tensors
from compare import assert_as_near, assert_logits_close
from safetensors.torch import load_file
from test_checkpoint import BY_HAND, COMPRESSED

import models_patch
from bench import models
from quant.checkpoint import load_quantized
from quant.methods import QuantLinear

NAMES = ["fp8-dynamic", "int8", "nvfp4", "deepseek-ue8m0", "modelopt-mxfp8"]


LAYERS = 3  # of its 30, the first: what differs between formats is in each


def smollm2():
    model, tokenizer = models.load("smollm2", torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    return model.requires_grad_(False), models.tokens(tokenizer)[:, :24]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_smollm2(name, tmp_path):
    model, ids = smollm2()
    exact = model(ids).logits
    if name in COMPRESSED:
        preset, change, key = COMPRESSED[name]
        write_compressed_tensors(model, tmp_path, preset, change=change)
    else:
        quantization, convert, key = BY_HAND[name]
        write(model, tmp_path, quantization, convert)
    tensors = load_file(tmp_path / "model.safetensors")
    loaded = load_quantized(tmp_path, torch.float32)
    layers = {path: m for path, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 7 * LAYERS
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = reference(smollm2()[0], tensors, dict.fromkeys(layers, key))
    for path in "model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj":
        x = torch.randn(5, layers[path].in_features)
        assert_logits_close(layers[path](x), expected.get_submodule(path)(x))
    theirs = expected(ids).logits
    assert_as_near(loaded(ids).logits, exact, theirs)
    models_patch.patch(loaded)
    assert_as_near(loaded(ids).logits, exact, theirs)
