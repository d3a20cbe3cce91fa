"""Checkpoints of every format, written as their tools do, load into layers that compute what the files say."""

import json
import re
from functools import partial

import pytest
import torch
from checkpoints import (
    autofp8,
    by_rows,
    decoded,
    deepseek,
    modelopt_blocks,
    modelopt_nvfp4,
    mxfp8,
    reference,
    write,
    write_compressed_tensors,
)
from compare import assert_as_near, assert_logits_close, assert_same
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.lifecycle.forward import dequantize
from patching import tiny, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import fused_ops
import models_patch
from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
)
from quant.checkpoint import load_quantized
from quant.methods import QuantLinear

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
LAYERS = 14


def stock(dtype=torch.float32, **changes):
    return tiny(dtype=dtype, **{**SIZES, **changes})


def set_inputs(**changes):
    return lambda scheme: [setattr(scheme.input_activations, name, value) for name, value in changes.items()]


def set_blocks_of_64(scheme) -> None:
    scheme.weights.block_structure, scheme.input_activations.group_size = [64, 64], 64


STATIC = {"strategy": "tensor", "dynamic": False}
COMPRESSED = {  # preset, change of it, the input's key
    "fp8": ("FP8", None, FP8_STATIC_TENSOR),
    "fp8-dynamic": ("FP8_DYNAMIC", None, FP8_DYNAMIC_TOKEN),
    "fp8-dynamic-tensor": ("FP8_DYNAMIC", set_inputs(strategy="tensor"), FP8_DYNAMIC_TENSOR),
    "fp8-block": ("FP8_BLOCK", None, FP8_DYNAMIC_GROUP_128),
    "fp8-block-64": ("FP8_BLOCK", set_blocks_of_64, FP8_DYNAMIC_GROUP_64),
    "int8": ("W8A8", None, INT8_DYNAMIC_TOKEN),
    "int8-asym": ("W8A8", set_inputs(symmetric=False), INT8_DYNAMIC_TOKEN_ASYM),
    "int8-static": ("W8A8", set_inputs(**STATIC), INT8_STATIC_TENSOR),
    "int8-static-asym": ("W8A8", set_inputs(**STATIC, symmetric=False), INT8_STATIC_TENSOR_ASYM),
    "nvfp4": ("NVFP4", None, NVFP4),
    "mxfp8": ("MXFP8", None, MXFP8),
    "mxfp4": ("MXFP4", None, MXFP4),
}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
POWERS = FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True)


def nested(algorithm: str, **more) -> dict:
    """As hf_quant_config.json."""
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt", "version": "0.41.0"}, "quantization": quantization}


def modelopt(algorithm: str, **more) -> dict:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


def ue8m0(weight, number):
    return deepseek(weight, number, powers=True)


def mxfp8_inv(weight, number):
    return mxfp8(weight, number, name="weight_scale_inv")


def autofp8_dynamic(weight, number):
    return {name: value for name, value in autofp8(weight, number).items() if name != "input_scale"}


def vector(weight, number):
    return by_rows(weight, number, shape=(-1,))


BY_HAND = {  # configuration, a layer's tensors, the input's key
    "deepseek": (DEEPSEEK, deepseek, FP8_DYNAMIC_GROUP_128),
    "deepseek-ue8m0": ({**DEEPSEEK, "scale_fmt": "ue8m0"}, ue8m0, POWERS),
    "deepseek-64": ({**DEEPSEEK, "weight_block_size": [64, 64]}, partial(deepseek, size=64), FP8_DYNAMIC_GROUP_64),
    "deepseek-mxfp8": ({**DEEPSEEK, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, mxfp8_inv, MXFP8),
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static"}, autofp8, FP8_STATIC_TENSOR),
    "autofp8-dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, autofp8_dynamic, FP8_DYNAMIC_TOKEN),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 3.0}, by_rows, FP8_DYNAMIC_TOKEN),
    "modelopt-fp8": (modelopt("FP8"), autofp8, FP8_STATIC_TENSOR),
    "modelopt-fp8-rows": (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), vector, FP8_DYNAMIC_TOKEN),
    "modelopt-fp8-blocks": (modelopt("FP8_PB_WO"), modelopt_blocks, FP8_DYNAMIC_GROUP_128),
    "modelopt-nvfp4": (modelopt("NVFP4", group_size=16), modelopt_nvfp4, NVFP4),
    "modelopt-nvfp4-nested": (nested("NVFP4", group_size=16), modelopt_nvfp4, NVFP4),
    "modelopt-fp8-nested": (nested("FP8"), autofp8, FP8_STATIC_TENSOR),
    "modelopt-mxfp8": (modelopt("MXFP8", group_size=32), mxfp8, MXFP8),
}


