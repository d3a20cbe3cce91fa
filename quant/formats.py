"""Number formats and scales in pure torch: the reference that defines the bits of every backend.

A scale always dequantizes: `x ~ data * scale` (NVFP4: `* scale2`; asymmetric: `(data - zero_point) * scale`).
Everything is float32 arithmetic with IEEE division; a group that holds a value that isn't finite gets a NaN scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .key import E8M0, FP4, FP8, FP8_FNUZ, QuantKey, ScaleDesc, ScaleLayout

# The magnitude that a group's largest element is scaled to. e4m3fnuz could hold 240; 224 is what its hardware uses.
MAX = {FP8: 448.0, FP8_FNUZ: 224.0, torch.int8: 127.0, FP4: 6.0}
SMALLEST_SCALE = {FP8: 1 / (448 * 512), FP8_FNUZ: 1 / (224 * 512), torch.int8: 2.0**-23}
NAN_CODE = {FP8: 0x7F, FP8_FNUZ: 0x80, torch.int8: 0, FP4: 0}
E8M0_NAN = 0xFF
_MAGNITUDE, _EXPONENT = 0x7FFFFFFF, 0x7F800000


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
        data [..., N] in `key.storage_dtype` (N // 2 bytes for FP4); the scale in the key's layout (a static key's own);
        the int32 zero point of a dynamic asymmetric key, or what was given.

    Raises:
        ValueError: N isn't a multiple of the group where it must be, or a tensor is missing or surplus.
    """
    _check(key, x.shape[-1], scale=scale, scale2=scale2, zero_point=zero_point, scale_ub=scale_ub)
    rows = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
    groups = _split(rows, key)
    if scale is not None:
        codes = encode(groups * (1 / scale), key.dtype, zero_point)
    elif key.scale2 is not None:
        codes, scale = _nvfp4(groups, scale2)
    elif not key.symmetric:
        codes, scale, zero_point = _asymmetric(groups)
    else:
        scale = _dynamic_scale(amax(groups), key, scale_ub)
        reciprocal = power(-_unbiased(scale)) if scale.dtype == E8M0 else 1 / scale
        codes = encode(groups * reciprocal.unsqueeze(-1), key.dtype)
        codes = torch.where(reciprocal.isnan().unsqueeze(-1), NAN_CODE[key.dtype], codes)
    data = codes.view(rows.shape) if key.per_tensor else codes.flatten(-2)[:, : x.shape[-1]]
    data = pack(data) if key.dtype == FP4 else data.contiguous().view(key.dtype)
    data = data.reshape(*x.shape[:-1], data.shape[-1])
    if key.scale.static:
        return data, scale, zero_point
    if key.per_tensor:
        return data, scale.reshape(1), None
    return data, arrange(scale, key.scale), None if zero_point is None else arrange(zero_point, key.scale)


