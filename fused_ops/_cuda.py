"""The CUDA backend's Python side: kernels are compiled by NVRTC when they are first asked for.

csrc/cuda.cpp chooses the stages of a kernel, asks for it here, and launches it. What is compiled is kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ._cpu import LIMITS as KEYS
from ._cpu import library_path, serves
from ._op import OPS, Backend, Op
from .rope import WHOLE_VECTOR

HERE = Path(__file__).parent
CSRC = HERE / "csrc" if (HERE / "csrc").exists() else HERE.parent / "csrc"  # installed, or in a checkout

Compile = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_char_p),
)
Launch = ctypes.CFUNCTYPE(
    ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)
MOST_IN_ROW, MOST_IN_HEAD = 1 << 29, 8192  # columns that kernels count; bytes that a block shares
LIMITS = f"rows of up to {MOST_IN_ROW} columns, heads of up to 4096 of 16 bits and 2048 of 32, and {KEYS}"
NOT_NOW = 1  # in the place of a kernel: nothing is to be launched


class Driver(ctypes.Structure):
    """`Driver` of csrc/cuda_driver.h."""

    _fields_ = (("launch", Launch), ("compile", Compile), ("for_cpu", ctypes.c_bool))


class _Here(threading.local):
    error: BaseException | None = None  # why a kernel could not be made
    reason: ctypes.c_char_p | None = None  # the same in words, which C++ reads
    listed: set[tuple[str, str]] | None = None  # kernels that a warm-up will compile together


_here = _Here()
_kept: list[object] = []  # C++ holds pointers to these


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(library_path()))
    found.fused_ops_load_kernel.restype = ctypes.c_void_p
    return found


def set_driver(driver: Driver) -> None:
    """Launch kernels by this one from now on."""
    _kept.append(driver)
    library().fused_ops_set_cuda_driver(ctypes.byref(driver))


def driver() -> Driver:
    """The device's."""
    return Driver(Launch(("fused_ops_launch", library())), Compile(compile))


def load() -> None:
    """Make `cuda` the backend of CUDA tensors, where torch was built for CUDA."""
    if torch.version.cuda is not None and library_path() is not None:
        serve()


def serve() -> None:
    """Put the row kernels into PyTorch's dispatcher for CUDA; NVRTC and the driver are looked for on first use."""
    set_driver(driver())
    library().fused_ops_implement_rows(b"CUDA")
    for op in OPS.values():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op.name}", "CUDA"):
            op.backend(Backend("cuda", None, ("CUDA",), _supports(op), LIMITS, failure=_failure))


def _supports(op: Op) -> Callable[..., bool]:
    fits = _heads_fit if "cos_sin_cache" in op.arguments else _row_fits
    return lambda *args: fits(op, args) and all(map(serves, op.keys(args)))


def _row_fits(op: Op, args: tuple) -> bool:
    up = op.argument("up")
    interleaved = up is not None and args[up] is None
    return args[0].shape[-1] // (1 + interleaved) <= MOST_IN_ROW


def _heads_fit(op: Op, args: tuple) -> bool:
    size, whole = args[0].element_size(), args[op.arguments.index("flags")] & WHOLE_VECTOR
    tensors = [x for name, x in zip(op.arguments, args, strict=False) if name in _HEADS and x is not None]
    return all(x.shape[-1] * size <= MOST_IN_HEAD for x in tensors) and not (
        whole and any(x.shape[1] * x.shape[2] > MOST_IN_ROW for x in args[:2])
    )


_HEADS = ("q", "k", "v", "gate", "q_pe", "k_pe", "kv_c")


def _failure() -> BaseException | None:
    """Why the kernel that this thread asked for last could not be made, once."""
    error, _here.error = _here.error, None
    return error


def compile(stages: bytes, stages_of_b: bytes | None, device: int, kernel, reason) -> None:
    """`Driver::compile`. Nothing may be raised through C++: the caller finds it in `_failure`."""
    _here.error = None
    try:
        text, arch = source(stages, stages_of_b), architecture(*torch.cuda.get_device_capability(device))
        if _here.listed is not None:
            _here.listed.add((text, arch))
            kernel[0] = NOT_NOW
            return
        error = ctypes.c_char_p()
        kernel[0] = library().fused_ops_load_kernel(cubin(text, arch), device, ctypes.byref(error))
        if error.value:
            raise RuntimeError(f"fused_ops: a kernel for {arch} can't be loaded: {error.value.decode()}")
    except BaseException as error:  # Ctrl-C as well
        _here.error, _here.reason = error, ctypes.c_char_p(f"{type(error).__name__}: {error}".encode())
        reason[0] = _here.reason


def warmup(*calls: Callable[[], object]) -> int:
    """Compile the CUDA kernels that `calls` need, all at once, and load them; return how many there were.

    Kernels depend on the length of rows, dtypes, keys and options, never on the number of rows, so a call with one row
    prepares for any. Do this before a CUDA graph is captured, and where the first request must not wait.

    calls: each is run twice; in the first run fused operations on CUDA tensors leave their results unset.

        fused_ops.warmup(lambda: model(tokens[:1]), lambda: fused_ops.rms_norm(x[:1], weight, 1e-6))

    Raises TypeError where a call is no function, ImportError where there is no NVRTC.
    """
    for call in calls:
        if not callable(call):
            raise TypeError(f"warmup: calls contains {call!r}, expected functions without arguments")
    outer = _here.listed
    listed: set[tuple[str, str]] = set()
    _here.listed = listed
    try:
        for call in calls:
            call()
    finally:
        _here.listed = outer
    _nvrtc()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: cubin(*kernel), listed))
    for call in calls:
        call()
    return len(listed)


