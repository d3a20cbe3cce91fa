import pytest
import torch
from compare import assert_same, steps

import fused_ops
from fused_ops._memory import overlap
from fused_ops.heads_inputs import rope_inputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def llama(q, cos, sin):
    """Rotary embedding as Llama's model code writes it, in q's dtype."""
    q1, q2 = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-q2, q1], dim=-1) * sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["rope"].backends))
def test_llamas_rounding_bit_for_bit(backend, dtype):
    q, k, positions, cache = rope_inputs(7, 9, 3, 64, 64, dtype, "cpu")
    cos, sin = (torch.cat([t, t], dim=-1).to(dtype)[:, None] for t in cache[positions].chunk(2, dim=-1))
    with fused_ops.use_backend(backend):
        rotated = fused_ops.rope(q, k, positions, cache, round_products=True)
    for x, y in zip((q, k), rotated, strict=True):
        assert_same(y, llama(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [2, 64, 96, 128])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 4096])
def test_against_float64(tokens, is_neox, rotary_dim, dtype):
    """Partial rotary at small and large T, in both styles."""
    q, k, positions, cache = rope_inputs(tokens, 2, 1, 128, rotary_dim, dtype, "cpu")
    rotation = complex_rows(cache, positions)
    for x, y in zip((q, k), fused_ops.rope(q, k, positions, cache, is_neox=is_neox), strict=True):
        expected = rotated(x.double(), rotation, is_neox)
        error = (y.double() - expected).abs()
        eps = torch.finfo(dtype).eps
        assert (error <= eps * expected.abs() + 3 * torch.finfo(torch.float32).eps * x.abs().max()).all()
        assert_same(y[..., rotary_dim:].contiguous(), x[..., rotary_dim:].contiguous())


def complex_rows(cache, positions):
    """[T, 1, pairs] e^(i * angle)."""
    cos, sin = cache[positions].double().unsqueeze(1).chunk(2, dim=-1)
    return torch.complex(cos, sin)


def rotated(x, rotation, is_neox):
    """x [T, heads, D] float64, whose pairs are turned as complex numbers."""
    rotary_dim = 2 * rotation.shape[-1]
    pairs = x[..., :rotary_dim]
    pairs = pairs.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else pairs.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(rotation * torch.view_as_complex(pairs.contiguous()))
    turned = (turned.transpose(-1, -2) if is_neox else turned).flatten(-2)
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def rounded_apart(actual, expected, dtype):
    """Steps of dtype between values of one token's heads, measured at the largest of the pairs that are added."""
    return (actual.double() - expected).abs().max() / (expected.abs().max() * torch.finfo(dtype).eps)


BACKENDS = sorted(set(fused_ops.OPS["rope"].backends) & {"cpu", "reference"})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_multimodal_positions(backend, interleaved):
    """Qwen2-VL's and Qwen3-VL's tables, as their model code picks them from those of the three axes."""
    q, k, _, cache = rope_inputs(9, 2, 1, 128, 128, torch.float32, "cpu")
    positions, section = torch.randint(0, 4096, (3, 9)), [24, 20, 20]
    cos, sin = cache[positions].chunk(2, dim=-1)
    picked = []
    for axes in cos, sin:  # [3, T, 64]
        if interleaved:
            chosen = axes[0].clone()
            for axis in 1, 2:
                place = slice(axis, 3 * section[axis], 3)
                chosen[:, place] = axes[axis][:, place]
        else:
            chosen = torch.cat([part[i] for i, part in enumerate(axes.split(section, dim=-1))], dim=-1)
        picked.append(chosen)
    expected = fused_ops.rope(q, k, None, torch.cat(picked, dim=-1))
    options = {"mrope_section": section, "mrope_interleaved": interleaved}
    with fused_ops.use_backend(backend):
        for a, e in zip(fused_ops.rope(q, k, positions.int(), cache, **options), expected, strict=True):
            assert_same(a, e)


NORMS = [
    {},
    {"weight_bias": 1.0},
    {"round_before_weight": True},
    {"whole_vector": True},
    {"whole_vector": True, "round_before_weight": True, "weight_bias": 1.0},
]


@pytest.mark.parametrize("weights", ["own", "float32", "none"])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: "+".join(norm) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_and_rotation_are_those_one_after_another(backend, dtype, norm, weights):
    """Promise 1, of every head size that a block of the kernel may end in."""
    for tokens, heads, kv_heads, dim, rotary_dim in (3, 4, 2, 128, 64), (2, 3, 1, 80, 80), (1, 2, 2, 10, 6):
        q, k, positions, cache = rope_inputs(tokens, heads, kv_heads, dim, rotary_dim, dtype, "cpu")
        options = {**norm, "is_neox": heads != 3, "round_products": kv_heads == 1}
        rotary = {name: options[name] for name in ("is_neox", "round_products")}
        alone = {name: value for name, value in norm.items() if name != "whole_vector"}
        whole = "whole_vector" in norm
        made = []
        for x in q, k:
            cols = dim * (x.shape[1] if whole else 1)
            weight = torch.randn(cols).to(torch.float32 if weights == "float32" else dtype)
            made.append(None if weights == "none" else weight)
        with fused_ops.use_backend(backend):
            normed = [
                fused_ops.rms_norm(x.flatten(1) if whole else x, w, 1e-6, **alone).view(x.shape)
                for x, w in zip((q, k), made, strict=True)
            ]
            expected = fused_ops.rope(*normed, positions, cache, **rotary)
            actual = fused_ops.qk_norm_rope(q, k, positions, cache, *made, 1e-6, **options)
            both = q.clone(), k.clone()
            fused_ops.qk_norm_rope(*both, positions, cache, *made, 1e-6, **options, out=both)
        for a, b, e in zip(actual, both, expected, strict=True):
            assert_same(a, e)
            assert_same(b, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normed_heads_against_float64(dtype):
    q, k, positions, cache = rope_inputs(300, 3, 1, 128, 96, dtype, "cpu")
    weight = torch.rand(128) + 0.5
    for x, y in zip((q, k), fused_ops.qk_norm_rope(q, k, positions, cache, weight, weight, 1e-6), strict=True):
        x = x.double()
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        assert rounded_apart(y, rotated(normed, complex_rows(cache, positions), True), dtype) < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_come_along(backend):
    """As Qwen3-Next projects them, beside q in every head."""
    _, k, positions, cache = rope_inputs(5, 2, 1, 64, 64, torch.bfloat16, "cpu")
    q, gate = torch.randn(5, 2, 128).mul(9).bfloat16().chunk(2, dim=-1)
    gate[0, 0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -1e30])
    with fused_ops.use_backend(backend):
        *both, sigmoid = fused_ops.qk_norm_rope(q, k, positions, cache, None, None, 1e-6, gate=gate)
        for a, e in zip(both, fused_ops.qk_norm_rope(q, k, positions, cache, None, None, 1e-6), strict=True):
            assert_same(a, e)
    assert_same(sigmoid, gate.sigmoid())


def test_positions_or_rows_and_index_types():
    q, k, positions, cache = rope_inputs(5, 2, 1, 64, 64, torch.bfloat16, "cpu")
    expected = fused_ops.rope(q, k, positions, cache)
    for variant in (positions.int(), cache), (None, cache[positions]):
        for a, e in zip(fused_ops.rope(q, k, *variant), expected, strict=True):
            assert_same(a, e)


def test_in_place():
    q, k, positions, cache = rope_inputs(5, 2, 1, 64, 32, torch.bfloat16, "cpu")
    expected = fused_ops.rope(q, k, positions, cache)
    out = fused_ops.rope(q, k, positions, cache, out=(q, k))
    assert out[0] is q
    for a, e in zip(out, expected, strict=True):
        assert_same(a.contiguous(), e)


