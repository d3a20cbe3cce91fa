"""Argument checks that read like shape comments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant import QuantKey
from quant.formats import check_columns

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT32_MAX = torch.finfo(torch.float32).max
INDICES = (torch.int64, torch.int32)


def check(op: str, bound: dict[str, Any] | None = None, /, **arguments: tuple[Any, str, Any]) -> dict[str, Any]:
    """Match each `name=(tensor, "... N", dtypes)` and return the size bound to each word.

    A word is the same size everywhere, and the one in `bound` where it is there; a leading "..." is any dimensions,
    the same ones everywhere; a number is itself. Words stand in messages, so they are the docstrings'. `dtypes` is a
    dtype, a tuple of them, or the name of an earlier argument whose dtype this one shares.
    The last dimension is contiguous and all are on one device. A None passes where the spec ends in "?".

    Raises TypeError (not a tensor, dtype) or ValueError (shape, strides, device), naming op, argument, what it got
    and what it takes.
    """
    sizes: dict[str, Any] = {**(bound or {})}
    seen: dict[str, Tensor] = {}
    for name, (tensor, spec, dtypes) in arguments.items():
        if tensor is None and spec.endswith("?"):
            continue
        if not isinstance(tensor, Tensor):
            optional = " or None" * spec.endswith("?")
            shape = ", ".join(spec.rstrip("?").split())
            raise TypeError(f"{op}: {name} is {_type(tensor)}, expected a Tensor [{shape}]{optional}")
        _check_shape(op, name, tensor, spec.rstrip("?").split(), sizes)
        if isinstance(dtypes, str):
            if tensor.dtype != seen[dtypes].dtype:
                raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {seen[dtypes].dtype} as {dtypes}")
        elif tensor.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {dtypes}")
        first, other = next(iter(seen.items()), (name, tensor))
        if tensor.device != other.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {other.device} as {first}")
        seen[name] = tensor
    return sizes


def _check_shape(op: str, name: str, tensor: Tensor, dims: list[str], sizes: dict[str, Any]) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {tensor.layout}, expected {torch.strided}")
    shape: list[Any] = list(tensor.shape)
    if dims[0] == "..." and len(shape) >= len(dims) - 1:
        lead = len(shape) - len(dims) + 1
        shape = [shape[:lead], *shape[lead:]]
    expected = [int(d) if d.isdigit() else sizes.get(d, d) for d in dims]
    if len(shape) != len(dims) or any(e not in (s, d) for e, s, d in zip(expected, shape, dims, strict=True)):
        text = ", ".join(str(e).strip("[]") for e in expected)
        hint = ", a permuted view where memory has another order" if "block_size" in dims else ""
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected [{text}]{hint}")
    if tensor.ndim and dims[-1] == "N" and tensor.shape[-1] == 0:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected at least one column")
    sizes.update(zip(dims, shape, strict=True))
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}, expected a contiguous last dimension")


def check_below(op: str, name: str, indices: Tensor, end: int) -> None:
    """Raise ValueError unless each index is that of one of so many."""
    for index in indices.flatten().tolist():
        if not 0 <= index < end:
            expected = f"0 to {end - 1}" if end else "none, as there are no rows"
            raise ValueError(f"{op}: {name} has {index}, expected {expected}")


def number(op: str, **values: Any) -> None:
    """Raise TypeError unless each value is a real number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{op}: {name} is {_type(value)}, expected a number")


def check_eps(op: str, **values: Any) -> None:
    """Raise TypeError or ValueError unless each value is a number of at least 0."""
    number(op, **values)
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}, expected at least 0")


def boolean(op: str, **values: Any) -> None:
    """Raise TypeError unless each value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {value!r}, expected a bool")


def check_key(
    op: str,
    code: int,
    cols: int,
    given: Tensor | None,
    device: torch.device,
    zero_point: Tensor | None = None,
    prefix: str = "",
    rows: str = "x",
) -> QuantKey:
    """Check what a quantization of rows of `cols` takes; `given` is described in `fused_ops.quantize`.

    prefix: of the arguments' names. rows: what has the columns.
    """
    if isinstance(code, bool) or not isinstance(code, int):
        raise TypeError(f"{op}: {prefix}quant_key's code is {_type(code)}, expected an int")
    if code < 0:
        raise ValueError(f"{op}: {prefix}quant_key has groups that span rows, as only a weight's do")
    key = QuantKey.from_code(code)
    check_columns(op, key, cols, rows)
    if key.scale.static or key.scale2 is not None:
        _one(op, prefix + ("scale2" if key.scale2 else "scale"), given, torch.float32, device, key)
    elif given is not None:
        if not key.bounded:
            raise ValueError(f"{op}: {prefix}scale_ub is given, but {key} takes none")
        _one(op, f"{prefix}scale_ub", given, torch.float32, device, key)
    if key.scale.static and not key.symmetric:
        _one(op, f"{prefix}zero_point", zero_point, torch.int32, device, key)
    elif zero_point is not None:
        raise ValueError(f"{op}: {prefix}zero_point is given, but {key} takes none")
    return key


def _one(op: str, name: str, tensor: Any, dtype: torch.dtype, device: torch.device, key: QuantKey) -> None:
    if not isinstance(tensor, Tensor):
        error = ValueError if tensor is None else TypeError
        raise error(f"{op}: {name} is {_type(tensor)}, {key} takes a {dtype} tensor of one element")
    for got, taken in (tensor.dtype, dtype), (tensor.layout, torch.strided):
        if got != taken:
            raise TypeError(f"{op}: {name} is {got}, {key} takes {taken}")
    if tensor.numel() != 1 or tensor.device != device:
        raise ValueError(f"{op}: {name} is {list(tensor.shape)} on {tensor.device}, expected one element on {device}")


def _type(value: Any) -> str:
    return "None" if value is None else type(value).__name__
