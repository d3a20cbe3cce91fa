"""Timing on a machine whose clock drifts: what is compared is measured in turns, in one run."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timing:
    """Seconds a call of every contestant took, one entry a round."""

    rounds: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        return median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long as `fast` a call of `slow` takes: the median over rounds, whose two are neighbours."""
        return median(s / f for s, f in zip(self.rounds[slow], self.rounds[fast], strict=True))


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    budget: float = 0.4,
    block: float = 1e-3,
    least: int = 5,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> Timing:
    """Time the contestants in turns: each round runs each of them for a short block, after one call that isn't timed.

    budget: seconds for all together; at least `least` rounds are run, whatever they take, and at most 51.
    block: seconds that a block takes, unless a single call takes longer.
    clock: seconds a call, over so many of them; None: by this process's own clock.
    """
    clock = clock or _clock
    calls = {}
    start = time.perf_counter()
    for name, call in contestants.items():
        call()
        calls[name] = max(1, int(block / clock(call, 1)))
    total = sum(clock(call, calls[name]) * (1 + 1 / calls[name]) * calls[name] for name, call in contestants.items())
    spent = time.perf_counter() - start
    count = min(51, max(least, int((budget - spent) / total)))
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, call in contestants.items():
            call()
            rounds[name].append(clock(call, calls[name]))
    return Timing(rounds)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the life of the process, instead of returning it to the system.

    Large results are else made of new pages on every call (8,193 page faults for 4096 x 4096 bfloat16, three times the
    time of filling them), which would slow down every peer that can't write into given tensors. glibc only.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _clock(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
