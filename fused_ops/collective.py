"""Collectives of tensor-parallel ranks, fused with the residual addition, norm and quantization that follow them.

    s = round_S(x_0 + x_1 + ...)      the ranks' x, summed in float32 in the order of ranks: the same bits on every rank
    r = round_S(round_S(s * x_multiplier) + residual),  y = rms_norm(r),  then the codes

A fused operation returns the same bits as `all_reduce` and the unfused ones, one after another. All ranks of a group
call the same operations in the same order, with the same shapes, dtypes and options, or all of them raise.

`qk_all_reduce_rms_norm` is a norm of rows whose columns the ranks share: only sums of squares cross.

The reference backend gathers every rank's x through the group. Of calls that differ between ranks it finds, on CPUs,
those that one has refused, and those of which x isn't alike. Where ranks are on several hosts the sum is the group's
own, in its own order (see `AllReduceWorkspace`).

Source: Shoeybi et al., "Megatron-LM", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from . import norm
from ._check import FLOATS, check
from ._op import Shared, invoke, op
from ._shared import meet
from .apart import FusedNorm, apart, by_group, invoke_apart, run_norm
from .norm import (
    _fused_add_rms_norm,
    _fused_add_rms_norm_quant,
    _rms_norm,
    _rms_norm_quant,
    norm_flags,
    normed,
)
from .quantize import QuantOptions, quantizing
from .workspace import AllReduceWorkspace, counted, raise_if_broken, ranks_of


@torch.compiler.assume_constant_result  # Dynamo can't trace what it calls
def world_of(group: str) -> int:
    """How many ranks the group of this name has."""
    return _resolve_process_group(group).size()  # type: ignore[arg-type]


def gathered(x: Tensor, workspace: Tensor, rank: int, group: str) -> list[Tensor]:
    """x of every rank of the group, by the group's own all-gather.

    Raises ValueError, on every rank, where one has refused this call, or hands over another x.
    """
    world = world_of(group)
    if world > 1:
        meet(f"{x.dtype} {list(x.shape)}", workspace, rank, group)
    ops = torch.ops._c10d_functional
    stacked = ops.wait_tensor(ops.all_gather_into_tensor(x.reshape(-1), world, group))
    return list(stacked.view(world, *x.shape))


def summed(parts: list[Tensor]) -> Tensor:
    """The sum in float32, in the order of ranks, rounded to their dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@op("y")
def _all_reduce(x: Tensor, workspace: Shared, rank: int, group: str):
    return summed(gathered(x, workspace, rank, group))


@op("y")
def _all_reduce_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, flags: int, workspace: Shared, rank: int, group: str
):
    return _rms_norm.reference(summed(gathered(x, workspace, rank, group)), weight, eps, flags)


@op("y residual")
def _all_reduce_fused_add_rms_norm(
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
    x = summed(gathered(x, workspace, rank, group))
    return _fused_add_rms_norm.reference(x, residual, weight, eps, flags, x_multiplier)


@op("q k")
def _qk_all_reduce_rms_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    flags: int,
    workspace: Shared,
    rank: int,
    group: str,
):
    parts = gathered(sums_of_squares(q, k), workspace, rank, group)
    return _normed_both(q, k, q_weight, k_weight, eps, flags, summed(parts), len(parts))


def sums_of_squares(q: Tensor, k: Tensor) -> Tensor:
    """float32 [..., 2], what crosses of q [..., N] and k [..., K]."""
    return torch.stack([q.float().square().sum(-1), k.float().square().sum(-1)], dim=-1)


def _normed_both(q, k, q_weight, k_weight, eps: float, flags: int, squares: Tensor, world: int) -> tuple:
    means = [squares[..., i, None] / (world * t.shape[-1]) for i, t in enumerate((q, k))]
    return normed(q, means[0], q_weight, eps, flags), normed(k, means[1], k_weight, eps, flags)


def check_workspace(name: str, x, workspace, rank, group) -> None:
    """Raise unless the last arguments are those of a workspace in which nobody has given up waiting."""
    check(name, workspace=(workspace, "B", torch.uint8))
    if isinstance(x, Tensor) and x.device != workspace.device:
        raise ValueError(f"{name}: workspace is on {workspace.device}, expected {x.device}")
    if not isinstance(group, str):
        raise TypeError(f"{name}: group is {type(group).__name__}, expected its name")
    size = world_of(group)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}: rank is {type(rank).__name__}, expected an int")
    if not 0 <= rank < size:
        raise ValueError(f"{name}: rank is {rank}, expected 0 to {size - 1}")
    raise_if_broken(name, workspace)


@_all_reduce.declares("check")
def _(x, workspace, rank, group, *, name) -> int:
    check_workspace(name, x, workspace, rank, group)
    return check(name, x=(x, "... N", FLOATS))["N"]


@_all_reduce_rms_norm.declares("check")
def _(x, weight, eps, flags, workspace, rank, group, *, name) -> int:
    check_workspace(name, x, workspace, rank, group)
    return norm._check(x, weight, eps, flags, name=name)


@_all_reduce_fused_add_rms_norm.declares("check")
def _(x, residual, weight, eps, flags, workspace, rank, group, x_multiplier=1.0, *, name) -> int:
    check_workspace(name, x, workspace, rank, group)
    return norm.check_add(x, residual, weight, eps, flags, x_multiplier, name=name)


