"""Collectives on the cores of one machine, simulated, and held against what `bench.collective` measured.

Programs are of what the C++ backend does, its peers and the benchmark itself: which lets ranks go by a barrier of
gloo's, one after the other, and counts a rank's time from there on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fused_ops.workspace import TWO_SHOT_ABOVE

from .simulate import Clock, Link, Machine, Program, Send, Wait, Work, exchange, simulate
from .table import table

RECORD = Path(__file__).parent / "results" / "cpu-collective-2026-11-22.json"
INT8, FP8 = "INT8_DYNAMIC_TOKEN", "FP8_DYNAMIC_TOKEN"
BLOCK = 4e-3  # seconds for which bench.collective repeats a call that is shorter


class Chain(NamedTuple):
    """Addition, norm and quantization of rows: seconds to begin, and an element."""

    begin: float
    element: float

    def work(self, elements: int) -> Work:
        return Work(self.begin + self.element * elements)


@dataclass(frozen=True)
class Host:
    """What ranks on the cores of one machine cost.

    meeting: seconds that a collective takes beside its norm, at no rows. message: that a core has to do with one of
    gloo's, whose threads wake each other; byte: and with each byte of it. fused, compiled: this library's norm, and
    torch.compile's, by key.
    """

    machine: Machine
    meeting: float
    message: float
    byte: float
    fused: dict[str | None, Chain]
    compiled: dict[str | None, Chain]


# Fitted to the record: memory, meeting and norms where each rank has a core (one and two ranks); gloo's to its sums
# with any number of ranks, at one token and at 512; switch to the fused operation at one token of three and four ranks.
# The rest of the record is what this foretells.
HOST = Host(
    Machine("two cores", Link(2e-7, math.inf), None, memory=17e9, launch=13e-6, cores=2, switch=100e-6),
    meeting=15e-6,
    message=550e-6,
    byte=0.9e-9,
    fused={None: Chain(13e-6, 0.62e-9), INT8: Chain(32e-6, 0.75e-9), FP8: Chain(30e-6, 0.95e-9)},
    compiled={None: Chain(150e-6, 1.6e-9), INT8: Chain(180e-6, 2.5e-9), FP8: Chain(180e-6, 5.1e-9)},
)


class Rows(NamedTuple):
    """Of a rank: so many bytes, to be quantized by this key."""

    tokens: int
    cols: int
    bytes: int
    key: str | None

    @property
    def elements(self) -> int:
        return self.tokens * self.cols


def fused(rows: Rows, rank: int, ranks: int, host: Host, call: int) -> Program:
    """Rows are copied into the rank's slot; behind one wait the norm's rows come from all slots.

    Above `TWO_SHOT_ABOVE` each rank sums its share of the rows, and behind another wait all read the sums.
    """
    memory, norm = host.machine.memory, host.fused[rows.key].work(rows.elements)
    stage = [Work(host.meeting + 2 * rows.bytes / memory), *exchange(rank, range(ranks), 0, (call, "rows"))]
    if rows.bytes <= TWO_SHOT_ABOVE:
        return [*stage, Work(ranks * rows.bytes / memory), norm]
    share = math.ceil(rows.tokens / ranks) / rows.tokens * rows.bytes
    sums = [Work((ranks + 1) * share / memory), *exchange(rank, range(ranks), 0, (call, "sums"))]
    return [*stage, *sums, Work(rows.bytes / memory), norm]


def summed_by_gloo(rows: Rows, rank: int, ranks: int, host: Host, call: int) -> Program:
    """A copy, since the sum is in place, and a ring of messages."""
    part, steps = rows.bytes / ranks, [Work(2 * rows.bytes / host.machine.memory)]
    for step in range(2 * (ranks - 1)):
        message = Work(host.message + host.byte * part)
        steps += [Send((rank + 1) % ranks, part, (call, step)), Wait((call, step), 1), message]
    return steps


def gloo_then_fused(rows: Rows, rank: int, ranks: int, host: Host, call: int) -> Program:
    return [*summed_by_gloo(rows, rank, ranks, host, call), host.fused[rows.key].work(rows.elements)]


def gloo_then_compiled(rows: Rows, rank: int, ranks: int, host: Host, call: int) -> Program:
    return [*summed_by_gloo(rows, rank, ranks, host, call), host.compiled[rows.key].work(rows.elements)]


def barrier(rank: int, ranks: int, host: Host) -> Program:
    """Gloo's: in each round a rank hears of twice as many."""
    steps: Program = []
    for step in range((ranks - 1).bit_length()):
        tag = "barrier", step
        steps += [Send((rank + 2**step) % ranks, 0, tag), Wait(tag, 1), Work(host.message)]
    return steps


