"""Kernels of other libraries on an NVIDIA GPU: Liger's (Triton), SGLang's and FlashInfer's (CUDA), as they are shipped.

Written for liger-kernel 0.8.5, sglang-kernel 0.4.4 and flashinfer-python 0.6.13, on torch 2.11 for CUDA 13.

- SGLang's library is one file of its wheel, `sgl_kernel/sm90/common_ops.abi3.so`, loaded alone: it is looked for in
  `$FUSED_OPS_PEERS` (that file, or a directory somewhere above it), then in an installed `sgl_kernel`.
- FlashInfer compiles on first use (nvcc, ninja; two minutes for its norms), which is why every call is made once here.

They round in other places (SGLang truncates INT8 codes) and have other smallest scales: times can be compared, bits
can't. Left out: INT8 per token of SGLang, whose library has no kernel for it; FP4 and MXFP8 of FlashInfer, which are
empty kernels on anything before compute capability 10.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fused_ops
from fused_ops import _flashinfer
from fused_ops.norm import ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE
from fused_ops.rope import IS_NEOX
from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    QuantKey,
    ScaleLayout,
)
from quant.key import FP8

SGLANG_LIBRARY = "common_ops.abi3.so"

Call = Callable[[], object]
_loaded: dict[str, Any] = {}  # what the functions of a peer are taken from, by its name


def load() -> dict[str, str]:
    """Import what there is: name -> version, or "not available: why". Never raises."""
    found = {}
    for name, (import_peer, _) in PEERS.items():
        try:
            _loaded[name], found[name] = import_peer()
        except Exception as error:  # an import may fail in any way, and the benchmark goes on without it
            _loaded.pop(name, None)
            found[name] = f"not available: {_reason(error)}"
    return found


def bind(op: str, args: tuple, outs: list[Tensor]) -> dict[str, Call]:
    """Calls of each peer that does what `op` does with these arguments; {} where none does.

    Each has been made once, so that it is compiled, can be timed, and can be captured in a CUDA graph. None writes into
    `args`: what works in place got copies, and uses them again and again. What fails is left out, and a line says why.

    args: the operation's arguments, the key as a `QuantKey`. outs: tensors to write into, as its outputs are.
    """
    calls: dict[str, Call] = {}
    if len(args) > fused_ops.OPS[op].required:  # options that the peers don't have
        return calls
    for name, library in _loaded.items():
        for made in _try(name, op, PEERS[name][1], library, op, args, outs):
            calls |= {label: call for label, call in made.items() if _try(label, op, call)}
    return calls


def _try(name: str, op: str, call: Callable, *args) -> list:
    """[what `call` returns]; [] where it fails, and a line is printed."""
    try:
        result = call(*args)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels fail later than they are launched
    except Exception as error:
        print(f"{name}, {op}: {_reason(error)}", flush=True)
        return []
    return [result]


def _reason(error: Exception) -> str:
    """One line: a compiler's first error where it is one's output, else the first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {next((line for line in lines if 'error:' in line), lines[0])}"


# Liger: functions of its forward passes. They return fresh tensors, there is no other form.


def _import_liger() -> tuple[Any, str]:
    modules = ("rms_norm", "fused_add_rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared")
    found = {name: importlib.import_module(f"liger_kernel.ops.{name}") for name in modules}
    return SimpleNamespace(**found), version("liger-kernel")


def _bind_liger(ops: Any, op: str, args: tuple, outs: list[Tensor]) -> dict[str, Call]:
    make = LIGER.get(op)
    call = make(ops, *args) if make and _plain(args) else None
    return {"liger": call} if call else {}


def _liger_rounding(flags: int) -> tuple[float, str]:
    """Its (offset, casting_mode): "llama" rounds before the weight, "gemma" computes all of it in float32."""
    return float(flags & WEIGHT_BIAS_ONE != 0), "llama" if flags & ROUND_BEFORE_WEIGHT else "gemma"


def _liger_silu_mul(ops, gate, up, round_activation):
    packed = _packed(gate, up)
    return None if packed is None else partial(ops.swiglu.swiglu_fused_gate_up_forward, packed)


def _liger_gelu_tanh_mul(ops, gate, up, round_activation):
    # It has no packed form, and reads gate and up with the result's stride: halves would be read wrong.
    return partial(ops.geglu.geglu_forward, gate.contiguous(), up.contiguous())