# FP4 codes by sm_100a's and sm_120a's own conversion, which no GPU has shown to be equal: tests/test_gpu.py would.
HARDWARE_FP4 = False

_KERNEL = """\
#include "pipeline.cuh"
using namespace fused_ops;
constexpr Stages A = %s;
extern "C" __global__ void __launch_bounds__(A.block) kernel(const __grid_constant__ Row a) {
  SHARED(Shared<A>, shared);
  run<A>(a, blockIdx.x, shared);
}
"""
_KERNEL_OF_TWO = """\
#include "pipeline.cuh"
using namespace fused_ops;
constexpr Stages A = %s;
constexpr Stages B = %s;
union Both {
  Shared<A> a;
  Shared<B> b;
};
extern "C" __global__ void __launch_bounds__(A.block)
    kernel(const __grid_constant__ Row a, const __grid_constant__ Row b, const __grid_constant__ long long of_a) {
  SHARED(Both, shared);
  if (blockIdx.x < of_a) {
    run<A>(a, blockIdx.x, shared.a);
  } else {
    run<B>(b, blockIdx.x - of_a, shared.b);
  }
}
"""


_KERNEL_OF_HEADS = """\
#include "rope.cuh"
using namespace fused_ops;
constexpr TokenStages A = %s;
extern "C" __global__ void __launch_bounds__(A.block) kernel(const __grid_constant__ Tokens a) {
  SHARED(SharedByHeads<A>, shared);
  run<A>(a, blockIdx.x, shared);
}
"""


_KERNEL_OF_RANKS = """\
#include "collective.cuh"
using namespace fused_ops;
constexpr RankStages A = %s;
extern "C" __global__ void __launch_bounds__(A.row.block)
    kernel(const __grid_constant__ Row a, const __grid_constant__ Ranks ranks) {
  SHARED(Shared<A.row>, shared);
  run<A>(a, ranks, shared);
}
"""

_KERNEL_OF_PAIRS = """\
#include "collective.cuh"
using namespace fused_ops;
constexpr PairStages A = %s;
extern "C" __global__ void __launch_bounds__(A.q.block)
    kernel(const __grid_constant__ Row q, const __grid_constant__ Row k, const __grid_constant__ Ranks ranks) {
  SHARED(Scratch, scratch);
  run<A>(q, k, ranks, scratch);
}
"""
_KERNEL_OF_GATHER = """\
#include "gather.cuh"
using namespace fused_ops;
constexpr GatherStages A = %s;
extern "C" __global__ void __launch_bounds__(A.block)
    kernel(const __grid_constant__ Gather a, const __grid_constant__ Ranks ranks) {
  run<A>(a, ranks);
}
"""
_OTHERS = {
    "TokenStages": _KERNEL_OF_HEADS,
    "RankStages": _KERNEL_OF_RANKS,
    "PairStages": _KERNEL_OF_PAIRS,
    "GatherStages": _KERNEL_OF_GATHER,
}


def source(stages: bytes, stages_of_b: bytes | None = None) -> str:
    """A kernel for one choice of stages, or for two of rows, of which the first has so many of the blocks."""
    options = "#define FUSED_OPS_HARDWARE_FP4\n" if HARDWARE_FP4 else ""
    if stages_of_b is not None:
        return options + _KERNEL_OF_TWO % (stages.decode(), stages_of_b.decode())
    text = stages.decode()
    return options + _OTHERS.get(text.partition("{")[0], _KERNEL) % text


def architecture(major: int, minor: int) -> str:
    """NVRTC's name of a compute capability, with what only that one has."""
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


# numerics: no contraction, IEEE division and square root, subnormals
OPTIONS = {"std": "c++20", "fma": False, "prec_div": True, "prec_sqrt": True, "ftz": False}


_importing = threading.Lock()  # cuda.core can't be imported by two threads at once


def _nvrtc():
    with _importing:
        try:
            from cuda.bindings import nvrtc
            from cuda.core import Program, ProgramOptions

            nvrtc.nvrtcVersion()  # which loads the library
        except (ModuleNotFoundError, RuntimeError) as error:
            raise ImportError(
                "fused_ops compiles its CUDA kernels by NVRTC: pip install 'fused-ops[cuda]', or run the Triton "
                "kernels: fused_ops.use_backend('triton')"
            ) from error
    return nvrtc, Program, ProgramOptions


def cubin(text: str, arch: str) -> bytes:
    """What NVRTC makes of `text` for an architecture such as "sm_90a"; from the disk where it was made before.

    Raises ImportError, with what to install, where there is no NVRTC.
    """
    nvrtc, Program, ProgramOptions = _nvrtc()
    version = nvrtc.nvrtcVersion()[1:]
    name = hashlib.sha256(repr((text, arch, OPTIONS, version)).encode() + headers()).hexdigest()[:32]
    path = cache_folder() / f"{arch}-{name}.cubin"
    if not path.exists():
        options = ProgramOptions(arch=arch, include_path=[str(CSRC / "cuda")], **OPTIONS)
        code = Program(text, "c++", options).compile("cubin").code
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent) as made:  # other processes see all or nothing
            made.write(code)
            made.flush()
            os.chmod(made.name, 0o644)  # a cache may be shared between users
            with suppress(FileExistsError):
                os.link(made.name, path)
    return path.read_bytes()


def cache_folder() -> Path:
    """Where compiled kernels are kept: FUSED_OPS_CACHE, or the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FUSED_OPS_CACHE") or user / "fused_ops")


@cache
def headers() -> bytes:
    """All that a kernel may include."""
    return b"".join(path.read_bytes() for path in sorted([*CSRC.glob("*.[hi]*"), *(CSRC / "cuda").iterdir()]))