# By their names in the record.
CONTESTANTS: dict[str, Callable[[Rows, int, int, Host, int], Program]] = {
    "fused_ops": fused,
    "gloo, fused norm": gloo_then_fused,
    "gloo, torch.compile": gloo_then_compiled,
}


def seconds(name: str, rows: Rows, ranks: int, host: Host = HOST) -> float:
    """A call as `bench.collective` times it: of the slowest rank, behind a barrier, over a block of calls."""

    def block(calls: int) -> float:
        programs = []
        for rank in range(ranks):
            each = (CONTESTANTS[name](rows, rank, ranks, host, call) for call in range(calls))
            programs.append([*barrier(rank, ranks, host), Clock(), *(step for program in each for step in program)])
        return max(simulate(programs, host.machine)) / calls

    return block(max(1, int(BLOCK / block(1))))


class Held(NamedTuple):
    """A contestant's microseconds a call, measured and simulated."""

    ranks: int
    rows: Rows
    name: str
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.measured


def held_against(record: dict, host: Host = HOST) -> Iterator[Held]:
    """Each case of several ranks in what `bench.collective` wrote."""
    for case in record["collective"]:
        if case["ranks"] == 1:
            continue
        rows = Rows(case["tokens"], case["cols"], case["bytes"], case["key"])
        for name in CONTESTANTS:
            simulated = seconds(name, rows, case["ranks"], host) * 1e6
            yield Held(case["ranks"], rows, name, case["microseconds"][name], simulated)


def recorded() -> dict:
    return json.loads(RECORD.read_text())


def spread(held: list[Held]) -> float:
    """The factor by which the simulation is off, as a root mean square of its logarithm."""
    return math.exp(math.sqrt(sum(math.log(h.ratio) ** 2 for h in held) / len(held)))


def cells(held: list[Held]) -> list[list[float]]:
    """ranks, tokens; measured, simulated, ratio of the fused operation and of gloo with torch.compile: no key."""
    rows: dict[tuple, list[float]] = {}
    for h in held:
        if h.rows.key is None and h.name in SHOWN:
            rows.setdefault((h.ranks, h.rows.tokens), []).extend((h.measured, h.simulated, h.ratio))
    return [[*case, *numbers] for case, numbers in rows.items()]


SHOWN = ("fused_ops", "gloo, torch.compile")


def tables() -> str:
    """What docs/scaling.md says of CPUs, and how far off each key is."""
    held = list(held_against(recorded()))
    header = ("ranks", "tokens", *(f"{name}{what}" for name in SHOWN for what in ("", ", simulated", ", ratio")))
    far = []
    for name in CONTESTANTS:
        for ranks in sorted({h.ranks for h in held}):
            these = [h for h in held if (h.name, h.ranks) == (name, ranks)]
            far.append((name, ranks, min(h.ratio for h in these), max(h.ratio for h in these), spread(these)))
    return (
        f"two cores, microseconds ({RECORD.name})\n{table(header, cells(held), left=0)}\n\n"
        f"simulated over measured, with every key\n{table(('', 'ranks', 'least', 'most', 'off by'), far)}"
    )
