"""Hostile arguments: `make fuzz`, or `python tests/fuzz.py --seed 7 --call 1234` to repeat one call.

A declared case is damaged in a few random places and given to the operation, raw or as its public function calls it.
Whatever it is, the call either works and keeps to its tensors, or raises without having written anything; behind a
public function it raises TypeError or ValueError. A kernel never takes what the declaration's check refuses.
"""

from __future__ import annotations

import argparse
import faulthandler
import inspect
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fused_ops  # noqa: F401  declares the operations
from fused_ops._op import OPS, Op, describe, invoke

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool)
DAMAGE: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda t: t.to(random.choice(DTYPES)),
    "a column less": lambda t: t[..., : max(0, t.shape[-1] - 1)],
    "a column more": lambda t: torch.cat([t, t[..., :1]], -1),
    "another dimension": lambda t: t.unsqueeze(0),
    "no dimension": lambda t: t.new_ones(()),
    "ten dimensions": lambda t: t[(None,) * (10 - t.ndim)],
    "repeated": lambda t: t.expand(random.randrange(4), *t.shape),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.transpose(0, -1),
    "empty": lambda t: t.new_empty(0),
    "one element for all": lambda t: t.as_strided(t.shape, [0] * t.ndim),
    "every second column": lambda t: torch.cat([t, t], -1)[..., ::2],
    "rows that overlap": lambda t: t.as_strided(t.shape, [1] * t.ndim),
    "other values": lambda t: torch.full_like(t, random.choice([float("nan"), float("inf"), -1, 2**31 - 1, 1e30])),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "None": lambda t: None,
    "a number": lambda t: 1,
}
INTEGERS = (-1, 0, 1, 2, 3, 15, 2**20, 2**31, 2**40, 2**62, -(2**63))
BITS = (*range(20), *range(31, 63))  # not those between: a row may be padded to a gigabyte
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e300)
GUARD = 64  # elements around a tensor in a larger storage


def damaged(value: Any) -> Any:
    if isinstance(value, Tensor):
        try:
            return DAMAGE[random.choice(list(DAMAGE))](value)
        except (RuntimeError, IndexError):  # that damage isn't defined for this tensor
            return value
    if isinstance(value, bool):
        return not value  # the dispatcher itself makes a bool of what isn't one
    if isinstance(value, int):
        return random.choice([*INTEGERS, value ^ (1 << random.choice(BITS)), random.getrandbits(20)])
    if isinstance(value, float):
        return random.choice(FLOATS)
    if value is None:
        return random.choice([None, torch.ones(1), torch.tensor([2**31 - 1], dtype=torch.int32), torch.randn(7)])
    return value


def guarded(t: Any) -> Any:
    """A copy of `t` inside a larger storage, perhaps at an odd address; other values as they are."""
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type != "cpu" or random.random() < 0.5:
        return t  # an allocation of its own, whose ends AddressSanitizer watches
    elements = t.untyped_storage().nbytes() // t.element_size()
    storage = torch.full(((elements + 2 * GUARD) * t.element_size(),), 0xA5, dtype=torch.uint8).view(t.dtype)
    whole = t.as_strided((elements,), (1,), 0)
    start = GUARD - random.randrange(2)
    storage[start : start + elements] = whole
    return storage.as_strided(t.shape, t.stride(), start + t.storage_offset())


@cache
def cases(name: str) -> list[tuple]:
    return list(OPS[name].cases("cpu"))[::7]


class Memory:
    """The bytes of every storage that a call may reach, before it."""

    def __init__(self, tensors: list[Any]):
        reachable = (t for t in tensors if isinstance(t, Tensor) and t.layout == torch.strided)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in reachable if t.device.type == "cpu"}
        self.storages = [torch.tensor([], dtype=torch.uint8).set_(s) for s in storages.values()]
        self.before = [s.clone() for s in self.storages]

    def written(self, allowed: list[Tensor]) -> bool:
        """Whether a byte has changed that isn't an element of `allowed`."""
        after = [s.clone() for s in self.storages]
        for now, storage, was in zip(after, self.storages, self.before, strict=True):
            for t in allowed:
                if t.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr():
                    place = t.storage_offset(), t.shape, t.stride()
                    view, old = (t.new_empty(0).set_(s.untyped_storage(), *place) for s in (now, was))
                    view.copy_(old)
        return not all(map(torch.equal, after, self.before))


