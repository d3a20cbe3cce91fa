"""Heads and caches by the CUDA backend: on the host (tests/host_cuda), or with FUSED_OPS_TEST_DEVICE=cuda on a GPU.

Rotation, codes and cache writes are bitwise the CPU's, so what is fused with a norm must be what the CPU makes of this
backend's own rms_norm.
"""

import promises
import pytest
import torch
from compare import assert_same
from promises import DEVICE, on_device
from test_cuda import by_cuda, run
from test_ops import cases, own, results

import fused_ops
from fused_ops import OPS, _cuda
from fused_ops._op import NO_KEY
from fused_ops.heads_inputs import caches_for, rope_inputs, weights
from fused_ops.quantize import key_inputs
from fused_ops.rope import IS_NEOX, NORM_V, ROUND_PRODUCTS, WHOLE_VECTOR, mrope_code
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN, MXFP8, ScaleLayout
from quant.key import FP8, FP8_FNUZ

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERY = 20 if DEVICE == "cpu" else 1  # kernels to compile take half a second each


def described(shape) -> str:
    return "-".join(map(str, shape[:6]))


BLOCKS = MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4)
GROUPS = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 96))


@pytest.mark.parametrize("name", ["rope", "rope_kv_cache_write", "mla_rope_kv_cache_concat"])
def test_results_are_the_cpus(name):
    promises.results_are_the_cpus(run, OPS[name], cases(OPS[name])[::EVERY])


# heads, kv_heads, dim, rotary_dim, dtype, flags: halves that a thread holds both of, or not, or that no pack divides;
# pairs; several warps to a head; packs that no head is made of; a head that is left over from those worked on at once.
SHAPES = [
    (9, 3, 64, 64, BF16, IS_NEOX),
    (4, 1, 256, 256, FP32, IS_NEOX),
    (3, 2, 128, 64, BF16, IS_NEOX | ROUND_PRODUCTS),
    (2, 1, 96, 36, FP16, IS_NEOX),
    (6, 1, 13, 6, BF16, IS_NEOX),
    (5, 2, 13, 10, FP32, 0),
    (4, 2, 576, 200, BF16, IS_NEOX),
    (1, 1, 576, 64, FP32, ROUND_PRODUCTS),
    (2, 5, 128, 128, BF16, 0),
    (2, 1, 64, 0, BF16, IS_NEOX),
]


