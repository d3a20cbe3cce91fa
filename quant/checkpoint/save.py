"""`save_quantized`: a model of `QuantLinear` layers becomes a compressed-tensors checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_ops.workspace import AllReduceWorkspace

from .. import QuantKey
from ..key import E8M0
from ..methods import QuantExperts, QuantGroupedLinear, QuantLinear, ScaledLinearMethod, Scheme
from ..methods.experts import weights_of
from .config import CONFIG
from .experts import PARTS, holds_experts, parts_of
from .files import INDEX, layer_of
from .formats import ACTIVATIONS, COMPRESSED_TENSORS, KV_SCALES, WEIGHTS, Args, container
from .names import Names


def save_quantized(model: PreTrainedModel, path: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write a model as compressed-tensors does, for transformers, vLLM and `load_quantized`, which gives the same bits.

    Names are those that transformers writes for such a model. Codes and scales are those of the layers, whatever device
    they are on, those of experts one by one, as layers of their own (which transformers reads in FP8 by row and in
    MXFP4); scales are float32, which those who read them widen to anyway. Buffers `k_scale` and `v_scale` of attentions
    are written too. The tokenizer is not.

    Args:
        model: a causal language model of transformers, with `QuantLinear` layers, patched or not.
        path: a folder that doesn't exist, or is empty and not the working directory. It is there once all of it is
            written.
        max_shard_size: of a file, in bytes or as "5GB" (KB, MB, GB, TB).

    Raises:
        TypeError: model is not a transformers model, path is not a str or a Path, max_shard_size no int or str.
        ValueError: path is there and not empty, can't be a folder, or a call that wrote it was ended or still runs;
            max_shard_size isn't positive; model doesn't generate (LlamaModel), is on meta or cut over ranks; no layer
            is quantized; the format has no words for a layer's keys or scales, by its path. Nothing is left behind.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"save_quantized: model is {type(model).__name__}, expected a model of transformers")
    if not isinstance(path, (str, Path)):
        raise TypeError(f"save_quantized: path is {type(path).__name__}, expected a str or a Path")
    folder, size = _folder(path), _bytes(max_shard_size)
    if not model.can_generate():
        raise ValueError(
            f"save_quantized: model is {type(model).__name__}, expected one that generates, with its lm_head"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"save_quantized: {name} is on meta, expected values")
    _check_whole(model)
    partial = folder.with_name(f"{folder.name}.partial")
    new, ours = [parent for parent in partial.parents if not parent.exists()], False
    try:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()  # of two calls at once one has it
        except FileExistsError:
            said = f"{partial} is there, of a call that was ended or still runs: remove it first"
            raise ValueError(f"save_quantized: {said}") from None
        except OSError as error:
            raise ValueError(f"save_quantized: path is {str(path)!r}: {error}") from None
        ours = True
        names = Names(model)
        _write(model, _quantization_config(model, names), _tensors(model, names), partial, size)
        partial.replace(folder)
    except BaseException:
        if ours:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in new:
            with suppress(OSError):  # it isn't there, or others have written to it
                parent.rmdir()
        raise


def _folder(path: str | Path) -> Path:
    """Where to write, which is new, or empty and can be replaced."""
    said = f"save_quantized: path is {str(path)!r}"
    try:
        folder = Path(path).resolve()  # what a link leads to
        there = next(each for each in (folder, *folder.parents) if each.exists())
        taken = not there.is_dir() or (there == folder and any(folder.iterdir()))
        fixed = there == folder and (folder.samefile(".") or folder.is_mount())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from None
    if taken:
        raise ValueError(f"{said}, expected a folder that is new or empty")
    if fixed:
        raise ValueError(f"{said}, the working directory or a mount, expected a folder that can be replaced")
    return folder


_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(size: int | str) -> int:
    """max_shard_size as a number."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"save_quantized: max_shard_size is {type(size).__name__}, expected an int or a str")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.upper()) if isinstance(size, str) else None
    count = size if isinstance(size, int) else int(float(found[1]) * _SIZES[found[2]]) if found else 0
    if count < 1:
        raise ValueError(f'save_quantized: max_shard_size is {size!r}, expected a positive int, or a size as "5GB"')
    return count


