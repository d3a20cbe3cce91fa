"""Files whose names and experts aren't as the model has them: what transformers converts, and gpt-oss's MXFP4."""

import json
import re
from functools import partial

import pytest
import torch
import transformers
from checkpoints import by_rows, decoded, deepseek, edit_config, edit_tensors
from compare import assert_as_near, assert_same
from patching import FAMILIES, UNLISTED, quantize, tiny, tokens
from safetensors.torch import load_file, save_file
from test_checkpoint import DEEPSEEK
from transformers.core_model_loading import WeightRenaming

from fused_ops.linear import decode_weight
from quant import MXFP4, MXFP8
from quant.checkpoint import load_quantized, names, save_quantized
from quant.methods import QuantExperts, QuantLinear

MIXTURES = ["Mixtral", "MiniMaxM2", "Phimoe", "Qwen3Moe", "DeepseekV3", "Glm4Moe", "GptOss"]
RENAMED = {"Mixtral", "MiniMaxM2", "Phimoe"}
SIZES = FAMILIES | UNLISTED | {"Phimoe": {"num_local_experts": 4}, "Llama4Text": {}}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 30.0}


def stock(name: str, dtype: torch.dtype = torch.float32, **changes):
    return tiny(name, dtype, **{"num_hidden_layers": 2, **SIZES[name], **changes})


