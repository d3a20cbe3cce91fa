"""Rows that are summed over ranks: which kernel, with which arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import _symmetric
from .._symmetric import Memory, memory_of
from .collective import MAX_BLOCKS, Ranks, RankStages, rank_kernel
from .launch import (
    OPTIONS,
    Pipeline,
    arguments_of,
    bytes_of,
    kernel_of,
    next_power_of_two,
    on_device,
    rows_of,
    rows_with_padding,
    run,
)
from .operations import ROW_OPERATIONS, set_key, set_outputs
from .platform import number

SUMS = {"all_reduce": False, "reduce_scatter": True}  # and whether rows are scattered


def operation(name: str, arguments: list[str], required: int) -> Callable[[tuple, dict[str, Any]], None]:
    """What runs `all_reduce`, `reduce_scatter`, or one of them and a row operation."""
    first = next(word for word in SUMS if name.startswith(word))
    make = ROW_OPERATIONS.get(name.removesuffix("_quant").removeprefix(first).removeprefix("_"), Pipeline)
    at = arguments.index("workspace")

    def call(args: tuple, outs: dict[str, Any]) -> None:
        memory = memory_of(args[at], args[at + 1])
        memory.check(name)
        if name.endswith("_quant"):
            code, given, *rest = args[required:]
            p = make(*args[:at], *rest[1:])
            set_key(p, code, given, *rest[:1])
        else:
            p = make(*args[:at], *args[at + 3 :])
        set_outputs(p, outs)
        run(p, partial(launch_ranks, memory=memory, scattered=SUMS[first]))

    return call


def launch_ranks(p: Pipeline, memory: Memory, scattered: bool) -> None:
    kernel, warps = kernel_of(p)
    world, every, size = len(memory.addresses), p.x.shape[:-1].numel(), p.x.element_size()
    outputs = p.other, p.residual, p.y, bytes_of(p.data)
    if scattered:
        share = -(-every // world)
        total, rows = share, max(0, min(share, every - memory.rank * share))
        x_sizes, (x,) = rows_of(p.x)
        sizes, (other, residual, y, data) = rows_of(*outputs)
    else:
        share, total, rows = 0, every, every
        sizes, (x, other, residual, y, data) = rows_of(p.x, *outputs)
        x_sizes = sizes
    row_bytes = -(-p.cols * size // 16) * 16
    slot_bytes = (memory.buffer.numel() - _symmetric.MAILBOX) // 32 * 16
    most = slot_bytes // row_bytes // (world if scattered else 1)
    if not most:
        raise ValueError(f"workspace has no room for a row of {p.cols} columns of every rank")
    for begin in range(0, max(total, 1), most):
        end = min(total, begin + most)
        two_shot = not scattered and world > 1 and (end - begin) * row_bytes > memory.above
        words = _call(p, scattered, every, begin << 1 | two_shot)
        words[0] |= memory.refused.value << _symmetric.REFUSED_FROM
        exchange = RankStages(
            kernel,
            world,
            next_power_of_two(world),
            two_shot,
            scattered,
            row_bytes // size,
            -(-row_bytes // 16 // world) * 16 // size,
            torch.version.hip is not None,
        )
        blocks = min(max(1, -(-(end - begin) // kernel.rows)), MAX_BLOCKS.value)
        ranks = Ranks(
            tuple(memory.addresses),
            memory.addresses[memory.rank],
            number(memory.rank),
            number(blocks),
            number(slot_bytes),
            number(begin),
            number(end),
            number(share),
            number(every),
            number(round(memory.timeout * 1e9)),
            tuple(map(number, words)),
            number(hash(tuple(words)) & 0x7FFFFFFF),
            memory.failure.data_ptr(),
        )
        # Of all ranks' parts, registers hold more than of a row.
        wide = min(2 * warps, 16 if torch.version.hip else 32) if two_shot else warps
        last = max(end, begin + 1) if end < rows else max(begin + 1, rows_with_padding(kernel.codes, rows, p.scale))
        arguments = {
            "rows": rows,
            "sizes": sizes,
            "x": x,
            "x_sizes": x_sizes,
            "other": other,
            "residual": residual,
            "y": y,
            "data": data,
            "ranks": ranks,
            "last": last,
            "K": kernel,
            "E": exchange,
            **arguments_of(p, kernel),
        }
        start = lambda: rank_kernel[(blocks,)](**arguments, num_warps=wide, **OPTIONS)  # noqa: B023, E731
        on_device(p.x.device, start)


def _call(p: Pipeline, scattered: bool, rows: int, part: int) -> list[int]:
    s = _symmetric
    flags = {1: s.ROUND_BEFORE, 2: s.PLUS_ONE}
    options = sum(bit for flag, bit in flags.items() if p.flags & flag and p.weight is not None)
    options |= s.NORMS * bool(p.norm) | s.WEIGHT * (p.weight is not None) | s.ADDS * (p.load == "add")
    options |= s.SCATTERED * scattered | s.TRITON
    key = -1 if p.key is None else p.key
    return [options, rows, p.cols, s.NUMBER_OF[p.x.dtype], key, s.bits_of(p.eps), s.bits_of(p.x_multiplier), part]
