"""Rotary embedding and what follows it: keys and values go straight into a paged cache.

    slot = slot_mapping[t];  k_cache[slot // block_size, slot % block_size] = k[t]       likewise v

A cache is logically [blocks, block_size, kv_heads, D], in any memory order: another one is a permuted view. It holds S,
or codes with a static scale, as `quantize` makes them: sat(round(k * (1 / scale))).

A token with slot -1, and one beyond the end of `slot_mapping` (padding), is rotated and not written. No two tokens have
the same slot. A slot outside the cache is an error on the CPU; on a GPU that token's q and k become NaN, and nothing is
written for it, nor for one whose position is outside the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey, formats
from quant.key import FP8, FP8_FNUZ

from ._check import FLOATS, INDICES, boolean, check, check_key
from ._gradient import refuse_backward_of
from ._memory import overlap, rows_overlap
from ._op import NO_KEY, Op, Written, invoke, op, refused
from .quantize import quantized
from .rope import (
    NORM_FLAGS,
    NORM_V,
    ROTARY_FLAGS,
    RotaryOptions,
    _rope,
    check_indices,
    check_norms,
    check_rope,
    normed,
    poisoned,
    positions_outside,
    qk_norm_flags,
    rotary_code,
)

CODES = (FP8, FP8_FNUZ, torch.int8)  # what a cache holds besides S


@op("q k q_scale", returns=1)
def _rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    k_cache: Written,
    v_cache: Written,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    flags: int,
    mrope: int,
    q_key: int = NO_KEY,
    q_given: Tensor | None = None,
):
    q, k = _rope.reference(q, k, positions, cos_sin_cache, flags, mrope)
    q, k = (_without(x, k_cache, slot_mapping) for x in (q, k))
    unwritten = positions_outside(positions, cos_sin_cache)
    write(k_cache, k, slot_mapping, k_scale, unwritten)
    write(v_cache, v, slot_mapping, v_scale, unwritten)
    if q_key == NO_KEY:
        return q, k, None
    data, scale, *_ = quantized(q, q_key, q_given, None)
    return data, k, scale


@op("q k q_scale gate", returns=1)
def _qk_norm_rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Written,
    v_cache: Written,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    flags: int,
    mrope: int,
    q_key: int = NO_KEY,
    q_given: Tensor | None = None,
    gate: Tensor | None = None,
):
    q, k = normed(q, q_weight, eps, flags), normed(k, k_weight, eps, flags)
    v = normed(v, None, eps, 0) if flags & NORM_V else v
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale)
    made = _rope_kv_cache_write.reference(q, k, v, positions, cos_sin_cache, *caches, flags, mrope, q_key, q_given)
    return *made, None if gate is None else gate.sigmoid()


def write(cache: Tensor, rows: Tensor, slots: Tensor, scale: Tensor | None, unwritten: Tensor | None) -> None:
    """The reference of a cache write; tokens in `unwritten` aren't."""
    rows = rows[: slots.shape[0]]
    keep = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    if unwritten is not None:
        keep &= ~unwritten[: slots.shape[0]]
    rows, slots = rows[keep], slots[keep].long()
    if scale is not None:
        rows = formats.encode(rows.float() * (1 / scale).view(-1, 1), cache.dtype)
        cache = cache.view(torch.uint8)
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def _without(x: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    """x, poisoned where a token's slot isn't in the cache."""
    outside = x.new_zeros(x.shape[0], dtype=torch.bool)
    outside[: slots.shape[0]] = (slots < -1) | (slots >= cache.shape[0] * cache.shape[1])
    return poisoned(x, outside)


def check_write(
    name: str, sizes: dict[str, Any], caches: dict[str, tuple], slots: Tensor, inputs: dict[str, Any]
) -> None:
    """Check slots, and caches given as name: (cache, its spec as `check` takes it, its scale's name, its scale).

    sizes: of the words in the specs. inputs: those of the operation, by name, of which the first has S.
    """
    q = next(iter(inputs.values()))
    like = {"q": (q, "T heads D", FLOATS)}
    check(name, **like, slot_mapping=(slots, "slots", INDICES))
    if slots.shape[0] > sizes["T"]:
        raise ValueError(f"{name}: slot_mapping is {list(slots.shape)}, expected at most {sizes['T']}, one a token")
    for cache_name, (cache, spec, scale_name, scale) in caches.items():
        check(name, sizes, **like, **{cache_name: (cache, spec, (q.dtype, *CODES))})
        check_cache_scale(name, scale_name, scale, cache_name, cache)
        if rows_overlap(cache):
            raise ValueError(f"{name}: {cache_name} has strides {cache.stride()}: its rows share memory")
        for input_name, tensor in {**inputs, "slot_mapping": slots, scale_name: scale}.items():
            if tensor is not None and overlap(cache, tensor):
                raise ValueError(f"{name}: {cache_name} shares memory with {input_name}")
    check_indices(name, "slot_mapping", slots, -1, cache.shape[0] * cache.shape[1] - 1)


def check_cache_scale(op_name: str, name: str, scale: Any, cache_name: str, cache: Tensor) -> None:
    """Raise unless a cache of codes has a scale, or one for each of its heads, and another has none."""
    if cache.dtype not in CODES:
        if scale is not None:
            raise ValueError(f"{op_name}: {name} is given, but {cache_name} is {cache.dtype}, which takes none")
        return
    heads = cache.shape[2] if cache.ndim == 4 else 1
    expected = "float32 [1]" if heads == 1 else f"float32 [1] or [{heads}]"
    if not isinstance(scale, Tensor):
        got = "None" if scale is None else type(scale).__name__
        raise TypeError(f"{op_name}: {name} is {got}, expected a Tensor, {expected}, for a cache of {cache.dtype}")
    if scale.ndim != 1 or scale.shape[0] not in (1, heads):
        raise ValueError(f"{op_name}: {name} is {list(scale.shape)}, expected {expected}")
    caches = {cache_name: (cache, "... D", cache.dtype)}
    check(op_name, **caches, **{name: (scale, str(scale.shape[0]), torch.float32)})


@_rope_kv_cache_write.declares("check")
def _check(
    q, k, v, positions, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, flags, mrope,
    q_key=NO_KEY, q_given=None, *, name, gate=None, norms=None,
):  # fmt: skip
    """`norms` are (q_weight, k_weight, eps) where the operation has them."""
    takes = ROTARY_FLAGS if norms is None else ROTARY_FLAGS | NORM_FLAGS | NORM_V
    more = {
        "gate": (gate, "T heads G ?", "q"),
        "v": (v, "T kv_heads Dv", "q"),
        "k_cache": (k_cache, "blocks block_size kv_heads D", (getattr(q, "dtype", None), *CODES)),
    }
    sizes = check_rope(q, k, positions, cos_sin_cache, flags, mrope, name=name, takes=takes, **more)
    if norms is not None:
        check_norms(name, sizes, q, *norms, flags)
    _check_q_key(name, q_key, q_given, q)
    shapes = "blocks block_size kv_heads D", "blocks block_size kv_heads Dv"
    caches = {"k_cache": (k_cache, shapes[0], "k_scale", k_scale), "v_cache": (v_cache, shapes[1], "v_scale", v_scale)}
    check(name, sizes, q=(q, "T heads D", FLOATS), v_cache=(v_cache, shapes[1], (*FLOATS, *CODES)))
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{name}: v_cache is {v_cache.dtype}, expected {k_cache.dtype} as k_cache")
    inputs = {"q": q, "k": k, "v": v, "positions": positions, "cos_sin_cache": cos_sin_cache}
    inputs |= {"q_scale": q_given, "gate": gate} | dict(zip(("q_weight", "k_weight"), norms or (), strict=False))
    check_write(name, sizes, caches, slot_mapping, inputs)
    if overlap(k_cache, v_cache):
        raise ValueError(f"{name}: v_cache shares memory with k_cache")


def _check_q_key(name: str, code: int, given: Tensor | None, q: Tensor) -> None:
    static = False
    if code != NO_KEY:
        key = QuantKey.from_code(code) if type(code) is int and code >= 0 else None
        static = key is not None and key.scale.static
        if key is None or not key.symmetric or key.scale2 is not None or (key.per_tensor and not static):
            got = code if key is None else key
            raise ValueError(f"{name}: q_quant_key is {got}, expected a symmetric key, static or with scales by head")
        if static and given is None:
            raise ValueError(f"{name}: q_scale is None, {key} takes a float32 tensor of one element")
        check_key(name, code, q.shape[-1], given if static else None, q.device, rows="q")
    if given is not None and not static:
        raise ValueError(f"{name}: q_scale is given, which only a static q_quant_key takes")


@_qk_norm_rope_kv_cache_write.declares("check")
def _(
    q, k, v, positions, cos_sin_cache, q_weight, k_weight, eps, k_cache, v_cache, slot_mapping, k_scale, v_scale, flags,
    mrope, q_key=NO_KEY, q_given=None, gate=None, *, name,
):  # fmt: skip
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale)
    more = {"gate": gate, "norms": (q_weight, k_weight, eps)}
    _check(q, k, v, positions, cos_sin_cache, *caches, flags, mrope, q_key, q_given, name=name, **more)