def make(name: str, folder, **changes):
    """Write a checkpoint; (what its tensors are, the key of its inputs, the bound of their scales)."""
    if name in COMPRESSED:
        preset, change, key = COMPRESSED[name]
        write_compressed_tensors(stock(**changes), folder, preset, change=change)
        bound = None
    else:
        quantization, convert, key = BY_HAND[name]
        file = "hf_quant_config.json" if "quantization" in quantization else "config.json"
        write(stock(**changes), folder, quantization, convert, file)
        bound = quantization.get("activation_scale_ub")
    return load_file(folder / "model.safetensors"), key, bound


@torch.no_grad()
@pytest.mark.parametrize("name", [*COMPRESSED, *BY_HAND])
def test_layers_compute_what_the_files_say(name, tmp_path):
    """Each layer of what it gets, and all of them together: weights decoded, inputs quantized by the reference."""
    tensors, key, bound = make(name, tmp_path)
    model = load_quantized(tmp_path, torch.float32)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == LAYERS
    assert {layer.input_quant_key for layer in layers.values()} == {key}
    expected = reference(stock(), tensors, dict.fromkeys(layers, key), bound)
    generator = torch.Generator().manual_seed(3)
    for path, layer in layers.items():
        x = torch.randn(5, layer.in_features, generator=generator) * 3
        assert_logits_close(layer(x), expected.get_submodule(path)(x))
    ids = tokens()
    assert_as_near(model(ids).logits, stock()(ids).logits, expected(ids).logits)
    assert not torch.equal(model(ids).logits, stock()(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "deepseek", "modelopt-fp8"])
def test_in_bfloat16_patched_it_gives_the_bits_of_its_layers(name, tmp_path):
    """Scales in bfloat16, static ones that differ among q, k and v: each quantizes its input."""
    make(name, tmp_path, dtype=torch.bfloat16)
    model, ids = load_quantized(tmp_path), tokens()
    assert model.dtype == torch.bfloat16
    with fused_ops.use_backend("reference"):
        plain = model(ids).logits
        report = models_patch.patch(model)
        assert_same(model(ids).logits, plain)
    apart = any("differ in scale" in entry.note for entry in report)
    assert apart is (name != "deepseek")


def test_tensors_are_taken_as_they_are(tmp_path):
    tensors, _, _ = make("fp8", tmp_path, dtype=torch.bfloat16)
    q = load_quantized(tmp_path).model.layers[1].self_attn.q_proj
    name = "model.layers.1.self_attn.q_proj"
    assert tensors[f"{name}.weight_scale"].dtype == torch.bfloat16
    assert_same(q.weight, tensors[f"{name}.weight"])
    assert_same(q.weight_scale.view(1), tensors[f"{name}.weight_scale"].float())
    assert_same(q.input_scale, tensors[f"{name}.input_scale"].float())
    tensors, _, _ = make("nvfp4", tmp_path / "nvfp4")
    q = load_quantized(tmp_path / "nvfp4").model.layers[1].self_attn.q_proj
    assert_same(q.weight_scale2, 1 / tensors[f"{name}.weight_global_scale"])
    assert_same(q.input_scale2, 1 / tensors[f"{name}.input_global_scale"])
    assert q.weight_scale2 < 1e-2 < tensors[f"{name}.weight_global_scale"]


