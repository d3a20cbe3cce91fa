"""Collectives of sequence parallelism: rows are scattered over the ranks between a row-parallel layer and the next one.

    reduce_scatter    s = round_S(x_0 + x_1 + ...), of which each rank makes its own rows, and norms, quantizes them
    all_gather        every rank's rows, one after another; codes and scales cross where they are quantized, never S

Rank i has the rows from i * ceil(T / world_size) on, as many, the last ranks fewer or none: `workspace.rows(T)`. Bits
and errors are as in `fused_ops.collective`.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey, ScaleLayout, formats
from quant.key import FP8, PER_TOKEN

from . import norm
from ._check import FLOATS, check
from ._op import Shared, invoke, op, refuse_backward, refused
from .collective import apart, by_group, check_workspace, gathered, one_row_key, summed, world_of
from .linear import scaled_linear
from .norm import _fused_add_rms_norm, _rms_norm, both, fused_add_rms_norm_quant, norm_flags, rms_norm_quant
from .quantize import QuantOptions, plain_out, quantizing, run_quant
from .workspace import AllReduceWorkspace, ranks_of, share_of


def own(tokens: Any, rank: int, group: str) -> slice:
    """The rows of `tokens` that are this rank's."""
    return share_of(tokens, world_of(group), rank)


@op("y")
def _reduce_scatter(x: Tensor, workspace: Shared, rank: int, group: str):
    return summed(gathered(x, group))[own(x.shape[0], rank, group)]


@op("y")
def _reduce_scatter_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, flags: int, workspace: Shared, rank: int, group: str
):
    return _rms_norm.reference(_reduce_scatter.reference(x, workspace, rank, group), weight, eps, flags)


@op("y residual")
def _reduce_scatter_fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    flags: int,
    workspace: Shared,
    rank: int,
    group: str,
    x_multiplier: float = 1.0,
):
    x = _reduce_scatter.reference(x, workspace, rank, group)
    return _fused_add_rms_norm.reference(x, residual, weight, eps, flags, x_multiplier)


@op("y")
def _all_gather(x: Tensor, rows: torch.SymInt, workspace: Shared, rank: int, group: str):
    share = -(-rows // world_of(group))
    data = x.new_empty(x.shape).copy_(x).view(-1).view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())
    parts = gathered(pad(data, (0, 0, 0, share - x.shape[0])), group)
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


@_reduce_scatter.declares("check")
def check_scattered(x, workspace, rank, group, *, name) -> int:
    check_workspace(name, x, workspace, rank, group)
    return check(name, x=(x, "T N", FLOATS))["N"]


@_reduce_scatter_rms_norm.declares("check")
def _(x, weight, eps, flags, workspace, rank, group, *, name) -> int:
    check_scattered(x, workspace, rank, group, name=name)
    return norm._check(x, weight, eps, flags, name=name)


@_reduce_scatter_fused_add_rms_norm.declares("check")
def _(x, residual, weight, eps, flags, workspace, rank, group, x_multiplier=1.0, *, name) -> int:
    check_scattered(x, workspace, rank, group, name=name)
    rows = own(x.shape[0], rank, group)
    return norm.check_add(x[rows], residual, weight, eps, flags, x_multiplier, name=name)


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
    check(name, x=(x, "R N", x.dtype))
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


@_reduce_scatter.declares("empty")
def _(x, workspace, rank, group):
    rows = own(x.shape[0], rank, group)
    return x.new_empty((rows.stop - rows.start, x.shape[1]))


@_reduce_scatter_rms_norm.declares("empty")
def _(x, weight, eps, flags, workspace, rank, group):
    return _reduce_scatter.empty(x, workspace, rank, group)


@_reduce_scatter_fused_add_rms_norm.declares("empty")
def _(x, residual, *_):
    return x.new_empty(residual.shape), x.new_empty(residual.shape)


@_all_gather.declares("empty")
def _(x, rows, *_):
    return x.new_empty((rows, x.shape[1]))


@_all_gather_quantized.declares("empty")
def _(data, scale, key, rows, *_):
    known = QuantKey.from_code(key)
    return formats.empty((rows, data.shape[1] * known.packing), known, data.device)


_reduce_scatter_rms_norm_quant = quantizing(_reduce_scatter_rms_norm, one_scale=False)
_reduce_scatter_fused_add_rms_norm_quant = quantizing(_reduce_scatter_fused_add_rms_norm, one_scale=False)


# --- the public functions ---


def _scattered_by_group(x: Tensor, workspace: AllReduceWorkspace) -> Tensor:
    check("reduce_scatter", x=(x, "T N", FLOATS))
    return by_group(x, workspace)[workspace.rows(x.shape[0])]


