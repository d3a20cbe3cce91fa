"""The CUDA backend: kernels compiled by NVRTC when they are first called, launched by csrc/cuda.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"

Compile = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int))


class Driver(ctypes.Structure):
    """`Driver` of csrc/cuda.cpp."""

    _fields_ = (
        ("launch", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("compile", Compile),
        ("for_cpu", ctypes.c_bool),
    )


def set_driver(driver: Driver) -> None:
    global _kept
    _kept = driver  # C++ holds pointers to its functions
    library = next((Path(__file__).parent).glob("_C.*so"))
    ctypes.CDLL(str(library)).fused_ops_set_cuda_driver(ctypes.byref(driver))


def source(stages: str, stages_of_b: str | None = None) -> str:
    """A kernel for one choice of stages, or for two, of which the first has so many of the blocks."""
    lines = ['#include "pipeline.cuh"', "using namespace fused_ops;", f"constexpr Stages A = {stages};"]
    head = 'extern "C" __global__ void __launch_bounds__(A.block) kernel(const __grid_constant__ Row a'
    if stages_of_b is None:
        lines += [f"{head}) {{", "  run<A>(a, blockIdx.x);", "}"]
    else:
        lines += [f"constexpr Stages B = {stages_of_b};"]
        lines += [f"{head}, const __grid_constant__ Row b, const __grid_constant__ long long blocks_of_a) {{"]
        lines += ["  if (blockIdx.x < blocks_of_a) {", "    run<A>(a, blockIdx.x);", "  } else {"]
        lines += ["    run<B>(b, blockIdx.x - blocks_of_a);", "  }", "}"]
    return "\n".join(lines) + "\n"
