"""Gated activations: loads of a block of rows. Numerics are those of csrc/activation.inc."""

import triton
import triton.language as tl

from .platform import bits, from_bits, load_rows, round_to


@triton.jit
def one_plus_exp_minus(g, rest, S: tl.constexpr):
    """1 + e^-(g + rest) to about an ulp, where rest is less than an ulp of g. NaN gives anything.

    e^-g = 2^n * e^r with |r| <= ln(2) / 2 and a polynomial for e^r; it is kept at half its size until the last step, so
    that it overflows where float32 does.
    """
    MAGIC: tl.constexpr = 12582911.0  # 1.5 * 2^23 - 1: a sum's last bits are n - 1
    inside = tl.where(g > -89.0, g, -89.0)
    inside = tl.where(inside < 80.0, inside, 80.0)
    rest = tl.where(inside == g, rest, 0.0)
    g = inside
    shifted = tl.fma(g, -1.44269504, MAGIC)
    n = shifted - MAGIC
    if S.name == "fp32":
        r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, -g)) - rest
    else:
        r = tl.fma(n, -0.693147182, -g) - rest
    r2 = r * r
    q = tl.fma(r, 8.36874545e-3, 4.1668389e-2)
    q = tl.fma(r2, 1.38145406e-3, q)
    q = tl.fma(r2, q, tl.fma(r, 0.166665211, 0.49999994))
    p = tl.fma(r2, q, r) + 1.0
    return tl.fma(from_bits(bits(p) + (bits(shifted) << 23)), 2.0, 1.0)


@triton.jit
def gelu_exponent(g, S: tl.constexpr):
    """2 * sqrt(2 / pi) * (g + 0.044715 * g^3), as a float32 and what it lacks: gelu_tanh is g / (1 + e^-that).

    Its rounding error, times itself, is that of e to that power: float32 results need the bits that float32 lacks.
    """
    FACTOR: tl.constexpr = 1.5957691216057308
    CUBE: tl.constexpr = 0.044715 * 1.5957691216057308
    if S.name == "fp32":
        x = g.to(tl.float64)
        exact = x * (x * x * CUBE + FACTOR)
        rounded = exact.to(tl.float32)
        rest = (exact - rounded.to(tl.float64)).to(tl.float32)
        return rounded, tl.where(rest == rest, rest, 0.0)  # of infinities
    else:
        return g * tl.fma(g * g, CUBE, FACTOR), 0.0


@triton.jit
def activate(g, alpha, S: tl.constexpr, K: tl.constexpr):
    """round_S(act(g)), or, unless K.round_activation, act(g)."""
    if K.load == "silu":
        a = tl.div_rn(g, one_plus_exp_minus(g, 0.0, S))
    elif K.load == "gelu_tanh":
        exponent, rest = gelu_exponent(g, S)
        a = tl.div_rn(g, one_plus_exp_minus(exponent, rest, S))
    elif K.round_activation:
        a = g * round_to(tl.div_rn(1.0, one_plus_exp_minus(round_to(g * alpha, S), 0.0, S)), S)
    else:
        a = tl.div_rn(g, one_plus_exp_minus(g * alpha, 0.0, S))
    if K.round_activation:
        a = round_to(a, S)
    return a


@triton.jit
def gated(g, u, alpha, limit, S: tl.constexpr, K: tl.constexpr):
    if K.load == "swiglu_oai":
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
        if K.round_activation:
            u = round_to(u, S)
    return round_to(activate(g, alpha, S, K) * u, S)


@triton.jit
def load_pairs(rows, sizes, row, active, begin, K: tl.constexpr):
    """Gate and up, from the column `begin` on, of a tensor in which they alternate."""
    i = 2 * begin + tl.arange(0, 2 * K.block)[None, :]
    both = load_rows(rows, sizes, row, i, active[:, None] & (i < 2 * K.cols))
    return tl.split(tl.reshape(both, (both.shape[0], K.block, 2)))


@triton.jit
def relu2(x, S: tl.constexpr):
    positive = tl.where(x < 0.0, 0.0, x)
    return round_to(positive * positive, S)
