"""Rows of experts, each with a weight of its own: the bits of `scaled_linear`, row by row."""

import pytest
import torch
from compare import assert_same
from linear_operands import (
    KEYS,
    WEIGHTS,
    activation,
    changed,
    check_close,
    compiled_only,
    decoded_activation,
    each_backend,
    each_key,
    linear,
    multiple,
    rows,
    weight,
)
from torch.nn.functional import pad

import fused_ops
from fused_ops.linear import exact_values, quantize_weight, usual_weight
from quant import FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN, MXFP4, MXFP8, NVFP4

OUTS = 150  # several tiles, blocks of 128 and a short one
# Rows of each expert: none at either end, one, all of them, more than a pass takes, the kernels for few and for many.
COUNTS = [(0, 1, 5, 3, 0), (0, 0, 9, 0), (1,), (270, 2, 40), (0, 0, 0)]


def stacked(experts: int, outs: int, cols: int, key):
    """A weight for each expert, alone and all together."""
    alone = [weight(outs, cols, key) for _ in range(experts)]
    data, scale, _, scale2 = zip(*alone, strict=True)
    together = torch.stack(data), torch.stack([s.reshape(1) if s.numel() == 1 else s for s in scale])
    return alone, (*together, key, None if scale2[0] is None else torch.stack(scale2))


def grouped(x, w, tokens_per_expert, bias=None, dtype=torch.float32, **options):
    data, scale, key, scale2 = w
    return fused_ops.grouped_scaled_linear(
        x, data, scale, tokens_per_expert, bias, out_dtype=dtype, weight_key=key, weight_scale2=scale2, **options
    )


def by_expert(x, alone, counts, index, bias=None):
    """Of rows of x, one expert after the other."""
    parts = index.split(list(counts))
    return torch.cat(
        [
            linear(rows(x, part), w, None if bias is None else bias[e])
            for e, (w, part) in enumerate(zip(alone, parts, strict=True))
        ]
    )


@compiled_only
@each_key
def test_the_bits_of_scaled_linear_for_every_weight(key):
    """Rows gathered from tokens that go to several experts, with a bias."""
    for number, w_key in enumerate(WEIGHTS):
        counts = COUNTS[number % len(COUNTS)] if number else COUNTS[3]
        cols = 160 + -160 % multiple(key, w_key)
        x, (alone, w) = activation(12, cols, key), stacked(len(counts), OUTS, cols, w_key)
        index, bias = torch.randint(12, (sum(counts),)), torch.randn(len(counts), OUTS)
        expected = by_expert(x, alone, counts, index, bias)
        kind = (torch.int32, torch.int64)[number % 2]
        tokens = torch.tensor(counts, dtype=kind)
        assert_same(grouped(x, w, tokens, bias, rows=index.to(kind)), expected, f"{w_key} {counts}")


@each_backend
@pytest.mark.parametrize("key", [INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_TOKEN, MXFP8, NVFP4], ids=str)
def test_against_float64(backend, key):
    for counts in COUNTS:
        total = sum(counts)
        x, (alone, w) = activation(total, 320, key), stacked(len(counts), OUTS, 320, usual_weight(key))
        with fused_ops.use_backend(backend):
            y = grouped(x, w, torch.tensor(counts))
        for part, values, each in zip(y.split(counts), decoded_activation(x).split(counts), alone, strict=True):
            check_close(part, values, exact_values(*each), 320, str(counts))


@each_backend
@pytest.mark.parametrize(
    "keys", [(MXFP8, MXFP4), (MXFP4, MXFP8), (INT8_DYNAMIC_TOKEN, NVFP4)], ids=lambda k: "-".join(map(str, k))
)
def test_codes_of_another_width_than_the_activations(backend, keys):
    key, w_key = keys
    x, (alone, w), index = activation(9, 64, key), stacked(3, 35, 64, w_key), torch.arange(9)
    with fused_ops.use_backend(backend):
        assert_same(grouped(x, w, torch.tensor([4, 0, 5])), by_expert(x, alone, (4, 0, 5), index))


