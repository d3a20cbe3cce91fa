"""Quantization on its own, and what every operation that ends in one shares."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from quant import INT8_DYNAMIC_GROUP_128, NAMED_KEYS, QuantizedActivation, QuantKey, ScaleLayout, formats
from quant.key import FP8, FP8_FNUZ

from ._check import FLOATS, boolean, check, check_key
from ._gradient import refuse_backward, refuse_backward_of
from ._op import Op, op, refused

# Kernels take one tensor from outside, whichever the key asks for: `given` is the scale of a static key, scale2 of
# NVFP4, and the upper bound of the amax (scale_ub) of a dynamic FP8 key.


class QuantOptions(TypedDict, total=False):
    """What every operation that ends in a quantization takes besides its `quant_key`.

    `**layer.input_quant()` of the linear layer that follows gives the key and all that the layer knows of these.

    scale: float32 [1], the scale of a static key.
    scale2: float32 [1], NVFP4's per-tensor scale.
    zero_point: int32 [1], a static asymmetric key.
    scale_ub: float32 [1], an upper bound of the magnitude that dynamic FP8 scales come from.
    keep_unquantized: also return the unquantized result, as `.unquantized`.
    pad_rows: allocate rows of `data`, and of row-major scales, to a multiple of this; results are views of the first.
    out: its tensors are written instead of fresh ones; returned, with this call's static scale, zero point or scale2.
        With `quant_key=None` a Tensor.
    """

    scale: Tensor | None
    scale2: Tensor | None
    zero_point: Tensor | None
    scale_ub: Tensor | None
    keep_unquantized: bool
    pad_rows: int
    out: Any


_GIVEN = ("scale", "scale2", "scale_ub")


def quantized(y: Tensor, code: int, given: Tensor | None, zero_point: Tensor | None) -> tuple:
    """The reference of every `..._quant`: (data, scale, zero_point, unquantized) of `y`."""
    key = QuantKey.from_code(code)
    given_name = "scale2" if key.scale2 else "scale" if key.scale.static else "scale_ub"
    data, scale, zero = formats.quantize(y, key, zero_point=zero_point, **{given_name: given})
    static = key.scale.static
    return data, scale.reshape(1).clone() if static else scale, None if static else zero, y


def empty_quantized(y: Tensor, code: int) -> tuple:
    """Uninitialized (data, scale, zero_point, unquantized) for an unquantized result like `y`."""
    key = QuantKey.from_code(code)
    data, scale, zero_point = formats.empty(y.shape, key, y.device)
    scale = y.new_empty(1, dtype=torch.float32) if scale is None else scale
    return data, scale, zero_point, y.new_empty(y.shape)


def case_keys() -> list[QuantKey]:
    """Keys for tests: the named ones, those of AMD's FP8, odd groups, every layout and rounding of a named one."""
    fp8 = [key for key in NAMED_KEYS.values() if key.dtype == FP8 and key.scale.dtype == torch.float32]
    keys = [*NAMED_KEYS.values(), *(replace(key, dtype=FP8_FNUZ) for key in fp8)]
    for cols in 16, 96:
        group = INT8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, cols))
        keys += [group, replace(group, symmetric=False), replace(group, dtype=FP8)]
    for key in NAMED_KEYS.values():
        for layout in list(ScaleLayout)[1:]:
            for power_of_two in False, True:
                try:
                    keys.append(key.with_scale(layout=layout, power_of_two=power_of_two))
                except ValueError:
                    continue
    return keys


@op("data scale zero_point unquantized", returns=2)
def _quantize(x: Tensor, key: int, given: Tensor | None, zero_point: Tensor | None = None):
    return quantized(x, key, given, zero_point)


@_quantize.declares("check")
def _(x, key, given, zero_point=None):
    sizes = check("quantize", x=(x, "... N", FLOATS))
    check_key("quantize", key, sizes["N"], given, x.device, zero_point)


@_quantize.declares("empty")
def _(x, key, given, zero_point=None):
    return empty_quantized(x, key)


@_quantize.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in case_keys():
        for shape in (1, 32), (3, 576), (2, 5, 4096), (0, 64), (7, 160):
            for dtype in FLOATS:
                yield torch.randn(shape, device=device).to(dtype), *key_inputs(key, device)


