"""The CUDA kernels of real model sizes compile, by NVRTC, for every architecture: no GPU and no driver is needed."""

import collections
import itertools
import re
import subprocess
from pathlib import Path

import pairwise
import pytest
import torch
import virtual_ranks

import fused_ops
from fused_ops import _cuda
from fused_ops._symmetric import NEVER
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


def rotated(dim, rotary, dtype=torch.bfloat16, **options):
    q, k, _ = torch.zeros(2, 48, dim, dtype=dtype).split([32, 8, 8], dim=1)
    positions = torch.zeros((3, 2) if "mrope_section" in options else 2, dtype=torch.int64)
    fused_ops.rope(q, k, positions, torch.zeros(9, rotary), **options)


def cached(dim, rotary, dtype=torch.bfloat16, held=torch.bfloat16, norm=True, **options):
    q, k, v = torch.zeros(2, 48, dim, dtype=dtype).split([32, 8, 8], dim=1)
    weight = (torch.ones(dim * (heads if options.get("whole_vector") else 1)) for heads in (32, 8))
    k_cache, v_cache = torch.zeros(2, 4, 16, 8, dim).to(held)
    coded = {} if held == dtype else {"k_scale": torch.ones(8), "v_scale": ONE}
    inputs, caches = (q, k, v, torch.zeros(2, dtype=torch.int64), torch.zeros(9, rotary)), (k_cache, v_cache)
    slots = torch.zeros(2, dtype=torch.int64)
    if norm:
        fused_ops.qk_norm_rope_kv_cache_write(*inputs, *weight, 1e-6, *caches, slots, **coded, **options)
    else:
        fused_ops.rope_kv_cache_write(*inputs, *caches, slots, **coded, **options)


def latent(held):
    q_pe, (kv_c, k_pe) = (
        torch.zeros(2, 16, 192).bfloat16()[..., 128:],
        torch.zeros(2, 576).bfloat16().split([512, 64], -1),
    )
    positions, cache = torch.zeros(2, dtype=torch.int64), torch.zeros(4, 16, 576).to(held)
    scale = {} if held == torch.bfloat16 else {"kv_scale": ONE}
    fused_ops.mla_rope_kv_cache_concat(q_pe, k_pe, kv_c, positions, torch.zeros(9, 64), cache, positions, **scale)


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


@pytest.mark.parametrize(("arch", "key"), list(zip(ARCHITECTURES, KEYS[2::2], strict=True)), ids=str)
def test_kernels_of_long_rows_compile(arch, key, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    (text,) = kernels_of(lambda: add_norm(131072, torch.bfloat16, key))
    check_machine_code(instructions(_cuda.cubin(text, arch), tmp_path))


@pytest.mark.parametrize(("arch", "key"), [("sm_100a", NVFP4), ("sm_120a", MXFP4)], ids=str)
def test_fp4_by_the_hardware_compiles(arch, key, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    counts = []
    for by_hardware in False, True:
        monkeypatch.setattr(_cuda, "HARDWARE_FP4", by_hardware)
        (text,) = kernels_of(lambda: add_norm(4096, torch.bfloat16, key))
        found = instructions(_cuda.cubin(text, arch), tmp_path)
        check_machine_code(found)
        counts.append(sum(n for i, n in found.items() if i.startswith("F2FP.SATFINITE.E2M1")))
    assert counts == [0, 4096 // 256 // 2]  # of 256 threads


HEADS = {
    "64": lambda: rotated(64, 64, round_products=True),
    "128, three axes": lambda: rotated(128, 128, mrope_section=[16, 24, 24], mrope_interleaved=True),
    "128, normed, FP8": lambda: cached(128, 128, held=torch.float8_e4m3fn),
    "128, q in FP8": lambda: cached(128, 64, norm=False, q_quant_key=FP8_DYNAMIC_TOKEN),
    "128, normed together": lambda: cached(128, 128, whole_vector=True),
    "256": lambda: cached(256, 64, torch.float16, torch.float16, norm=False),
    "256, normed": lambda: cached(256, 256, torch.float32, torch.float32, weight_bias=1.0),
    "latent": lambda: latent(torch.bfloat16),
    "latent, FP8": lambda: latent(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", HEADS)
def test_kernels_of_heads_compile(name, tmp_path, monkeypatch):
    """Each for one architecture in turns; with --full, for all."""
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    (text,) = kernels_of(HEADS[name])
    turn = list(HEADS).index(name) % len(ARCHITECTURES)
    for arch in ARCHITECTURES if pairwise.everything else ARCHITECTURES[turn : turn + 1]:
        found = instructions(_cuda.cubin(text, arch), tmp_path)
        wide = {name: sum(n for i, n in found.items() if i.startswith(name) and ".128" in i) for name in ("LDG", "STG")}
        moved = {name: sum(n for i, n in found.items() if i.startswith(name)) for name in wide}
        assert wide["LDG"] >= 4
        assert moved["LDG"] - wide["LDG"] <= 20, found  # positions, slots and scales: of four bytes or of eight
        assert moved["STG"] == wide["STG"] + found["STG.E.64"] + (4 if "q in FP8" in name else 0), (
            found
        )  # codes; scales
        assert not any(i.startswith(("LDL", "STL", "F2F.BF16")) for i in found), found


RANKS = {
    "one-shot": (8, NEVER, "all_reduce_fused_add_rms_norm_quant", 7168, torch.bfloat16),
    "two-shot": (8, 0, "all_reduce_fused_add_rms_norm_quant", 7168, torch.bfloat16),
    "scattered": (4, NEVER, "reduce_scatter_fused_add_rms_norm_quant", 4096, torch.float16),
    "16 ranks": (16, NEVER, "all_reduce_rms_norm", 2880, torch.float32),
    "squares": (4, NEVER, "qk_all_reduce_rms_norm", 1536, torch.bfloat16),
    "gather": (8, NEVER, "all_gather_quantized", 7168, torch.bfloat16),
}


def of_ranks(world, above, name, cols, dtype):
    op = fused_ops.OPS[name]
    key = FP8_DYNAMIC_GROUP_128 if "quant" in name else None
    with virtual_ranks.workspaces(world, 16, cols, dtype, above=above) as memories:
        args = op.workload(1, cols, key, dtype, "cpu")
        op.default(*virtual_ranks.with_workspace(op, args, memories[0]))


@pytest.mark.parametrize("name", RANKS)
def test_kernels_of_ranks_compile(name, tmp_path, monkeypatch):
    """Each for one architecture in turns; with --full, for all."""
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    (text,) = kernels_of(lambda: of_ranks(*RANKS[name]))
    turn = list(RANKS).index(name) % len(ARCHITECTURES)
    for arch in ARCHITECTURES if pairwise.everything else ARCHITECTURES[turn : turn + 1]:
        found = instructions(_cuda.cubin(text, arch), tmp_path)
        strong = {i: n for i, n in found.items() if "STRONG.SYS" in i}
        assert any(i.startswith("LDG.E.64") for i in strong), "flags are seen by other devices"
        assert any(i.startswith("STG.E.64") for i in strong)
        assert found["LDG.E.128"] >= 2
        assert not any(i.startswith(("LDL", "STL", "F2F.BF16")) for i in found), found
