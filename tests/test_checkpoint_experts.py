"""Experts, which files have one by one and layers all together."""

import json

import pytest
import torch
from checkpoints import decoded, edit_config, edit_tensors, one_by_one, write, write_compressed_tensors
from compare import assert_same
from patching import quantize, tiny_model, tokens
from safetensors.torch import load_file
from test_checkpoint import BY_HAND, COMPRESSED

import fused_ops
import models_patch
from fused_ops.linear import decode_weight
from quant.checkpoint import load_quantized, save_quantized
from quant.methods import QuantExperts

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 1, "num_experts": 3}
EXPERTS = "model.layers.0.mlp.experts"


def stock(**changes):
    """Its gates and ups have the same largest magnitude, as tools make them share NVFP4's second scale."""
    model = tiny_model("Qwen3Moe", torch.float32, **{**SIZES, **changes})
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj[:, [0, -1], 0] = 3.0
    return model


def make(name: str, folder, **changes) -> dict:
    model = one_by_one(stock(**changes))
    if name in COMPRESSED:
        preset, change, _ = COMPRESSED[name]
        write_compressed_tensors(model, folder, preset, change=change)
    else:
        quantization, convert, _ = BY_HAND[name]
        write(model, folder, quantization, convert)
    return load_file(folder / "model.safetensors")


