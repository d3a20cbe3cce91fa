"""Operations that work on rows: every declared one, on every key or on some, against its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fused_ops
from fused_ops._op import Op
from quant import FP8_DYNAMIC_GROUP_128, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN, NAMED_KEYS, QuantKey
from quant.methods import SCHEMES

from .peers import compiled, eager, vllm_cpu
from .timing import interleaved

KEYS = tuple(SCHEMES[name].input_quant_key for name in ("int8_token", "fp8_static", "fp8_token", "fp8_block"))
EVERY_KEY = ("quantize", "fused_add_rms_norm_quant")  # the others share their stores: they take a few
LARGE = 4096
SMALL = {op: 1536 for op in fused_ops.OPS if "mul" in op or "relu2" in op}  # SmolLM2's sizes; its hidden one is 576
ATTENTION = tuple(op for op in fused_ops.OPS if "attention" in op)  # measured in `attention`
COLLECTIVES = tuple(op for op in fused_ops.OPS if "reduce" in op or "gather" in op)  # of several processes
EXPERTS = ("grouped_scaled_linear", "sort_by_expert", "sum_experts")  # in `experts`, together
ELSEWHERE = ("scaled_linear", *EXPERTS, *ATTENTION, *COLLECTIVES)  # scaled_linear in `linear`
CACHES = tuple(op.name for op in fused_ops.OPS.values() if op.written)  # on caches of S, and FP8
TABLE = "cos_sin_cache"  # the argument of which an operation reads a row a token


@dataclass(frozen=True)
class Case:
    """An operation with a key (None where it takes none) on rows of `cols`."""

    op: Op
    key: QuantKey | None
    cols: int

    def inputs(self, tokens: int, device: str = "cpu") -> tuple:
        """The arguments, with the key's code, as the operation takes them."""
        return self.op.workload(tokens, self.cols, self.key, torch.bfloat16, device)

    def with_key(self, args: tuple) -> tuple:
        """The arguments with the key itself, as the peers take them."""
        return tuple(self.key if i == self.op.argument("key") else arg for i, arg in enumerate(args))

    def outputs(self, args: tuple) -> dict[str, Tensor]:
        """Tensors to write into, by schema name: what a call needs, without the optional copy before quantization."""
        empty = self.op.empty(*args)
        empty = empty if isinstance(empty, tuple) else (empty,)
        named = zip(self.op.outputs[: self.op.returns], empty, strict=False)
        given = ("scale",) if self.key is not None and self.key.scale.static else ()
        return {f"{name}_out": tensor.zero_() for name, tensor in named if name not in given}

    def necessary_bytes(self, args: tuple, outs: dict[str, Tensor]) -> int:
        """Bytes of every input read once and every output written once; caches are as long as what is written."""
        table = self.op.argument(TABLE)
        inputs = sum(arg.nbytes for i, arg in enumerate(args) if isinstance(arg, Tensor) and i != table)
        rows = 0 if table is None else args[0].shape[0] * args[table][0].nbytes
        return inputs + rows + sum(out.nbytes for out in outs.values())


def cases(only: list[str]) -> Iterator[Case]:
    """Every operation (or those in `only`), key and row length that is measured."""
    for op in fused_ops.OPS.values():
        if op.name in ELSEWHERE or (only and op.name not in only):
            continue
        for key in _keys(op):
            yield Case(op, key, LARGE)
            if key is None or key in KEYS:
                yield Case(op, key, SMALL.get(op.name, 576))


def _keys(op: Op) -> tuple[QuantKey | None, ...]:
    if op.name in CACHES:
        return None, FP8_STATIC_TENSOR
    if op.argument("key") is None:
        return (None,)
    if op.name in EVERY_KEY:  # but for those that take a zero point, which have no functional form
        return tuple(key for key in NAMED_KEYS.values() if key.symmetric)
    return KEYS if op.name in ("rms_norm_quant", "silu_mul_quant") else (INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128)


def measure(case: Case, tokens: list[int], *, vllm: bool, compiler: str, budget: float) -> Iterator[dict]:
    """One result for each number of tokens: microseconds, rates, and ratios to the peers that there are.

    vllm: whether its library is loaded. compiler: the backend of `torch.compile`. budget: seconds for each result.
    """
    op, make = case.op, None
    for count in tokens:
        args = case.inputs(count)
        outs = case.outputs(args)
        size = case.necessary_bytes(args, outs)
        half = torch.zeros(size // 2, dtype=torch.uint8)
        contestants: dict[str, Callable[[], object]] = {
            "fused_ops": partial(op.out, *args, **outs),
            "copy": partial(torch.empty_like(half).copy_, half),
        }
        peer_args = case.with_key(args)
        if op.name in eager.FUNCTIONS:
            contestants["eager"] = partial(eager.FUNCTIONS[op.name], *peer_args)
            make = make or compiled.compile_peer(op.name, peer_args, compiler)
            if (peer := compiled.bind(make, peer_args)) is not None:
                contestants["torch.compile"] = peer
        if vllm and (peer := vllm_cpu.bind(op.name, peer_args, [torch.empty_like(out) for out in outs.values()])):
            contestants["vllm"] = peer
        timing = interleaved(contestants, budget=budget)
        seconds = timing.seconds("fused_ops")
        yield {
            "op": op.name,
            "key": None if case.key is None else str(case.key),
            "tokens": count,
            "cols": case.cols,
            "dtype": "bfloat16",
            "bytes": size,
            "microseconds": {name: timing.seconds(name) * 1e6 for name in contestants},
            "gb_per_second": size / seconds / 1e9,
            "share_of_copy": timing.ratio("copy", "fused_ops"),
            "times_faster": {n: timing.ratio(n, "fused_ops") for n in contestants if n not in ("fused_ops", "copy")},
        }
