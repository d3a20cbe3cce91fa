"""Attention over a paged cache, alone and with the quantization of its output in the kernel's epilogue.

    s[i, j] = scale * (q[i] . k[j])               soft_cap: s = soft_cap * tanh(s / soft_cap)
    y[i] = sum_j exp(s[i, j]) * v[j] / (sum_j exp(s[i, j]) + exp(sink))         in float32, then once to S

for each head; keys and values of a cache that holds codes are their exact values, k = code * k_scale. Queries are the
last tokens of their sequences: the one at place p of its sequence sees keys j <= p, with a sliding window j > p -
window; all keys where `causal=False`. A sink is one more logit of each head, which weighs nothing.

A sequence of L tokens, of which the last n are queries, is: n rows of q, L in `seq_lens`, and the blocks of its cache
in `block_tables`. Prefill (n = L), its continuation in chunks, and decoding (n = 1) may stand side by side.

A row depends on its own query and on the keys and values it sees, on nothing else: not on other sequences, on the
number of queries that come with it, on blocks' places in memory, or on what later keys are.

A table's entry is read if one of the sequence's queries in the call sees a key of its block. Others may be anything:
those behind the sequence's last block, and those whose keys all lie before a sliding window, which a cache may free.

A number that is out of range (a block outside the cache, more queries than tokens, more tokens than the table has
blocks for, a `query_start_loc` that goes back or beyond q) is an error on the CPU; on a GPU the sequence's rows of y,
or those that would see the block, become NaN. Rows of q that belong to no sequence (padding) give zeros.

Source: Vaswani et al., "Attention is all you need", 2017, section 3.2.1; Kwon et al., "Efficient memory management for
LLM serving with PagedAttention", 2023; soft_cap: Gemma Team, "Gemma 2", 2024; sinks: OpenAI, "gpt-oss", 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Unpack

from quant import QuantizedActivation, QuantKey

from ._check import FLOAT32_MAX, FLOATS, INDICES, boolean, check, number
from ._op import Op, invoke, op
from .kv_cache import CODES, check_cache_scale
from .quantize import plain_out, quantizing, run_quant

MOST_TOKENS = 1 << 62  # of a sequence


class OutputOptions(TypedDict, total=False):
    """What attention takes besides its `output_quant_key`: `QuantOptions`, since `scale` is the logits'.

    `**o_proj.input_quant("output_")` of the linear layer that follows gives the key and all that the layer knows.
    """

    output_scale: Tensor | None
    output_scale2: Tensor | None
    output_zero_point: Tensor | None
    output_scale_ub: Tensor | None
    output_pad_rows: int
    keep_unquantized: bool
    out: Any


@op("y")
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    causal: bool,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
):
    tokens, heads, _ = q.shape
    y = q.new_zeros(tokens, heads, v_cache.shape[-1])
    for rows, slots in sequences(tokens, k_cache, block_tables, seq_lens, query_start_loc, sliding_window):
        if slots is None:
            y[rows] = float("nan")
            continue
        k, v = (
            cached(c, slots, s).repeat_interleave(heads // c.shape[2], 1)
            for c, s in ((k_cache, k_scale), (v_cache, v_scale))
        )
        logits = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * scale
        if soft_cap:
            logits = torch.tanh(logits / soft_cap) * soft_cap
        seen = visible(logits, sliding_window) if causal else torch.ones_like(logits[0], dtype=torch.bool)
        y[rows] = attended(logits, seen, v, sinks).to(q.dtype)
    return y.flatten(1)


def sequences(
    tokens: int,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    sliding_window: int = 0,
) -> Iterator[tuple[slice, Tensor | None]]:
    """(its rows, the slots of the keys that they see) of each sequence that has rows; None for slots out of range."""
    size, limit = cache.shape[1], cache.shape[0]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for i, length in enumerate(lengths):
        start, end = starts[i : i + 2]
        rows = slice(max(start, 0), min(max(end, 0), tokens))
        inside = 0 <= start <= end <= tokens and end - start <= length <= min(block_tables.shape[1] * size, MOST_TOKENS)
        first = first_seen(length, end - start, sliding_window)
        blocks = block_tables[i, used_blocks(first, length, size)].long() if inside else None
        if blocks is not None and bool(((blocks < 0) | (blocks >= limit)).any()):
            blocks = None
        if rows.start >= rows.stop:
            continue
        if blocks is None:
            yield rows, None
            continue
        places = torch.arange(first, length, device=cache.device)
        yield rows, blocks[places // size - first // size] * size + places % size


def first_seen(length: int, queries: int, sliding_window: int) -> int:
    """The first key that one of the last `queries` of so many tokens sees."""
    return max(0, length - queries + 1 - sliding_window) if sliding_window else 0


def used_blocks(first: int, length: int, size: int) -> slice:
    """Of a row of `block_tables`, those that hold keys [first, length)."""
    size = max(size, 1)
    return slice(first // size, -(-length // size))


def cached(cache: Tensor, slots: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of a cache, as float32 values."""
    rows = cache[slots // cache.shape[1], slots % cache.shape[1]].float()
    return rows if scale is None else rows * scale.view(-1, 1)


def visible(logits: Tensor, sliding_window: int) -> Tensor:
    """bool [queries, keys] of logits [..., queries, keys], which are the last queries of a sequence."""
    queries, keys = logits.shape[-2:]
    ahead = torch.arange(keys, device=logits.device) - torch.arange(keys - queries, keys, device=logits.device)[:, None]
    return ahead <= 0 if not sliding_window else (ahead <= 0) & (ahead > -sliding_window)


def attended(logits: Tensor, seen: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """[queries, heads, D] of logits [heads, queries, keys] and v [keys, heads, D]; sinks are a logit more a head."""
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1)[..., : seen.shape[-1]]
    finite = v.isfinite()
    y = torch.einsum("hqk,khd->qhd", weights, v.where(finite, 0))
    for key in (~finite).flatten(1).any(1).nonzero().flatten().tolist():  # those who don't see it have nothing of it
        y[seen[:, key]] += weights[:, seen[:, key], key].T[..., None] * v[key].masked_fill(finite[key], 0)
    return y


@_paged_attention.declares("check")
def _(
    q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, causal, sliding_window, soft_cap, sinks,
    k_scale, v_scale, *, name,
):  # fmt: skip
    held = (getattr(q, "dtype", None), *CODES)
    sizes = check(
        name,
        q=(q, "T heads D", FLOATS),
        k_cache=(k_cache, "blocks block_size kv_heads D", held),
        v_cache=(v_cache, "blocks block_size kv_heads Dv", "k_cache"),
        sinks=(sinks, "heads ?", FLOATS),
    )
    heads, kv_heads, cols = sizes["heads"], sizes["kv_heads"], sizes["Dv"]
    for tensor, counted, least in (q, "q", heads), (k_cache, "k_cache", kv_heads), (v_cache, "v_cache", cols):
        if not least or not sizes["D"]:
            raise ValueError(f"{name}: {counted} is {list(tensor.shape)}, expected at least one head and column")
    if heads % kv_heads:
        raise ValueError(
            f"{name}: q has {heads} heads, expected a multiple of k_cache's {kv_heads}; a cache is "
            "[blocks, block_size, kv_heads, D], a permuted view where memory has another order"
        )
    _check_options(name, scale, causal, sliding_window, soft_cap)
    for scale_name, cache_scale in ("k_scale", k_scale), ("v_scale", v_scale):
        check_cache_scale(name, scale_name, cache_scale, f"{scale_name[0]}_cache", k_cache)
    check_sequences(name, q, k_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    return heads * cols


def _check_options(op_name: str, scale: Any, causal: Any, sliding_window: Any, soft_cap: Any) -> None:
    """Of `paged_attention`, as the operation takes them: 0 is none."""
    check_logits(op_name, scale)
    boolean(op_name, causal=causal)
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, (int, torch.SymInt)):
        raise TypeError(f"{op_name}: sliding_window is {type(sliding_window).__name__}, expected an int or None")
    if not 0 <= sliding_window < 1 << 63:
        raise ValueError(f"{op_name}: sliding_window is {sliding_window}, expected at least 1, or None")
    if sliding_window and not causal:
        raise ValueError(f"{op_name}: sliding_window is {sliding_window} with causal=False, expected None")
    number(op_name, soft_cap=soft_cap)
    if not 0 <= soft_cap <= FLOAT32_MAX:
        raise ValueError(f"{op_name}: soft_cap is {soft_cap}, expected a positive float32, or None")


def check_logits(op_name: str, scale: Any) -> None:
    number(op_name, scale=scale)
    if not abs(scale) <= FLOAT32_MAX:
        raise ValueError(f"{op_name}: scale is {scale}, expected a finite float32")


def check_sequences(
    op_name: str, q: Tensor, cache: Tensor, block_tables, seq_lens, query_start_loc, sliding_window: int = 0
) -> None:
    """Raise where tensors don't name sequences, or, on the CPU, where their numbers are out of range."""
    like = {"q": (q, "T heads D", FLOATS)}
    tables = {
        "block_tables": (block_tables, "sequences columns", INDICES),
        "seq_lens": (seq_lens, "sequences", INDICES),
    }
    sizes = check(op_name, **like, **tables)
    check(op_name, {"S+1": sizes["sequences"] + 1}, **like, query_start_loc=(query_start_loc, "S+1", INDICES))
    if q.device.type != "cpu" or any(isinstance(t, FakeTensor) for t in (q, block_tables, seq_lens, query_start_loc)):
        return
    blocks, size = cache.shape[:2]
    first = query_start_loc[:1].tolist()
    if first != [0]:
        raise ValueError(f"{op_name}: query_start_loc starts with {first[0]}, expected 0")
    for i, (length, table) in enumerate(zip(seq_lens.tolist(), block_tables, strict=True)):
        start, end = query_start_loc[i : i + 2].tolist()
        if not start <= end <= q.shape[0]:
            raise ValueError(
                f"{op_name}: query_start_loc goes from {start} to {end} at {i}, expected no less, up to {q.shape[0]}"
            )
        if length < end - start:
            raise ValueError(
                f"{op_name}: seq_lens has {length} at {i}, expected at least its {end - start} queries, which count"
            )
        if length > min(sizes["columns"] * size, MOST_TOKENS):
            room = f"block_tables' {sizes['columns']} columns x {size} tokens"
            raise ValueError(f"{op_name}: seq_lens has {length} at {i}, expected at most {room}")
        used = used_blocks(first_seen(length, end - start, sliding_window), length, size)
        outside = (table[used] < 0) | (table[used] >= blocks)
        if outside.any():
            column = used.start + int(outside.int().argmax())
            expected = f"0 to {blocks - 1}" if blocks else "none, since the cache has no blocks"
            raise ValueError(
                f"{op_name}: block_tables has {int(table[column])} at [{i}, {column}], expected {expected}"
            )


@_paged_attention.declares("empty")
def _(q, k_cache, v_cache, *_):
    return q.new_empty(q.shape[0], q.shape[1] * v_cache.shape[-1])


_paged_attention_quant = quantizing(_paged_attention, "output_", one_scale=False, case_every=12)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    output_quant_key: QuantKey | None = None,
    **output: Unpack[OutputOptions],
) -> Tensor | QuantizedActivation:
    """Attention of the last tokens of sequences over their paged keys and values; see the module for the formula.

    Args:
        q: [T, heads, D] bfloat16, float16 or float32 (S), rotated; the queries of a sequence side by side.
        k_cache, v_cache: [blocks, block_size, kv_heads, D] and [.., Dv] in S, FP8 or int8, the queries' own keys and
            values included; in any memory order. kv_heads divides heads: head h reads h // (heads / kv_heads).
        block_tables: int32 or int64 [sequences, columns], the blocks of each in order; entries behind its last block
            aren't read, nor those whose keys lie before the sliding window of every query here: they may be anything.
        seq_lens: int32 or int64 [sequences], tokens of each, its queries included.
        query_start_loc: int32 or int64 [sequences + 1], ascending from 0: where each one's rows of q begin.
        scale: of the logits, usually 1 / sqrt(D).
        causal: whether a query sees the keys up to its own only. sliding_window: and of those the last so many.
        soft_cap: bound of the logits. sinks: [heads], one logit more a head, in any of the three dtypes.
        k_scale, v_scale: float32 [1], or [kv_heads], of FP8 and int8 caches; positive: their values aren't looked at.
        output_quant_key: how the rows of y are quantized; any key but FP8_DYNAMIC_TENSOR.
        **output: see `OutputOptions`.

    Returns:
        [T, heads * Dv] in S, or as a `QuantizedActivation`, bit for bit what `quantize` makes of the former.

    Raises:
        TypeError, ValueError: an argument is not as above, or (on the CPU) a number is out of range; nothing is
            written.
    """
    name = "paged_attention"
    window, cap = 0 if sliding_window is None else sliding_window, 0.0 if soft_cap is None else soft_cap
    _check_options(name, scale, causal, window, cap)  # as given: torch would convert what it isn't
    if sliding_window == 0 or soft_cap == 0:
        wrong = "sliding_window is 0" if sliding_window == 0 else f"soft_cap is {soft_cap}"
        raise ValueError(f"{name}: {wrong}, expected a positive number, or None")
    inputs = (q, k_cache, v_cache, block_tables, seq_lens, query_start_loc)
    args = (*inputs, scale, causal, window, cap, sinks, k_scale, v_scale)
    return run_attention(_paged_attention, _paged_attention_quant, args, output_quant_key, output)


def run_attention(plain: Op, fused: Op, args: tuple, key: QuantKey | None, output: OutputOptions) -> Any:
    options: Any = output
    if output:
        for name in output:
            if name not in OutputOptions.__annotations__:
                raise TypeError(f"{plain.name}: got an unexpected keyword argument {name!r}")
        options = {name.removeprefix("output_"): value for name, value in output.items()}
    if key is not None:
        return run_quant(fused, args, key, options)
    out = plain_out(plain.name, options, "output_")
    return invoke(plain, args, None if out is None else (out,))
