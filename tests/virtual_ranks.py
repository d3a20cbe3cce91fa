"""Ranks of one process: what a collective promises, of any `together(calls)` that runs a call of each rank at once.

A rank's workspace lies on the CPU, where the kernels of GPUs run by fibers or by Triton's interpreter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import contextmanager

import torch
from compare import assert_same
from test_ops import fresh, outputs_for
from torch import Tensor
from torch.distributed import HashStore, ProcessGroup

from fused_ops import OPS, _symmetric
from fused_ops._op import Op, describe
from fused_ops.collective import summed
from fused_ops.workspace import share_of

SUMS = ("all_reduce", "reduce_scatter")


def group_of(world: int) -> str:
    """The name of a group of so many ranks that exchanges nothing."""
    name = f"{world} virtual ranks"
    if name not in _groups:
        _groups[name] = group = ProcessGroup(HashStore(), 0, world)
        group._set_group_name(name)
        torch._C._distributed_c10d._register_process_group(name, group)
    return name


_groups: dict[str, ProcessGroup] = {}


@contextmanager
def workspaces(world: int, max_tokens: int, cols: int, dtype: torch.dtype, *, timeout=1.0, above=_symmetric.NEVER):
    """The ranks' memory, poisoned but for what must be zero."""
    size = _symmetric.bytes_for(max_tokens, cols, dtype)
    buffers = [torch.full((size,), 0xFF, dtype=torch.uint8).share_memory_() for _ in range(world)]
    for buffer in buffers:
        buffer[: _symmetric.MAILBOX] = 0
    failures = torch.zeros(world, ctypes.sizeof(_symmetric.Failure), dtype=torch.uint8).share_memory_()
    addresses = [b.data_ptr() for b in buffers]
    made = [_symmetric.Memory(b, addresses, r, timeout, above, failures[r]) for r, b in enumerate(buffers)]
    try:
        yield made
    finally:
        for memory in made:
            memory.close()


def with_workspace(op: Op, args: tuple, memory: _symmetric.Memory) -> tuple:
    """The arguments with this rank's workspace in the place of theirs."""
    at = op.argument("workspace")
    return *args[:at], memory.buffer, memory.rank, group_of(len(memory.addresses)), *args[at + 3 :]


class RankCall:
    """A call of one rank, by the out overload: `run()` makes it, `results` has its outputs then."""

    def __init__(self, op: Op, args: tuple, memory: _symmetric.Memory):
        self.op, self.args = op, with_workspace(op, args, memory)
        self.outs = fresh(op, self.args)
        for out in self.outs.values():
            if out is not None:
                out.untyped_storage().share_memory_() if hasattr(out.untyped_storage(), "share_memory_") else None

    def run(self) -> None:
        self.op.out(*self.args, **self.outs)

    @property
    def results(self) -> dict[str, Tensor]:
        return {name: self.outs[f"{name}_out"] for name in outputs_for(self.op, self.args)}


def parts_of(x: Tensor, world: int) -> list[Tensor]:
    """x of each rank, so that the order of the sum shows."""
    made = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for _ in range(world)]
    for rank, part in enumerate(made[1:]):
        part.copy_(torch.randn(x.shape) * 3.0 ** (rank % 3))
    return made


def is_unfused(by: Callable, together: Callable, op: Op, args: tuple, world: int, max_tokens=16, **options) -> None:
    """The sum in the order of ranks, then the operation without its first word, of one device; the same on all ranks."""
    first = next(name for name in SUMS if op.name.startswith(name))
    at, dtype, context = op.argument("workspace"), args[0].dtype, f"{op.name} of {world} {describe(args[:1])}"
    rest = (*args[1:at], *args[at + 3 :])
    parts = parts_of(args[0], world)
    total = summed(parts)
    plain = OPS.get(op.name.removeprefix(first).removeprefix("_"))
    rows = [slice(None)] * world
    residual = op.argument("residual")
    if first == "reduce_scatter":
        rows = [share_of(len(total), world, rank) for rank in range(world)]
    with workspaces(world, max_tokens, args[0].shape[-1], dtype, **options) as memories:
        calls = []
        for rank, memory in enumerate(memories):
            own = [rest[i][rows[rank]] if i + 1 == residual else value for i, value in enumerate(rest)]
            calls.append(RankCall(op, (parts[rank], *own[: at - 1], None, 0, "", *own[at - 1 :]), memory))
        together([[call] for call in calls])
        for rank, (call, memory) in enumerate(zip(calls, memories, strict=True)):
            memory.check()
            own = [rest[i][rows[rank]] if i + 1 == residual else value for i, value in enumerate(rest)]
            expected = {"y": total[rows[rank]]} if plain is None else by(plain, (total[rows[rank]], *own))
            for name, value in call.results.items():
                assert_same(value, expected[name], f"rank {rank}: {name} of {context}")
