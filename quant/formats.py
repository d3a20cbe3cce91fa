"""Number formats and scales in pure torch: the reference that defines the bits of every backend.

A scale always dequantizes: `x ~ data * scale` (NVFP4: `* scale2`; asymmetric: `(data - zero_point) * scale`).
Everything is float32 arithmetic with IEEE division; a group that holds a value that isn't finite gets a NaN scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .key import E8M0, FP4, FP8, FP8_FNUZ, PER_TENSOR, QuantKey, ScaleDesc, ScaleLayout

# The magnitude that a group's largest element is scaled to. e4m3fnuz could hold 240; 224 is what its hardware uses.
MAX = {FP8: 448.0, FP8_FNUZ: 224.0, torch.int8: 127.0, FP4: 6.0}
SMALLEST_SCALE = {FP8: 1 / (448 * 512), FP8_FNUZ: 1 / (224 * 512), torch.int8: 2.0**-23}
NAN_CODE = {FP8: 0x7F, FP8_FNUZ: 0x80, torch.int8: 0, FP4: 0}
E8M0_NAN = 0xFF
_MAGNITUDE = 0x7FFFFFFF


def quantize(
    x: Tensor,
    key: QuantKey,
    *,
    scale: Tensor | None = None,
    scale2: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_ub: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize the last dimension of `x`: (data, scale, zero_point).

    Args:
        x: [..., N], any float dtype.
        scale: float32 [1], static keys. zero_point: int32 [1], static asymmetric keys.
        scale2: float32 [1], NVFP4. scale_ub: float32 [1], bounds the magnitude behind dynamic FP8 scales.

    Returns:
        data [..., N] in `key.storage_dtype` (N // 2 bytes for FP4); the scale in the key's layout, [1] per tensor, or
        the given one; the int32 zero point of an asymmetric key, laid out as the scale, or the given one.

    Raises:
        ValueError: N isn't a multiple of the group where it must be, a tensor is missing, surplus or not of one
            element, or the key is a weight's, whose groups span rows. TypeError: a tensor's dtype is another.
    """
    static = key.scale.static
    check_columns("quantize", key, x.shape[-1])
    _check_given("quantize", key, "scale", scale, static)
    _check_given("quantize", key, "scale2", scale2, key.scale2 is not None)
    _check_given("quantize", key, "zero_point", zero_point, static and not key.symmetric)
    if scale_ub is not None:
        _check_given("quantize", key, "scale_ub", scale_ub, key.bounded)
    rows = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
    groups = _split(rows, key)
    if scale is not None:
        codes = encode(groups * (1 / scale), key.dtype, zero_point)
    elif scale2 is not None:
        codes, scale = _nvfp4(groups, scale2)
    elif not key.symmetric:
        codes, scale, zero_point = _asymmetric(groups)
    else:
        scale = _dynamic_scale(amax(groups), key, scale_ub)
        reciprocal = power(-_unbiased(scale)) if scale.dtype == E8M0 else 1 / scale
        codes = encode(groups * reciprocal.unsqueeze(-1), key.dtype)
        codes = torch.where(reciprocal.isnan().unsqueeze(-1), NAN_CODE[key.dtype], codes)
    data = codes.view(rows.shape) if key.per_tensor else codes.flatten(-2)[:, : x.shape[-1]]
    data = pack(data) if key.dtype == FP4 else data.reshape(-1).view(key.dtype)
    data = data.view(*x.shape[:-1], x.shape[-1] // key.packing)
    if static:
        return data, scale, zero_point
    return data, arrange(scale, key.scale), None if zero_point is None else arrange(zero_point, key.scale)


def dequantize(
    data: Tensor, scale: Tensor, key: QuantKey, *, scale2: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """float32 [..., N] of what `quantize` returned: every product rounded once, in the order of the docstring above.

    Raises ValueError where scale2 or zero_point is missing or surplus.
    """
    _check_given("dequantize", key, "scale2", scale2, key.scale2 is not None)
    _check_given("dequantize", key, "zero_point", zero_point, not key.symmetric, one=False)
    values = decode(data, key.dtype)
    rows, cols = values.shape[:-1].numel(), values.shape[-1]
    values = values.reshape(rows, cols)
    if zero_point is not None:
        values = values - _spread(zero_point, rows, cols, key)
    values = values * _spread(scale, rows, cols, key)
    if scale2 is not None:
        values = values * scale2
    return values.reshape(*data.shape[:-1], cols)


def empty(shape, key: QuantKey, device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Uninitialized (data, scale, zero_point) as `quantize` returns them for x of `shape`; None where static."""
    *lead, cols = shape
    check_columns("empty", key, cols)
    data = torch.empty((*lead, cols // key.packing), dtype=key.storage_dtype, device=device)
    if key.scale.static:
        return data, None, None
    rows, groups = math.prod(lead), key.groups(cols)
    scale = _empty_scale(rows, groups, key.scale, key.scale.dtype, device)
    return data, scale, None if key.symmetric else _empty_scale(rows, groups, key.scale, torch.int32, device)


# --- scales ---


def amax(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, as an integer maximum: NaN and infinity win."""
    magnitudes = groups.view(torch.int32) & _MAGNITUDE
    if not magnitudes.shape[-1]:  # a tensor without rows
        return groups.new_zeros(groups.shape[:-1])
    return magnitudes.amax(-1).view(torch.float32)


def divide(x: Tensor, by: float) -> Tensor:
    """IEEE division; by a Python number, CUDA would multiply by the reciprocal instead."""
    return x / torch.full((), by, device=x.device)


def _dynamic_scale(largest: Tensor, key: QuantKey, scale_ub: Tensor | None) -> Tensor:
    limit, finite = MAX[key.dtype], largest.isfinite()
    if key.scale.dtype == E8M0:
        exponent = ceil_log2(divide(largest, limit)).clamp(-127, 127)
        return torch.where(finite, exponent + 127, E8M0_NAN).to(torch.uint8).view(E8M0)
    if key.scale.power_of_two:
        scale = power(ceil_log2(divide(largest.clamp_min(1e-10), limit)))
    else:
        if scale_ub is not None:
            largest = torch.minimum(largest, scale_ub)
        scale = divide(largest, limit).clamp_min(SMALLEST_SCALE[key.dtype])
    return torch.where(finite, scale, float("nan"))


def _nvfp4(groups: Tensor, scale2: Tensor) -> tuple[Tensor, Tensor]:
    largest, g = amax(groups), 1 / scale2.reshape(1)
    block = encode(g * (largest * (1 / MAX[FP4])), FP8)
    block = torch.where(largest.isfinite(), block, NAN_CODE[FP8]).view(FP8)
    factor = g * (1 / block.float())
    codes = encode(groups * factor.unsqueeze(-1), FP4)
    zero_or_nan = (block.view(torch.uint8) == 0) | block.isnan()
    return torch.where(zero_or_nan.unsqueeze(-1), 0, codes), block


def _asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high, low = amax(groups.clamp_min(0)), -amax(groups.clamp_max(0))
    finite = high.isfinite() & low.isfinite()
    scale = divide(high - low, 255).clamp_min(SMALLEST_SCALE[torch.int8])
    zero_point = torch.where(finite, -128 - (low * (1 / scale)).round(), 0).to(torch.int32)
    codes = encode(groups * (1 / scale).unsqueeze(-1), torch.int8, zero_point.unsqueeze(-1))
    return torch.where(finite.unsqueeze(-1), codes, 0), torch.where(finite, scale, float("nan")), zero_point


def ceil_log2(x: Tensor) -> Tensor:
    """The exponent of x >= 0, rounded up, by its bits; int32. Zero gives -127, denormal x -126."""
    return ((x.view(torch.int32) + 0x7FFFFF) >> 23) - 127


def power(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exactly, for int32 exponents in [-127, 127]; 128 and above give NaN."""
    bits = (exponent + 127) << 23
    bits = torch.where(exponent == -127, 0x400000, bits)
    return torch.where(exponent.abs() > 127, 0x7FC00000, bits).view(torch.float32)


def _unbiased(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8).int() - 127


# --- codes ---


def encode(values: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """Codes of float32 values as uint8, rounded to nearest even and saturated; NaN is the format's NaN, or 0."""
    if dtype == FP4:
        return encode_e2m1(values)
    limit = MAX[dtype]
    if dtype == torch.int8:
        rounded = values.round() if zero_point is None else values.round() + zero_point
        return torch.where(values.isnan(), 0, rounded.clamp(-128, 127)).to(torch.int8).view(torch.uint8)
    codes = values.clamp(-limit, limit).to(dtype).view(torch.uint8)
    return torch.where(values.isnan(), NAN_CODE[dtype], codes).to(torch.uint8)


def encode_e2m1(values: Tensor) -> Tensor:
    """Four-bit codes, one to a byte: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to the even code."""
    x = values.abs().clamp_max(MAX[FP4])
    exponent = ((x.view(torch.int32) >> 23) - 127).clamp(0, 2)  # below 1 the steps are those of [1, 2)
    codes = (x * power(1 - exponent)).round() + 2 * exponent
    return torch.where(values.isnan(), 0, codes + 8 * values.signbit()).to(torch.uint8)


def decode(data: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values of codes; FP4's are unpacked."""
    if dtype != FP4:
        return data.float()
    codes = unpack(data).int()
    exponent = (codes >> 1 & 3).clamp_min(1)  # 0 stands for the exponent of 1, without the leading bit
    halves = ((codes & 1) + 2 * (codes & 6 != 0)) << (exponent - 1)
    return torch.where(codes < 8, 0.5, -0.5) * halves


def halved(data: Tensor) -> Tensor:
    """float8_e4m3fnuz codes of half the values that float8_e4m3fn ones have: the same bits, but for NaN and -0."""
    codes = data.view(torch.uint8)
    nan = codes & 0x7F == NAN_CODE[FP8]
    return torch.where(nan, NAN_CODE[FP8_FNUZ], codes.where(codes != 0x80, 0)).to(torch.uint8).view(FP8_FNUZ)


def doubled(data: Tensor) -> Tensor:
    """The inverse of `halved`, but for -0; 240, whose double is too large, becomes NaN."""
    codes = data.view(torch.uint8)
    return torch.where(codes == NAN_CODE[FP8_FNUZ], NAN_CODE[FP8], codes).to(torch.uint8).view(FP8)


def pack(codes: Tensor) -> Tensor:
    """Two four-bit codes to a byte, the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


# --- layouts ---


def arrange(scale: Tensor, desc: ScaleDesc) -> Tensor:
    """Scales [T, K] in the layout that `desc` names; the one of a tensor, [1, 1], as [1]."""
    rows, groups = scale.shape
    layout = desc.layout
    if desc.group_shape == PER_TENSOR:
        return scale.reshape(1)
    out = _empty_scale(rows, groups, desc, scale.dtype, scale.device)
    if layout == ScaleLayout.SWIZZLED_128X4:
        out.view(torch.uint8).zero_()[_swizzled(rows, groups, scale.device)] = scale.view(torch.uint8)
        return out
    if layout == ScaleLayout.PACKED_UE8M0:
        exponents = (scale.view(torch.int32) >> 23) & 0xFF
        fours = pad(exponents, (0, -groups % 4)).view(rows, -(-groups // 4), 4)
        scale = (fours << _shifts(scale.device)).sum(-1, dtype=torch.int32)
    _bytes(out).copy_(_bytes(scale))
    return out


def logical(scale: Tensor, rows: int, groups: int, desc: ScaleDesc) -> Tensor:
    """float32 [rows, groups] of scales in the layout that `desc` names: the inverse of `arrange`."""
    if desc.group_shape == PER_TENSOR:
        return scale.float().reshape(1, 1)
    if desc.layout == ScaleLayout.SWIZZLED_128X4:
        return unswizzled(scale, rows, groups).float()
    if desc.layout == ScaleLayout.PACKED_UE8M0:
        exponents = (scale.unsqueeze(-1) >> _shifts(scale.device)) & 0xFF
        return power(exponents.flatten(-2)[:, :groups] - 127)
    return scale.float()


def unswizzled(scale: Tensor, rows: int, groups: int) -> Tensor:
    """[rows, groups] of a 128x4 buffer, in its dtype."""
    return scale.view(torch.uint8)[_swizzled(rows, groups, scale.device)].view(scale.dtype)


def _spread(scale: Tensor, rows: int, cols: int, key: QuantKey) -> Tensor:
    """Scales, or zero points, as float32 that broadcasts over [rows, cols]."""
    each = logical(scale, rows, key.groups(cols), key.scale)
    return each if each.shape[1] == 1 else each.repeat_interleave(key.group_size(cols), dim=1)[:, :cols]


def _empty_scale(rows: int, groups: int, desc: ScaleDesc, dtype: torch.dtype, device) -> Tensor:
    layout = desc.layout
    if desc.group_shape == PER_TENSOR:
        return torch.empty(1, dtype=dtype, device=device)
    if layout == ScaleLayout.ROW_MAJOR:
        return torch.empty((rows, groups), dtype=dtype, device=device)
    if layout == ScaleLayout.SWIZZLED_128X4:
        return torch.empty((rows + 127) // 128 * 128 * (-(-groups // 4) * 4), dtype=dtype, device=device)
    if layout == ScaleLayout.PACKED_UE8M0:
        groups, dtype = -(-groups // 4), torch.int32
    column = rows if layout == ScaleLayout.COLUMN_MAJOR else (rows + 3) // 4 * 4
    return torch.empty_strided((column, groups), (1, column), dtype=dtype, device=device)[:rows]  # with its padding


def _swizzled(rows: int, groups: int, device) -> Tensor:
    """Where the scale of row m, group k lies in the 128x4 layout: int64 [rows, groups]."""
    m, k = torch.arange(rows, device=device).unsqueeze(1), torch.arange(groups, device=device)
    return ((m // 128) * -(-groups // 4) + k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4


def swizzled_rows(rows: Tensor, size: int) -> Tensor:
    """bool [size]: which bytes of a 128x4 buffer belong to these rows (bool [rows]), or to none of the tensor's."""
    groups = size // max(1, -(-rows.numel() // 128) * 128)
    found = torch.ones(size, dtype=torch.bool, device=rows.device)
    found[_swizzled(rows.numel(), groups, rows.device)] = rows.unsqueeze(1)
    return found


def _shifts(device) -> Tensor:
    return torch.arange(0, 32, 8, dtype=torch.int32, device=device)


def _bytes(scale: Tensor) -> Tensor:
    """The scale as integers where it is an eight-bit float, which few operations take."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale


def _split(rows: Tensor, key: QuantKey) -> Tensor:
    """[T, K, G] groups of [T, N] rows, the last one padded with zeros; static [T, 1, N], per tensor [1, 1, T * N]."""
    count, cols = rows.shape
    if key.scale.static:
        return rows.unsqueeze(1)
    if key.per_tensor:
        return rows.reshape(1, 1, count * cols)
    groups, size = key.groups(cols), key.group_size(cols)
    return pad(rows, (0, groups * size - cols)).view(count, groups, size)


# --- checks ---


def check_columns(caller: str, key: QuantKey, cols: int, rows: str = "x") -> None:
    """Raise ValueError unless rows of `cols` elements are quantized by this key."""
    group = key.scale.group_shape
    if not key.per_tensor and (key.scale.static or group.rows != 1):
        kind = "static " * key.scale.static
        raise ValueError(f"{caller}: {key} has {kind}groups {tuple(group)}, expected (1, n), or static per tensor")
    if key.scale.dtype != torch.float32 and cols % group.cols:
        raise ValueError(f"{caller}: {rows} has {cols} columns, {key} expects a multiple of {group.cols}")


def _check_given(caller: str, key: QuantKey, name: str, tensor: Tensor | None, wanted: bool, one: bool = True) -> None:
    if (tensor is not None) != wanted:
        state, takes = ("missing", "one") if wanted else ("given", "none")
        raise ValueError(f"{caller}: {name} is {state}, {key} takes {takes}")
    if tensor is None:
        return
    dtype = torch.int32 if name == "zero_point" else torch.float32
    if tensor.dtype != dtype:
        raise TypeError(f"{caller}: {name} is {tensor.dtype}, {key} takes {dtype}")
    if one and tensor.numel() != 1:
        raise ValueError(f"{caller}: {name} is {list(tensor.shape)}, {key} takes one element")
