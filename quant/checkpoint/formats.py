"""The formats that files hold: how a layer is quantized, and how each of its buffers is stored. One table for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ops.linear import block_key

from .. import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantKey,
)
from ..key import E8M0, FP4, FP8
from ..methods import Scheme

# --- how a tensor is quantized, in the words of compressed-tensors ---


class Args(NamedTuple):
    """What a `QuantizationArgs` of compressed-tensors says; size: of groups, or the two of blocks."""

    type: str
    num_bits: int
    strategy: str
    size: int | tuple[int, ...] | None = None
    dynamic: bool | str = False
    symmetric: bool = True

    def to_json(self) -> dict[str, Any]:
        """As the package itself writes it."""
        fields: dict[str, Any] = {**self._asdict(), "group_size": self.size if isinstance(self.size, int) else None}
        del fields["size"]
        if isinstance(self.size, tuple):
            fields["block_structure"] = list(self.size)
        if (scale_dtype := SCALE_DTYPES.get(self)) is not None:
            fields["scale_dtype"] = fields["zp_dtype"] = scale_dtype
        return fields


_CHANNEL, _TENSOR = (1, -1), (-1, -1)
WEIGHTS: dict[Args, QuantKey] = {
    Args("float", 8, "tensor"): block_key(FP8, *_TENSOR),
    Args("float", 8, "channel"): block_key(FP8, *_CHANNEL),
    Args("float", 8, "block", (128, 128)): block_key(FP8, 128, 128),
    Args("float", 8, "block", (64, 64)): block_key(FP8, 64, 64),
    Args("int", 8, "tensor"): block_key(torch.int8, *_TENSOR),
    Args("int", 8, "channel"): block_key(torch.int8, *_CHANNEL),
    Args("int", 8, "block", (128, 128)): block_key(torch.int8, 128, 128),
    Args("float", 8, "group", 32): MXFP8,
    Args("float", 4, "group", 32): MXFP4,
    Args("float", 4, "tensor_group", 16): NVFP4,
}
ACTIVATIONS: dict[Args, QuantKey] = {
    Args("float", 8, "tensor"): FP8_STATIC_TENSOR,
    Args("float", 8, "tensor", dynamic=True): FP8_DYNAMIC_TENSOR,
    Args("float", 8, "token", dynamic=True): FP8_DYNAMIC_TOKEN,
    Args("float", 8, "group", 128, dynamic=True): FP8_DYNAMIC_GROUP_128,
    Args("float", 8, "group", 64, dynamic=True): FP8_DYNAMIC_GROUP_64,
    Args("int", 8, "tensor"): INT8_STATIC_TENSOR,
    Args("int", 8, "tensor", symmetric=False): INT8_STATIC_TENSOR_ASYM,
    Args("int", 8, "token", dynamic=True): INT8_DYNAMIC_TOKEN,
    Args("int", 8, "token", dynamic=True, symmetric=False): INT8_DYNAMIC_TOKEN_ASYM,
    Args("int", 8, "group", 128, dynamic=True): INT8_DYNAMIC_GROUP_128,
    Args("float", 8, "group", 32, dynamic=True): MXFP8,
    Args("float", 4, "group", 32, dynamic=True): MXFP4,
    Args("float", 4, "tensor_group", 16, dynamic="local"): NVFP4,
}
_SCALES_OF = {MXFP8: "torch.uint8", MXFP4: "torch.uint8", NVFP4: "torch.float8_e4m3fn"}
SCALE_DTYPES = {
    args: _SCALES_OF[key] for table in (WEIGHTS, ACTIVATIONS) for args, key in table.items() if key in _SCALES_OF
}


def container(key: QuantKey) -> tuple[str, ...]:
    """Values of `format` that compressed-tensors has for weights of this key; the first is the one it writes."""
    special = {MXFP8: "mxfp8-quantized", MXFP4: "mxfp4-pack-quantized", NVFP4: "nvfp4-pack-quantized"}.get(key)
    plain = "int-quantized" if key.dtype == torch.int8 else "float-quantized"
    return (special,) if special else (plain, "naive-quantized")


# --- how a layer's buffers are stored ---


@dataclass(frozen=True)
class Stored:
    """A buffer in the files: its name there, or those it has had, and what its values become.

    groups: the size of the groups in which its last dimension is there.
    """

    names: tuple[str, ...]
    load: Callable[[Tensor], Tensor] = lambda tensor: tensor
    save: Callable[[Tensor], Tensor] = lambda tensor: tensor
    groups: int | None = None

    def value(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What the buffer `like` becomes by the files' tensor; see `fit`."""
        if self.groups is None:
            return self.load(fit(tensor, like))
        return self.load(fit(tensor, like.unflatten(-1, (-1, self.groups))).flatten(-2))


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, in float32."""
    return 1 / x.float()


def divisor_of(scale: Tensor) -> Tensor:
    """float32 g such that `1 / g` is this scale to the bit.

    Raises ValueError where there is none: reciprocals of float32 aren't all of float32. Layers are quantized with
    scales that are (`quant.methods.scheme.storable`).
    """
    nearest = reciprocal(scale)
    for steps in 0, -1, 1, -2, 2:
        candidate = (nearest.view(torch.int32) + steps).view(torch.float32)
        if torch.equal(reciprocal(candidate), scale):
            return candidate
    raise ValueError(f"is {scale.item()!r}, which isn't the reciprocal of a float32, and files hold that")


class Dialect(NamedTuple):
    """Names and conventions of a tool.

    zero: tensors that nothing asks for, which may be there and then are zeros. stacked: experts are in one tensor, as
    the model has them, `experts.down_proj_blocks`.
    """

    buffers: Mapping[str, Stored]
    packed_weight: str = "weight"
    zero: tuple[str, ...] = ()
    stacked: bool = False

    def stored(self, buffer: str, key: QuantKey) -> Stored:
        """How it stores this buffer of a layer whose weight has this key."""
        if buffer == "weight" and key.dtype == FP4 and not self.stacked:
            return Stored((self.packed_weight,))
        return self.buffers.get(buffer, Stored((buffer,)))


_DIVISOR: dict[str, Any] = {"load": reciprocal, "save": divisor_of}
COMPRESSED_TENSORS = Dialect(
    {
        "weight_scale2": Stored(("weight_global_scale",), **_DIVISOR),
        "input_scale2": Stored(("input_global_scale",), **_DIVISOR),
        "input_zero_point": Stored(("input_zero_point",), save=lambda zero: zero.to(torch.int8)),
    },
    packed_weight="weight_packed",
    zero=("weight_zero_point", "input_zero_point"),
)
# Despite its name weight_scale_inv multiplies. AutoFP8, Mistral and transformers have names of their own.
FP8_BLOCK = Dialect(
    {
        "weight_scale": Stored(("weight_scale_inv", "weight_scale", "scale", "qscale_weight")),
        "input_scale": Stored(("input_scale", "activation_scale", "qscale_act")),
    }
)
FBGEMM = Dialect({})
GPT_OSS = Dialect(
    {"weight": Stored(("blocks",), groups=MXFP4.scale.group_shape.cols // 2), "weight_scale": Stored(("scales",))},
    stacked=True,
)
MODELOPT = Dialect({"weight_scale2": Stored(("weight_scale_2",)), "input_scale2": Stored(("input_scale",))})
KV_SCALES = {  # of an attention: what files call them
    "k_scale": ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "v_scale": ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}


@dataclass(frozen=True)
class Format:
    """What a layer is in the files.

    scheme: how it computes. dialect: how its buffers are stored. given: buffers that the configuration holds.
    """

    scheme: Scheme
    dialect: Dialect
    given: tuple[tuple[str, float], ...] = ()


def fit(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor as the buffer `like` wants it, where that loses nothing.

    Dimensions of one come and go; scales widen to float32, bytes are e8m0 exponents, zero points widen to int32.

    Raises ValueError where shape or dtype are others.
    """
    if [n for n in tensor.shape if n != 1] != [n for n in like.shape if n != 1]:
        raise ValueError(f"is {list(tensor.shape)}, expected {list(like.shape)}")
    if like.dtype == E8M0 and tensor.dtype == torch.uint8:
        tensor = tensor.view(E8M0)
    exact = {torch.float32: (torch.bfloat16, torch.float16, E8M0), torch.int32: (torch.int8, torch.int64)}
    if tensor.dtype != like.dtype:
        if tensor.dtype not in exact.get(like.dtype, ()):
            raise ValueError(f"is {tensor.dtype}, expected {like.dtype}")
        if tensor.dtype == torch.int64 and not (tensor.int() == tensor).all():
            raise ValueError("has values beyond int32")
        tensor = tensor.to(like.dtype)
    return tensor.reshape(like.shape)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # of what isn't quantized


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises ValueError where a value becomes infinite."""
    made = tensor.to(dtype)
    if made.dtype != tensor.dtype and made.isinf().sum() != tensor.isinf().sum():
        raise ValueError(f"has values beyond {dtype}")
    return made
