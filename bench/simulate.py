"""Ranks that work, send and wait, simulated against each other.

A collective is a program for each rank: work on a core, bytes over a link, flags that others wait for. `simulate` runs
the programs of all ranks, on as many cores and links as a `Machine` has: ranks that share cores, or wait for a slow
neighbour, are seen, which a formula hides.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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
    switch: seconds that a core takes to turn to another rank, where ranks outnumber cores.
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


class Clock(NamedTuple):
    """The rank's time is counted from here; else from the beginning."""


Program = list[Work | Send | Wait | Clock]
_WORKED = object()  # an event of a rank of its own


def exchange(rank: int, ranks: Iterable[int], bytes_: float, tag: object) -> Program:
    """So many bytes to each other rank, to the next one first, so that no link has all at once; then theirs."""
    every = list(ranks)
    place = every.index(rank)
    return [*(Send(to, bytes_, tag) for to in every[place + 1 :] + every[:place]), Wait(tag, len(every) - 1)]


def simulate(programs: list[Program], machine: Machine) -> list[float]:
    """Seconds that each rank takes."""
    ranks = range(len(programs))
    host = [rank // machine.ranks_per_host for rank in ranks]
    free = [machine.cores or math.inf] * (max(host) + 1)  # cores of each host
    queue: list[deque[int]] = [deque() for _ in free]  # ranks that could work
    place, arrived = [0] * len(programs), [defaultdict(int) for _ in ranks]
    waits: dict[int, Wait] = {}
    sent = [0.0] * len(programs)  # when a rank's link is free again
    began, ended = [0.0] * len(programs), [0.0] * len(programs)
    off = [False] * len(programs)  # whether a rank has left its core
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
            rank = queue[h].popleft()
            if off[rank] and shared[rank]:
                at(time + machine.switch, rank, _WORKED)
            else:
                run(time, rank)

    def run(time: float, rank: int) -> None:
        """On a core, until it works, waits or ends."""
        program = programs[rank]
        while place[rank] < len(program):
            step = program[place[rank]]
            place[rank] += 1
            if isinstance(step, Work):
                return at(time + step.seconds, rank, _WORKED)
            if isinstance(step, Clock):
                began[rank] = time
            elif isinstance(step, Send):
                link = machine.link(rank, step.to)
                sent[rank] = max(time, sent[rank]) + step.bytes / link.bandwidth
                at(sent[rank] + link.latency, step.to, step.tag)
            elif arrived[rank][step.tag] < step.count:
                waits[rank] = step
                break
        else:
            ended[rank] = time
        off[rank] = True
        free[host[rank]] += 1
        start(time, host[rank])

    for rank in ranks:
        ready(0.0, rank)
    while events:
        time, _, rank, what = heapq.heappop(events)
        if what is _WORKED:
            run(time, rank)
            continue
        arrived[rank][what] += 1
        wait = waits.get(rank)
        if wait is not None and arrived[rank][wait.tag] >= wait.count:
            del waits[rank]
            ready(time, rank)
    return [end - begin for begin, end in zip(began, ended, strict=True)]
