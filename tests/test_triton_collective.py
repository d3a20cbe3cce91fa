"""Collectives of the Triton backend: in its interpreter, a process for each rank, on memory that they share."""

import os
import signal
import time
import traceback

import pytest
import torch
import virtual_ranks
from test_ops import ALL, cases, results
from virtual_ranks import RankCall, workspaces

import fused_ops
from fused_ops import OPS, _symmetric

pytest.importorskip("triton", reason="Triton is not installed")

SUMS = [p for p in ALL if p.id.startswith(virtual_ranks.SUMS)]
SECONDS = 60


def together(ranks: list[list[RankCall]]) -> None:
    """A process makes the calls of each rank."""
    processes = []
    for calls in ranks:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                with fused_ops.use_backend("triton"):
                    for call in calls:
                        call.run()
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        processes.append(pid)
    end = time.monotonic() + SECONDS
    failed = []
    for pid in processes:
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                done = os.waitpid(pid, 0)
                break
            time.sleep(0.005)
        failed += [pid] if done[1] else []
    assert not failed


def by_one(op, args):
    with fused_ops.use_backend("triton"):
        return results(op, args)


def test_the_next_call_of_a_rank_that_refused_one_is_another():
    with workspaces(2, 4, 64, torch.float32) as memories:
        memories[1].refused.value += 1
        together([[RankCall(OPS["all_reduce"], (torch.ones(3, 64), None, 0, ""), memory)] for memory in memories])
        for memory, said in zip(memories, ("rank 1 has", "this rank has"), strict=True):
            with pytest.raises(ValueError, match=f"{said} refused a call"):
                memory.check()


@pytest.mark.parametrize("op", SUMS)
def test_fused_is_unfused(op):
    every = cases(op)
    for i, args in enumerate(every[:: max(1, len(every) // 2)]):
        above = _symmetric.NEVER if i % 2 else 0
        virtual_ranks.is_unfused(by_one, together, op, args, (2, 3)[i % 2], above=above)
