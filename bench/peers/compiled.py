"""`torch.compile` of the eager code, as it is: with fresh results.

Given tensors to write into, Inductor (2.13) makes three loops over memory of the one that it makes otherwise, and the
code takes 2.7 times as long (512 x 4096, add + norm + INT8), so that wouldn't be the peer to beat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._inductor.exc import InductorError

from .eager import FUNCTIONS


def compile_peer(op: str, args: tuple, backend: str) -> Callable[..., tuple]:
    """The compiled peer of `op`, a function of the tensors among `args`; the rest is constant.

    It is made for any number of rows except that one row has code of its own, as `torch.compile` does by default.
    """
    torch._dynamo.reset()  # calls are looked up among everything compiled from the same code, which costs
    constants = [None if isinstance(arg, Tensor) else (arg,) for arg in args]

    def run(*tensors):
        rest = iter(tensors)
        return FUNCTIONS[op](*(next(rest) if constant is None else constant[0] for constant in constants))

    return torch.compile(run, backend=backend, dynamic=False, fullgraph=True)


def bind(compiled: Callable, args: tuple) -> Callable[[], tuple] | None:
    """The compiled peer on one set of tensors, ready to be timed; None where Inductor can't compile it."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    rows = args[0].shape[0]
    for tensor in tensors:
        weight = tensor.ndim == 1 and tensor.is_floating_point()
        if rows > 1 and tensor.shape[0] == rows and not weight:
            torch._dynamo.mark_dynamic(tensor, 0)
    try:
        compiled(*tensors)
    except InductorError as error:  # 2.13 has no e8m0 on the CPU
        print(f"torch.compile: {str(error).splitlines()[0]}")
        return None
    return partial(compiled, *tensors)
