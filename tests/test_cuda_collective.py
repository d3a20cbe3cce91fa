"""Collectives of the CUDA backend: its kernels on the host, a device for each rank of this process."""

import gc
import re
import weakref

import host_cuda
import pytest
import torch
import virtual_ranks
from compare import assert_same
from test_ops import ALL, cases, results
from virtual_ranks import RankCall, parts_of, workspaces

from fused_ops import OPS, _symmetric
from fused_ops.collective import summed
from quant import INT8_DYNAMIC_TOKEN, MXFP8, NVFP4, formats
from quant.key import FP8, FP8_FNUZ

SUMS = [p for p in ALL if p.id.startswith(virtual_ranks.SUMS)]
ONE_SHOT, TWO_SHOT = _symmetric.NEVER, 0
BOTH = pytest.mark.parametrize("above", [ONE_SHOT, TWO_SHOT], ids=["one-shot", "two-shot"])
WORLDS = (2, 3, 4, 8)
PER_OP = 3  # kernels to compile take half a second each


def together(ranks: list[list[RankCall]], seed: int = 0) -> None:
    """Every rank's calls in order, those of different ranks in any."""
    with host_cuda.on_host():
        for rank, calls in enumerate(ranks):
            with host_cuda.queued(rank):
                for call in calls:
                    call.run()
        host_cuda.run_queues(seed)


def by_one(op, args):
    with host_cuda.on_host():
        return results(op, args)


