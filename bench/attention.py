"""Attention over a paged cache: against torch's on gathered keys, and with a quantized output against one after.

A batch reads its cache once; GB/s are of those bytes, and a read is a sum over as many. What is planned for a batch and
serves all layers (vLLM's and FlashInfer's schedules) isn't timed; what is computed is compared before it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fused_ops import OPS
from fused_ops._flashinfer_inputs import Latent, Paged
from fused_ops.attention_inputs import batch, blocks_of, filled
from fused_ops.quantize import key_inputs
from quant import FP8_DYNAMIC_GROUP_128, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN, QuantKey
from quant.key import FP8

from .peers import attention as peers
from .peers import vllm_cpu
from .timing import Timing, interleaved

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 32  # vLLM's vectorised kernels take blocks of 32
NOPE, ROPE, RANK, V_DIM, LATENT_BLOCK = 128, 64, 512, 128, 16  # its kernel for MLA takes blocks of 16
KEYS = (INT8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, FP8_DYNAMIC_GROUP_128)
COPIES = 8  # of a cache that the peers make, or less
APART = 2.0**-5  # of the largest element, of results that are compared: weights are rounded to bfloat16


@dataclass(frozen=True)
class Case:
    """A batch of (queries, tokens). keys: of the outputs that are measured, too."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    held: torch.dtype = torch.bfloat16
    heads: int = HEADS
    latent: bool = False
    keys: tuple[QuantKey, ...] = ()

    @property
    def op(self) -> str:
        return "mla_attention" if self.latent else "paged_attention"

    @property
    def row(self) -> int:
        """Elements of the cache for a token."""
        return RANK + ROPE if self.latent else KV_HEADS * 2 * DIM

    @property
    def bytes(self) -> int:
        return sum(tokens for _, tokens in self.lengths) * self.row * self.held.itemsize

    @property
    def flops(self) -> int:
        """Of both products of causal attention, without MLA's projections."""
        pairs = sum(n * tokens - n * (n - 1) // 2 for n, tokens in self.lengths)
        return 4 * pairs * self.heads * DIM

    @property
    def label(self) -> str:
        each = f"{len(self.lengths)} x {self.lengths[0][1]}" if len(set(self.lengths)) == 1 else f"{len(self.lengths)}"
        return f"{self.name}, {each}, {self.heads} heads, {str(self.held).removeprefix('torch.')}"

    def inputs(self, device: str) -> tuple:
        """The operation's arguments."""
        queries = sum(n for n, _ in self.lengths)
        block = LATENT_BLOCK if self.latent else BLOCK
        tables = batch(self.lengths, block, device)
        blocks = blocks_of(self.lengths, block)
        if self.latent:
            q = torch.randn(queries, self.heads, NOPE + ROPE, device=device).bfloat16()
            kv_b = (torch.randn(self.heads, NOPE + V_DIM, RANK, device=device) * RANK**-0.5).bfloat16()
            kv_cache, scale = filled((blocks, block, RANK + ROPE), self.held, device)
            parts = q[..., :NOPE], q[..., NOPE:], kv_cache, kv_b[:, :NOPE], kv_b[:, NOPE:]
            return *parts, *tables, (NOPE + ROPE) ** -0.5, scale
        q = torch.randn(queries, self.heads, DIM, device=device).bfloat16()
        (k, scale), (v, _) = (filled((blocks, block, KV_HEADS, DIM), self.held, device) for _ in range(2))
        return q, k, v, *tables, DIM**-0.5, True, 0, 0.0, None, scale, scale


def quick_cases() -> Iterator[Case]:
    yield Case("decode", ((1, 64),) * 2, heads=16, keys=KEYS[:1])
    yield Case("mixed", ((1, 64), (8, 40), (32, 32)), heads=16)
    yield Case("mla decode", ((1, 40),) * 2, heads=4, latent=True, keys=KEYS[1:2])


def cases(device: str, limit: float) -> Iterator[Case]:
    """limit: bytes for a case's cache and its peers' copies. They are few on the CPU, where a call may take long."""
    cpu = device == "cpu"
    sizes = [(1, 2048), (16, 2048), (64, 128), (1, 8192)]  # sequences, tokens
    if not cpu:
        sizes = [(sequences, tokens) for tokens in (128, 2048, 8192) for sequences in (1, 16, 64)]
    fused = [(16, 2048)] if cpu else [size for size in sizes if size[1] < 8192]
    decode = [(size, ((1, size[1]),) * size[0]) for size in sizes]
    found = [Case("decode", lengths, keys=KEYS if size in fused else ()) for size, lengths in decode]
    found += [Case("decode", ((1, 2048),) * 16, held) for held in (FP8, torch.int8)]
    keys = () if cpu else KEYS
    found += [Case("prefill", ((512, 512),), keys=KEYS), Case("prefill", ((2048, 2048),), keys=keys)]
    found += [Case("mixed", (*((1, 2048),) * 15, (256, 1024), (256, 256)), keys=keys)]
    found += [Case("mla decode", ((1, 2048),) * 16, heads=heads, latent=True, keys=keys) for heads in (16, 128)]
    yield from (case for case in found if COPIES * case.bytes < limit)


def free_memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(case: Case, *, vllm: bool, compiler: str, budget: float) -> Iterator[dict]:
    """One result on the CPU, and one more for each key of its output; arguments as in `rows.measure`."""
    args = case.inputs("cpu")
    op = OPS[case.op]
    y = _empty(op, args)
    contestants: dict[str, Callable[[], object]] = {
        "fused_ops": partial(op.out, *args, y_out=y),
        "read": torch.ones(case.bytes // 4).sum,
    }
    others = torch_peers(args) | {"torch.compile": compiled_peer(args, compiler)}
    if vllm:
        theirs = torch.empty_like(y)
        if (call := vllm_cpu.bind(case.op, args, [theirs])) is not None:
            others["vllm"] = _returning(call, theirs)
    contestants |= agreeing(others, op.default(*args))
    yield result(case, interleaved(contestants, budget=budget), "fused_ops")
    for key in case.keys:
        yield quantized_result(case, key, interleaved(quantized(case, args, key), budget=budget))


def quantized(case: Case, args: tuple, key: QuantKey) -> dict[str, Callable[[], object]]:
    """Attention alone, with a quantized output, and followed by `quantize`."""
    op, fused, quantize = OPS[case.op], OPS[f"{case.op}_quant"], OPS["quantize"]
    given = key_inputs(key, args[0].device.type)
    y = _empty(op, args)
    empty = fused.empty(*args, *given)
    outs = {"data_out": empty[0]} | ({} if key.scale.static else {"scale_out": empty[1]})

    def one_after_the_other() -> None:
        op.out(*args, y_out=y)
        quantize.out(y, *given, **outs)

    return {
        "fused": partial(fused.out, *args, *given, **outs),
        "alone": partial(op.out, *args, y_out=y),
        "one after the other": one_after_the_other,
    }


def _empty(op: Any, args: tuple) -> Tensor:
    return op.empty(*args).zero_()


def torch_peers(args: tuple) -> dict[str, Callable[[], Tensor]]:
    """Torch's attention on keys that were gathered before, and with gathering them."""
    a = _named(args)
    every = peers.groups(a)
    if isinstance(a, Paged):
        return {"torch": peers.contiguous(a, every), "gather + torch": partial(peers.paged, a, every)}
    (group,) = every
    rows = peers.latent_rows(a, group).contiguous()
    return {
        "torch": partial(peers.latent, a, group, rows),
        "gather + torch": partial(peers.gathered_latent, a, every),
    }


def flex_peers(sets: Sequence[tuple]) -> list[Callable[[], Tensor]]:
    """`flex_attention` on keys that were gathered before, for each set of one case's inputs."""
    return peers.flex([Paged(*args) for args in sets])


def compiled_peer(args: tuple, backend: str) -> Callable[[], Tensor]:
    """`gather + torch` by torch.compile."""
    a = _named(args)
    chain = peers.paged if isinstance(a, Paged) else peers.gathered_latent
    return partial(_compiled(chain, backend), a, peers.groups(a))


@cache
def _compiled(function: Callable, backend: str) -> Callable:
    """For any sizes: a batch's are seldom met again."""
    return torch.compile(function, backend=backend, dynamic=True)


def _named(args: tuple) -> Paged | Latent:
    return Paged(*args) if len(args) == len(Paged._fields) else Latent(*args)


def _returning(call: Callable[[], object], out: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        call()
        return out

    return run


def agreeing(others: dict[str, Callable[[], Tensor]], expected: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Those whose results are as expected; who can't run or computes something else is said."""
    found = {}
    for name, call in others.items():
        try:
            apart = (call().reshape(expected.shape).float() - expected.float()).abs().max() / expected.abs().max()
        except Exception as error:  # a peer's own trouble must not end the run
            print(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        if apart <= APART:
            found[name] = call
        else:
            print(f"{name}: its result is {float(apart):.2g} of the largest element away", flush=True)
    return found


def described(case: Case, key: QuantKey | None, timing: Timing) -> dict:
    return {
        "op": case.op + ("_quant" if key else ""),
        "case": case.name,
        "label": case.label,
        "key": key and str(key),
        "sequences": len(case.lengths),
        "tokens": max(tokens for _, tokens in case.lengths),
        "cols": case.heads * (V_DIM if case.latent else DIM),
        "held": str(case.held).removeprefix("torch."),
        "bytes": case.bytes,
        "microseconds": {name: timing.seconds(name) * 1e6 for name in timing.rounds},
    }


def result(case: Case, timing: Timing, ours: str) -> dict:
    known = ours in timing.rounds
    return described(case, None, timing) | {
        "gb_per_second": case.bytes / timing.seconds(ours) / 1e9 if known else None,
        "gflop_per_second": case.flops / timing.seconds(ours) / 1e9 if known and not case.latent else None,
        "share_of_read": timing.ratio("read", ours) if known else None,
        "times_faster": {n: timing.ratio(n, ours) for n in timing.rounds if known and n not in (ours, "read")},
    }


def quantized_result(case: Case, key: QuantKey, timing: Timing) -> dict:
    known = "fused" in timing.rounds
    return described(case, key, timing) | {
        "times_alone": timing.ratio("fused", "alone") if known else None,
        "times_faster": {"one after the other": timing.ratio("one after the other", "fused")} if known else {},
    }


def rows(results: Sequence[dict]) -> tuple[tuple[str, ...], list[tuple]]:
    """(header, rows) of a table."""
    names = list(dict.fromkeys(name for r in results for name in r["microseconds"]))
    header = ("batch", "key", "GB/s", "GFLOP/s", "of read", "of alone", *(f"{name} us" for name in names))
    figures = ("label", "key", "gb_per_second", "gflop_per_second", "share_of_read", "times_alone")
    return header, [(*map(r.get, figures), *map(r["microseconds"].get, names)) for r in results]
