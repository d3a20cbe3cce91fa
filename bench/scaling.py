"""What collectives cost on 2 to 64 ranks: `python -m bench.scaling` prints the tables of docs/scaling.md.

Here are the programs of ranks that have a GPU each; bench/scaling_cpu.py has those of ranks that share cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import scaling_cpu
from .simulate import Link, Machine, Program, Send, Wait, Work, exchange, simulate
from .table import table


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
            *exchange(rank, range(ranks), layer.bytes, "in"),
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
            *exchange(rank, range(ranks), share, "in"),
            Work(2 * share / machine.memory),
            *exchange(rank, range(ranks), share, "sums"),
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
            *exchange(rank, range(ranks), share, "in"),
            Work(share / machine.memory + layer.norm(machine, reads_sum=False, bytes_=share)),
            Work(machine.launch),
            *exchange(rank, range(ranks), share * layer.coded, "codes"),
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
        steps: Program = [Work(machine.launch), *exchange(rank, near, share, "in")]
        steps += [Work(2 * share / machine.memory)]
        for step in range(2 * (hosts - 1)):
            steps += [Send((rank + inside) % ranks, share / hosts, step), Wait(step, 1)]
        steps += [*exchange(rank, near, share, "sums")]
        programs.append([*steps, Work(machine.launch + layer.norm(machine, reads_sum=True))])
    return programs


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
    print(f"{tables()}\n\n{scaling_cpu.tables()}")