LIGER: dict[str, Callable[..., Call | None]] = {
    "rms_norm": lambda ops, x, weight, eps, flags: partial(
        ops.rms_norm.rms_norm_forward, x, weight, eps, *_liger_rounding(flags), None
    ),
    "fused_add_rms_norm": lambda ops, x, residual, weight, eps, flags: partial(
        ops.fused_add_rms_norm.fused_add_rms_norm_forward, x, residual, weight, eps, *_liger_rounding(flags)
    ),
    "layer_norm": lambda ops, x, weight, bias, eps: partial(ops.layer_norm.layer_norm_forward, x, weight, bias, eps),
    "silu_mul": _liger_silu_mul,
    "gelu_tanh_mul": _liger_gelu_tanh_mul,
    "relu2": lambda ops, x: partial(ops.relu_squared.relu_squared_forward, x),
}


# SGLang: `torch.ops.sgl_kernel`, called with what its own Python functions pass.


def _import_sglang() -> tuple[Any, str]:
    path = _find_sglang()
    torch.ops.load_library(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return torch.ops.sgl_kernel, f"{path.parent.name}/{path.name}, sha256 {digest[:12]}"  # 0.4.4: edd836c085a3


def _find_sglang() -> Path:
    spec = importlib.util.find_spec("sgl_kernel")  # which doesn't import it: that wants all of its libraries
    installed = list(spec.submodule_search_locations or []) if spec else []
    given = os.environ.get("FUSED_OPS_PEERS")
    for place in map(Path, [*([given] if given else []), *installed]):
        found = [place] if place.is_file() else [p for p in sorted(place.rglob(SGLANG_LIBRARY)) if _for_hopper(p)]
        if found:
            return found[0]
    raise FileNotFoundError(f"no {SGLANG_LIBRARY} in $FUSED_OPS_PEERS, and no sgl_kernel is installed")


def _for_hopper(path: Path) -> bool:
    return path.parent.name != "sm100"  # the wheel's other library of that name


def _bind_sglang(ops: Any, op: str, args: tuple, outs: list[Tensor]) -> dict[str, Call]:
    if op == "qk_norm_rope":
        call = _sglang_qk_norm_rope(ops, *args)
        return {"sglang": call} if call else {}
    if op == "quantize":
        x, key, given = args
        call = _sglang_quantize(ops, x, key, given, outs) if _plain([x]) else None
        return {"sglang": call} if call else {}
    plain, kernels = op.removesuffix("_quant"), _sglang_kernels(ops, args[0])
    if plain == op:
        result = _run(kernels, op, args, outs[0])
        return {"sglang": result[0]} if result else {}
    *inputs, key, given = args
    first = _run(kernels, plain, inputs, inputs[0].new_empty(inputs[0].shape))
    if first is None:
        return {}
    calls: dict[str, Call] = {}
    if second := _sglang_quantize(ops, first[1], key, given, outs):
        calls["sglang (two kernels)"] = _both(first[0], second)
    if plain == "silu_mul" and key.scale.layout == ScaleLayout.PACKED_UE8M0:  # the one layout that it fuses
        fused = _sglang_quantize(ops, _packed(*inputs[:2]), key, given, outs, silu_and_mul=True)
        calls |= {"sglang": fused} if fused else {}
    return calls


def _sglang_kernels(ops: Any, x: Tensor) -> dict[str, Callable[..., partial]]:
    early = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)  # its own default of enable_pdl
    return {
        "rms_norm": lambda out, x, weight, eps: partial(ops.rmsnorm.default, out, x, weight, eps, early),
        "fused_add_rms_norm": lambda x, residual, weight, eps: partial(
            ops.fused_add_rmsnorm.default, x, residual, weight, eps, early
        ),
        "silu_mul": lambda out, packed: partial(ops.silu_and_mul.default, out, packed),
        "gelu_tanh_mul": lambda out, packed: partial(ops.gelu_tanh_and_mul.default, out, packed),
    }


def _sglang_qk_norm_rope(
    ops: Any, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, q_weight, k_weight, eps: float, flags: int, mrope
) -> Call | None:
    """In place, on a packed qkv; it computes the cosines, of base 10000, itself."""
    dim, heads = q.shape[2], (q.shape[1], k.shape[1], k.shape[1])
    if dim not in (64, 128, 256) or flags & ~(IS_NEOX | ROUND_BEFORE_WEIGHT) or q.dtype != torch.bfloat16:
        return None
    qkv = torch.cat([q, k, k], dim=1).flatten(1)
    no_yarn = (1.0, 1.0, 1.0, 1.0)  # factor, low, high, attention_factor
    weights, turn = (q_weight, k_weight), (10000.0, bool(flags & IS_NEOX), positions.int())
    return partial(ops.fused_qk_norm_rope.default, qkv, *heads, dim, eps, *weights, *turn, *no_yarn, table.shape[1])


