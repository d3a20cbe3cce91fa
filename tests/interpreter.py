"""Triton's interpreter as the tests need it: with a fused multiply-add that is one, and two and a half times as fast.

It runs kernels on NumPy, where x * y + z rounds twice, and prepares the language anew for every device function.
"""

import warnings

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


def splat(builder, ret_ty, arg):
    """In the dtype that it is held in: the handle of a comparison says int64."""
    value = arg.data[0] if arg.data.ndim else arg.data
    return interpreter.TensorHandle(np.full(ret_ty.shape, value, dtype=arg.data.dtype), arg.dtype.scalar)


def dot(builder, a, b, total, input_precision, max_num_imprecise_acc):
    """In float64, rounded once: a row's bits don't depend on its place in a tile, as they do in NumPy's float32. Sums
    of integers are exact.
    """
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + total.data
    return interpreter.TensorHandle(product.astype(total.data.dtype), total.dtype.scalar)


_prepared: set[str] = set()


def call(self, *args, **kwargs):
    """A device function. The kernel that calls it has prepared the language, but for Triton's own modules."""
    module = self.fn.__module__
    if module.startswith("triton.") and module not in _prepared:
        _prepared.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


_launch = interpreter.GridExecutor.__call__


def launch(executor, *args, **kwargs):
    """Kernels overflow and make NaN on purpose, also of whole rows, whose maximum NumPy warns of."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _launch(executor, *args, **kwargs)


def install() -> None:
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_splat = splat
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch
