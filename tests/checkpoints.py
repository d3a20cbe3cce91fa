"""Checkpoints as the tools of each format write them, and what they mean: weights decoded without this library."""

import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from patching import quantize, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from quant import formats
from quant.checkpoint import save_quantized

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INPUT_AMAX = 6.0  # what static scales of inputs are made of, times a layer's number: those of q, k and v differ


# --- compressed-tensors, by the package itself ---


def write_compressed_tensors(model, folder, preset: str, ignore=("lm_head",), change=None) -> None:
    """As llm-compressor does, with the package's own compressors; change: of the scheme, before."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if change is not None:
        change(scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    apply_quantization_config(model, config, show_progress=False)
    modules = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    for number, module in enumerate(modules):
        _observe(module, scheme, INPUT_AMAX + number)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _observe(module, scheme, input_amax: float) -> None:
    args, weight = scheme.weights, module.weight.data.float()
    if args.strategy == "block":
        grouped = blocks(weight, *args.block_structure)
        low, high = grouped.amin((2, 3)), grouped.amax((2, 3))
    elif args.strategy in ("group", "tensor_group"):
        low, high = weight.unflatten(1, (-1, args.group_size)).aminmax(dim=2)
    elif args.strategy == "channel":
        low, high = weight.aminmax(dim=1, keepdim=True)
    else:
        low, high = (x.reshape(1) for x in weight.aminmax())
    gparam = None
    if hasattr(module, "weight_global_scale"):
        gparam = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(gparam)
    scale, _ = calculate_qparams(low, high, args, global_scale=gparam)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
    low, high = torch.tensor([-input_amax]), torch.tensor([input_amax / 2])
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.copy_(generate_gparam(low, high))
    elif hasattr(module, "input_scale"):
        scale, zero_point = calculate_qparams(low, high, scheme.input_activations)
        module.input_scale.data.copy_(scale)
        module.input_zero_point.data.copy_(zero_point)


def one_by_one(model):
    """The model with each expert's projections as linear layers, which is how tools quantize and files name them."""
    for module in list(model.modules()):
        if isinstance(experts := getattr(module, "experts", None), nn.Module):
            module.experts = nn.ModuleList(map(_expert, experts.gate_up_proj.data, experts.down_proj.data))
    return model


def _expert(gate_up, down) -> nn.Module:
    made = nn.Module()
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
        layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        setattr(made, name, layer)
    return made


# --- saved by this library, to be damaged ---

SAVED = "fp8_static", "int8_static_asym", "nvfp4", "mxfp8"


@cache
def _saved(scheme: str) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(0)
    save_quantized(quantize(tiny(num_hidden_layers=2), scheme), folder.name)
    return folder


def copied(folder, scheme: str = "fp8_static"):
    """A checkpoint of a tiny Llama in this folder."""
    return Path(shutil.copytree(_saved(scheme).name, folder / scheme))


def edit_config(folder, change) -> None:
    """change: of the configuration, and the quantization's in it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config, config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- the others, by their definitions ---


def write(model, folder, quantization: dict, convert, file: str = "config.json") -> None:
    """The model's tensors and configuration, with `convert(linear, number)` for each quantized layer's."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if file == "config.json":
        path.write_text(json.dumps({**config, "quantization_config": quantization}))
    else:
        (folder / file).write_text(json.dumps(quantization))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if not (layer in layers and name.endswith("weight")) and name != "lm_head.weight":
            tensors[name] = tensor.clone()
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight.data.clone()
    for number, (name, layer) in enumerate(layers.items()):
        made = convert(layer.weight.data.float(), number)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def blocks(weight, high: int, wide: int):
    """[N / high, K / wide, high, wide], padded with zeros."""
    rows, cols = weight.shape
    padded = nn.functional.pad(weight, (0, -cols % wide, 0, -rows % high))
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2)


def fp8(weight, scale):
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(weight, powers=False, size=128):
    """(codes, one scale a block)."""
    scale = blocks(weight, size, size).abs().amax((2, 3)) / 448
    if powers:
        scale = scale.log2().ceil().exp2()
    spread = scale.repeat_interleave(size, 0)[: weight.shape[0]].repeat_interleave(size, 1)[:, : weight.shape[1]]
    return fp8(weight, spread), scale


