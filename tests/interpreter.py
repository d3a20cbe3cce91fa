"""Triton's interpreter as the tests need it: with a fused multiply-add that is one.

It runs kernels on NumPy, where x * y + z rounds twice.
"""

import numpy as np
from triton.runtime import interpreter


def fma(builder, x, y, z):
    """One rounding: in float64 the product is exact, and a sum whose last bit says that it isn't rounds right again."""
    product, addend = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    total = np.where(inexact, np.nextafter(total, toward), total)
    return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


def install() -> None:
    interpreter.InterpreterBuilder.create_fma = fma
