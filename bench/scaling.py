"""What collectives cost on 2 to 64 ranks: `python -m bench.scaling` prints the tables of docs/scaling.md.

A collective is a program for each rank: work on a core, bytes over a link, flags that others wait for. `simulate` runs
the programs of all ranks against each other, on as many cores and links as a `Machine` has: ranks that share cores, or
wait for a slow neighbour, are seen, which a formula hides.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .table import table


@dataclass(frozen=True)
class Link:
    """latency: seconds from one rank's store to another's seeing it. bandwidth: bytes a second each way, a rank."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """Hosts of `ranks_per_host` ranks each.

    inside, between: links of ranks on one host, and on two. memory: bytes a second that a rank reads or writes.
    launch: seconds to begin an operation. cores: that the ranks of a host share; 0: every rank has its own device.
    switch: seconds until a core works for another rank.
    """

    name: str
    inside: Link
    between: Link | None
    memory: float
    launch: float
    ranks_per_host: int = 8
    cores: int = 0
    switch: float = 0.0

    def link(self, a: int, b: int) -> Link:
        same = a // self.ranks_per_host == b // self.ranks_per_host
        return self.inside if same or self.between is None else self.between


class Work(NamedTuple):
    """So long on a core."""

    seconds: float


class Send(NamedTuple):
    """Bytes to another rank, one message after the other; it sees `tag` once they are there."""

    to: int
    bytes: float
    tag: object


class Wait(NamedTuple):
    """Until `count` messages of `tag` have come."""

    tag: object
    count: int


Program = list[Work | Send | Wait]
WORKED, WOKEN = object(), object()  # events of a rank of its own


def simulate(programs: list[Program], machine: Machine) -> list[float]:
    """Seconds after which each rank has ended."""
    ranks = range(len(programs))
    host = [rank // machine.ranks_per_host for rank in ranks]
    free = [machine.cores or math.inf] * (max(host) + 1)  # cores of each host
    queue: list[deque[int]] = [deque() for _ in free]  # ranks that could work
    place, arrived = [0] * len(programs), [defaultdict(int) for _ in ranks]
    waits: dict[int, Wait] = {}
    sent = [0.0] * len(programs)  # when a rank's link is free again
    ended = [0.0] * len(programs)
    shared = [bool(machine.cores) and host.count(host[rank]) > machine.cores for rank in ranks]
    order, events = 0, []

    def at(time: float, rank: int, what: object) -> None:
        nonlocal order
        order += 1  # of events of one time, the earlier made
        heapq.heappush(events, (time, order, rank, what))

    def ready(time: float, rank: int) -> None:
        queue[host[rank]].append(rank)
        start(time, host[rank])

    def start(time: float, h: int) -> None:
        while free[h] > 0 and queue[h]:
            free[h] -= 1
            run(time, queue[h].popleft())

    def run(time: float, rank: int) -> None:
        """On a core, until it works, waits or ends."""
        program = programs[rank]
        while place[rank] < len(program):
            step = program[place[rank]]
            place[rank] += 1
            if isinstance(step, Work):
                return at(time + step.seconds, rank, WORKED)
            if isinstance(step, Send):
                link = machine.link(rank, step.to)
                sent[rank] = max(time, sent[rank]) + step.bytes / link.bandwidth
                at(sent[rank] + link.latency, step.to, step.tag)
            elif arrived[rank][step.tag] < step.count:
                waits[rank] = step
                break
        else:
            ended[rank] = time
        free[host[rank]] += 1
        start(time, host[rank])

    for rank in ranks:
        ready(0.0, rank)
    while events:
        time, _, rank, what = heapq.heappop(events)
        if what is WORKED:
            run(time, rank)
            continue
        if what is not WOKEN:
            arrived[rank][what] += 1
            wait = waits.get(rank)
            if wait is None or arrived[rank][wait.tag] < wait.count:
                continue
            del waits[rank]
            if shared[rank]:
                at(time + machine.switch, rank, WOKEN)
                continue
        ready(time, rank)
    return ended


@dataclass(frozen=True)
class Layer:
    """What a row-parallel layer's result goes through: an all-reduce, the addition, the norm, the quantization.

    tokens, cols: of the partial sums, of `item` bytes each. code: bytes an element of the quantized rows takes.
    """

    tokens: int
    cols: int
    item: int = 2
    code: float = 1.0

    @property
    def bytes(self) -> int:
        return self.tokens * self.cols * self.item

    def share(self, ranks: int) -> float:
        """Bytes of a rank's part of the rows."""
        return math.ceil(self.tokens / ranks) * self.cols * self.item

    @property
    def coded(self) -> float:
        """How many times as many bytes codes take."""
        return self.code / self.item

    def norm(self, machine: Machine, reads_sum: bool, bytes_: float | None = None) -> float:
        """Seconds of addition, norm and quantization in one: residual in and out, codes, and the sum if it's there."""
        passes = 2 + self.coded + reads_sum
        return passes * (self.bytes if bytes_ is None else bytes_) / machine.memory