@_quantize.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    return torch.randn(tokens, cols, device=device).to(dtype), *key_inputs(key, device)


def key_inputs(key: QuantKey, device: str) -> tuple:
    """Plausible (code, given, zero_point) for a test or benchmark of `key` on normally distributed values."""
    given = zero_point = None
    if key.scale.static or key.scale2 is not None:
        given = torch.tensor([4.0 / 2688 if key.scale2 else 4.0 / 127], device=device)
    if key.scale.static and not key.symmetric:
        zero_point = torch.tensor([-3], dtype=torch.int32, device=device)
    return (key.code, given) if zero_point is None else (key.code, given, zero_point)


def quantizing(plain: Op, prefix: str = "", *, one_scale: bool = True, case_every: int = 1) -> Op:
    """Declare `plain` followed by the quantization of its first result; everything follows from `plain`'s declaration.

    The inputs are those of `plain`, with (key, given, zero_point=None) after the ones that have no default. The outputs
    are (data, scale, the other results of plain, zero_point, unquantized).

    prefix: what the public function puts before the names of `QuantOptions`. one_scale: whether it serves keys with one
    dynamic scale for the tensor. case_every: each key's cases are every so many of `plain`'s, in turn.
    """
    required, (first, *others) = plain.required, plain.outputs
    rows = "x" if plain.arguments[0] == "x" else "the result"

    def split(args: tuple) -> tuple[tuple, int, Tensor | None, Tensor | None]:
        code, given, *rest = args[required:]
        zero_point, *optional = rest or (None,)
        return (*args[:required], *optional), code, given, zero_point

    def reference(*args):
        inputs, *key = split(args)
        y, *rest = _tuple(plain.reference(*inputs))
        data, scale, zero_point, y = quantized(y, *key)
        return data, scale, *rest, zero_point, y

    parameters = list(inspect.signature(plain.reference).parameters.values())
    key_parameters = [p for p in inspect.signature(_quantize.reference).parameters.values() if p.name != "x"]
    signature = [*parameters[:required], *key_parameters, *parameters[required:]]
    reference.__name__ = f"{plain.name}_quant"
    hints = {f: typing.get_type_hints(f, include_extras=True) for f in (plain.reference, _quantize.reference)}
    reference.__annotations__ = {**hints[_quantize.reference], **hints[plain.reference]}
    reference.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    fused = Op(reference, " ".join(["data scale", *others, "zero_point unquantized"]), returns=2 + len(others))
    fused.prefix = prefix

    def serves(key: QuantKey) -> bool:
        return one_scale or key.scale.static or not key.per_tensor

    @fused.declares("check")
    def _(*args):
        inputs, code, given, zero_point = split(args)
        cols = plain.check(*inputs, name=fused.name)
        key = check_key(fused.name, code, cols, given, args[0].device, zero_point, prefix, rows)
        if not serves(key):
            raise ValueError(f"{fused.name}: {prefix}quant_key is {key}, expected static scales, or one a row or group")

    @fused.declares("empty")
    def _(*args):
        inputs, code, *_ = split(args)
        y, *rest = _tuple(plain.empty(*inputs))
        data, scale, *optional = empty_quantized(y, code)
        return data, scale, *rest, *optional

    def with_key(args: tuple, key: QuantKey, device: str) -> tuple:
        code, given, *zero_point = key_inputs(key, device)
        optional = args[required:]
        return *args[:required], code, given, *(zero_point or [None] * bool(optional)), *optional

    @fused.declares("cases")
    def _(device: str) -> Iterator[tuple]:
        every = [args for args in plain.cases(device) if plain.check(*args) % 32 == 0]
        for i, key in enumerate(filter(serves, case_keys())):
            for args in every[i % case_every :: case_every]:
                yield with_key(args, key, device)

    @fused.declares("workload")
    def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
        return with_key(plain.workload(tokens, cols, None, dtype, device), key, device)

    @fused.declares("store")
    def _(args: tuple, name: str, target: Tensor, value: Tensor) -> None:
        plain.store(split(args)[0], name if name in others else first, target, value)

    return fused


