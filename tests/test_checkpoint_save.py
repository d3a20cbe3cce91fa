"""What `save_quantized` writes is the model, to the bit, for us and for transformers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from checkpoints import copied
from compare import assert_as_near, assert_same
from patching import FAMILIES, quantize, tiny, tiny_model, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import models_patch
from quant import FP8_DYNAMIC_GROUP_128
from quant.checkpoint import Calibration, calibrate, load_quantized, save, save_quantized
from quant.checkpoint.formats import divisor_of
from quant.methods import SCHEMES, ScaledLinearMethod, Scheme, quantize_model
from quant.methods.scheme import storable

FAMILY_SCHEMES = dict(zip([*FAMILIES], [*SCHEMES] * 2, strict=False))


def assert_same_model(actual, expected):
    mine, theirs = actual.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same(mine[name], tensor, name)
    with torch.no_grad():
        assert_same(actual(tokens()).logits, expected(tokens()).logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_it_has_the_same_bits(scheme, tmp_path):
    model = quantize(tiny(), scheme)
    save_quantized(model, tmp_path / "one")
    assert_same_model(load_quantized(tmp_path / "one"), model)
    save_quantized(load_quantized(tmp_path / "one"), str(tmp_path / "two"))
    for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items():
        assert_same(load_file(tmp_path / "two" / "model.safetensors")[name], tensor, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    """Experts, latents, tied embeddings and two kinds of rotation, each with a scheme; patched before it is saved."""
    scheme = FAMILY_SCHEMES[family]
    ignore = ("lm_head", "kv_b_proj") if "Deepseek" in family else ("lm_head",)
    if "group" in scheme or "mx" in scheme or "nv" in scheme:
        scheme = "fp8_token"  # sizes that groups don't divide
    model = quantize(tiny_model(family), scheme, ignore=ignore)
    if family == "DeepseekV3":  # which from_pretrained has in float32, and from_config hasn't
        model.model.layers[1].mlp.gate.e_score_correction_bias = torch.rand(4)
    expected = model(tokens()).logits
    models_patch.patch(model)
    save_quantized(model, tmp_path / "model")
    models_patch.unpatch(model)
    loaded = load_quantized(tmp_path / "model")
    assert_same_model(loaded, model)
    assert_same(loaded(tokens()).logits, expected)


def test_in_several_files_and_another_dtype(tmp_path):
    model = quantize(tiny(dtype=torch.float16, attention_bias=True), "int8_token")
    save_quantized(model, tmp_path / "model", max_shard_size="0.06 mb")
    assert len([*(tmp_path / "model").glob("*.safetensors")]) > 2
    assert_same_model(load_quantized(tmp_path / "model", torch.float16), model)


def test_two_schemes_and_scales_of_the_cache(tmp_path):
    model = quantize(tiny(), "int8_token", ignore=("lm_head", "down_proj"))
    other = quantize(tiny(), "mxfp8")
    for mine, theirs in zip(model.model.layers, other.model.layers, strict=True):
        mine.mlp.down_proj = theirs.mlp.down_proj
        for name in "k_scale", "v_scale":
            mine.self_attn.register_buffer(name, torch.tensor([0.25]))
    save_quantized(model, tmp_path / "model")
    assert_same_model(load_quantized(tmp_path / "model"), model)
    written = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision"
    assert written["kv_cache_scheme"]["strategy"] == "tensor"


# Of formats with one-byte scales compressed-tensors makes bfloat16 weights, whatever the model's dtype.
@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_it(scheme, tmp_path):
    """With compressed-tensors, which decodes weights and quantizes what they meet."""
    dtype = torch.bfloat16 if SCHEMES[scheme].weight_key.scale.dtype != torch.float32 else torch.float32
    sizes = {"dtype": dtype, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    exact, ids = tiny(**{**sizes, "dtype": torch.float32})(tokens()).logits, tokens()
    model = quantize(tiny(**sizes), scheme)
    save_quantized(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    mine, expected = model(ids).logits, theirs(ids).logits
    assert_as_near(mine, exact, expected)
    assert_as_near(expected, exact, mine)


def test_divisors_of_second_scales():
    """Every scale that a layer has has one, and it gives the scale back."""
    scales = storable(torch.cat([torch.rand(1000) + 0.5, torch.rand(1000) * 1e-30, torch.tensor([2.0**-126, 1.0])]))
    for scale in scales:
        assert 1 / divisor_of(scale) == scale
    lost = next(s for s in torch.rand(1000) + 0.5 if storable(s) != s)
    with pytest.raises(ValueError, match=r"isn't the reciprocal of a float32"):
        divisor_of(lost)


def _other_method() -> nn.Module:
    model = quantize(tiny(), "int8_token")
    model.model.layers[0].mlp.up_proj.method = object()
    return model


def _with(scheme: Scheme, name: str) -> nn.Module:
    model = quantize(tiny(), "fp8_block" if "power" in name else "fp8_token")
    layer = model.model.layers[0].mlp.up_proj
    layer.method = ScaledLinearMethod(scheme)
    return model


POWERS = Scheme(FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True), SCHEMES["fp8_block"].weight_key)
BOUNDED = Scheme(SCHEMES["fp8_token"].input_quant_key, SCHEMES["fp8_token"].weight_key, bounded=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "model is Linear, expected a model of transformers"),
        (lambda: quantize(tiny(), "int8_token").model, ValueError, "model is LlamaModel, expected one that generates"),
        (
            lambda: quantize(tiny(), "int8_token").to("meta"),
            ValueError,
            "embed_tokens.weight is on meta, expected values",
        ),
        (tiny, ValueError, "model is LlamaForCausalLM and has no QuantLinear"),
        (_other_method, ValueError, "layers.0.mlp.up_proj has a object, expected a ScaledLinearMethod"),
        (lambda: _with(POWERS, "power"), ValueError, "layers.0.mlp.up_proj: input is .*power_of_two.* no words for"),
        (lambda: _with(BOUNDED, "bound"), ValueError, "layers.0.mlp.up_proj has an input_scale_ub"),
    ],
)
def test_what_it_refuses(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_quantized(make(), tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("way", ["quantized", "loaded", "copied", "patched"])
def test_save_pretrained_refuses_what_nothing_would_load(way, tmp_path):
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    if way == "loaded":
        model = load_quantized(copied(tmp_path))
    elif way == "copied":
        model = copy.deepcopy(model)
    elif way == "patched":
        models_patch.patch(model)
    for each in model, model.model:
        with pytest.raises(RuntimeError, match=r"save_pretrained: the model is quantized.*checkpoint.save_quantized"):
            each.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    torch.save(model.state_dict(), tmp_path / "state")
    for name, tensor in torch.load(tmp_path / "state").items():
        assert_same(tensor, model.state_dict()[name], name)


def test_folders(tmp_path, monkeypatch):
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    (tmp_path / "empty").mkdir()
    save_quantized(model, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty', expected a folder that is new or empty"):
        save_quantized(model, tmp_path / "empty")
    with pytest.raises(TypeError, match=r"path is int, expected a str or a Path"):
        save_quantized(model, 3)
    monkeypatch.setattr("quant.checkpoint.save.save_file", _full)
    with pytest.raises(OSError, match=r"No space"):
        save_quantized(model, tmp_path / "new")
    with pytest.raises(OSError, match=r"No space"):
        save_quantized(model, tmp_path / "a" / "b" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ValueError, match=r"new.partial is there, of a call that was ended or still runs: remove it"):
        save_quantized(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new.partial"]


def test_folders_by_other_names(tmp_path, monkeypatch):
    """A link is what it leads to; what can't be replaced is refused before anything is written."""
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("new")
    for name, real in ("link", "real"), ("dangling", "new"), ("real/../other", "other"):
        save_quantized(model, tmp_path / name)
        assert (tmp_path / real / "config.json").exists()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for path, message in (
        (".", r"path is '\.', the working directory or a mount, expected a folder that can be replaced"),
        ("", r"path is '', the working directory"),
        (Path("../here"), r"path is '\.\./here', the working directory"),
        (tmp_path / "file", r"file', expected a folder that is new or empty"),
        (tmp_path / "file" / "in" / "it", r"in/it', expected a folder that is new or empty"),
        (tmp_path / "loop", r"loop'"),
        ("a\0b", r"path is 'a\\x00b': embedded null"),
        ("n" * 250, r"path is 'n{250}': .*File name too long: .*\.partial"),
        ("/proc/new", r"path is '/proc/new': .*No such file or directory: '/proc/new.partial'"),
        ("/proc/new/in/it", r"path is '/proc/new/in/it': .*No such file or directory"),
    ):
        with pytest.raises(ValueError, match=message):
            save_quantized(model, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_can_not_be_looked_at(tmp_path, monkeypatch):
    """A folder without permission is refused by name; a working directory that is gone is no reason."""
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    save_quantized(model, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
    (tmp_path / "closed").mkdir()

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(ValueError, match=r"save_quantized: path is .*closed': .*Permission denied: .*closed'"):
        save_quantized(model, tmp_path / "closed")


@pytest.mark.parametrize(
    ("size", "error"),
    [(-1, ValueError), (0, ValueError), ("0GB", ValueError), ("5", ValueError), ("-1GB", ValueError),
     ("5 gibibytes", ValueError), (True, TypeError), (1e9, TypeError), (None, TypeError)],
)  # fmt: skip
def test_sizes_of_files(size, error, tmp_path):
    model = quantize(tiny(num_hidden_layers=1), "int8_token")
    expected = "a positive int" if error is ValueError else "an int or a str"
    with pytest.raises(error, match=f"max_shard_size is .*, expected {expected}"):
        save_quantized(model, tmp_path / "model", max_shard_size=size)
    assert not [*tmp_path.iterdir()]


def test_of_two_calls_at_once_one_writes(tmp_path, monkeypatch):
    """As ranks make them, say; the other leaves what the first has written."""
    model, tensors = quantize(tiny(num_hidden_layers=1), "int8_token"), save._tensors

    def interrupted(*args):
        monkeypatch.setattr(save, "_tensors", tensors)
        with pytest.raises(ValueError, match=r"model.partial is there, of a call that was ended or still runs"):
            save_quantized(model, tmp_path / "model")
        return tensors(*args)

    monkeypatch.setattr(save, "_tensors", interrupted)
    save_quantized(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    load_quantized(tmp_path / "model")


def _full(*_):
    raise OSError("No space left on device")


# --- calibrate ---


def test_one_calibration_serves_every_static_scheme(capsys):
    batches = [tokens(9), {"input_ids": tokens(5)}]
    spans = calibrate(tiny(), batches)
    assert "calibrate: 2 of 2 batches" in capsys.readouterr().err
    calibrate(tiny(), iter(batches), progress=False)
    assert capsys.readouterr().err == ""
    for scheme in "fp8_static", "int8_static", "int8_static_asym", "nvfp4":
        expected = quantize_model(tiny(), scheme, batches)
        assert_same_model(quantize_model(tiny(), scheme, spans), expected)
    low, high = spans["model.layers.0.mlp.down_proj"].tolist()
    layer = quantize_model(tiny(), "fp8_static", spans).model.layers[0].mlp.down_proj
    assert low < 0 < high
    assert layer.input_scale.item() == (torch.tensor(max(-low, high)) / 448).item()


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (3, [], TypeError, "calibrate: model is int, expected a torch.nn.Module"),
        (None, torch.ones(1), TypeError, "calibrate: data is Tensor, expected a list"),
        (None, {"input_ids": 1}, TypeError, "calibrate: data is dict, expected a list"),
        (None, [], ValueError, "calibrate: data never gives model.layers.0.self_attn.q_proj an input"),
        ("quantized", [], ValueError, "calibrate: model is LlamaForCausalLM, quantized already, and contains no nn.L"),
    ],
)
def test_what_calibrate_refuses(model, data, error, message):
    subject = quantize(tiny(), "int8_token") if model == "quantized" else model or tiny()
    with pytest.raises(error, match=message):
        calibrate(subject, data)


def test_progress_is_a_bool():
    with pytest.raises(TypeError, match="progress is 'no', expected a bool"):
        calibrate(tiny(num_hidden_layers=1), [tokens()], progress="no")


def test_a_calibration_of_another_model():
    spans = calibrate(tiny(num_hidden_layers=1), [tokens()], progress=False)
    with pytest.raises(ValueError, match=r"calibration has nothing of model.layers.1.self_attn.q_proj, expected"):
        quantize_model(tiny(num_hidden_layers=2), "fp8_static", spans)
    wrong = Calibration(dict.fromkeys(spans, torch.tensor([0.0, float("inf")])))
    with pytest.raises(ValueError, match=r"calibration has tensor"):
        quantize_model(tiny(num_hidden_layers=1), "fp8_static", wrong)
