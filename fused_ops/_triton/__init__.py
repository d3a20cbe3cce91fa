"""The Triton backend: operations on rows, on heads, and attention, on NVIDIA and AMD GPUs.

Importing this doesn't import Triton; the first call does.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.library import Library

from quant import QuantKey

from .._op import OPS, Backend, Op, kernels_of
from ..rope import WHOLE_VECTOR

MAX_COLS = 65536  # of a row whose elements stay in the registers of one block
LONGEST = 1 << 30  # that is worked on in parts
ROW_LIMITS = (
    f"rows of up to 2^30 columns, groups of up to {MAX_COLS} or of the row, and asymmetric keys that are static or by "
    "token or group"
)
RANK_LIMITS = f"rows of up to {MAX_COLS} columns, and asymmetric keys that are static or by token or group"
MAX_PLACES = 16384  # of a head, with a power of two for its columns, or of all of a token's that are one row
HEADS_LIMITS = f"heads of up to {MAX_PLACES} columns, all of a token's together where they are normed as one row"
HEADS = ("q", "k", "v", "gate", "q_pe", "k_pe", "kv_c")
MOST_HEADS = 8192  # times slices of 128 latents or values, a dimension of a grid
ATTENTION_LIMITS = (
    "heads of up to 256 columns, latents of up to 512 and 256 rotated columns beside them, in blocks of at least one "
    f"token, up to {MOST_HEADS} heads, fewer than 2^31 tokens to a row of block_tables, and keys of whole bytes a head"
)
EXPERTS = ("grouped_scaled_linear", "sort_by_expert", "sum_experts")
TILE = 128  # columns of experts' results that a program makes
MOST_OUTS = TILE * 65535  # a dimension of a grid
MOST_PAIRS = (1 << 31) - 1024  # which an int32 counts in steps of 1024
EXPERTS_LIMITS = (
    f"up to 2^31 - 1024 pairs of token and expert, results of up to {MOST_OUTS} columns, and int8 times int8 in rows "
    f"of up to {MAX_COLS} columns"
)
ELSEWHERE = ("scaled_linear", "qk_all_reduce_rms_norm", "all_gather", "all_gather_quantized")
_defaults: list[Library] = []


def load() -> None:
    """Make `triton` a backend of the operations it serves, and PyTorch's own choice where there are no CUDA kernels."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = ("CPU", "CUDA") if interpreted else ("CUDA",)
    for op in OPS.values():
        if op.name not in ELSEWHERE:
            supports, limits = _supports(op, LONGEST), ROW_LIMITS
            if _of_ranks(op):
                supports, limits = _supports(op, MAX_COLS), RANK_LIMITS
            elif op.name in EXPERTS:
                supports, limits = _supports_experts(op), EXPERTS_LIMITS
            elif _of_heads(op):
                supports, limits = _supports_heads(op), HEADS_LIMITS
            elif _of_attention(op):
                supports, limits = _supports_attention(op), ATTENTION_LIMITS
            op.backend(Backend("triton", _runs(op), devices, supports, limits, missing))
    if missing() is None and not interpreted and (torch.version.hip or torch.version.cuda):
        _defaults.append(Library("fused_ops", "IMPL"))
        for op in OPS.values():
            served = torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op.name}", "CUDA")
            if "triton" in op.backends and not served:
                for overload, kernel in kernels_of(op, op.backends["triton"]):
                    _defaults[0].impl(overload, kernel, "CUDA")


def missing() -> str | None:
    """What must be installed for this backend."""
    found = importlib.util.find_spec("triton")
    return None if found else "the triton backend needs Triton: pip install 'triton>=3.6'"


def _runs(op: Op) -> Callable:
    @cache
    def implementation() -> Callable:
        from . import attention_launch, collective_launch, experts, grouped_linear_launch, heads, operations

        if _of_heads(op):
            return heads.operation(op.arguments)
        if _of_attention(op):
            return attention_launch.operation(op.name, op.argument("key") or op.required)
        if _of_ranks(op):
            return collective_launch.operation(op.name, op.arguments, op.argument("key") or op.required)
        if op.name in EXPERTS:
            return getattr(grouped_linear_launch if op.name == "grouped_scaled_linear" else experts, op.name)
        if op.name == "dual_rms_norm":
            return operations.dual_rms_norm
        return operations.row_operation(op.name, op.argument("key") or op.required)

    return lambda args, outs: implementation()(args, outs)


def _supports(op: Op, most: int) -> Callable[..., bool]:
    rows = [i for i, name in enumerate(op.arguments) if name in ("x", "gate", "q", "kv")]
    halves = op.argument("up")

    def supports(*args) -> bool:
        interleaved = halves is not None and args[halves] is None
        cols = max(args[i].shape[-1] // (1 + interleaved) for i in rows)
        return cols <= most and all(serves(code, cols) for code in op.keys(args))

    return supports


def _of_heads(op: Op) -> bool:
    return "cos_sin_cache" in op.arguments


def _supports_heads(op: Op) -> Callable[..., bool]:
    def places(x: Tensor, together: bool) -> int:
        heads = x.shape[-2] if together else 1
        return (1 << (heads - 1).bit_length()) * (1 << (x.shape[-1] - 1).bit_length())

    def supports(*args) -> bool:
        named = dict(zip(op.arguments, args, strict=False))
        given = {name: named[name] for name in HEADS if named.get(name) is not None}
        whole = bool(named["flags"] & WHOLE_VECTOR)
        fits = all(places(x, whole and name in "qk") <= MAX_PLACES for name, x in given.items())
        return fits and all(map(serves, op.keys(args)))

    return supports


def _of_attention(op: Op) -> bool:
    return "block_tables" in op.arguments


def _of_ranks(op: Op) -> bool:
    return "workspace" in op.arguments


def _supports_attention(op: Op) -> Callable[..., bool]:
    def supports(*args) -> bool:
        named = dict(zip(op.arguments, args, strict=False))
        tables = named["block_tables"]
        if "w_uv" in named:
            (heads, v_cols, rank), page = named["w_uv"].shape, named["kv_cache"].shape[1]
            fits = v_cols <= 256 and rank <= 512 and named["q_pe"].shape[2] <= 256
        else:
            heads, page = named["q"].shape[1], named["k_cache"].shape[1]
            fits = max(named["q"].shape[2], named["v_cache"].shape[3]) <= 256
        fits = fits and heads <= MOST_HEADS and page > 0 and tables.shape[1] * page < (1 << 31) - 1024
        return fits and all(map(serves, op.keys(args)))

    return supports


def _supports_experts(op: Op) -> Callable[..., bool]:
    def supports(*args) -> bool:
        if op.name == "grouped_scaled_linear":
            data, weight = args[0], args[3]
            both = data.dtype == weight.dtype == torch.int8
            return weight.shape[-2] <= MOST_OUTS and (data.shape[-1] <= MAX_COLS or not both)  # int32 has their sums
        return args[0].shape[-1] <= MOST_OUTS if op.name == "sum_experts" else args[0].numel() <= MOST_PAIRS

    return supports


@cache
def serves(code: int, cols: int = 0) -> bool:
    """Whether the kernels quantize rows, of so many columns where they may be long, to this key."""
    key = QuantKey.from_code(code)
    group = key.group_size(cols)
    if not (key.per_tensor or group >= cols or group <= MAX_COLS):
        return False
    whole_bytes = key.packing == 1 or key.scale.group_shape.cols % key.packing == 0
    return whole_bytes and (key.symmetric or key.scale.static or not key.per_tensor)
