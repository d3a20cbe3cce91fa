"""Arguments of the collectives, on a group of one rank, for tests and benchmarks of one process."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import cache, partial

import torch
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo, Store

from quant import FP8_DYNAMIC_TOKEN, QuantKey, formats

from . import norm
from ._check import FLOATS
from ._op import Op
from .collective import (
    _all_reduce,
    _all_reduce_fused_add_rms_norm,
    _all_reduce_rms_norm,
    _qk_all_reduce_rms_norm,
)
from .gather import _all_gather, _all_gather_quantized
from .quantize import case_keys, key_inputs
from .sequence_parallel import (
    _reduce_scatter,
    _reduce_scatter_fused_add_rms_norm,
    _reduce_scatter_rms_norm,
)
from .workspace import AllReduceWorkspace, ranks_of


def group_of(store: Store, rank: int, world: int, name: str, seconds: float = 60) -> ProcessGroup:
    """A gloo group that is no part of torch.distributed's state: ranks may be threads of one process."""
    group, gloo = ProcessGroup(store, rank, world), ProcessGroup.BackendType.GLOO
    group._set_default_backend(gloo)
    backend = ProcessGroupGloo(store, rank, world, timedelta(seconds=seconds))
    group._register_backend(torch.device("cpu"), gloo, backend)
    group._set_group_name(name)  # type: ignore[arg-type]
    torch._C._distributed_c10d._register_process_group(name, group)  # type: ignore[arg-type]
    return group


@cache
def alone() -> AllReduceWorkspace:
    """The workspace of a group of one rank."""
    return AllReduceWorkspace(group_of(HashStore(), 0, 1, "fused_ops alone"), 16, 4096, torch.float32, device="cpu")


def _plain(op: Op, arguments: Iterator[tuple], inputs: int) -> Iterator[tuple]:
    """Cases of another operation that has the same first inputs, and perhaps a multiplier of x behind them."""
    for args in arguments:
        yield *args[:inputs], *ranks_of(alone()), *args[inputs:]


def _flat(arguments: Iterator[tuple]) -> Iterator[tuple]:
    return (args for args in arguments if args[0].ndim == 2)


def _only_x(arguments: Iterator[tuple]) -> Iterator[tuple]:
    return ((x,) for x, *_ in arguments)


for _op, _inputs, _cases, _workload in (
    (_all_reduce, 1, lambda device: _only_x(norm.cases(device)), norm.workload),
    (_all_reduce_rms_norm, 4, norm.cases, norm.workload),
    (_all_reduce_fused_add_rms_norm, 5, norm.cases_add, norm.workload_add),
    (_reduce_scatter, 1, lambda device: _only_x(_flat(norm.cases(device))), norm.workload),
    (_reduce_scatter_rms_norm, 4, lambda device: _flat(norm.cases(device)), norm.workload),
    (_reduce_scatter_fused_add_rms_norm, 5, lambda device: _flat(norm.cases_add(device)), norm.workload_add),
):

    def _cases_of(op: Op, inputs: int, cases, device: str) -> Iterator[tuple]:
        yield from _plain(op, cases(device), inputs)

    def _workload_of(inputs: int, workload, *args) -> tuple:
        return *workload(*args)[:inputs], *ranks_of(alone())

    _op.declares("cases")(partial(_cases_of, _op, _inputs, _cases))
    _op.declares("workload")(partial(_workload_of, _inputs, _workload))


@_qk_all_reduce_rms_norm.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for shape, cols in (
        ((1, 8), 2),
        ((7, 576), 192),
        ((2, 3, 6144), 1024),
        ((0, 64), 16),
        ((33, 1000), 333),
        ((2, 1), 1),
    ):
        for dtype in FLOATS:
            q, k = (torch.randn(*shape[:-1], n, device=device).to(dtype) for n in (shape[-1], cols))
            q_weight, k_weight = (torch.randn(n, device=device) for n in (shape[-1], cols))
            yield q, k, q_weight.to(dtype), k_weight, 1e-5, norm.ROUND_BEFORE_WEIGHT, *ranks_of(alone())
            yield q, k, q_weight, k_weight, 1e-6, norm.WEIGHT_BIAS_ONE, *ranks_of(alone())
            yield q, k, None, k_weight.to(dtype), 1e-6, 0, *ranks_of(alone())


@_qk_all_reduce_rms_norm.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    q, weight, eps, flags = norm.workload(tokens, cols, key, dtype, device)
    k = torch.randn(tokens, cols // 4, device=device).to(dtype)
    return q, k, weight, weight[: cols // 4].clone(), eps, flags, *ranks_of(alone())


@_all_gather.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for rows, cols in (1, 8), (7, 577), (0, 64), (33, 1000):
        for dtype in (*FLOATS, torch.int8, torch.int32):
            yield torch.randn(rows, cols, device=device).to(dtype), rows, *ranks_of(alone())


@_all_gather.declares("workload")
def _(tokens: int, cols: int, key: None, dtype: torch.dtype, device: str) -> tuple:
    return torch.randn(tokens, cols, device=device).to(dtype), tokens, *ranks_of(alone())


def _quantized(rows: int, cols: int, key: QuantKey, device: str) -> tuple:
    code, given, *_ = key_inputs(key, device)
    options = {} if key.scale2 is None else {"scale2": given}
    data, scale, zero_point = formats.quantize(torch.randn(rows, cols, device=device), key, **options)
    args = (data, scale, code, rows, *ranks_of(alone()))
    return args if zero_point is None else (*args, zero_point)


@_all_gather_quantized.declares("cases")
def _(device: str) -> Iterator[tuple]:
    for key in case_keys():
        if not (key.scale.static or key.per_tensor):
            for rows, cols in (1, 32), (5, 160), (0, 64), (130, 576):
                yield _quantized(rows, cols, key, device)


@_all_gather_quantized.declares("workload")
def _(tokens: int, cols: int, key: QuantKey | None, dtype: torch.dtype, device: str) -> tuple:
    return _quantized(tokens, cols, FP8_DYNAMIC_TOKEN if key is None else key, device)