def write_quantized(
    model, folder, quantization: dict, convert, plain: str = "lm_head|embed|gate.weight|router"
) -> dict:
    """The files that transformers writes of a model, with matrices converted but for those of some names."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or any(part in name for part in plain.split("|")):
            tensors[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{key}": value.contiguous() for key, value in convert(tensor, 0).items()}
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return tensors


@pytest.mark.parametrize("name", MIXTURES[:-1])
def test_files_named_as_transformers_names_them(name, tmp_path):
    model = stock(name)
    tensors = write_quantized(model, tmp_path, FBGEMM, by_rows)
    prefix, parts = "model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj")
    if name in RENAMED:
        prefix, parts = "model.layers.1.block_sparse_moe", ("w1", "w3", "w2")
    assert f"{prefix}.experts.3.{parts[0]}.weight_scale" in tensors
    loaded = load_quantized(tmp_path, torch.float32)
    experts = loaded.model.layers[1].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert [path for path, module in loaded.named_modules() if type(module) is torch.nn.Linear] == ["lm_head"]
    for e in range(4):
        gate, up, down = (decoded(tensors, f"{prefix}.experts.{e}.{part}") for part in parts)
        for layer, expected in (experts.gate_up_proj, torch.cat([gate, up])), (experts.down_proj, down):
            weight = decode_weight(layer.weight[e], layer.weight_scale[e], layer.method.scheme.weight_key)
            torch.testing.assert_close(weight, expected, rtol=2**-22, atol=0)
    for key, tensor in model.state_dict().items():
        if key.endswith(("norm.weight", "gate.weight", "correction_bias")):
            assert_same(loaded.state_dict()[key], tensor, key)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_written_has_the_names_that_transformers_writes(name, tmp_path):
    """It reads them too."""
    stock(name).save_pretrained(tmp_path / "stock")
    exact = stock(name)(tokens()).logits
    model = quantize(stock(name), "fp8_token", ignore=("lm_head", "experts"))
    save_quantized(model, tmp_path / "model")
    theirs, mine = (load_file(tmp_path / each / "model.safetensors") for each in ("stock", "model"))
    added = {name for name in mine if name.endswith("_scale")}
    assert mine.keys() - added == theirs.keys()
    assert added
    loaded = load_quantized(tmp_path / "model", torch.float32)
    assert_same(loaded(tokens()).logits, model(tokens()).logits)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert_same(read.get_parameter(f"{EXPERTS}.down_proj"), loaded.get_parameter(f"{EXPERTS}.down_proj"))
    assert_as_near(loaded(tokens()).logits, exact, read(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("Mixtral", "fp8_token"), ("MiniMaxM2", "mxfp4"), ("Qwen3Moe", "fp8_static"), ("DeepseekV3", "fp8_token")],
)
def test_transformers_decodes_experts(name, scheme, tmp_path):
    dtype = torch.bfloat16 if scheme == "mxfp4" else torch.float32  # which compressed-tensors makes of one-byte scales
    model = quantize(stock(name, dtype), scheme)
    save_quantized(model, tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for projection in "gate_up_proj", "down_proj":
        layer = model.get_submodule(f"{EXPERTS}.{projection}")
        key = layer.method.scheme.weight_key
        weights = [decode_weight(w, s, key) for w, s in zip(layer.weight, layer.weight_scale, strict=True)]
        assert_same(read.get_parameter(f"{EXPERTS}.{projection}").data, torch.stack(weights).to(dtype))


@pytest.mark.parametrize("name", ["Mixtral", "MiniMaxM2"])
def test_quantized_experts_are_written_as_files_name_them(name, tmp_path):
    model = quantize(stock(name), "int8_token", ignore=("lm_head", "experts"))
    quantize(model, "fp8_token")
    save_quantized(model, tmp_path)
    block = "model.layers.0.block_sparse_moe"
    written = {key.removeprefix(f"{block}.experts.2.") for key in load_file(tmp_path / "model.safetensors")}
    expected = {f"w{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "weight_scale")}
    assert expected <= written
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {f"{block}.gate", "model.layers.0.mlp.gate", "lm_head"} <= set(config["ignore"])
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert r"re:model\.layers\.0\.block_sparse_moe\.experts[.][0-9]+[.](w1|w3)$" in targets
    loaded = load_quantized(tmp_path, torch.float32)
    assert_same(loaded(tokens()).logits, model(tokens()).logits)


def test_names_of_the_model_are_read_too(tmp_path):
    """As tools write what they were given by transformers 5, and in configurations either is known."""
    model = quantize(stock("Mixtral"), "fp8_token", ignore=("lm_head", "o_proj"))
    save_quantized(model, tmp_path)
    parts = {"block_sparse_moe": "mlp", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}

    def rename(tensors):
        for name in list(tensors):
            new = name
            for theirs, ours in parts.items():
                new = new.replace(theirs, ours)
            tensors[new] = tensors.pop(name)

    edit_config(tmp_path, lambda _, q: q.update(ignore=[each for each in q["ignore"] if "block_sparse" not in each]))
    edit_tensors(tmp_path, rename)
    assert_same(load_quantized(tmp_path, torch.float32)(tokens()).logits, model(tokens()).logits)
    twice = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    edit_tensors(tmp_path, lambda t: t.update({twice: t[f"{EXPERTS}.1.down_proj.weight"].clone()}))
    message = r"experts\.1\.(w2|down_proj)\.weight and .* are both model\.layers\.1\.mlp\.experts\.1\.down_proj\.weight"
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path)


def test_names_of_files_decide_where_those_of_the_model_disagree(tmp_path):
    """The router's name is what a gate's begins with here, but not in files that call it w1."""
    model = quantize(stock("Mixtral"), "fp8_token")
    save_quantized(model, tmp_path)
    edit_config(tmp_path, lambda _, q: q.update(ignore=["lm_head", "re:.*gate"]))
    assert_same(load_quantized(tmp_path, torch.float32)(tokens()).logits, model(tokens()).logits)
    edit_config(tmp_path, lambda _, q: q.update(ignore=["lm_head", "re:.*experts.2.w1"]))
    with pytest.raises(ValueError, match=r"0\.w1 has .*, but .*2\.w1 isn't quantized: .* one format for all experts"):
        load_quantized(tmp_path)


def test_what_is_missing_has_its_name_in_files(tmp_path):
    save_quantized(quantize(stock("Mixtral"), "fp8_token"), tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.1.block_sparse_moe.experts.9.w1.x": t.pop(name)}))
    with pytest.raises(ValueError, match=f"missing {name}$"):
        load_quantized(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({name: t["model.layers.1.block_sparse_moe.experts.0.w3.weight"].clone()}))
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.1\.block_sparse_moe\.experts\.9\.w1\.x$"):
        load_quantized(tmp_path)


def test_a_name_that_does_not_come_back_is_refused(tmp_path, monkeypatch):
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda *_, **__: [WeightRenaming("q_proj", "k_proj")])
    message = (
        r"self_attn\.q_proj\.weight would be .*q_proj\.weight in files, which transformers reads as .*k_proj\.weight"
    )
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


def test_experts_of_other_kinds_are_refused(tmp_path):
    """Llama4's, which llm-compressor takes apart as it does others."""
    model = stock("Llama4Text", head_dim=16, intermediate_size_mlp=64, num_local_experts=2)
    tensors = write_quantized(model, tmp_path, FBGEMM, by_rows)
    assert not any("experts.0." in name for name in tensors)
    load_quantized(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.1.feed_forward.experts.0.up_proj.weight": torch.ones(1)}))
    message = (
        r"layers\.1\.feed_forward\.experts is Llama4TextExperts, expected gated experts of transformers' interface"
    )
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path)


# --- experts that aren't quantized ---

EXPERTS = "model.layers.1.mlp.experts"


