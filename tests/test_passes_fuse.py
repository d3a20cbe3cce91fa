"""Passes over rows, one computation at a time: spellings, users, views, and why something was left."""

import pytest
import torch
from passes import Compiled, same_on_both_backends
from ranks import threads
from torch.nn import functional as F

import fused_ops
from fused_ops import AllReduceWorkspace
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN

DTYPES = torch.bfloat16, torch.float16, torch.float32


def rows(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scaled(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def times_itself(x, r, weight):
    return weight * (r * torch.rsqrt((r * r).mean(-1, True) + 2e-6)).to(x.dtype)


def llama(x, weight, eps=1e-6):
    return weight * scaled(x.float(), eps).to(x.dtype)


NORMS = {
    "times itself": lambda x, w: times_itself(x, x.float(), w),
    "square": lambda x, w: (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 0.1) * w).to(x.dtype),
    "one over the root": lambda x, w: w * (x.float() * (1 / (x.float().pow(2).mean(-1, True) + 1).sqrt())).to(x.dtype),
    "over the root": lambda x, w: w * (x.float() / torch.sqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(x.dtype),
    "torch's": lambda x, w: F.rms_norm(x, (64,), w, 1e-5),
    "gemma's": lambda x, w: (scaled(x.float(), 1e-6) * (1.0 + w.float())).to(x.dtype),
    "without weight": lambda x, w: scaled(x.float(), 1e-6).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("spelling", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spellings_of_a_norm(spelling, dtype):
    x, weight = rows(3, 5, 64, dtype=dtype), rows(64, dtype=dtype, seed=1)
    compiled = Compiled(NORMS[spelling])
    with fused_ops.use_backend("reference"):
        found, expected = compiled(x, weight), NORMS[spelling](x, weight)
    assert compiled.calls == {"rms_norm": 1}, compiled.misses
    torch.testing.assert_close(found, expected)


ROOTS = {
    "of columns": lambda x: x / torch.sqrt(x.square().mean(0, keepdim=True) + 1e-6),
    "alone": lambda x: 1 / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "reciprocal": lambda x: (x.square().mean(-1, keepdim=True) + 1e-6).sqrt().reciprocal() * 3,
    "of another": lambda x: (x + 1) / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("spelling", ROOTS)
def test_a_root_of_no_norm_keeps_its_bits(spelling):
    x = rows(5, 64, dtype=torch.float32)
    compiled = Compiled(ROOTS[spelling])
    assert torch.equal(compiled(x), ROOTS[spelling](x))
    assert not compiled.calls


def test_a_root_that_is_used_besides_its_norm_keeps_its_bits():
    def function(x, weight):
        root = torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return weight * (x / root), (x + 1) / root

    x, weight = rows(5, 64, dtype=torch.float32), rows(64, dtype=torch.float32, seed=1)
    compiled = Compiled(function)
    assert torch.equal(compiled(x, weight)[1], function(x, weight)[1])
    assert compiled.calls == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
def test_layer_norm(dtype, given):
    x, *both = rows(3, 5, 64, dtype=dtype), rows(64, dtype=dtype, seed=1), rows(64, dtype=dtype, seed=2)
    weight, bias = (t if there else None for t, there in zip(both, given, strict=True))
    compiled = Compiled(lambda x: F.layer_norm(x, (64,), weight, bias, 1e-5))
    torch.testing.assert_close(compiled(x), F.layer_norm(x, (64,), weight, bias, 1e-5))
    assert compiled.calls == {"layer_norm": 1}, compiled.misses


def oai(gate, up, alpha=1.5):
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


ACTIVATIONS = {
    "silu_mul": lambda x: F.silu(x[..., :64]) * x[..., 64:],
    "silu_mul of chunks": lambda x: (lambda gate, up: up * F.silu(gate))(*x.chunk(2, -1)),
    "gelu_tanh_mul": lambda x: F.gelu(x[..., :64], approximate="tanh") * x[..., 64:],
    "relu2": lambda x: F.relu(x).square(),
    "relu2 by power": lambda x: x.clamp_min(0) ** 2,
    "swiglu_oai_mul": lambda x: oai(x[..., :64], x[..., 64:]),
    "swiglu_oai_mul in turn": lambda x: oai(x[..., ::2], x[..., 1::2]),
    "swiglu_oai_mul whose alpha is 1": lambda x: oai(x[..., :64], x[..., 64:], 1.0),
    "swiglu_oai_mul in turn, whose alpha is 1": lambda x: oai(x[..., ::2], x[..., 1::2], 1.0),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spellings_of_an_activation(spelling, dtype):
    x = rows(3, 5, 128, dtype=dtype)
    compiled = Compiled(ACTIVATIONS[spelling])
    with fused_ops.use_backend("reference"):
        assert torch.equal(compiled(x), ACTIVATIONS[spelling](x))
    assert compiled.calls == {spelling.partition(" ")[0]: 1}, compiled.misses


def test_one_gate_of_several():
    def function(gate, a, b):
        return F.silu(gate) * a, b * F.silu(gate), F.silu(gate)

    compiled, inputs = Compiled(function), [rows(3, 64, seed=seed) for seed in range(3)]
    assert same_on_both_backends(lambda *x: compiled(*x)[2], lambda *x: function(*x)[2], *inputs)
    with fused_ops.use_backend("reference"):
        assert all(map(torch.equal, compiled(*inputs), function(*inputs)))
    assert compiled.calls == {"silu_mul": 2}


def test_limits_that_differ_are_left():
    def function(gate, up):
        gate, up = gate.clamp(max=2.0), up.clamp(-3.0, 2.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.5))

    compiled = Compiled(function)
    compiled(rows(3, 64), rows(3, 64))
    assert "up is clamped to -3.0 and 2.0" in compiled.misses
    assert not compiled.calls


X, RESIDUAL, WEIGHT = rows(2, 6, 64), rows(2, 6, 64, seed=1), rows(64, seed=2)


def test_a_sum_and_a_norm_with_more_users():
    def function(x, residual):
        total = x * 0.22 + residual
        y = llama(total, WEIGHT)
        return y @ y.mT, y, total * 2

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"fused_add_rms_norm": 1}


def test_quantized_once_for_several_and_kept_for_another():
    def function(x, residual):
        y = llama(x + residual, WEIGHT)
        a = fused_ops.quantize(y, FP8_DYNAMIC_TOKEN)
        b = fused_ops.quantize(y, FP8_DYNAMIC_TOKEN)
        c = fused_ops.quantize(y, INT8_DYNAMIC_TOKEN)
        return a.data, a.scale, b.data.float() * 2, c.data, c.scale

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"fused_add_rms_norm_quant": 1, "quantize": 1}


@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_views_between(key, dynamic):
    def function(x, up):
        a = fused_ops.quantize((F.silu(x) * up).reshape(-1, 64), key)
        return a.data, a.scale

    compiled = Compiled(function, dynamic=dynamic)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"silu_mul_quant": 1}, compiled.misses


def test_views_that_split_rows_are_left():
    def function(x, up):
        a = fused_ops.quantize((F.silu(x) * up).reshape(-1, 16), FP8_DYNAMIC_TOKEN)
        return a.data, a.scale

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"silu_mul": 1, "quantize": 1}


def test_a_result_that_is_used_before_all_inputs_are_there():
    def function(x, residual, up):
        total = x + residual
        early = total * 2
        y = llama(total, up.tanh()[0, 0])
        return y, early

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL, X)
    assert compiled.calls == {"fused_add_rms_norm": 1}, compiled.misses