@pytest.mark.parametrize("norm", [None, *NORMS])
def test_a_token_does_not_depend_on_its_neighbours(norm):
    q, k, positions, cache = rope_inputs(600, 4, 2, 64, 64, torch.bfloat16, "cpu")

    def call(q, k, positions):
        if norm is None:
            return fused_ops.rope(q, k, positions, cache)
        return fused_ops.qk_norm_rope(q, k, positions, cache, None, None, 1e-6, **norm)

    whole = call(q, k, positions)
    for t in 0, 299, 599:
        for a, w in zip(call(q[t : t + 1], k[t : t + 1], positions[t : t + 1]), whole, strict=True):
            assert_same(a, w[t : t + 1].contiguous())
    for a, w in zip(call(q.contiguous(), k.flip(0).flip(0), positions), whole, strict=True):
        assert_same(a, w)


@pytest.mark.parametrize("rotary_dim", [256, 80])
def test_results_too_large_for_the_caches_have_the_same_bits(rotary_dim):
    """Which go around them, where halves are aligned for that."""
    q, k, positions, cache = rope_inputs(1200, 64, 8, 256, rotary_dim, torch.bfloat16, "cpu")
    large, _ = fused_ops.rope(q, k, positions, cache)
    parts = [slice(t, t + 300) for t in range(0, 1200, 300)]
    assert_same(large, torch.cat([fused_ops.rope(q[part], k[part], positions[part], cache)[0] for part in parts]))


def test_given_outputs_and_gates_compile_to_one_graph():
    q, k, positions, cache = rope_inputs(5, 2, 1, 64, 64, torch.bfloat16, "cpu")
    q, k = q.contiguous(), k.contiguous()
    torch._dynamo.reset()

    def both(q, k, gate):
        made = fused_ops.qk_norm_rope(q, k, positions, cache, None, None, 1e-6, gate=gate)
        return *made, *fused_ops.rope(q, k, positions, cache, out=(torch.empty_like(q), torch.empty_like(k)))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, e in zip(compiled(q, k, q), both(q, k, q), strict=True):
        assert_same(a, e)


def test_exchanged_outputs_are_refused():
    q, k, positions, cache = rope_inputs(4, 2, 2, 64, 64, torch.float32, "cpu")
    if "cpu" in fused_ops.OPS["rope"].backends:
        with pytest.raises(ValueError, match="overlaps another"):
            fused_ops.rope(q, k, positions, cache, out=(k, q))


def test_rows_that_lie_over_each_other_may_meet_an_output_further_on():
    """An input's heads reach beyond the next token, where one of them is the output."""
    base = torch.zeros(200)
    q_out, k = base.as_strided((5, 2, 1), (10, 9, 1)), base.as_strided((5, 3, 1), (10, 9, 1), 2)
    assert overlap(q_out, k)
    if "cpu" in BACKENDS:
        with pytest.raises(ValueError, match="overlaps another"):
            fused_ops.rope(torch.ones(5, 2, 1), k, None, torch.zeros(5, 0), out=(q_out, torch.empty(5, 3, 1)))


def test_nan_stays():
    q, k, positions, cache = rope_inputs(3, 1, 1, 64, 64, torch.bfloat16, "cpu")
    q[1, 0, 5] = float("nan")
    y, _ = fused_ops.rope(q, k, positions, cache)
    assert y.isnan().nonzero().tolist() == [[1, 0, 5], [1, 0, 37]]
    assert steps(y[0], fused_ops.rope(q[:1], k[:1], positions[:1], cache)[0][0]).max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("round_products", [False, True])
def test_nan_in_the_table_shows_whatever_its_payload(dtype, round_products):
    """Rounding the bits of one that is all ones would carry it into a zero."""
    q, k, positions, cache = rope_inputs(2, 1, 1, 64, 64, dtype, "cpu")
    cache[:] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for y in fused_ops.rope(q, k, positions, cache, round_products=round_products):
        assert y.isnan().all()
    weight = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert fused_ops.qk_norm_rope(q, k, None, torch.ones(2, 64), weight, None, 1e-6)[0].isnan().all()


