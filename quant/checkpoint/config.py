"""From a checkpoint's configuration to the format of each of its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fused_ops.linear import block_key

from .. import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantKey,
)
from ..key import FP8
from ..methods import Scheme
from .fields import Fields, read_json
from .formats import (
    ACTIVATIONS,
    COMPRESSED_TENSORS,
    FBGEMM,
    FP8_BLOCK,
    GPT_OSS,
    MODELOPT,
    SCALE_DTYPES,
    WEIGHTS,
    Args,
    Format,
    container,
)
from .rules import Rule, by_name_or_class, by_part_of_name, by_precedence, by_wildcard, every, only

CONFIG, MODELOPT_CONFIG = "config.json", "hf_quant_config.json"


@dataclass(frozen=True)
class Recipe:
    """Which layers are quantized, and how.

    groups: (which layers, format); the first that fits is a layer's.
    ignored: layers that no group takes.
    stacked: the format of experts that the files have in one tensor, as the model has them.
    kv_cache: whether there are scales of keys and values; "required" where there must be.
    """

    groups: tuple[tuple[Rule, Format], ...]
    ignored: Rule
    kv_cache: str | None = None
    stacked: Format | None = None

    def format_of(self, paths: tuple[str, ...], module: nn.Module) -> Format | None:
        """The format of a linear layer, by any of its names, or None where it isn't quantized."""
        if any(self.ignored(path, module) for path in paths):
            return None
        return next((form for takes, form in self.groups if any(takes(path, module) for path in paths)), None)


def read_recipe(folder: Path) -> Recipe:
    """Of the quantization_config of config.json, or of hf_quant_config.json.

    Raises ValueError, naming file and field, where there is none, or a field is unknown or not served.
    """
    path, other = folder / CONFIG, folder / MODELOPT_CONFIG
    values = read_json(path).get("quantization_config")
    if values is None:
        if not other.exists():
            raise ValueError(f"{path}: quantization_config is missing, and there is no {MODELOPT_CONFIG}")
        return _modelopt(Fields(read_json(other), f"{other}:"))
    fields = Fields(values, f"{path}: quantization_config")
    if fields.values.get("quant_method") is None and "quant_algo" in fields.values:
        fields.values["quant_method"] = "modelopt"  # which its first versions left out
    method = fields.only("quant_method", *_READERS)
    if method.startswith("modelopt") and other.exists():
        _check_same(path, values, other)
    return _READERS[method](fields)


# --- compressed-tensors ---


def _compressed_tensors(fields: Fields) -> Recipe:
    fields.skip("version", "global_compression_ratio")
    fields.only("quantization_status", "compressed")
    whole = fields.take("format", str)
    for name in "sparsity_config", "transform_config", "moe_sparsity_config":
        if fields.values.get(name) not in (None, {}):
            raise fields.error(name, fields.values[name], "none: that isn't served")
        fields.skip(name)
    ignored = by_name_or_class(fields.names("ignore"), fields.named("ignore"))
    kv_cache = _kv_cache(fields.object("kv_cache_scheme"))
    groups: list[tuple[tuple[str, ...], str, Format]] = []
    owners: dict[str, Format] = {}
    own_formats = []
    for group in fields.objects("config_groups").values():
        names = group.names("targets", required=True)
        if group.values.get("input_activations") is None:
            raise group.error("input_activations", None, "an object: layers with quantized weights only aren't served")
        weight = _key(Fields(group.take("weights", dict), group.named("weights")), WEIGHTS)
        activation = _key(Fields(group.take("input_activations", dict), group.named("input_activations")), ACTIVATIONS)
        group.only("output_activations", None)
        expected = container(weight)
        if group.values.get("format") is None and whole not in expected:
            raise fields.error("format", whole, " or ".join(expected))
        own_formats.append(group.only("format", None, *expected))
        group.close()
        form = Format(Scheme(activation, weight), COMPRESSED_TENSORS)
        for name in names:
            if owners.setdefault(name, form) != form:
                raise group.error("targets", list(names), f"none of another group, which has {json.dumps(name)} too")
        groups.append((names, group.named("targets"), form))
    if None not in own_formats and whole not in (said := dict.fromkeys((*own_formats, "mixed-precision"))):
        raise fields.error("format", whole, f"{' or '.join(said)}, as its groups say")
    fields.close()
    return Recipe(tuple(by_precedence(groups)), ignored, kv_cache)


