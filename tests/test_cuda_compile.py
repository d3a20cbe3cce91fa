"""The CUDA kernels of real model sizes compile, by NVRTC, for every architecture: no GPU and no driver is needed."""

import collections
import itertools
import re
import subprocess
from pathlib import Path

import pairwise
import pytest
import torch

import fused_ops
from fused_ops import _cuda
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    ScaleLayout,
)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
KEYS = (
    FP8_STATIC_TENSOR,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True, layout=ScaleLayout.PACKED_UE8M0),
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
    MXFP4,
    NVFP4.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
)
ONE = torch.tensor([0.05])


def options(key) -> dict:
    return {"scale": ONE} if key.scale.static else {"scale2": ONE} if key.scale2 else {}


def add_norm(cols, dtype, key):
    x, w = torch.zeros(2, cols, dtype=dtype), torch.ones(cols, dtype=dtype)
    fused_ops.fused_add_rms_norm_quant(x, x.clone(), w, 1e-6, key, **options(key))


def silu(cols, dtype, key):
    gate, up = torch.zeros(2, 2 * cols, dtype=dtype).chunk(2, dim=-1)
    fused_ops.silu_mul_quant(gate, up, key, round_activation=True, **options(key))


def dual(cols, dtype, key):
    q, kv, _ = torch.zeros(2, 1536 + 512 + 64, dtype=dtype).split([1536, 512, 64], dim=-1)
    if key is not FP8_DYNAMIC_TENSOR:
        fused_ops.dual_rms_norm(q, kv, None, None, 1e-6, 1e-6, q_quant_key=key, q_options=options(key))


def kernels_of(call) -> list[str]:
    """The texts of the first kernel that `call` asks for, which isn't run."""
    asked = []

    def compile(a, b, device, kernel, reason):
        asked.append(_cuda.source(a, b))

    _cuda.set_driver(_cuda.Driver(_cuda.Launch(lambda *_: None), _cuda.Compile(compile), for_cpu=True))
    try:
        with pytest.raises(RuntimeError, match="could not be compiled"):
            call()
    finally:
        _cuda.set_driver(_cuda.Driver())
    return asked


def instructions(code: bytes, folder: Path) -> collections.Counter:
    """How many of each the machine code has, by the disassembler that Triton brings along."""
    triton = pytest.importorskip("triton", reason="its disassembler is needed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel").write_bytes(code)
    done = subprocess.run([tool, "-sass", folder / "kernel"], capture_output=True, text=True, check=True)
    (folder / "kernel").unlink()
    return collections.Counter(re.findall(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)[^/]*;", done.stdout))


def check_machine_code(found: collections.Counter) -> None:
    """Rows move 16 bytes at a time, registers hold them, and nothing is contracted or approximated."""
    wide = found["LDG.E.128"] + found["LDG.E.128.CONSTANT"]
    loads = sum(count for name, count in found.items() if name.startswith("LDG"))
    assert wide >= 2
    assert loads - wide <= 2, found  # a given scale, an amax
    assert not any(name.startswith(("LDL", "STL")) for name in found), found
    assert not any(name.startswith("F2F.BF16") for name in found), "converted one by one"


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_kernels_compile(key, tmp_path, monkeypatch):
    """Every key for every architecture, with sizes, dtypes and operations in turns; with --full, each with all."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FUSED_OPS_CACHE", str(cache))
    calls = [
        lambda: add_norm(7168, torch.bfloat16, key),
        lambda: silu(14336, torch.bfloat16, key),
        lambda: add_norm(2880, torch.float16, key),
        lambda: add_norm(576, torch.float32, key),
        lambda: dual(0, torch.bfloat16, key if not key.per_tensor or key.scale.static else MXFP8),
    ]
    every = list(itertools.product(ARCHITECTURES, range(len(calls))))
    turns = [(arch, (KEYS.index(key) + i) % len(calls)) for i, arch in enumerate(ARCHITECTURES)]
    chosen = every if pairwise.everything else turns
    for arch, call in chosen:
        (text,) = kernels_of(calls[call])
        code = _cuda.cubin(text, arch)
        assert code[:4] == b"\x7fELF"
        check_machine_code(instructions(code, tmp_path))
        assert _cuda.cubin(text, arch) == code  # from the disk
    assert len(list(cache.iterdir())) == len(chosen)
