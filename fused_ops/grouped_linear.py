"""`scaled_linear` with a weight of its own for the rows of each expert, as in mixtures of experts.

    y_r = round_out(sum_k x_rk * w_ek + bias_e)         e: the expert that row r belongs to

Rows lie in one of two ways: those of an expert behind those of the one before it, or each expert's in a part of its
own, [experts, M, ...], of which the first so many are used.

Numbers of rows that can't be are an error on the CPU. On a GPU a row made of one that isn't there becomes NaN, as do
all of an expert that would have more than there are; one with a negative number has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedActivation, QuantKey, formats

from ._check import FLOATS, INDICES, check, check_below
from ._op import invoke, op
from .linear import (
    INFERRED,
    _scaled_linear,
    decode_weight,
    linear_arguments,
    linear_inputs,
    takes,
    weight_code_of,
    weight_key_of,
)
from .quantize import case_keys

NAME = "grouped_scaled_linear"


@op("y")
def _grouped_scaled_linear(
    data: Tensor,
    scale: Tensor,
    key: int,
    weight: Tensor,
    weight_scale: Tensor,
    tokens_per_expert: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    weight_code: int = INFERRED,
    weight_scale2: Tensor | None = None,
):
    x = formats.dequantize(data, scale, QuantKey.from_code(key), scale2=scale2, zero_point=zero_point)
    if rows is not None:
        x = x.flatten(0, -2)
        check_below(NAME, "rows", rows, len(x))
        x = x[rows]
    y = x.new_zeros((*x.shape[:-1], weight.shape[1]))
    w_key = weight_key_of(weight[0], weight_scale[0], weight_code)
    for expert, place in _places(tokens_per_expert.tolist(), x.shape):
        scale2 = None if weight_scale2 is None else weight_scale2[expert]
        y[place] = x[place] @ decode_weight(weight[expert], weight_scale[expert], w_key, scale2).t()
        if bias is not None:
            y[place] += bias[expert].float()
    return y.to(out_dtype)


def _places(tokens: list[int], shape: torch.Size) -> Iterator[tuple[int, Any]]:
    """(expert, index of its rows of x), of those that have some."""
    end = 0
    for expert, count in enumerate(tokens):
        most = shape[1] if len(shape) == 3 else shape[0] - end
        if not 0 <= count <= most:
            raise ValueError(f"{NAME}: tokens_per_expert has {count} of expert {expert}, expected 0 to {most}")
        if count:
            yield expert, (expert, slice(count)) if len(shape) == 3 else slice(end, end + count)
        end += count


@contextmanager
def _in_this_name() -> Iterator[None]:
    """Errors of `scaled_linear`, about the first expert's weight, as this operation's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("scaled_linear", NAME, 1)) from None


@_grouped_scaled_linear.declares("store")
def _(args: tuple, name: str, target: Tensor, value: Tensor) -> None:
    for _, place in _places(args[5].tolist(), value.shape):
        target[place] = value[place]


@_grouped_scaled_linear.declares("check")
def _(
    data, scale, key, weight, weight_scale, tokens_per_expert, rows, bias, out_dtype, scale2=None, zero_point=None,
    weight_code=INFERRED, weight_scale2=None,
):  # fmt: skip
    stacked = {"weight": weight, "weight_scale": weight_scale, "bias": bias, "weight_scale2": weight_scale2}
    for name, tensor in stacked.items():
        if tensor is None and name in ("bias", "weight_scale2"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} is {type(tensor).__name__}, expected a Tensor")
        if name == "weight" and (tensor.ndim != 3 or not tensor.shape[0]):
            raise ValueError(f"{NAME}: weight is {list(tensor.shape)}, expected [experts, N, K] of at least one")
        if tensor.ndim < 2 or tensor.shape[0] != weight.shape[0]:
            of = {"bias": "N", "weight_scale2": "1"}.get(name, "...")
            raise ValueError(
                f"{NAME}: {name} is {list(tensor.shape)}, expected [{len(weight)}, {of}], as weight's experts"
            )
    first = {name: _first(tensor) for name, tensor in stacked.items()}
    optional = {"scale2": scale2, "zero_point": zero_point, "weight_code": weight_code}
    with _in_this_name():
        _scaled_linear.check(data, scale, key, **first, out_dtype=out_dtype, **optional)
    shape = "... columns" if rows is not None else "R columns" if data.ndim == 2 else "experts M columns"
    check(
        NAME,
        data=(data, shape, data.dtype),
        weight=(weight, f"experts N {weight.shape[2]}", weight.dtype),  # codes of another width than data's, maybe
        tokens_per_expert=(tokens_per_expert, "experts", INDICES),
        rows=(rows, "R ?", INDICES),
    )