def test_a_result_that_an_input_depends_on_stays():
    def function(x, residual):
        total = x + residual
        return llama(total, total.tanh()[0, 0])

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"rms_norm": 1}
    assert "which is an input, depends on" in compiled.misses


def test_padded_rows():
    def function(x, residual):
        total = x + residual
        y = llama(total, WEIGHT)
        return F.pad(y, (0, 192)), y[..., :3] * 2, total

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"fused_add_rms_norm_pad": 1}, compiled.misses


def test_a_residual_of_another_dtype_is_left():
    compiled = Compiled(lambda x, residual: llama((x + residual), WEIGHT.float()))
    compiled(X, RESIDUAL.float())
    assert "residual is bfloat16[2, 6, 64], x float32[2, 6, 64]" in compiled.misses
    assert compiled.calls == {"rms_norm": 1}


def test_a_norm_with_another_user_than_the_addition_is_left():
    def function(x, residual):
        y = llama(x, WEIGHT)
        return y, residual + y

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, X, RESIDUAL)
    assert compiled.calls == {"rms_norm": 1}
    assert "another user than the addition" in compiled.misses


@pytest.mark.parametrize("second", [lambda x: llama(x, WEIGHT), lambda x: x + 1], ids=["norm", "sum"])
def test_a_view_of_what_passes_put_in_is_written_elsewhere(second):
    def function(x):
        y, z = llama(x, WEIGHT), second(x)
        z.view(-1)[torch.tensor([1, 5])] = 9
        return y, y * 2, z, x + 1

    compiled = Compiled(function)
    with fused_ops.use_backend("reference"):
        found = compiled(X)
        assert all(torch.equal(a, b) for a, b in zip(found, function(X), strict=True))
    assert compiled.calls == {"rms_norm": 1}


