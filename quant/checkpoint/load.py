"""`load_quantized`: a folder of config.json and safetensors files becomes a model whose layers are `QuantLinear`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..key import FP8
from ..methods import QuantGroupedLinear, QuantLinear, ScaledLinearMethod
from ..methods.convert import refuse_save_pretrained
from ..methods.experts import serves, stacks_weights
from . import experts
from .config import CONFIG, Recipe, read_recipe
from .fields import read_json
from .files import TensorFiles, layer_of, open_tensors
from .formats import FLOATS, KV_SCALES, Format, cast, fit
from .names import Names

GENERATION_CONFIG = "generation_config.json"
_SHOWN = 8  # names in a message


def load_quantized(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The causal language model in a folder, on the CPU, ready to run; its quantized layers are `QuantLinear`.

    Experts, which files have one by one, become `QuantExperts`. Names are the model's, or those that transformers
    converts to them.

    Formats (docs/checkpoints.md lists them, with fields and tensors): compressed-tensors FP8, INT8, NVFP4, MXFP8 and
    MXFP4; `fp8` of DeepSeek and AutoFP8; `fbgemm_fp8`; ModelOpt's; `mxfp4` of gpt-oss, whose experts get their input in
    MXFP8. Codes and scales are taken as they are, nothing is quantized anew; scales become float32, which loses
    nothing, and NVFP4's divisors their reciprocals, rounded once. The layers of a model keep scales of their own,
    though they have the same input.

    The model is built without memory, and tensors are read one by one. Scales of a key-value cache become the buffers
    `k_scale` and `v_scale` (float32 [1]) of the attentions, for `rope_kv_cache_write` and `paged_attention`; the model
    itself doesn't read them.

    Args:
        path: a folder with config.json, and model.safetensors or model.safetensors.index.json.
        dtype: bfloat16, float16 or float32: of activations and of what isn't quantized, but for what the model itself
            keeps in float32.

    Raises:
        TypeError: path or dtype is not as above.
        ValueError: a field is unknown or not served, a file is damaged or missing, a tensor is missing, unexpected, or
            not of the shape and dtype its format has, or a scale isn't positive and finite: by file and name.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"load_quantized: path is {type(path).__name__}, expected a str or a Path")
    if dtype not in FLOATS:
        raise TypeError(f"load_quantized: dtype is {dtype!r}, expected one of {FLOATS}")
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"load_quantized: path is {str(path)!r}, expected a folder")
    recipe, generation = read_recipe(folder), _generation_config(folder)
    with open_tensors(folder) as files:
        model = _empty_model(folder, dtype)
        slots = _Slots(model, recipe, files, folder / CONFIG, dtype)
        slots.check_names()
        slots.fill(dtype)
        slots.check_tied()
    model.tie_weights()
    for path_of, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            try:
                layer.method.process_weights_after_loading(layer)
            except ValueError as error:
                raise ValueError(f"{slots.file_of(path_of)}: {error}") from None
    if generation is not None:
        model.generation_config = generation
    refuse_save_pretrained(model)
    return model.eval()


def _empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model whose parameters are on meta; its buffers aren't, since files don't hold most of them."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        vars(config).pop("quantization_config", None)  # transformers would quantize by it
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # of whatever class: a config is built, and a model by it
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (path := folder / GENERATION_CONFIG).exists():
        return None
    read_json(path)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


class _Slots:
    """Which tensor of the files goes where.

    takes: by the tensor's name, the module and the name of its parameter or buffer; where several have the same, all.
    parts: by the tensor's name, where in the layers of experts it goes.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, files: TensorFiles, config: Path, dtype: torch.dtype):
        self.model, self.files, self.names = model, files, Names(model)
        files.rename(self.names.of_model)
        self.takes: dict[str, list[tuple[str, str]]] = {}
        self.parts: dict[str, experts.Slot] = {}
        self.formats: dict[str, Format] = {}
        self.missing: list[str] = []
        self.zeros: list[str] = []
        self.tied = self._tied_names()
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (form := recipe.format_of(self._called(path), module)) is not None:
                if f"{path}.weight" in self.tied and not self._has_scales(path, form):
                    continue  # the embedding's, which isn't quantized
                if f"{path}.weight" in self.tied:
                    raise ValueError(f"{config}: {path} is quantized, but tie_word_embeddings says it is the embedding")
                if type(module) is not nn.Linear:  # a router, of which configurations by class don't think
                    if self._has_scales(path, form):
                        raise ValueError(f"{config}: {path} is quantized, but a {type(module).__name__} takes no codes")
                    continue
                self._add_quantized(path, module, form, config)
            elif experts.holds_experts(module) or stacks_weights(module):
                self._add_experts(path, module, recipe, config, dtype)
        if not self.formats:
            raise ValueError(f"{config}: quantization_config leaves no layer of {type(model).__name__} quantized")
        if recipe.kv_cache:
            self._add_kv_scales(required=recipe.kv_cache == "required")
        self._add_plain()

    def _called(self, path: str) -> tuple[str, ...]:
        """A layer's names: the model's, that in these files, and the usual one in files."""
        return tuple(dict.fromkeys((path, self.files.layer(path), layer_of(self.names.of_file(f"{path}.weight")))))

    def _tied_names(self) -> dict[str, str]:
        """Parameters that are others, so that files needn't have them."""
        if not getattr(self.model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
            return {}
        return dict(getattr(self.model, "_tied_weights_keys", None) or {})

    def _has_scales(self, path: str, form: Format) -> bool:
        stored = form.dialect.stored("weight_scale", form.scheme.weight_key)
        return any(f"{path}.{name}" in self.files.names for name in stored.names)

    def _add_quantized(self, path: str, linear: nn.Linear, form: Format, config: Path) -> None:
        method = ScaledLinearMethod(form.scheme)
        bias = linear.bias
        try:
            layer = QuantLinear(
                linear.in_features, linear.out_features, method, None if bias is None else bias.data,
                name=path, device="meta", dtype=linear.weight.dtype,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{config}: quantization_config: {path}: {error}") from None
        self.model.set_submodule(path, layer)
        self.formats[path] = form
        given = dict(form.given)
        for buffer, _ in list(layer.named_buffers(recurse=False)):
            stored = form.dialect.stored(buffer, form.scheme.weight_key).names
            if buffer == "bias" or self._add(path, buffer, stored):
                continue
            if buffer in given:
                layer._buffers[buffer] = torch.tensor([given[buffer]])
            else:
                self.missing.append(f"{path}.{stored[0]}")
        zeros = {f"{path}.{name}" for name in form.dialect.zero} & self.files.names.keys()
        self.zeros += zeros - self.takes.keys()

    def _add_experts(self, path: str, module: nn.Module, recipe: Recipe, config: Path, dtype: torch.dtype) -> None:
        if not serves(module):
            if any(name.startswith(f"{path}.0.") for name in self.files.names):
                kind = type(module).__name__
                raise ValueError(f"{config}: {path} is {kind}, expected gated experts of transformers' interface")
            return
        try:
            if (form := experts.format_of(path, module, recipe, self._called)) is None:
                self._add_plain_experts(path, module)
                return
            made = experts.empty_experts(path, module, form, dtype)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from None
        self.model.set_submodule(path, made)
        given = dict(form.given)
        stacked_there = form.dialect.stacked
        for name, stacked, part in experts.stacked_parts(path) if stacked_there else experts.parts_of(path, made):
            begin = f"{name}_" if stacked_there else f"{name}."
            self.formats[stacked] = form
            layer = self.model.get_submodule(stacked)
            for buffer, _ in layer.named_buffers(recurse=False):
                stored = form.dialect.stored(buffer, form.scheme.weight_key).names
                key = next((begin + each for each in stored if begin + each in self.files.names), None)
                if key is not None:
                    self.parts[key] = experts.Slot(stacked, buffer, part)
                elif buffer in given:
                    layer.get_buffer(buffer).fill_(given[buffer])
                else:
                    self.missing.append(begin + stored[0])
            zeros = (f"{name}.{each}" for each in form.dialect.zero)
            self.zeros += [key for key in zeros if key in self.files.names and key not in self.parts]

    def _add_plain_experts(self, path: str, module: Any) -> None:
        """Experts that aren't quantized: as the model has them, or one by one."""
        kinds = ("weight", "bias") if module.has_bias else ("weight",)
        found = {
            f"{name}.{kind}": experts.Slot(path, stacked.rpartition(".")[2] + "_bias" * (kind == "bias"), part)
            for name, stacked, part in experts.parts_of(path, module)
            for kind in kinds
        }
        if found.keys() & self.files.names.keys():
            self.parts |= {key: slot for key, slot in found.items() if key in self.files.names}
            self.missing += found.keys() - self.files.names.keys()

    def _add(self, path: str, name: str, stored: Iterable[str]) -> bool:
        """Take the first of these tensors that is there, of a module, for its parameter or buffer `name`."""
        for each in stored:
            if (key := f"{path}.{each}" if path else each) in self.files.names:
                self.takes.setdefault(key, []).append((path, name))
                return True
        return False

    def _add_kv_scales(self, required: bool) -> None:
        for path, module in self.model.named_modules():
            if not type(module).__name__.endswith("Attention"):
                continue
            for name, stored in KV_SCALES.items():
                if self._add(path, name, stored):
                    module.register_buffer(name, torch.empty(1, device="meta"))
                elif required:
                    self.missing.append(f"{path}.{name}")

    def _add_plain(self) -> None:
        """What isn't quantized: parameters, and the buffers that state dicts have."""
        persistent = self.model.state_dict(keep_vars=True)
        taken = {place for places in self.takes.values() for place in places}
        taken |= {(slot.path, slot.buffer) for slot in self.parts.values()}
        for key in persistent:
            path, _, name = key.rpartition(".")
            module = self.model.get_submodule(path)
            stacked = isinstance(module, QuantGroupedLinear)
            if (path, name) in taken or stacked or (isinstance(module, QuantLinear) and name != "bias"):
                continue
            if not self._add(path, name, (name,)) and key not in self.tied:
                self.missing.append(key)

    def check_names(self) -> None:
        """Raise ValueError unless the files have the model's tensors, and no others."""
        if self.missing:
            raise ValueError(f"{self._places()}: missing {_some([self.names.of_file(name) for name in self.missing])}")
        known = self.takes.keys() | self.parts.keys() | set(self.zeros) | self.tied.keys()
        ignored = [re.compile(each) for each in getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        # Older versions of transformers saved this buffer, which is a function of the configuration.
        ignored.append(re.compile(r"rotary_emb\.inv_freq$"))
        extra = [name for name in self.files.names if name not in known and not any(p.search(name) for p in ignored)]
        if extra:
            raise ValueError(f"{self._places()}: unexpected {_some([self.files.stored[name] for name in extra])}")

    def file_of(self, path: str) -> Path:
        """The one with a layer's weight."""
        owners = {place: key for key, places in self.takes.items() for place in places}
        owners |= {(slot.path, slot.buffer): key for key, slot in self.parts.items()}
        return self.files.names[owners[path, "weight"]]

    def _places(self) -> str:
        return ", ".join(map(str, self.files.paths[:2]))

    def fill(self, dtype: torch.dtype) -> None:
        """Read the tensors, one by one."""
        for key, places in self.takes.items():
            tensor = self.files.read(key)
            for path, name in places:
                module = self.model.get_submodule(path)
                try:
                    self._put(path, module, name, tensor, dtype)
                except ValueError as error:
                    raise ValueError(f"{self.files.where(key)} {error}") from None
        for key, slot in self.parts.items():
            layer: Any = self.model.get_submodule(slot.path)
            try:
                if slot.path in self.formats:
                    experts.put(layer, slot, self.formats[slot.path], self.files.read(key))
                else:
                    experts.fill(layer, slot, self.files.read(key), self._dtype_of(f"{slot.path}.{slot.buffer}", dtype))
            except ValueError as error:
                raise ValueError(f"{self.files.where(key)} {error}") from None
        for key in self.zeros:
            if self.files.read(key).any():
                raise ValueError(f"{self.files.where(key)} has values other than zero, of a symmetric format")

    def check_tied(self) -> None:
        """Raise ValueError where a parameter that is another has values of its own in the files."""
        for key, other in self.tied.items():
            if key in self.takes and not torch.equal(*map(self.model.get_parameter, (key, other))):
                raise ValueError(f"{self.files.where(key)} isn't {other}, but tie_word_embeddings says it is")

    def _put(self, path: str, module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        form = self.formats.get(path)
        if name in KV_SCALES and not isinstance(module, QuantLinear):
            scale = module._buffers[name] = fit(tensor, module.get_buffer(name))
            if not (scale.isfinite() & (scale > 0) & (1 / scale).isfinite()).all():
                raise ValueError(f"is {scale.item()}, expected a positive, finite scale, and so its reciprocal")
        elif form is not None and name != "bias":
            stored, buffer = form.dialect.stored(name, form.scheme.weight_key), module.get_buffer(name)
            value = stored.value(tensor, buffer)
            if name == "weight" and value.dtype == FP8 and (value.view(torch.uint8) & 0x7F == 0x7F).any():
                raise ValueError("has values that aren't finite")
            if name in (given := dict(form.given)) and value.item() != given[name]:
                raise ValueError(f"is {value.item()}, the configuration says {given[name]}")
            module._buffers[name] = value
        else:
            self._put_plain(path, module, name, tensor, dtype)

    def _put_plain(self, path: str, module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        old: Any = getattr(module, name)
        if list(tensor.shape) != list(old.shape):
            raise ValueError(f"is {list(tensor.shape)}, expected {list(old.shape)}")
        if tensor.dtype not in FLOATS and tensor.dtype != old.dtype:
            raise ValueError(f"is {tensor.dtype}, expected {old.dtype}, as it isn't quantized")
        if isinstance(old, nn.Parameter):
            wanted = self._dtype_of(f"{path}.{name}", dtype) if old.is_floating_point() else old.dtype
            module._parameters[name] = nn.Parameter(cast(tensor, wanted), requires_grad=False)
        else:
            wanted = dtype if isinstance(module, QuantLinear) else self._dtype_of(f"{path}.{name}", old.dtype)
            module._buffers[name] = cast(tensor, wanted)

    def _dtype_of(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """float32 for what the model keeps in it."""
        names = set(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names |= set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", key) for name in names) else dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
