import pytest
import torch
from compare import assert_same, steps

import fused_ops
from fused_ops.rope import rope_inputs

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
@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_against_float64(tokens, is_neox, rotary_dim, dtype):
    """Partial rotary at small and large T, in both styles."""
    q, k, positions, cache = rope_inputs(tokens, 3, 1, 128, rotary_dim, dtype, "cpu")
    cos, sin = cache[positions].double().unsqueeze(1).chunk(2, dim=-1)
    for x, y in zip((q, k), fused_ops.rope(q, k, positions, cache, is_neox=is_neox), strict=True):
        pairs = x[..., :rotary_dim].double()
        pairs = pairs.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else pairs.unflatten(-1, (-1, 2))
        rotation = torch.complex(cos, sin) * torch.view_as_complex(pairs.contiguous())
        expected = torch.view_as_real(rotation)
        expected = (expected.transpose(-1, -2) if is_neox else expected).flatten(-2)
        error = (y[..., :rotary_dim].double() - expected).abs()
        eps = torch.finfo(dtype).eps
        assert (error <= eps * expected.abs() + 3 * torch.finfo(torch.float32).eps * pairs.abs().max()).all()
        assert_same(y[..., rotary_dim:].contiguous(), x[..., rotary_dim:].contiguous())


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


def test_a_token_does_not_depend_on_its_neighbours():
    q, k, positions, cache = rope_inputs(600, 4, 2, 64, 64, torch.bfloat16, "cpu")
    whole = fused_ops.rope(q, k, positions, cache)
    for t in 0, 299, 599:
        alone = fused_ops.rope(q[t : t + 1], k[t : t + 1], positions[t : t + 1], cache)
        for a, w in zip(alone, whole, strict=True):
            assert_same(a, w[t : t + 1].contiguous())


def test_exchanged_outputs_are_refused():
    q, k, positions, cache = rope_inputs(4, 2, 2, 64, 64, torch.float32, "cpu")
    if "cpu" in fused_ops.OPS["rope"].backends:
        with pytest.raises(ValueError, match="overlaps another"):
            fused_ops.rope(q, k, positions, cache, out=(k, q))


def test_nan_stays():
    q, k, positions, cache = rope_inputs(3, 1, 1, 64, 64, torch.bfloat16, "cpu")
    q[1, 0, 5] = float("nan")
    y, _ = fused_ops.rope(q, k, positions, cache)
    assert y.isnan().nonzero().tolist() == [[1, 0, 5], [1, 0, 37]]
    assert steps(y[0], fused_ops.rope(q[:1], k[:1], positions[:1], cache)[0][0]).max() == 0


B = torch.zeros(512)  # of which positions and output are views below
Q, K, P, C = rope_inputs(4, 2, 1, 64, 64, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q is \[2, 64\], expected \[T, H, D\]"),
        ({"k": K[:2]}, ValueError, r"k is \[2, 1, 64\], expected \[4, K, 64\]"),
        ({"k": K.half()}, TypeError, "k is torch.float16, expected torch.float32 as q"),
        ({"positions": P.float()}, TypeError, "positions is torch.float32"),
        ({"positions": P[:3]}, ValueError, r"positions is \[3\], expected \[4\]"),
        ({"positions": P * 0 - 1}, ValueError, "positions has -1, expected 0 to 4095"),
        ({"positions": P * 0 + 4096}, ValueError, "positions has 4096, expected 0 to 4095"),
        ({"positions": None}, ValueError, "cos_sin_cache has 4096 rows, expected 4"),
        ({"cos_sin_cache": C.half()}, TypeError, "cos_sin_cache is torch.float16"),
        ({"cos_sin_cache": torch.ones(9, 66)}, ValueError, "cos_sin_cache has 66 columns"),
        ({"cos_sin_cache": torch.ones(9, 7)}, ValueError, "cos_sin_cache has 7 columns"),
        ({"out": (Q, Q[:, :1])}, ValueError, "k_out shares memory with q_out"),
        ({"positions": B.view(torch.int64)[:4], "out": (B.view(4, 2, 64), K + 1)}, ValueError, ".*overlaps another"),
    ],
)
@pytest.mark.parametrize("backend", sorted(fused_ops.OPS["rope"].backends))
def test_errors_name_argument_got_and_expected(backend, change, error, message):
    if backend == "reference" and "overlaps" in message:
        pytest.skip("the reference writes its outputs by copy")
    with fused_ops.use_backend(backend), pytest.raises(error, match="rope: " + message):
        fused_ops.rope(**{"q": Q, "k": K, "positions": P, "cos_sin_cache": C} | change)
