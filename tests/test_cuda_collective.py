"""Collectives of the CUDA backend: its kernels on the host, a device for each rank of this process."""

import host_cuda
import pytest
import torch
import virtual_ranks
from compare import assert_same
from test_ops import ALL, results
from virtual_ranks import RankCall, workspaces

from fused_ops import OPS, _symmetric
from fused_ops.collective import summed

SUMS = [p for p in ALL if p.id.startswith(virtual_ranks.SUMS)]
BOTH = pytest.mark.parametrize("above", [_symmetric.NEVER, 0], ids=["one-shot", "two-shot"])


def together(ranks, seed: int = 0) -> None:
    """Every rank's calls in order, those of different ranks in any."""
    with host_cuda.on_host():
        for rank, calls in enumerate(ranks):
            with host_cuda.queued(rank):
                for call in calls:
                    call.run()
        host_cuda.run_queues(seed)


def by_one(op, args):
    with host_cuda.on_host():
        return results(op, args)


@pytest.mark.parametrize("op", SUMS)
def test_fused_is_unfused(op):
    from test_ops import cases

    every = cases(op)
    for i, args in enumerate(every[:: max(1, len(every) // 5)]):
        world = (2, 3, 4, 8)[i % 4]
        above = _symmetric.NEVER if i % 3 else 0
        virtual_ranks.is_unfused(by_one, together, op, args, world, above=above)