@_qk_all_reduce_rms_norm.declares("check")
def _(q, k, q_weight, k_weight, eps, flags, workspace, rank, group, *, name) -> int:
    check_workspace(name, q, workspace, rank, group)
    both_of_k = {"k": (k, "... K", "q"), "k_weight": (k_weight, "K ?", FLOATS)}
    sizes = check(name, q=(q, "... N", FLOATS), **both_of_k, q_weight=(q_weight, "N ?", FLOATS))
    if sizes["K"] == 0:
        raise ValueError(f"{name}: k is {list(k.shape)}, expected at least one column")
    return norm._check(q, q_weight, eps, flags, name=name)


@_all_reduce.declares("empty")
@_all_reduce_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape)


@_all_reduce_fused_add_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_qk_all_reduce_rms_norm.declares("empty")
def _(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


_all_reduce_rms_norm_quant = quantizing(_all_reduce_rms_norm, one_scale=False)
_all_reduce_fused_add_rms_norm_quant = quantizing(_all_reduce_fused_add_rms_norm, one_scale=False)


_ALL_REDUCE_NORM = FusedNorm(_all_reduce_rms_norm, _all_reduce_rms_norm_quant, _rms_norm, _rms_norm_quant)
_ALL_REDUCE_ADD_NORM = FusedNorm(
    _all_reduce_fused_add_rms_norm,
    _all_reduce_fused_add_rms_norm_quant,
    _fused_add_rms_norm,
    _fused_add_rms_norm_quant,
)


@counted
def all_reduce(x: Tensor, workspace: AllReduceWorkspace, *, out: Tensor | None = None) -> Tensor:
    """The sum of every rank's x, in float32 in the order of ranks, rounded once to S.

    Args:
        x: [..., N] bfloat16, float16 or float32 (S), the same shape and dtype on every rank; rows may be strided, and
            N may be as many columns as fit into the bytes of a row of the workspace.
        workspace: of the group.
        out: [..., N] in S, written instead of a fresh tensor; may be x.

    Returns:
        [..., N] in S, the same bits on every rank.

    Raises:
        TypeError, ValueError: an argument is not as above, or, where ranks share memory, another rank makes another
            call; nothing is written.
        TimeoutError: another rank did not come within the workspace's limit, now or in an earlier call.
    """
    args, outs = (x, *ranks_of(workspace)), None if out is None else (out,)
    if apart(workspace):
        return invoke_apart(_all_reduce, args, lambda: by_group("all_reduce", x, workspace), outs)
    return invoke(_all_reduce, args, outs)


@counted
def all_reduce_rms_norm_quant(
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
    """`all_reduce`, then `rms_norm_quant` of the sum, in one pass; bit for bit what the two return.

    Args:
        x, workspace: as in `all_reduce`.
        weight, eps, weight_bias, round_before_weight: as in `rms_norm`, the same on every rank.
        quant_key, **quant: as in `quantize`, but no key with one dynamic scale for the tensor. None: the normed rows.

    Returns:
        `QuantizedActivation` of logical shape [..., N], or a Tensor, the same bits on every rank.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    flags = norm_flags("all_reduce_rms_norm_quant", weight_bias, round_before_weight)
    return run_norm(_ALL_REDUCE_NORM, (x, weight, eps, flags, *ranks_of(workspace)), workspace, quant_key, quant)


@counted
def all_reduce_fused_add_rms_norm_quant(
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
    """`all_reduce`, then `fused_add_rms_norm_quant` of the sum and the residual; bit for bit what the two return.

    Args:
        x, workspace: as in `all_reduce`.
        residual: [..., N] in S, which every rank has whole.
        weight, eps, x_multiplier, weight_bias, round_before_weight, residual_out: as in `fused_add_rms_norm`.
        quant_key, **quant: as in `all_reduce_rms_norm_quant`.

    Returns:
        (`QuantizedActivation` or Tensor of the normed rows, new residual [..., N] in S), the same bits on every rank.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.
    """
    flags = norm_flags("all_reduce_fused_add_rms_norm_quant", weight_bias, round_before_weight)
    args = (x, residual, weight, eps, flags, *ranks_of(workspace))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    return run_norm(_ALL_REDUCE_ADD_NORM, args, workspace, quant_key, quant, residual_out, optional)


@counted
def qk_all_reduce_rms_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    workspace: AllReduceWorkspace,
    *,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of q and of k, over all ranks' columns: only their sums of squares cross, float32 [..., 2].

        mean(q^2) = (s_0 + s_1 + ...) / (world_size * N),  s_i the sum of squares of rank i's columns

    Args:
        q: [..., N] bfloat16, float16 or float32 (S), a rank's columns; as many on every rank.
        k: [..., K] in S, likewise.
        q_weight, k_weight: [N] and [K] in any of these dtypes, a rank's columns; or None.
        eps, weight_bias, round_before_weight: as in `rms_norm`, the same on every rank.
        workspace: of the group.
        out: (q, k), written instead of fresh tensors; may be the arguments.

    Returns:
        (q, k), normed.

    Raises:
        TypeError, ValueError, TimeoutError: as in `all_reduce`.

    Source: MiniMax-M2's attention, whose q and k are normed before they are heads.
    """
    name = "qk_all_reduce_rms_norm"
    flags = norm_flags(name, weight_bias, round_before_weight)
    args = (q, k, q_weight, k_weight, eps, flags, *ranks_of(workspace))
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{name}: out is {type(out).__name__}, expected a tuple of two tensors")
    if apart(workspace):

        def make() -> tuple:
            squares = by_group(name, sums_of_squares(q, k), workspace)
            return _normed_both(q, k, q_weight, k_weight, eps, flags, squares, workspace.world_size)

        return invoke_apart(_qk_all_reduce_rms_norm, args, make, out)
    return invoke(_qk_all_reduce_rms_norm, args, out)