def _key(fields: Fields, table: dict[Args, QuantKey]) -> QuantKey:
    """What a QuantizationArgs says, where it is in the table."""
    fields.skip("observer", "observer_kwargs")
    fields.only("actorder", None, False, "static", "weight")  # of calibration: columns are in order
    bits, kind = fields.take("num_bits", int), fields.take("type", str)
    symmetric, dynamic = fields.take("symmetric", bool, True), fields.take("dynamic", (bool, str), False)
    block = fields.sizes("block_structure")
    group = fields.take("group_size", int, None) if block is None else fields.only("group_size", None)
    strategy = fields.take("strategy", str, "tensor" if group is None else "channel" if group == -1 else "group")
    args = Args(kind, bits, strategy, block or (None if group == -1 else group), dynamic, symmetric)
    if args not in table:
        known = "; ".join(_words(each) for each in table)
        raise ValueError(f"{fields.where} is {_words(args)}, expected one of: {known}")
    fields.only("scale_dtype", None, SCALE_DTYPES.get(args))
    fields.skip("zp_dtype")
    fields.close()
    return table[args]


def _words(args: Args) -> str:
    """For messages."""
    size = "" if args.size is None else f" of {args.size}"
    kind = "" if args.dynamic is False else f", dynamic {args.dynamic}" if args.dynamic != "local" else ", local"
    return f"{args.type}{args.num_bits} by {args.strategy}{size}{kind}" + ("" if args.symmetric else ", asymmetric")


def _kv_cache(fields: Fields | None) -> str | None:
    """One float32 scale each for the keys and for the values of an attention, of FP8 caches."""
    if fields is None:
        return None
    fields.only("num_bits", 8)
    fields.only("type", "float")
    fields.only("strategy", None, "tensor")
    fields.only("dynamic", None, False)
    fields.only("symmetric", None, True)
    for name in "group_size", "block_structure", "actorder", "scale_dtype":
        fields.only(name, None)
    fields.skip("observer", "observer_kwargs", "zp_dtype")
    fields.close()
    return "required"


# --- fp8: DeepSeek's blocks, and AutoFP8 ---


def _fp8(fields: Fields) -> Recipe:
    fields.only("fmt", None, "e4m3", "float8_e4m3fn")
    fields.only("dequantize", None, False)
    fields.only("modules_to_convert", None)
    fields.only("expert_dtype", None, "fp8")
    static = fields.only("activation_scheme", None, "dynamic", "static") == "static"
    powers = fields.only("scale_fmt", None, "float", "ue8m0") == "ue8m0"
    cache = fields.only("kv_cache_scheme", None, "static") and "required"
    block = fields.take("weight_block_size", list, None)
    lists = [fields.names(name) for name in ("modules_to_not_convert", "ignored_layers")]
    # The output layer is never quantized, though lists seldom name it.
    ignored = by_part_of_name((*lists[0], *lists[1], "lm_head"), fields.named("modules_to_not_convert"))
    if block is None:
        if powers:
            raise fields.error("scale_fmt", "ue8m0", "float where weight_block_size is null")
        scheme = Scheme(FP8_STATIC_TENSOR if static else FP8_DYNAMIC_TOKEN, block_key(FP8, -1, -1))
    elif static:
        raise fields.error("activation_scheme", "static", "dynamic where there is a weight_block_size")
    elif block == [1, 32] and powers:
        scheme = Scheme(MXFP8, MXFP8)
    elif block in ([128, 128], [64, 64]):
        activation = FP8_DYNAMIC_GROUP_128 if block == [128, 128] else FP8_DYNAMIC_GROUP_64
        scheme = Scheme(activation.with_scale(power_of_two=powers), block_key(FP8, *block))
    else:
        raise fields.error("weight_block_size", block, "[128, 128], [64, 64], [1, 32] with scale_fmt ue8m0, or null")
    fields.close()
    return Recipe(((every, Format(scheme, FP8_BLOCK)),), ignored, cache)


# --- fbgemm_fp8 ---


def _fbgemm(fields: Fields) -> Recipe:
    bound = fields.positive("activation_scale_ub", 1200.0)
    names = (*fields.names("modules_to_not_convert"), "lm_head")
    ignored = by_part_of_name(names, fields.named("modules_to_not_convert"))
    fields.close()
    scheme = Scheme(FP8_DYNAMIC_TOKEN, block_key(FP8, 1, -1), bounded=True)
    return Recipe(((every, Format(scheme, FBGEMM, (("input_scale_ub", bound),))),), ignored)


# --- mxfp4: gpt-oss ---


def _mxfp4(fields: Fields) -> Recipe:
    """Of experts alone. The files say nothing of their input: MXFP8, which vLLM has the choice of too."""
    fields.only("dequantize", None, False)
    ignored = by_part_of_name(fields.names("modules_to_not_convert"), fields.named("modules_to_not_convert"))
    fields.close()
    return Recipe((), ignored, stacked=Format(Scheme(MXFP8, MXFP4), GPT_OSS))


# --- ModelOpt ---

# FP8_PB_WO's name says that weights only are quantized; activations meet them quantized by 1x128, as in vLLM.
_ALGORITHMS: dict[str, tuple[Scheme, int | None]] = {
    "FP8": (Scheme(FP8_STATIC_TENSOR, block_key(FP8, -1, -1)), None),
    "FP8_PER_CHANNEL_PER_TOKEN": (Scheme(FP8_DYNAMIC_TOKEN, block_key(FP8, 1, -1)), None),
    "FP8_PB_WO": (Scheme(FP8_DYNAMIC_GROUP_128, block_key(FP8, 128, 128)), 128),
    "NVFP4": (Scheme(NVFP4, NVFP4), 16),
    "MXFP8": (Scheme(MXFP8, MXFP8), 32),
}


