"""Every rank's rows, one after another: codes and scales cross where they are quantized, never S.

Rank i has the rows from i * ceil(T / world_size) on, as many, the last ranks fewer or none: `workspace.rows(T)`. Scales
whose layout doesn't concatenate are laid out anew. Errors are as in `fused_ops.collective`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant import QuantizedActivation, QuantKey, ScaleLayout, formats

from ._check import check
from ._op import Shared, invoke, op
from .apart import apart, invoke_apart
from .collective import check_workspace, gathered, world_of
from .workspace import AllReduceWorkspace, counted, ranks_of, share_of


def own(tokens: Any, rank: int, group: str) -> slice:
    """The rows of `tokens` that are this rank's."""
    return share_of(tokens, world_of(group), rank)


@op("y")
def _all_gather(x: Tensor, rows: torch.SymInt, workspace: Shared, rank: int, group: str):
    share = -(-rows // world_of(group))
    data = x.new_empty(x.shape).copy_(x).view(-1).view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())
    parts = gathered(pad(data, (0, 0, 0, share - x.shape[0])), workspace, rank, group)
    return torch.cat(parts)[:rows].reshape(-1).view(x.dtype).view(rows, x.shape[1])


@op("data scale zero_point", returns=2)
def _all_gather_quantized(
    data: Tensor,
    scale: Tensor,
    key: int,
    rows: torch.SymInt,
    workspace: Shared,
    rank: int,
    group: str,
    zero_point: Tensor | None = None,
):
    known = QuantKey.from_code(key)
    groups = known.groups(data.shape[1] * known.packing)

    def gather(t: Tensor) -> Tensor:
        return _all_gather.reference(t, rows, workspace, rank, group)

    def laid_out_anew(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if known.scale.layout == ScaleLayout.SWIZZLED_128X4:
            t = formats.unswizzled(t, data.shape[0], groups)
        elif known.scale.layout == ScaleLayout.PACKED_UE8M0:
            t = formats.logical(t, data.shape[0], groups, known.scale)
        return formats.arrange(gather(t), known.scale)

    return gather(data), laid_out_anew(scale), laid_out_anew(zero_point)


def _check_rows(name: str, tensor: Tensor, rows: Any, rank: int, group: str) -> None:
    if isinstance(rows, bool) or not isinstance(rows, (int, torch.SymInt)):
        raise TypeError(f"{name}: rows is {type(rows).__name__}, expected an int")
    if not 0 <= rows < 1 << 48:
        raise ValueError(f"{name}: rows is {rows}, expected 0 to 2^48")
    mine = own(rows, rank, group)
    if tensor.shape[0] != mine.stop - mine.start:
        expected = f"{mine.stop - mine.start} rows, rank {rank}'s of {rows}"
        raise ValueError(f"{name}: got {list(tensor.shape)}, expected {expected}")


@_all_gather.declares("check")
def _(x, rows, workspace, rank, group, *, name) -> None:
    check_workspace(name, x, workspace, rank, group)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x is {type(x).__name__}, expected a Tensor [R, N]")
    check(name, x=(x, "R columns", x.dtype))
    _check_rows(name, x, rows, rank, group)


@_all_gather_quantized.declares("check")
def _(data, scale, key, rows, workspace, rank, group, zero_point=None, *, name) -> None:
    check_workspace(name, data, workspace, rank, group)
    if isinstance(key, bool) or not isinstance(key, int) or key < 0:
        raise ValueError(f"{name}: quant_key's code is {key!r}, expected an activation's")
    known = QuantKey.from_code(key)
    if known.scale.static or known.per_tensor:
        raise ValueError(f"{name}: quant_key is {known}, expected one whose scales are made by row or group")
    check(name, data=(data, "R N", known.storage_dtype))
    _check_rows(name, data, rows, rank, group)
    shape = (data.shape[0], data.shape[1] * known.packing)
    formats.check_columns(name, known, shape[1])
    with torch.device("meta"):
        _, *expected = formats.empty(shape, known, "meta")
    for what, got, want in ("scale", scale, expected[0]), ("zero_point", zero_point, expected[1]):
        if want is None and got is None:
            continue
        if not isinstance(got, Tensor):
            raise TypeError(f"{name}: {what} is {type(got).__name__}, expected a Tensor")
        if want is None:
            raise ValueError(f"{name}: {what} is given, but {known} has none")
        if got.dtype != want.dtype or got.layout != want.layout:
            raise TypeError(f"{name}: {what} is {got.dtype} {got.layout}, expected {want.dtype} {want.layout}")
        if got.shape != want.shape or got.device != data.device:
            raise ValueError(f"{name}: {what} is {list(got.shape)} on {got.device}, expected {list(want.shape)}")
        wrong = any(n > 1 and a != b for n, a, b in zip(want.shape, got.stride(), want.stride(), strict=True))
        if wrong and got.numel():
            raise ValueError(f"{name}: {what} has strides {got.stride()}, expected {want.stride()}")


@_all_gather.declares("empty")
def _(x, rows, *_):
    return x.new_empty((rows, x.shape[1]))


@_all_gather_quantized.declares("empty")
def _(data, scale, key, rows, *_):
    known = QuantKey.from_code(key)
    return formats.empty((rows, data.shape[1] * known.packing), known, data.device)


def _all_rows(tensor: Any, workspace: AllReduceWorkspace, rows: int | None) -> Any:
    if rows is not None or not isinstance(tensor, Tensor) or not tensor.ndim:
        return 0 if rows is None else rows
    return tensor.shape[0] * workspace.world_size


@counted
def all_gather(
    x: Tensor, workspace: AllReduceWorkspace, *, rows: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Every rank's rows, one after another.

    Args:
        x: [R, N] of any dtype, the same on every rank; rows may be strided, and have as many bytes as one of the
            workspace's at most.
        workspace: of the group.
        rows: T, all rows, of which x has `workspace.rows(T)`; None: every rank has as many.
        out: [T, N], written instead of a fresh tensor.

    Returns:
        [T, N] in x's dtype.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    ranks, outs = ranks_of(workspace), None if out is None else (out,)
    args = (x, _all_rows(x, workspace, rows), *ranks)
    if apart(workspace):
        return invoke_apart(_all_gather, args, partial(_all_gather.reference, *args), outs)
    return invoke(_all_gather, args, outs)


@counted
def all_gather_quantized(
    activation: QuantizedActivation, workspace: AllReduceWorkspace, *, rows: int | None = None
) -> QuantizedActivation:
    """Every rank's rows of an activation: codes and scales cross, laid out anew as the key says.

    Args:
        activation: logical shape [R, N], of any key but one with a dynamic scale for the tensor; a static scale or
            zero point, and scale2, are the same on every rank and don't cross.
        workspace: of the group.
        rows: as in `all_gather`.

    Returns:
        `QuantizedActivation` of logical shape [T, N], without `unquantized`.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    name, q = "all_gather_quantized", activation
    if not isinstance(q, QuantizedActivation):
        raise TypeError(f"{name}: activation is {type(q).__name__}, expected a QuantizedActivation")
    if type(q.quant_key) is not QuantKey:
        raise TypeError(f"{name}: quant_key is {type(q.quant_key).__name__}, expected a QuantKey")
    key = q.quant_key
    if key.per_tensor and not key.scale.static:
        raise ValueError(f"{name}: quant_key is {key}, expected static scales, or one a row or group")
    if key.scale.static:
        data = all_gather(q.data, workspace, rows=rows)
        return QuantizedActivation(data, q.scale, key, q.orig_dtype, q.scale2, q.zero_point)
    args = (q.data, q.scale, key.code, _all_rows(q.data, workspace, rows), *ranks_of(workspace))
    made: Any
    if apart(workspace):
        whole = (*args, q.zero_point)
        make = partial(_all_gather_quantized.reference, *whole)
        made = invoke_apart(_all_gather_quantized, whole, make, (None,) * 3)
    elif q.zero_point is None:
        made = *invoke(_all_gather_quantized, args), None
    else:
        made = invoke(_all_gather_quantized, args, (None,) * 3, (q.zero_point,))
    data, scale, zero_point = made
    return QuantizedActivation(data, scale, key, q.orig_dtype, q.scale2, zero_point)