def test_memory_that_is_read_by_strides_keeps_its_order():
    def function(x):
        return llama(x.transpose(0, 1), WEIGHT).as_strided((6, 64), (64, 1))

    compiled = Compiled(function)
    assert same_on_both_backends(compiled, function, torch.randn(3, 6, 64).bfloat16())
    assert not compiled.calls
    assert "its memory is read by strides (as_strided)" in compiled.misses


def test_an_eps_that_is_an_input():
    compiled = Compiled(lambda x, eps: llama(x, WEIGHT, eps), dynamic=True)
    for eps in 1e-6, 0.5:
        with fused_ops.use_backend("reference"):
            assert torch.equal(compiled(X, eps), llama(X, WEIGHT, eps))
    assert compiled.calls["rms_norm"] >= 1


def test_an_eps_that_is_a_tensor_is_left():
    compiled = Compiled(llama)
    compiled(X, WEIGHT, torch.tensor(1e-6, dtype=torch.float64))
    assert not compiled.calls
    assert "eps is a tensor, expected a number" in compiled.misses


def test_branches_are_graphs_too():
    """As Inductor has them."""

    def function(x, y):
        taken = torch.cond(x.sum() > 0, lambda x: llama(x, WEIGHT), lambda x: llama(x, WEIGHT, 0.5) * 2, (x,))
        return taken, F.silu(y) * x

    compiled = Compiled(function)
    for x in X.abs(), -X.abs():
        assert same_on_both_backends(lambda *args: compiled(*args)[1], lambda *args: function(*args)[1], x, X)
        with fused_ops.use_backend("reference"):
            assert all(map(torch.equal, compiled(x, X), function(x, X)))
    assert compiled.calls == {"rms_norm": 2, "silu_mul": 1}


@pytest.mark.parametrize("scatter", [False, True])
def test_norms_of_sums_over_ranks(scatter):
    def on_rank(group):
        workspace = AllReduceWorkspace(group, 64, 64, torch.bfloat16, timeout=20)
        total = fused_ops.reduce_scatter if scatter else fused_ops.all_reduce

        def function(x, residual):
            r = total(x, workspace) * 0.5 + residual
            a = fused_ops.quantize(llama(r, WEIGHT), FP8_DYNAMIC_TOKEN)
            return a.data, a.scale, r, fused_ops.all_reduce(r, workspace)

        x, residual = rows(6, 64, seed=3), rows(6, 64, seed=4)
        compiled = Compiled(function)
        return same_on_both_backends(compiled, function, x, residual), compiled.calls

    for same, calls in threads(1, on_rank, seconds=20):
        assert same
        name = "reduce_scatter" if scatter else "all_reduce"
        assert calls == {f"{name}_fused_add_rms_norm_quant": 1, "all_reduce": 1}


def test_torchs_own_sum_over_ranks_is_left():
    def on_rank(group):
        ops = torch.ops._c10d_functional

        def function(x, residual):
            total = ops.wait_tensor(ops.all_reduce(x, "sum", group.group_name))
            return llama(total + residual, WEIGHT)

        compiled = Compiled(function)
        compiled(X, RESIDUAL)
        return compiled.misses

    for misses in threads(1, on_rank, seconds=20):
        assert "the sum over ranks is torch's" in misses
