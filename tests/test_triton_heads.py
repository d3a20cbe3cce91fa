"""The Triton kernel of heads: what tests of every operation don't reach."""

import pytest
import torch
from compare import assert_same
from promises import DEVICE, heads_are_normed_first, on_device
from test_ops import as_tuple, own
from test_triton import by_triton

import fused_ops
from fused_ops import OPS
from fused_ops._memory import check_written
from fused_ops.heads_inputs import caches_for, rope_inputs
from fused_ops.rope import IS_NEOX, ROUND_BEFORE_WEIGHT, WHOLE_VECTOR
from quant import FP8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR, MXFP8, NVFP4, ScaleLayout
from quant.key import FP8

pytest.importorskip("triton", reason="Triton is not installed")

INT64 = torch.iinfo(torch.int64)
LARGE = [-1, 0, 4095, 4096, INT64.min, INT64.max, 1 << 31, 1 << 32]  # positions; the table has 4096


@pytest.mark.parametrize("heads", [(64, 8, 128), (9, 3, 80), (12, 5, 96), (3, 1, 10), (2, 1, 1)], ids=str)
def test_all_heads_of_a_token_are_one_row(heads):
    """Its sum is the tree of a row of that length, whether or not heads fill their places."""
    op = OPS["qk_norm_rope"]
    q, k, positions, table = rope_inputs(2, *heads, heads[2] // 2 * 2, torch.float32, "cpu")
    weights = [torch.randn(x.shape[1] * x.shape[2]) for x in (q, k)]
    flags = IS_NEOX | WHOLE_VECTOR | ROUND_BEFORE_WEIGHT
    heads_are_normed_first(by_triton, op, [(q, k, positions, table, *weights, 1e-6, flags, 0)])


def without_checks(op, args) -> dict:
    """A GPU can't refuse values, so the interpreter doesn't either. Results, and caches with what is around them."""
    args = tuple(map(on_device, own(op, args)))
    outs = {name: out for name, out in zip(op.outputs, as_tuple(op.empty(*args)), strict=True) if out is not None}
    op.backends["triton"].run(args, outs)
    return {name: out.cpu() for name, out in (outs | {name: args[op.argument(name)] for name in op.written}).items()}


def defined(op, args) -> dict:
    args = own(op, args)
    made = dict(zip(op.outputs, as_tuple(op.reference(*args)), strict=True))
    return made | {name: args[op.argument(name)] for name in op.written}


def assert_defined(op, args) -> dict:
    actual, expected = without_checks(op, args), defined(op, args)
    for name, value in actual.items():
        assert_same(value, expected[name].contiguous() if value.is_contiguous() else expected[name], name)
    return actual


@pytest.mark.parametrize("axes", [1, 3])
def test_a_position_outside_the_table_is_not_read_and_gives_nan(axes):
    q, k, _, table = rope_inputs(len(LARGE), 3, 1, 10, 6, torch.float32, "cpu")
    positions = torch.tensor(LARGE) if axes == 1 else torch.tensor([LARGE, [0] * 8, [7, 7, *LARGE[3:], 7]])
    mrope = 0 if axes == 1 else 1 | 1 << 10 | 1 << 20
    for flags in IS_NEOX, 0:
        actual = assert_defined(OPS["rope"], (q, k, positions, table, flags, mrope))
        inside = [1, 2] if axes == 1 else [1]
        assert (~actual["q"].isnan()).any(-1).any(-1).nonzero().flatten().tolist() == inside
    for narrow in torch.int32, torch.int64:
        assert_defined(OPS["rope"], (q, k, positions.clamp(-(1 << 31), (1 << 31) - 1).to(narrow), table, 0, mrope))


KEYS = [None, FP8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR, NVFP4, MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4)]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_slot_outside_the_cache_is_not_written_and_gives_nan(key):
    """Nor is anything written for a token whose position is outside the table, or who has no slot."""
    q, k, positions, table = rope_inputs(10, 3, 2, 32, 32, torch.float16, "cpu")
    v = torch.randn_like(k)
    k_cache, v_cache, _, k_scale, v_scale = caches_for(k, v, FP8, 1)
    end = k_cache.shape[0] * k_cache.shape[1]
    slots = torch.tensor([0, end, -1, end - 1, -2, INT64.min, INT64.max, 7])
    positions[7] = INT64.min
    given = torch.tensor([0.25]) if key in (INT8_STATIC_TENSOR, NVFP4) else None
    more = () if key is None else (key.code, given)
    args = (q, k, v, positions, table, k_cache, v_cache, slots, k_scale, v_scale, IS_NEOX, 0, *more)
    actual = assert_defined(OPS["rope_kv_cache_write"], args)
    tokens = actual["k_cache"].view(torch.uint8).flatten(2).any(-1).nonzero().tolist()
    assert tokens == [[0, 0], [k_cache.shape[0] - 1, k_cache.shape[1] - 1]]
    assert actual["k"].isnan().all(-1).all(-1).nonzero().flatten().tolist() == [1, 4, 5, 6, 7]