def reduce_scatter(x: Tensor, workspace: AllReduceWorkspace, *, out: Tensor | None = None) -> Tensor:
    """This rank's rows of `all_reduce`, the same bits.

    Args:
        x: [T, N] bfloat16, float16 or float32 (S), all tokens, the same shape and dtype on every rank.
        workspace: of the group.
        out: [R, N] in S, written instead of a fresh tensor.

    Returns:
        [R, N] in S, the rows `workspace.rows(T)`.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    if apart(workspace):
        mine = _scattered_by_group(x, workspace)
        return mine.clone() if out is None else out.copy_(mine)
    return invoke(_reduce_scatter, (x, *ranks_of(workspace)), None if out is None else (out,))


def reduce_scatter_rms_norm_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    workspace: AllReduceWorkspace,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    **quant: Unpack[QuantOptions],
) -> Tensor | QuantizedActivation:
    """`reduce_scatter`, then `rms_norm_quant` of this rank's rows, in one pass; bit for bit what the two return.

    Args:
        x, workspace: as in `reduce_scatter`.
        weight, eps, quant_key, weight_bias, round_before_weight, **quant: as in `all_reduce_rms_norm_quant`.

    Returns:
        `QuantizedActivation` of logical shape [R, N], or a Tensor where quant_key is None.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    name = "reduce_scatter_rms_norm_quant"
    if apart(workspace):
        options: Any = {"weight_bias": weight_bias, "round_before_weight": round_before_weight, **quant}
        return rms_norm_quant(_scattered_by_group(x, workspace), weight, eps, one_row_key(name, quant_key), **options)
    args = (x, weight, eps, norm_flags(name, weight_bias, round_before_weight), *ranks_of(workspace))
    if quant_key is None:
        out = plain_out(name, quant)
        return invoke(_reduce_scatter_rms_norm, args, None if out is None else (out,))
    return run_quant(_reduce_scatter_rms_norm_quant, args, quant_key, quant)


