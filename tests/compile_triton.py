"""Compiles the Triton kernels that operations launch, for GPUs that aren't there, in a process without the interpreter.

    python compile_triton.py sm_90=fused_add_rms_norm_quant:FP8_DYNAMIC_TOKEN:4096:bfloat16 ...

A call may end in a colon and words that vary its arguments (`varied`), such as :whole+gate.

prints a JSON list: for each call its kernels, in order, as {"name": its function, "asm": assembly, "shared": bytes of
shared memory, "usage": what ptxas says of a CUDA one}.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import virtual_ranks
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fused_ops
from fused_ops import OPS, _symmetric
from fused_ops._op import NO_KEY
from fused_ops._triton.attention_launch import PLANS, tile_for
from fused_ops._triton.launch import stages
from fused_ops.rope import IS_NEOX, WHOLE_VECTOR, mrope_code
from quant import NAMED_KEYS, ScaleLayout

LAYOUTS = {layout.name: layout for layout in ScaleLayout}


class Driver:
    """One that knows a target, and has no device: its number stands for the target where Triton caches kernels."""

    def __init__(self, arch: str):
        amd = arch.startswith("gfx")
        torch.version.hip = arch if amd else None
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)

    def get_current_stream(self, device):
        return 0


def key_of(name: str):
    name, *layout = name.split("/")
    changes = {"layout": LAYOUTS[layout[0]]} if layout else {}
    if layout == ["PACKED_UE8M0"]:
        changes["power_of_two"] = True
    return NAMED_KEYS[name].with_scale(**changes) if layout else NAMED_KEYS[name]


def varied(op, args: tuple, words: list[str]) -> tuple:
    """The arguments of an operation on heads with a norm of all of a token's, interleaved pairs, M-RoPE, a gate, or q
    quantized by the key of that name; those of one on rows in dimensions that don't merge; those of attention with room
    for several segments, or a cache of codes.
    """
    named = dict(zip(op.arguments, args, strict=False))
    for word in words:
        if word == "two-shot":
            continue
        if word == "spread":
            for name, x in named.items():
                if isinstance(x, torch.Tensor) and x.shape == args[0].shape:
                    named[name] = x.new_empty(2, 4, 3, x.shape[1] + 16)[:, 1::2, :, :-16].transpose(1, 2)
        elif word == "long":
            named["block_tables"] = torch.nn.functional.pad(named["block_tables"], (0, 64))
        elif word == "codes":
            named |= {f"{name}_cache": named[f"{name}_cache"].to(torch.float8_e4m3fn) for name in "kv"}
            named |= {f"{name}_scale": torch.ones(1) for name in "kv"}
        elif word == "whole":
            named |= {f"{name}_weight": torch.ones(named[name][0].numel()) for name in "qk"}
            named["flags"] |= WHOLE_VECTOR
        elif word == "pairs":
            named["flags"] ^= IS_NEOX
        elif word == "mrope":
            named["mrope"] = mrope_code([24, 20, 20], True)
            named["positions"] = torch.stack([named["positions"]] * 3)
        elif word == "gate":
            named = {"q_key": NO_KEY, "q_given": None} | named | {"gate": torch.empty_like(named["q"])}
        else:
            key = key_of(word)
            named |= {"q_key": key.code, "q_given": torch.ones(1) if key.scale.static or key.scale2 else None}
    return tuple(named[name] for name in op.arguments if name in named)


def outputs(op, args: tuple) -> dict:
    """All of them, but for a static key's scale."""
    made = op.empty(*args)
    made = made if isinstance(made, tuple) else (made,)
    return {f"{name}_out": out for name, out in zip(op.outputs, made, strict=True)}


def usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def kernels(arch: str, call: str) -> list[dict]:
    triton.runtime.driver.set_active(Driver(arch))
    for decided in stages, tile_for:
        decided.cache_clear()  # which depends on the vendor
    PLANS.clear()
    name, key, cols, dtype, *words = call.split(":")
    op = OPS[name]
    args = op.workload(16, int(cols), key_of(key) if key else None, getattr(torch, dtype), "cpu")
    args = varied(op, args, words[0].split("+") if words else [])
    if "workspace" in op.arguments:
        above = 0 if words == ["two-shot"] else _symmetric.NEVER
        (memory, *_) = virtual_ranks.memories(4, 16, int(cols), args[0].dtype, above=above)
        args = virtual_ranks.with_workspace(op, args, memory)
    made = []

    def compile(self, *args, grid, warmup, **options):
        made.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    run, JITFunction.run = JITFunction.run, compile
    try:
        if "rope" in name or len(args) > op.required:
            op.out(*args, **outputs(op, args))
        else:
            op.default(*args)
    finally:
        JITFunction.run = run
    found = []
    for function, kernel in made:
        asm = kernel.asm
        cuda = {"asm": asm["ptx"], "usage": usage(asm["cubin"])} if "ptx" in asm else {"asm": asm["amdgcn"]}
        found.append({"name": function, "shared": kernel.metadata.shared, **cuda})
    return found


if __name__ == "__main__":
    for op in OPS.values():
        if "triton" in op.backends:
            op.backend(replace(op.backends["triton"], devices=("CPU",)))
    with fused_ops.use_backend("triton"):
        print(json.dumps([kernels(*each.split("=")) for each in sys.argv[1:]]))