class _ModelOpt(NamedTuple):
    """What either of ModelOpt's two files says, in the words of hf_quant_config.json."""

    quant_algo: str
    exclude_modules: frozenset[str]
    kv_cache_quant_algo: str | None
    quantized_layers: frozenset[tuple[str, str]]  # (path, algorithm); "": all


def _modelopt(fields: Fields) -> Recipe:
    read = _read_modelopt(fields)
    forms = {name: Format(scheme, MODELOPT) for name, (scheme, _) in _ALGORITHMS.items()}
    groups = tuple((only(path) if path else every, forms[name]) for path, name in read.quantized_layers)
    return Recipe(groups, by_wildcard(read.exclude_modules), "optional" if read.kv_cache_quant_algo else None)


def _read_modelopt(fields: Fields) -> _ModelOpt:
    fields.skip("producer")
    nested = fields.object("quantization")
    if nested is not None:  # as in hf_quant_config.json
        fields.close()
        fields = nested
    ignored = frozenset((*fields.names("ignore"), *fields.names("exclude_modules")))
    for name in "has_zero_point", "pre_quant_scale":  # AWQ's
        fields.only(name, None, False)
    cache = fields.only("kv_cache_quant_algo", None, "FP8")
    if _kv_cache(fields.object("kv_cache_scheme")):
        cache = "FP8"
    described = [] if fields.values.get("config_groups") is None else list(fields.objects("config_groups").values())
    fields.skip("config_groups")
    if fields.values.get("quantized_layers") is None:
        fields.skip("quantized_layers")
        name = _algorithm(fields)
        layers = {"": name}
        for group in described:
            group.only("targets", None, ["Linear"])
            _check_described(group, name)
    else:
        name = str(fields.only("quant_algo", "MIXED_PRECISION"))
        fields.skip("group_size")  # of each layer below
        each = fields.objects("quantized_layers")
        layers = {path: _algorithm(layer) for path, layer in each.items()}
        for layer in each.values():
            layer.close()
        for group in described:
            for path in (targets := group.names("targets", required=True)):
                if path not in layers:
                    raise group.error("targets", list(targets), "names of quantized_layers")
                _check_described(Fields(group.values, group.where), layers[path])
    fields.close()
    return _ModelOpt(name, ignored, cache, frozenset(layers.items()))


def _algorithm(fields: Fields) -> str:
    name = fields.take("quant_algo", str)
    if name.upper() not in _ALGORITHMS:
        raise fields.error("quant_algo", name, " or ".join(_ALGORITHMS))
    _, group = _ALGORITHMS[name.upper()]
    fields.only("group_size", None, group, *([0] if group is None else []))
    return name.upper()


def _check_described(fields: Fields, algorithm: str) -> None:
    """Newer versions say in compressed-tensors' words too what the algorithm is, where they know them.

    "dynamic" is false there also for scales that are, of activations.
    """
    fields.only("quant_algo", None, algorithm)
    scheme, _ = _ALGORITHMS[algorithm]
    parts = ("weights", scheme.weight_key, WEIGHTS), ("input_activations", scheme.input_quant_key, ACTIVATIONS)
    missing = [name for name, *_ in parts if fields.values.get(name) is None]
    for name, key, table in parts:
        described = fields.object(name)
        if described is None:
            continue
        args = next(args for args, each in table.items() if each == key)
        described.only("num_bits", args.num_bits)
        described.only("type", args.type)
        described.only("strategy", None, args.strategy)
        described.only("group_size", None, *([args.size] if isinstance(args.size, int) else []))
        described.only("block_structure", None, *([list(args.size)] if isinstance(args.size, tuple) else []))
        described.only("dynamic", None, False, args.dynamic)
        described.only("symmetric", None, args.symmetric)
        described.close()
    if len(missing) == 1:
        raise fields.error(missing[0], None, "an object, as there is one for the other")
    fields.close()


def _check_same(path: Path, values: Any, other: Path) -> None:
    """Both of ModelOpt's files must say the same."""
    fields = Fields(values, f"{path}: quantization_config")
    fields.skip("quant_method")
    mine, theirs = _read_modelopt(fields), _read_modelopt(Fields(read_json(other), f"{other}:"))
    for name in _ModelOpt._fields:
        said, says = getattr(mine, name), getattr(theirs, name)
        if said != says:
            if isinstance(said, frozenset):  # what each has alone
                said, says = sorted(said - says), sorted(says - said)
            raise ValueError(f"{path}: quantization_config.{name} is {said!r}, {other} has {says!r}")


_READERS: dict[str, Callable[[Fields], Recipe]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mxfp8": _modelopt,
}
