"""What a call, and the launch in it, cost the host: ours, from C++ under an operation, and cuda.core's, from Python.

    python -m bench.launch

A call of `rms_norm.out` is timed as it is and without its launch, and cuda.core's launch of a kernel by itself, with
three pointers and a number of rows: the least that a kernel of rows can take. No tensor is looked at there, nothing is
checked. Every block ends before the device's queue is full, on a stream that isn't the default one.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

import fused_ops
from fused_ops import OPS, _cuda
from quant import FP8_DYNAMIC_TOKEN

from .table import table
from .timing import interleaved

QUEUE = 200  # launches
KERNEL = 'extern "C" __global__ void kernel(const void* x, const void* weight, void* y, long long rows) {}\n'


def measure(device: str, budget: float = 1.0) -> Iterator[dict]:
    """Microseconds a call, of one row of 4096 bfloat16; without a GPU what there is on the CPU, as a rehearsal."""
    x, r, y = torch.randn(3, 1, 4096, device=device).bfloat16()
    w, on_gpu = r.flatten(), device == "cuda"
    norm = partial(OPS["rms_norm"].out, x, w, 1e-5, 0, y_out=y)
    functions: dict[str, Callable[[], object]] = {
        "torch.add": partial(torch.add, x, r, out=y),
        "rms_norm": lambda: fused_ops.rms_norm(x, w, 1e-5),
        "fused_add_rms_norm_quant": lambda: fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-5, FP8_DYNAMIC_TOKEN),
        "rms_norm.out": norm,
    }
    without = partial(norm)
    aside = torch.cuda.Stream() if on_gpu else None
    if aside is not None:
        arch = _cuda.architecture(*torch.cuda.get_device_capability())
        functions["rms_norm.out without its launch"] = without
        functions["cuda.core's launch"] = by_cuda_core(_cuda.cubin(KERNEL, arch), aside.cuda_stream)

    def clock(call: Callable[[], object], calls: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        with without_launches() if call is without else nullcontext():
            start = time.perf_counter()
            for _ in range(min(calls, QUEUE)):
                call()
            return (time.perf_counter() - start) / min(calls, QUEUE)

    with torch.cuda.stream(aside):
        timing = interleaved(functions, budget=budget, clock=clock)
    for name in functions:
        yield {"call": name, "microseconds": timing.seconds(name) * 1e6}


def by_cuda_core(cubin: bytes, stream: int) -> Callable[[], None]:
    """A launch of `kernel` with these arguments on the stream of this handle."""
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

    Device().set_current()
    kernel = ObjectCode.from_cubin(cubin).get_kernel("kernel")
    config = LaunchConfig(grid=1, block=256)
    return partial(launch, Stream.from_handle(stream), config, kernel, 0, 0, 0, 1)


@contextmanager
def without_launches() -> Iterator[None]:
    """Kernels are chosen, and not launched."""
    nothing = _cuda.Launch(("abs", ctypes.CDLL(None)))  # of device 0, whatever follows it: null, all went well
    _cuda.set_driver(_cuda.Driver(nothing, _cuda.Compile(_cuda.compile)))
    try:
        yield
    finally:
        _cuda.set_driver(_cuda.driver())


def calls_table(results: list[dict]) -> str:
    return table(("call", "us on the host"), [(r["call"], r["microseconds"]) for r in results])


if __name__ == "__main__":
    print(calls_table(list(measure("cuda"))))
