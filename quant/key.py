"""Quantization schemes as data: the format of the codes, and how their scales are shared, rounded and laid out.

Rounding and memory layout of the scales are part of the key, so that a producer and a consumer whose keys are
equal can't disagree on either.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch

FP8, FP8_FNUZ, FP4 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float4_e2m1fn_x2
E8M0 = torch.float8_e8m0fnu


class ScaleLayout(enum.IntEnum):
    """Where the scale of row m, group k lies in memory; numerics are the same in all of them."""

    ROW_MAJOR = 0  # [T, K], contiguous
    COLUMN_MAJOR = 1  # [T, K], strides (1, T)
    TMA_ALIGNED = 2  # [T, K], strides (1, T rounded up to 4)
    PACKED_UE8M0 = 3  # int32 [T, ceil(K / 4)], strides (1, T rounded up to 4), lowest byte first
    SWIZZLED_128X4 = 4  # flat buffer of 128x4 tiles, as Blackwell's block-scaled products read it


_LAYOUTS = tuple(ScaleLayout)  # here, since Dynamo of torch 2.11 can't trace it


class GroupShape(NamedTuple):
    """Rows and columns that share one scale; -1 is the whole extent."""

    rows: int
    cols: int


PER_TENSOR, PER_TOKEN = GroupShape(-1, -1), GroupShape(1, -1)


@dataclass(frozen=True)
class ScaleDesc:
    """How the scales of a tensor are made and stored.

    dtype: float32, float8_e8m0fnu or float8_e4m3fn, the type a scale is rounded to.
    static: given by the layer (calibrated) rather than computed from the tensor.
    group_shape: the elements that share one.
    power_of_two: a float32 scale that is rounded up to a power of two.
    layout: the order in memory.
    """

    dtype: torch.dtype
    static: bool
    group_shape: GroupShape
    power_of_two: bool = False
    layout: ScaleLayout = ScaleLayout.ROW_MAJOR

    def __post_init__(self):
        group, layout = self.group_shape, self.layout
        if not isinstance(group, tuple) or len(group) != 2 or not all(type(n) is int for n in group):
            raise TypeError(f"ScaleDesc: group_shape is {group!r}, expected (rows, columns)")
        if layout not in _LAYOUTS:
            raise ValueError(f"ScaleDesc: layout is {layout!r}, expected one of {', '.join(ScaleLayout.__members__)}")
        for name in "static", "power_of_two":
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"ScaleDesc: {name} is {getattr(self, name)!r}, expected a bool")
        object.__setattr__(self, "group_shape", GroupShape(*group))
        object.__setattr__(self, "layout", ScaleLayout(layout))
        if self.dtype not in _SCALE_DTYPES:
            raise ValueError(f"ScaleDesc: dtype is {self.dtype}, expected one of {_SCALE_DTYPES}")
        if any(n != -1 and not 0 < n < 1 << 31 for n in self.group_shape):
            raise ValueError(f"ScaleDesc: group_shape is {tuple(self.group_shape)}, expected sizes >= 1, or -1")
        if self.power_of_two and self.dtype != torch.float32:
            raise ValueError(f"ScaleDesc: power_of_two rounds float32 scales, dtype is {self.dtype}")
        if self.layout == ScaleLayout.PACKED_UE8M0 and not self.power_of_two:
            raise ValueError("ScaleDesc: layout PACKED_UE8M0 stores exponents only and needs power_of_two=True")
        if self.layout == ScaleLayout.SWIZZLED_128X4 and self.dtype == torch.float32:
            raise ValueError("ScaleDesc: layout SWIZZLED_128X4 holds one-byte scales, dtype is torch.float32")
        if self.layout and self.group_shape == PER_TENSOR:
            raise ValueError(f"ScaleDesc: layout is {self.layout.name}, one scale per tensor has ROW_MAJOR only")


@dataclass(frozen=True)
class QuantKey:
    """A quantization scheme of a tensor, as producers and consumers compare it.

    dtype: format of the codes: float8_e4m3fn(uz), int8, or float4_e2m1fn_x2 (two codes to a byte of uint8 storage).
    scale: the scale of each group; `x ~ data * scale`.
    scale2: NVFP4's second, per-tensor scale; `x ~ data * scale * scale2`.
    symmetric: False adds a zero point, `x ~ (data - zero_point) * scale`.
    """

    dtype: torch.dtype
    scale: ScaleDesc
    scale2: ScaleDesc | None = None
    symmetric: bool = True
    code: int = field(init=False, repr=False, compare=False)  # the key as the int that kernels take; see _encode

    def __post_init__(self):
        if not isinstance(self.scale, ScaleDesc):
            raise TypeError(f"QuantKey: scale is {self.scale!r}, expected a ScaleDesc")
        if self.dtype not in _FORMATS:
            raise ValueError(f"QuantKey: dtype is {self.dtype}, expected one of {tuple(_FORMATS)}")
        if not self.symmetric and self.dtype != torch.int8:
            raise ValueError(f"QuantKey: symmetric=False needs int8 codes, dtype is {self.dtype}")
        if (self.scale2 is not None) != (self.scale.dtype == FP8):
            raise ValueError("QuantKey: scale2 goes with float8_e4m3fn scales (NVFP4), and only with them")
        if self.scale.dtype not in _FORMATS[self.dtype]:
            known = _FORMATS[self.dtype]
            raise ValueError(f"QuantKey: scale.dtype is {self.scale.dtype}, {self.dtype} takes one of {known}")
        if self.scale.power_of_two and self.dtype not in (FP8, FP8_FNUZ):
            raise ValueError(f"QuantKey: power_of_two scales are defined for FP8 codes, dtype is {self.dtype}")
        object.__setattr__(self, "code", _encode(self))

    def with_scale(self, **changes) -> QuantKey:
        """The same key with other fields of its `ScaleDesc`: `key.with_scale(layout=ScaleLayout.TMA_ALIGNED)`."""
        return replace(self, scale=replace(self.scale, **changes))

    @property
    def packing(self) -> int:
        """Codes in one element of `data`: 2 for four-bit formats, else 1."""
        return 2 if self.dtype == FP4 else 1

    @property
    def storage_dtype(self) -> torch.dtype:
        """dtype of `data`."""
        return torch.uint8 if self.dtype == FP4 else self.dtype

    def group_size(self, cols: int) -> int:
        """Columns that share a scale in rows of `cols`."""
        return cols if self.scale.group_shape.cols == -1 else self.scale.group_shape.cols

    def groups(self, cols: int) -> int:
        """Scales in a row of `cols` columns; the last group may be short."""
        return 1 if self.scale.group_shape.cols == -1 else -(-cols // self.scale.group_shape.cols)

    @property
    def per_tensor(self) -> bool:
        return self.scale.group_shape == PER_TENSOR

    @property
    def bounded(self) -> bool:
        """Whether a `scale_ub` may bound the scales: FP8, dynamic, neither MX nor a power of two."""
        scale = self.scale
        plain = scale.dtype == torch.float32 and not scale.static and not scale.power_of_two
        return plain and self.dtype in (FP8, FP8_FNUZ)

    @staticmethod
    def from_code(code: int) -> QuantKey:
        """The key whose `code` this is. Raises ValueError where there is none."""
        return _from_code(code) if torch.compiler.is_compiling() else _remembered(code)  # Dynamo warns of caches

    def __str__(self) -> str:
        plain = self.with_scale(power_of_two=False, layout=ScaleLayout.ROW_MAJOR)
        options = ["power_of_two"] * self.scale.power_of_two + [self.scale.layout.name] * bool(self.scale.layout)
        for name, key in NAMED_KEYS.items():
            if key == plain:
                return name + (f"[{', '.join(options)}]" if options else "")
        scale, (rows, cols) = self.scale, self.scale.group_shape
        kind = "static" if scale.static else "dynamic"
        group = "tensor" if self.per_tensor else f"{rows}x{'row' if cols == -1 else cols}"
        options = ["asymmetric"] * (not self.symmetric) + options
        return f"{self.dtype}, {kind} {scale.dtype} per {group}" + (f" [{', '.join(options)}]" if options else "")


def _from_code(code: int) -> QuantKey:
    group = PER_TENSOR if code >> 7 & 1 else GroupShape(1, code >> 16 or -1)
    try:
        dtype, scale_dtype = list(_FORMATS)[code & 15], _SCALE_DTYPES[code >> 8 & 3]
    except IndexError:
        raise ValueError(f"QuantKey: no key has the code {code}") from None
    scale = ScaleDesc(scale_dtype, bool(code >> 4 & 1), group, bool(code >> 6 & 1), ScaleLayout(code >> 12 & 7))
    key = QuantKey(dtype, scale, _SCALE2 if scale_dtype == FP8 else None, symmetric=not code >> 5 & 1)
    if key.code != code:
        raise ValueError(f"QuantKey: no key has the code {code}")
    return key


_remembered = lru_cache(4096)(_from_code)


_SCALE_DTYPES = (torch.float32, E8M0, FP8)
# Formats of the codes, in the order that `code` numbers them, and the scales they go with.
_FORMATS = {FP8: (torch.float32, E8M0), FP8_FNUZ: (torch.float32,), torch.int8: (torch.float32,), FP4: (E8M0, FP8)}


def _encode(key: QuantKey) -> int:
    """Kernels take a key as one int, since every argument of an operation costs (csrc/quantize.h decodes it):

    bits 0-3 format, 4 static, 5 asymmetric, 6 power_of_two, 7 per tensor, 8-9 dtype of the scale, 12-14 layout,
    16 and up the columns of a group (0: the whole row). A key of a weight, whose groups span rows, has none: -1.
    """
    scale = key.scale
    if scale.group_shape.rows != 1 and not key.per_tensor:
        return -1
    return (
        list(_FORMATS).index(key.dtype)
        | scale.static << 4
        | (not key.symmetric) << 5
        | scale.power_of_two << 6
        | key.per_tensor << 7
        | _SCALE_DTYPES.index(scale.dtype) << 8
        | int(scale.layout) << 12
        | max(scale.group_shape.cols, 0) << 16
    )


def _group(cols: int) -> GroupShape:
    return GroupShape(1, cols)


_SCALE2 = ScaleDesc(torch.float32, True, PER_TENSOR)
FP8_STATIC_TENSOR = QuantKey(FP8, ScaleDesc(torch.float32, True, PER_TENSOR))
FP8_DYNAMIC_TENSOR = QuantKey(FP8, ScaleDesc(torch.float32, False, PER_TENSOR))
FP8_DYNAMIC_TOKEN = QuantKey(FP8, ScaleDesc(torch.float32, False, PER_TOKEN))
FP8_DYNAMIC_GROUP_128 = QuantKey(FP8, ScaleDesc(torch.float32, False, _group(128)))
FP8_DYNAMIC_GROUP_64 = QuantKey(FP8, ScaleDesc(torch.float32, False, _group(64)))
MXFP8 = QuantKey(FP8, ScaleDesc(E8M0, False, _group(32)))
NVFP4 = QuantKey(FP4, ScaleDesc(FP8, False, _group(16)), _SCALE2)
MXFP4 = QuantKey(FP4, ScaleDesc(E8M0, False, _group(32)))
INT8_STATIC_TENSOR = QuantKey(torch.int8, ScaleDesc(torch.float32, True, PER_TENSOR))
INT8_DYNAMIC_TOKEN = QuantKey(torch.int8, ScaleDesc(torch.float32, False, PER_TOKEN))
INT8_DYNAMIC_GROUP_128 = QuantKey(torch.int8, ScaleDesc(torch.float32, False, _group(128)))
INT8_STATIC_TENSOR_ASYM = replace(INT8_STATIC_TENSOR, symmetric=False)
INT8_DYNAMIC_TOKEN_ASYM = replace(INT8_DYNAMIC_TOKEN, symmetric=False)

NAMED_KEYS = {name: value for name, value in globals().items() if isinstance(value, QuantKey)}