def _sglang_quantize(
    ops: Any, x: Tensor | None, key: QuantKey, given: Tensor | None, outs: list[Tensor], silu_and_mul: bool = False
) -> Call | None:
    if given is not None:  # a bound of the scales; static ones it doesn't have
        return None
    if key == FP8_DYNAMIC_TOKEN:
        return partial(ops.sgl_per_token_quant_fp8.default, x, outs[0], outs[1])
    group = key.scale.group_shape.cols
    packed = key.scale.layout == ScaleLayout.PACKED_UE8M0
    in_rows = key.with_scale(layout=ScaleLayout.ROW_MAJOR, power_of_two=False)
    if in_rows not in (FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_GROUP_64, INT8_DYNAMIC_GROUP_128):
        return None
    # Powers of two: if they aren't packed, it writes them but doesn't divide by them. Groups: they may not span rows,
    # which it checks on the whole tensor alone.
    if key.scale.power_of_two != packed or outs[0].shape[-1] % group:
        return None
    smallest = 1e-10  # the only one it takes
    limits = (-448.0, 448.0) if key.dtype == FP8 else (-128.0, 127.0)
    settings = (group, smallest, *limits, packed, silu_and_mul, None)  # the last: rows in use of each expert
    return partial(ops.sgl_per_token_group_quant_8bit_v2.default, x, outs[0], outs[1], *settings)


# FlashInfer


def _import_flashinfer() -> tuple[Any, str]:
    # Its other norms need nvidia-cutlass-dsl, a compiler of their own; where that is installed, 0 asks for them.
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    flashinfer = importlib.import_module("flashinfer")
    cuda = importlib.import_module("flashinfer.norm")._USE_CUDA_NORM
    return flashinfer, f"{flashinfer.__version__}, norms in {'CUDA' if cuda else 'CuTe DSL'}"


def _bind_flashinfer(flashinfer: Any, op: str, args: tuple, outs: list[Tensor]) -> dict[str, Call]:
    if op == "rope":
        *_, call = _flashinfer_rope(flashinfer, *args[:5])
        return {"flashinfer": call}
    if "attention" in op:
        call = _flashinfer_attention(flashinfer, op, args)
        return {"flashinfer": call} if call else {}
    if op == "rope_kv_cache_write":
        call = _flashinfer_write(flashinfer, *args)
        return {"flashinfer (two kernels)": call} if call else {}
    kernels: dict[str, Callable[..., partial]] = {
        "rms_norm": lambda out, *args: partial(flashinfer.rmsnorm, *args, out=out),
        "fused_add_rms_norm": lambda *args: partial(flashinfer.fused_add_rmsnorm, *args),
        "silu_mul": lambda out, packed: partial(flashinfer.silu_and_mul, packed, out=out),
        "gelu_tanh_mul": lambda out, packed: partial(flashinfer.gelu_tanh_and_mul, packed, out=out),
    }
    inputs = list(args)
    if op in ("rms_norm_quant", "fused_add_rms_norm_quant"):
        *inputs, key, scale = args
        if key != FP8_STATIC_TENSOR:
            return {}
        kernels = {
            "rms_norm_quant": lambda out, x, weight, eps: partial(flashinfer.rmsnorm_quant, out, x, weight, scale, eps),
            "fused_add_rms_norm_quant": lambda x, residual, weight, eps: partial(
                flashinfer.fused_add_rmsnorm_quant, outs[0], x, residual, weight, scale, eps
            ),
        }
    result = _run(kernels, op, inputs, outs[0])
    return {"flashinfer": result[0]} if result else {}


def _flashinfer_rope(flashinfer: Any, q, k, positions, table, flags: int) -> tuple[Tensor, Tensor, Call]:
    """(q, k, what rotates them): in place, in copies that are packed as q and k are."""
    q, k = torch.cat([q, k, k], dim=1).split([q.shape[1], k.shape[1], k.shape[1]], dim=1)[:2]
    rotate, neox = flashinfer.rope.apply_rope_with_cos_sin_cache_inplace, bool(flags & IS_NEOX)
    return q, k, partial(rotate, positions, q.flatten(1), k.flatten(1), q.shape[2], table, neox)


