"""Collectives on several processes of one machine: `python -m bench.collective` (about three minutes on two cores).

The fused operation against its parts one after the other, and against the group's own all-reduce (gloo) followed by the
fused norm, by eager code and by `torch.compile`. All processes take the same calls in turns, and a call's time is that
of the slowest. `torch.set_num_threads` shares the cores between the ranks; more ranks than cores take turns.

Prints a table, and writes it with machine, versions and commit to `bench/results/cpu-collective-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context

import fused_ops
from fused_ops import AllReduceWorkspace
from quant import FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN, QuantizedActivation, QuantKey

from . import machine
from .peers import eager
from .table import table
from .timing import interleaved, keep_freed_memory

HERE = Path(__file__).parent
COLS = 4096
TOKENS = (1, 16, 128, 512)
KEYS = (None, INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_TOKEN)
EPS = 1e-5


def contestants(tokens: int, key: QuantKey | None, workspace: AllReduceWorkspace) -> dict[str, Callable[[], object]]:
    """Ways from partial sums to normed, quantized rows and the new residual, each into tensors that exist."""
    x, residual = torch.randn(2, tokens, COLS).bfloat16()
    weight = torch.randn(COLS).bfloat16()
    total, new_residual = torch.empty_like(x), torch.empty_like(x)
    out = torch.empty_like(x) if key is None else fused_ops.rms_norm_quant(x, weight, EPS, key)
    normed = torch.empty_like(x)

    def norm(of: Tensor) -> None:
        fused_ops.fused_add_rms_norm_quant(of, residual, weight, EPS, key, out=out, residual_out=new_residual)

    def one_after_the_other() -> None:
        fused_ops.all_reduce(x, workspace, out=total)
        fused_ops.fused_add_rms_norm(total, residual, weight, EPS, out=normed, residual_out=new_residual)
        if isinstance(out, QuantizedActivation):
            fused_ops.quantize(normed, out.quant_key, out=out)

    def reduced() -> Tensor:
        total.copy_(x)
        dist.all_reduce(total, group=workspace.group)
        return total

    chain = eager.FUNCTIONS["fused_add_rms_norm" + ("_quant" if key else "")]
    more = () if key is None else (key, None)
    compiled = torch.compile(chain, dynamic=False)
    return {
        "fused_ops": lambda: fused_ops.all_reduce_fused_add_rms_norm_quant(
            x, residual, weight, EPS, key, workspace, out=out, residual_out=new_residual
        ),
        "one after the other": one_after_the_other,
        "all_reduce": lambda: fused_ops.all_reduce(x, workspace, out=total),
        "norm": partial(norm, x),
        "gloo, fused norm": lambda: norm(reduced()),
        "gloo, eager": lambda: chain(reduced(), residual, weight, EPS, 0, *more),
        "gloo, torch.compile": lambda: compiled(reduced(), residual, weight, EPS, 0, *more),
    }


def measure(tokens: int, key: QuantKey | None, workspace: AllReduceWorkspace, rounds: int) -> dict:
    """A result, the same on every rank."""

    def clock(call: Callable[[], object], calls: int) -> float:
        dist.barrier(workspace.group)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = torch.tensor([(time.perf_counter() - start) / calls], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, workspace.group)
        return float(seconds)

    # Without a budget of its own clock, every rank makes as many calls as the others.
    timing = interleaved(contestants(tokens, key, workspace), budget=0, block=4e-3, least=rounds, clock=clock)
    apart = ("gloo, fused norm", "gloo, eager", "gloo, torch.compile", "one after the other")
    return {
        "op": "all_reduce_fused_add_rms_norm" + ("_quant" if key else ""),
        "key": key and str(key),
        "ranks": workspace.world_size,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "cols": COLS,
        "dtype": "bfloat16",
        "bytes": tokens * COLS * 2,
        "microseconds": {name: timing.seconds(name) * 1e6 for name in timing.rounds},
        "times_faster": {name: timing.ratio(name, "fused_ops") for name in apart},
    }


def run_rank(rank: int, ranks: int, cores: int, store: str, quick: bool, results) -> None:
    """All cases on one process; the first rank sends what was found."""
    torch.set_num_threads(max(1, cores // ranks))
    torch.manual_seed(rank)
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    with torch.no_grad(), AllReduceWorkspace(dist.group.WORLD, max(TOKENS), COLS, torch.bfloat16) as workspace:
        cases = [(tokens, key) for tokens in TOKENS for key in KEYS]
        found = [measure(*case, workspace, rounds=5 if quick else 21) for case in (cases[:1] if quick else cases)]
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def run(ranks: int, cores: int, quick: bool) -> list[dict]:
    """All cases on so many processes."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=run_rank, args=(rank, ranks, cores, store, quick, results)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {ranks} ranks failed")
    return results.get()


def main(arguments: list[str] | None = None) -> dict:
    """Run what the command line asks for; returns what the JSON holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.collective", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4, 8])
    parser.add_argument("--output", type=Path, help="the JSON (default: bench/results/cpu-collective-<date>.json)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one small case, meaningless figures")
    options = parser.parse_args(arguments)
    facts = machine.describe()
    print(machine.sentence(facts), flush=True)
    found = []
    for ranks in options.ranks:
        results = run(ranks, facts["machine"]["cores"], options.quick)
        found += results
        print(f"\n{ranks} ranks, rows of {COLS}, microseconds\n{_table(results)}", flush=True)
    record = {**facts, "quick": options.quick, "collective": found}
    output = options.output or (None if options.quick else HERE / "results" / f"cpu-collective-{facts['date']}.json")
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {output}")
    return record


def _table(results: list[dict]) -> str:
    names = list(results[0]["microseconds"])
    header = ("tokens", "key", *names, "x gloo, torch.compile")
    rows = [
        (r["tokens"], r["key"], *map(r["microseconds"].get, names), r["times_faster"]["gloo, torch.compile"])
        for r in results
    ]
    return table(header, rows, left=2)


if __name__ == "__main__":
    main()
