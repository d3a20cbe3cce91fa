"""The CUDA backend's Python side: kernels are compiled by NVRTC when they are first asked for.

csrc/cuda.cpp chooses the stages of a kernel, asks for it here, and launches it. What is compiled is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"

Compile = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int)
)


class Driver(ctypes.Structure):
    """`Driver` of csrc/cuda.cpp."""

    _fields_ = (
        ("launch", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("compile", Compile),
        ("for_cpu", ctypes.c_bool),
    )


_kept: list[Driver] = []


def set_driver(driver: Driver) -> None:
    """Launch kernels by this one from now on."""
    _kept.append(driver)  # C++ holds pointers to its functions
    library = next(Path(__file__).parent.glob("_C.*so"))
    ctypes.CDLL(str(library)).fused_ops_set_cuda_driver(ctypes.byref(driver))


def source(stages: str, stages_of_b: str | None = None) -> str:
    """A kernel for one choice of stages, or for two, of which the first has so many of the blocks."""
    head = 'extern "C" __global__ void __launch_bounds__(A.block) kernel(const __grid_constant__ Row a'
    lines = ['#include "pipeline.cuh"', "using namespace fused_ops;", f"constexpr Stages A = {stages};"]
    if stages_of_b is None:
        lines += [f"{head}) {{", "  run<A>(a, blockIdx.x);", "}"]
    else:
        lines += [f"constexpr Stages B = {stages_of_b};"]
        lines += [f"{head}, const __grid_constant__ Row b, const __grid_constant__ long long blocks_of_a) {{"]
        lines += ["  if (blockIdx.x < blocks_of_a) {", "    run<A>(a, blockIdx.x);", "  } else {"]
        lines += ["    run<B>(b, blockIdx.x - blocks_of_a);", "  }", "}"]
    return "\n".join(lines) + "\n"


# numerics: no contraction, IEEE division and square root, subnormals
OPTIONS = {"std": "c++20", "fma": False, "prec_div": True, "prec_sqrt": True, "ftz": False}


def cubin(text: str, arch: str) -> bytes:
    """What NVRTC makes of `text` for an architecture such as "sm_90a"; from the disk where it was made before.

    Raises ImportError, with what to install, where there is no NVRTC.
    """
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise ImportError("fused_ops compiles its CUDA kernels by NVRTC: pip install cuda-core[cu13]") from error
    version = nvrtc.nvrtcVersion()[1:]
    name = hashlib.sha256(repr((text, arch, OPTIONS, version)).encode() + headers()).hexdigest()[:32]
    path = cache_folder() / f"{arch}-{name}.cubin"
    if not path.exists():
        options = ProgramOptions(arch=arch, include_path=[str(CSRC / "cuda")], **OPTIONS)
        code = Program(text, "c++", options).compile("cubin").code
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as made:  # other processes see all or nothing
            made.write(code)
        os.replace(made.name, path)
    return path.read_bytes()


def cache_folder() -> Path:
    """Where compiled kernels are kept: FUSED_OPS_CACHE, or the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FUSED_OPS_CACHE") or user / "fused_ops")


@cache
def headers() -> bytes:
    """All that a kernel may include."""
    return b"".join(path.read_bytes() for path in sorted([*CSRC.glob("*.[hi]*"), *(CSRC / "cuda").iterdir()]))
