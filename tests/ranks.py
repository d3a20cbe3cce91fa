"""Ranks of a group: as threads of this process, each with a workspace of its own, or as processes."""

import multiprocessing
import socket
import threading
import time
import traceback
from datetime import timedelta

import torch
from torch.distributed import HashStore, ProcessGroup, TCPStore

import fused_ops
from fused_ops import AllReduceWorkspace
from fused_ops.collective_inputs import group_of
from quant import FP8_DYNAMIC_TOKEN

_names = iter(range(1 << 60))


def threads(world: int, function, *args, wait: float = 120, seconds: float = 60) -> list:
    """function(group, *args) on as many threads as ranks; their results, or the first exception.

    seconds: that gloo waits for a rank.
    """
    store, name = HashStore(), f"tests {next(_names)}"
    results: list = [None] * world

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)  # of this thread's operations
            results[rank] = function(group_of(store, rank, world, f"{name} {rank}", seconds), *args)
        except BaseException as error:
            results[rank] = error

    started = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in started:
        thread.start()
    end = time.monotonic() + wait
    for thread in started:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in started), "a rank hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def on_ranks(workspaces: list[AllReduceWorkspace], function, *, wait: float = 60) -> list:
    """function(workspace) of each rank at once, results or exceptions by rank."""
    results: list = [None] * len(workspaces)

    def run(rank: int) -> None:
        try:
            results[rank] = function(workspaces[rank])
        except Exception as error:
            results[rank] = error

    started = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(workspaces))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(wait)
        assert not thread.is_alive(), "a rank hangs"
    return results


def everywhere(made, function) -> list:
    """The results of all ranks; the first exception is raised."""
    results = on_ranks(made, function)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def workspaces(world: int, max_tokens: int, hidden: int, dtype=torch.float32, **options) -> list[AllReduceWorkspace]:
    """One workspace, as each of its ranks has it; ranks are threads."""

    def make(group: ProcessGroup) -> AllReduceWorkspace:
        return AllReduceWorkspace(group, max_tokens, hidden, dtype, **{"timeout": 30, **options})

    return threads(world, make)


def _process(rank: int, world: int, port: int, function, args: tuple, pipe) -> None:
    try:
        torch.set_num_threads(1)
        store = TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=60))
        group = group_of(store, rank, world, "processes", 60)
        pipe.send(("returned", function(group, store, lambda: pipe.send(("reached", None)), *args)))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))


class Processes:
    """function(group, store, reached, *args) on as many processes as ranks; calling `reached` lets `wait` return."""

    def __init__(self, world: int, function, *args):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")  # torch is imported once
        context.set_forkserver_preload(["ranks"])
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_process, args=(rank, world, port, function, args, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def _receive(self, rank: int, what: str, seconds: float):
        assert self.pipes[rank].poll(seconds), f"rank {rank} hangs"
        how, value = self.pipes[rank].recv()
        assert how == what, f"rank {rank}: {value}"
        return value

    def wait(self, seconds: float = 120) -> None:
        """Until every rank has called `reached`."""
        for rank in range(len(self.pipes)):
            self._receive(rank, "reached", seconds)

    def result(self, rank: int, seconds: float = 120):
        """What the rank's function returned; AssertionError with its traceback where it raised."""
        return self._receive(rank, "returned", seconds)

    def results(self) -> list:
        return [self.result(rank) for rank in range(len(self.pipes))]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


# Calls that tests share.

_SEEDED = torch.Generator().manual_seed(0)  # every process has the same
X, RESIDUAL, WEIGHT = (torch.randn(*size, generator=_SEEDED) for size in ((3, 64), (3, 64), (64,)))


def rows(seed: int, rank: int, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """The same on whichever rank it is made."""
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def usual(w, x=X, weight=WEIGHT, eps=1e-6, key=FP8_DYNAMIC_TOKEN, **options):
    return fused_ops.all_reduce_fused_add_rms_norm_quant(
        x, RESIDUAL[: len(x)].to(x.dtype), weight, eps, key, w, **options
    )


def two_of_them(x, w):
    """Two collectives, of which the second doesn't need the first's result."""
    a = fused_ops.all_reduce(x, w)
    q, residual = fused_ops.all_reduce_fused_add_rms_norm_quant(x * 2, x, WEIGHT, 1e-6, FP8_DYNAMIC_TOKEN, w)
    own = fused_ops.reduce_scatter(x + 1, w)
    return q.data, q.scale, residual, own, a