def _first(stacked: Any) -> Any:
    """The first expert's, of what is a tensor of some."""
    return stacked[0] if isinstance(stacked, Tensor) and stacked.ndim and stacked.shape[0] else stacked


@_grouped_scaled_linear.declares("empty")
def _(data, scale, key, weight, weight_scale, tokens_per_expert, rows, bias, out_dtype, *optional):
    shape = data.shape[:-1] if rows is None else rows.shape
    return data.new_empty((*shape, weight.shape[1]), dtype=out_dtype)


# --- examples ---


def _stacked(experts: int, *inputs: Any) -> tuple[Any, ...]:
    """`linear_inputs` with a weight for each expert."""
    x, *weight = linear_inputs(*inputs)
    weights = [weight, *(linear_inputs(1, *inputs[1:])[1:] for _ in range(experts - 1))]
    data, scale, scale2 = (None if parts[0] is None else torch.stack(parts) for parts in zip(*weights, strict=True))
    return x, data, scale, scale2


@_grouped_scaled_linear.declares("cases")
def _(device: str) -> Iterator[tuple]:
    dtypes, kinds = cycle(FLOATS), cycle((torch.int32, torch.int64))
    for key in filter(takes, case_keys()):
        for tokens, cols, out, counts in (5, 160, 7, (4, 0, 6)), (33, 256, 130, (0, 33)), (0, 64, 8, (0, 0)):
            dtype, kind = next(dtypes), next(kinds)
            inputs = _stacked(len(counts), tokens, cols, out, key, device)
            bias = torch.randn(len(counts), out, device=device).to(dtype) if tokens == 5 else None
            rows = torch.randint(tokens, (sum(counts),), device=device).to(kind) if tokens == 5 else None
            yield linear_arguments(inputs, torch.tensor(counts, dtype=kind, device=device), rows, bias, dtype)


@_grouped_scaled_linear.declares("workload")
def _(tokens: int, cols: int, key: QuantKey, dtype: torch.dtype, device: str) -> tuple:
    """Every token goes to two of eight experts."""
    inputs = _stacked(8, tokens, cols, cols, key, device)
    experts = torch.rand(tokens, 8, device=device).topk(2).indices.flatten()
    counts, rows = experts.bincount(minlength=8), experts.argsort(stable=True) // 2
    return linear_arguments(inputs, counts, rows, None, dtype)


# --- the public function ---


def grouped_scaled_linear(
    activation: QuantizedActivation,
    weight: Tensor,
    weight_scale: Tensor,
    tokens_per_expert: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    rows: Tensor | None = None,
    weight_key: QuantKey | None = None,
    weight_scale2: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`scaled_linear` of the rows of each expert with its weight: the same bits, row by row.

    On the CPU a weight is read once for every 256 rows of its expert, and those of experts without rows not at all. On
    a GPU that is Triton's kernel, for every 64 rows; there the host reads no numbers, and only INT8 with scales of rows
    has the CPU's bits.

    Args:
        activation: logical shape [..., K] where rows is given; else [R, K], or [E, M, K], where each expert's rows are
            the first ones of its M; keys and layouts as in `scaled_linear`.
        weight, weight_scale: [E, ...], for each expert what `scaled_linear` takes ([1] where it has one scale).
        tokens_per_expert: int32 or int64 [E], how many rows of the result each expert has. Of [E, M, K] at most M;
            else they follow each other, at most as many as there are. The rows of `out` beyond are left as they were,
            fresh ones are uninitialized.
        bias: [E, N] bfloat16, float16 or float32.
        out_dtype: bfloat16, float16 or float32.
        rows: int32 or int64 [R]: which row of the activation each row of the result is made of, so that a token of
            several experts is quantized once, and copied for none. None: each of its own.
        weight_key: as in `scaled_linear`, of one expert's weight.
        weight_scale2: float32 [E, 1]: NVFP4's second scales.
        out: the result's shape in out_dtype, written instead of a fresh tensor.

    Returns:
        y, [R, N] where rows is given, else activation's leading sizes and N, in out_dtype.

    Raises:
        TypeError, ValueError: an argument is not as above, or K is no multiple of an MX or NVFP4 group; nothing is
            written.
    """
    if not isinstance(activation, QuantizedActivation):
        raise TypeError(f"{NAME}: activation is {type(activation).__name__}, expected a QuantizedActivation")
    x = activation
    args = (x.data, x.scale, x.quant_key.code, weight, weight_scale, tokens_per_expert, rows, bias, out_dtype)
    optional: tuple = ()
    if not (weight_key is weight_scale2 is x.scale2 is x.zero_point is None):
        with _in_this_name():
            code = weight_code_of(weight_key, *(_first(t) for t in (weight, weight_scale)))
        optional = (x.scale2, x.zero_point, code, weight_scale2)
    return invoke(_grouped_scaled_linear, args, None if out is None else (out,), optional)