def dequantize(
    data: Tensor, scale: Tensor, key: QuantKey, *, scale2: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """float32 [..., N] of what `quantize` returned."""
    values = decode(data, key.dtype)
    rows, cols = values.shape[:-1].numel(), values.shape[-1]
    values = values.reshape(rows, cols)
    if zero_point is not None:
        values = values - zero_point.reshape(-1, 1)
    factor = scale.float() if key.per_tensor else logical(scale, rows, key.groups(cols), key.scale)
    if scale2 is not None:
        factor = factor * scale2
    if not key.per_tensor:
        factor = factor.repeat_interleave(key.group_size(cols), dim=1)[:, :cols]
    return (values * factor).reshape(*data.shape[:-1], cols)


def empty(shape, key: QuantKey, device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Uninitialized (data, scale, zero_point) as `quantize` returns them for x of `shape`; None where static."""
    *lead, cols = shape
    data = torch.empty((*lead, cols // key.packing), dtype=key.storage_dtype, device=device)
    if key.scale.static:
        return data, None, None
    rows = 1
    for size in lead:
        rows = rows * size
    scale = _empty_scale(rows, key, cols, device)
    return data, scale, None if key.symmetric else torch.empty_like(scale, dtype=torch.int32)


# --- scales ---


def amax(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, as an integer maximum: NaN and infinity win."""
    magnitudes = groups.view(torch.int32) & _MAGNITUDE
    shape = magnitudes.shape[:-1]
    return (magnitudes.amax(-1) if magnitudes.numel() else magnitudes.new_zeros(shape)).view(torch.float32)


def _dynamic_scale(largest: Tensor, key: QuantKey, scale_ub: Tensor | None) -> Tensor:
    limit, finite = MAX[key.dtype], largest.isfinite()
    if key.scale.dtype == E8M0:
        exponent = ceil_log2(largest / limit).clamp(-127, 127)
        return torch.where(finite, exponent + 127, E8M0_NAN).to(torch.uint8).view(E8M0)
    if key.scale.power_of_two:
        scale = power(ceil_log2(largest.clamp_min(1e-10) / limit))
    else:
        if scale_ub is not None:
            largest = torch.minimum(largest, scale_ub)
        scale = (largest / limit).clamp_min(SMALLEST_SCALE[key.dtype])
    return torch.where(finite, scale, float("nan"))


def _nvfp4(groups: Tensor, scale2: Tensor | None) -> tuple[Tensor, Tensor]:
    assert scale2 is not None
    largest, g = amax(groups), 1 / scale2.reshape(1)
    sixth = torch.tensor(6.0, device=groups.device).reciprocal()
    block = encode(g * (largest * sixth), FP8)
    block = torch.where(largest.isfinite(), block, NAN_CODE[FP8]).to(torch.uint8).view(FP8)
    factor = g * (1 / block.float())
    codes = encode(groups * factor.unsqueeze(-1), FP4)
    empty_or_nan = (block.view(torch.uint8) & 0x7F == 0) | ~largest.isfinite()
    return torch.where(empty_or_nan.unsqueeze(-1), 0, codes), block


def _asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = amax(groups).isfinite()
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(SMALLEST_SCALE[torch.int8])
    zero_point = torch.where(finite, -128 - (low * (1 / scale)).round(), 0).to(torch.int32)
    codes = encode(groups * (1 / scale).unsqueeze(-1), torch.int8, zero_point.unsqueeze(-1))
    return torch.where(finite.unsqueeze(-1), codes, 0), torch.where(finite, scale, float("nan")), zero_point


def ceil_log2(x: Tensor) -> Tensor:
    """The exponent of positive x, rounded up, by its bits; int32. Zero gives -127."""
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
    x = values.abs()
    code = (x > 0.25).to(torch.uint8)
    for boundary, inclusive in (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False):
        code = code + ((x >= boundary) if inclusive else (x > boundary))
    return torch.where(values.isnan(), 0, code | (values.signbit().to(torch.uint8) << 3))


def decode(data: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values of codes; FP4's are unpacked."""
    if dtype != FP4:
        return data.float()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=data.device)
    return torch.cat([table, -table])[unpack(data).int()]


def pack(codes: Tensor) -> Tensor:
    """Two four-bit codes to a byte, the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


# --- layouts ---


def arrange(scale: Tensor, desc: ScaleDesc) -> Tensor:
    """Scales [T, K] in the layout that `desc` names."""
    rows, groups = scale.shape
    layout = desc.layout
    if layout == ScaleLayout.ROW_MAJOR:
        return scale.contiguous()
    if layout == ScaleLayout.SWIZZLED_128X4:
        tiles = pad(scale.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
        tiles = tiles.view(-1, 4, 32, tiles.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
        return tiles.reshape(-1).view(scale.dtype)
    if layout == ScaleLayout.PACKED_UE8M0:
        exponents = (scale.view(torch.int32) >> 23) & 0xFF
        fours = pad(exponents, (0, -groups % 4)).view(rows, -1, 4)
        shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=scale.device)
        scale = (fours << shifts).sum(-1, dtype=torch.int32)
    out = _by_columns(rows, scale.shape[1], layout, scale.dtype, scale.device)
    _bytes(out).copy_(_bytes(scale))
    return out


def logical(scale: Tensor, rows: int, groups: int, desc: ScaleDesc) -> Tensor:
    """float32 [rows, groups] of scales in the layout that `desc` names."""
    if desc.layout == ScaleLayout.SWIZZLED_128X4:
        tiles = scale.view(torch.uint8).view(-(-rows // 128), -(-groups // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
        flat = tiles.reshape(-(-rows // 128) * 128, -(-groups // 4) * 4)[:rows, :groups]
        return flat.contiguous().view(scale.dtype).float()
    if desc.layout == ScaleLayout.PACKED_UE8M0:
        shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=scale.device)
        exponents = (scale.unsqueeze(-1) >> shifts) & 0xFF
        return power(exponents.flatten(-2)[:, :groups] - 127)
    return scale.float()


def _empty_scale(rows, key: QuantKey, cols: int, device) -> Tensor:
    desc, groups = key.scale, key.groups(cols)
    if key.per_tensor:
        return torch.empty(1, dtype=desc.dtype, device=device)
    if desc.layout == ScaleLayout.ROW_MAJOR:
        return torch.empty((rows, groups), dtype=desc.dtype, device=device)
    if desc.layout == ScaleLayout.SWIZZLED_128X4:
        return torch.empty((rows + 127) // 128 * 128 * (-(-groups // 4) * 4), dtype=desc.dtype, device=device)
    if desc.layout == ScaleLayout.PACKED_UE8M0:
        return _by_columns(rows, -(-groups // 4), desc.layout, torch.int32, device)
    return _by_columns(rows, groups, desc.layout, desc.dtype, device)


def _by_columns(rows, groups: int, layout: ScaleLayout, dtype: torch.dtype, device) -> Tensor:
    column = rows if layout == ScaleLayout.COLUMN_MAJOR else (rows + 3) // 4 * 4
    return torch.empty_strided((rows, groups), (1, column), dtype=dtype, device=device)


def _bytes(scale: Tensor) -> Tensor:
    """The scale as integers where it is an eight-bit float, which few operations take."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale


def _split(rows: Tensor, key: QuantKey) -> Tensor:
    """[T, K, G] groups of [T, N] rows, the last one padded with zeros; per tensor [1, 1, T * N]."""
    count, cols = rows.shape
    if key.scale.static:
        return rows.unsqueeze(1)
    if key.per_tensor:
        return rows.reshape(1, 1, count * cols)
    groups, size = key.groups(cols), key.group_size(cols)
    return pad(rows, (0, groups * size - cols)).view(count, groups, size)


def _check(key: QuantKey, cols: int, **given: Tensor | None) -> None:
    group = key.scale.group_shape.cols
    if key.scale.dtype != torch.float32 and cols % group:
        raise ValueError(f"quantize: x has {cols} columns, {key} expects a multiple of {group}")
    if key.scale.layout == ScaleLayout.SWIZZLED_128X4 and key.scale.dtype == torch.float32:
        raise ValueError(f"quantize: {key} swizzles float32 scales, expected one-byte ones")
    static = key.scale.static
    takes = {"scale": static, "scale2": key.scale2 is not None, "zero_point": static and not key.symmetric}
    for name, wanted in takes.items():
        if (given[name] is not None) != wanted:
            raise ValueError(
                f"quantize: {name} is {'missing' if wanted else 'given'}, {key} takes {'one' if wanted else 'none'}"
            )
    bounded = key.dtype in (FP8, FP8_FNUZ) and not static and key.scale.dtype == torch.float32
    if given["scale_ub"] is not None and (not bounded or key.scale.power_of_two):
        raise ValueError(f"quantize: scale_ub is given, {key} takes none")