@each_backend
@pytest.mark.parametrize("key", [INT8_DYNAMIC_TOKEN, MXFP8, NVFP4], ids=str)
def test_rows_beyond_those_of_an_expert_are_left_as_they_were(backend, key):
    """Of [experts, M, K], as of rows that follow each other, whatever lies there."""
    counts = torch.tensor([3, 0, 7, 1])
    x, (alone, w) = activation(28, 320, key), stacked(4, OUTS, 320, usual_weight(key))
    used = torch.arange(7) < counts[:, None]
    x.data.view(torch.uint8)[~used.flatten()] = 0xFF  # NaN in FP8
    apart = changed(x, data=x.data.unflatten(0, (4, 7)))
    out, behind, bias = torch.full((4, 7, OUTS), -7.0), torch.full((28, OUTS), -7.0), torch.randn(4, OUTS)
    with fused_ops.use_backend(backend):
        grouped(apart, w, counts, bias, out=out)
        assert (out[~used] == -7).all()
        index = torch.arange(28).unflatten(0, (4, 7))[used]
        assert_same(out[used], grouped(x, w, counts, bias, rows=index))
        assert_same(out[used], by_expert(x, alone, counts.tolist(), index, bias))
        grouped(x, w, counts, bias, rows=torch.cat([index, torch.zeros(17, dtype=torch.int64)]), out=behind)
    assert_same(behind[:11], out[used])
    assert (behind[11:] == -7).all()