def _check_whole(model: nn.Module) -> None:
    """Raise where ranks have a part each, as `models_patch.shard` leaves them, whose hooks hold their workspace."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    workspaces = (getattr(hook, "workspace", None) for hook in hooks)
    cut = next((each for each in workspaces if isinstance(each, AllReduceWorkspace)), None)
    if cut is not None:
        raise ValueError(
            f"save_quantized: model is cut over {cut.world_size} ranks, and a checkpoint would hold this rank's part "
            "as if it were the whole: quantize and save a whole one"
        )


def _write(model: PreTrainedModel, quantization: dict, tensors: dict[str, Tensor], folder: Path, size: int) -> None:
    model.config.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"architectures": [type(model).__name__], "quantization_config": quantization}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# --- the configuration ---


def _quantization_config(model: nn.Module, names: Names) -> dict[str, Any]:
    layers: dict[Scheme, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            stacked = isinstance(module, QuantGroupedLinear)
            layers.setdefault(_scheme(path, module), []).extend((_targets if stacked else _called)(path, names))
    if not layers:
        raise ValueError(f"save_quantized: model is {type(model).__name__} and has no QuantLinear")
    groups, formats = {}, set()
    for number, (scheme, paths) in enumerate(layers.items()):
        form = container(scheme.weight_key)[0]
        formats.add(form)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(layers) == 1 else paths,
            "weights": _args(WEIGHTS, scheme.weight_key).to_json(),
            "input_activations": _args(ACTIVATIONS, scheme.input_quant_key).to_json(),
            "output_activations": None,
            "format": form,
        }
    scaled = any(name in module._buffers for module in model.modules() for name in KV_SCALES)
    cache = Args("float", 8, "tensor").to_json() if scaled else None
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(model, names),
        "kv_cache_scheme": cache,
        "global_compression_ratio": None,
    }


def _ignored(model: nn.Module, names: Names) -> list[str]:
    """What isn't quantized: linear layers, experts, and routers, which in vLLM's Qwen3-MoE are linear layers."""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found += _called(path, names)
        elif isinstance(module, QuantExperts) or holds_experts(module):
            block = layer_of(path)
            for name, other in model.get_submodule(block).named_children():
                if isinstance(getattr(other, "weight", None), nn.Parameter) and not isinstance(other, nn.Linear):
                    found += _called(f"{block}.{name}", names)
            if holds_experts(module):
                found += [f"re:{re.escape(layer_of(each))}[.]" for each in _called(f"{path}.0", names)]
    return found


def _called(path: str, names: Names) -> tuple[str, ...]:
    """A layer's path in files, by which vLLM knows it, and the model's, by which transformers does."""
    return tuple(dict.fromkeys((layer_of(names.of_file(f"{path}.weight")), path)))


def _targets(path: str, names: Names) -> list[str]:
    """The layers of the files that a stacked one is."""
    experts, _, name = path.rpartition(".")
    each = [_called(f"{experts}.0.{part}", names) for part in PARTS[name]]
    found = []
    for parts in zip(*each, strict=True):
        own = "|".join(part.rpartition(".")[2] for part in parts)
        found.append(f"re:{re.escape(layer_of(layer_of(parts[0])))}[.][0-9]+[.]({own})$")
    return found


def _scheme(path: str, layer: QuantLinear) -> Scheme:
    """The layer's, of which the format has every part."""
    if not isinstance(layer.method, ScaledLinearMethod):
        raise ValueError(f"save_quantized: {path} has a {type(layer.method).__name__}, expected a ScaledLinearMethod")
    scheme = layer.method.scheme
    for name, key, table in (
        ("input", scheme.input_quant_key, ACTIVATIONS),
        ("weight", scheme.weight_key, WEIGHTS),
    ):
        if key not in table.values():
            raise ValueError(f"save_quantized: {path}: {name} is {key}, which compressed-tensors has no words for")
    if scheme.bounded:
        raise ValueError(f"save_quantized: {path} has an input_scale_ub, which compressed-tensors has no words for")
    return scheme


def _args(table: dict[Args, QuantKey], key: QuantKey) -> Args:
    return next(args for args, each in table.items() if each == key)


# --- the tensors ---


def _tensors(model: PreTrainedModel, names: Names) -> dict[str, Tensor]:
    quantized = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tensors: dict[str, Tensor] = {}
    owners: dict[tuple[int, torch.Size], str] = {}
    plain: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, QuantExperts):
            tensors |= _of_experts(path, module)
        elif holds_experts(module) and names.one_by_one(path):
            plain |= {f"{path}.{name}" for name in PARTS}
            for name, stacked, part in parts_of(path, module):
                weight, _ = weights_of(module, stacked.rpartition(".")[2])
                tensors[f"{name}.weight"] = weight[part.expert][part.rows].cpu().clone()
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        if isinstance(layer := quantized.get(path), QuantGroupedLinear) or key in plain:
            continue
        if layer is not None and name != "bias":
            key, tensor = _stored(path, layer, name, tensor)
        elif tensor.numel() and owners.setdefault((tensor.data_ptr(), tensor.shape), key) != key:
            if key not in tied:  # safetensors has no shared memory
                tensor = tensor.clone()
            else:
                continue
        tensors[key] = tensor.cpu()
    made = {}
    for key, tensor in tensors.items():
        name = names.of_file(key)
        if (read := names.of_model(name)) != key:
            raise ValueError(f"save_quantized: {key} would be {name} in files, which transformers reads as {read}")
        made[name] = tensor
    return made


def _of_experts(path: str, module: QuantExperts) -> dict[str, Tensor]:
    """By the names of linear layers of their own, which is how files have them."""
    tensors = {}
    for name, stacked, part in parts_of(path, module):
        layer = module.get_submodule(stacked.removeprefix(f"{path}."))
        assert isinstance(layer, QuantGroupedLinear)
        high = layer.method.scheme.weight_key.scale.group_shape.rows
        if high > 1 and (part.rows.step or part.rows.start % high):
            raise ValueError(
                f"save_quantized: {path} has blocks of {high} rows of gates and ups, which files have apart"
            )
        for buffer, tensor in layer.named_buffers(recurse=False):
            own = part.of(layer, buffer, tensor)
            key, own = (f"{name}.bias", own) if buffer == "bias" else _stored(name, layer, buffer, own)
            tensors[key] = own.cpu().clone()
    return tensors


def _stored(path: str, layer: QuantLinear, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    stored = COMPRESSED_TENSORS.stored(name, layer.method.scheme.weight_key)  # type: ignore[attr-defined]
    try:
        tensor = stored.save(tensor)
    except ValueError as error:
        raise ValueError(f"save_quantized: {path}: {name} {error}") from None
    if tensor.dtype == E8M0:
        tensor = tensor.view(torch.uint8)
    elif name == "weight_scale" and tensor.numel() == 1 and layer.out_features > 1:
        tensor = tensor.reshape(-1)  # one scale is [1], but for the one row of a weight by rows
    return f"{path}.{stored.names[0]}", tensor