def put(name, tensor, tensors) -> None:
    tensors[name] = tensor


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_experts_that_are_not_quantized_are_read_one_by_one(name, tmp_path):
    block = "block_sparse_moe" if name in RENAMED else "mlp"
    changes = {"hidden_size": 128, "intermediate_size": 128}
    model = stock(name, **changes)
    quantization = {**DEEPSEEK, "modules_to_not_convert": [f"re:.*{block}.experts"]}
    write_quantized(model, tmp_path, quantization, deepseek, plain="lm_head|embed|gate.weight|.experts.")
    loaded = load_quantized(tmp_path, torch.float32)
    assert isinstance(loaded.model.layers[0].self_attn.o_proj, QuantLinear)
    for projection in "gate_up_proj", "down_proj":
        parameter = loaded.get_parameter(f"{EXPERTS}.{projection}")
        assert_same(parameter, model.get_parameter(f"{EXPERTS}.{projection}"))
    assert load_quantized(tmp_path).get_parameter(f"{EXPERTS}.down_proj").dtype == torch.bfloat16
    down = f"model.layers.1.{block}.experts.2.{'w2' if name in RENAMED else 'down_proj'}.weight"
    shape = load_file(tmp_path / "model.safetensors")[down].shape
    for wrong, message in (
        (torch.ones(shape, dtype=torch.float64), r" is torch\.float64 .*, expected floats"),
        (torch.ones(shape[0] - 1, shape[1]), r" is torch\.float32 \[\d+, \d+\], expected floats \[\d+, \d+\]"),
        (torch.full(shape, 1e5), r" has values beyond torch\.float16"),
    ):
        edit_tensors(tmp_path, partial(put, down, wrong))
        with pytest.raises(ValueError, match=re.escape(down) + message):
            load_quantized(tmp_path, torch.float16)
    edit_tensors(tmp_path, lambda t: t.pop(down))
    with pytest.raises(ValueError, match=f"missing {re.escape(down)}$"):
        load_quantized(tmp_path)


# --- gpt-oss ---

MX = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write_gpt_oss(folder):
    """Codes and exponents at random: [experts, rows, groups, 16] and [experts, rows, groups]."""
    model = stock("GptOss", torch.bfloat16, intermediate_size=96)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for projection in "gate_up_proj", "down_proj":
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            experts, cols, rows = tensors.pop(name).shape
            blocks = torch.randint(256, (experts, rows, cols // 32, 16), generator=generator).byte()
            tensors[f"{name}_blocks"] = blocks
            tensors[f"{name}_scales"] = torch.randint(122, 126, blocks.shape[:-1], generator=generator).byte()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": MX}))
    return tensors


@torch.no_grad()
def test_gpt_oss_in_its_own_mxfp4(tmp_path):
    """Weights are those that transformers decodes; their input is MXFP8."""
    tensors = write_gpt_oss(tmp_path)
    model = load_quantized(tmp_path, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for layer in range(2):
        experts, stock_ones = model.model.layers[layer].mlp.experts, theirs.model.layers[layer].mlp.experts
        for projection in "gate_up_proj", "down_proj":
            mine = getattr(experts, projection)
            assert (mine.input_quant_key, mine.method.scheme.weight_key) == (MXFP8, MXFP4)
            weight = torch.stack(
                [decode_weight(w, s, MXFP4) for w, s in zip(mine.weight, mine.weight_scale, strict=True)]
            )
            assert torch.equal(weight, getattr(stock_ones, projection).float().transpose(1, 2))
            assert torch.equal(mine.bias, tensors[f"model.layers.{layer}.mlp.experts.{projection}_bias"].float())
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    exact, logits = theirs(tokens()).logits, model(tokens()).logits
    by_expert = quantize(theirs, "mxfp8", ignore=("lm_head", "q_proj", "k_proj", "v_proj", "o_proj"))(tokens()).logits
    assert_as_near(logits, exact, by_expert)
    assert_as_near(by_expert, exact, logits)
    assert not torch.equal(logits, exact)
    save_quantized(model, tmp_path / "saved")
    assert_same(load_quantized(tmp_path / "saved", torch.float32)(tokens()).logits, logits)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}.down_proj_scales"), r"missing .*experts\.down_proj_scales$"),
        (
            lambda t: t.update({f"{EXPERTS}.down_proj_blocks": t[f"{EXPERTS}.down_proj_blocks"].flatten(2)}),
            r"down_proj_blocks is \[4, 64, 48\], expected \[4, 64, 3, 16\]",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.down_proj_scales": t[f"{EXPERTS}.down_proj_scales"].float()}),
            r"down_proj_scales is torch\.float32, expected torch\.float8_e8m0fnu",
        ),
        (lambda t: t[f"{EXPERTS}.down_proj_scales"][1, 2].fill_(255), "down_proj: weight_scale has values that aren't"),
    ],
)
def test_damaged_mxfp4(edit, message, tmp_path):
    write_gpt_oss(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path)


def test_mxfp4_of_other_models_has_nothing_to_quantize(tmp_path):
    write_gpt_oss(tmp_path)
    edit_config(tmp_path, lambda _, q: q.update(modules_to_not_convert=["model.layers.*.mlp.experts"]))
    with pytest.raises(ValueError, match="quantization_config leaves no layer of GptOssForCausalLM quantized"):
        load_quantized(tmp_path)
    edit_config(tmp_path, lambda _, q: q.update(swizzled=True))
    with pytest.raises(ValueError, match=r"quantization_config\.swizzled is true, a field that isn't known"):
        load_quantized(tmp_path)
