"""Calls that differ between ranks, or that one of them refuses: all raise, and stay in step."""

import pytest
import torch
from compare import assert_same
from ranks import RESIDUAL, WEIGHT, X, everywhere, on_ranks, rows, usual, workspaces

import fused_ops
from fused_ops import OPS
from fused_ops.collective import summed
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN

pytestmark = pytest.mark.skipif("cpu" not in OPS["all_reduce"].backends, reason="no compiled kernels on this machine")

OTHERS = {
    "operation": lambda w: fused_ops.all_reduce(X, w),
    "operation with the same arguments": lambda w: fused_ops.all_reduce_rms_norm_quant(
        X, WEIGHT, 1e-6, FP8_DYNAMIC_TOKEN, w
    ),
    "rows": lambda w: usual(w, x=X[:2]),
    "no rows": lambda w: usual(w, x=X[:0]),
    "dtype": lambda w: usual(w, x=X.bfloat16()),
    "columns": lambda w: fused_ops.all_reduce_fused_add_rms_norm_quant(
        X[:, :32], RESIDUAL[:, :32], WEIGHT[:32], 1e-6, FP8_DYNAMIC_TOKEN, w
    ),
    "too many columns": lambda w: fused_ops.all_reduce(torch.randn(1, 4096), w),
    "key": lambda w: usual(w, key=INT8_DYNAMIC_TOKEN),
    "no key": lambda w: usual(w, key=None),
    "eps": lambda w: usual(w, eps=1e-5),
    "weight_bias": lambda w: usual(w, weight_bias=1.0),
    "round_before_weight": lambda w: usual(w, round_before_weight=True),
    "x_multiplier": lambda w: usual(w, x_multiplier=0.5),
    "no weight": lambda w: usual(w, weight=None),
    "weight's dtype": lambda w: usual(w, weight=WEIGHT.bfloat16()),
    "gathered rows": lambda w: fused_ops.all_gather(X, w),
    "pair": lambda w: fused_ops.qk_all_reduce_rms_norm(X, X, WEIGHT, WEIGHT, 1e-6, w),
}


@pytest.mark.parametrize("two_shot_above", [0, 1 << 20], ids=["two shots", "one shot"])
def test_calls_that_differ_are_refused_on_all_ranks(two_shot_above):
    """Whichever rank differs, in whatever: all say so, nothing is written, and the next call works."""
    made = workspaces(3, 4, 64, two_shot_above=two_shot_above)
    for i, (what, call) in enumerate(OTHERS.items()):
        differs, outs = i % 3, [torch.full((3, 64), 7.0) for _ in made]

        def differ(w, call=call, differs=differs, outs=outs):
            return call(w) if w.rank == differs else usual(w, residual_out=outs[w.rank])

        for rank, error in enumerate(on_ranks(made, differ)):
            assert type(error) is ValueError, f"{what}: {error!r}"
            assert f", rank {rank} " in str(error), f"{what}: {error}"
            named = f"rank {differs} calls" if rank != differs else f"rank {int(differs == 0)} calls"
            assert named in str(error), f"{what}: {error}"
        assert all((out == 7).all() for out in outs), what
        for y in everywhere(made, lambda w: fused_ops.all_reduce(X, w)):
            assert_same(y, summed([X, X, X]))


# What a rank refuses by itself: in Python, in C++, and in what is made of collectives.
REFUSED = {
    "weight_bias": lambda w: fused_ops.all_reduce_rms_norm_quant(X, WEIGHT, 1e-6, None, w, weight_bias=2.0),
    "weight": lambda w: usual(w, weight=WEIGHT[:3]),
    "x": lambda w: fused_ops.all_reduce(X.long(), w),
    "x, scattered": lambda w: fused_ops.reduce_scatter(X[0], w),
    "k": lambda w: fused_ops.qk_all_reduce_rms_norm(X, X[:1], None, None, 1e-6, w),
    "rows": lambda w: fused_ops.all_gather(X, w, rows=1),
    "activation": lambda w: fused_ops.all_gather_quantized(X, w),
    "weight of a product": lambda w: fused_ops.all_gather_matmul(X, WEIGHT, w),
    "weight of another": lambda w: fused_ops.matmul_reduce_scatter(X, WEIGHT, w),
    "out": lambda w: fused_ops.all_reduce(X, w, out=X[:1]),
}