def _flashinfer_write(
    flashinfer: Any, q, k, v, positions, table, k_cache, v_cache, slots, k_scale, v_scale, flags: int, mrope: int
) -> Call | None:
    """All tokens as one sequence, in pages at random."""
    tokens, (pages, size) = q.shape[0], k_cache.shape[:2]
    if k_scale is not None or pages != -(-tokens // size):
        return None
    _, k, rotate = _flashinfer_rope(flashinfer, q, k, positions, table, flags)
    place = partial(torch.tensor, dtype=torch.int32, device=q.device)
    paged = (torch.randperm(pages, device=q.device).int(), place([0, pages]), place([(tokens - 1) % size + 1]))
    sequence = (torch.zeros_like(positions).int(), torch.arange(tokens, device=q.device).int())
    caches = (torch.empty_like(k_cache), torch.empty_like(v_cache))
    return _both(rotate, partial(flashinfer.append_paged_kv_cache, k, v, *sequence, caches, *paged))


def _flashinfer_attention(flashinfer: Any, op: str, args: tuple) -> Call | None:
    """Planned beforehand: a plan serves all layers. MLA: with both projections, by torch."""
    latent = op == "mla_attention"
    refuses = _flashinfer.refuses_latent if latent else _flashinfer.refuses_paged
    if "quant" in op or refuses(*args):
        return None
    a: Any = _flashinfer.Latent(*args) if latent else _flashinfer.Paged(*args)
    queries, cache = ((a.q_nope, a.q_pe), a.kv_cache) if latent else ((a.q,), a.k_cache)
    batch = _flashinfer.batch_of(len(queries[0]), cache, a.block_tables, a.seq_lens, a.query_start_loc)

    def make(kind: str, device: torch.device, *_, **options) -> Any:
        return getattr(flashinfer, kind)(_flashinfer_workspace(device), **options)

    plan: Callable = _flashinfer.plan_latent if latent else _flashinfer.plan_paged
    return partial(plan(a, batch, make), *queries)


@cache
def _flashinfer_workspace(device: torch.device) -> Tensor:
    """One for all, which run one after the other."""
    return torch.zeros(_flashinfer.WORKSPACE, dtype=torch.uint8, device=device)


# What SGLang's and FlashInfer's kernels have in common


def _run(
    kernels: dict[str, Callable[..., partial]], op: str, inputs: Sequence, out: Tensor
) -> tuple[partial, Tensor] | None:
    """`op` by its kernel, and the tensor that its result is in: `out`, unless it works in place; None if it can't."""
    if op not in kernels or not _plain(inputs):
        return None
    if "norm" not in op:
        packed = _packed(*inputs[:2])
        return None if packed is None else (kernels[op](out, packed), out)
    *tensors, weight, eps, flags = inputs
    if flags & WEIGHT_BIAS_ONE:
        return None
    if len(tensors) == 1:
        return kernels[op](out, *tensors, weight, eps), out
    x, residual = (tensor.clone() for tensor in tensors)
    return kernels[op](x, residual, weight, eps), x


def _plain(inputs: Sequence) -> bool:
    """Whether every tensor is there and bfloat16, and the first one is a matrix: what all of them are made for."""
    if any(value is None or (isinstance(value, Tensor) and value.dtype != torch.bfloat16) for value in inputs):
        return False
    return inputs[0].ndim == 2 and inputs[0].stride(1) == 1


def _packed(gate: Tensor, up: Tensor) -> Tensor | None:
    """The [T, 2N] whose halves gate and up are; None if there is no such tensor."""
    rows, cols = gate.shape
    strides = (2 * cols, 1)
    adjacent = up.data_ptr() == gate.data_ptr() + cols * gate.element_size()
    if not adjacent or gate.untyped_storage().data_ptr() != up.untyped_storage().data_ptr():
        return None
    return gate.as_strided((rows, 2 * cols), strides) if gate.stride() == up.stride() == strides else None


def _both(first: Call, second: Call) -> Call:
    def both():
        first()
        second()

    return both


PEERS: dict[str, tuple[Callable[[], tuple[Any, str]], Callable[..., dict[str, Call]]]] = {
    "liger": (_import_liger, _bind_liger),
    "sglang": (_import_sglang, _bind_sglang),
    "flashinfer": (_import_flashinfer, _bind_flashinfer),
}
