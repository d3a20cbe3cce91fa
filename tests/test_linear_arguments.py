"""What products of quantized operands read, write and refuse. The operands come from linear_operands.py."""

import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from compare import assert_same
from linear_operands import (
    COMPILED,
    SWIZZLED,
    Weight,
    activation,
    changed,
    codes,
    compiled_only,
    each_backend,
    linear,
    run_python,
    weight,
)

import fused_ops
from fused_ops.linear import block_key, usual_weight
from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR_ASYM,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    ScaleLayout,
    formats,
)
from quant.key import FP8, FP8_FNUZ

# --- memory ---


@pytest.mark.skipif(not COMPILED or sys.platform != "linux", reason="needs compiled kernels and mprotect")
def test_nothing_behind_the_tensors_is_read():
    """Weight, activation and scales each end where an inaccessible page begins."""
    run_python("""
import ctypes, mmap, torch
from fused_ops.linear import usual_weight
from linear_operands import COLS, KEYS, WEIGHTS, activation, changed, linear, multiple, weight
libc, page, kept = ctypes.CDLL(None), mmap.PAGESIZE, []
def guarded(tensor):
    if tensor is None:
        return None
    strides = [s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride())]
    count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides))
    bytes = count * tensor.element_size()
    size = (bytes + page - 1) // page * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
    kept.append(memory)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size)[size - bytes:].view(tensor.dtype)
    copy = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
    copy.copy_(tensor)
    return copy
def check(x, w):
    tensors = {name: guarded(getattr(x, name)) for name in ("data", "scale", "scale2", "zero_point")}
    bias = guarded(torch.zeros(w[0].shape[0]))
    linear(changed(x, **tensors), (guarded(w[0]), guarded(w[1]), w[2], guarded(w[3])), bias)
    for memory in kept:
        assert libc.mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), page, 3) == 0
    kept.clear()
for key in KEYS:
    for cols in COLS:
        cols += -cols % multiple(key)
        for tokens in 1, 4, 7:
            check(activation(tokens, cols, key), weight(37, cols, usual_weight(key)))
for key in WEIGHTS:
    for cols in 32, 96, 608:
        for tokens in 1, 7:
            check(activation(tokens, cols, KEYS[0]), weight(37, cols, key))
""")


@compiled_only
@pytest.mark.parametrize("key", SWIZZLED, ids=str)
def test_padding_of_a_layout_counts_for_nothing(key):
    """On either side: bytes of a swizzled buffer that belong to no row or no group. Others are poisoned by conftest."""
    x, w = activation(33, 160, key), weight(37, 160, key)
    expected = linear(x, w)
    for scale, count in (x.scale, 33), (w[1], 37):
        bytes, used = scale.view(torch.uint8), torch.zeros(scale.numel(), dtype=torch.bool)
        used[formats._swizzled(count, key.groups(160), "cpu").flatten()] = True
        assert used.sum() < used.numel()
        bytes[~used] = 0xFF
    assert_same(linear(x, w), expected)


def test_out_is_written_and_nothing_beside_it():
    for key in INT8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN_ASYM, NVFP4:
        x, w = activation(3, 64, key), weight(8, 64, usual_weight(key))
        expected = linear(x, w)
        wide = torch.full((3, 20), 7.0)
        out = linear(x, w, out=wide[:, 4:12])
        assert out.data_ptr() == wide[:, 4:].data_ptr()
        assert_same(out.contiguous(), expected)
        assert (wide[:, :4] == 7).all()
        assert (wide[:, 12:] == 7).all()


@compiled_only
@pytest.mark.parametrize(
    ("key", "name"),
    [
        *product([NVFP4], ["data", "weight", "scale", "weight_scale", "scale2", "weight_scale2", "bias"]),
        (INT8_DYNAMIC_TOKEN_ASYM, "zero_point"),
        (FP8_DYNAMIC_GROUP_64.with_scale(layout=ScaleLayout.TMA_ALIGNED), "scale"),
    ],
)
def test_out_must_not_be_an_input(key, name):
    x, w = activation(5, 512, key), weight(64, 512, usual_weight(key))
    inputs = {"data": x.data, "scale": x.scale, "scale2": x.scale2, "zero_point": x.zero_point}
    inputs |= {"weight": w[0], "weight_scale": w[1], "weight_scale2": w[3], "bias": torch.randn(64)}
    given = inputs[name]
    storage = torch.zeros(8192)
    place = storage.view(given.dtype).as_strided(given.shape, given.stride(), 0)
    inputs[name] = place.copy_(given)
    x = changed(x, **{n: inputs[n] for n in ("data", "scale", "scale2", "zero_point")})
    w = (inputs["weight"], inputs["weight_scale"], w[2], inputs["weight_scale2"])
    end = given.element_size() * (1 + sum((n - 1) * s for n, s in zip(given.shape, given.stride(), strict=True)))
    last = (end - 1) // 4  # the word with the input's last byte
    for start in 0, last:
        out = storage[start:][: 5 * 64].view(5, 64)
        with pytest.raises(ValueError, match="scaled_linear: out: overlaps"):
            linear(x, w, inputs["bias"], out=out)
    assert_same(place, given)


