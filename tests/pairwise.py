"""Fewer cases: those that hold every pair of two arguments' kinds, or, with `pytest --full`, all."""

from collections.abc import Iterable
from itertools import combinations

from torch import Tensor

everything = False


def sample(cases: Iterable[tuple]) -> list[tuple]:
    """The cases in which a pair of kinds is met for the first time."""
    if everything:
        return list(cases)
    seen: set[tuple] = set()
    chosen = []
    for args in cases:
        pairs = set(combinations(_kinds(args), 2))
        if not pairs <= seen:
            seen |= pairs
            chosen.append(args)
    return chosen


def _kinds(args: tuple) -> list[tuple]:
    """What is particular about each argument; what follows from the first one's shape counts once."""
    first = args[0]
    kinds = [("shape", tuple(first.shape), first.is_contiguous()), ("dtype", first.dtype)]
    for i, value in enumerate(args[1:], start=1):
        if isinstance(value, Tensor):
            kinds.append((i, "as the first" if value.dtype == first.dtype else value.dtype))
        elif not isinstance(value, float):
            kinds.append((i, value))
    return kinds
