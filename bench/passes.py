"""What passes cost the compiler: `python -m bench.passes` (about six minutes on two cores).

A model is compiled by Inductor with and without `models_patch.passes`, and by the codegen-free back end, each in a
process of its own with an empty cache, and called seven times there. Prints a table, and writes it to
`bench/results/cpu-passes-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import machine, models
from .table import table

HERE = Path(__file__).parent
WAYS = ("inductor", "inductor, passes", "passes, no code")


def compiled(model: Any, way: str) -> tuple[Any, Any]:
    """(the compiled model, the report of its passes)"""
    from models_patch.passes import Backend, inductor_options, report

    if way == "inductor":
        return torch.compile(model), None
    if way == "inductor, passes":
        options = inductor_options()
        return torch.compile(model, options=options), report(options)
    backend = Backend()
    return torch.compile(model, backend=backend), backend.manager.report()


def one(way: str, tokens: int) -> dict[str, Any]:
    """Seconds of the first call and of later ones, and what passes did."""
    torch.set_num_threads(os.cpu_count() or 1)
    model, _ = models.load("smollm2", torch.bfloat16)
    ids = torch.arange(2, 2 + tokens)[None]
    function, report = compiled(model, way)
    with torch.no_grad():
        start = time.perf_counter()
        function(ids, use_cache=False)
        first = time.perf_counter() - start
        later = []
        for _ in range(7):
            start = time.perf_counter()
            function(ids, use_cache=False)
            later.append(time.perf_counter() - start)
    passes = None if report is None else sum(item.seconds for graph in report.graphs for item in graph.passes)
    operations = {} if report is None else dict(report.operations)
    return {"way": way, "tokens": tokens, "first": first, "later": sorted(later)[3], "passes": passes} | {
        "operations": operations
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.passes", description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process; prints JSON")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    if options.way:
        print(json.dumps(one(options.way, options.tokens)))
        return
    facts = machine.describe()
    print(machine.sentence(facts), flush=True)
    found = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "bench.passes", "--way", way, "--tokens", str(options.tokens)]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [(r["way"], r["first"], r["passes"], 1e3 * r["later"], r["first"] / found[0]["first"]) for r in found]
    print(table(("way", "first call s", "of it passes s", "later ms", "x inductor"), rows, left=1))
    output = HERE / "results" / f"cpu-passes-{facts['date']}.json"
    output.write_text(json.dumps({**facts, "passes": found}, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
