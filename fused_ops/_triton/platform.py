"""The vocabulary of kernels: rows in memory, values of S, sums whose order is their own.

Everything here gives the same bits on every target and in Triton's interpreter.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
FAR = tl.constexpr(1 << 62)


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def is_nan(x):
    return (bits(x) & MAGNITUDE) > INFINITY


@triton.jit
def widen(x):
    """float32 of bfloat16, float16 or float32."""
    if x.dtype == tl.bfloat16:
        return from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, S: tl.constexpr):
    """x rounded to S, to nearest even."""
    if S.name == "bf16" and INTERPRETED:  # whose cast truncates
        b = bits(x)
        b = tl.where(is_nan(x), 0x7FFF0000, b + 0x7FFF + ((b >> 16) & 1))
        return (b >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(S)


@triton.jit
def round_to(x, S: tl.constexpr):
    return widen(narrow(x, S))


# --- numbers of a call ---


def number(n: int) -> int:
    """As it goes into a kernel's tuple: Triton compiles for integers there that are 1, a multiple of 16, or of 32 bits,
    whatever `do_not_specialize` says, and these are none of it.
    """
    return FAR.value + 2 * n + 1


@triton.jit
def value_of(number):
    """int64; the n of `number(n)`."""
    return (number - FAR) >> 1


# --- rows ---


@triton.jit
def at(rows, sizes, row):
    """Pointers to the first element of each of `row`, int64 numbers of rows [R].

    rows: (pointer, a stride for each leading dimension).
    sizes: those dimensions but the first, the same for every tensor of a call, as `number`s.
    """
    offset = row * 0
    for d in tl.static_range(len(sizes), 0, -1):
        size = value_of(sizes[d - 1])
        offset += row % size * rows.strides[d]
        row = row // size
    return rows.data + (offset + row * rows.strides[0])


@triton.jit
def load_rows(rows, sizes, row, column, valid):
    """float32 [R, C] of these columns, zero where not `valid`."""
    return widen(tl.load(at(rows, sizes, row)[:, None] + column, mask=valid, other=0.0))


@triton.jit
def store_rows(rows, sizes, row, column, valid, x):
    pointer = at(rows, sizes, row)[:, None] + column
    tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=valid)


# --- over a row ---


@triton.jit
def row_sum(x):
    """float32 [R, 1] of [R, C]: a tree of pairs, of neighbours among eight, then of halves.

    Triton adds up an axis in an order that follows from how the compiler laid it out over threads, which changes with
    alignment, key and neighbouring stages. An axis of two has one order only, since addition commutes. These are the
    pairs of a thread's own eight elements, then of its registers, then of warps and lanes.
    """
    for _ in tl.static_range(min(3, log2(x.shape[1]))):
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return halves_sum(x)


@triton.jit
def halves_sum(x):
    """float32 [R, 1] of [R, C]: a tree of halves, the order that suits a matrix product's registers."""
    for _ in tl.static_range(log2(x.shape[1])):
        x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), axis=1)
    return x


# --- products of matrices ---


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32, of bfloat16, float16 or float32: exact products, added in the order of the target's
    instruction, the same for every row of a tile.
    """
    if INTERPRETED:  # which multiplies the bits of bfloat16
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")
