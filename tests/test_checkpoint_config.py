"""Configurations that `load_quantized` refuses, by file and field; nothing of it is silent."""

import json

import pytest
from checkpoints import copied, edit_config
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from test_checkpoint import DEEPSEEK, modelopt, nested
from torch import nn

from quant import FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, NVFP4
from quant.checkpoint import load_quantized
from quant.checkpoint.config import read_recipe

UP = "model.layers.1.mlp.up_proj"


def group(field, value, where="weights"):
    def change(_, q):
        target = q["config_groups"]["group_0"]
        (target if where is None else target[where])[field] = value

    return change


def put(field, value):
    return lambda _, q: q.__setitem__(field, value)


def instead(quantization):
    return lambda config, _: config.__setitem__("quantization_config", quantization)


def fbgemm(bound):
    return instead({"quant_method": "fbgemm_fp8", "activation_scale_ub": bound})


def described(algorithm, *, weights=(), inputs=(), targets=("Linear",)):
    """ModelOpt's description of an algorithm, of which these fields are other ones; inputs None: of weights alone."""
    base = {"dynamic": False, "num_bits": 8, "type": "float"}
    base |= {"num_bits": 4, "group_size": 16} if algorithm == "NVFP4" else {}
    group = {"weights": base | dict(weights), "targets": list(targets)}
    group |= {} if inputs is None else {"input_activations": base | dict(inputs)}
    return instead(modelopt(algorithm, config_groups={"g": group}))


