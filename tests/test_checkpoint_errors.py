"""What `load_quantized` refuses, by file and name; nothing of it is silent."""

import json
import shutil

import pytest
import torch
from patching import quantize, tiny
from safetensors.torch import load_file, save_file
from test_checkpoint import DEEPSEEK, modelopt, nested
from torch import nn

from quant import FP8_STATIC_TENSOR, NVFP4
from quant.checkpoint import load_quantized, save_quantized
from quant.checkpoint.config import read_recipe

UP = "model.layers.1.mlp.up_proj"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("originals")
    for scheme in "fp8_static", "int8_static_asym", "nvfp4", "mxfp8":
        save_quantized(quantize(tiny(num_hidden_layers=2), scheme), folder / scheme)
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    def copied(scheme="fp8_static"):
        return shutil.copytree(originals / scheme, tmp_path / scheme)

    return copied


def edit_config(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config, config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_originals_load(originals):
    for folder in originals.iterdir():
        load_quantized(folder)


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
    "format": (put("format", "pack-quantized"), None),  # the group's own format counts
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
def test_configurations(name, copy):
    folder = copy()
    change, message = CONFIGS[name]
    edit_config(folder, change)
    if message is None:
        load_quantized(folder)
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_quantized(folder)
    assert str(folder / "config.json") in str(caught.value) or "model.safetensors" in str(caught.value)


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
        assert recipe.format_of("lm_head", nn.Linear(1, 1)) is None
        name = "NVFP4" if "MIXED" in algorithm else algorithm
        form = recipe.format_of(f"layer.{name}", nn.Linear(1, 1))
        assert form.scheme.input_quant_key == {"FP8": FP8_STATIC_TENSOR, "NVFP4": NVFP4}[name]


def test_two_files_that_disagree(copy):
    folder = copy()
    edit_config(folder, instead(modelopt("FP8")))
    (folder / "hf_quant_config.json").write_text(json.dumps(nested("NVFP4")))
    other = folder / "hf_quant_config.json"
    for theirs, message in (
        (nested("NVFP4"), "quant_algo is 'FP8', .*hf_quant_config.json has 'NVFP4'"),
        (nested("FP8", exclude_modules=["*mlp*"]), r"exclude_modules is \['lm_head'\], .* has \['\*mlp\*'\]"),
        (nested("FP8", kv_cache_quant_algo="FP8"), "kv_cache_quant_algo is None, .*hf_quant_config.json has 'FP8'"),
        ({"quantization": [1]}, r"hf_quant_config.json.quantization is \[1\], expected an object"),
        ({"quantization": {"quant_algo": ["FP8"]}}, r"quantization.quant_algo is \[\"FP8\"\], expected str"),
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


def renamed(old, new):
    return lambda t: t.__setitem__(new, t.pop(old))


def becomes(name, change):
    return lambda t: t.__setitem__(name, change(t[name].clone()).contiguous())


def filled(value, at=0):
    def change(x):
        x.view(-1)[at] = value
        return x

    return change


TENSORS = {
    "missing scale": ("fp8_static", lambda t: t.pop(f"{UP}.weight_scale"), f"missing {UP}.weight_scale$"),
    "missing weight": ("nvfp4", lambda t: t.pop(f"{UP}.weight_packed"), f"missing {UP}.weight_packed$"),
    "missing norm": ("fp8_static", lambda t: t.pop("model.norm.weight"), "missing model.norm.weight$"),
    "many missing": ("fp8_static", lambda t: [t.pop(n) for n in [*t] if "_proj" in n], "and 34 more"),
    "another name": ("fp8_static", renamed(f"{UP}.input_scale", f"{UP}.in_scale"), f"missing {UP}.input_scale"),
    "unexpected": ("fp8_static", lambda t: t.update(extra=torch.ones(2)), "unexpected extra$"),
    "a cache's scale": (
        "fp8_static",
        lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}),
        "unexpected .*k_scale",
    ),
    "shape of codes": (
        "fp8_static",
        becomes(f"{UP}.weight", lambda x: x[:-1]),
        rf"{UP}.weight is \[159, 64\], expected",
    ),
    "shape of scales": (
        "fp8_static",
        becomes(f"{UP}.weight_scale", lambda x: x[1:]),
        r"weight_scale is \[159, 1\], expected",
    ),
    "transposed": (
        "fp8_static",
        becomes(f"{UP}.weight", lambda x: x.t()),
        r"weight is \[64, 160\], expected \[160, 64\]",
    ),
    "dtype of codes": (
        "fp8_static",
        becomes(f"{UP}.weight", lambda x: x.view(torch.int8)),
        "weight is torch.int8, expected",
    ),
    "float weights": (
        "fp8_static",
        becomes(f"{UP}.weight", lambda x: x.bfloat16()),
        "weight is torch.bfloat16, expected",
    ),
    "dtype of scales": (
        "fp8_static",
        becomes(f"{UP}.weight_scale", lambda x: x.double()),
        "weight_scale is torch.float64, expected",
    ),
    "dtype of a norm": (
        "fp8_static",
        becomes("model.norm.weight", lambda x: x.to(FP8)),
        "norm.weight is torch.float8_e4m3fn",
    ),
    "shape of a norm": (
        "fp8_static",
        becomes("model.norm.weight", lambda x: x[1:]),
        r"norm.weight is \[63\], expected \[64\]",
    ),
    "NaN codes": (
        "fp8_static",
        becomes(f"{UP}.weight", filled(float("nan"), 77)),
        "weight has values that aren't finite",
    ),
    "NaN scale": (
        "fp8_static",
        becomes(f"{UP}.weight_scale", filled(float("nan"))),
        f"safetensors: {UP}: weight_scale has",
    ),
    "negative scale": ("fp8_static", becomes(f"{UP}.input_scale", filled(-1.0)), f"safetensors: {UP}: input_scale has"),
    "zero divisor": ("nvfp4", becomes(f"{UP}.weight_global_scale", filled(0.0)), f"{UP}: weight_scale2 has"),
    "NaN exponent": ("mxfp8", becomes(f"{UP}.weight_scale", filled(255)), f"{UP}: weight_scale has values"),
    "a zero point": (
        "fp8_static",
        lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(1)}),
        "values other than zero",
    ),
    "a zero point as float": (
        "int8_static_asym",
        becomes(f"{UP}.input_zero_point", lambda x: x.float()),
        "input_zero_point is torch.float32",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, copy):
    scheme, change, message = TENSORS[name]
    folder = copy(scheme)
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_quantized(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_zero_points_that_are_zero_are_no_error(copy):
    folder = copy()
    edit_tensors(folder, lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(160, 1)}))
    load_quantized(folder)