@compiled_only
@each_key
def test_a_row_does_not_depend_on_the_others(key):
    """Nor on how many experts are hit, on threads, or on strides."""
    cols = 577 + -577 % multiple(key)
    x, (_, w) = activation(40, cols, key), stacked(3, 70, cols, usual_weight(key))
    index = torch.arange(40).repeat_interleave(2)
    whole = grouped(x, w, torch.tensor([30, 45, 5]), rows=index)
    for row, expert in (0, 0), (29, 0), (30, 1), (74, 1), (79, 2):
        counts = torch.zeros(3, dtype=torch.int64).index_fill(0, torch.tensor([expert]), 1)
        assert_same(grouped(x, w, counts, rows=index[row : row + 1]), whole[row : row + 1], f"{row} alone")
    wide = [None if part is None else torch.stack([part, part], 1)[:, 0] for part in (w[0], w[1], w[3])]
    assert_same(grouped(x, (wide[0], wide[1], w[2], wide[2]), torch.tensor([30, 45, 5]), rows=index), whole)
    before = torch.get_num_threads()
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            assert_same(grouped(x, w, torch.tensor([30, 45, 5]), rows=index), whole, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_leading_dimensions(dtype):
    x, (alone, w) = activation(12, 64, INT8_DYNAMIC_TOKEN), stacked(2, 35, 64, usual_weight(INT8_DYNAMIC_TOKEN))
    index, bias = torch.randint(12, (7,)), torch.randn(2, 35)
    cube = changed(x, data=x.data.unflatten(0, (3, 4)))
    expected = by_expert(x, alone, (4, 3), index, bias).to(dtype)
    assert_same(grouped(cube, w, torch.tensor([4, 3]), bias, dtype, rows=index), expected)


@compiled_only
@pytest.mark.parametrize("key", [INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_TOKEN, MXFP8], ids=str)
def test_a_padded_hidden_size_changes_no_bit(key):
    """A norm pads for the experts; the router reads a view without the padding."""
    x, residual = torch.randn(2, 9, 2880).bfloat16()
    norm, index, counts = torch.rand(2880), torch.randint(9, (12,)), torch.tensor([5, 0, 7])
    (padded, _), (plain, _) = (
        fused_ops.fused_add_rms_norm_pad(x, residual, norm, 1e-6, 256),
        fused_ops.fused_add_rms_norm(x, residual, norm, 1e-6),
    )
    assert_same(padded[:, :2880].contiguous(), plain)
    values = torch.randn(3 * 40, 2880)
    weights = [quantize_weight(values, usual_weight(key)), quantize_weight(pad(values, (0, 192)), usual_weight(key))]
    plain_y, padded_y = (
        fused_ops.grouped_scaled_linear(
            fused_ops.quantize(y, key), data.unflatten(0, (3, 40)), scale.unflatten(0, (3, 40)), counts,
            out_dtype=torch.bfloat16, rows=index,
        )
        for y, (data, scale, _) in zip((plain, padded), weights, strict=True)
    )  # fmt: skip
    assert_same(padded_y, plain_y)


# --- what is refused ---

X = activation(6, 64, INT8_DYNAMIC_TOKEN)
_, (W, SCALE, KEY, _) = stacked(3, 8, 64, usual_weight(INT8_DYNAMIC_TOKEN))
COUNT, ZERO = torch.tensor([1, 2, 3]), torch.tensor([0])
CUBE = changed(X, data=X.data.unflatten(0, (2, 3)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": X.data}, TypeError, "activation is Tensor, expected a QuantizedActivation"),
        ({"weight": W[0]}, ValueError, r"weight is \[8, 64\], expected \[experts, N, K\]"),
        ({"weight": W[:0]}, ValueError, r"weight is \[0, 8, 64\], expected \[experts, N, K\] of at least one"),
        ({"weight": None}, TypeError, "weight is NoneType, expected a Tensor"),
        ({"weight": W[..., :32]}, ValueError, r"grouped_scaled_linear: weight is \[8, 32\] .* expected \[N, 64\]"),
        ({"weight_scale": SCALE[:2]}, ValueError, r"weight_scale is \[2, 8, 1\], expected \[3, \.\.\.\], as weight"),
        ({"weight_scale": SCALE[:, :5]}, ValueError, r"grouped_scaled_linear: weight_scale is \[5, 1\]"),
        ({"weight_scale2": torch.ones(3, 1)}, ValueError, "weight_scale2 is given, but .* takes none"),
        ({"weight_key": "int8"}, TypeError, "grouped_scaled_linear: weight_key is str, expected a QuantKey"),
        ({"bias": torch.ones(8)}, ValueError, r"bias is \[8\], expected \[3, N\], as weight's experts"),
        ({"bias": torch.ones(3)}, ValueError, r"bias is \[3\], expected \[3, N\]"),
        ({"bias": torch.ones(3, 7)}, ValueError, r"grouped_scaled_linear: bias is \[7\], expected \[8\]"),
        ({"tokens_per_expert": COUNT[:2]}, ValueError, r"tokens_per_expert is \[2\], expected \[3\]"),
        ({"tokens_per_expert": COUNT.float()}, TypeError, "tokens_per_expert is torch.float32"),
        ({"tokens_per_expert": COUNT + 1}, ValueError, "tokens_per_expert.* has 4 of expert 2, expected 0 to 1"),
        ({"tokens_per_expert": COUNT - 2}, ValueError, "tokens_per_expert.* has -1 of expert 0, expected 0 to 6"),
        ({"rows": torch.tensor([0, 6])}, ValueError, "rows.* has 6, expected 0 to 5"),
        ({"rows": torch.tensor([0, -1])}, ValueError, "rows.* has -1, expected 0 to 5"),
        (
            {"activation": changed(X, data=X.data[:0], scale=X.scale[:0]), "rows": ZERO},
            ValueError,
            "rows.* expected none",
        ),
        ({"rows": torch.tensor([[0]])}, ValueError, r"rows is \[1, 1\], expected \[R\]"),
        ({"activation": CUBE}, ValueError, r"weight is \[3, 8, 64\], expected \[2, N, 64\]"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8"),
        ({"out": torch.empty(6, 7)}, ValueError, r"out is \[6, 7\].*, expected \[6, 8\]"),
        ({"out": torch.empty(6, 8, dtype=torch.bfloat16)}, TypeError, "out is torch.bfloat16, expected torch.float32"),
    ],
)
@each_backend
def test_bad_arguments_raise_by_name(backend, changes, error, message):
    arguments = {
        "activation": X, "weight": W, "weight_scale": SCALE, "tokens_per_expert": COUNT, "out_dtype": torch.float32,
        "out": torch.full((6, 8), -7.0), **changes,
    }  # fmt: skip
    if "rows" in changes:
        del arguments["out"]
    with fused_ops.use_backend(backend), pytest.raises(error, match=message):
        fused_ops.grouped_scaled_linear(**arguments)
    assert "out" in changes or "rows" in changes or (arguments["out"] == -7).all()


def test_out_may_not_lie_over_an_input():
    memory = torch.zeros(3 * 8 * 64, dtype=torch.int8)
    weight = memory.view(3, 8, 64)
    out = memory[: 6 * 8 * 4].view(torch.float32).view(6, 8)
    with pytest.raises(ValueError, match=r"out:? overlaps another argument in memory"):
        fused_ops.grouped_scaled_linear(X, weight, SCALE, COUNT, out_dtype=torch.float32, out=out)


def test_every_key_that_scaled_linear_takes():
    assert {key.code for key in KEYS} >= {args[2] for args in fused_ops.OPS["grouped_scaled_linear"].cases("cpu")}
