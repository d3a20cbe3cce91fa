"""Collectives of sequence parallelism: rows are scattered over the ranks between a row-parallel layer and the next one.

    s = round_S(x_0 + x_1 + ...)      of which each rank makes its own rows, and norms, quantizes them

and `fused_ops.gather` brings the codes together. Rank i has the rows from i * ceil(T / world_size) on, as many, the
last ranks fewer or none: `workspace.rows(T)`. Bits and errors are as in `fused_ops.collective`.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey
from quant.key import FP8, PER_TOKEN

from . import norm
from ._check import FLOATS, check
from ._op import Shared, invoke, op
from .apart import FusedNorm, apart, by_group, invoke_apart, run_norm
from .collective import check_workspace, gathered, summed
from .gather import all_gather, all_gather_quantized, own
from .linear import _scaled_linear, scaled_linear
from .norm import _fused_add_rms_norm, _fused_add_rms_norm_quant, _rms_norm, _rms_norm_quant, norm_flags
from .quantize import QuantOptions, quantizing
from .workspace import AllReduceWorkspace, counted, ranks_of


@op("y")
def _reduce_scatter(x: Tensor, workspace: Shared, rank: int, group: str):
    return summed(gathered(x, workspace, rank, group))[own(x.shape[0], rank, group)]


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


_reduce_scatter_rms_norm_quant = quantizing(_reduce_scatter_rms_norm, one_scale=False)
_reduce_scatter_fused_add_rms_norm_quant = quantizing(_reduce_scatter_fused_add_rms_norm, one_scale=False)


_REDUCE_SCATTER_NORM = FusedNorm(_reduce_scatter_rms_norm, _reduce_scatter_rms_norm_quant, _rms_norm, _rms_norm_quant)
_REDUCE_SCATTER_ADD_NORM = FusedNorm(
    _reduce_scatter_fused_add_rms_norm,
    _reduce_scatter_fused_add_rms_norm_quant,
    _fused_add_rms_norm,
    _fused_add_rms_norm_quant,
)


def _scattered_by_group(name: str, x: Tensor, workspace: AllReduceWorkspace) -> Tensor:
    return by_group(name, x, workspace)[workspace.rows(x.shape[0])]


@counted
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
    args, outs = (x, *ranks_of(workspace)), None if out is None else (out,)
    if apart(workspace):
        return invoke_apart(
            _reduce_scatter, args, lambda: _scattered_by_group("reduce_scatter", x, workspace).clone(), outs
        )
    return invoke(_reduce_scatter, args, outs)


@counted
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
    flags = norm_flags("reduce_scatter_rms_norm_quant", weight_bias, round_before_weight)
    args = (x, weight, eps, flags, *ranks_of(workspace))
    return run_norm(_REDUCE_SCATTER_NORM, args, workspace, quant_key, quant, total=_scattered_by_group)


@counted
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
    flags = norm_flags("reduce_scatter_fused_add_rms_norm_quant", weight_bias, round_before_weight)
    args = (x, residual, weight, eps, flags, *ranks_of(workspace))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    return run_norm(
        _REDUCE_SCATTER_ADD_NORM, args, workspace, quant_key, quant, residual_out, optional, _scattered_by_group
    )


@counted
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
        x: [R, K] bfloat16, float16 or float32 (S), this rank's rows, or an activation of that logical shape.
        weight: [N, K], this rank's columns, in S; or codes, as `scaled_linear` takes them.
        workspace: of the group.
        weight_scale: as `scaled_linear` takes it, where x is quantized.
        bias: [N] in S, where x is quantized in any of these dtypes; or None.
        rows: as in `all_gather`.

    Returns:
        [T, N] in S.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    _check_product("all_gather_matmul", x, weight, workspace, weight_scale, bias)
    if isinstance(x, QuantizedActivation):
        assert weight_scale is not None  # as was checked
        if rows is None and _overlaps(x.data, workspace) and _by_token(x.quant_key):
            _, (y,) = torch.ops.symm_mem.fused_all_gather_scaled_matmul(
                *(x.data, [weight.t()], x.scale, [weight_scale.t()], 0, workspace.group_name),
                *([bias], [None], [x.orig_dtype], [False]),
            )
            return y
        every = all_gather_quantized(x, workspace, rows=rows)
        return scaled_linear(every, weight, weight_scale, bias, out_dtype=x.orig_dtype)
    if rows is None and bias is None and _overlaps(x, workspace):
        return torch.ops.symm_mem.fused_all_gather_matmul(x, [weight.t()], 0, workspace.group_name)[1][0]
    return linear(all_gather(x, workspace, rows=rows), weight, bias)


@counted
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
        x: [T, K] bfloat16, float16 or float32 (S), this rank's columns of all tokens, or an activation of that logical
            shape.
        weight: [N, K], this rank's columns, in S; or codes, as `scaled_linear` takes them.
        workspace: of the group.
        weight_scale: as `scaled_linear` takes it, where x is quantized.

    Returns:
        [R, N] in S, the rows `workspace.rows(T)`.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    _check_product("matmul_reduce_scatter", x, weight, workspace, weight_scale)
    if isinstance(x, QuantizedActivation):
        assert weight_scale is not None  # as was checked
        return reduce_scatter(scaled_linear(x, weight, weight_scale, out_dtype=x.orig_dtype), workspace)
    if _overlaps(x, workspace) and x.shape[0] % workspace.world_size == 0:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 0, workspace.group_name)
    return reduce_scatter(linear(x, weight), workspace)


def _check_product(name: str, x: Any, weight: Any, workspace: Any, weight_scale: Any, bias: Any = None) -> None:
    """Raise unless x [..., K], weight [N, K] and bias [N] have a product, before ranks exchange anything for it."""
    device = ranks_of(workspace)[0].device
    if isinstance(x, QuantizedActivation):
        if weight_scale is None:
            raise ValueError(f"{name}: weight_scale is None, but x is quantized")
        if type(x.quant_key) is not QuantKey:
            raise TypeError(f"{name}: quant_key is {type(x.quant_key).__name__}, expected a QuantKey")
        factors = x.data, x.scale, x.quant_key.code, weight, weight_scale, bias, x.orig_dtype, x.scale2, x.zero_point
        try:
            _scaled_linear.check(*factors)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("scaled_linear", name, 1)) from error
        x = x.data
    else:
        if weight_scale is not None:
            raise ValueError(f"{name}: weight_scale is given, but x isn't quantized")
        sizes: dict[str, int] = {}
        for what, tensor, words in ("x", x, "T K"), ("weight", weight, "N K"), ("bias", bias, "N"):
            if tensor is None and what == "bias":
                continue
            shape = [sizes.get(word, word) for word in words.split()]
            expected = f"[{', '.join(map(str, shape))}]"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: {what} is {type(tensor).__name__}, expected a Tensor {expected}")
            if tensor.dtype not in ((x.dtype,) if what != "x" else FLOATS):
                raise TypeError(f"{name}: {what} is {tensor.dtype}, expected {FLOATS if what == 'x' else x.dtype}")
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}: {what} is {tensor.layout}, expected {torch.strided}")
            fits = tensor.ndim == len(shape) and all(
                w in (n, s) for n, s, w in zip(tensor.shape, words.split(), shape, strict=True)
            )
            if not fits or tensor.shape[-1] == 0:
                raise ValueError(f"{name}: {what} is {list(tensor.shape)}, expected {expected}")
            if tensor.device != x.device:
                raise ValueError(f"{name}: {what} is on {tensor.device}, expected {x.device} as x")
            sizes.update(zip(words.split(), tensor.shape, strict=True))
    if x.device != device:
        raise ValueError(f"{name}: workspace is on {device}, expected {x.device}")


def _overlaps(x: Tensor, workspace: AllReduceWorkspace) -> bool:
    """Whether torch's symmetric-memory operations serve these rows."""
    if not x.is_cuda or apart(workspace):
        return False
    ranks_of(workspace)  # which raises where it is closed
    return x.ndim == 2 and x.is_contiguous()


def _by_token(key: QuantKey) -> bool:
    return key.dtype == FP8 and key.scale.group_shape == PER_TOKEN and not key.scale.static
