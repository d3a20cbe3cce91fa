"""Collectives by ranks that are threads of this process: bits, chunks, every number of ranks, every key."""

from functools import partial

import pytest
import torch
from compare import assert_same
from keys import BY_ROW, given_tensors
from ranks import everywhere, workspaces
from torch import Tensor

import fused_ops
from fused_ops import OPS
from fused_ops.collective import summed
from quant import FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN, QuantizedActivation

pytestmark = pytest.mark.skipif("cpu" not in OPS["all_reduce"].backends, reason="no compiled kernels on this machine")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WORLDS = (1, 2, 3, 4, 7, 8, 16)


def tensors(result) -> list[Tensor]:
    if isinstance(result, QuantizedActivation):
        parts = (result.data, result.scale, result.scale2, result.zero_point, result.unquantized)
        return [t for t in parts if t is not None]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple) else [result]


def assert_results_are(results: list, expected, context: str) -> None:
    for rank, result in enumerate(results):
        for a, e in zip(tensors(result), tensors(expected), strict=True):
            assert_same(a, e, f"rank {rank}: {context}")


def rows_of_ranks(world: int, tokens: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    """Of magnitudes that make a sum's order show."""
    return [(torch.randn(tokens, cols) * 10.0 ** torch.randint(-2, 3, (tokens, cols))).to(dtype) for _ in range(world)]


@pytest.mark.parametrize("two_shot_above", [0, 1 << 30], ids=["two shots", "one shot"])
@pytest.mark.parametrize("world", WORLDS)
def test_sums_are_in_the_order_of_ranks(world, two_shot_above):
    """In float32, from rank 0 on, rounded once; however many rows, also such as take several turns."""
    made = workspaces(world, 5, 96, two_shot_above=two_shot_above)
    for i, tokens in enumerate((0, 1, 2, 4, 5, 6, 13, 37)):
        for cols in 96, 33, 1:
            dtype = FLOATS[(i + cols) % 3]
            x = rows_of_ranks(world, tokens, cols, dtype)
            context = f"{tokens} rows of {cols} {dtype}"
            assert_results_are(everywhere(made, lambda w, x=x: fused_ops.all_reduce(x[w.rank], w)), summed(x), context)
            own = everywhere(made, lambda w, x=x: fused_ops.reduce_scatter(x[w.rank], w))
            assert_same(torch.cat(own), summed(x), f"scattered, {context}")
            assert [len(y) for y in own] == [len(range(tokens)[w.rows(tokens)]) for w in made]


def test_a_sum_begins_with_rank_0_and_keeps_what_is_not_finite():
    made = workspaces(3, 4, 40)
    x = [torch.full((2, 40), -0.0) for _ in made]
    y = everywhere(made, lambda w: fused_ops.all_reduce(x[w.rank], w))
    assert all(t.signbit().all() for t in y), "-0 + -0 is -0"
    x[1][0, 3], x[2][0, 3], x[2][1, 5] = float("inf"), float("-inf"), float("nan")
    for t in everywhere(made, lambda w: fused_ops.all_reduce(x[w.rank], w)):
        assert t.isnan().sum() == 2
        assert t[0, 3].isnan()
        assert t[1, 5].isnan()


class Norms:
    """One choice of all arguments of the fused norms, for the operations of ranks and for the unfused ones."""

    def __init__(self, i: int, world: int, key):
        self.key, self.dtype, self.tokens = key, FLOATS[i % 3], (1, 0, 3, 9, 21)[i % 5]
        self.x = rows_of_ranks(world, self.tokens, 576, self.dtype)
        self.residual = torch.randn(self.tokens, 576).to(self.dtype)
        self.weight = (torch.randn(576).to(self.dtype), torch.randn(576), None)[i // 2 % 3]
        self.options = {"weight_bias": float(i % 2), "round_before_weight": i % 3 == 0}
        self.options |= {} if key is None else {**given_tensors(key), "keep_unquantized": i % 4 == 1}
        self.factor = 0.22 if i % 2 else 1.0

    def unfused(self, rows: slice) -> tuple:
        x, residual, options = summed(self.x)[rows], self.residual[rows], self.options
        plain = fused_ops.rms_norm_quant(x, self.weight, 1e-5, self.key, **options)
        options = {"x_multiplier": self.factor, **options}
        return plain, fused_ops.fused_add_rms_norm_quant(x, residual, self.weight, 1e-5, self.key, **options)

    def fused(self, kind: str, w) -> tuple:
        residual = self.residual if kind == "all_reduce" else self.residual[w.rows(self.tokens)]
        norm, add = (getattr(fused_ops, f"{kind}_{name}") for name in ("rms_norm_quant", "fused_add_rms_norm_quant"))
        x, options = self.x[w.rank], self.options
        plain = norm(x, self.weight, 1e-5, self.key, w, **options)
        return plain, add(x, residual, self.weight, 1e-5, self.key, w, x_multiplier=self.factor, **options)


@pytest.mark.parametrize("world", WORLDS)
def test_fused_is_unfused(world):
    """Every key; options, rows and dtypes in turn."""
    made = workspaces(world, 4, 576, two_shot_above=4096)
    for i, (name, key) in enumerate([*BY_ROW.items(), ("none", None)]):
        norms = Norms(i, world, key)
        context = f"{name}, {norms.tokens} rows, {norms.dtype}"
        results = everywhere(made, partial(norms.fused, "all_reduce"))
        assert_results_are(results, norms.unfused(slice(None)), context)
        for w, result in zip(made, everywhere(made, partial(norms.fused, "reduce_scatter")), strict=True):
            assert_results_are([result], norms.unfused(w.rows(norms.tokens)), f"of {w.rank}, scattered, {context}")


def test_given_outputs_may_be_the_inputs():
    made = workspaces(2, 2, 64)
    x, residual, weight = rows_of_ranks(2, 5, 64, torch.bfloat16), torch.randn(5, 64).bfloat16(), torch.randn(64)
    expected = fused_ops.fused_add_rms_norm(summed(x), residual, weight, 1e-6)
    total = summed(x)

    def call(w):
        mine, r = x[w.rank].clone(), residual.clone()
        y, r = fused_ops.all_reduce_fused_add_rms_norm_quant(mine, r, weight, 1e-6, None, w, out=mine, residual_out=r)
        assert y is mine
        assert fused_ops.all_reduce(x[w.rank], w, out=x[w.rank]) is x[w.rank]
        return y, r

    assert_results_are(everywhere(made, call), expected, "in place")
    for t in x:
        assert_same(t, total)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_norm_of_shared_columns(world):
    made = workspaces(world, 2, 64)
    for tokens, dtype in (0, torch.float32), (1, torch.bfloat16), (70, torch.float16), (1000, torch.bfloat16):
        q, k = ([t * (rank + 1) for rank, t in enumerate(rows_of_ranks(world, tokens, n, dtype))] for n in (96, 40))
        qw, kw = ([torch.randn(n) for _ in made] for n in (96, 40))
        q[-1], k[-1] = (torch.cat([t, t], -1)[:, : t.shape[1]] for t in (q[-1], k[-1]))  # strided

        def call(w, q=q, k=k, qw=qw, kw=kw):
            return fused_ops.qk_all_reduce_rms_norm(q[w.rank], k[w.rank], qw[w.rank], kw[w.rank], 1e-6, w)

        results = everywhere(made, call)
        for i, (t, weights) in enumerate(((q, qw), (k, kw))):
            squares = torch.stack([own_sum_of_squares(part) for part in t])
            total = squares[0]
            for s in squares[1:]:
                total = total + s
            mean = total / (world * t[0].shape[1])
            for rank, part in enumerate(t):
                rstd = 1 / (mean + 1e-6).double().sqrt().float()
                expected = (part.float() * rstd[:, None] * weights[rank]).to(dtype)
                assert_same(results[rank][i], expected, f"{tokens} rows on rank {rank} of {world}")


def own_sum_of_squares(x: Tensor) -> Tensor:
    """In the order of `rms_norm`: 32 lanes, then a tree."""
    rows, cols = x.shape
    lanes = torch.nn.functional.pad(x.float().square(), (0, -cols % 32)).view(rows, -(-cols // 32), 32)
    total = torch.zeros(rows, 32)
    for block in lanes.unbind(1):
        total = total + block
    return tree(total, x.dtype)


def tree(lanes: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:  # even and odd elements of 16 apart
        order = [i for half in (0, 16) for odd in (0, 1) for i in range(half + odd, half + 16, 2)]
        lanes = lanes[:, order]
    v = lanes.view(-1, 4, 8)
    eight = (v[:, 0] + v[:, 2]) + (v[:, 1] + v[:, 3])
    four = eight[:, :4] + eight[:, 4:]
    return (four[:, 0] + four[:, 2]) + (four[:, 1] + four[:, 3])


def test_one_rank_norms_as_rms_norm_does():
    made = workspaces(1, 2, 64)
    q, k, weight = torch.randn(5, 300).bfloat16(), torch.randn(5, 50).bfloat16(), torch.randn(300).bfloat16()
    y = fused_ops.qk_all_reduce_rms_norm(q, k, weight, None, 1e-6, made[0], round_before_weight=True)
    assert_same(y[0], fused_ops.rms_norm(q, weight, 1e-6, round_before_weight=True))
    assert_same(y[1], fused_ops.rms_norm(k, None, 1e-6))


def test_the_reference_sums_in_the_same_order():
    made = workspaces(3, 4, 64)
    x, residual, weight = rows_of_ranks(3, 5, 64, torch.bfloat16), torch.randn(5, 64).bfloat16(), torch.randn(64)
    with fused_ops.use_backend("reference"):
        sums = everywhere(made, lambda w: fused_ops.all_reduce(x[w.rank], w))
        own = everywhere(made, lambda w: fused_ops.reduce_scatter(x[w.rank], w))
        key = FP8_DYNAMIC_TOKEN

        def call(w):
            return fused_ops.all_reduce_fused_add_rms_norm_quant(x[w.rank], residual, weight, 1e-6, key, w)

        results = everywhere(made, call)
        expected = fused_ops.fused_add_rms_norm_quant(summed(x), residual, weight, 1e-6, key)
    assert_results_are(sums, summed(x), "sum")
    assert_same(torch.cat(own), summed(x))
    assert_results_are(results, expected, "reference")


def test_one_dynamic_scale_for_the_tensor_is_refused():
    made = workspaces(1, 4, 64)
    with pytest.raises(ValueError, match="expected static scales, or one a row or group"):
        fused_ops.all_reduce_rms_norm_quant(torch.randn(2, 64), None, 1e-6, FP8_DYNAMIC_TENSOR, made[0])
