"""Hostile arguments: `make fuzz`, or `python tests/fuzz.py --seed 7 --call 1234` to repeat one call.

A declared case is damaged in a few random places and given to the operator or to the public function. Whatever it is,
the call either works and keeps to its tensors, or raises without having written anything; a public function raises
TypeError or ValueError, and what works returns what it does on the reference. A kernel never takes what the
declaration's check refuses.
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
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from compare import assert_attention_close
from torch import Tensor

import fused_ops
from fused_ops._memory import dims_of, rows_overlap
from fused_ops._op import NO_KEY, OPS, Op, describe
from fused_ops.collective_inputs import alone
from fused_ops.rope import IS_NEOX, NORM_V, ROUND_PRODUCTS, WHOLE_VECTOR, sections_of
from quant import INT8_DYNAMIC_TOKEN, QuantizedActivation, QuantKey

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
HUGE = (2**31 - 1, 2**31 + 1, 2**40, 2**50)  # of blocks that have no memory of their own
INTEGERS = (-1, 0, 1, 2, 3, 15, 2**20, 2**31, 2**40, 2**62, -(2**63))
BITS = (*range(20), *range(31, 63))  # not those between: a row may be padded to a gigabyte
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e300)
MOVES = ("all_reduce", "reduce_scatter", "all_gather", "all_gather_quantized")
EXPERTS = ("sort_by_expert", "sum_experts")
BITWISE = ("quantize", *EXPERTS, "rope", "rope_kv_cache_write", "mla_rope_kv_cache_concat", *MOVES)
HEADS = [name for name in OPS if "rope" in name]
ATTENTION = [name for name in OPS if "attention" in name]
OF_ACTIVATIONS = ("scaled_linear", "grouped_scaled_linear", "all_gather_quantized")
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
                if (
                    t.device.type == "cpu"
                    and t.layout == torch.strided
                    and not rows_overlap(t)
                    and t.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
                ):
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
    if op.name in ATTENTION and random.random() < 0.1:
        with_huge_blocks(op, args)
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
    named = zip(op.arguments, args, strict=False)
    args = [a if name == "workspace" else guarded(a) for name, a in named]
    return args, {name: guarded(t) for name, t in outs.items()}


def with_huge_blocks(op: Op, args: list) -> None:
    """Make blocks of caches huge, whose slots are all in one place."""
    size = random.choice(HUGE)
    for i, name in enumerate(op.arguments[: len(args)]):
        if "cache" in name and isinstance(args[i], Tensor) and args[i].ndim > 2 and args[i].shape[1]:
            with suppress(RuntimeError):  # too many for torch
                args[i] = args[i][:, :1].expand(-1, size, *args[i].shape[2:])


def ordinary(args: list) -> bool:
    """Whether logits are neither so large nor so many that their rounding shows."""
    numbers = [a for a in args if isinstance(a, float)]
    floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
    return all(abs(n) <= 100 for n in numbers) and abs(numbers[0]) <= 0.5 and all(map(small, floats))


def small(t: Tensor) -> bool:
    dims = [slice(0, 1) if stride == 0 else slice(None) for stride in t.stride()]  # huge ones
    return bool((t[tuple(dims)].float().abs() <= 500).all())


def public(op: Op, args: list, outs: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The same call by the keywords of the public function."""
    words: dict[str, Any] = {}
    output: dict[str, Any] = {}  # of attention, whose `scale` is the logits'
    function = getattr(fused_ops, op.name.removesuffix("_quant") if op.name in ATTENTION else op.name, None)
    if function is None:  # it has no other way to ask for a result that isn't quantized
        function, words = getattr(fused_ops, f"{op.name}_quant"), {"quant_key": None}
    options: dict[str, dict] = {"": output if op.name in ATTENTION else words, "q_": {}, "kv_": {}}
    activation = {}
    for name, value in zip(op.arguments, args, strict=False):
        side, part = next(((s, name[len(s) :]) for s in ("q_", "kv_") if name.startswith(s)), ("", name))
        if part == "flags" and isinstance(value, int):
            words |= options_of(op, value)
        elif name == "mrope" and isinstance(value, int):
            words |= {"mrope_section": sections_of(value), "mrope_interleaved": bool(value >> 30)} if value else {}
        elif name == "q_given" and op.name in HEADS:
            words["q_scale"] = value
        elif name in ("rank", "group"):
            continue
        elif name == "workspace":
            words[name] = alone() if value is alone().buffer else value
        elif op.name in OF_ACTIVATIONS and name in ("data", "scale", "key", "scale2", "zero_point"):
            activation[name] = value
        elif part == "key" or name == "weight_code":
            named = "weight_key" if name == "weight_code" else f"{side}quant_key"
            (output if op.name in ATTENTION else words)[named] = key_of(value)
        elif part == "given" and value is not None:
            key = (words | output).get(f"{side}quant_key")
            known = isinstance(key, QuantKey)
            kind = "scale2" if known and key.scale2 else "scale" if known and key.scale.static else "scale_ub"
            options[side][kind] = value
        elif part == "zero_point":
            options[side][part] = value
        elif name in ("sliding_window", "soft_cap") and value == 0:
            words[name] = None
        else:
            words[name] = value
    words |= {f"output_{name}": value for name, value in output.items()}
    if activation:
        key = key_of(activation.get("key"))
        key = key if isinstance(key, QuantKey) else INT8_DYNAMIC_TOKEN
        parts = (activation.get(name) for name in ("scale2", "zero_point"))
        words["activation"] = QuantizedActivation(activation["data"], activation["scale"], key, torch.bfloat16, *parts)
    words |= {f"{side}options": options[side] for side in ("q_", "kv_") if options[side]}
    given = {name.removesuffix("_out"): t for name, t in outs.items()}
    if "residual" in given:
        words["residual_out"] = given["residual"]
    if op.name == "qk_all_reduce_rms_norm" and {"q", "k"} <= given.keys():
        words["out"] = given["q"], given["k"]
    if op.name in HEADS and given:
        words |= heads_out(op, given, words)
    if "y" in given:
        words["out"] = given["y"]
    key = words.get("output_quant_key", words.get("quant_key"))
    if "data" in given and isinstance(key, QuantKey):
        parts = (given.get(name) for name in ("scale", "data", "zero_point", "unquantized"))
        scale, data, zero_point, unquantized = parts
        words["out"] = QuantizedActivation(
            data, scale, key, getattr(args[0], "dtype", None), None, zero_point, unquantized
        )
    if "quant_key" in words and random.random() < 0.2:
        words |= random.choice([{"pad_rows": 4}, {"pad_rows": -1}, {"keep_unquantized": True}, {"scael": 1}])
    if "output_quant_key" in words and random.random() < 0.2:
        words |= random.choice([{"output_pad_rows": 4}, {"output_pad_rows": -1}, {"output_scael": 1}])
    return function, words