@pytest.mark.parametrize("op", SUMS)
def test_fused_is_unfused(op):
    every = cases(op)
    for i, args in enumerate(every[:: max(1, len(every) // PER_OP)]):
        above = ONE_SHOT if i % 3 else TWO_SHOT
        virtual_ranks.is_unfused(by_one, together, op, args, WORLDS[(i + len(op.name)) % 4], above=above)


def test_squares_are_summed():
    op = OPS["qk_all_reduce_rms_norm"]
    for i, args in enumerate(cases(op)[::15]):
        virtual_ranks.squares_are_summed(by_one, together, op, args, WORLDS[i % 4])


@pytest.mark.parametrize("name", ["all_gather", "all_gather_quantized"])
def test_gathered_is_one_after_another(name):
    for i, args in enumerate(cases(OPS[name])[::7]):
        virtual_ranks.gathered_is_one_after_another(together, OPS[name], args, WORLDS[i % 4], rows=(1, 5, 130)[i % 3])


@BOTH
def test_a_call_larger_than_the_workspace_goes_in_parts(above):
    """And a row depends on nothing but itself."""
    for name, max_tokens in ("all_reduce_fused_add_rms_norm", 3), ("reduce_scatter_fused_add_rms_norm", 4):
        args = (torch.randn(10, 64), torch.randn(10, 64), torch.randn(64), 1e-6, 0, None, 0, "")
        virtual_ranks.is_unfused(by_one, together, OPS[name], args, 2, max_tokens=max_tokens, above=above)


@BOTH
def test_rows_longer_than_registers_hold(above):
    for name in "all_reduce_fused_add_rms_norm", "reduce_scatter_fused_add_rms_norm":
        x, residual = torch.randn(2, 3, 32768 + 36)
        args = (x, residual, torch.randn(32768 + 36), 1e-6, 0, None, 0, "")
        virtual_ranks.is_unfused(by_one, together, OPS[name], args, 2, above=above)


def test_squares_of_rows_longer_than_registers_hold():
    args = (torch.randn(3, 32768 + 36), torch.randn(3, 64), torch.randn(32768 + 36), None, 1e-6, 0, None, 0, "")
    virtual_ranks.squares_are_summed(by_one, together, OPS["qk_all_reduce_rms_norm"], args, 2)


@BOTH
@pytest.mark.parametrize("seed", range(8))
def test_calls_in_any_order_of_ranks(above, seed):
    """Ranks run ahead of each other: slots and flags of two calls are enough. Sizes change, and so do blocks."""
    op, world = OPS["all_reduce"], 3
    xs = [parts_of(torch.randn(rows, 512), world) for rows in (9, 1, 2, 16, 0, 7, 1, 1, 12)]
    with workspaces(world, 8, 512, torch.float32, above=above) as memories:
        calls = [[RankCall(op, (x[rank], None, 0, ""), memories[rank]) for x in xs] for rank in range(world)]
        together(calls, seed)
        for memory in memories:
            memory.check()
        for own in calls:
            for call, x in zip(own, xs, strict=True):
                assert_same(call.results["y"], summed(x))


def test_several_workspaces_side_by_side():
    op, world = OPS["all_reduce"], 2
    xs = parts_of(torch.randn(4, 64), world)
    with workspaces(world, 4, 64, torch.float32) as a, workspaces(world, 4, 64, torch.float32) as b:
        calls = [[RankCall(op, (xs[r], None, 0, ""), memory[r]) for memory in (a, b, b, a, b)] for r in range(world)]
        together(calls)
        for call in (call for own in calls for call in own):
            assert_same(call.results["y"], summed(xs))


def out_of_step(calls: list[list[tuple]], refused: int | None = None) -> tuple[list[list[RankCall]], list[Exception]]:
    """Each rank's calls (name, first arguments), of which not all have their like: as made, and what ranks raise then.

    A rank that wasn't waiting when another gave up finds out by its next call. refused: a rank that has refused one.
    """
    world, errors = len(calls), []
    with workspaces(world, 4, 64, torch.float32, timeout=1e-3) as memories:
        if refused is not None:
            memories[refused].refused.value += 1

        def made(rank: int, name: str, args: tuple) -> RankCall:
            return RankCall(OPS[name], (*args, None, 0, ""), memories[rank])

        all_made = [[made(rank, *call) for call in own] for rank, own in enumerate(calls)]
        together(all_made)
        for rank in range(world):
            for _ in range(2):
                call = made(rank, "all_reduce", (torch.ones(1, 64),))
                try:
                    with host_cuda.on_host():
                        virtual_ranks.public(call)
                except (TimeoutError, ValueError) as error:
                    errors.append(error)
                    break
                finally:
                    assert call.results["y"].isnan().all()
        assert len(errors) == world
        return all_made, errors


def test_a_rank_that_does_not_come():
    x = torch.randn(3, 64)
    once = [("all_reduce", (x,))]
    made, errors = out_of_step([once * 2, once * 2, once])
    for own in made[:2]:
        assert_same(own[0].results["y"], summed([x] * 3))
        assert own[1].results["y"].isnan().all()
    assert all(type(error) is TimeoutError for error in errors), errors
    assert any("rank 2 did not come within 0.001 s to all_reduce of 3 rows of 64 float32" in str(e) for e in errors)
    assert re.search(r"rank [01] gave up", str(errors[2]))


@pytest.mark.parametrize(
    "other",
    [
        ("all_reduce", (torch.ones(2, 64),)),
        ("all_reduce", (torch.ones(3, 32),)),
        ("all_reduce", (torch.ones(3, 64).half(),)),
        ("all_reduce_rms_norm", (torch.ones(3, 64), None, 1e-6, 0)),
        ("reduce_scatter", (torch.ones(3, 64),)),
    ],
    ids=["rows", "columns", "dtype", "operation", "scattered"],
)
def test_calls_that_differ(other):
    mine = ("all_reduce", (torch.ones(3, 64),))
    made, errors = out_of_step([[mine], [mine], [other]])
    assert all(type(error) is ValueError for error in errors)
    for rank, error in enumerate(errors):
        said = re.search(r"this rank called (.*), but rank (\d) called (.*):", str(error))
        assert rank == 2 or said[2] == "2", error
        assert said[1] != said[3]
    for own in made:
        assert own[0].results["y"].isnan().all()


@pytest.mark.parametrize(
    "call",
    [
        ("all_reduce", (torch.ones(3, 64),)),
        ("all_gather", (torch.ones(1, 64), 3)),
        ("qk_all_reduce_rms_norm", (torch.ones(3, 64), torch.ones(3, 64), None, None, 1e-6, 0)),
    ],
    ids=lambda call: call[0],
)
def test_the_next_call_of_a_rank_that_refused_one_is_another(call):
    made, errors = out_of_step([[call]] * 3, refused=1)
    for rank, error in enumerate(errors):
        assert type(error) is ValueError, error
        said = "this rank has refused a call, rank " if rank == 1 else "rank 1 has refused a call, this rank called "
        assert said in str(error), error
        assert all(y.isnan().all() for y in made[rank][0].results.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8, FP8_FNUZ, torch.float8_e5m2], ids=str)
def test_what_a_failed_gather_leaves_is_nan(dtype):
    made, _ = out_of_step([[("all_gather", (torch.ones(1, 64).to(dtype), 3))]] * 3, refused=1)
    for (call,) in made:
        assert call.results["y"].float().isnan().all()


@pytest.mark.parametrize("key", [INT8_DYNAMIC_TOKEN, MXFP8, NVFP4], ids=str)
def test_what_a_failed_gather_leaves_dequantizes_to_nan(key):
    options = {"scale2": torch.ones(1)} if key.scale2 else {}
    data, scale, _ = formats.quantize(torch.ones(1, 64), key, **options)
    made, _ = out_of_step([[("all_gather_quantized", (data, scale, key.code, 3))]] * 3, refused=1)
    for (call,) in made:
        assert call.results["scale"].float().isnan().all()


def test_what_is_no_workspace_is_refused():
    x = torch.randn(3, 64)
    with workspaces(2, 4, 64, torch.float32) as memories, host_cuda.on_host():
        whole = memories[0].buffer
        group = virtual_ranks.group_of(2)
        for buffer in whole.clone(), whole[:-16], whole[16:], torch.zeros(64, dtype=torch.uint8):
            with pytest.raises(RuntimeError, match="workspace: expected"):
                OPS["all_reduce"].default(x, buffer, 0, group)
        with pytest.raises(RuntimeError, match="rank: expected 0"):
            OPS["all_reduce"].default(x, whole, 1, group)
        with pytest.raises(RuntimeError, match="doesn't fit"):
            OPS["all_reduce"].default(torch.randn(1, 1000), whole, 0, group)
    with host_cuda.on_host(), pytest.raises(RuntimeError, match="workspace: expected"):
        OPS["all_reduce"].default(x, whole, 0, group)


def test_memory_that_nobody_holds_is_closed():
    (memory,) = virtual_ranks.memories(1, 4, 64, torch.float32)
    buffer, held = memory.buffer, weakref.ref(memory)
    assert _symmetric.memory_of(buffer, 0) is memory
    del memory
    gc.collect()
    assert held() is None
    with pytest.raises(ValueError, match="expected the buffer of an AllReduceWorkspace that is open"):
        _symmetric.memory_of(buffer, 0)