def test_latents_of_hostile_slots():
    q, k, positions, table = rope_inputs(4, 2, 1, 16, 16, torch.bfloat16, "cpu")
    kv_c, cache = torch.randn(4, 24).bfloat16(), torch.zeros(3, 2, 40).bfloat16()
    slots = torch.tensor([5, 6, INT64.min])
    actual = assert_defined(
        OPS["mla_rope_kv_cache_concat"], (q, k[:, 0], kv_c, positions, table, cache, slots, None, 0)
    )
    assert actual["kv_cache"].flatten(0, 1).any(-1).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("flags", [IS_NEOX, 0, IS_NEOX | WHOLE_VECTOR])
def test_results_in_the_inputs_place(flags):
    op = OPS["qk_norm_rope_kv_cache_write"]
    q, k, positions, table = rope_inputs(3, 4, 2, 80, 80, torch.bfloat16, "cpu")
    v = torch.randn_like(k)
    args = (q, k, v, positions, table, None, None, 1e-6, *caches_for(k, v, k.dtype), flags, 0)
    expected = by_triton(op, args)
    packed = on_device(torch.cat([q, k], dim=1))  # strided, and one beside the other
    q, k = packed.split([4, 2], dim=1)
    with fused_ops.use_backend("triton"):
        op.out(q, k, *map(on_device, own(op, args)[2:]), q_out=q, k_out=k)
    assert_same(q.contiguous().cpu(), expected["q"])
    assert_same(k.contiguous().cpu(), expected["k"])


def test_a_token_depends_on_nothing_but_itself():
    """Promise 2: in a batch, alone, at odd strides."""
    op = OPS["qk_norm_rope"]
    q, k, positions, table = rope_inputs(5, 3, 1, 48, 32, torch.bfloat16, "cpu")
    whole = by_triton(op, (q, k, positions, table, None, None, 1e-6, IS_NEOX, 0))
    odd = torch.zeros(5, 4, 51).bfloat16()[..., 1:49].copy_(torch.cat([q, k], dim=1))
    for rows in slice(0, 1), slice(3, 5):
        some = (odd[rows, :3], odd[rows, 3:], positions[rows], table)
        for name, value in by_triton(op, (*some, None, None, 1e-6, IS_NEOX, 0)).items():
            assert_same(value, whole[name][rows].contiguous(), name)


def test_heads_that_blocks_dont_hold_are_refused():
    q, table = torch.zeros(1, 2, 16384, device=DEVICE), torch.zeros(1, 64, device=DEVICE)
    args = (q, q[:, :1], None, table, None, None, 1e-6)
    with fused_ops.use_backend("triton"):
        with pytest.raises(ValueError, match=r"does not serve .* but heads of up to 16384 columns, all of a token's"):
            OPS["qk_norm_rope"].default(*args, IS_NEOX | WHOLE_VECTOR, 0)
        wide = torch.zeros(1, 1, 16386, device=DEVICE)
        with pytest.raises(ValueError, match="the triton backend does not serve"):
            OPS["rope"].default(wide, wide, None, table, 0, 0)


def test_caches_that_share_memory_are_refused():
    """On a GPU also where a call of the same shapes has passed, which is checked in full once."""
    q, k, positions, table = (on_device(t) for t in rope_inputs(2, 2, 1, 8, 8, torch.float32, "cpu"))
    op, memory, slots = OPS["rope_kv_cache_write"], torch.zeros(32, device=DEVICE), torch.arange(2, device=DEVICE)
    k_cache, v_cache = memory.view(2, 2, 1, 1, 8)
    good = (q, k, k, positions, table, k_cache, v_cache, slots, None, None, 0, 0)
    bad = (*good[:6], k_cache, *good[7:])
    with fused_ops.use_backend("triton"):
        op.default(*good)
        for call in op.default, lambda *args: check_written(op, args):
            with pytest.raises(ValueError, match=r"cache shares memory with ._cache"):
                call(*bad)
        with pytest.raises(ValueError, match=r"out \(q\) shares memory with k_cache"):
            op.out(*good, q_out=memory.view(2, 2, 8))
    check_written(op, good)


def test_programs_follow_from_heads_not_tokens():
    from fused_ops._triton.heads import stages

    for heads, cols, rows in (32, 128, 16), (8, 128, 8), (1, 64, 1), (9, 80, 16), (4, 576, 2), (40, 576, 2):
        assert stages(heads, cols, 0, 0).rows == rows
        assert stages(heads, cols, 0, 0).blocks * rows >= heads
    assert stages(64, 128, 0, 0, norm="whole").rows == 64
