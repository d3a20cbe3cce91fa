import pairwise
import pytest
import torch
from compare import assert_same

import fused_ops
from fused_ops import OPS
from fused_ops._op import NO_KEY
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR_ASYM,
    MXFP8,
    NVFP4,
    QuantizedActivation,
    QuantKey,
    ScaleDesc,
)
from quant.key import FP8

OP = OPS["dual_rms_norm"]


def is_static(code: int) -> bool:
    return code != NO_KEY and QuantKey.from_code(code).scale.static


def same(a, b, context=""):
    assert type(a) is type(b)
    if not isinstance(a, QuantizedActivation):
        return assert_same(a.contiguous(), b.contiguous(), context)
    for name in "data", "scale", "zero_point", "unquantized":
        assert_same(getattr(a, name), getattr(b, name), f"{context} {name}")


@pytest.mark.parametrize("backend", OP.backends)
def test_it_is_two_norms_bit_for_bit(backend):
    step = 40 if backend == "triton" else 1  # which is interpreted
    for args in pairwise.sample(OP.cases("cpu"))[::step]:
        zero_points = args[11:] or (None, None)
        sides = zip(args[:2], args[2:4], args[4:6], args[7:9], args[9:11], zero_points, strict=True)
        with fused_ops.use_backend(backend):
            made = dict(zip(OP.outputs, OP.empty(*args), strict=True))
            static = [f"{side}_scale" for side, code in zip(("q", "kv"), args[7:9], strict=True) if is_static(code)]
            OP.out(*args, **{f"{name}_out": t for name, t in made.items() if t is not None and name not in static})
            for side, (x, weight, eps, code, given, zero_point) in zip(("q", "kv"), sides, strict=True):
                y = OPS["rms_norm"].default(x, weight, eps, args[6])
                expected = {"": y}
                if code != NO_KEY:
                    key = QuantKey.from_code(code)
                    kind = "scale" if key.scale.static else "scale2" if key.scale2 else "scale_ub"
                    z = fused_ops.quantize(y, key, **{kind: given}, zero_point=zero_point, keep_unquantized=True)
                    expected = {"": z.data, "_unquantized": y}
                    if not key.scale.static:
                        expected |= {"_scale": z.scale} | ({} if key.symmetric else {"_zero_point": z.zero_point})
                for name, e in expected.items():
                    assert_same(made[side + name], e, f"{side}{name} {code}")


INPUTS = OP.workload(7, 1024, None, torch.bfloat16, "cpu")[:6]
ONE = torch.tensor([0.05])


@pytest.mark.parametrize(
    ("q_key", "q_options"),
    [
        (None, {}),
        (None, {"out": torch.empty(7, 768).bfloat16()}),
        (INT8_DYNAMIC_TOKEN, {}),
        (INT8_DYNAMIC_TOKEN, {"keep_unquantized": True}),
        (INT8_DYNAMIC_TOKEN_ASYM, {}),
        (INT8_STATIC_TENSOR_ASYM, {"scale": ONE, "zero_point": torch.tensor([3], dtype=torch.int32)}),
        (FP8_STATIC_TENSOR, {"scale": ONE}),
        (FP8_DYNAMIC_TENSOR, {}),
        (MXFP8, {}),
        (NVFP4, {"scale2": ONE}),
    ],
    ids=lambda value: str(value) if value is None or isinstance(value, QuantKey) else "-".join(value),
)
def test_the_public_function_is_two_calls_of_rms_norm_quant(q_key, q_options):
    q, kv, q_weight, kv_weight, q_eps, kv_eps = INPUTS
    for kv_key in None, FP8_DYNAMIC_GROUP_128:
        made = fused_ops.dual_rms_norm(
            *INPUTS, q_quant_key=q_key, kv_quant_key=kv_key, q_options=q_options, weight_bias=1.0
        )
        same(made[0], fused_ops.rms_norm_quant(q, q_weight, q_eps, q_key, weight_bias=1.0, **q_options))
        same(made[1], fused_ops.rms_norm_quant(kv, kv_weight, kv_eps, kv_key, weight_bias=1.0))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (1, INPUTS[1][:3], ValueError, r"kv is \[3, 256\], expected \[7, columns\]"),
        (1, INPUTS[1].half(), TypeError, "kv is torch.float16, expected torch.bfloat16 as q"),
        (2, INPUTS[2][:5], ValueError, r"q_weight is \[5\], expected \[768\]"),
        (3, INPUTS[3][:5], ValueError, r"kv_weight is \[5\], expected \[256\]"),
        (4, "small", TypeError, "q_eps is str"),
        (5, float("nan"), ValueError, "kv_eps is nan, expected at least 0"),
    ],
)
def test_errors_name_argument_got_and_expected(position, value, error, message):
    args = list(INPUTS)
    args[position] = value
    with pytest.raises(error, match="dual_rms_norm: " + message):
        fused_ops.dual_rms_norm(*args)


def test_options_without_a_key_and_outputs_that_overlap_are_refused():
    with pytest.raises(ValueError, match="dual_rms_norm, q: scale is given, but quant_key is None"):
        fused_ops.dual_rms_norm(*INPUTS, q_options={"scale": ONE})
    with pytest.raises(TypeError, match="dual_rms_norm, q: quant_key is str"):
        fused_ops.dual_rms_norm(*INPUTS, q_quant_key="int8")
    with pytest.raises(ValueError, match="dual_rms_norm, kv: quant_key has groups that span rows"):
        fused_ops.dual_rms_norm(*INPUTS, kv_quant_key=QuantKey(FP8, ScaleDesc(torch.float32, False, (128, 128))))
    with pytest.raises(TypeError, match="dual_rms_norm, kv: got an unexpected keyword argument 'scael'"):
        fused_ops.dual_rms_norm(*INPUTS, kv_quant_key=INT8_DYNAMIC_TOKEN, kv_options={"scael": ONE})
    out = torch.zeros(7, 768).bfloat16()
    with pytest.raises(ValueError, match="kv_weight"):  # nothing is written for q either
        fused_ops.dual_rms_norm(*INPUTS[:3], INPUTS[3][:5], *INPUTS[4:], q_options={"out": out})
    assert not out.any()
    both = torch.empty(7, 768).bfloat16()
    for backend in OP.backends:
        with fused_ops.use_backend(backend), pytest.raises(ValueError, match=r"shares memory with|overlaps another"):
            fused_ops.dual_rms_norm(*INPUTS, q_options={"out": both}, kv_options={"out": both[:, :256]})
    if "cpu" in OP.backends:
        packed = torch.randn(4, 1024).bfloat16()
        q, kv = packed.split([768, 256], dim=1)
        args = (q, kv, None, None, 1e-6, 1e-6, 0, NO_KEY, NO_KEY, None, None)
        expected = OP.default(*args)
        OP.out(*args, q_out=q, kv_out=kv)  # each in the place of its own input
        assert_same(packed, torch.cat([expected[0], expected[2]], dim=1))
        with pytest.raises(RuntimeError, match="overlaps another argument"):
            OP.out(*args, q_out=packed[:, 256:], kv_out=torch.empty_like(kv))


def test_the_key_codes_are_those_of_keys():
    with pytest.raises((RuntimeError, ValueError)):
        OP.default(*INPUTS, 0, -2, NO_KEY, None, None)
    assert QuantKey.from_code(INT8_DYNAMIC_TOKEN.code) == INT8_DYNAMIC_TOKEN