def test_damaged_files(copy):
    folder = copy()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    broken = [whole[:-1], whole[: len(whole) // 2], whole[:7], b"", whole + b"x", b"\xff" * 8 + whole[8:]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model.safetensors: "):
            load_quantized(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        load_quantized(folder)
    for name in "generation_config.json", "config.json":
        for data in "{", "[]", "[" * 100_000:
            (folder / name).write_text(data)
            with pytest.raises(ValueError, match=rf"/{name}:? "):
                load_quantized(folder)
        (folder / name).unlink()


def test_damaged_indices(copy):
    folder = copy()
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    whole = dict.fromkeys(names, "one.safetensors")
    first, *others = names
    for placed, message in (
        (whole | {"nothing": "one.safetensors"}, "weight_map places nothing in one.safetensors, which doesn't have it"),
        (dict.fromkeys(others, "one.safetensors"), "one.safetensors: .* isn't in the index's weight_map"),
        (whole | {first: "two.safetensors"}, "two.safetensors: "),
        (whole | {first: "../one.safetensors"}, "expected a file of this folder"),
        (whole | {first: ".."}, "weight_map names '..', expected a file of this folder"),
        (whole | {first: ""}, "weight_map names '', expected a file of this folder"),
        (whole | {first: "\0"}, "expected a file of this folder"),
        (None, "weight_map is NoneType"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    placed = whole | {first: "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ValueError, match=r"and so has"):
        load_quantized(folder)


def test_columns_that_are_no_multiple_of_a_group(copy):
    folder = copy("mxfp8")
    edit_config(folder, lambda config, _: config.update(intermediate_size=150))
    with pytest.raises(ValueError, match=r"config.json: .*down_proj: input has 150 columns, MXFP8 expects a multiple"):
        load_quantized(folder)


def test_an_output_layer_that_is_quantized_and_tied(copy):
    folder = copy()
    edit_config(folder, lambda config, q: (config.update(tie_word_embeddings=True), q.update(ignore=[])))
    load_tied = {"lm_head.weight": torch.zeros(97, 64).to(FP8), "lm_head.weight_scale": torch.ones(97, 1)}
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    load_quantized(folder)  # the files have none, so it is the embedding
    edit_tensors(folder, lambda t: t.update(load_tied))
    with pytest.raises(ValueError, match=r"config.json: lm_head is quantized, but tie_word_embeddings"):
        load_quantized(folder)


def test_an_output_layer_that_is_tied_and_has_values_of_its_own(copy):
    folder = copy()
    edit_config(folder, lambda config, _: config.update(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head.weight isn't model.embed_tokens.weight, but tie_word_embeddings"):
        load_quantized(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_quantized(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_beyond_float16(copy):
    folder = copy()
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.full((64,), 1e5)}))
    load_quantized(folder)
    with pytest.raises(ValueError, match=r"model.norm.weight has values beyond torch.float16"):
        load_quantized(folder, torch.float16)


@pytest.mark.parametrize(
    ("path", "dtype", "error", "message"),
    [
        (3, torch.bfloat16, TypeError, "path is int, expected a str or a Path"),
        ("/nowhere/at/all", torch.bfloat16, ValueError, "path is '/nowhere/at/all', expected a folder"),
        (".", torch.float64, TypeError, "dtype is torch.float64, expected one of"),
        (".", "bfloat16", TypeError, "dtype is 'bfloat16', expected one of"),
    ],
)
def test_arguments(path, dtype, error, message):
    with pytest.raises(error, match=message):
        load_quantized(path, dtype)
