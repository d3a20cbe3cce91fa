"""Collectives of tensor-parallel ranks, fused with the residual addition, norm and quantization that follow them.

    s = round_S(x_0 + x_1 + ...)      the ranks' x, summed in float32 in the order of ranks: the same bits on every rank
    r = round_S(round_S(s * x_multiplier) + residual),  y = rms_norm(r),  then the codes

A fused operation returns the same bits as `all_reduce` and the unfused ones, one after another. All ranks of a group
call the same operations in the same order, with the same shapes, dtypes and options, or all of them raise.

The reference backend gathers every rank's x through the group. Where ranks are on several hosts the sum is the group's
own, in its own order (see `AllReduceWorkspace`).

Source: Shoeybi et al., "Megatron-LM", 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo
from torch.distributed.distributed_c10d import _resolve_process_group
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from . import norm
from ._check import FLOATS, check
from ._op import Written, invoke, op
from .norm import _fused_add_rms_norm, _rms_norm, both, norm_flags
from .quantize import QuantOptions, plain_out, quantizing, run_quant
from .workspace import AllReduceWorkspace


def gathered(x: Tensor, group: str) -> list[Tensor]:
    """x of every rank of the group, by the group's own all-gather."""
    world = _resolve_process_group(group).size()
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
def _all_reduce(x: Tensor, workspace: Written, rank: int, group: str):
    return summed(gathered(x, group))


@op("y")
def _all_reduce_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, flags: int, workspace: Written, rank: int, group: str
):
    return _rms_norm.reference(summed(gathered(x, group)), weight, eps, flags)


@op("y residual")
def _all_reduce_fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    flags: int,
    workspace: Written,
    rank: int,
    group: str,
    x_multiplier: float = 1.0,
):
    x = summed(gathered(x, group))
    return _fused_add_rms_norm.reference(x, residual, weight, eps, flags, x_multiplier)


def check_workspace(name: str, workspace, rank, group) -> None:
    """Raise unless the last arguments are those of a workspace."""
    check(name, workspace=(workspace, "B", torch.uint8))
    if not isinstance(group, str):
        raise TypeError(f"{name}: group is {type(group).__name__}, expected its name")
    size = _resolve_process_group(group).size()
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name}: rank is {type(rank).__name__}, expected an int")
    if not 0 <= rank < size:
        raise ValueError(f"{name}: rank is {rank}, expected 0 to {size - 1}")


@_all_reduce.declares("check")
def _(x, workspace, rank, group, *, name) -> int:
    check_workspace(name, workspace, rank, group)
    return check(name, x=(x, "... N", FLOATS))["N"]


@_all_reduce_rms_norm.declares("check")
def _(x, weight, eps, flags, workspace, rank, group, *, name) -> int:
    check_workspace(name, workspace, rank, group)
    return norm._check(x, weight, eps, flags, name=name)


@_all_reduce_fused_add_rms_norm.declares("check")
def _(x, residual, weight, eps, flags, workspace, rank, group, x_multiplier=1.0, *, name) -> int:
    check_workspace(name, workspace, rank, group)
    return norm.check_add(x, residual, weight, eps, flags, x_multiplier, name=name)


@_all_reduce.declares("empty")
@_all_reduce_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape)


@_all_reduce_fused_add_rms_norm.declares("empty")
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@cache
def alone() -> AllReduceWorkspace:
    """The workspace of a group of one rank, for tests and benchmarks of one process."""
    store, name = HashStore(), "fused_ops alone"
    group = ProcessGroup(store, 0, 1)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(
        torch.device("cpu"), ProcessGroup.BackendType.GLOO, ProcessGroupGloo(store, 0, 1, timedelta(seconds=60))
    )
    group._set_group_name(name)
    torch._C._distributed_c10d._register_process_group(name, group)
    return AllReduceWorkspace(group, 16, 4096, torch.float32)


def ranks_of(workspace: AllReduceWorkspace) -> tuple[Tensor, int, str]:
    """A workspace as operations take it."""
    if not isinstance(workspace, AllReduceWorkspace):
        raise TypeError(f"workspace is {type(workspace).__name__}, expected an AllReduceWorkspace")
    return workspace.buffer, workspace.rank, workspace.group_name


@_all_reduce.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for x, *_ in norm.cases(device):
        yield x, *ranks_of(alone())


@_all_reduce_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for args in norm.cases(device):
        yield *args, *ranks_of(alone())


@_all_reduce_fused_add_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for args in norm.cases_add(device):
        yield *args[:5], *ranks_of(alone()), *args[5:]


_all_reduce_rms_norm_quant = quantizing(_all_reduce_rms_norm, one_scale=False)
_all_reduce_fused_add_rms_norm_quant = quantizing(_all_reduce_fused_add_rms_norm, one_scale=False)


def all_reduce(x: Tensor, workspace: AllReduceWorkspace, *, out: Tensor | None = None) -> Tensor:
    """The sum of every rank's x, in float32 in the order of ranks, rounded once to S.

    Args:
        x: [..., N] bfloat16, float16 or float32 (S), the workspace's; rows may be strided.
        workspace: of the group.
        out: [..., N] in S, written instead of a fresh tensor; may be x.

    Returns:
        [..., N] in S, the same bits on every rank.

    Raises:
        TypeError, ValueError: an argument is not as above, or differs between ranks; nothing is written.
        TimeoutError: another rank did not come within the workspace's limit.
    """
    return invoke(_all_reduce, (x, *ranks_of(workspace)), None if out is None else (out,))


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
    """`all_reduce`, then `rms_norm_quant` of the sum."""
    flags = norm_flags("all_reduce_rms_norm_quant", weight_bias, round_before_weight)
    args = (x, weight, eps, flags, *ranks_of(workspace))
    if quant_key is None:
        out = plain_out("all_reduce_rms_norm_quant", quant)
        return invoke(_all_reduce_rms_norm, args, None if out is None else (out,))
    return run_quant(_all_reduce_rms_norm_quant, args, quant_key, quant)


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
    """`all_reduce`, then `fused_add_rms_norm_quant` of the sum and the residual, which every rank has whole."""
    name = "all_reduce_fused_add_rms_norm_quant"
    args = (x, residual, weight, eps, norm_flags(name, weight_bias, round_before_weight), *ranks_of(workspace))
    optional = () if x_multiplier == 1.0 else (x_multiplier,)
    if quant_key is None:
        return invoke(_all_reduce_fused_add_rms_norm, args, both(plain_out(name, quant), residual_out), optional)
    outs = None if residual_out is None else {"residual": residual_out}
    return run_quant(_all_reduce_fused_add_rms_norm_quant, args, quant_key, quant, outs, optional)