@pytest.mark.parametrize(
    ("backend", "two_shot_above"),
    [("cpu", 0), ("cpu", 1 << 20), ("reference", 0)],
    ids=["two shots", "one shot", "reference"],
)
def test_what_one_rank_refuses_no_other_takes_for_its_next_call(backend, two_shot_above):
    """The others raise too, and the next call, which is the same to look at, has all ranks' rows of that call."""
    made = workspaces(3, 4, 64, two_shot_above=two_shot_above)
    with fused_ops.use_backend(backend):
        refuse_by_turns(made, "exchanges" if backend == "reference" else "calls all_reduce_fused_add_rms_norm_quant(")


def refuse_by_turns(made, exchange: str) -> None:
    calls = [rows(i, 0, 3, 64, torch.float32) for i in range(3)]
    for i, (what, refused) in enumerate(REFUSED.items()):
        alone, times = i % 3, 1 + i % 2

        def run(w, refused=refused, alone=alone, times=times):
            errors = []
            for _ in range(times):
                with pytest.raises((TypeError, ValueError)) as error:
                    refused(w) if w.rank == alone else usual(w)
                errors.append(str(error.value))
            return errors, [fused_ops.all_reduce(x * (w.rank + 1), w) for x in calls], usual(w)[1]

        for rank, (errors, sums, residual) in enumerate(everywhere(made, run)):
            said = f"rank {alone} has refused this call, rank {rank} {exchange}"
            assert all((said in error) is (rank != alone) for error in errors), f"{what}: {errors}"
            for x, total in zip(calls, sums, strict=True):
                assert_same(total, summed([x * (r + 1) for r in range(3)]), what)
            assert_same(residual, summed([X, X, X]) + RESIDUAL, what)
    for w in made:  # and where all refuse alike, nobody waits for anybody
        for refused in REFUSED.values():
            with pytest.raises((TypeError, ValueError)):
                refused(w)
    for y in everywhere(made, lambda w: fused_ops.all_reduce(X, w)):
        assert_same(y, summed([X, X, X]))


def test_the_reference_finds_rows_that_differ():
    made, other = workspaces(2, 4, 64), {"rows": X[:2], "dtype": X.bfloat16()}
    with fused_ops.use_backend("reference"):
        for x in other.values():
            for rank, error in enumerate(on_ranks(made, lambda w, x=x: fused_ops.all_reduce((X, x)[w.rank], w))):
                theirs, own = ((x, X), (X, x))[rank]
                said = f"rank {1 - rank} exchanges {theirs.dtype} {list(theirs.shape)}, rank {rank} {own.dtype}"
                assert type(error) is ValueError, error
                assert said in str(error)
            for y in everywhere(made, lambda w: fused_ops.all_reduce(X, w)):
                assert_same(y, X + X)


def test_a_rank_that_refuses_and_calls_no_more_is_waited_for_in_vain():
    made = workspaces(2, 4, 64, timeout=0.5)

    def run(w):
        with pytest.raises(ValueError if w.rank else TimeoutError) as error:
            usual(w, weight=WEIGHT[:3]) if w.rank else usual(w)
        return str(error.value)

    assert "waited 0.5 s for rank 1 (process" in everywhere(made, run)[0]


def test_messages_say_keys_by_name_and_numbers_in_full():
    made = workspaces(2, 4, 64)
    for error in on_ranks(made, lambda w: usual(w, eps=(1e-6, 1.0000001e-6)[w.rank], x_multiplier=0.1)):
        assert "quant_key FP8_DYNAMIC_TOKEN" in str(error)
        assert all(f"eps {eps}," in str(error) for eps in ("1e-06", "1.0000001e-06")), error
        assert "x_multiplier 0.1," in str(error)
    for error in on_ranks(
        made, lambda w: usual(w, key=(FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True))[w.rank])
    ):
        assert str(FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True)) in str(error)
    for error in on_ranks(made, lambda w: fused_ops.all_gather(X[: 1 + w.rank], w)):
        assert all(f"all_gather(Float [{rows}, 64])" in str(error) for rows in (2, 4)), error
    for error in on_ranks(made, lambda w: fused_ops.all_gather(X[:1], w, out=X[:2])):
        assert "all_gather: out: overlaps another argument in memory" in str(error)