@_rope_kv_cache_write.declares("empty")
def _(q, k, *rest):
    return _empty(q, k, rest[10] if len(rest) > 10 else NO_KEY)


@_qk_norm_rope_kv_cache_write.declares("empty")
def _(q, k, *rest):
    given = tuple(rest[13:])
    code, _, gate = given + (NO_KEY, None, None)[len(given) :]
    return *_empty(q, k, code), None if gate is None else gate.new_empty(gate.shape)


def _empty(q: Tensor, k: Tensor, code: int) -> tuple:
    if code == NO_KEY:
        return q.new_empty(q.shape), k.new_empty(k.shape), None
    data, scale, _ = formats.empty(q.shape, QuantKey.from_code(code), q.device)
    return data, k.new_empty(k.shape), scale


def rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_quant_key: QuantKey | None = None,
    q_scale: Tensor | None = None,
    return_key: bool = False,
    out: Any = None,
    **rotary: Unpack[RotaryOptions],
) -> Any:
    """`rope` of q and k, and k and v into a paged cache, in one launch; see the module for the formula.

    Args:
        q, k, positions, cos_sin_cache, **rotary: as in `rope`.
        v: [T, kv_heads, Dv] in S.
        k_cache, v_cache: [blocks, block_size, kv_heads, D] and [.., Dv] in S, FP8 or int8; written. Rows of D elements
            are contiguous, whatever the order of the rest; the two may be views of one tensor.
        slot_mapping: int64 or int32, one for each of the first tokens; -1 writes nothing.
        k_scale, v_scale: float32 [1], or [kv_heads], of FP8 and int8 caches; positive: their values aren't looked at.
        q_quant_key: how q is quantized, rows being its heads: any symmetric key but FP8_DYNAMIC_TENSOR and NVFP4.
        q_scale: float32 [1], of a static q_quant_key.
        return_key: also return the rotated k, in S.
        out: q (and k, in a tuple, with return_key) to write instead of fresh tensors; may be the inputs.

    Returns:
        q [T, heads, D] in S or as a `QuantizedActivation`; with return_key (q, k).

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a position or a slot is out of range;
            nothing is written.
    """
    flags, mrope = rotary_code("rope_kv_cache_write", **rotary)
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale)
    args = (q, k, v, positions, cos_sin_cache, *caches, flags, mrope)
    return _run(_rope_kv_cache_write, args, q_quant_key, q_scale, return_key, out)