def hostile(op: Op) -> tuple[list, dict[str, Any]]:
    """Arguments and given outputs of one call."""
    args = list(random.choice(cases(op.name)))
    defaults = [p.default for p in inspect.signature(op.reference).parameters.values()]
    args += defaults[len(args) : random.randrange(len(args), len(defaults) + 1)]
    for _ in range(random.randrange(4)):
        i = random.randrange(len(args))
        args[i] = damaged(args[i])
    outs: dict[str, Any] = {}
    if random.random() < 0.6:
        fit = random.choice(cases(op.name)) if random.random() < 0.3 else args
        try:
            op.check(*fit)
        except (TypeError, ValueError):
            fit = cases(op.name)[0]
        empty = op.empty(*fit)
        for name, tensor in zip(op.outputs, empty if isinstance(empty, tuple) else (empty,), strict=True):
            chance = random.random()
            if tensor is None or chance < 0.15:
                continue
            tensor = damaged(tensor) if chance < 0.3 else tensor
            if chance > 0.9:  # memory that it shares with an input
                tensor = random.choice([a for a in args if isinstance(a, Tensor)] or [tensor])
            if tensor is not None:
                outs[f"{name}_out"] = tensor
    return [guarded(a) for a in args], {name: guarded(t) for name, t in outs.items()}


def call(seed: int, number: int) -> str:
    """Make one call and return how it ended; AssertionError where it broke a promise."""
    random.seed(f"{seed} {number}")
    torch.manual_seed(number)
    op = random.choice(list(OPS.values()))
    args, outs = hostile(op)
    memory = Memory([*args, *outs.values()])
    public = random.random() < 0.5
    try:
        if public:
            given = [outs.get(f"{name}_out") for name in op.outputs[: op.returns]]
            outs = {f"{name}_out": t for name, t in zip(op.outputs, given, strict=False) if t is not None}
            invoke(op, tuple(args[: op.required]), tuple(given) if outs else None, tuple(args[op.required :]))
        elif outs:
            op.out(*args, **outs)
        else:
            args = args[: op.required]
            op.default(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"{op.name}({describe(tuple(args))}, {describe(tuple(outs.values()))}): {str(error)[:500]!r}"
        assert not memory.written([]), f"refused, but had written: {text}"
        assert not public or type(error) in (TypeError, ValueError), f"not a TypeError or ValueError: {text}"
        assert str(error), f"says nothing: {text}"
        return type(error).__name__
    text = f"{op.name}({describe(tuple(args))}, {describe(tuple(outs.values()))})"
    assert not memory.written(list(outs.values())), f"wrote beyond its outputs: {text}"
    try:
        op.check(*args)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"took what the check refuses: {text}: {error!r}") from error
    return "worked"


def calls(seed: int, seconds: float, number: Any) -> None:
    """Calls 0, 1, 2, ... of `seed`; `number` holds the one that runs."""
    faulthandler.enable()
    ends: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ends[call(seed, number.value)] += 1
        number.value += 1
    print(f"seed {seed}: {number.value} calls:", ", ".join(f"{n} {how}" for how, n in sorted(ends.items())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--call", type=int, help="repeat this call only")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    if options.call is not None:
        print(call(options.seed, options.call))
        return 0
    number = multiprocessing.Value("q", 0)
    worker = multiprocessing.Process(target=calls, args=(options.seed, options.seconds, number))  # it may crash
    worker.start()
    worker.join()
    if worker.exitcode:
        print(f"repeat with: python tests/fuzz.py --seed {options.seed} --call {number.value}", file=sys.stderr)
    return int(worker.exitcode != 0)


if __name__ == "__main__":
    sys.exit(main())
