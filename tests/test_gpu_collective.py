"""Collectives of several processes on one GPU, where their kernels take turns: `make gpu`.

Torch allows it where TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES is set.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import fused_ops
from fused_ops import AllReduceWorkspace
from quant import FP8_DYNAMIC_TOKEN

pytestmark = pytest.mark.gpu
WORLD, COLS = 2, 4096


def inputs(rank: int, tokens: int) -> torch.Tensor:
    torch.manual_seed(1000 * tokens + rank)
    return torch.randn(tokens, COLS).bfloat16().cuda()


def summed(tokens: int) -> torch.Tensor:
    total = inputs(0, tokens).float()
    for rank in range(1, WORLD):
        total = total + inputs(rank, tokens).float()
    return total.bfloat16()


def check_calls(group, rank: int, above: int) -> None:
    weight = torch.randn(COLS, generator=torch.Generator().manual_seed(0)).cuda()
    with AllReduceWorkspace(group, 16, COLS, torch.bfloat16, timeout=30, two_shot_above=above) as workspace:
        for tokens in (1, 16, 0, 7, 40):
            x, residual = inputs(rank, tokens), inputs(99, tokens)
            q, r = fused_ops.all_reduce_fused_add_rms_norm_quant(
                x, residual, weight, 1e-6, FP8_DYNAMIC_TOKEN, workspace
            )
            expected, added = fused_ops.fused_add_rms_norm_quant(
                summed(tokens), residual, weight, 1e-6, FP8_DYNAMIC_TOKEN
            )
            assert torch.equal(r, added)
            assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(q.scale, expected.scale)
        graph, x = torch.cuda.CUDAGraph(), inputs(rank, 4)
        with torch.cuda.graph(graph):
            y = fused_ops.all_reduce(x, workspace)
        for tokens in 5, 6:
            x.copy_(inputs(rank, tokens)[:4])
            graph.replay()
            assert torch.equal(y, summed(tokens)[:4])


def check_absence(group, rank: int) -> None:
    workspace = AllReduceWorkspace(group, 16, COLS, torch.bfloat16, timeout=1)
    x = inputs(rank, 2)
    if rank == 0:
        assert fused_ops.all_reduce(x, workspace).isnan().all()  # which waits for the kernel
        with pytest.raises(TimeoutError, match="rank 1 did not come"):
            fused_ops.all_reduce(x, workspace)
    dist.barrier()


def work(rank: int, port: int, backend: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.cuda.set_device(0)
    try:
        with fused_ops.use_backend(backend):
            for above in 1 << 39, 0:
                check_calls(dist.group.WORLD, rank, above)
            check_absence(dist.group.WORLD, rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_processes_on_one_gpu(backend, monkeypatch):
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, backend), nprocs=WORLD)
