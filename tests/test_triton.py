"""The Triton backend: in Triton's interpreter, or with FUSED_OPS_TEST_DEVICE=cuda on a GPU."""

import os
import sys

import promises
import pytest
import torch
from compare import assert_close, assert_same
from keys import EVERY_KEY, given_tensors, layouts
from promises import DEVICE, on_device
from test_ops import ALL, ATTENTION, COLLECTIVES, as_tuple, cases, fresh, functional, results, spread
from torch import Tensor

import fused_ops
from fused_ops import OPS, _triton
from fused_ops._op import describe
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    MXFP4,
    NVFP4,
    QuantKey,
    ScaleLayout,
)

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
ELSEWHERE = (*ATTENTION, *COLLECTIVES, "grouped_scaled_linear")  # which have files of their own
SERVED = [p for p in ALL if "triton" in p.values[0].backends and p.id not in ELSEWHERE]
PER_OP = 4  # the interpreter takes hundredths of a second for a block of rows


def some(op) -> list[tuple]:
    small = [args for args in cases(op) if args[0].numel() < 4096 and blocks(op, args) < 12]
    return small[:: max(1, len(small) // PER_OP)]


def blocks(op, args) -> int:
    """About how many a kernel has: the swizzled layout adds rows up to 128."""
    swizzled = any(QuantKey.from_code(code).scale.layout == ScaleLayout.SWIZZLED_128X4 for code in op.keys(args))
    return args[0].shape[-1] * args[0].element_size() * (128 if swizzled else 1) // 1024


def by_triton(op, args) -> dict[str, Tensor]:
    with fused_ops.use_backend("triton"):
        return {name: out.cpu() for name, out in results(op, tuple(map(on_device, args))).items()}


def test_it_serves_every_operation_but_these():
    others = {p.id for p in ALL if "triton" not in p.values[0].backends}
    assert others == {"scaled_linear", "qk_all_reduce_rms_norm", "all_gather", "all_gather_quantized"}


@pytest.mark.parametrize("op", [p for p in SERVED if "qk_norm" not in p.id])
def test_results_are_the_cpus(op):
    promises.results_are_the_cpus(by_triton, op, some(op))


@pytest.mark.parametrize("op", [p for p in SERVED if "norm" in p.id and "_quant" in p.id])
def test_fused_is_unfused(op):
    promises.fused_is_unfused(by_triton, op, some(op))


@pytest.mark.parametrize("op", [p for p in SERVED if "qk_norm" in p.id])
def test_norms_of_heads_are_the_norms_of_rows(op):
    promises.heads_are_normed_first(by_triton, op, some(op))


def test_dual_rms_norm_is_two_norms():
    op, single = OPS["dual_rms_norm"], OPS["rms_norm_quant"]
    q, kv, *_ = torch.randn(3, 256).bfloat16().split([192, 64], dim=-1)
    args = (q, kv, None, torch.ones(64), 1e-6, 1e-5, 0, FP8_DYNAMIC_TOKEN.code, FP8_DYNAMIC_GROUP_128.code, None, None)
    both = by_triton(op, args)
    for name, x, weight, eps, key in ("q", q, None, 1e-6, args[7]), ("kv", kv, args[3], 1e-5, args[8]):
        one = by_triton(single, (x, weight, eps, 0, key, None))
        assert_same(both[name], one["data"])
        assert_same(both[f"{name}_scale"], one["scale"])


@pytest.mark.parametrize("op", SERVED)
def test_the_functional_overload_returns_what_the_other_writes(op):
    for args in [args for args in some(op) if functional(op, args)][-2:]:
        with fused_ops.use_backend("triton"):
            returned = dict(zip(op.outputs, as_tuple(op.default(*map(on_device, args))), strict=False))
        for name, value in by_triton(op, args).items():
            if name in returned and value.numel():
                assert_same(returned[name].cpu(), value, f"{op.name} {name} {describe(args, op)}")
        if "scale" in returned and QuantKey.from_code(args[op.argument("key")]).scale.static:
            assert_same(returned["scale"].cpu(), args[op.argument("given")])


@pytest.mark.parametrize("op", SERVED)
def test_given_outputs_may_be_strided_and_nothing_lies_beside_them(op):
    args = some(op)[-1]
    expected, moved = by_triton(op, args), tuple(map(on_device, args))
    with fused_ops.use_backend("triton"):
        outs = fresh(op, moved, row_gap=5)
        bases = spread(outs)
        edges = {name: base[..., -5:].clone() for name, base in bases.items()}
        op.out(*moved, **outs)
    for name, base in bases.items():
        assert_same(outs[name].contiguous().cpu(), expected[name.removesuffix("_out")], name)
        assert_same(base[..., -5:].contiguous(), edges[name].contiguous(), name)


def hard(rows: int, cols: int) -> Tensor:
    """Rows of normal values, zeros, denormals, an outlier, infinity, NaN."""
    x = torch.randn(rows, cols)
    x[1] = 0
    x[2] *= 1e-40
    x[3, cols // 2] = 1e30
    x[4, cols // 3], x[5, -1], x[6, 0] = float("inf"), float("nan"), -float("inf")
    return x


@EVERY_KEY
def test_quantize_of_hard_values_in_every_layout(key):
    hard_values_are_the_cpus(key, 288)


def hard_values_are_the_cpus(key, cols: int) -> None:
    if not (key.symmetric or key.scale.static or not key.per_tensor):
        pytest.skip("no kernel serves it")
    for each in layouts(key):
        x = hard(7, 32 if each.scale.layout == ScaleLayout.SWIZZLED_128X4 else cols)
        expected = fused_ops.quantize(x, each, **given_tensors(each))
        with fused_ops.use_backend("triton"):
            given = {name: on_device(tensor) for name, tensor in given_tensors(each).items()}
            actual = fused_ops.quantize(on_device(x), each, **given).to("cpu")
        for name in "data", "scale", "zero_point":
            assert_same(getattr(actual, name), getattr(expected, name), f"{name} {each}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_activations_of_hard_values(dtype):
    gate, up = (hard(7, 64).to(dtype) * 30 for _ in range(2))
    for args in (gate, up, False), (gate, up, True):
        for op in "silu_mul", "gelu_tanh_mul":
            assert_same(by_triton(OPS[op], args)["y"], results(OPS[op], args)["y"], op)
        swiglu = (*args[:2], 1.702, 1e300, args[2])
        assert_same(by_triton(OPS["swiglu_oai_mul"], swiglu)["y"], results(OPS["swiglu_oai_mul"], swiglu)["y"])


@pytest.mark.parametrize("cols", [192, 65536 + 192])
def test_gates_and_ups_that_alternate_in_groups_of_any_size(cols):
    """Groups that are no power of two have gaps between their places."""
    x, key = on_device(torch.randn(2, 2 * cols).bfloat16()), FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 96))
    with fused_ops.use_backend("triton"):
        fused = fused_ops.swiglu_oai_mul_quant(x, None, key)
        expected = fused_ops.quantize(fused_ops.swiglu_oai_mul(x, None), key)
    assert_same(fused.data.cpu(), expected.data.cpu())
    assert_same(fused.scale.cpu(), expected.scale.cpu())


def tree_sum(x: Tensor) -> Tensor:
    """What kernels promise: neighbours among eight, then halves."""
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    for _ in range(3):
        x = x[..., ::2] + x[..., 1::2]
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


@pytest.mark.parametrize("cols", [9, 300, 4096])
@pytest.mark.parametrize("key", [None, NVFP4, FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 24))], ids=str)
def test_a_sum_has_one_order(cols, key):
    """Promise 2: whatever is fused with it, whatever the alignment."""
    cols = cols if key is not NVFP4 else -(-cols // 16) * 16
    buffer = torch.randn(3 * (cols + 5) + 1)
    x = buffer[1:].view(3, cols + 5)[:, :cols]
    squares = tree_sum(x * x) / cols
    expected = x * (1 / (squares + 1e-6).double().sqrt().float())
    moved = on_device(buffer)[1:].view(3, cols + 5)[:, :cols]
    with fused_ops.use_backend("triton"):
        if key is None:
            actual = fused_ops.rms_norm(moved, None, 1e-6)
        else:
            scale2 = {"scale2": torch.ones(1, device=DEVICE)} if key.scale2 else {}
            actual = fused_ops.rms_norm_quant(moved, None, 1e-6, key, keep_unquantized=True, **scale2).unquantized
    assert_same(actual.cpu(), expected)


@pytest.mark.parametrize("cols", [24, 576])
def test_a_row_depends_on_nothing_but_itself(cols):
    """Promise 2: alone, in a batch, in dimensions that don't merge, in place."""
    x, r, w = torch.randn(6, cols).bfloat16(), torch.randn(6, cols).bfloat16(), torch.randn(cols)
    x, r, w = map(on_device, (x, r, w))

    def call(x, r, **out):
        with fused_ops.use_backend("triton"):
            q, new = fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-6, INT8_DYNAMIC_TOKEN, keep_unquantized=True, **out)
        return q.data, q.unquantized, new, q.scale

    whole = call(x, r)
    for i in 0, 5:
        for a, e in zip(call(x[i : i + 1], r[i : i + 1]), whole, strict=True):
            assert_same(a, e[i : i + 1].contiguous())
    spread = x.new_empty(2, 4, 3, cols + 8)[:, 1::2, :, :cols].transpose(1, 2)  # [2, 3, 2, cols]: no two merge
    spread.copy_(torch.stack([x.view(2, 3, cols), r.view(2, 3, cols)], dim=2))
    before = spread.clone()
    for a, e in zip(call(spread[:, :, 0], spread[:, :, 1], residual_out=spread[:, :, 1]), whole, strict=True):
        assert_same(a.reshape(e.shape).contiguous(), e)
    assert_same(spread[:, :, 0].contiguous(), before[:, :, 0].contiguous())


def test_one_scale_per_tensor_takes_two_passes_over_the_rows_and_bounds_it():
    x, w, bound = torch.randn(3, 100), torch.ones(100), torch.tensor([1.5])
    with fused_ops.use_backend("triton"):
        y = fused_ops.rms_norm(on_device(x), on_device(w), 1e-6).cpu()
        q = fused_ops.rms_norm_quant(on_device(x), on_device(w), 1e-6, FP8_DYNAMIC_TENSOR, scale_ub=on_device(bound))
    assert y.amax() > 1.5
    expected = fused_ops.quantize(y, FP8_DYNAMIC_TENSOR, scale_ub=bound)
    assert_same(q.scale.cpu(), expected.scale)
    assert_same(q.data.cpu(), expected.data)


def test_a_long_row_and_padding_wider_than_it():
    x, r, w = torch.randn(2, 4100).bfloat16(), torch.randn(2, 4100).bfloat16(), torch.randn(4100).bfloat16()
    args = x, r, w, 1e-6, 1, 20000
    actual, expected = by_triton(OPS["fused_add_rms_norm_pad"], args), results(OPS["fused_add_rms_norm_pad"], args)
    assert actual["y"].shape == (2, 20000)
    assert_close(actual["y"], expected["y"], roundings=2)
    assert_same(actual["residual"], expected["residual"])


def test_what_is_refused():
    memory = torch.zeros(4, 64, device=DEVICE)
    with fused_ops.use_backend("triton"):
        with pytest.raises(ValueError, match="the triton backend does not serve"):
            fused_ops.quantize(memory, QuantKey(torch.int8, FP8_DYNAMIC_TENSOR.scale, symmetric=False))
        with pytest.raises(ValueError, match="out overlaps another argument in memory, x"):
            fused_ops.rms_norm(memory[:3], None, 1e-6, out=memory[1:])
        with pytest.raises(ValueError, match="out overlaps another argument in memory, weight"):
            fused_ops.rms_norm(memory[0], memory[1], 1e-6, out=memory[1])
        with pytest.raises(TypeError, match="x is"):
            fused_ops.relu2(memory.int())
        with pytest.raises(ValueError, match="expects a multiple of 32"):
            fused_ops.quantize(memory[:, :48], MXFP4)
    with pytest.raises(RuntimeError, match="inference only"), fused_ops.use_backend("triton"):
        fused_ops.relu2(memory.clone().requires_grad_()).sum().backward()


def test_results_come_alone_too():
    """The overload of outputs takes any of them."""
    x = torch.randn(3, 64, device=DEVICE).bfloat16()
    with fused_ops.use_backend("triton"):
        whole = fused_ops.quantize(x, INT8_DYNAMIC_TOKEN_ASYM)
        for name in "data", "scale", "zero_point":
            alone = torch.empty_like(getattr(whole, name))
            torch.ops.fused_ops.quantize.out(x, INT8_DYNAMIC_TOKEN_ASYM.code, None, **{f"{name}_out": alone})
            assert_same(alone, getattr(whole, name))


def test_without_triton_asking_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"the triton backend needs Triton: pip install 'triton>=3.6'"):
        fused_ops.use_backend("triton")


def test_a_cpu_needs_the_interpreter(monkeypatch):
    with monkeypatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "0")
        _triton.load()
        with pytest.raises(ValueError, match="name is 'triton', which serves GPUs, and there is none on this machine"):
            fused_ops.use_backend("triton")
        environment.setattr(torch.cuda, "is_available", lambda: True)
        with (
            fused_ops.use_backend("triton"),
            pytest.raises(ValueError, match="there is no backend 'triton' for CPU on this machine"),
        ):
            fused_ops.relu2(torch.ones(1, 8))
    _triton.load()
