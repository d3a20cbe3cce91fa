"""What Triton compiles for attention: for GPUs that aren't there, and how often."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pairwise
import pytest
from triton_attention import launches


def test_programs_follow_from_the_model():
    """Tiles, of which segments are whole numbers; sizes that a GPU has."""
    for heads, kv_heads in (32, 8), (3, 1), (128, 1), (5, 5):
        for cols, v_cols, element in (64, 64, 2), (80, 96, 2), (256, 256, 2), (128, 128, 4), (1, 1, 4):
            tile = launches.tile_for(heads, kv_heads, 16, cols, 0, v_cols, False, element, "", True, 0, False)
            assert tile.segment % tile.keys == 0
            assert tile.queries * tile.shared == tile.rows
            assert tile.parts * tile.shared >= tile.ratio


PAGED_CALL = "paged_attention_quant:FP8_DYNAMIC_GROUP_128:4096:bfloat16:long"
MLA_CALL = "mla_attention_quant:FP8_DYNAMIC_GROUP_128:2048:bfloat16:long"
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}  # KiB of a program
COMPILED = [(arch, PAGED_CALL + "+codes" * (i % 2 == 0)) for i, arch in enumerate(SHARED)]
COMPILED += [("sm_90", MLA_CALL), ("gfx942", MLA_CALL)]
COMPILED = COMPILED if pairwise.everything else [("sm_90", PAGED_CALL + "+codes"), ("gfx942", MLA_CALL)]


def compiled(arch: str, call: str, cache: Path) -> list[dict]:
    """The kernels of a call, by `compile_triton.py`."""
    folder = Path(__file__).parent
    paths = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(folder.parent)}
    done = subprocess.run(
        [sys.executable, str(folder / "compile_triton.py"), f"{arch}={call}"],
        env={**os.environ, "TRITON_INTERPRET": "0", **paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (kernels,) = json.loads(done.stdout)
    return kernels


@pytest.mark.parametrize(("arch", "call"), COMPILED)
def test_kernels_of_real_sizes_fit_their_targets(arch, call, tmp_path):
    """By the matrix instructions of the target, in its shared memory."""
    kernels = compiled(arch, call, tmp_path)
    names = [kernel["name"] for kernel in kernels]
    if call == MLA_CALL:  # tiles of two queries: a sequence of 16 isn't cut into segments, but might be
        assert names == ["project_kernel", "attend_kernel", "attend_kernel", "finish_kernel", "project_kernel"]
    else:
        assert names == ["attend_kernel", "finish_kernel"]
    for kernel in kernels:
        asm = kernel["asm"]
        assert kernel["shared"] <= SHARED[arch] << 10
        if kernel["name"] != "finish_kernel":
            assert re.search(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", asm)
        assert not re.search(r"\b(atom|red)\.|atomic", asm), "an order that isn't fixed"
        assert not re.search(r"div\.(full|approx)|fma\.rn\.f32", asm), "IEEE, and nothing contracted"


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"][: 1 + pairwise.everything])
def test_a_model_compiles_each_kernel_once(arch):
    """For any batch: by tiles and by segments, folding what the latter made or nothing. And a kernel is started again
    only for arguments that Triton would have compiled it for.
    """
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(folder / "specialisations.py"), arch],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(folder.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for call, kernels in found["compiled"].items():
        projections = {"project_kernel": 2} if call.startswith("mla") else {}
        assert kernels == {"attend_kernel": 2, "finish_kernel": 2} | projections, call
    assert len(found["rows"]) == 14
    for call, kernels in found["rows"].items():
        assert set(kernels.values()) == {1}, f"{call}: {kernels}"
    assert found["launches"] > 100
    assert not found["wrong"]
