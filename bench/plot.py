"""A bar chart of how many times faster than its peers each operation is: `python -m bench.plot [results.json]`.

Writes `bench/plots/<name of the JSON>.svg` from the newest results, or those given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TOKENS, COLS = (512, 4096), 4096
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fused-ops"}  # small files, the same for the same results
COLOURS = {"eager": "#b8c4ce", "torch.compile": "#4c78a8", "vllm": "#f2a541"}


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="a JSON of bench.run (default: the newest)")
    parser.add_argument("--output", type=Path, help="the picture (default: in bench/plots)")
    options = parser.parse_args(arguments)
    source = options.results or max((HERE / "results").glob("cpu-20*.json"), default=None)
    if source is None:
        parser.error("there are no results yet: run `make bench`")
    record = json.loads(source.read_text())
    output = options.output or HERE / "plots" / f"{source.stem}.svg"
    output.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        draw(record).savefig(output, bbox_inches="tight")
    return output


def draw(record: dict) -> plt.Figure:
    """One panel for each number of tokens, one group of bars for each operation and key."""
    shown = [[r for r in record["rows"] if (r["tokens"], r["cols"]) == (tokens, COLS)] for tokens in TOKENS]
    size = (11, 1.5 + 0.42 * len(shown[0]))
    figure, panels = plt.subplots(1, len(TOKENS), figsize=size, sharey=True, layout="constrained")
    for panel, tokens, results in zip(panels, TOKENS, shown, strict=True):
        _bars(panel, results)
        panel.set_title(f"{tokens} x {COLS} bfloat16")
        panel.set_xlabel("times faster")
    panels[0].set_yticks(range(len(shown[0])), [_label(r) for r in shown[0]], fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(COLOURS), frameon=False)
    machine = record["machine"]
    figure.text(0, -0.02, f"{machine['cpu']}, {machine['cores']} threads, {record['date']}", fontsize=8)
    return figure


def _bars(panel: plt.Axes, results: list[dict]) -> None:
    height = 0.8 / len(COLOURS)
    for i, (peer, colour) in enumerate(COLOURS.items()):
        rows = [row for row, r in enumerate(results) if peer in r["times_faster"]]
        lengths = [results[row]["times_faster"][peer] for row in rows]
        bars = panel.barh([row + (i - 1) * height for row in rows], lengths, height, color=colour, label=peer)
        panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    panel.set_xscale("log")
    panel.margins(x=0.12, y=0.01)
    panel.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    panel.axvline(1, color="black", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


def _label(result: dict) -> str:
    return result["op"] if result["key"] is None else f"{result['op']}\n{result['key'].lower()}"


if __name__ == "__main__":
    print(main())