B = torch.zeros(512)  # of which positions and output are views below
Q, K, P, C = rope_inputs(4, 2, 1, 64, 64, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q is \[2, 64\], expected \[T, heads, D\]"),
        ({"k": K[:2]}, ValueError, r"k is \[2, 1, 64\], expected \[4, kv_heads, 64\]"),
        ({"k": K.half()}, TypeError, "k is torch.float16, expected torch.float32 as q"),
        ({"positions": P.float()}, TypeError, "positions is torch.float32"),
        ({"positions": P[:3]}, ValueError, r"positions is \[3\], expected \[4\]"),
        ({"positions": P * 0 - 1}, ValueError, "positions has -1, expected 0 to 4095"),
        ({"positions": P * 0 + 4096}, ValueError, "positions has 4096, expected 0 to 4095"),
        ({"positions": None}, ValueError, "cos_sin_cache has 4096 rows, expected 4"),
        ({"cos_sin_cache": C.half()}, TypeError, "cos_sin_cache is torch.float16"),
        ({"cos_sin_cache": torch.ones(9, 66)}, ValueError, "cos_sin_cache has 66 columns"),
        ({"cos_sin_cache": torch.ones(9, 7)}, ValueError, "cos_sin_cache has 7 columns"),
        ({"cos_sin_cache": torch.ones(0, 64)}, ValueError, "cos_sin_cache has no rows"),
        ({"is_neox": 1}, TypeError, "is_neox is 1, expected a bool"),
        ({"neox": True}, TypeError, "got an unexpected keyword argument 'neox'"),
        ({"mrope_section": [8, 8]}, ValueError, r"mrope_section is \[8, 8\], expected three ints"),
        ({"mrope_section": [8, 8, 16]}, ValueError, r"positions is \[4\], expected \[3, T\]|\[3, 4\]"),
        ({"mrope_section": [8, 8, 8], "positions": P.expand(3, 4)}, ValueError, ".*expected a sum of 32"),
        ({"mrope_section": [8, 8, 16], "positions": None, "cos_sin_cache": C[:4]}, ValueError, ".*positions is None"),
        ({"out": (Q, Q[:, :1])}, ValueError, r"out \(k\) shares memory with out \(q\)"),
        ({"positions": B.view(torch.int64)[:4], "out": (B.view(4, 2, 64), K + 1)}, ValueError, ".*overlaps another"),
    ],
)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["rope"].backends))
def test_errors_name_argument_got_and_expected(backend, change, error, message):
    with fused_ops.use_backend(backend), pytest.raises(error, match="rope: " + message):
        fused_ops.rope(**{"q": Q, "k": K, "positions": P, "cos_sin_cache": C} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_weight": torch.ones(63)}, ValueError, r"q_weight is \[63\], expected \[64\]"),
        ({"k_weight": torch.ones(64, dtype=torch.int8)}, TypeError, "k_weight is torch.int8"),
        ({"whole_vector": True}, ValueError, r"q_weight is \[64\], expected \[128\]"),
        ({"weight_bias": 2.0}, ValueError, "weight_bias is 2.0"),
        ({"eps": "1e-6"}, TypeError, "eps is str, expected a number"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, expected at least 0"),
        ({"gate": Q[:, :1]}, ValueError, r"gate is \[4, 1, 64\], expected \[4, 2, G\]"),
        (
            {"q": Q[..., :0], "k": K[..., :0], "cos_sin_cache": C[:, :0]},
            ValueError,
            r"q is \[T, 2, 0\], expected at least one column",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_norms(backend, change, error, message):
    arguments = {"q": Q, "k": K, "positions": P, "cos_sin_cache": C, "q_weight": torch.ones(64), "k_weight": None}
    with fused_ops.use_backend(backend), pytest.raises(error, match="qk_norm_rope: " + message):
        fused_ops.qk_norm_rope(**{**arguments, "eps": 1e-6} | change)