def deepseek(weight, number, powers=False, name="weight_scale_inv", size=128):
    codes, scale = fp8_blocks(weight, powers, size)
    return {"weight": codes, name: scale.to(torch.float8_e8m0fnu) if powers else scale}


def autofp8(weight, number):
    scale = weight.abs().max() / 448
    return {
        "weight": fp8(weight, scale),
        "weight_scale": scale,
        "input_scale": torch.tensor((INPUT_AMAX + number) / 448),
    }


def by_rows(weight, number, shape=(-1, 1)):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": fp8(weight, scale), "weight_scale": scale.reshape(shape)}


def modelopt_blocks(weight, number):
    codes, scale = fp8_blocks(weight)
    return {"weight": codes, "weight_scale": scale[:, None, :, None]}


def modelopt_nvfp4(weight, number):
    scale2 = weight.abs().max() / 2688
    groups = weight.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(2) / 6 / scale2).to(torch.float8_e4m3fn)
    wanted = groups / (scale.float() * scale2).clamp_min(1e-30).unsqueeze(2)
    codes = (wanted.unsqueeze(-1) - E2M1).abs().argmin(-1).flatten(1).to(torch.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    input_scale = torch.tensor((INPUT_AMAX + number) / 2688)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": scale2, "input_scale": input_scale}


def mxfp8(weight, number, name="weight_scale"):
    groups = weight.unflatten(1, (-1, 32))
    exponent = (groups.abs().amax(2) / 448).log2().ceil()
    codes = fp8(groups, exponent.exp2().unsqueeze(2)).flatten(1)
    return {"weight": codes, name: (exponent + 127).to(torch.uint8)}


# --- what they mean ---


def spread(scale, shape):
    """One scale for each element; groups and blocks have 16, 32, 64 or 128 columns or rows, by how many there are."""
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    for dim, size in enumerate(shape):
        if scale.shape[dim] not in (1, size):
            group = next(group for group in (16, 32, 64, 128) if -(-size // group) == scale.shape[dim])
            scale = scale.repeat_interleave(group, dim).narrow(dim, 0, size)
    return scale


def decoded(tensors: dict, layer: str):
    """float32 weight of a layer from the file's tensors, as every format's documentation says."""
    own = {key.removeprefix(f"{layer}."): tensor for key, tensor in tensors.items() if key.startswith(f"{layer}.")}
    codes = next(own[name] for name in ("weight_packed", "weight") if name in own)
    if codes.dtype == torch.uint8:
        values = E2M1[torch.stack([codes & 15, codes >> 4], 2).flatten(1).long()]
    else:
        values = codes.float()
    scale = next(own[name] for name in ("weight_scale", "weight_scale_inv") if name in own)
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    if "weight_global_scale" in own:
        scale = scale / own["weight_global_scale"]
    return values * spread(scale, values.shape) * own.get("weight_scale_2", 1.0)


def input_options(tensors: dict, layer: str, key) -> dict:
    """What `quant.formats.quantize` takes for the layer's input."""
    if key.scale2 is not None:
        divisor = tensors.get(f"{layer}.input_global_scale")
        return {"scale2": (tensors[f"{layer}.input_scale"] if divisor is None else 1 / divisor).reshape(1)}
    if not key.scale.static:
        return {}
    options = {"scale": tensors[f"{layer}.input_scale"].float().reshape(1)}
    if not key.symmetric:
        options["zero_point"] = tensors[f"{layer}.input_zero_point"].int()
    return options


def reference(model, tensors: dict, keys: dict, bound=None):
    """A stock float32 model with decoded weights, whose layers' inputs are quantized by the reference and decoded."""
    for name, layer in model.named_modules():
        if name in keys:
            layer.weight = nn.Parameter(decoded(tensors, name), requires_grad=False)
            options = input_options(tensors, name, keys[name])
            if bound is not None:
                options["scale_ub"] = torch.tensor([bound])
            layer.register_forward_pre_hook(partial(_quantized_input, keys[name], options))
    return model


def _quantized_input(key, options, _, args):
    data, scale, zero_point = formats.quantize(args[0], key, **options)
    options = {name: value for name, value in options.items() if name == "scale2"}
    return formats.dequantize(data, scale, key, zero_point=zero_point, **options)
