"""How many kernels Triton would compile for calls that one model makes, in a process without the interpreter.

    python specialisations.py sm_90

prints JSON: {"compiled": {operation: {its kernels' names: how many of each}}, "rows": {call: the same, for any number
of rows}, "launches": how many were looked at, "wrong": names of those that `Plan.start` would have given a kernel that
Triton compiles for other arguments}. Nothing is compiled, and nothing runs.
"""

import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import virtual_ranks
from compile_triton import Driver, outputs, varied
from triton.runtime.jit import JITFunction

import fused_ops
from fused_ops import OPS, _symmetric
from fused_ops._triton import attention_launch as launches
from fused_ops._triton.launch import OPTIONS
from fused_ops.attention_inputs import batch, blocks_of
from quant import FP8_DYNAMIC_GROUP_128, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN_ASYM, ScaleLayout

COLUMNS = FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.COLUMN_MAJOR)


of_rows: dict[str, set] = defaultdict(set)  # what Triton would compile, by the kernel's name


class Compiled:
    """Stands for a kernel."""

    packed_metadata = function = None

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None

    def __getitem__(self, grid):
        return self.run


def record(arch: str):
    """(what is launched from now on, by name, and those of which a plan knew another kernel)"""
    triton.runtime.driver.set_active(Driver(arch))
    launched, wrong = set(), []

    def compile(self, key, signature, device, *_, **__):
        of_rows[self.fn.__name__].add(key)
        return self.device_caches[device][0].setdefault(key, Compiled())

    start = launches.Plan.start

    def look(plan, name, kernel, grid, arguments, warps):
        start(plan, name, kernel, grid, arguments, warps)
        chosen = kernel[grid](*arguments, num_warps=warps, num_stages=2, **OPTIONS)
        launched.add((kernel.__name__, chosen))
        if plan.compiled[name] is not chosen:
            wrong.append(name)

    JITFunction._do_compile, launches.Plan.start = compile, look
    return launched, wrong


def serving():
    """Batches of one model: decoding, prefill and both, with tables of any width. (queries, tokens) and columns."""
    for count in (1, 2, 3, 16, 17, 64):
        for queries in (1, 2, 16, 33):
            yield [(queries, 40)] * count
    for length in (16, 17, 256, 513, 1024, 9000):
        yield [(1, length), (1, 3)]
        yield [(5, length), (1, 3), (100, 100)]


def call(op, key, lengths, cache, blocks: int) -> None:
    """Of attention with 8 heads to 2, or MLA with 4."""
    tokens = sum(queries for queries, _ in lengths)
    tables, seq_lens, starts = batch(lengths, 16, "cpu")
    sequences = (tables.clamp(0, blocks - 1), seq_lens, starts)
    if op.name.startswith("mla"):
        q, kv_b = torch.empty(tokens, 4, 96).bfloat16(), torch.empty(4, 192, 128).bfloat16()
        args = (q[..., :64], q[..., 64:], cache[:blocks, :, 0], kv_b[:, :64], kv_b[:, 64:], *sequences, 0.1, None)
    else:
        q = torch.empty(tokens, 12, 128).bfloat16()[:, :8]
        k, v = cache[:blocks, :, :2], cache[:blocks, :, 2:]
        args = (q, k, v, *sequences, 0.1, True, 0, 0.0, None, None, None)
    op.default(*args, *(() if key is None else (key.code, torch.ones(1) if key.scale.static else None)))


TOKENS = (1, 2, 3, 16, 17, 31, 32, 48, 63, 64, 100, 256)
NORM_KEYS = (FP8_STATIC_TENSOR, COLUMNS, INT8_DYNAMIC_TOKEN_ASYM)
HEADS = "qk_norm_rope", "rope_kv_cache_write", "qk_norm_rope_kv_cache_write", "mla_rope_kv_cache_concat"


def norms(key, apart: bool, tokens: int) -> None:
    """An addition, a norm and a quantization; apart: of rows whose dimensions don't merge."""
    x = torch.empty(2, tokens + apart, 4096).bfloat16()[:, int(apart) :]
    given = torch.ones(1) if key.scale.static else None
    weight, residual = torch.ones(4096).bfloat16(), torch.empty(x.shape, dtype=x.dtype)
    OPS["fused_add_rms_norm_quant"].default(x, residual, weight, 1e-5, 0, key.code, given)


