"""Ranks of one process: what a collective promises, of any `together(calls)` that runs a call of each rank at once.

A rank's workspace lies on the CPU, where the kernels of GPUs run by fibers or by Triton's interpreter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import contextmanager

import torch
from compare import assert_close, assert_same
from test_ops import fresh, outputs_for
from torch import Tensor
from torch.distributed import HashStore, ProcessGroup

from fused_ops import OPS, _symmetric
from fused_ops._op import Op, describe, refused
from fused_ops.collective import summed
from fused_ops.workspace import share_of
from quant import QuantKey, formats

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


def memories(
    world: int, max_tokens: int, cols: int, dtype: torch.dtype, *, timeout=1.0, above=_symmetric.NEVER
) -> list[_symmetric.Memory]:
    """The ranks' memory, poisoned but for what must be zero."""
    size = _symmetric.bytes_for(max_tokens, cols, dtype)
    buffers = [torch.full((size,), 0xFF, dtype=torch.uint8).share_memory_() for _ in range(world)]
    for buffer in buffers:
        buffer[: _symmetric.MAILBOX] = 0
    failures = torch.zeros(world, ctypes.sizeof(_symmetric.Failure), dtype=torch.uint8).share_memory_()
    addresses = [b.data_ptr() for b in buffers]
    return [_symmetric.Memory(b, addresses, r, timeout, above, failures[r]) for r, b in enumerate(buffers)]


@contextmanager
def workspaces(*args, **options):
    """The same, closed at the end."""
    made = memories(*args, **options)
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
                out.share_memory_()  # another process may write it

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
    """The sum in the order of ranks, then the operation of one device; the same on all ranks."""
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


def squares_are_summed(by: Callable, together: Callable, op: Op, args: tuple, world: int) -> None:
    """Ranks that have equal columns, a power of two of them: the mean square is each one's own, in any order."""
    q, k, q_weight, k_weight, eps, flags = args[:6]
    with workspaces(world, 4, 64, torch.float32) as memories:
        calls = [RankCall(op, args, memory) for memory in memories]
        together([[call] for call in calls])
        for memory, call in zip(memories, calls, strict=True):
            memory.check()
            for name, x, weight in ("q", q, q_weight), ("k", k, k_weight):
                expected = by(OPS["rms_norm"], (x, weight, eps, flags))["y"]
                context = f"{name} of {world} {describe(args[:2])}"
                if world & (world - 1) == 0:
                    assert_same(call.results[name], expected, context)
                assert_same(call.results[name], calls[0].results[name], context)
                assert_close(call.results[name], expected, context, roundings=2)


def gathered_is_one_after_another(together: Callable, op: Op, args: tuple, world: int, rows: int) -> None:
    """Every rank's rows, scales in the layout that the key has for all of them."""
    shares = [share_of(rows, world, rank) for rank in range(world)]
    context = f"{op.name} of {world} {describe(args[:1])}"
    if op.name == "all_gather":
        whole = torch.randint(-100, 100, (rows, args[0].shape[1])).to(args[0].dtype)
        inputs = [(whole[own], rows) for own in shares]
        expected = {"y": whole}
    else:
        key = QuantKey.from_code(args[2])
        x = torch.randn(rows, args[0].shape[1] * key.packing)
        options = {} if key.scale2 is None else {"scale2": torch.ones(1)}
        inputs = []
        for own in shares:
            data, scale, zero_point = formats.quantize(x[own], key, **options)
            inputs.append((data, scale, args[2], rows, zero_point))
        expected = dict(zip(("data", "scale", "zero_point"), formats.quantize(x, key, **options), strict=True))
    with workspaces(world, 3, 2048, torch.float32) as memories:
        at = op.argument("workspace")
        calls = []
        for own, memory in zip(inputs, memories, strict=True):
            full = (*own[:at], None, 0, "", *own[at:])
            calls.append(RankCall(op, full, memory))
        together([[call] for call in calls])
        for memory, call in zip(memories, calls, strict=True):
            memory.check()
            for name, value in call.results.items():
                assert_same(value, expected[name], f"{name} of {context}")
            assert call.results.keys() == {name for name, value in expected.items() if value is not None}


def public(call: RankCall) -> None:
    """Raises what the public function would."""
    try:
        call.run()
    except Exception as error:
        refused(call.op, call.args, error, call.outs)
        raise
