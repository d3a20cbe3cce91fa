"""Ranks that share no memory: the group's own collectives, with the refusals of those that do."""

import pytest
import torch
from compare import assert_same
from ranks import WEIGHT, everywhere, two_of_them, usual, workspaces

import fused_ops
from fused_ops import OPS
from quant import FP8_DYNAMIC_TENSOR, FP8_DYNAMIC_TOKEN

pytestmark = pytest.mark.skipif("cpu" not in OPS["all_reduce"].backends, reason="no compiled kernels on this machine")


def test_ranks_that_share_no_memory_use_the_groups_own_sum(monkeypatch):
    monkeypatch.setattr("fused_ops._shared._host", iter(range(99)).__next__)
    made = workspaces(2, 4, 64)
    assert not any(w.shared for w in made)
    x, residual, weight = [torch.randn(5, 64) for _ in made], torch.randn(5, 64), torch.randn(64)
    total = x[0] + x[1]  # of two, whichever order

    def call(w):
        mine = w.rows(5)
        y, r = fused_ops.all_reduce_fused_add_rms_norm_quant(x[w.rank], residual, weight, 1e-6, None, w)
        own, _ = fused_ops.reduce_scatter_fused_add_rms_norm_quant(x[w.rank], residual[mine], weight, 1e-6, None, w)
        q = fused_ops.all_gather_quantized(fused_ops.quantize(own, FP8_DYNAMIC_TOKEN), w, rows=5)
        plain = fused_ops.all_gather(fused_ops.reduce_scatter(x[w.rank], w), w, rows=5)
        normed = fused_ops.all_reduce_rms_norm_quant(x[w.rank], weight, 1e-6, FP8_DYNAMIC_TOKEN, w)
        fused_ops.qk_all_reduce_rms_norm(x[w.rank], x[w.rank], None, weight, 1e-6, w)
        return fused_ops.all_reduce(x[w.rank], w), y, r, q, plain, normed

    y, r = fused_ops.fused_add_rms_norm(total, residual, weight, 1e-6)
    for got in everywhere(made, call):
        for a, e in zip((*got[:3], got[4]), (total, y, r, total), strict=True):
            assert_same(a, e)
        assert_same(got[3].data, fused_ops.quantize(y, FP8_DYNAMIC_TOKEN).data)
        assert_same(got[5].data, fused_ops.rms_norm_quant(total, weight, 1e-6, FP8_DYNAMIC_TOKEN).data)


def test_ranks_that_share_no_memory_refuse_what_others_do(monkeypatch):
    """Before they exchange anything, and no result is a constant to a backward pass."""
    monkeypatch.setattr("fused_ops._shared._host", iter(range(99)).__next__)
    made = workspaces(2, 4, 64)
    x, q = torch.randn(4, 8), fused_ops.quantize(torch.randn(2, 8), FP8_DYNAMIC_TOKEN)
    out = torch.full((3, 4, 8), 7.0)
    ops = fused_ops
    for call, error, message in (
        (lambda w: ops.all_reduce(x, w, out=x.to(torch.int8)), TypeError, "all_reduce: out is torch.int8"),
        (lambda w: ops.all_reduce(x, w, out=out), ValueError, r"all_reduce: out is \[3, 4, 8\]"),
        (lambda w: ops.reduce_scatter(x, w, out=out), ValueError, r"reduce_scatter: out is \[3, 4, 8\]"),
        (lambda w: ops.reduce_scatter(x[0], w), ValueError, r"reduce_scatter: x is \[8\]"),
        (lambda w: ops.all_gather(x, w, rows=4), ValueError, "expected 2 rows, rank"),
        (lambda w: ops.all_gather(x, w, rows=-3), ValueError, "rows is -3"),
        (lambda w: ops.all_gather(x, w, out=out), ValueError, r"all_gather: out is \[3, 4, 8\]"),
        (lambda w: ops.all_gather_quantized(q, w, rows=2), ValueError, "expected 1 rows, rank"),
        (lambda w: ops.qk_all_reduce_rms_norm(x.long(), x, None, None, 1e-6, w), TypeError, "q is torch.int64"),
        (lambda w: ops.qk_all_reduce_rms_norm(x, x, None, None, -1.0, w), ValueError, "eps is -1.0"),
        (lambda w: usual(w, weight=WEIGHT[:3]), ValueError, r"weight is \[3\]"),
        (lambda w: usual(w, residual_out=out), ValueError, r"residual_out is \[3, 4, 8\]"),
        (lambda w: ops.all_reduce_rms_norm_quant(x, None, 1e-6, None, w, out=out), ValueError, "out is"),
        (
            lambda w: ops.all_reduce_rms_norm_quant(x, None, 1e-6, FP8_DYNAMIC_TOKEN, w, out=q),
            ValueError,
            "out.data is",
        ),
        (lambda w: ops.reduce_scatter_rms_norm_quant(x, None, 1e-6, FP8_DYNAMIC_TENSOR, w), ValueError, "quant_key is"),
    ):
        with pytest.raises(error, match=message):  # of one rank alone, which would wait if it exchanged
            call(made[0])
    assert (out == 7).all()
    learnt = x.clone().requires_grad_()
    for op in (
        lambda w: ops.all_reduce(learnt, w),
        lambda w: ops.reduce_scatter(learnt, w),
        lambda w: ops.all_gather(learnt, w),
        lambda w: ops.qk_all_reduce_rms_norm(learnt, learnt, None, None, 1e-6, w)[1],
        lambda w: ops.all_reduce_rms_norm_quant(learnt, None, 1e-6, None, w),
    ):
        for y in everywhere(made, op):
            with pytest.raises(RuntimeError, match="is for inference only"):
                y.sum().backward()
    compiled = [torch.compile(two_of_them, fullgraph=True) for _ in made]
    rows = torch.randn(3, 64)
    expected = everywhere(made, lambda w: two_of_them(rows, w))
    for actual in everywhere(made, lambda w: compiled[w.rank](rows, w)):
        assert_same(actual[-1], expected[0][-1])
    made[0].close()
    with pytest.raises(ValueError, match="workspace is closed"):
        fused_ops.all_reduce(x, made[0])
