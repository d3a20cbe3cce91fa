"""Runs the CUDA backend on the host, for tensors on the CPU: g++ stands for NVRTC, fibers for the device's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fused_ops import _cuda

HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / f"fused_ops_host_cuda_{os.getuid()}"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-march=x86-64-v3", "-w"]
FOOTER = """
extern "C" fibers::Kernel* entry(void** arguments) { return fibers::bound(kernel, arguments); }
"""


@cache
def _sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("fibers.*"))) + _cuda.headers()


def _build(text: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    """The library that g++ makes of `text`; kept, since most runs of the tests ask for the same."""
    name = hashlib.sha256(_sources() + " ".join([text, *FLAGS]).encode()).hexdigest()[:24]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        FOLDER.mkdir(exist_ok=True)
        made = FOLDER / f"{name}.{os.getpid()}.tmp"
        command = ["g++", *FLAGS, f"-I{HERE}", f"-I{_cuda.CSRC / 'cuda'}", "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[:4000]
        made.rename(library)
    return ctypes.CDLL(str(library), mode)


@cache
def _fibers() -> ctypes.CDLL:
    return _build('#include "fibers.cpp"', ctypes.RTLD_GLOBAL)  # kernels find it there


def compile(stages: bytes, stages_of_b: bytes | None, device: int, kernel, reason) -> None:
    text = '#include "fibers.h"\n' + _cuda.source(stages, stages_of_b) + FOOTER
    library = _build(text)
    kernel[0] = ctypes.cast(library.entry, ctypes.c_void_p).value


@contextmanager
def on_host():
    """Row operations on the CPU run the CUDA backend's kernels, in this block."""
    _cuda.set_driver(_cuda.Driver(_cuda.Launch(("launch", _fibers())), _cuda.Compile(compile), for_cpu=True))
    try:
        yield
    finally:
        _cuda.set_driver(_cuda.Driver())


@contextmanager
def queued(device: int):
    """Launches wait for `run_queues`, as those of this device, in this block."""
    _fibers().set_queue(device)
    try:
        yield
    finally:
        _fibers().set_queue(-1)


def run_queues(seed: int = 0) -> None:
    """Run what is queued: each device's launches in order, those of several interleaved as `seed` draws it."""
    _fibers().run_queues(seed)
