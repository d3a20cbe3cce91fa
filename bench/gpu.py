"""The benchmark on a CUDA device: `python -m bench.gpu` (some five minutes, the most telling cases first).

Every operation on rows by the CUDA and the Triton kernels, against eager PyTorch, `torch.compile` and the peers that
are installed; attention against torch's, flex_attention's and FlashInfer's, and with a quantized output against one
after; the layers of every scheme that the device has a product for, against bfloat16's. Whoever is compared is
captured in a CUDA graph and replayed in turns; a graph goes through several sets of inputs, together larger than the L2
cache, so that inputs come from memory. Ratios are medians over the turns. GB/s counts every input once and every output
once; a copy moves as many bytes. What a call costs the host is measured without a graph.

Prints tables, and writes them with device, versions and commit to `bench/results/<device>-<date>.json`, anew after
every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import fused_ops
from fused_ops import OPS
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN, MXFP8, NVFP4
from quant.methods import SCHEMES

from . import attention, bars, launch, linear, machine
from .bars import HEADS
from .peers import compiled, eager, gpu
from .rows import ATTENTION, CACHES, Case
from .table import table
from .timing import Timing, interleaved

HERE = Path(__file__).parent
TOKENS = (1, 16, 256, 4096, 16384, 32768)
COLS = (4096, 7168, 2048)
QUANTIZED = ("fused_add_rms_norm_quant", "silu_mul_quant", "rms_norm_quant", "quantize")
KEYS = (FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, FP8_STATIC_TENSOR, NVFP4, INT8_DYNAMIC_TOKEN, MXFP8)
UNQUANTIZED = ("fused_add_rms_norm", "rms_norm", "silu_mul", "gelu_tanh_mul", "layer_norm", "relu2")
BACKENDS = ("cuda", "triton")


def main(arguments: list[str] | None = None) -> dict:
    """Run what the command line asks for; returns what the JSON holds."""
    options = _options(arguments)
    end = time.perf_counter() + options.seconds
    torch.manual_seed(0)
    facts = machine.describe("triton", "cuda-core", "cuda-bindings")
    facts["versions"] |= gpu.load()
    print(machine.sentence(facts), flush=True)
    name = facts["machine"].get("gpu", options.device).replace(" ", "-").lower()
    output = options.output or HERE / "results" / f"{name}-{facts['date']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record: dict = {**facts, "rows": [], "calls": [], "linear": [], "attention": [], "left_out": []}

    with torch.no_grad():
        record["copy_gb_per_second"] = _copy_rate(options.device)
        record["calls"] = list(launch.measure(options.device))
        print(
            f"copying 1 GiB: {record['copy_gb_per_second']:.0f} GB/s\n{launch.calls_table(record['calls'])}", flush=True
        )
        if not options.ops or "scaled_linear" in options.ops:
            record["linear"] = list(_linear(options.tokens, options.cols[0], options.device, options.budget))
            print(
                f"\nscaled_linear, {options.cols[0]} x {options.cols[0]}\n{_linear_table(record['linear'])}", flush=True
            )
        if not options.ops or set(options.ops) & set(ATTENTION):
            for results in _attention(options.device, options.budget, end):
                record["attention"] += results
                print(f"\n{table(*attention.rows(results), left=2)}", flush=True)
            record["bars"] = list(bars.check(record["attention"], bars.GPU_BARS))
            for bar in record["bars"]:
                print(f"{'pass' if bar['reached'] else 'FAIL'}: {bar['what']}, {bar['figure']} {bar['got']:.3f}")
        for case in _cases(options.ops, options.cols):
            if time.perf_counter() > end:
                record["left_out"].append([case.op.name, case.key and str(case.key), case.cols])
                continue
            results = list(_measure(case, options.tokens, options.device, options.budget))
            record["rows"] += results
            print(f"\n{case.op.name}{f', {case.key}' if case.key else ''}, rows of {case.cols}\n{_table(results)}")
            output.write_text(json.dumps(record, indent=1) + "\n")
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {output}; left out for want of time: {len(record['left_out'])}")
    return record


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="measure only these operations (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--cols", type=int, nargs="+", default=COLS)
    parser.add_argument("--seconds", type=float, default=300, help="no case is begun after these (default: 300)")
    parser.add_argument("--budget", type=float, default=0.08, help="seconds for each result (default: 0.08)")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the program; its figures mean nothing")
    parser.add_argument("--output", type=Path, help="the JSON (default: bench/results/<device>-<date>.json)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    return options


def _cases(only: list[str], every_cols: list[int]) -> Iterator[Case]:
    for cols in every_cols:
        for key in KEYS:
            yield from (Case(OPS[op], key, cols) for op in QUANTIZED if not only or op in only)
            if key is KEYS[0]:
                yield from (Case(OPS[op], None, cols) for op in UNQUANTIZED if not only or op in only)
        if cols == COLS[0]:  # 32 heads of 128 and 8 of keys; caches of S and FP8
            heads = [OPS[op] for op in HEADS if not only or op in only]
            yield from (Case(op, None, cols) for op in heads)
            yield from (Case(op, FP8_STATIC_TENSOR, cols) for op in heads if op.name in CACHES)


def _measure(case: Case, every_tokens: list[int], device: str, budget: float) -> Iterator[dict]:
    op, make = case.op, None
    for tokens in every_tokens:
        args = case.inputs(tokens, device)
        size = case.necessary_bytes(args, case.outputs(args))
        count = min(max(2, 3 * _cache(device) // size), 64)
        sets = [args, *(case.inputs(tokens, device) for _ in range(count - 1))]
        outs = [case.outputs(each) for each in sets]
        halves = [torch.empty(size // 2, dtype=torch.uint8, device=device) for _ in range(min(count, 8))]
        target = torch.empty_like(halves[0])
        contestants = {"copy": [partial(target.copy_, half) for half in halves]}
        for name in BACKENDS:
            backend = op.backends.get(name)
            if backend is not None and backend.supports(*args):
                contestants[name] = [partial(op.out, *a, **o) for a, o in zip(sets, outs, strict=True)]
        peers = [case.with_key(each) for each in sets]
        if op.name in eager.FUNCTIONS:
            contestants["eager"] = [partial(eager.FUNCTIONS[op.name], *each) for each in peers]
            make = make or compiled.compile_peer(op.name, peers[0], "inductor" if device == "cuda" else "eager")
            bound = [compiled.bind(make, each) for each in peers]
            if bound[0] is not None:
                contestants["torch.compile"] = bound
        for each, out in zip(peers, outs, strict=True):
            for name, call in gpu.bind(op.name, each, [torch.empty_like(o) for o in out.values()]).items():
                contestants.setdefault(name, []).append(call)
        timing, failed = _time(contestants, device, budget)
        ours = "cuda" if "cuda" in timing.rounds else "triton"
        yield {
            "op": op.name,
            "key": None if case.key is None else str(case.key),
            "tokens": tokens,
            "cols": case.cols,
            "dtype": "bfloat16",
            "bytes": size,
            "sets": count,
            "microseconds": {name: timing.seconds(name) * 1e6 for name in timing.rounds},
            "gb_per_second": size / timing.seconds(ours) / 1e9 if ours in timing.rounds else None,
            "share_of_copy": timing.ratio("copy", ours) if ours in timing.rounds else None,
            "times_faster": {
                n: timing.ratio(n, ours) for n in timing.rounds if ours in timing.rounds and n not in (ours, "copy")
            },
            "failed": failed,
        }


def _attention(device: str, budget: float, end: float) -> Iterator[list[dict]]:
    """The results of each batch: attention against its peers, then with each key of its output."""
    rehearsed = device == "cpu"
    for case in attention.quick_cases() if rehearsed else attention.cases(device, attention.free_memory(device)):
        if time.perf_counter() > end:
            return
        op, args = OPS[case.op], case.inputs(device)
        count = min(max(2, 3 * _cache(device) // case.bytes), 8 if device == "cuda" else 2)
        sets = [args, *(case.inputs(device) for _ in range(count - 1))]
        read = [torch.ones(case.bytes // 4, device=device).sum for _ in sets]
        contestants: dict[str, list[Callable]] = {"read": read}
        for name in BACKENDS:
            if name in op.backends and op.backends[name].supports(*args):
                contestants[name] = [partial(op.default, *each) for each in sets]
        flex = [] if rehearsed or case.latent else attention.flex_peers(sets)
        for i, each in enumerate(sets):
            others = attention.torch_peers(each) | gpu.bind(case.op, each, [])
            if flex:
                others["flex_attention"] = flex[i]
            for name, call in attention.agreeing(others, op.default(*each)).items():
                contestants.setdefault(name, []).append(call)
        timing, failed = _time(contestants, device, budget)
        results = [attention.result(case, timing, "triton") | {"failed": failed}]
        for key in case.keys:
            three = [attention.quantized(case, each, key) for each in sets]
            timing, failed = _time({name: [calls[name] for calls in three] for name in three[0]}, device, budget)
            results.append(attention.quantized_result(case, key, timing) | {"failed": failed})
        yield results


def _linear(every_tokens: list[int], size: int, device: str, budget: float) -> Iterator[dict]:
    """Layers of every scheme that the device has a product for."""
    for scheme in SCHEMES:
        for tokens in every_tokens:
            try:
                contestants = linear.layers(scheme, tokens, size, device)
            except ValueError as error:
                print(f"{scheme}: {error}", flush=True)
                break
            timing, failed = _time(contestants, device, budget)
            yield {
                "op": "scaled_linear",
                "scheme": scheme,
                "tokens": tokens,
                "cols": size,
                "microseconds": {name: timing.seconds(name) * 1e6 for name in timing.rounds},
                "times_faster": {
                    n: timing.ratio("bfloat16 linear", n) for n in timing.rounds if n != "bfloat16 linear"
                },
                "failed": failed,
            }


def _time(contestants: dict[str, list[Callable]], device: str, budget: float) -> tuple[Timing, dict[str, str]]:
    """Each contestant's calls, one for each set of inputs, as one graph; who can't be captured is said why."""
    graphs, failed = {}, {}
    for name, calls in contestants.items():
        try:
            with fused_ops.use_backend(name) if name in BACKENDS else nullcontext():
                graphs[name] = _graph(calls) if device == "cuda" else partial(_each, calls)
        except Exception as error:  # a peer's own trouble must not end the run
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{name}: {failed[name]}", flush=True)
    timing = interleaved(graphs, budget=budget, clock=_device_clock if device == "cuda" else None)
    return Timing({n: [s / len(contestants[n]) for s in seconds] for n, seconds in timing.rounds.items()}), failed


def _each(calls: list[Callable]) -> None:
    for call in calls:
        call()


def _graph(calls: list[Callable]) -> Callable[[], None]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is compiled or allocated once must not be captured
        for _ in range(2):
            _each(calls)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _each(calls)
    return graph.replay


def _device_clock(call: Callable[[], object], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _cache(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20


def _copy_rate(device: str) -> float:
    x = torch.empty(1 << 30 if device == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    timing, _ = _time({"copy": [partial(torch.empty_like(x).copy_, x)]}, device, 0.5)
    return 2 * x.numel() / timing.seconds("copy") / 1e9


def _table(results: list[dict]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["microseconds"]))
    header = ("tokens", "GB/s", "of copy", *(f"{name} us" for name in names))
    shown = [(r["tokens"], r["gb_per_second"], r["share_of_copy"], *map(r["microseconds"].get, names)) for r in results]
    return table(header, shown, left=0)


def _linear_table(results: list[dict]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["microseconds"]))
    header = ("scheme", "tokens", *(f"{name} us" for name in names), "over bfloat16")
    each = [(r, r["microseconds"], r["times_faster"]) for r in results]
    return table(header, [(r["scheme"], r["tokens"], *map(us.get, names), x.get("product")) for r, us, x in each])


if __name__ == "__main__":
    main()