@pytest.mark.parametrize(
    ("shape", "mrope"),
    [*((shape, False) for shape in SHAPES), *((shape, True) for shape in SHAPES[:-1:3])],
    ids=lambda value: described(value) if isinstance(value, tuple) else f"mrope={value}",
)
def test_every_way_to_find_the_other_of_a_pair(shape, mrope):
    """In place as well: a head is read before it is written."""
    heads, kv_heads, dim, rotary, dtype, flags = shape
    q, k, positions, table = rope_inputs(11, heads, kv_heads, dim, max(rotary, 2), dtype, "cpu")
    table, code = table[:, :rotary], 0
    if mrope:
        third = rotary // 6
        positions = torch.randint(0, 4096, (3, 11))
        code = mrope_code([rotary // 2 - 2 * third, third, third], flags == IS_NEOX)
    args = (q, k, positions, table, flags, code)
    expected = OPS["rope"].default(*args)
    moved = tuple(map(on_device, own(OPS["rope"], args)))
    with by_cuda():
        actual = OPS["rope"].default(*moved)
        OPS["rope"].out(*moved, q_out=moved[0], k_out=moved[1])
    for fresh_out, in_place, e in zip(actual, moved, expected, strict=False):
        assert_same(fresh_out.cpu(), e)
        assert_same(in_place.cpu().contiguous(), e)


# heads, kv_heads, dim, rotary_dim, dtype, flags, what q is quantized to, what caches hold
FUSED = [
    (4, 2, 128, 128, BF16, IS_NEOX | 1, None, BF16),
    (9, 3, 64, 32, BF16, IS_NEOX | 2, FP8_DYNAMIC_TOKEN, FP8),
    (2, 1, 80, 80, FP16, NORM_V, FP8_STATIC_TENSOR, torch.int8),
    (3, 2, 288, 64, FP32, IS_NEOX | NORM_V, GROUPS, FP8_FNUZ),
    (5, 1, 576, 64, BF16, IS_NEOX, GROUPS, FP8),
    (2, 1, 13, 6, BF16, IS_NEOX | WHOLE_VECTOR, None, BF16),
    (5, 3, 64, 64, BF16, IS_NEOX | WHOLE_VECTOR | 1, BLOCKS, FP8),
    (48, 8, 128, 64, FP16, IS_NEOX | WHOLE_VECTOR, INT8_DYNAMIC_TOKEN, FP16),
    (3, 2, 192, 96, FP32, WHOLE_VECTOR | NORM_V | 2, GROUPS, FP32),
]


def everything(heads, kv_heads, dim, rotary, dtype, flags, key, held, tokens=7) -> tuple:
    """Arguments of qk_norm_rope_kv_cache_write, in odd memory orders."""
    both, k, positions, table = rope_inputs(tokens, 2 * heads, kv_heads, dim, rotary, dtype, "cpu")
    q, gate = both[:, ::2], both[:, 1::2]  # as Qwen3-Next projects them: head by head
    v = torch.randn(tokens, kv_heads, dim).to(dtype)
    caches = caches_for(k, v, held, order=flags % 3)
    code, given = key_inputs(key, "cpu")[:2] if key else (NO_KEY, None)
    return q, k, v, positions, table, *weights(q, k, flags, heads), 1e-6, *caches, flags, 0, code, given, gate


def norms_only(op, args) -> dict[str, torch.Tensor]:
    """What promise 4 has bitwise the CPU's is left to it."""
    return run(op, args) if "norm" in op.name else results(op, args)


@pytest.mark.parametrize("shape", FUSED, ids=described)
def test_fused_is_unfused(shape):
    promises.heads_are_normed_first(norms_only, OPS["qk_norm_rope_kv_cache_write"], [everything(*shape)])


FAR = 2**40


@pytest.mark.parametrize("shape", [FUSED[0], FUSED[6], FUSED[8]], ids=described)
def test_what_lies_outside_is_neither_read_nor_written(shape):
    """Its token's q and k are NaN, and caches are left alone; every other token is as if it were not there."""
    args = list(everything(*shape, tokens=12))
    op, at = OPS["qk_norm_rope_kv_cache_write"], OPS["qk_norm_rope_kv_cache_write"].argument
    args[at("positions")], slots = torch.randint(0, 4096, (12,)), torch.randperm(12)
    args[at("positions")][[1, 4, 5, 11]] = torch.tensor([-1, 4096, FAR, -FAR])
    slots[[2, 3, 4, 6, 7]] = torch.tensor([-2, FAR, -1, -1, args[at("k_cache")].shape[:2].numel()])
    args[at("slot_mapping")] = slots[:11]
    bad = torch.tensor([1, 2, 3, 4, 5, 7, 11])
    for _ in range(2):
        actual = run(op, tuple(args))
        tame = list(args)
        tame[at("positions")] = args[at("positions")].clamp(0, 4095)
        tame[at("slot_mapping")] = slots[:11].clone()
        tame[at("slot_mapping")][bad[:-1]] = -1
        expected = run(op, tuple(tame))
        for name in "k_cache", "v_cache", "gate":
            assert_same(actual[name], expected[name], name)
        for name in actual.keys() & {"q", "k"}:
            if expected[name].element_size() > 1:
                expected[name][bad] = float("nan")
                assert_same(actual[name], expected[name], name)
            else:
                assert (actual[name][bad].view(torch.uint8) == 0x7F).all()
        args[at("positions")] = args[at("positions")].clamp(-(2**31), 2**31 - 1).int()
        slots = slots.clamp(-(2**31), 2**31 - 1).int()
        args[at("slot_mapping")] = slots[:11]


def test_one_position_of_three_outside():
    q, k, _, table = rope_inputs(5, 2, 1, 64, 32, BF16, "cpu")
    positions = torch.randint(0, 4096, (3, 5))
    positions[0, 1], positions[1, 2], positions[2, 3] = -1, 4096, FAR
    args = (q, k, positions, table, IS_NEOX, mrope_code([6, 5, 5], True))
    expected = OPS["rope"].reference(*args)
    for got, e in zip(run(OPS["rope"], args).values(), expected, strict=True):
        assert_same(got, e)
        assert e.isnan().any(-1).any(-1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("whole", [0, WHOLE_VECTOR])
def test_a_token_depends_on_nothing_but_itself(whole):
    """Promise 2: alone, in a batch, at odd addresses, with gaps between heads."""
    q, k, positions, table = rope_inputs(9, 6, 2, 64, 64, BF16, "cpu")
    args = (q, k, positions, table, *weights(q, k, whole, 1), 1e-6, IS_NEOX | whole, 0)
    expected = run(OPS["qk_norm_rope"], args)
    for i in 0, 8:
        alone = (*(x[i : i + 1] for x in args[:3]), *args[3:])
        for name, got in run(OPS["qk_norm_rope"], alone).items():
            assert_same(got, expected[name][i : i + 1])
    apart = torch.empty(9, 8, 64 + 3).to(BF16)
    apart[:, :6, 1:65], apart[:, 6:, 1:65] = q, k
    crooked = torch.empty(4096 * 64 + 1)[1:].view(4096, 64).copy_(table)
    for name, got in run(
        OPS["qk_norm_rope"], (apart[:, :6, 1:65], apart[:, 6:, 1:65], positions, crooked, *args[4:])
    ).items():
        assert_same(got, expected[name])


def test_offsets_beyond_2_to_the_31(untouched_memory):
    """A cache of three blocks, 2^31 bytes and more apart, of which only what is written is ever touched."""
    q, k, positions, table = rope_inputs(3, 2, 1, 64, 64, BF16, "cpu")
    base = on_device(torch.empty(0, dtype=BF16)).new_empty(5 * 2**30 + 256)
    k_cache = base.as_strided((3, 2, 1, 64), (5 * 2**29, 64, 64, 1))
    v_cache = base[128:].as_strided((3, 2, 1, 64), (5 * 2**29, 64, 64, 1))
    slots = torch.tensor([5, 0, 3])
    with by_cuda():
        moved = map(on_device, (q, k, k, positions, table))
        _, k = fused_ops.rope_kv_cache_write(*moved, k_cache, v_cache, on_device(slots), return_key=True)
    for t, slot in enumerate(slots.tolist()):
        assert_same(k_cache[slot // 2, slot % 2], k[t])


def test_a_norm_of_more_heads_than_registers_hold():
    q, k, positions, table = rope_inputs(2, 65, 3, 512, 512, FP32, "cpu")
    args = (q, k, positions, table, torch.randn(65 * 512), None, 1e-6, IS_NEOX | WHOLE_VECTOR, 0)
    promises.heads_are_normed_first(run, OPS["qk_norm_rope"], [args])


def test_heads_too_wide_are_refused():
    supports = _cuda._supports(OPS["qk_norm_rope"])
    q, k, positions, table = map(on_device, rope_inputs(1, 1, 1, 4096 + 8, 64, BF16, "cpu"))
    with by_cuda(), pytest.raises(ValueError, match="the cuda backend"):
        fused_ops.qk_norm_rope(q, k, positions, table, None, None, 1e-6, whole_vector=True)
    args = (k[..., :4096], positions, table, None, None, 1e-6, IS_NEOX | WHOLE_VECTOR, 0)
    assert not supports(q, *args)
    assert supports(q[..., :4096], *args)
    assert not supports(q[..., :4096].expand(1, (1 << 17) + 1, 4096), *args)