def heads(name: str, tokens: int) -> None:
    """Of a model with 5 heads; q is quantized too where that is possible, with a column of scales for all heads."""
    op, key = OPS[name], FP8_STATIC_TENSOR if "cache" in name else None
    args = op.workload(tokens, 5 * 128, key, torch.bfloat16, "cpu")
    if op.argument("q_key") is not None:
        args = varied(op, args, ["FP8_DYNAMIC_GROUP_128/COLUMN_MAJOR"])
    op.out(*args, **outputs(op, args))


def experts(name: str, tokens: int) -> None:
    op = OPS[name]
    args = op.workload(tokens, 256, COLUMNS if op.argument("key") is not None else None, torch.bfloat16, "cpu")
    op.out(*args, **outputs(op, args))


def sums(name: str, key, above: int) -> Callable[[int], None]:
    """Over four ranks; a rank may be any."""
    op, ranks = OPS[name], itertools.cycle(virtual_ranks.memories(4, max(TOKENS), 4096, torch.bfloat16, above=above))

    def call(tokens: int) -> None:
        args = op.workload(tokens, 4096, key, torch.bfloat16, "cpu")
        op.default(*virtual_ranks.with_workspace(op, args, next(ranks)))

    return call


def on_rows() -> Iterator[tuple[str, Callable[[int], None]]]:
    for key in NORM_KEYS:
        yield f"rows {key}", partial(norms, key, False)
    yield "rows apart", partial(norms, COLUMNS, True)
    for name in HEADS:
        yield name, partial(heads, name)
    yield "all_reduce", sums("all_reduce_fused_add_rms_norm_quant", COLUMNS, _symmetric.NEVER)
    yield "two-shot", sums("all_reduce_rms_norm", None, 0)
    for name in "grouped_scaled_linear", "sort_by_expert", "sum_experts":
        yield name, partial(experts, name)
    yield "reduce_scatter", sums("reduce_scatter_rms_norm_quant", COLUMNS, _symmetric.NEVER)


def of_any_number(call: Callable[[int], None]) -> Counter:
    """How many of each kernel calls of any number of rows launch."""
    of_rows.clear()
    for tokens in TOKENS:
        call(tokens)
    return Counter({name: len(keys) for name, keys in of_rows.items()})


def others(op):
    """Arguments of other models, and each with a tensor that lies elsewhere: not at a multiple of 16 bytes, or in
    memory of more than 2 GiB, which AMD's kernels are compiled for.
    """
    for n, args in enumerate(itertools.islice(op.cases("cpu"), 12)):
        yield args
        for i, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.numel():
                size = value.untyped_storage().nbytes() // value.element_size()
                memory = torch.empty((1 << 31) // value.element_size() if n == i else 1 + size, dtype=value.dtype)
                elsewhere = memory[n != i :].as_strided(value.shape, value.stride()).copy_(value)
                yield *args[:i], elsewhere, *args[i + 1 :]


def main(arch: str) -> None:
    for op in OPS.values():
        if "triton" in op.backends:
            op.backend(replace(op.backends["triton"], devices=("CPU",)))
    launched, wrong = record(arch)
    blocks = max(blocks_of(lengths, 16) for lengths in serving())
    caches = {"paged": torch.zeros(blocks, 16, 4, 128).bfloat16(), "mla": torch.zeros(blocks, 16, 1, 160).bfloat16()}
    compiled, total = {}, 0
    with fused_ops.use_backend("triton"):
        for name in "paged_attention", "mla_attention":
            for key in None, FP8_STATIC_TENSOR, COLUMNS:
                launched.clear()
                op, cache = OPS[name if key is None else f"{name}_quant"], caches[name.split("_")[0]]
                for n, lengths in enumerate(serving()):
                    call(op, key, lengths, cache, blocks - n % 3)
                compiled[f"{name} {key}"] = Counter(kernel for kernel, _ in launched)
        rows = {name: of_any_number(call) for name, call in on_rows()}
        for name in "paged_attention", "mla_attention":
            launched.clear()
            for args in others(OPS[name]):
                OPS[name].default(*args)
                total += 1
    print(json.dumps({"compiled": compiled, "rows": rows, "launches": total, "wrong": sorted(set(wrong))}))


if __name__ == "__main__":
    main(sys.argv[1])
