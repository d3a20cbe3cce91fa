import math

import pytest
import torch
from compare import assert_same, steps

import fused_ops
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_value_by_hand():
    y = fused_ops.silu_mul(torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[5.0, 2.0, 2.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.0, 2 / (1 + 0.36787944), -2 / (1 + 2.7182818)]]))


def gelu_tanh(g):
    """g / (1 + e^(-2u)), since torch's 1 + tanh(u) cancels; exact where the power is no number of float64."""
    return g / (1 + (-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).exp())


EXACT = {
    "silu_mul": lambda g: g / (1 + (-g).exp()),
    "gelu_tanh_mul": gelu_tanh,
    "swiglu_oai_mul": lambda g: g / (1 + (-(g.float() * 1.702).double()).exp()),  # float32's product, as torch
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_against_float64_over_the_whole_range(name, dtype):
    """At most one step of S (float32: 4 ulp) from the exact result, out to where exp overflows and far beyond."""
    parts = [torch.linspace(-120, 120, 200_003), torch.linspace(-1e-3, 1e-3, 10_001), torch.linspace(-3000, 3000, 9001)]
    far = torch.logspace(2, 38.4, 20_001)
    gate = torch.cat([*parts, far, -far]).to(dtype)[None]
    gate = gate[gate.isfinite()][None]
    options = {"alpha": 1.702, "limit": float("inf")} if name == "swiglu_oai_mul" else {}
    up = torch.zeros_like(gate) if options else torch.ones_like(gate)  # 1 + up
    exact = EXACT[name](gate.double())
    actual = getattr(fused_ops, name)(gate, up, **options)
    vanishing = exact.abs() < 3e-37  # e^-g is infinite, or nearly, in float32: the result is -0, as torch's own is
    assert (actual[vanishing].abs().double() < 1e-36).all()
    apart = steps(actual, exact.to(dtype))[~vanishing]
    assert apart.max() <= (4 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rounding_orders(dtype):
    gate, up = torch.randn(64, 576).to(dtype), torch.randn(64, 576).to(dtype)
    eager = torch.nn.functional.silu(gate) * up
    with fused_ops.use_backend("reference"):
        assert_same(fused_ops.silu_mul(gate, up, round_activation=True), eager)
    assert not torch.equal(fused_ops.silu_mul(gate, up), fused_ops.silu_mul(gate, up, round_activation=True))


@pytest.mark.parametrize(
    "key", [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, INT8_DYNAMIC_TOKEN], ids=str
)
def test_fused_is_the_composition_on_halves_of_one_projection(key):
    gate, up = torch.randn(5, 2 * 576).bfloat16().chunk(2, dim=-1)
    static = {"scale": torch.tensor([0.01])} if key.scale.static else {}
    for round_activation in False, True:
        q = fused_ops.silu_mul_quant(gate, up, key, round_activation=round_activation, **static)
        y = fused_ops.silu_mul(gate, up, round_activation=round_activation)
        expected = fused_ops.quantize(y, key, **static)
        assert_same(q.data, expected.data)
        assert_same(q.scale, expected.scale)
    assert_same(fused_ops.silu_mul_quant(gate, up, None), fused_ops.silu_mul(gate, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype):
    gate = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0, 0.0]]).to(dtype)
    up = torch.tensor([[1.0, 2.0, 1.0, float("nan"), float("inf")]]).to(dtype)
    for backend in fused_ops.OPS["silu_mul"].backends:
        with fused_ops.use_backend(backend):
            y = fused_ops.silu_mul(gate, up)
        assert y.isnan().tolist() == [[True, False, True, True, True]]
        assert y[0, 1] == float("inf")


G = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": G[:, :32]}, ValueError, r"up is \[2, 32\], expected \[2, 64\]"),
        ({"up": G.half()}, TypeError, "up is torch.float16, expected torch.float32 as gate"),
        ({"gate": G.double()}, TypeError, "gate is torch.float64"),
        ({"round_activation": "yes"}, TypeError, "round_activation is 'yes', expected a bool"),
        ({"round_activation": 1}, TypeError, "round_activation is 1, expected a bool"),
        (
            {"gate": torch.ones(2, 0), "up": torch.ones(2, 0)},
            ValueError,
            "gate is .*2, 0.*, expected at least one column",
        ),
    ],
)
def test_errors_name_argument_got_and_expected(change, error, message):
    with pytest.raises(error, match="silu_mul: " + message):
        fused_ops.silu_mul(**{"gate": G, "up": G} | change)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul", "swiglu_oai_mul"])
def test_an_int_is_no_bool(name):
    with pytest.raises(TypeError, match=f"{name}: round_activation is 1, expected a bool"):
        getattr(fused_ops, name)(G, G, round_activation=1)
    for key, operation in (None, name), (FP8_DYNAMIC_TOKEN, f"{name}_quant"):
        with pytest.raises(TypeError, match=f"{operation}: round_activation is 0, expected a bool"):
            getattr(fused_ops, f"{name}_quant")(G, G, key, round_activation=0)