def test_tied_biased_sharded_and_cast(tmp_path):
    """Embeddings that are the output layer's, biases, several files, another dtype, buffers of old checkpoints."""
    make("int8", tmp_path, tie_word_embeddings=True, attention_bias=True)
    model = load_quantized(tmp_path, torch.float16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not model.training
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for part in range(3):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, tmp_path / file)
        placed |= dict.fromkeys(names[part::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    sharded = load_quantized(tmp_path, torch.float16)
    for name, tensor in model.state_dict().items():
        assert_same(sharded.state_dict()[name], tensor, name)
    with torch.no_grad():
        assert_same(sharded(tokens()).logits, model(tokens()).logits)


IGNORED = [
    ("compressed-tensors", ["lm_head", "re:.*self_attn"], 6),
    ("compressed-tensors", ["lm_head", "model.layers.0.mlp.up_proj"], 13),
    ("fp8", ["model.layers.1"], 7),
    ("fp8", ["re:.*[qk]_proj", "down_proj"], 8),
    ("fp8", ["model.layers.*.mlp"], 8),
    ("fp8", ["model.layers.0.mlp.up.proj"], 14),  # dots are themselves
    ("modelopt", ["lm_head", "re:.*mlp"], 14),  # no expressions
    ("modelopt", ["lm_head", "model.layers.0.self_attn*"], 10),
    ("modelopt", ["lm_head", "model.layers.0.mlp"], 11),
]


@pytest.mark.parametrize(("method", "names", "left"), IGNORED)
def test_layers_that_are_left_out(method, names, left, tmp_path):
    if method == "compressed-tensors":
        write_compressed_tensors(stock(), tmp_path, "FP8_DYNAMIC", ignore=names)
    else:
        field, base = {"fp8": ("modules_to_not_convert", DEEPSEEK), "modelopt": ("ignore", modelopt("FP8_PB_WO"))}[
            method
        ]
        write(stock(), tmp_path, {**base, field: names}, deepseek if method == "fp8" else modelopt_blocks)
        _unquantize(tmp_path, names, method)
    model = load_quantized(tmp_path)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == left
    assert type(model.lm_head) is nn.Linear


def _unquantize(folder, names, method) -> None:
    """Replace those layers' tensors by the stock model's; which, is spelled out here."""
    patterns = {
        "model.layers.1": r"layers\.1\.",
        "re:.*[qk]_proj": r"[qk]_proj",
        "down_proj": r"down_proj",
        "model.layers.*.mlp": r"mlp",
        "model.layers.0.self_attn*": r"layers\.0\.self_attn",
        "model.layers.0.mlp": r"layers\.0\.mlp",
    }
    tensors, plain = load_file(folder / "model.safetensors"), stock().state_dict()
    for name in [each for each in tensors if any(re.search(patterns[n], each) for n in names if n in patterns)]:
        if name in plain:
            tensors[name] = plain[name]
        else:
            del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def test_two_schemes_in_one_checkpoint(tmp_path):
    """compressed-tensors' groups, and ModelOpt's quantized_layers."""
    write(stock(), tmp_path, DEEPSEEK, deepseek)
    tensors = load_file(tmp_path / "model.safetensors")
    mlp = [name for name in tensors if ".mlp." in name and name.endswith("weight")]
    other = stock().state_dict()
    for name in mlp:
        base = name.removesuffix("weight")
        del tensors[f"{base}weight_scale_inv"]
        tensors |= {base + key: value for key, value in by_rows(other[name], 0).items()}
    for name in [name for name in tensors if name.endswith("_inv")]:
        tensors[name.removesuffix("_inv")] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    group = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    block = {**group, "strategy": "block", "block_structure": [128, 128]}
    token, by_group = (
        {**group, "dynamic": True, **more} for more in ({"strategy": "token"}, {"strategy": "group", "group_size": 128})
    )
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["re:.*mlp"], "weights": group, "input_activations": token},
            "group_1": {"targets": ["re:.*self_attn"], "weights": block, "input_activations": by_group},
        },
    }  # fmt: skip
    first = _with_config(tmp_path, quantization)
    layers = {name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")}
    algorithms = {path: "FP8_PER_CHANNEL_PER_TOKEN" if "mlp" in path else "FP8_PB_WO" for path in layers}
    mixed = modelopt(
        "MIXED_PRECISION", quantized_layers={path: {"quant_algo": each} for path, each in algorithms.items()}
    )
    second = _with_config(tmp_path, mixed)
    for model in first, second:
        layer = model.model.layers[0]
        assert layer.mlp.up_proj.input_quant_key == FP8_DYNAMIC_TOKEN
        assert layer.self_attn.o_proj.input_quant_key == FP8_DYNAMIC_GROUP_128
    with torch.no_grad():
        assert_same(first(tokens()).logits, second(tokens()).logits)


def _with_config(folder, quantization: dict):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return load_quantized(folder)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("kv_scale",)])
def test_scales_of_the_cache_are_the_attentions(names, tmp_path):
    make("modelopt-fp8", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for layer in range(2):
        for name in names:
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.25 + layer, dtype=torch.bfloat16)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"unexpected model.layers.0.self_attn.{names[0]}"):
        load_quantized(tmp_path)
    model = _with_config(tmp_path, modelopt("FP8", kv_cache_scheme={"type": "float", "num_bits": 8}))
    attention = model.model.layers[1].self_attn
    assert attention.k_scale.tolist() == attention.v_scale.tolist() == [1.25]
    tensors[f"model.layers.1.self_attn.{names[0]}"] = torch.tensor(-1.0)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{names[0]} is -1.0, expected a positive, finite scale"):
        load_quantized(tmp_path)


def test_the_decoder_of_these_tests(tmp_path):
    """Against compressed-tensors' own, in float32: by itself it makes NVFP4's values in bfloat16."""
    name = "model.layers.0.mlp.down_proj"
    for preset in "FP8", "FP8_BLOCK", "W8A8", "NVFP4", "MXFP8":
        model, folder = stock(), tmp_path / preset
        write_compressed_tensors(model, folder, preset)
        tensors, layer = load_file(folder / "model.safetensors"), model.get_submodule(name)
        if preset == "NVFP4":
            codes = unpack_fp4_from_uint8(layer.weight_packed, *stock().get_submodule(name).weight.shape, torch.float32)
            scales = layer.weight_scale.float(), None, layer.quantization_scheme.weights
            expected = dequantize(codes, *scales, global_scale=layer.weight_global_scale)
        else:
            decompress_module(layer)
            expected = layer.weight.data.float()
        assert_logits_close(decoded(tensors, name), expected)
