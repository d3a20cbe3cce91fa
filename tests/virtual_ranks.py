"""Ranks of one process: workspaces on the CPU that CUDA's kernels on the host, or Triton's interpreter, exchange by."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fused_ops import _symmetric

NAME = "a group of virtual ranks"


def memories(
    world: int, max_tokens: int, cols: int, dtype: torch.dtype, *, timeout=1.0, above=_symmetric.NEVER
) -> list[_symmetric.Memory]:
    size = _symmetric.bytes_for(max_tokens, cols, dtype)
    buffers = [torch.full((size,), 0xFF, dtype=torch.uint8).share_memory_() for _ in range(world)]
    for buffer in buffers:
        buffer[: _symmetric.MAILBOX] = 0
    failures = torch.zeros(world, ctypes.sizeof(_symmetric.Failure), dtype=torch.uint8).share_memory_()
    addresses = [b.data_ptr() for b in buffers]
    return [_symmetric.Memory(b, addresses, r, timeout, above, failures[r]) for r, b in enumerate(buffers)]