# --- errors ---


X, W = activation(3, 320, FP8_DYNAMIC_TOKEN), weight(40, 320, block_key(FP8, 1, -1))
GROUPED, BLOCKS = activation(3, 320, FP8_DYNAMIC_GROUP_128), block_key(FP8, 128, 128)
NV, NV_WEIGHT = activation(3, 320, NVFP4), weight(40, 320, NVFP4)
ASYM, ASYM_TOKEN = activation(3, 320, INT8_STATIC_TENSOR_ASYM), activation(3, 320, INT8_DYNAMIC_TOKEN_ASYM)
FNUZ = replace(FP8_DYNAMIC_TOKEN, dtype=FP8_FNUZ)
SWAPPED = weight(40, 320, SWIZZLED[0])


def given(x: QuantizedActivation, **changes) -> dict:
    return {"activation": changed(x, **changes)}


def given_weight(w: Weight, **changes) -> dict:
    return {"weight": w[0], "weight_scale": w[1], "weight_key": w[2], "weight_scale2": w[3], **changes}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": X.data}, TypeError, "activation is Tensor, expected a QuantizedActivation"),
        (given(X, quant_key=FNUZ), TypeError, "data is torch.float8_e4m3fn, expected torch.float8_e4m3fnuz"),
        (given(X, quant_key=BLOCKS), ValueError, "activation has groups that span rows"),
        (given(X, quant_key=W[2]), ValueError, "activation is torch.*, which no product takes"),
        (
            {"activation": activation(3, 320, FP8_DYNAMIC_TOKEN.with_scale(group_shape=(1, 48)))},
            ValueError,
            r"activation is .*per 1x48, which no product takes",
        ),
        (
            {"activation": activation(3, 319, FP8_DYNAMIC_TOKEN)},
            ValueError,
            r"weight is \[40, 320\].* expected \[N, 319\]",
        ),
        (given(X, data=X.data[:, :0]), ValueError, "K is 0"),
        (given(X, data=X.data.view(torch.int8)), TypeError, "data is torch.int8, expected torch.float8"),
        (given(X, data=None), TypeError, "data is None"),
        (given(X, scale=None), TypeError, "scale is NoneType"),
        (given(X, scale=torch.ones(2, 1)), ValueError, r"scale is \[2, 1\]"),
        (given(X, scale=torch.ones(3, 2)), ValueError, r"scale is \[3, 2\]"),
        (given(X, scale=torch.ones(3, 1).half()), TypeError, "scale is torch.float16"),
        (given(X, scale2=torch.ones(1)), ValueError, "scale2 is given, but FP8_DYNAMIC_TOKEN takes none"),
        (given(X, zero_point=X.scale.int()), ValueError, "zero_point is given, but FP8_DYNAMIC_TOKEN"),
        (given(GROUPED, scale=torch.ones(3, 2)), ValueError, r"scale is \[3, 2\].* expected \[3, 3\]"),
        (
            given(GROUPED, scale=torch.ones(3, 3).t().contiguous().t()),
            ValueError,
            r"scale is \[3, 3\] with strides \(1, 3\)",
        ),
        (
            given(GROUPED, quant_key=FP8_DYNAMIC_GROUP_128.with_scale(layout=ScaleLayout.TMA_ALIGNED)),
            ValueError,
            r"scale is \[3, 3\] with strides \(3, 1\).* strides \(1, 4\)",
        ),
        (given(NV, scale2=None), TypeError, "scale2 is NoneType, NVFP4 takes a Tensor"),
        (given(NV, scale2=torch.ones(2)), ValueError, r"scale2 is \[2\]"),
        (given(NV, scale=NV.scale.float()), TypeError, "scale is torch.float32, expected torch.float8"),
        (given(NV, scale=NV.scale[:, :-1]), ValueError, r"scale is \[3, 19\].* expected \[3, 20\]"),
        (given(NV, data=NV.data[:, :-2]), ValueError, "K is 316, NVFP4 expects a multiple of 16"),
        (given(ASYM, zero_point=None), TypeError, "zero_point is NoneType, INT8_STATIC_TENSOR_ASYM"),
        (given(ASYM, zero_point=torch.zeros(1)), TypeError, "zero_point is torch.float32"),
        (
            given(ASYM, zero_point=torch.tensor([128]).int()),
            ValueError,
            "zero_point has 128, expected -128 to 127",
        ),
        (
            given(ASYM_TOKEN, zero_point=torch.tensor([[0], [1], [-129]]).int()),
            ValueError,
            "zero_point has -129, expected -128 to 127",
        ),
        (given(ASYM_TOKEN, zero_point=torch.zeros(2, 1).int()), ValueError, r"zero_point is \[2, 1\]"),
        ({"weight": W[0][None]}, ValueError, r"weight is \[1, 40, 320\]"),
        ({"weight": W[0][0]}, ValueError, r"weight is \[320\]"),
        ({"weight": None}, TypeError, "weight is None"),
        ({"weight": W[0].float()}, TypeError, "weight is torch.float32"),
        ({"weight": codes(320, 40, W[2]).t()}, ValueError, "weight has strides"),
        ({"weight": W[0].view(torch.uint8)}, TypeError, "weight is torch.uint8 with torch.float32, which"),
        ({"weight_scale": None}, TypeError, "weight_scale is NoneType"),
        ({"weight_scale": W[1][:39]}, ValueError, r"weight_scale is \[39, 1\]"),
        ({"weight_scale": W[1].double()}, TypeError, "weight_scale is torch.float64, expected torch.float32"),
        ({"weight_scale": torch.ones(80, 1)[::2]}, ValueError, r"weight_scale is \[40, 1\] with strides \(2, 1\)"),
        ({"weight_scale": torch.ones(1, 2)}, ValueError, r"weight_scale is \[1, 2\]"),
        ({"weight_scale": torch.ones(2)}, ValueError, r"weight_scale is \[2\]"),
        ({"weight_scale2": torch.ones(1)}, ValueError, "weight_scale2 is given"),
        ({"weight_key": torch.int8}, TypeError, "weight_key is dtype, expected a QuantKey"),
        ({"weight_key": block_key(torch.int8, 1, -1)}, TypeError, "weight is torch.float8_e4m3fn, expected torch.int8"),
        ({"weight_key": BLOCKS}, ValueError, r"weight_scale is \[40, 1\], expected \[1, 3\]"),
        (
            {"weight_key": block_key(torch.int8, 128, 128)},
            TypeError,
            "weight is torch.float8_e4m3fn, expected torch.int8",
        ),
        ({"weight_key": block_key(FP8, 32, 32)}, ValueError, "weight_key is torch.*, which no product takes"),
        ({"weight_key": block_key(FP8, 1, 48)}, ValueError, "weight is torch.*, which no product takes"),
        ({"weight_key": FP8_DYNAMIC_GROUP_64}, ValueError, r"weight_scale is \[40, 1\].* expected \[40, 5\]"),
        ({"weight_key": MXFP8}, TypeError, "weight_scale is torch.float32, expected torch.float8_e8m0fnu"),
        ({"weight_key": FNUZ}, TypeError, "weight is torch.float8_e4m3fn, expected torch.float8_e4m3fnuz"),
        (
            {"weight_key": FP8_DYNAMIC_GROUP_64.with_scale(layout=ScaleLayout.COLUMN_MAJOR)},
            ValueError,
            "weight is FP8_DYNAMIC_GROUP_64.COLUMN_MAJOR., which no product takes",
        ),
        ({"weight_key": INT8_STATIC_TENSOR_ASYM}, ValueError, "weight is INT8_STATIC_TENSOR_ASYM, which no product"),
        (given_weight(NV_WEIGHT, weight=NV_WEIGHT[0][:, :-1]), ValueError, r"weight is \[40, 159\] of NVFP4"),
        (given_weight(NV_WEIGHT, weight_scale=NV_WEIGHT[1][:, :-1]), ValueError, r"weight_scale is \[40, 19\]"),
        (given_weight(NV_WEIGHT, weight_scale2=None), TypeError, "weight_scale2 is NoneType, NVFP4 takes"),
        (given_weight(NV_WEIGHT, weight_scale2=torch.ones(1).half()), TypeError, "weight_scale2 is torch.float16"),
        (given_weight(SWAPPED, weight_scale=SWAPPED[1][:-1]), ValueError, r"weight_scale is \[1535\].*\[1536\]"),
        (given_weight(SWAPPED, weight_scale=SWAPPED[1].repeat(2)[::2]), ValueError, r"weight_scale .*strides \(2,\)"),
        ({"bias": torch.ones(39)}, ValueError, r"bias is \[39\], expected \[40\]"),
        ({"bias": torch.ones(40).double()}, TypeError, "bias is torch.float64"),
        ({"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64"),
        (given_weight(NV_WEIGHT, out_dtype=None, out=None), TypeError, "out_dtype is None"),
        ({"out": torch.ones(3, 41)}, ValueError, r"out is \[3, 41\]"),
        ({"out": torch.ones(3, 40).half()}, TypeError, "out is torch.float16"),
    ],
)
@each_backend
def test_errors_name_argument_got_and_expected(backend, change, error, message):
    out = torch.full((3, 40), 7.0)
    arguments = {
        "activation": X,
        "weight": W[0],
        "weight_scale": W[1],
        "out_dtype": torch.float32,
        "out": out,
        **change,
    }
    with fused_ops.use_backend(backend), pytest.raises(error, match="scaled_linear: .*" + message):
        fused_ops.scaled_linear(**arguments)
    assert (out == 7).all()
    if "out" not in change:
        with fused_ops.use_backend(backend), pytest.raises(error, match="scaled_linear: .*" + message):
            fused_ops.scaled_linear(**{**arguments, "out": None})