def reduce_scatter_fused_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    quant_key: QuantKey | None,
    workspace: AllReduceWorkspace,
    *,
    x_multiplier: float = 1.0,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    residual_out: Tensor | None = None,
    **quant: Unpack[QuantOptions],
) -> tuple[Tensor | QuantizedActivation, Tensor]:
    """`reduce_scatter`, then `fused_add_rms_norm_quant` of this rank's rows; bit for bit what the two return.

    Args:
        x, workspace: as in `reduce_scatter`.
        residual: [R, N] in S, this rank's rows only.
        weight, eps, x_multiplier, weight_bias, round_before_weight, residual_out: as in `fused_add_rms_norm`.
        quant_key, **quant: as in `all_reduce_rms_norm_quant`.

    Returns:
        (`QuantizedActivation` or Tensor of the normed rows, new residual [R, N] in S).

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    name = "reduce_scatter_fused_add_rms_norm_quant"
    if apart(workspace):
        options: Any = {"x_multiplier": x_multiplier, "weight_bias": weight_bias, "residual_out": residual_out, **quant}
        options["round_before_weight"] = round_before_weight
        mine, key = _scattered_by_group(x, workspace), one_row_key(name, quant_key)
        return fused_add_rms_norm_quant(mine, residual, weight, eps, key, **options)
    args = (x, residual, weight, eps, norm_flags(name, weight_bias, round_before_weight), *ranks_of(workspace))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    if quant_key is None:
        return invoke(_reduce_scatter_fused_add_rms_norm, args, both(plain_out(name, quant), residual_out), optional)
    outs = None if residual_out is None else {"residual": residual_out}
    return run_quant(_reduce_scatter_fused_add_rms_norm_quant, args, quant_key, quant, outs, optional)


def _all_rows(tensor: Any, workspace: AllReduceWorkspace, rows: int | None) -> Any:
    if rows is not None or not isinstance(tensor, Tensor) or not tensor.ndim:
        return 0 if rows is None else rows
    return tensor.shape[0] * workspace.world_size


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
    mine = workspace if apart(workspace) else None
    ranks = () if mine is not None else ranks_of(workspace)
    total = _all_rows(x, workspace, rows)
    if mine is not None:
        made = _all_gather.reference(x, total, None, mine.rank, mine.group_name)
        return made if out is None else out.copy_(made)
    return invoke(_all_gather, (x, total, *ranks), None if out is None else (out,))


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
    key: Any = one_row_key(name, q.quant_key)
    if key.scale.static:
        data = all_gather(q.data, workspace, rows=rows)
        return QuantizedActivation(data, q.scale, key, q.orig_dtype, q.scale2, q.zero_point)
    if apart(workspace):
        total = _all_rows(q.data, workspace, rows)
        args: tuple = (q.data, q.scale, key.code, total, None, workspace.rank, workspace.group_name)
        data, scale, zero_point = _all_gather_quantized.reference(*args, q.zero_point)
        return QuantizedActivation(data, scale, key, q.orig_dtype, q.scale2, zero_point)
    ranks = ranks_of(workspace)
    args = (q.data, q.scale, key.code, _all_rows(q.data, workspace, rows), *ranks)
    if q.zero_point is None:
        data, scale = invoke(_all_gather_quantized, args)
        return QuantizedActivation(data, scale, key, q.orig_dtype, q.scale2)
    args = (*args, q.zero_point)
    outs: dict[str, Tensor | None] = {}
    try:
        data, scale, zero_point = _all_gather_quantized.empty(*args)
        outs = {"data_out": data, "scale_out": scale, "zero_point_out": zero_point}
        _all_gather_quantized.out(*args, **outs)
    except Exception as error:
        refused(_all_gather_quantized, args, error, outs)
        raise
    refuse_backward(name, data, scale)
    return QuantizedActivation(data, scale, key, q.orig_dtype, q.scale2, zero_point)


def all_gather_matmul(
    x: Tensor | QuantizedActivation,
    weight: Tensor,
    workspace: AllReduceWorkspace,
    *,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """`all_gather`, then a column-parallel layer: `y = X @ weight^T + bias` of every rank's rows X.

    On CUDA torch's symmetric-memory operations overlap the two, where every rank has as many rows and x isn't quantized
    or is FP8 by token; else one after the other.

    Args:
        x: [R, K], this rank's rows, or an activation of that logical shape.
        weight: [N, K], this rank's columns, in x's dtype; or codes, as `scaled_linear` takes them.
        workspace: of the group.
        weight_scale: as `scaled_linear` takes it, where x is quantized.
        bias: [N] or None.
        rows: as in `all_gather`.

    Returns:
        [T, N] in S.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    if isinstance(x, QuantizedActivation):
        if weight_scale is None:
            raise ValueError("all_gather_matmul: weight_scale is None, but x is quantized")
        if rows is None and _overlaps(x.data, workspace) and _by_token(x.quant_key):
            _, (y,) = torch.ops.symm_mem.fused_all_gather_scaled_matmul(
                *(x.data, [weight.t()], x.scale, [weight_scale.t()], 0, workspace.group_name),
                *([bias], [None], [x.orig_dtype], [False]),
            )
            return y
        every = all_gather_quantized(x, workspace, rows=rows)
        return scaled_linear(every, weight, weight_scale, bias, out_dtype=x.orig_dtype)
    if weight_scale is not None:
        raise ValueError("all_gather_matmul: weight_scale is given, but x isn't quantized")
    if rows is None and bias is None and _overlaps(x, workspace):
        return torch.ops.symm_mem.fused_all_gather_matmul(x, [weight.t()], 0, workspace.group_name)[1][0]
    return linear(all_gather(x, workspace, rows=rows), weight, bias)


def matmul_reduce_scatter(
    x: Tensor | QuantizedActivation,
    weight: Tensor,
    workspace: AllReduceWorkspace,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """A row-parallel layer, then `reduce_scatter`: this rank's rows of the sum of every rank's `x @ weight^T`.

    On CUDA torch's symmetric-memory operation overlaps the two where x isn't quantized and T is a multiple of the
    ranks, and sums in S; else one after the other.

    Args:
        x: [T, K], this rank's columns of all tokens, or an activation of that logical shape.
        weight: [N, K], this rank's columns, in x's dtype; or codes, as `scaled_linear` takes them.
        workspace: of the group.
        weight_scale: as `scaled_linear` takes it, where x is quantized.

    Returns:
        [R, N] in S, the rows `workspace.rows(T)`.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    if isinstance(x, QuantizedActivation):
        if weight_scale is None:
            raise ValueError("matmul_reduce_scatter: weight_scale is None, but x is quantized")
        return reduce_scatter(scaled_linear(x, weight, weight_scale, out_dtype=x.orig_dtype), workspace)
    if weight_scale is not None:
        raise ValueError("matmul_reduce_scatter: weight_scale is given, but x isn't quantized")
    if _overlaps(x, workspace) and x.shape[0] % workspace.world_size == 0:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 0, workspace.group_name)
    return reduce_scatter(linear(x, weight), workspace)


def _overlaps(x: Tensor, workspace: AllReduceWorkspace) -> bool:
    """Whether torch's symmetric-memory operations serve these rows."""
    return x.is_cuda and not apart(workspace) and x.ndim == 2 and x.is_contiguous()


def _by_token(key: QuantKey) -> bool:
    return key.dtype == FP8 and key.scale.group_shape == PER_TOKEN and not key.scale.static
