"""The Triton kernels of real model sizes, compiled for every architecture: no GPU and no driver is needed."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# operation:key:columns:dtype[:variation], so that every pair of an architecture and a kind of stage is met
CALLS = [
    "fused_add_rms_norm_quant:FP8_DYNAMIC_TOKEN:4096:bfloat16",
    "silu_mul_quant:NVFP4/SWIZZLED_128X4:14336:bfloat16",
    "rms_norm_quant:FP8_DYNAMIC_GROUP_128/PACKED_UE8M0:7168:bfloat16",
    "rope::4096:bfloat16",
    "rms_norm_add_rms_norm_quant:INT8_DYNAMIC_TOKEN_ASYM:2880:float16",
    "gelu_tanh_mul_quant:MXFP8/SWIZZLED_128X4:4096:bfloat16",
    "layer_norm_quant:FP8_DYNAMIC_TENSOR:8192:bfloat16",
    "swiglu_oai_mul_quant:MXFP4:2880:bfloat16",
    "relu2_quant:FP8_STATIC_TENSOR:16384:bfloat16",
    "fused_add_rms_norm_quant:FP8_DYNAMIC_TOKEN:576:float32",
    "qk_norm_rope_kv_cache_write:FP8_STATIC_TENSOR:4096:bfloat16:FP8_DYNAMIC_TOKEN+mrope",
    "qk_norm_rope::8192:bfloat16:whole",
    "rope_kv_cache_write::4096:float16:MXFP8/SWIZZLED_128X4+pairs",
    "mla_rope_kv_cache_concat:FP8_STATIC_TENSOR:16384:bfloat16",
    "qk_norm_rope_kv_cache_write::4096:bfloat16:gate",
    "rms_norm::4096:bfloat16:spread",
    "all_reduce_fused_add_rms_norm_quant:FP8_DYNAMIC_TOKEN:4096:bfloat16",
    "all_reduce_rms_norm::7168:bfloat16:two-shot",
    "reduce_scatter_rms_norm_quant:FP8_DYNAMIC_GROUP_128:2880:bfloat16",
    "fused_add_rms_norm_quant:FP8_DYNAMIC_TOKEN:131072:bfloat16",
]
EVERYWHERE = CALLS[0]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
FMA_OF = {
    "silu": 8,
    "gelu": 9,
    "swiglu": 8,
    "gate": 8,
}  # of an element: the exponential's, and one of gelu's


def calls_of(arch: str) -> list[str]:
    """The first, and some of the others: all of them for NVIDIA, half for AMD."""
    start = ARCHITECTURES.index(arch)
    return [EVERYWHERE, *CALLS[1 + start % 4 :: 4]]


EACH = [(arch, call) for arch in ARCHITECTURES for call in calls_of(arch)]
ON_NVIDIA = [pair for pair in EACH if pair[0].startswith("sm")]
ON_AMD = [pair for pair in EACH if pair[0].startswith("gfx")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(architecture, call): kernels}, by two processes."""
    folder = Path(__file__).parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(folder.parent),
    }

    def work(pairs):
        command = [sys.executable, str(folder / "compile_triton.py"), *map("=".join, pairs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(zip(pairs, json.loads(done.stdout), strict=True))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, (EACH[::2], EACH[1::2]))
        return first | second


def test_every_call_is_compiled():
    assert {call for _, call in ON_NVIDIA} == set(CALLS)


@pytest.mark.parametrize(("arch", "call"), ON_NVIDIA)
def test_ptx(compiled, arch, call):
    kernels = compiled[arch, call]
    assert len(kernels) == 1 + ("DYNAMIC_TENSOR" in call)
    for kernel in kernels:
        ptx = kernel["asm"]
        assert "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx
        stores = set(re.findall(r"st\.global\.(v\w+\.b\w+)", ptx))
        atomics = "red." in ptx or "atom." in ptx  # the pass that makes one scale for the tensor
        assert stores & {"v4.b32", "v2.b64", "v2.b32"} or atomics, stores
        if "rope" not in call:  # where heads share a weight, of which each thread reads an element
            assert not re.search(r"ld\.global\.b(8|16)\b", ptx), "a row is read element by element"
        assert ".local" not in ptx
        assert re.search(r"STACK:0 .*LOCAL:0 ", kernel["usage"]), kernel["usage"]
        # IEEE, and nothing contracted
        assert not re.search(r"\.approx|\.ftz|div\.full|rsqrt|(add|sub|mul|fma)\.f32|mad\.\w*\.?f32", ptx)
        fused = ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2")  # the latter are two
        assert fused == fma_of(call, ptx), "a product and a sum were contracted"


def fma_of(call: str, ptx: str) -> int:
    """Those that the source says."""
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    if call.endswith(":gate"):
        return FMA_OF["gate"] * 2048 // threads  # a block of heads
    cols, each = int(call.split(":")[2]), FMA_OF.get(call.split("_")[0], 0)
    block = 1 << (cols - 1).bit_length()
    return each * max(1, block // threads)


@pytest.mark.parametrize(("arch", "call"), [pair for pair in ON_NVIDIA if ":FP8" in pair[1]])
def test_fp8_is_encoded_by_the_hardware_that_can(compiled, arch, call):
    found = "cvt.rn.satfinite.e4m3x2.f32" in compiled[arch, call][-1]["asm"]
    assert found == (arch != "sm_80")


@pytest.mark.parametrize(("arch", "call"), ON_AMD)
def test_amdgcn(compiled, arch, call):
    for kernel in compiled[arch, call]:
        asm = kernel["asm"]
        assert re.search(r"(buffer|global)_load_dwordx4", asm)
        assert re.search(r"(buffer|global)_store_dwordx[24]|atomic", asm)
        assert re.search(r"; ScratchSize: 0\b", asm)
        if "kv_cache" not in call:  # whose slots are divided, as 64-bit integers
            fused = re.search(r"v_(pk_fma|fmamk|fmaak)_f32", asm)  # others are those of division and square root
            assert bool(fused) == (call.split("_")[0] in FMA_OF), "a product and a sum were contracted"
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", asm), "float32 denormals are flushed"
        assert re.search(r"\.amdhsa_wavefront_size32 0\b|wavefront_size: +64", asm)
