"""Puts measured figures into README.md: `python -m bench.readme [results.json]`.

A table's lines say what they are of, in their first columns; the others are filled from the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
_CACHE = {"bfloat16": None, "FP8": "FP8_STATIC_TENSOR", "-": None}
Cells = list[str]


def main(arguments: list[str] | None = None) -> str:
    """README.md with the figures of the results, which it writes there."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="a JSON of bench.run (default: the newest)")
    source = parser.parse_args(arguments).results or max((HERE / "results").glob("cpu-20*.json"))
    text = filled(README.read_text(), source)
    README.write_text(text)
    return text


def filled(text: str, source: Path) -> str:
    """The text with these results' figures, date and name."""
    record = json.loads(source.read_text())
    tables: dict[str, Callable[[Cells, dict], Cells]] = {
        "| operation | key | rows |": _row,
        "| operation | cache | T |": _heads,
        "| batch | us |": _attention,
        "| `scaled_linear`": _linear,
        "| scheme | 1 token |": _experts,
    }
    experts = re.search(r"cpu-experts-[\d-]+\.json", text)  # which have a file of their own
    record["experts"] = json.loads((HERE / "results" / experts[0]).read_text())["experts"] if experts else []
    lines, fill = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            fill = None
        for head, filler in tables.items():
            fill = filler if line.startswith(head) else fill
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        known = fill is not None and not line.startswith(("|---", *tables))
        lines.append(f"| {' | '.join(fill(cells, record))} |" if known and fill else line)
    text = "\n".join(lines) + "\n"
    text = re.sub(r"cpu-20[\d-]+(?=\.(json|svg))", source.stem, text)
    return re.sub(r"(?<=torch )(\S+, )20[\d-]+(?=; bfloat16 rows)", rf"\g<1>{record['date']}", text)


def _row(cells: Cells, record: dict) -> Cells:
    op, key, tokens = cells[0].split("`")[1], cells[1], int(cells[2])
    op = op.removesuffix("_quant") if "unquantized" in cells[0] else op
    return [*cells[:3], *_measured(record, op, None if key == "-" else key, tokens)]


def _heads(cells: Cells, record: dict) -> Cells:
    return [*cells[:3], *_measured(record, cells[0].strip("`"), _CACHE[cells[1]], int(cells[2]))]


def _measured(record: dict, op: str, key: str | None, tokens: int) -> Cells:
    (found,) = (r for r in record["rows"] if (r["op"], r["key"], r["tokens"], r["cols"]) == (op, key, tokens, 4096))
    ratios = [_times(found, peer) for peer in ("eager", "torch.compile", "vllm")]
    return [f"{found['microseconds']['fused_ops']:.0f}", f"{found['share_of_copy']:.2f}", *ratios]


def _attention(cells: Cells, record: dict) -> Cells:
    (found,) = (r for r in record["attention"] if r["key"] is None and _named(r) == cells[0])
    peers = ("torch", "gather + torch", "torch.compile", "vllm")
    rate = "-" if found["case"] in ("prefill", "mixed") else f"{found['gb_per_second']:.1f}"
    share = "-" if rate == "-" else f"{found['share_of_read']:.2f}"
    return [cells[0], f"{found['microseconds']['fused_ops']:.0f}", rate, share, *(_times(found, p) for p in peers)]


def _named(result: dict) -> str:
    """A batch as the README calls it: what isn't said is 32 heads and bfloat16."""
    if result["case"] == "mixed":
        return "prefill and decode in one"
    label = result["label"].replace("mla decode", "MLA decode").removesuffix(", bfloat16")
    label = label if result["op"] == "mla_attention" else label.replace(", 32 heads", "")
    return label.replace("float8_e4m3fn", "FP8 cache").replace(", int8", ", int8 cache")


def _linear(cells: Cells, record: dict) -> Cells:
    of = {r["tokens"]: r for r in record["linear"] if r["key"] == cells[0] and r["cols"] == 4096}
    ratios = [_times(of[rows], f"{dtype} linear", 2) for rows in (1, 256) for dtype in ("bfloat16", "float32")]
    return [cells[0], *ratios]


def _experts(cells: Cells, record: dict) -> Cells:
    of = {r["tokens"]: r for r in record["experts"] if r["scheme"] == cells[0].strip("`")}
    return [cells[0], *(_times(of[tokens], "grouped_mm") for tokens in of), f"{of[1]['gigabytes_per_second']:.0f}"]


def _times(result: dict, peer: str, digits: int = 1) -> str:
    ratio: Any = result["times_faster"].get(peer)
    return "-" if ratio is None else f"{ratio:.{digits}f}x"


if __name__ == "__main__":
    main()
