"""Calls of attention by the Triton kernels, and segments so short that the interpreter gets through several."""

import pairwise
import pytest
import torch
from keys import given_tensors
from promises import DEVICE, on_device
from test_ops import fresh, outputs_for
from torch import Tensor

import fused_ops
from fused_ops import OPS
from fused_ops.attention_inputs import batch, blocks_of, filled

pytest.importorskip("triton", reason="Triton is not installed")

from fused_ops._triton import attention_launch as launches

PAGED, MLA = OPS["paged_attention"], OPS["mla_attention"]
BOTH = pytest.mark.parametrize("op", [PAGED, MLA], ids=lambda op: op.name)
SEGMENT = launches.SEGMENT if pairwise.everything or DEVICE == "cuda" else 128
MIXED = ((1, 40), (33, 33), (5, 60))


@pytest.fixture(autouse=True)
def segments(monkeypatch):
    monkeypatch.setattr(launches, "SEGMENT", SEGMENT)
    forget()
    yield
    forget()


def forget() -> None:
    """What was decided for other segments."""
    launches.PLANS.clear()
    launches.tile_for.cache_clear()


def by_triton(op, args) -> Tensor:
    with fused_ops.use_backend("triton"):
        return op.default(*map(on_device, args)).cpu()


def unchecked(op, args) -> Tensor:
    """With numbers that are refused on the CPU, where they are looked at."""
    q = next(a for a in args if isinstance(a, Tensor))
    y = torch.full((q.shape[0], op.empty(*args).shape[1]), 5.0, dtype=q.dtype, device=DEVICE)
    op.backends["triton"].run(tuple(map(on_device, args)), {"y": y})
    return y.cpu()


def arguments(op, lengths, dtype=torch.bfloat16, held=None, block_size=16, **changes) -> tuple:
    """Of a model with two heads to a head of keys, or of MLA, by the operation's names where `changes` has any."""
    tokens, blocks = sum(queries for queries, _ in lengths), blocks_of(lengths, block_size)
    tables = batch(lengths, block_size, "cpu")
    if op.name.startswith("mla"):
        q = torch.randn(tokens, 3, 40).to(dtype)
        kv_b = (torch.randn(3, 64, 48) / 7).to(dtype)
        cache, scale = filled((blocks, block_size, 48 + 8), held or dtype, "cpu")
        args = (q[..., :32], q[..., 32:], cache, kv_b[:, :32], kv_b[:, 32:], *tables, 40**-0.5, scale)
    else:
        cols, v_cols = changes.pop("cols", 32), changes.pop("v_cols", 32)
        q = torch.randn(tokens, 4, cols).to(dtype)
        (k, k_scale), (v, v_scale) = (filled((blocks, block_size, 2, c), held or dtype, "cpu") for c in (cols, v_cols))
        args = (q, k, v, *tables, cols**-0.5, True, 0, 0.0, None, k_scale, v_scale)
    return tuple((dict(zip(op.arguments, args, strict=True)) | changes).values())


def quantized(op, args, key, out: dict | None = None) -> dict[str, Tensor]:
    """What `op`_quant makes, and what `quantize` makes of `op`'s, by name."""
    fused = OPS[f"{op.name}_quant"]
    given = given_tensors(key)
    more = (key.code, next(iter(v for n, v in given.items() if n != "zero_point"), None), given.get("zero_point"))
    made = []
    with fused_ops.use_backend("triton"):
        y = op.default(*map(on_device, args))
        for each, inputs in (fused, args), (OPS["quantize"], (y,)):
            inputs = tuple(map(on_device, (*inputs, *more)))
            outs = fresh(each, inputs)
            each.out(*inputs, **outs)
            made.append({name: outs[f"{name}_out"] for name in outputs_for(each, inputs)})
    made[1]["unquantized"] = y
    return made


def rows_of(args, op, i: int) -> slice:
    starts = args[op.argument("query_start_loc")].tolist()
    return slice(starts[i], starts[i + 1])


def alone(op, args, i: int, first: int, end: int, spare: int = 0) -> tuple:
    """Sequence i's queries from `first` to `end` as a call of their own, with the keys up to there."""
    named = dict(zip(op.arguments, args, strict=True))
    rows = rows_of(args, op, i)
    length = int(named["seq_lens"][i]) - (rows.stop - rows.start) + end
    for name in "q", "q_nope", "q_pe":
        if name in named:
            named[name] = named[name][rows.start + first : rows.start + end]
    named["block_tables"] = torch.nn.functional.pad(named["block_tables"][i : i + 1], (0, spare), value=-7)
    named["seq_lens"] = torch.tensor([length])
    named["query_start_loc"] = torch.tensor([0, end - first])
    return tuple(named.values())


def place(op, args, i: int, key: int) -> tuple[int, int]:
    """The block of a sequence's key, and its slot."""
    size = args[op.argument(next(name for name in op.arguments if name.endswith("cache")))].shape[1]
    return int(args[op.argument("block_tables")][i, key // size]), key % size