def qk_norm_rope_kv_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    whole_vector: bool = False,
    weight_bias: float = 0.0,
    round_before_weight: bool = False,
    norm_v: bool = False,
    gate: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_quant_key: QuantKey | None = None,
    q_scale: Tensor | None = None,
    return_key: bool = False,
    out: Any = None,
    **rotary: Unpack[RotaryOptions],
) -> Any:
    """`qk_norm_rope`, then what `rope_kv_cache_write` does, in one launch; bit for bit what the calls do.

    Args:
        q_weight, k_weight, eps, whole_vector, weight_bias, round_before_weight, gate: as in `qk_norm_rope`.
        norm_v: norm every head of v too, without a weight (Gemma 4).
        The others: as in `rope_kv_cache_write`.

    Returns:
        What `rope_kv_cache_write` does; with a gate its sigmoid behind that: (q, gate) or (q, k, gate).

    Raises:
        TypeError, ValueError: as `rope_kv_cache_write`.
    """
    name = "qk_norm_rope_kv_cache_write"
    boolean(name, norm_v=norm_v)
    flags, mrope = rotary_code(name, **rotary)
    flags |= qk_norm_flags(name, whole_vector, weight_bias, round_before_weight) | NORM_V * norm_v
    caches = (k_cache, v_cache, slot_mapping, k_scale, v_scale)
    args = (q, k, v, positions, cos_sin_cache, q_weight, k_weight, eps, *caches, flags, mrope)
    return _run(_qk_norm_rope_kv_cache_write, args, q_quant_key, q_scale, return_key, out, gate)