def options_of(op: Op, flags: int) -> dict[str, Any]:
    """Flags of norms and of heads, as the public functions take them."""
    words: dict[str, Any] = {}
    if "norm" in op.name:
        words |= {
            "weight_bias": float(flags >> 1 & (1 if op.name in HEADS else -1)),
            "round_before_weight": flags & 1 > 0,
        }
    if op.name in HEADS:
        words |= {"is_neox": flags & IS_NEOX > 0, "round_products": flags & ROUND_PRODUCTS > 0}
    if op.name in HEADS and "norm" in op.name:
        words["whole_vector"] = flags & WHOLE_VECTOR > 0
        words |= {"norm_v": flags & NORM_V > 0} if op.written else {}
    return words


def heads_out(op: Op, given: dict[str, Tensor], words: dict[str, Any]) -> dict[str, Any]:
    q, k = given.get("q", given.get("q_pe")), given.get("k")
    if not op.written:
        return {"out": (q, k)} if q is not None and k is not None else {}
    if isinstance(key := words.get("q_quant_key"), QuantKey):
        q = QuantizedActivation(q, given.get("q_scale"), key, torch.bfloat16) if isinstance(q, Tensor) else None
    if "k" in op.outputs and k is not None:
        return {"out": (q, k), "return_key": True}
    return {"out": q}


def key_of(code: Any) -> Any:
    """The key of this code; what has none stays as it is, damage that a public function may see too."""
    try:
        return None if code in (None, NO_KEY) else QuantKey.from_code(code)
    except (ValueError, TypeError):
        return code


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, QuantizedActivation):
        return tensors([value.data, value.scale, value.scale2, value.zero_point, value.unquantized])
    if isinstance(value, dict):
        return tensors(list(value.values()))
    return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list)) else []


def without_payloads(t: Tensor) -> Tensor:
    """A contiguous copy with one NaN for all."""
    copy = t.clone(memory_format=torch.contiguous_format)
    return copy.masked_fill_(copy.isnan(), float("nan")) if t.is_floating_point() and t.element_size() > 1 else copy


def promise(kept: bool, broken: str) -> None:
    if not kept:
        raise AssertionError(broken)


def call(seed: int, number: int) -> str:
    """Make one call and return how it ended; AssertionError where it broke a promise."""
    random.seed(f"{seed} {number}")
    torch.manual_seed(number)
    op = random.choice(list(OPS.values()))
    args, outs = hostile(op)
    as_public = random.random() < 0.5
    function, words = public(op, args, outs) if as_public else (op.default, {})
    written = tensors([words.get(name) for name in ("out", "residual_out")]) if as_public else tensors(outs)
    named = zip(op.arguments, args, strict=False)
    shared = [a for name, a in named if name == "workspace" and isinstance(a, Tensor)]
    also = shared + tensors([args[op.arguments.index(name)] for name in op.written])
    memory = Memory([*tensors(args), *tensors(outs)])
    shown = {
        name: describe(tuple(tensors(v))) or (type(v) if isinstance(v, QuantizedActivation) else v)
        for name, v in words.items()
    }
    given = shown or f"{describe(tuple(args))}; {describe(tuple(outs.values()))}"
    text = f"{op.name}({given})"
    try:
        if as_public:
            result = function(**words)
        elif outs:
            op.out(*args, **outs)
        else:
            args = args[: op.required]
            function(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        text += f": {type(error).__name__} {str(error)[:500]!r}"
        promise(not memory.written(shared), f"refused, but had written: {text}")
        promise(not as_public or type(error) in (TypeError, ValueError), f"not a TypeError or ValueError: {text}")
        promise(bool(str(error)), f"says nothing: {text}")
        return ("" if as_public else "operator: ") + type(error).__name__
    promise(not memory.written(written + also), f"wrote beyond its outputs: {text}")
    if not as_public:
        try:
            op.check(*args)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"took what the check refuses: {text}: {error!r}") from error
    elif not written:
        with fused_ops.use_backend("reference"):
            expected = function(**words)
        for a, b in zip(tensors(result), tensors(expected), strict=True):
            kinds = [(t.shape, t.dtype, dims_of(t) if t.numel() else None) for t in (a, b)]
            promise(kinds[0] == kinds[1], f"unlike the reference: {text}")
            compared = op.name in BITWISE and not a.is_meta
            same = not compared or torch.equal(*(without_payloads(t).view(torch.uint8) for t in (a, b)))
            promise(same, f"not the reference's bits: {text}")
            if op.name in ATTENTION and isinstance(result, Tensor) and ordinary(args):
                assert_attention_close(a, b, text)
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
