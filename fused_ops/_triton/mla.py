"""MLA on a GPU: attention over the latents, with both projections moved to the queries and the results.

    q_lat[t, h] = q_nope[t, h] w_uk[h]
    o[t, h] = attention of [q_lat, q_pe] over keys [c, k_pe] and values c
    y[t, h] = o[t, h] w_uv[h]^T

q_lat and o, the results over latents, are rounded to S, the operands of products of matrices; they are made for so many
tokens at a time that both take at most WORKSPACE bytes. All sequences are absorbed, also those where `absorbs` says
that fewer products would do: that takes keys and values of every head in memory, of a size that the host would have to
read. So here a row doesn't depend on the number of queries that come with it, and prefill takes up to (2 * rank + rope)
/ (nope + rope + v) times the products, 3.4 in DeepSeek-V3.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import triton
import triton.language as tl
from torch import Tensor

from . import attention_launch as launches
from .attention_launch import Call, Results
from .epilogue import store, store_given_scale, with_places
from .launch import next_power_of_two, on_device
from .platform import dot, round_to
from .quantize import PLACES
from .row import Rows

SLICE = 128  # tokens, a tile of swizzled scales: the tokens of a slice are a multiple


@dataclass(frozen=True)
class Projection:
    """A kernel is compiled for it."""

    tokens: int  # of a tile
    cols: int  # that are multiplied,
    chunk: int  # so many at a time
    blocks: int  # of a head's results, each a slice of a row


@triton.jit(do_not_specialize=["tokens", *PLACES])
def project_kernel(
    x, weight, tokens: tl.int64, out,
    scale_row: tl.int64, scale_column: tl.int64, zero_row: tl.int64, zero_column: tl.int64,
    K: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """y[t, h] = x[t, h] weight[h]^T of a tile of tokens and a slice of the results; weight [H, results, cols]."""
    S: tl.constexpr = x.data.dtype.element_ty
    out = with_places(out, scale_row, scale_column, zero_row, zero_column, E)
    token = tl.program_id(0).to(tl.int64) * K.tokens + tl.arange(0, K.tokens)
    active = token < tokens
    store_given_scale(out, E)
    place = tl.program_id(1).to(tl.int64)
    head = place // K.blocks
    i = tl.arange(0, E.block)
    result = place % K.blocks * E.cols + i

    y = tl.zeros((K.tokens, E.block), tl.float32)
    for first in range(0, K.cols, K.chunk):
        column = (first + tl.arange(0, K.chunk)).to(tl.int64)
        within = column < K.cols
        a = x.data + (token * x.strides[0] + head * x.strides[1])[:, None] + column[None, :]
        b = weight.data + head * weight.strides[0] + result[None, :] * weight.strides[1]
        b += column[:, None] * weight.strides[2]
        held = tl.load(a, mask=active[:, None] & within[None, :], other=0.0)
        y = dot(held, tl.load(b, mask=within[:, None] & (i < E.cols)[None, :], other=0.0), y)
    store(out, tokens, token, place + token * 0, active, round_to(y, S), S, E)


def project(x: Tensor, weight: Tensor, r: Results) -> None:
    """[T, H, cols] by [H, results, cols], in any strides."""
    tokens, heads, cols = x.shape
    results = weight.shape[1]
    blocks = results // 128 if results % 128 == 0 and r.key is None else 1
    plan = launches.plan_of(
        ("project", blocks, heads), (x, weight), r, lambda: projection_for(cols, blocks, x.element_size()),
        results // blocks, heads * blocks,
    )  # fmt: skip
    k = plan.kernel
    tiles = -(-launches.tail_rows(tokens, r, plan.slice) // k.tokens)
    if tiles:
        rows = Rows(x, x.stride()[:-1]), Rows(weight, weight.stride())
        arguments = (*rows, tokens, *launches.output_of(r), k, plan.slice)
        on_device(x.device, lambda: plan.start("project", project_kernel, (tiles, heads * blocks, 1), arguments, 4))


@lru_cache(4096)
def projection_for(cols: int, blocks: int, element: int) -> Projection:
    return Projection(64 if element == 2 else 16, cols, max(16, min(64, next_power_of_two(cols))), blocks)


def run(args: tuple, r: Results) -> None:
    q_nope, q_pe, kv_cache, w_uk, w_uv, tables, lengths, starts, scale, kv_scale = args
    tokens, heads, _ = q_nope.shape
    rank = w_uk.shape[2]
    cache = kv_cache.unsqueeze(2)
    latent, turned = cache[..., :rank], (cache[..., rank:] if q_pe.shape[2] else None)
    most = launches.WORKSPACE // (2 * heads * rank * q_nope.element_size())
    most = min(max(tokens, 1), max(SLICE, most // SLICE * SLICE))
    q_latent, o = (q_nope.new_empty(most, heads, rank) for _ in range(2))
    to_latents = w_uk.transpose(1, 2)

    for first in range(0, max(tokens, 1), most):
        rows = slice(first, min(first + most, tokens))
        queries, results = (t[: rows.stop - rows.start] for t in (q_latent, o))
        project(q_nope[rows], to_latents, Results(y=queries.flatten(1)))
        rotated = q_pe[rows] if q_pe.shape[2] else None
        call = Call(
            queries, latent, None, tables, lengths, starts, scale, k_scale=kv_scale, v_scale=kv_scale, q_rope=rotated,
            k_rope=turned, tokens=tokens, first=first,
        )  # fmt: skip
        launches.launch(call, Results(y=results.flatten(1)))
        part = r if rows == slice(0, tokens) else r.rows(rows, heads * w_uv.shape[1])
        launches.quantized(part, results, w_uv.shape[1], partial(project, results, w_uv))