def _tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def run_quant(
    op: Op,
    args: tuple,
    key: QuantKey,
    quant: QuantOptions,
    outs: dict[str, Tensor] | None = None,
    optional: tuple = (),
) -> Any:
    """Call an operation that `quantizing` made: its activation, or (activation, the new residual).

    args: the inputs before the key. outs: given outputs besides the activation, by name. optional: the inputs behind
    the key, where one isn't its default. Options come as a dict, since unpacking one costs as much as a result.
    """
    if type(key) is not QuantKey:
        raise TypeError(f"{op.name}: {op.prefix}quant_key is {type(key).__name__}, expected a QuantKey")
    given = scale = scale2 = None
    plain = outs is None and key.symmetric and not optional
    if quant:
        given = given_tensor(op.name, key, quant, op.prefix)
        scale, scale2 = quant.get("scale"), quant.get("scale2")
        plain = plain and all(name in _GIVEN for name in asked(op.name, quant))
    if not plain:
        return _write(op, (*args, key.code, given), key, quant, outs or {}, optional)
    try:
        result = op.call(*args, key.code, given)
    except RuntimeError as error:
        refused(op, (*args, key.code, given), error)
        raise
    data, made = result[0], result[1]
    if made.requires_grad:
        refuse_backward(op.name, *result)
    q = QuantizedActivation(data, made if scale is None else scale, key, args[0].dtype, scale2)
    return q if op.returns == 2 else (q, result[2])


_DEFAULTS: dict[str, Any] = {"keep_unquantized": False, "pad_rows": 1}  # of other options None


def asked(op_name: str, quant: QuantOptions) -> list[str]:
    """The options that differ from their defaults; TypeError for what is none."""
    names = []
    for name, value in quant.items():
        if name not in QuantOptions.__annotations__:
            raise TypeError(f"{op_name}: got an unexpected keyword argument {name!r}")
        default = _DEFAULTS.get(name)
        if value is not default and not (type(value) is type(default) and value == default):
            names.append(name)
    return names


def plain_out(op_name: str, quant: QuantOptions, prefix: str = "") -> Any:
    """`out` of a call with quant_key=None; any other option has nothing to act on and raises."""
    for name in asked(op_name, quant):
        if name != "out":
            name = name if name == "keep_unquantized" else prefix + name
            raise ValueError(f"{op_name}: {name} is given, but {prefix}quant_key is None")
    return quant.get("out")


def quantize(x: Tensor, quant_key: QuantKey, **quant: Unpack[QuantOptions]) -> QuantizedActivation:
    """Quantize the last dimension of `x` as `quant_key` says.

        data = sat(round(x * (1 / scale))), scale from each group's largest magnitude      in float32

    with every format's exact arithmetic as in `quant.formats`, which is the reference.

    Args:
        x: [..., N] bfloat16, float16 or float32; rows may be strided. MX and NVFP4 keys need N
            divisible by their group.
        quant_key: the scheme.
        **quant: see `QuantOptions`.

    Returns:
        `QuantizedActivation`; its `.dequantize()` is close to x.

    Raises:
        TypeError, ValueError: an argument is not as above; nothing is written.
    """
    return run_quant(_quantize, (x,), quant_key, quant)


def given_tensor(op_name: str, key: QuantKey, options: QuantOptions, prefix: str = "") -> Tensor | None:
    """The one of scale, scale2 and scale_ub that the kernel takes for `key`; a surplus one raises."""
    wanted = "scale" if key.scale.static else "scale2" if key.scale2 is not None else "scale_ub"
    for name in _GIVEN:
        if name != wanted and options.get(name) is not None:
            raise ValueError(f"{op_name}: {prefix}{name} is given, but {key} takes none")
    return options.get(wanted)  # type: ignore[return-value]


def _write(op: Op, args: tuple, key: QuantKey, quant: QuantOptions, outs: dict, optional: tuple) -> Any:
    """Run the `out` overload into `out`, or into fresh tensors.

    Everything that isn't the plain functional call goes this way: given outputs, `keep_unquantized`, `pad_rows`,
    zero points.
    """
    zero_point = quant.get("zero_point")
    args = (*args, zero_point, *optional)
    written: dict[str, Tensor | None] = {}
    try:
        given_all = quant.get("out") is not None and len(outs) == len(op.outputs) - 4
        fresh = {} if given_all else dict(zip(op.outputs, op.empty(*args), strict=True))
        out, written = target(op.name, key, quant, fresh, args[0].dtype, op.prefix)
        others = {name: outs[name] if name in outs else fresh[name] for name in op.outputs[2:-2]}
        op.out(*args, **written, **{f"{name}_out": tensor for name, tensor in others.items()})
    except Exception as error:
        refused(op, args, error, written | {f"{name}_out": given for name, given in outs.items()})
        raise
    refuse_backward_of(op.name, args, (*written.values(), *others.values()))
    return (out, *others.values()) if others else out


