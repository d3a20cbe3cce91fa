"""Rotary position embedding of q and k, alone and after their norms.

    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin        in float32, every product and sum rounded (no fma), then once to S

(x1, x2) are the halves of the first `rotary_dim` elements of a head (NeoX), or its even and odd ones (interleaved,
GPT-J); the rest of the head passes. `round_products=True` rounds cos, sin, products and sums to S, as eager model
code does. A norm comes first, and its result is rounded to S.

With multimodal positions (M-RoPE) a token has three, of time, height and width; `mrope_section` says how many of the
pairs turn by each, one axis after the other, or `mrope_interleaved`, pair i by axis i % 3 while that has pairs left.

A position outside the table is an error on the CPU; on a GPU that token's heads become NaN.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, eq. 34; Wang et al.,
"Qwen2-VL", 2024, section 2.1.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Unpack

from ._check import FLOATS, INDICES, boolean, check, check_eps
from ._op import invoke, op
from .norm import ROUND_BEFORE_WEIGHT, WEIGHT_BIAS_ONE, _rms_norm, norm_flags

# As kernels take them, besides the two of norms.
IS_NEOX, ROUND_PRODUCTS, WHOLE_VECTOR, NORM_V = 4, 8, 16, 32
ROTARY_FLAGS = IS_NEOX | ROUND_PRODUCTS
NORM_FLAGS = ROUND_BEFORE_WEIGHT | WEIGHT_BIAS_ONE | WHOLE_VECTOR
INTERLEAVED = 1 << 30  # with an M-RoPE code, whose three sections have ten bits each; 0 is none


class RotaryOptions(TypedDict, total=False):
    """How heads are rotated.

    is_neox: halves (NeoX, the default), or interleaved pairs (GPT-J).
    round_products: round cos, sin, products and sums to S.
    mrope_section: how many pairs turn by time, height and width; `positions` is [3, T] then.
    mrope_interleaved: axes alternate.
    """

    is_neox: bool
    round_products: bool
    mrope_section: list[int] | None
    mrope_interleaved: bool


@op("q k")
def _rope(q: Tensor, k: Tensor, positions: Tensor | None, cos_sin_cache: Tensor, flags: int, mrope: int):
    cos, sin = _rows(positions, cos_sin_cache, mrope).unsqueeze(-2).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    outside = positions_outside(positions, cos_sin_cache)
    return tuple(poisoned(_rotate(x, cos, sin, flags), outside) for x in (q, k))


@op("q k gate", returns=2)
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    flags: int,
    mrope: int,
    gate: Tensor | None = None,
):
    q, k = normed(q, q_weight, eps, flags), normed(k, k_weight, eps, flags)
    rotated = _rope.reference(q, k, positions, cos_sin_cache, flags, mrope)
    return *rotated, None if gate is None else gate.sigmoid()


def normed(x: Tensor, weight: Tensor | None, eps: float, flags: int) -> Tensor:
    rows = x.flatten(-2) if flags & WHOLE_VECTOR else x
    return _rms_norm.reference(rows, weight, eps, flags & (ROUND_BEFORE_WEIGHT | WEIGHT_BIAS_ONE)).view(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, flags: int) -> Tensor:
    half = cos.shape[-1]
    dtype = x.dtype if flags & ROUND_PRODUCTS else torch.float32
    first, second = (
        (slice(0, half), slice(half, 2 * half)) if flags & IS_NEOX else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    x1, x2, cos, sin = (t.to(dtype) for t in (x[..., first], x[..., second], cos, sin))
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., first] = x1 * cos - x2 * sin
    y[..., second] = x2 * cos + x1 * sin
    return y


def _rows(positions: Tensor | None, table: Tensor, mrope: int) -> Tensor:
    """[T, rotary_dim], cosines, then sines, of each token."""
    if positions is None:
        return table
    rows = table[positions.clamp(0, table.shape[0] - 1)]
    if not mrope:
        return rows
    axes = torch.tensor(axes_of(mrope, table.shape[1] // 2) * 2, device=rows.device)
    return rows.gather(0, axes.expand(1, *rows.shape[1:])).squeeze(0)


def axes_of(mrope: int, half: int) -> list[int]:
    """Which of its token's positions each pair turns by."""
    time, height, width = sections_of(mrope)
    if mrope & INTERLEAVED:
        return [i % 3 if i < 3 * (time, height, width)[i % 3] else 0 for i in range(half)]
    return [0] * time + [1] * height + [2] * width


