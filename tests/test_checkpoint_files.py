"""Files and tensors that `load_quantized` refuses, by file and name; nothing of it is silent."""

import json
import shutil

import pytest
import torch
from checkpoints import SAVED, copied, edit_config, edit_tensors
from safetensors.torch import load_file

from quant.checkpoint import load_quantized

UP = "model.layers.1.mlp.up_proj"
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("scheme", SAVED)
def test_the_originals_load(scheme, tmp_path):
    load_quantized(copied(tmp_path, scheme))


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
    "a scale without reciprocal": (
        "fp8_static",
        becomes(f"{UP}.input_scale", filled(1e-40)),
        f"safetensors: {UP}: input_scale has values whose reciprocal isn't finite",
    ),
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
def test_tensors(name, tmp_path):
    scheme, change, message = TENSORS[name]
    folder = copied(tmp_path, scheme)
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_quantized(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_a_file_without_tensors(tmp_path):
    folder = copied(tmp_path)
    edit_tensors(folder, dict.clear)
    with pytest.raises(ValueError, match=r"model\.safetensors: missing .* more$"):
        load_quantized(folder)


def test_scales_of_the_cache_have_reciprocals(tmp_path):
    folder = copied(tmp_path)
    edit_config(folder, lambda _, q: q.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("k_scale", "v_scale")]
    edit_tensors(folder, lambda t: t.update({name: torch.ones(1) for name in names}))
    load_quantized(folder)
    edit_tensors(folder, lambda t: t.update({names[3]: torch.tensor([1e-39])}))
    with pytest.raises(
        ValueError, match=rf"{names[3]} is 1\.0.*e-39, expected a positive, finite scale, and so its rec"
    ):
        load_quantized(folder)


def test_zero_points_that_are_zero_are_no_error(tmp_path):
    folder = copied(tmp_path)
    edit_tensors(folder, lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(160, 1)}))
    load_quantized(folder)


def test_damaged_files(tmp_path):
    folder = copied(tmp_path)
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


def test_damaged_indices(tmp_path):
    folder = copied(tmp_path)
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
        ({}, "index.json: weight_map is empty, expected at least one tensor"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        with pytest.raises(ValueError, match=message):
            load_quantized(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole}))
    shutil.copy(folder / "one.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"index.json doesn't name model.safetensors, which is there too: remove the"):
        load_quantized(folder)
    (folder / "model.safetensors").rename(folder / "two.safetensors")
    placed = whole | {first: "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ValueError, match=r"and so has"):
        load_quantized(folder)


def test_an_output_layer_that_is_quantized_and_tied(tmp_path):
    folder = copied(tmp_path)
    edit_config(folder, lambda config, q: (config.update(tie_word_embeddings=True), q.update(ignore=[])))
    load_tied = {"lm_head.weight": torch.zeros(97, 64).to(FP8), "lm_head.weight_scale": torch.ones(97, 1)}
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    load_quantized(folder)  # the files have none, so it is the embedding
    edit_tensors(folder, lambda t: t.update(load_tied))
    with pytest.raises(ValueError, match=r"config.json: lm_head is quantized, but tie_word_embeddings"):
        load_quantized(folder)


def test_an_output_layer_that_is_tied_and_has_values_of_its_own(tmp_path):
    folder = copied(tmp_path)
    edit_config(folder, lambda config, _: config.update(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head.weight isn't model.embed_tokens.weight, but tie_word_embeddings"):
        load_quantized(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_quantized(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_beyond_float16(tmp_path):
    folder = copied(tmp_path)
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
