"""Operands of products: codes and scales at random, in every format; and their exact values."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_ops
from fused_ops.linear import block_key, exact_values, scale_shape, takes
from fused_ops.quantize import case_keys
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    QuantKey,
    ScaleLayout,
    formats,
)
from quant.key import E8M0, FP8, FP8_FNUZ

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KEYS = [*filter(takes, case_keys()), replace(INT8_DYNAMIC_GROUP_128, symmetric=False)]
SWIZZLED = [key.with_scale(layout=ScaleLayout.SWIZZLED_128X4) for key in (MXFP8, MXFP4, NVFP4)]
SIDES = [(-1, -1), (1, -1), (128, 128), (64, 64), (1, 128)]
FLOAT_SCALES = [block_key(dtype, *sides) for dtype in (torch.int8, FP8) for sides in SIDES]
FNUZ = [block_key(FP8_FNUZ, 1, -1), block_key(FP8_FNUZ, 128, 128)]
WEIGHTS = [*FLOAT_SCALES, *FNUZ, MXFP8, MXFP4, NVFP4, *SWIZZLED]
INT8_KEYS = [INT8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN]
FP8_KEYS = [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128]
COLS = [1, 7, 31, 100, 129, 577, 1100]  # odd ones, short last groups and blocks, vectors that end within 32 codes
COMPILED = "cpu" in fused_ops.OPS["scaled_linear"].backends
compiled_only = pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
ON_CPU = sorted(n for n, backend in fused_ops.OPS["scaled_linear"].backends.items() if "CPU" in backend.devices)
each_backend = pytest.mark.parametrize("backend", ON_CPU)
each_key = pytest.mark.parametrize("key", KEYS, ids=str)

Weight = tuple[Tensor, Tensor, QuantKey, Tensor | None]  # data, scale, key, scale2


# --- random operands ---


def codes(rows: int, cols: int, key: QuantKey) -> Tensor:
    """Every code of the format is as likely as any other, NaN excepted."""
    random = torch.randint(0, 256, (rows, cols // key.packing), dtype=torch.uint8)
    if key.dtype == FP8:
        random = random.where(random & 0x7F != 0x7F, random - 1)
    if key.dtype == FP8_FNUZ:
        random = random.where(random != 0x80, 0)
    return random.view(key.storage_dtype)


def scales(rows: int, groups: int, key: QuantKey, exponents: tuple[int, int] = (-10, 10)) -> Tensor:
    """[rows, groups] in the dtype of the key."""
    powers = torch.randint(*exponents, (rows, groups)).int()
    if key.scale.dtype == E8M0:
        return (powers + 127).to(torch.uint8).view(E8M0)
    if key.scale.dtype == FP8:
        return (torch.rand(rows, groups) * 448).to(FP8)
    return formats.power(powers) if key.scale.power_of_two else torch.rand(rows, groups) + 0.01


def activation(tokens: int, cols: int, key: QuantKey, **options) -> QuantizedActivation:
    shape = (1, 1) if key.per_tensor else (tokens, key.groups(cols))
    scale = formats.arrange(scales(*shape, key, **options), key.scale)
    zero = None if key.symmetric else formats.arrange(torch.randint(-128, 128, shape).int(), key.scale)
    scale2 = torch.rand(1) if key.scale2 else None
    return QuantizedActivation(codes(tokens, cols, key), scale, key, torch.float32, scale2, zero)


def weight(outs: int, cols: int, key: QuantKey, **options) -> Weight:
    scale = formats.arrange(scales(*scale_shape((outs, cols), key.scale.group_shape), key, **options), key.scale)
    return codes(outs, cols, key), scale, key, torch.rand(1) if key.scale2 else None


def linear(x: QuantizedActivation, w: Weight, bias: Tensor | None = None, dtype=torch.float32, **options) -> Tensor:
    data, scale, key, scale2 = w
    return fused_ops.scaled_linear(
        x, data, scale, bias, out_dtype=dtype, weight_key=key, weight_scale2=scale2, **options
    )


def rows(x: QuantizedActivation, index) -> QuantizedActivation:
    """Some rows, their scales laid out anew."""
    key = x.quant_key

    def some(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or key.per_tensor:
            return tensor
        logical = formats.logical(tensor, x.data.shape[0], key.groups(x.orig_shape[-1]), key.scale)[index]
        dtype = torch.float32 if key.scale.layout == ScaleLayout.PACKED_UE8M0 else tensor.dtype
        return formats.arrange(logical.to(dtype), key.scale)

    return replace(x, data=x.data[index], scale=some(x.scale), zero_point=some(x.zero_point))


def changed(x: QuantizedActivation, **changes) -> QuantizedActivation:
    return QuantizedActivation(**{**x.__dict__, **changes})


# --- exact values ---


def decoded_activation(x: QuantizedActivation) -> Tensor:
    return exact_values(x.data, x.scale, x.quant_key, x.scale2, x.zero_point)


def check_close(y: Tensor, x: Tensor, w: Tensor, terms: int, context: str = "") -> None:
    """Within the rounding of a float32 sum of so many terms."""
    bound = (terms + 4) * 2.0**-24 * (x.abs() @ w.abs().t())
    assert ((y.double() - x @ w.t()).abs() <= bound).all(), context


def multiple(*keys: QuantKey) -> int:
    """What their K must be a multiple of."""
    return max(1 if key.scale.dtype == torch.float32 else key.scale.group_shape.cols for key in keys)


# --- other processes ---


def run_python(script: str, **environment: str) -> str:
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **environment, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"exit status {done.returncode}"
    return done.stdout
