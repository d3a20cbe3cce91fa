"""What a call may write: outputs that fit, and that lie over nothing which is still to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._op import Op


def check_outputs(op: Op, args: tuple, outs: dict[str, Tensor | None]) -> None:
    """Raise unless every given output has the shape and dtype of `op.empty(*args)`, with rows of its own."""
    expected = op.empty(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    checked: dict[str, Tensor] = {}
    also_written = {name: args[op.arguments.index(name)] for name in op.written}
    for output, want in zip(op.outputs, expected, strict=True):
        got, name = outs.get(f"{output}_out"), _OUTPUTS.get(output, f"{output}_out")
        if got is None:
            continue
        if want is None:
            raise ValueError(f"{op.name}: {name} is given, but these arguments produce none")
        if not isinstance(got, Tensor) or got.dtype != want.dtype:
            kind = got.dtype if isinstance(got, Tensor) else type(got).__name__
            raise TypeError(f"{op.name}: {name} is {kind}, expected {want.dtype}")
        if got.layout != want.layout:
            raise TypeError(f"{op.name}: {name} is {got.layout}, expected {want.layout}")
        if got.shape != want.shape or got.device != want.device:
            raise ValueError(
                f"{op.name}: {name} is {list(got.shape)} on {got.device}, expected {list(want.shape)} on {want.device}"
            )
        exact = output.endswith(("scale", "zero_point"))  # their strides are part of the key
        wrong = got.stride() != want.stride() if exact else got.shape[-1] > 1 and got.stride(-1) != 1
        if wrong and got.numel():
            expected_strides = want.stride() if exact else "a contiguous last dimension"
            raise ValueError(f"{op.name}: {name} has strides {got.stride()}, expected {expected_strides}")
        if rows_overlap(got):
            raise ValueError(f"{op.name}: {name} has strides {got.stride()}: its rows share memory")
        for other, tensor in {**checked, **also_written}.items():
            if overlap(got, tensor):
                raise ValueError(f"{op.name}: {name} shares memory with {other}")
        checked[name] = got


def check_inputs_survive(op: Op, args: tuple, outs: dict[str, Tensor]) -> None:
    """Raise where an output lies over an input, unless in the very place of one whose row is read before."""
    for output, out in outs.items():
        for name, tensor in zip(op.arguments, args, strict=False):
            if not isinstance(tensor, Tensor) or not overlap(out, tensor):
                continue
            in_place = name in _READ_FIRST or name == output
            same = (out.data_ptr(), out.shape, out.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())
            if not (in_place and same and out.dtype == tensor.dtype):
                where = _OUTPUTS.get(output, f"{output}_out")
                raise ValueError(f"{op.name}: {where} overlaps another argument in memory, {name}")


def check_written(op: Op, args: tuple) -> None:
    """Raise where an input that is written lies over another: what `op.check` finds by more than the tensors' kinds."""
    if not op.written:
        return
    inputs = {name: t for name, t in zip(op.arguments, args, strict=False) if isinstance(t, Tensor)}
    storages = {name: t.untyped_storage().data_ptr() for name, t in inputs.items()}
    for written in op.written:
        for name, storage in storages.items():
            if name != written and storage == storages[written] and overlap(inputs[name], inputs[written]):
                raise ValueError(f"{op.name}: {written} shares memory with {name}")


_READ_FIRST = ("x", "residual", "gate", "up")
# Outputs as callers know them; others are the argument `..._out`.
_OUTPUTS = {"y": "out", "q_pe": "out", "sum": "out"}
_OUTPUTS |= {name: f"out.{name}" for name in ("data", "scale", "zero_point", "unquantized")}
_OUTPUTS |= {name: f"out ({name})" for name in ("q", "k", "kv")}


def as_callers_know(argument: str) -> str:
    """The name of an argument of an operation, with its outputs' names as above."""
    return _OUTPUTS.get(argument.removesuffix("_out"), argument) if argument.endswith("_out") else argument


def _span(dims: list[tuple[int, int]], item: int = 1) -> int:
    """From the first to behind the last of these (stride, size), around items that are so long."""
    return item + sum((size - 1) * stride for stride, size in dims)


def dims_of(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size), outermost first; dimensions that follow each other in memory are one."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if size == 1:
            continue
        if merged and merged[-1][0] == stride * size:
            merged[-1] = stride, merged[-1][1] * size
        else:
            merged.append((stride, size))
    return merged


def _in_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.numel() > 0 and tensor.device.type != "meta"


def rows_overlap(tensor: Tensor) -> bool:
    """Whether two elements are the same memory."""
    dims = dims_of(tensor)
    return _in_memory(tensor) and any(stride < _span(dims[i + 1 :]) for i, (stride, _) in enumerate(dims))


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory. Where their outer strides agree, one may lie in the gaps of the other."""
    if not (_in_memory(a) and _in_memory(b)) or a.device != b.device:
        return False
    in_bytes = [[(stride * t.element_size(), size) for stride, size in dims_of(t)] for t in (a, b)]
    return _may_meet(in_bytes[0], a.element_size(), in_bytes[1], b.element_size(), b.data_ptr() - a.data_ptr())


def _may_meet(a: list[tuple[int, int]], a_item: int, b: list[tuple[int, int]], b_item: int, apart: int) -> bool:
    """The same of dimensions in bytes, where b begins `apart` bytes behind a."""
    if apart >= _span(a, a_item) or -apart >= _span(b, b_item):
        return False
    if not (a and b) or a[0][0] != b[0][0] or a[0][0] == 0:
        return True
    stride = a[0][0]
    if max(_span(a[1:], a_item), _span(b[1:], b_item)) > stride:
        return True  # beyond its next neighbours, too
    gap = apart % stride
    return any(_may_meet(a[1:], a_item, b[1:], b_item, near) for near in (gap, gap - stride))