def target(
    op_name: str, key: QuantKey, quant: QuantOptions, fresh: dict[str, Any], dtype: torch.dtype, prefix: str = ""
) -> tuple[QuantizedActivation, dict[str, Tensor | None]]:
    """What an `out` overload is to write, and return: (the activation, its written tensors by output's name).

    fresh: tensors by output's name, for what isn't given.
    """
    out, scale, scale2, zero_point = (quant.get(name) for name in ("out", "scale", "scale2", "zero_point"))
    keep_unquantized, pad_rows = quant.get("keep_unquantized", False), quant.get("pad_rows", 1)
    boolean(op_name, keep_unquantized=keep_unquantized)
    if out is None:
        out = QuantizedActivation(
            _padded(op_name, fresh["data"], pad_rows, prefix),
            _padded_scale(op_name, key, fresh["scale"], pad_rows, prefix) if scale is None else scale,
            key,
            dtype,
            scale2,
            fresh["zero_point"] if zero_point is None else zero_point,
            fresh["unquantized"] if keep_unquantized else None,
        )
    else:
        if pad_rows != 1:
            given = f"{prefix}pad_rows is {pad_rows!r} and out is given"
            raise ValueError(f"{op_name}: {given}, whose rows are what they are")
        out = _given_out(op_name, out, key, scale, scale2, zero_point, keep_unquantized, dtype)
    written: dict[str, Tensor | None] = {"data_out": out.data}
    if not key.scale.static:
        written |= {"scale_out": out.scale, "zero_point_out": out.zero_point}
    if keep_unquantized:
        written["unquantized_out"] = out.unquantized
    return out, written


def _padded(op_name: str, data: Tensor, pad_rows: Any, prefix: str) -> Tensor:
    """`data`, or as many rows at the start of a tensor that has a multiple of `pad_rows`."""
    if isinstance(pad_rows, bool) or not isinstance(pad_rows, int) or pad_rows < 1:
        raise ValueError(f"{op_name}: {prefix}pad_rows is {pad_rows!r}, expected an int of at least 1")
    if pad_rows == 1:
        return data
    rows = data.shape[:-1].numel()
    return data.new_empty((-(-rows // pad_rows) * pad_rows, data.shape[-1]))[:rows].view(data.shape)


def _padded_scale(op_name: str, key: QuantKey, scale: Tensor, pad_rows: Any, prefix: str) -> Tensor:
    """The same of a scale whose rows follow each other; other layouts have rows of their own to fill up."""
    plain = key.scale.layout == ScaleLayout.ROW_MAJOR and not key.per_tensor
    return _padded(op_name, scale, pad_rows, prefix) if plain else scale


def _given_out(op_name, out: Any, key, scale, scale2, zero_point, keep_unquantized, dtype) -> QuantizedActivation:
    """`out` with what isn't written but given in this call: a static scale or zero point, scale2."""
    if not isinstance(out, QuantizedActivation):
        raise TypeError(f"{op_name}: out is {type(out).__name__}, expected a QuantizedActivation")
    if out.quant_key != key or out.orig_dtype != dtype:
        raise ValueError(f"{op_name}: out is {out.quant_key} of {out.orig_dtype}, expected {key} of {dtype}")
    if keep_unquantized and out.unquantized is None:
        raise ValueError(f"{op_name}: out has no `unquantized`, and keep_unquantized asks for it")
    needed = ["data", *([] if key.scale.static else ["scale"] + ["zero_point"] * (not key.symmetric))]
    for name in needed:
        if getattr(out, name) is None:
            raise ValueError(f"{op_name}: out has no {name}, which {key} makes")
    for name, given in ("scale", scale), ("scale2", scale2), ("zero_point", zero_point):
        if given is not None and getattr(out, name) is not given:
            out = replace(out, **{name: given})
    return out if keep_unquantized or out.unquantized is None else replace(out, unquantized=None)