def one_shot(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """Every rank reads all partial sums and does all rows: one launch, one hop."""
    stage = machine.launch + 2 * layer.bytes / machine.memory
    return [
        [
            Work(stage),
            *_to_others(rank, range(ranks), layer.bytes, "in"),
            Wait("in", ranks - 1),
            Work(layer.bytes / machine.memory + layer.norm(machine, reads_sum=False)),
        ]
        for rank in range(ranks)
    ]


def two_shot(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """Each rank sums its share of the rows, all read the sums: one launch, two hops."""
    share = layer.share(ranks)
    return [
        [
            Work(machine.launch + 2 * layer.bytes / machine.memory),
            *_to_others(rank, range(ranks), share, "in"),
            Wait("in", ranks - 1),
            Work(2 * share / machine.memory),
            *_to_others(rank, range(ranks), share, "sums"),
            Wait("sums", ranks - 1),
            Work(layer.norm(machine, reads_sum=True)),
        ]
        for rank in range(ranks)
    ]


def scattered(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """Sequence parallelism: rows are summed, normed and quantized by one rank each, and gathered as codes."""
    share = layer.share(ranks)
    return [
        [
            Work(machine.launch + 2 * layer.bytes / machine.memory),
            *_to_others(rank, range(ranks), share, "in"),
            Wait("in", ranks - 1),
            Work(share / machine.memory + layer.norm(machine, reads_sum=False, bytes_=share)),
            Work(machine.launch),
            *_to_others(rank, range(ranks), share * layer.coded, "codes"),
            Wait("codes", ranks - 1),
            Work(2 * layer.bytes * layer.coded / machine.memory),
        ]
        for rank in range(ranks)
    ]


def ring(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """The collective library's ring, then addition, norm and quantization in one: two launches, 2 (W - 1) hops."""
    part = layer.bytes / ranks
    programs: list[Program] = []
    for rank in range(ranks):
        steps: Program = [Work(machine.launch)]
        for step in range(2 * (ranks - 1)):
            steps += [Send((rank + 1) % ranks, part, step), Wait(step, 1), Work(2 * part / machine.memory)]
        programs.append([*steps, Work(machine.launch + layer.norm(machine, reads_sum=True))])
    return programs


def unfused(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """The library's ring, then addition, norm and quantization, a kernel each: four launches."""
    passes = (3, 2, 1 + layer.coded)
    kernels = [Work(machine.launch + n * layer.bytes / machine.memory) for n in passes]
    return [[*program[:-1], *kernels] for program in ring(layer, ranks, machine)]


def by_hosts(layer: Layer, ranks: int, machine: Machine) -> list[Program]:
    """Summed within hosts, rings between them of a share each, gathered within hosts; then norm and quantization."""
    inside = min(machine.ranks_per_host, ranks)
    hosts = ranks // inside
    share = layer.bytes / inside
    programs: list[Program] = []
    for rank in range(ranks):
        first = rank // inside * inside
        near = range(first, first + inside)
        steps: Program = [Work(machine.launch), *_to_others(rank, near, share, "in"), Wait("in", inside - 1)]
        steps += [Work(2 * share / machine.memory)]
        for step in range(2 * (hosts - 1)):
            steps += [Send((rank + inside) % ranks, share / hosts, step), Wait(step, 1)]
        steps += [*_to_others(rank, near, share, "sums"), Wait("sums", inside - 1)]
        programs.append([*steps, Work(machine.launch + layer.norm(machine, reads_sum=True))])
    return programs


def _to_others(rank: int, ranks: Iterable[int], bytes_: float, tag: object) -> list[Send]:
    """To the next rank first, so that no link has all at once."""
    every = list(ranks)
    place = every.index(rank)
    return [Send(to, bytes_, tag) for to in every[place + 1 :] + every[:place]]


ALGORITHMS: dict[str, Callable[[Layer, int, Machine], list[Program]]] = {
    "one shot": one_shot,
    "two shot": two_shot,
    "scattered": scattered,
    "ring, one after the other": unfused,
    "ring, fused norm": ring,
    "by hosts, fused norm": by_hosts,
}


def seconds(algorithm: str, layer: Layer, ranks: int, machine: Machine) -> float:
    """Until the last rank has ended."""
    return max(simulate(ALGORITHMS[algorithm](layer, ranks, machine), machine))


# From the makers' sheets and what others report of their links: nobody has measured this library on them.
NVLINK = Machine("NVLink, 8 to a host", Link(1e-6, 450e9), Link(5e-6, 50e9), memory=4.0e12, launch=2.5e-6)
HIDDEN = 8192


def tables() -> str:
    """What docs/scaling.md says of GPUs."""
    parts = []
    for ranks in 2, 4, 8, 16, 64:
        names = [name for name in ALGORITHMS if _fits(name, ranks)]
        rows = []
        for tokens in 1, 16, 64, 256, 1024, 4096:
            layer = Layer(tokens, HIDDEN)
            rows.append((tokens, layer.bytes / 2**20, *(1e6 * seconds(n, layer, ranks, NVLINK) for n in names)))
        parts.append(f"{ranks} ranks, microseconds\n{table(('tokens', 'MiB', *names), rows, left=0)}")
    return "\n\n".join(parts)


def _fits(name: str, ranks: int) -> bool:
    """Whether so many ranks would run it: shots are within a host."""
    several = ranks > NVLINK.ranks_per_host
    return not name.endswith("shot") if several else not name.startswith("by hosts")


if __name__ == "__main__":
    print(tables())