def raise_one(tensors: dict) -> None:
    """Make the input's scale of a layer that is neither the first nor the last the largest."""
    for name, factor in ("input_scale", 4), ("input_global_scale", 1 / 4):
        for part in "gate_proj", "down_proj":
            if (scale := tensors.get(f"{EXPERTS}.1.{part}.{name}")) is not None:
                scale.mul_(factor)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["fp8", "fp8-dynamic", "fp8-block", "int8", "int8-static", "nvfp4", "mxfp4", "deepseek", "deepseek-ue8m0",
     "autofp8", "fbgemm", "modelopt-nvfp4", "modelopt-mxfp8"],
)  # fmt: skip
def test_stacked_layers_hold_what_the_files_say(name, tmp_path):
    """Weights of each expert, to the rounding of a product of scales; the largest of the inputs' scales."""
    make(name, tmp_path)
    edit_tensors(tmp_path, raise_one)
    tensors = load_file(tmp_path / "model.safetensors")
    model = load_quantized(tmp_path, torch.float32)
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, QuantExperts)
    for projection, parts in ("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)):
        layer = getattr(experts, projection)
        for e in range(3):
            expected = torch.cat([decoded(tensors, f"{EXPERTS}.{e}.{part}") for part in parts])
            scale2 = layer._buffers.get("weight_scale2")
            args = layer.weight[e], layer.weight_scale[e], layer.method.scheme.weight_key
            actual = decode_weight(*args, None if scale2 is None else scale2[e])
            torch.testing.assert_close(actual, expected, rtol=2**-22, atol=0)
        paths = [f"{EXPERTS}.{e}.{part}" for e in range(3) for part in parts]
        for stored in "input_scale", "input_global_scale":
            if f"{paths[0]}.{stored}" in tensors:
                given = torch.stack([tensors[f"{path}.{stored}"].float().view(1) for path in paths])
                scale = given.max() if stored == "input_scale" else 1 / given.min()
                second = stored == "input_global_scale" or name == "modelopt-nvfp4"
                assert_same(layer.input_scale2 if second else layer.input_scale, scale.view(1))
    with fused_ops.use_backend("reference"):
        expected = model(tokens()).logits
        models_patch.patch(model)
        assert_same(model(tokens()).logits, expected)


def test_names_in_files_and_back(tmp_path):
    """Saved, a model has the files' names again, and loaded the same bits; two kinds of layers are two groups."""
    model = quantize(tiny_model("Qwen3Moe", num_hidden_layers=1), "int8_token", ignore=("lm_head", "experts"))
    model.model.layers[0].mlp.experts = quantize(tiny_model("Qwen3Moe"), "fp8_token").get_submodule(EXPERTS)
    save_quantized(model, tmp_path / "one")
    names = load_file(tmp_path / "one" / "model.safetensors").keys()
    projections = "gate_proj", "up_proj", "down_proj"
    expected = {
        f"{EXPERTS}.{e}.{part}.{kind}" for e in range(4) for part in projections for kind in ("weight", "weight_scale")
    }
    assert {name for name in names if "experts" in name} == expected
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    loaded = load_quantized(tmp_path / "one")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4Moe"])
def test_what_corrects_a_routers_scores_stays_in_float32(name, tmp_path):
    """A buffer, of which bfloat16 has too few bits to choose experts by, though `from_config` makes it in that."""
    model = quantize(tiny_model(name), "int8_token")
    gate = model.model.layers[-1].mlp.gate
    gate.e_score_correction_bias = torch.rand(4) + 3
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert_same(loaded.model.layers[-1].mlp.gate.e_score_correction_bias, gate.e_score_correction_bias)
    assert_same(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("ignore", ["experts", "model.layers.1.mlp.experts"])
def test_experts_that_are_not_quantized_stay_so(ignore, tmp_path):
    """Nor is a router, which in vLLM is a linear layer."""
    model = quantize(tiny_model("Qwen3Moe"), "int8_token", ignore=("lm_head", ignore))
    save_quantized(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(config["ignore"])
    loaded = load_quantized(tmp_path / "model")
    assert isinstance(loaded.get_submodule(EXPERTS), QuantExperts) == (ignore != "experts")
    assert_same(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("scheme", "edit", "message"),
    [
        ("fp8_token", lambda t: t.pop(f"{EXPERTS}.2.up_proj.weight"), r"missing .*experts\.2\.up_proj\.weight$"),
        ("fp8_token", lambda t: t.update({f"{EXPERTS}.4.up_proj.weight": torch.ones(1)}), r"unexpected .*experts\.4"),
        (
            "fp8_token",
            lambda t: t.update({f"{EXPERTS}.1.down_proj.weight": t[f"{EXPERTS}.1.down_proj.weight"][:5].clone()}),
            r"experts\.1\.down_proj\.weight is \[5, 32\], expected \[64, 32\]",
        ),
        (
            "fp8_token",
            lambda t: t[f"{EXPERTS}.1.down_proj.weight"].view(torch.uint8)[3].fill_(0x7F),
            r"experts\.1\.down_proj\.weight has values that aren't finite",
        ),
        (
            "fp8_static",
            lambda t: t[f"{EXPERTS}.3.up_proj.input_scale"].fill_(float("inf")),
            r"experts\.3\.up_proj\.input_scale is inf, expected a positive, finite scale",
        ),
        (
            "nvfp4",
            lambda t: t[f"{EXPERTS}.0.gate_proj.weight_global_scale"].fill_(float("nan")),
            r"experts\.0\.gate_proj\.weight_global_scale is nan, expected a positive, finite scale",
        ),
        (
            "nvfp4",
            lambda t: t.update(
                {
                    f"{EXPERTS}.0.{part}_proj.weight_global_scale": torch.tensor([n])
                    for part, n in (("gate", 5.0), ("up", 7.0))
                }
            ),
            r"experts\.0\.up_proj\.weight_global_scale is 7\.0, and 5\.0 elsewhere in .*gate_up_proj, which has one",
        ),
        (
            "nvfp4",
            lambda t: t[f"{EXPERTS}.0.gate_proj.weight_global_scale"].zero_(),
            r"experts\.0\.gate_proj\.weight_global_scale is 0\.0, expected a positive, finite scale, and so its rec",
        ),
        (
            "int8_static_asym",
            lambda t: t[f"{EXPERTS}.0.up_proj.input_zero_point"].sub_(1),
            r"up_proj\.input_zero_point is .*, and .* elsewhere in .*gate_up_proj, which has one",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(scheme, edit, message, tmp_path):
    save_quantized(quantize(tiny_model("Qwen3Moe", num_hidden_layers=1), scheme), tmp_path / "model")
    load_quantized(tmp_path / "model")
    edit_tensors(tmp_path / "model", edit)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "model")


def test_a_bound_that_is_not_the_configurations_is_refused(tmp_path):
    make("fbgemm", tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{EXPERTS}.1.up_proj.input_scale_ub": torch.tensor([5.0])}))
    with pytest.raises(ValueError, match=r"up_proj\.input_scale_ub is 5.0, the configuration says 3.0"):
        load_quantized(tmp_path)


def test_what_stacked_layers_cannot_hold_is_refused(tmp_path):
    make("deepseek", tmp_path / "blocks", moe_intermediate_size=192)
    with pytest.raises(ValueError, match=r"experts has 192 rows of gates and of ups, .* a multiple of 128"):
        load_quantized(tmp_path / "blocks")
    make("fp8-dynamic", tmp_path / "some")
    edit_config(tmp_path / "some", lambda _, q: q["ignore"].append(f"{EXPERTS}.1.up_proj"))
    message = r"0\.gate_proj has .*, but .*1\.up_proj isn't quantized: .*experts has one format"
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "some")
    model = quantize(tiny_model("Qwen3Moe"), "fp8_block")
    with pytest.raises(ValueError, match=r"experts has blocks of 128 rows of gates and ups, which files have apart"):
        save_quantized(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_biases_beyond_float16(tmp_path):
    model, name = quantize(tiny_model("GptOss", num_hidden_layers=1), "int8_token"), f"{EXPERTS}.1.down_proj.bias"
    save_quantized(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t[name].fill_(1e5))
    load_quantized(tmp_path)
    with pytest.raises(ValueError, match=r"1\.down_proj\.bias has values beyond torch\.float16"):
        load_quantized(tmp_path, torch.float16)
    edit_tensors(tmp_path, lambda t: t.update({name: t[name].double()}))
    with pytest.raises(ValueError, match=r"1\.down_proj\.bias is torch\.float64 .*, expected floats"):
        load_quantized(tmp_path)
