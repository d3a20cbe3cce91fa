"""MLA on a GPU: attention over the latents, with both projections moved to the queries and the results.

    q_lat[t, h] = q_nope[t, h] w_uk[h]
    o[t, h] = attention of [q_lat, q_pe] over keys [c, k_pe] and values c
    y[t, h] = o[t, h] w_uv[h]^T

q_lat and o, the results over latents, are rounded to S, the operands of products of matrices. All sequences are
absorbed, also those where `absorbs` says that fewer products would do: that takes keys and values of every head in
memory, of a size that the host would have to read. So here a row doesn't depend on the number of queries that come
with it, and prefill takes up to (2 * rank + rope) / (nope + rope + v) times the products, 3.4 in DeepSeek-V3.
"""

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .attention import store, store_given_scale
from .attention_launch import Call, Results, launch, output_of, quantized, slice_of, tail_rows
from .launch import OPTIONS, next_power_of_two, on_device
from .platform import dot, round_to
from .row import Rows


@dataclass(frozen=True)
class Projection:
    """A kernel is compiled for it."""

    tokens: int  # of a tile
    cols: int  # that are multiplied,
    chunk: int  # so many at a time
    blocks: int  # of a head's results, each a slice of a row


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(x, weight, tokens, out, K: tl.constexpr, E: tl.constexpr):
    """y[t, h] = x[t, h] weight[h]^T of a tile of tokens and a slice of the results; weight [H, results, cols]."""
    S: tl.constexpr = x.data.dtype.element_ty
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
    e = slice_of(r.key, results // blocks, heads * blocks)
    k = projection_for(cols, blocks, x.element_size())
    tiles = -(-tail_rows(tokens, r, e) // k.tokens)
    if tiles:
        arguments = (Rows(x, x.stride()[:-1]), Rows(weight, weight.stride()), tokens, output_of(r, e), k, e)
        grid = (tiles, heads * blocks)
        on_device(x.device, lambda: project_kernel[grid](*arguments, num_warps=4, num_stages=2, **OPTIONS))


@lru_cache(4096)
def projection_for(cols: int, blocks: int, element: int) -> Projection:
    return Projection(64 if element == 2 else 16, cols, max(16, min(64, next_power_of_two(cols))), blocks)


def run(args: tuple, r: Results) -> None:
    q_nope, q_pe, kv_cache, w_uk, w_uv, tables, lengths, starts, scale, kv_scale = args
    tokens, heads, _ = q_nope.shape
    rank = w_uk.shape[2]
    cache = kv_cache.unsqueeze(2)
    latent, turned = cache[..., :rank], cache[..., rank:]
    q_latent, o = (q_nope.new_empty(tokens, heads, rank) for _ in range(2))
    project(q_nope, w_uk.transpose(1, 2), Results(y=q_latent.flatten(1)))
    scales = {"k_scale": kv_scale, "v_scale": kv_scale}
    rope = {"q_rope": q_pe, "k_rope": turned} if q_pe.shape[2] else {}
    call = Call(q_latent, latent, None, tables, lengths, starts, scale, **scales, **rope)
    launch(call, Results(y=o.flatten(1)))
    quantized(r, o, w_uv.shape[1], lambda direct: project(o, w_uv, direct))