def _run(
    op: Op,
    args: tuple,
    key: QuantKey | None,
    q_scale: Tensor | None,
    return_key: bool,
    out: Any,
    gate: Tensor | None = None,
) -> Any:
    """The functional overload where q alone is asked for, in S; else the other one."""
    if key is q_scale is out is gate is None and return_key is False:
        return invoke(op, args)
    boolean(op.name, return_key=return_key)
    if key is not None and type(key) is not QuantKey:
        raise TypeError(f"{op.name}: q_quant_key is {type(key).__name__}, expected a QuantKey or None")
    if key is not None and key.code < 0:
        raise ValueError(f"{op.name}: q_quant_key has groups that span rows, as only a weight's do")
    args = (*args, NO_KEY if key is None else key.code, q_scale, *([] if gate is None else [gate]))
    outs: dict[str, Tensor | None] = {}
    written: dict[str, Tensor | None] = {}
    try:
        q, k = _given(op.name, key, return_key, out)
        fresh = dict(zip(op.outputs, op.empty(*args), strict=True))
        dynamic = key is not None and not key.scale.static
        data, scale = (q.data, q.scale) if isinstance(q, QuantizedActivation) else (q, None)
        outs = {"q": fresh["q"] if data is None else data}
        outs |= {"k": fresh["k"] if k is None else k} if return_key else {}
        outs |= {"q_scale": fresh["q_scale"] if scale is None else scale} if dynamic else {}
        outs |= {} if gate is None else {"gate": fresh["gate"]}
        written = {f"{name}_out": tensor for name, tensor in outs.items()}
        op.out(*args, **written)
    except Exception as error:
        refused(op, args, error, written)
        raise
    refuse_backward_of(op.name, args, outs.values())
    q = outs["q"]
    if key is not None:
        q = QuantizedActivation(q, outs["q_scale"] if dynamic else q_scale, key, args[0].dtype)
    results = (q, *([outs["k"]] if return_key else []), *([outs["gate"]] if gate is not None else []))
    return results[0] if len(results) == 1 else results


def _given(op_name: str, key: QuantKey | None, return_key: bool, out: Any) -> tuple[Any, Any]:
    """(q, k) of `out`, each or None."""
    if out is None:
        return None, None
    q: Any
    q, *k = out if return_key and isinstance(out, (tuple, list)) and len(out) == 2 else (out,)
    kind = Tensor if key is None else QuantizedActivation
    if not isinstance(q, kind) or len(k) != return_key:
        expected = f"(a {kind.__name__}, k)" if return_key else f"a {kind.__name__}"
        raise TypeError(f"{op_name}: out is {type(out).__name__}, expected {expected}")
    if isinstance(q, QuantizedActivation) and q.quant_key != key:
        raise ValueError(f"{op_name}: out is {q.quant_key}, expected {key}")
    return (q, *k) if k else (q, None)