CONFIGS = {
    "unknown method": (put("quant_method", "gptq"), 'quant_method is "gptq", expected "compressed-tensors" or'),
    "no method": (lambda _, q: q.pop("quant_method"), "quant_method is null, expected"),
    "unknown field": (put("rotation", 1), "quantization_config.rotation is 1, a field that isn't known"),
    "unknown field of a group": (group("sparse", 1, None), r"group_0.sparse is 1, a field that isn't known"),
    "unknown field of weights": (
        group("codebook", [1]),
        r"group_0.weights.codebook is \[1\], a field that isn't known",
    ),
    "status": (put("quantization_status", "frozen"), 'quantization_status is "frozen", expected "compressed"'),
    "format": (
        put("format", "pack-quantized"),
        'config.format is "pack-quantized", expected float-quantized or mixed-precision, as its groups say',
    ),
    "format of several": (put("format", "mixed-precision"), None),  # each group has its own
    "format of a group": (group("format", "pack-quantized", None), 'group_0.format is "pack-quantized", expected'),
    "sparsity": (put("sparsity_config", {"format": "sparse-24"}), "sparsity_config is .*isn't served"),
    "transform": (put("transform_config", {"config_groups": {"a": 1}}), "transform_config is .*isn't served"),
    "bits": (group("num_bits", 4), "group_0.weights is float4 by channel, expected one of: float8 by tensor"),
    "bits as a string": (group("num_bits", "8"), 'weights.num_bits is "8", expected int'),
    "bits as true": (group("num_bits", True), "weights.num_bits is true, expected int"),
    "asymmetric weights": (group("symmetric", False), "weights is float8 by channel, asymmetric, expected one of"),
    "act order": (group("actorder", "group"), 'weights.actorder is "group", expected null or false or "static"'),
    "weights only": (group("input_activations", None, None), "input_activations is null, .*weights only aren't served"),
    "no weights": (group("weights", None, None), "group_0.weights is missing"),
    "outputs": (group("output_activations", {"num_bits": 8}, None), "output_activations is .*, expected null"),
    "groups as a list": (put("config_groups", []), r"config_groups is \[\], expected dict"),
    "no groups": (put("config_groups", {}), r"config_groups is \{\}, expected at least one"),
    "no targets": (group("targets", None, None), "group_0.targets is missing"),
    "empty targets": (group("targets", [], None), r"group_0.targets is \[\], expected a list of at least one string"),
    "blocks of lists": (
        group("block_structure", [[128], [128]]),
        r"weights.block_structure is \[\[128\], \[128\]\], expected a list of two ints",
    ),
    "blocks of floats": (group("block_structure", [128.0, 128]), "block_structure is .*, expected a list of two ints"),
    "groups beside blocks": (
        lambda _, q: q["config_groups"]["group_0"]["weights"].update(
            strategy="block", block_structure=[128, 128], group_size=128
        ),
        "weights.group_size is 128, expected null",
    ),
    "targets as a string": (group("targets", "Linear", None), 'targets is "Linear", expected list'),
    "targets that fit none": (group("targets", ["Conv2d"], None), "leaves no layer of LlamaForCausalLM quantized"),
    "an expression": (put("ignore", ["re:("]), r"ignore has '\(', which is no regular expression"),
    "a cache of integers": (
        put("kv_cache_scheme", {"num_bits": 8, "type": "int"}),
        'kv_cache_scheme.type is "int", expected "float"',
    ),
    "a cache without scales": (
        put("kv_cache_scheme", {"num_bits": 8, "type": "float"}),
        "missing model.layers.0.self_attn.k_scale",
    ),
    "fp8 blocks": (
        instead({**DEEPSEEK, "weight_block_size": [64, 128]}),
        r"weight_block_size is \[64, 128\], expected",
    ),
    "fp8 format": (instead({**DEEPSEEK, "fmt": "e5m2"}), 'fmt is "e5m2", expected null or "e4m3"'),
    "fp8 static blocks": (
        instead({**DEEPSEEK, "activation_scheme": "static"}),
        'activation_scheme is "static", expected',
    ),
    "fp8 experts": (instead({**DEEPSEEK, "expert_dtype": "fp4"}), 'expert_dtype is "fp4", expected null or "fp8"'),
    "fp8 embeddings": (
        instead({**DEEPSEEK, "modules_to_convert": ["embed"]}),
        "modules_to_convert is .*, expected null",
    ),
    "fbgemm's bound": (
        instead({"quant_method": "fbgemm_fp8", "activation_scale_ub": "1"}),
        'activation_scale_ub is "1", expected int or',
    ),
    "fbgemm's bound, beyond float": (fbgemm(10**400), "activation_scale_ub is 10+, expected a positive number"),
    "fbgemm's bound, beyond float32": (fbgemm(1e39), r"activation_scale_ub is 1e\+39, expected a positive number"),
    "fbgemm's bound, NaN": (fbgemm(float("nan")), "activation_scale_ub is NaN, expected a positive number"),
    "fbgemm's bound, negative": (fbgemm(-1.0), "activation_scale_ub is -1.0, expected a positive number"),
    "modelopt algorithm": (instead(modelopt("W4A16_NVFP4")), 'quant_algo is "W4A16_NVFP4", expected FP8 or'),
    "modelopt AWQ": (
        instead(nested("NVFP4", pre_quant_scale=True) | {"quant_method": "modelopt"}),
        "pre_quant_scale is true",
    ),
    "modelopt group": (instead(modelopt("NVFP4", group_size=32)), "group_size is 32, expected null or 16"),
    "modelopt cache": (
        instead(nested("FP8", kv_cache_quant_algo="NVFP4") | {"quant_method": "modelopt"}),
        "kv_cache_quant_algo",
    ),
    "modelopt says two things": (
        described("FP8", weights={"num_bits": 4}),
        "config_groups.g.weights.num_bits is 4, expected 8",
    ),
    "modelopt's strategy": (
        described("FP8", weights={"strategy": "channel"}),
        'g.weights.strategy is "channel", expected null or "tensor"',
    ),
    "modelopt's dynamic": (described("FP8", inputs={"dynamic": True}), "g.input_activations.dynamic is true, expected"),
    "modelopt's group": (
        described("NVFP4", weights={"group_size": 32}),
        "g.weights.group_size is 32, expected null or",
    ),
    "modelopt's symmetry": (described("FP8", inputs={"symmetric": False}), "symmetric is false, expected null or true"),
    "modelopt's weights alone": (described("FP8", inputs=None), "g.input_activations is null, expected an object"),
    "modelopt's targets": (
        described("FP8", targets=["Embedding"]),
        r'g.targets is \["Embedding"\], expected null or \["Linear"\]',
    ),
    "modelopt's unknown": (described("FP8", weights={"observer": "x"}), "g.weights.observer is .*, a field that isn't"),
    "modelopt's mixed targets": (
        instead(
            modelopt(
                "MIXED_PRECISION",
                quantized_layers={UP: {"quant_algo": "FP8"}},
                config_groups={"g": {"targets": ["lm_head"]}},
            )
        ),
        r'g.targets is \["lm_head"\], expected names of quantized_layers',
    ),
    "modelopt's mixed bits": (
        instead(
            modelopt(
                "MIXED_PRECISION",
                quantized_layers={UP: {"quant_algo": "FP8"}},
                config_groups={"g": {"targets": [UP], "weights": {"num_bits": 4}}},
            )
        ),
        "g.weights.num_bits is 4, expected 8",
    ),
    "modelopt's mixed none": (
        instead(modelopt("MIXED_PRECISION", quantized_layers={})),
        r"quantized_layers is \{\}, expected at least one",
    ),
    "no configuration": (
        lambda config, _: config.pop("quantization_config"),
        "quantization_config is missing, and there is no",
    ),
    "not an object": (instead([1]), r"quantization_config is \[1\], expected an object"),
    # What transformers raises for them are errors of four other classes.
    "a field of another type": (lambda config, _: config.update(hidden_size="64"), "hidden_size"),
    "heads that don't divide": (lambda config, _: config.update(num_attention_heads=0), "modulo by zero"),
    "a token beyond the vocabulary": (lambda config, _: config.update(pad_token_id=10**9), "Padding_idx"),
    "a dtype": (lambda config, _: config.update(dtype="nothing"), "nothing"),
    "an architecture": (lambda config, _: config.__setitem__("model_type", "nothing"), "nothing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, tmp_path):
    folder = copied(tmp_path)
    change, message = CONFIGS[name]
    edit_config(folder, change)
    if message is None:
        load_quantized(folder)
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_quantized(folder)
    assert str(folder / "config.json") in str(caught.value) or "model.safetensors" in str(caught.value)


def test_the_most_specific_target_counts(tmp_path):
    """Whatever the groups' order: paths, then expressions by the alphabet, then classes, as in compressed-tensors."""
    folder = copied(tmp_path, "fp8_static")
    one = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    token = {**one, "input_activations": {**one["input_activations"], "dynamic": True, "strategy": "token"}}
    keys = {"static": one, "token": token}
    for first, second, path, expected in (
        (("static", "Linear"), ("token", "re:.*up_proj"), UP, "token"),
        (("token", "re:.*up_proj"), ("static", "Linear"), UP, "token"),
        (("static", "re:.*_proj"), ("token", "re:.*up_proj"), UP, "static"),
        (("static", "re:.*_proj"), ("token", UP), UP, "token"),
        (("static", "re:.*_proj"), ("token", UP), UP.replace("up", "gate"), "static"),
    ):
        groups = {str(n): {**keys[kind], "targets": [target]} for n, (kind, target) in enumerate((first, second))}
        edit_config(folder, put("config_groups", groups))
        theirs = QuantizationConfig.model_validate(
            json.loads((folder / "config.json").read_text())["quantization_config"]
        )
        matched = match_targets(path, nn.Linear(1, 1), [t for g in theirs.config_groups.values() for t in g.targets])
        chosen = next(kind for kind, target in (first, second) if target == matched[0])
        key = read_recipe(folder).format_of((path,), nn.Linear(1, 1)).scheme.input_quant_key
        assert chosen == expected
        assert key == {"static": FP8_STATIC_TENSOR, "token": FP8_DYNAMIC_TOKEN}[expected]
    groups["0"]["targets"] = [UP]
    edit_config(folder, put("config_groups", groups))
    with pytest.raises(
        ValueError, match=rf'config_groups\.1\.targets is .*, expected none of another group, .* "{UP}"'
    ):
        load_quantized(folder)


def test_what_modelopt_describes_is_understood(tmp_path):
    """As its exporter writes it: "dynamic" is false everywhere, and an algorithm that it has no words for is named."""
    base = {"dynamic": False, "num_bits": 8, "type": "float"}
    layers = {
        "FP8": (base, base),
        "FP8_PER_CHANNEL_PER_TOKEN": ({**base, "strategy": "channel"}, base),
        "NVFP4": ({**base, "num_bits": 4, "group_size": 16},) * 2,
        "MXFP8": ({**base, "group_size": 32},) * 2,
        "FP8_PB_WO": None,
    }
    groups = {
        name: {"quant_algo": name} if parts is None else dict(zip(("weights", "input_activations"), parts, strict=True))
        for name, parts in layers.items()
    }
    for group in groups.values():
        group["targets"] = ["Linear"]
    mixed = {name: {**group, "targets": [f"layer.{name}"]} for name, group in groups.items()}
    quantized = {f"layer.{name}": {"quant_algo": name} for name in layers}
    each = [modelopt(name, config_groups={"group_0": groups[name]}) for name in ("FP8", "NVFP4")]
    for quantization in *each, modelopt("MIXED_PRECISION", config_groups=mixed, quantized_layers=quantized):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        algorithm = quantization["quant_algo"]
        theirs = nested(algorithm, **({"quantized_layers": quantized} if "MIXED" in algorithm else {}))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(theirs))
        recipe = read_recipe(tmp_path)
        assert recipe.format_of(("lm_head",), nn.Linear(1, 1)) is None
        name = "NVFP4" if "MIXED" in algorithm else algorithm
        form = recipe.format_of((f"layer.{name}",), nn.Linear(1, 1))
        assert form.scheme.input_quant_key == {"FP8": FP8_STATIC_TENSOR, "NVFP4": NVFP4}[name]


def test_two_files_that_disagree(tmp_path):
    folder = copied(tmp_path)
    edit_config(folder, instead(modelopt("FP8")))
    (folder / "hf_quant_config.json").write_text(json.dumps(nested("NVFP4")))
    other = folder / "hf_quant_config.json"
    for theirs, message in (
        (nested("NVFP4"), "quant_algo is 'FP8', .*hf_quant_config.json has 'NVFP4'"),
        (nested("FP8", exclude_modules=["*mlp*"]), r"exclude_modules is \['lm_head'\], .* has \['\*mlp\*'\]"),
        (nested("FP8", kv_cache_quant_algo="FP8"), "kv_cache_quant_algo is None, .*hf_quant_config.json has 'FP8'"),
        ({"quantization": [1]}, r"hf_quant_config.json: quantization is \[1\], expected an object"),
        (
            {"quantization": {"quant_algo": ["FP8"]}},
            r"config.json: quantization.quant_algo is \[\"FP8\"\], expected str",
        ),
        ({"quant_algo": "FP8", "more": 1}, r"hf_quant_config.json: more is 1, a field that isn't known"),
    ):
        other.write_text(json.dumps(theirs))
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)
    mixed = [{"quantized_layers": {UP: {"quant_algo": name}}} for name in ("FP8", "FP8_PB_WO")]
    edit_config(folder, instead(modelopt("MIXED_PRECISION", **mixed[0])))
    other.write_text(json.dumps(nested("MIXED_PRECISION", **mixed[1])))
    message = rf"quantized_layers is \[\('{UP}', 'FP8'\)\], .* has \[\('{UP}', 'FP8_PB_WO'\)\]"
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def test_columns_that_are_no_multiple_of_a_group(tmp_path):
    folder = copied(tmp_path, "mxfp8")
    edit_config(folder, lambda config, _: config.update(intermediate_size=150))
    with pytest.raises(ValueError, match=r"config.json: .*down_proj: input has 150 columns, MXFP8 expects a multiple"):
        load_quantized(folder)