def sections_of(mrope: int) -> list[int]:
    return [mrope >> shift & 1023 for shift in (0, 10, 20)]


def positions_outside(positions: Tensor | None, table: Tensor) -> Tensor | None:
    """[T], whether a token has a position that isn't in the table; None where none can."""
    if positions is None:
        return None
    outside = (positions < 0) | (positions >= table.shape[0])
    return outside.any(0) if outside.ndim == 2 else outside


def poisoned(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x [T, heads, D] with NaN in these tokens."""
    return x if tokens is None else x.masked_fill(tokens[:, None, None], float("nan"))


@_rope.declares("check")
def check_rope(q, k, positions, cos_sin_cache, flags, mrope, *, name, takes=ROTARY_FLAGS, **more) -> dict[str, Any]:
    """Sizes T, heads, kv_heads and D; `takes`: flags that the operation knows, `more`: arguments for `check`."""
    sizes = check(
        name,
        q=(q, "T heads D", FLOATS),
        k=(k, "T kv_heads D", "q"),
        **more,
        positions=(positions, "3 T ?" if mrope else "T ?", INDICES),
        cos_sin_cache=(cos_sin_cache, "max_position rotary_dim", torch.float32),
    )
    for word, value, known in ("flags", flags, takes), ("mrope", mrope, INTERLEAVED * 2 - 1):
        if isinstance(value, bool) or not isinstance(value, int) or value & ~known:
            raise ValueError(f"{name}: {word} is {value!r}, expected bits of {known}")
    rows, rotary_dim = cos_sin_cache.shape
    if rotary_dim % 2 or rotary_dim > sizes["D"]:
        raise ValueError(f"{name}: cos_sin_cache has {rotary_dim} columns, expected an even number up to {sizes['D']}")
    if mrope and sum(sections_of(mrope)) != rotary_dim // 2:
        raise ValueError(f"{name}: mrope_section is {sections_of(mrope)}, expected a sum of {rotary_dim // 2}")
    if positions is None:
        if mrope:
            raise ValueError(f"{name}: mrope_section is given, but positions is None")
        if rows != sizes["T"]:
            raise ValueError(
                f"{name}: cos_sin_cache has {rows} rows, expected {sizes['T']}, one a token, without positions"
            )
    elif not rows and sizes["T"]:
        raise ValueError(f"{name}: cos_sin_cache has no rows, expected one for each position")
    else:
        check_indices(name, "positions", positions, 0, rows - 1)
    return sizes


def check_indices(op_name: str, name: str, indices: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all are from low to high; only on the CPU are the values looked at."""
    if indices.device.type != "cpu" or isinstance(indices, FakeTensor) or not indices.numel():
        return
    least, most = (int(value) for value in indices.aminmax())
    if least < low or most > high:
        raise ValueError(f"{op_name}: {name} has {least if least < low else most}, expected {low} to {high}")


@_qk_norm_rope.declares("check")
def _(q, k, positions, cos_sin_cache, q_weight, k_weight, eps, flags, mrope, gate=None, *, name):
    takes = ROTARY_FLAGS | NORM_FLAGS
    more = {"gate": (gate, "T heads G ?", "q")}
    sizes = check_rope(q, k, positions, cos_sin_cache, flags, mrope, name=name, takes=takes, **more)
    check_norms(name, sizes, q, q_weight, k_weight, eps, flags)


def check_norms(op_name: str, sizes: dict[str, Any], q: Tensor, q_weight, k_weight, eps, flags: int) -> None:
    check_eps(op_name, eps=eps)
    for name, weight, heads in ("q_weight", q_weight, sizes["heads"]), ("k_weight", k_weight, sizes["kv_heads"]):
        cols = sizes["D"] * (heads if flags & WHOLE_VECTOR else 1)
        if not cols:
            raise ValueError(f"{op_name}: {name[0]} is [T, {heads}, {sizes['D']}], expected at least one column")
        check(op_name, {"C": cols}, q=(q, "T heads D", FLOATS), **{name: (weight, "C ?", FLOATS)})


@_rope.declares("empty")
def _(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_qk_norm_rope.declares("empty")
def _(q, k, *rest):
    gate = rest[7] if len(rest) > 7 else None
    return q.new_empty(q.shape), k.new_empty(k.shape), None if gate is None else gate.new_empty(gate.shape)


def mrope_code(section: list[int] | None, interleaved: bool) -> int:
    if section is None:
        return 0
    time, height, width = section
    return time | height << 10 | width << 20 | INTERLEAVED * interleaved


def rotary_code(
    op_name: str,
    *,
    is_neox: bool = True,
    round_products: bool = False,
    mrope_section: Any = None,
    mrope_interleaved: bool = False,
    **unknown: Any,
) -> tuple[int, int]:
    """`RotaryOptions` as kernels take them: (flags, mrope)."""
    if unknown:
        raise TypeError(f"{op_name}: got an unexpected keyword argument {next(iter(unknown))!r}")
    flags = _ROTARY.get((is_neox, round_products)) if type(is_neox) is type(round_products) is bool else None
    if flags is None:
        boolean(op_name, is_neox=is_neox, round_products=round_products)
        raise AssertionError
    if mrope_section is None and mrope_interleaved is False:
        return flags, 0
    boolean(op_name, mrope_interleaved=mrope_interleaved)
    sizes = mrope_section if isinstance(mrope_section, (list, tuple)) else ()
    if len(sizes) != 3 or not all(type(n) is int and 0 <= n < 1024 for n in sizes) or not any(sizes):
        raise ValueError(f"{op_name}: mrope_section is {mrope_section!r}, expected three ints from 0 to 1023")
    return flags, mrope_code(list(sizes), mrope_interleaved)


_ROTARY = {(n, r): IS_NEOX * n + ROUND_PRODUCTS * r for n in (False, True) for r in (False, True)}


def qk_norm_flags(op_name: str, whole_vector: bool, weight_bias: float, round_before_weight: bool) -> int:
    boolean(op_name, whole_vector=whole_vector)
    return norm_flags(op_name, weight_bias, round_before_weight) | WHOLE_VECTOR * whole_vector


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    **rotary: Unpack[RotaryOptions],
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions; see the module for the formula.

    Args:
        q: [T, heads, D] bfloat16, float16 or float32 (S); k: [T, kv_heads, D] in S. Views of a packed qkv pass.
        positions: [T] int64 or int32, rows of `cos_sin_cache`; [3, T] with mrope_section; None: the cache's rows are
            this call's [T, rotary_dim].
        cos_sin_cache: float32 [max_position, rotary_dim], cosines, then sines; rotary_dim is even and at most D.
        out: (q, k) written instead of fresh tensors; may be the inputs.
        **rotary: see `RotaryOptions`.

    Returns:
        (q, k) rotated, contiguous, in S.

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a position is outside the cache; nothing
            is written.
    """
    return invoke(_rope, (q, k, positions, cos_sin_cache, *rotary_code("rope", **rotary)), _two("rope", out))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    *,
    whole_vector: bool = False,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    gate: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    **rotary: Unpack[RotaryOptions],
) -> tuple[Tensor, ...]:
    """`rms_norm` of every head of q and k, then `rope`, in one launch; bit for bit what the calls return.

    Args:
        q, k, positions, cos_sin_cache, out, **rotary: as in `rope`.
        q_weight, k_weight: [D], or with whole_vector [heads * D] and [kv_heads * D], in any of the three dtypes;
            None is the weightless norm. eps, weight_bias, round_before_weight: as in `rms_norm`.
        whole_vector: norm all heads of a token as one row (OLMo2, MiniMax-M2), instead of each.
        gate: [T, heads, G] in S, attention's output gate, which models project along with q (Qwen3-Next).

    Returns:
        (q, k) in S, contiguous; with a gate (q, k, round_S(1 / (1 + exp(-gate)))).

    Raises:
        TypeError, ValueError: as `rope`.
    """
    name = "qk_norm_rope"
    flags, mrope = rotary_code(name, **rotary)
    flags |= qk_norm_flags(name, whole_vector, weight_bias, round_before_weight)
    args = (q, k, positions, cos_sin_cache, q_weight, k_weight, eps, flags, mrope)
    outs = _two(name, out)
    if gate is None:
        return invoke(_qk_norm_rope, args, outs)
    return invoke(_qk_norm_rope, args, (*(outs or (None, None)), None), (gate,))


def _two(op_name: str, out: Any) -> tuple | None:
    if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 2):
        raise TypeError(f"{op_name}: out is {type(out).__name__}, expected (q, k)")
    return None if out is None else tuple(out)
