"""docs/numerics.md once more, in numpy and ml_dtypes, a group at a time: what `quant.formats` must give."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quant import QuantKey
from quant.key import E8M0, FP4, FP8, FP8_FNUZ

NUMPY = {FP8: ml_dtypes.float8_e4m3fn, FP8_FNUZ: ml_dtypes.float8_e4m3fnuz, FP4: ml_dtypes.float4_e2m1fn}
LIMIT = {FP8: 448, FP8_FNUZ: 224, torch.int8: 127, FP4: 6}
NAN_CODE = {FP8: 0x7F, FP8_FNUZ: 0x80, torch.int8: 0, FP4: 0}
f32 = np.float32


def encoded(values, dtype, zero_point=0):
    """uint8 codes, one to an element."""
    if dtype == torch.int8:
        codes = np.clip(np.rint(values) + f32(zero_point), -128, 127)
        return np.where(np.isnan(values), 0, codes).astype(np.int8).view(np.uint8)
    codes = np.clip(values, -LIMIT[dtype], LIMIT[dtype]).astype(NUMPY[dtype]).view(np.uint8)
    return np.where(np.isnan(values), NAN_CODE[dtype], codes).astype(np.uint8)


def rounded_up(x) -> int:
    """The exponent of the power of two that x is rounded up to."""
    if x == 0:
        return -127
    mantissa, exponent = np.frexp(x)
    return max(int(exponent) - (mantissa == 0.5), -126)


def expected_group(y, key: QuantKey, scale=None, scale2=None, zero_point=0, scale_ub=None):
    """(codes, scale as float32, zero point) of the elements y that share a scale."""
    one, limit = f32(1), f32(LIMIT[key.dtype])
    if scale is not None:
        return encoded(y * (one / scale), key.dtype, zero_point), scale, zero_point
    if not np.isfinite(y).all():
        return np.full(len(y), NAN_CODE[key.dtype], np.uint8), f32("nan"), 0
    amax = np.abs(y).max(initial=f32(0))
    if key.scale.dtype == E8M0:
        exponent = rounded_up(amax / limit)
        return encoded(y * f32(2.0**-exponent), key.dtype), f32(2.0**exponent), 0
    if scale2 is not None:
        g = one / scale2
        block = encoded(g * (amax * (one / f32(6))), FP8).view(NUMPY[FP8]).astype(f32)
        codes = encoded(y * (g * (one / block)), FP4)
        return (codes if block else np.zeros_like(codes)), block, 0
    if not key.symmetric:
        low, high = np.minimum(y.min(initial=f32(0)), 0), np.maximum(y.max(initial=f32(0)), 0)
        scale = np.maximum((high - low) / f32(255), f32(2.0**-23))
        zero_point = int(-128 - np.rint(low * (one / scale)))
        return encoded(y * (one / scale), key.dtype, zero_point), scale, zero_point
    if key.scale.power_of_two:
        scale = f32(2.0 ** rounded_up(np.maximum(amax, f32(1e-10)) / limit))
    else:
        amax = amax if scale_ub is None else np.minimum(amax, scale_ub)
        least = f32(2.0**-23) if key.dtype == torch.int8 else one / (limit * f32(512))
        scale = np.maximum(amax / limit, least)
    return encoded(y * (one / scale), key.dtype), scale, 0


def expected(x: Tensor, key: QuantKey, **tensors: Tensor):
    """(codes [T, N], float32 scales [T, K], zero points [T, K]); per tensor T = 1, N all elements."""
    numbers = {name: tensor.numpy()[0] for name, tensor in tensors.items()}
    rows = x.float().numpy().reshape(1 if key.per_tensor else -1, x.numel() if key.per_tensor else x.shape[-1])
    size = key.scale.group_shape.cols if key.scale.group_shape.cols > 0 else max(rows.shape[1], 1)
    starts = range(0, rows.shape[1] or 1, size)
    with np.errstate(all="ignore"):
        groups = [expected_group(row[at : at + size], key, **numbers) for row in rows for at in starts]
    codes, scales, zeros = zip(*groups, strict=True) if groups else ([[]], [], [])
    shape = len(rows), len(starts)
    return (
        np.concatenate(codes).astype(np.uint8).reshape(rows.shape),
        np.array(scales, f32).reshape(shape),
        np.array(zeros, np.int32).reshape(shape),
    )


def decoded(codes, dtype):
    return codes.view(np.int8 if dtype == torch.int8 else NUMPY[dtype]).astype(f32)
