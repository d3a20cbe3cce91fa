"""Aligned tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Text with a column for each of `header`: the first `left` of them aligned to the left, the rest to the right."""
    cells = [list(header), *([_text(value) for value in row] for row in rows)]
    columns = [_align(column, i < left) for i, column in enumerate(zip(*cells, strict=True))]
    first, *rest = ("  ".join(row) for row in zip(*columns, strict=True))
    return "\n".join(line.rstrip() for line in (first, "-" * len(first), *rest))


def _align(column: Sequence[str], left: bool) -> list[str]:
    width = max(map(len, column))
    return [text.ljust(width) if left else text.rjust(width) for text in column]


def _text(value: object) -> str:
    """Three significant digits for a float, a dash for None."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return "-" if value is None else str(value)
