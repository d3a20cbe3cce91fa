"""Paged caches: a store of a block of heads of one token."""

import triton
import triton.language as tl

from .platform import narrow
from .quantize import encode, reciprocal


@triton.jit
def slot_of(slot_mapping, mapped, token, block_size, slots):
    """A token's (block, place in it), whether that exists, and whether there is none on purpose, or it exists."""
    slot = tl.load(slot_mapping + token, mask=token < mapped, other=-1).to(tl.int64)
    exists = (slot >= 0) & (slot < slots)
    known = exists | (slot == -1)
    slot = tl.where(exists, slot, 0)
    return (slot // block_size, slot % block_size), exists, known


@triton.jit
def write(cache, scale, slot, head, column, valid, x, K: tl.constexpr):
    """x [R, C] of the heads `head` [R, 1], as it is, or as codes with one scale, or one for each head."""
    pointer = cache.data + slot[0] * cache.strides[0] + slot[1] * cache.strides[1] + head * cache.strides[2] + column
    if K.cache is None:
        tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=valid)
    else:
        factor = reciprocal(tl.load(scale.data + head * scale.strides[0], mask=head < K.heads, other=1.0))
        tl.store(pointer, encode(x * factor, 0.0, K.cache).to(tl.uint8), mask=valid)
