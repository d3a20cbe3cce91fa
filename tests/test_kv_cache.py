"""Rotation that ends in a paged cache: its bytes are those of the operations one after another, and no other is."""

import pytest
import torch
from compare import assert_same, raw

import fused_ops
from fused_ops.heads_inputs import caches_for, rope_inputs
from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
    MXFP8,
    NVFP4,
    GroupShape,
    QuantizedActivation,
    ScaleLayout,
)
from quant.key import FP8, FP8_FNUZ

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = sorted(set(fused_ops.OPS["rope_kv_cache_write"].backends) & {"cpu", "reference"})
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(tokens=9, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16, held=None, order=0, v_dim=None):
    """The arguments of rope_kv_cache_write by name; caches are poisoned."""
    q, k, positions, table = rope_inputs(tokens, heads, kv_heads, dim, dim, dtype, "cpu")
    v = torch.randn(tokens, kv_heads, v_dim or dim).to(dtype)
    k_cache, v_cache, slots, k_scale, v_scale = caches_for(k, v, held or dtype, order)
    for cache in k_cache, v_cache:
        cache.copy_(torch.full(cache.shape, 77.0))
    named = {"q": q, "k": k, "v": v, "positions": positions, "cos_sin_cache": table}
    return named | {
        "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots, "k_scale": k_scale, "v_scale": v_scale
    }  # fmt: skip


def stored(x, held, scale):
    """What a cache of dtype `held` has of x [T, heads, D]."""
    if scale is None:
        return x
    key = {FP8: FP8_STATIC_TENSOR, torch.int8: INT8_STATIC_TENSOR}.get(held)
    if key is None:
        return (x.float() / scale.view(-1, 1)).clamp(-224, 224).to(held)
    heads = [fused_ops.quantize(x[:, h], key, scale=scale[h % len(scale)].view(1)).data for h in range(x.shape[1])]
    return torch.stack([raw(h) for h in heads], dim=1).view(held)


def expected_cache(cache, rows, slots):
    """The cache after its rows were written one at a time."""
    cache = raw(cache.contiguous()).clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = raw(rows[t].contiguous())
    return cache


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("held", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_caches_get_what_the_operations_make_and_nothing_else(backend, dtype, held, order):
    """Every dtype, in blocks of 16, 5 and 1, tokens or heads outermost, and both caches in one tensor."""
    call = inputs(dtype=dtype, held=held, order=order, v_dim=40 if order == 4 else None)
    before = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    with fused_ops.use_backend(backend):
        q, k = fused_ops.rope(*(call[name] for name in ("q", "k", "positions", "cos_sin_cache")))
        assert_same(fused_ops.rope_kv_cache_write(**call), q)
        for name, rows in ("k", k), ("v", call["v"]):
            rows = stored(rows, held, call[f"{name}_scale"])
            want = expected_cache(before[f"{name}_cache"], rows, call["slot_mapping"])
            assert_same(raw(call[f"{name}_cache"].contiguous()), want, name)


@pytest.mark.parametrize(
    "options",
    [{}, {"whole_vector": True}, {"norm_v": True, "weight_bias": 1.0}, {"whole_vector": True, "norm_v": True}],
    ids=str,
)
@pytest.mark.parametrize("held", [None, FP8, FP8_FNUZ], ids=str)
@every_backend
def test_norms_come_first(backend, held, options):
    call = inputs(held=held, order=1)
    other = {**call, "k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
    whole = "whole_vector" in options
    weights = {"q_weight": torch.rand(64 * (4 if whole else 1)), "k_weight": torch.rand(64 * (2 if whole else 1))}
    norm = {name: value for name, value in options.items() if name == "weight_bias"}
    with fused_ops.use_backend(backend):
        q, k = fused_ops.qk_norm_rope_kv_cache_write(**call, **weights, eps=1e-6, **options, return_key=True)
        for name in "q", "k":
            x, w = other[name], weights[f"{name}_weight"]
            other[name] = fused_ops.rms_norm(x.flatten(1) if whole else x, w, 1e-6, **norm).view(x.shape)
        if "norm_v" in options:
            other["v"] = fused_ops.rms_norm(other["v"], None, 1e-6)
        expected = fused_ops.rope_kv_cache_write(**other, return_key=True)
    for name, actual, want in ("q", q, expected[0]), ("k", k, expected[1]):
        assert_same(actual, want, name)
    for name in "k_cache", "v_cache":
        assert_same(call[name].contiguous(), other[name].contiguous(), name)


KEYS = [
    FP8_STATIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_DYNAMIC_GROUP_64,
    INT8_DYNAMIC_TOKEN,
    MXFP8,
    MXFP8.with_scale(layout=ScaleLayout.SWIZZLED_128X4),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
@every_backend
def test_queries_are_quantized_by_head(backend, key):
    call = inputs(dim=128)
    scale = torch.tensor([0.02]) if key.scale.static else None
    with fused_ops.use_backend(backend):
        q, k = fused_ops.rope_kv_cache_write(**call, q_quant_key=key, q_scale=scale, return_key=True)
        rotated = fused_ops.rope(*(call[name] for name in ("q", "k", "positions", "cos_sin_cache")))
        want = fused_ops.quantize(rotated[0], key, scale=scale)
        out = QuantizedActivation(torch.empty_like(q.data), torch.empty_like(q.scale), key, torch.bfloat16)
        out, k_out = fused_ops.rope_kv_cache_write(
            **call, q_quant_key=key, q_scale=scale, return_key=True, out=(out, torch.empty_like(k))
        )
    for actual in q, out:
        assert_same(actual.data, want.data)
        assert_same(actual.scale, want.scale)
        assert actual.orig_dtype == torch.bfloat16
        assert actual.quant_key == key
    assert_same(k, rotated[1])
    assert_same(k_out, rotated[1])


@every_backend
def test_everything_at_once_with_a_gate(backend):
    call = inputs(held=FP8)
    gate, weight = torch.randn(9, 4, 8).bfloat16(), torch.ones(64)
    norms = {"q_weight": weight, "k_weight": weight, "eps": 1e-6}
    with fused_ops.use_backend(backend):
        q, k, sigmoid = fused_ops.qk_norm_rope_kv_cache_write(
            **call, **norms, gate=gate, q_quant_key=FP8_DYNAMIC_TOKEN, return_key=True
        )
        alone = fused_ops.qk_norm_rope_kv_cache_write(**call, **norms)
        _, with_gate = fused_ops.qk_norm_rope_kv_cache_write(**call, **norms, gate=gate)
        assert_same(q.data, fused_ops.quantize(alone, FP8_DYNAMIC_TOKEN).data)
    assert_same(sigmoid, gate.sigmoid())
    assert_same(with_gate, gate.sigmoid())
    assert k.shape == call["k"].shape


@every_backend
def test_padding_and_slots_of_minus_one_are_rotated_and_not_written(backend):
    call = inputs()
    call["slot_mapping"] = torch.tensor([3, -1, 4], dtype=torch.int32)  # of nine tokens
    before = call["k_cache"].clone()
    with fused_ops.use_backend(backend):
        q, k = fused_ops.rope(*(call[name] for name in ("q", "k", "positions", "cos_sin_cache")))
        assert_same(fused_ops.rope_kv_cache_write(**call), q)
    assert_same(call["k_cache"], expected_cache(before, k, call["slot_mapping"]).view(torch.bfloat16))
    assert (call["k_cache"] != before).any(-1).sum() == 4


@every_backend
def test_offsets_beyond_2_to_the_31(backend, untouched_memory):
    """A cache of four blocks, 2^30 elements apart, of which only what is written is ever touched."""
    call = inputs(tokens=4)
    k_cache, v_cache = (torch.empty(3 * 2**30 + 2 * 128, dtype=torch.bfloat16) for _ in range(2))
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    call |= {name: base.as_strided((4, 2, 2, 64), (2**30, 128, 64, 1)) for name, base in caches.items()}
    call["slot_mapping"] = torch.tensor([7, 0, 4, 3])
    with fused_ops.use_backend(backend):
        _, k = fused_ops.rope_kv_cache_write(**call, return_key=True)
    for t, (block, place) in enumerate([(3, 1), (0, 0), (2, 0), (1, 1)]):
        assert_same(call["k_cache"][block, place], k[t])
        assert_same(call["v_cache"][block, place], call["v"][t])


@every_backend
def test_what_is_not_finite_shows(backend):
    call = inputs(held=FP8)
    call["v"][0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    call["slot_mapping"] = torch.tensor([0])
    with fused_ops.use_backend(backend):
        fused_ops.rope_kv_cache_write(**call)
    assert call["v_cache"].view(torch.uint8)[0, 0, 0, :3].tolist() == [0x7F, 0x7E, 0xFE]


def latent(tokens=9, rank=512, dim=64, held=torch.bfloat16):
    q, _, positions, table = rope_inputs(tokens, 4, 1, dim, dim, torch.bfloat16, "cpu")
    packed = torch.randn(tokens, rank + dim).bfloat16()
    cache = torch.full((5, 4, rank + dim), 77.0).to(held)
    slots = torch.randperm(20)[:tokens]
    slots[2] = -1
    named = {"q_pe": q, "k_pe": packed[:, rank:], "kv_c": packed[:, :rank], "positions": positions}
    return named | {"cos_sin_cache": table, "kv_cache": cache, "slot_mapping": slots}


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("held", [torch.bfloat16, FP8], ids=str)
@every_backend
def test_latents_and_their_rotated_key_share_a_row(backend, held, is_neox):
    call = latent(held=held)
    call["kv_scale"] = None if held == torch.bfloat16 else torch.tensor([0.03])
    before = call["kv_cache"].clone()
    with fused_ops.use_backend(backend):
        q, k = fused_ops.rope(
            call["q_pe"], call["k_pe"][:, None], call["positions"], call["cos_sin_cache"], is_neox=is_neox
        )
        assert_same(fused_ops.mla_rope_kv_cache_concat(**call, is_neox=is_neox), q)
        rows = torch.cat([call["kv_c"][:, None], k], dim=-1)
        want = expected_cache(before, stored(rows, held, call["kv_scale"])[:, 0], call["slot_mapping"])
    assert_same(raw(call["kv_cache"]), want)
    in_place = fused_ops.mla_rope_kv_cache_concat(**call, is_neox=is_neox, out=call["q_pe"])
    assert in_place is call["q_pe"]
    assert_same(in_place.contiguous(), q)


def test_a_token_does_not_depend_on_its_neighbours():
    call = inputs(tokens=300, held=FP8)
    call["slot_mapping"] = torch.arange(300)
    norms = {"q_weight": torch.rand(64), "k_weight": torch.rand(64), "eps": 1e-6}
    whole = fused_ops.qk_norm_rope_kv_cache_write(**call, **norms)
    for t in 0, 7, 299:
        one = {name: call[name][t : t + 1] for name in ("q", "k", "v", "positions", "slot_mapping")}
        one |= {name: torch.zeros_like(call[name]) for name in ("k_cache", "v_cache")}
        assert_same(fused_ops.qk_norm_rope_kv_cache_write(**{**call, **one}, **norms), whole[t : t + 1])
        for name in "k_cache", "v_cache":
            assert_same(one[name][t // 16, t % 16], call[name][t // 16, t % 16], name)


CALL = inputs(tokens=4)
CACHE, SLOTS = CALL["k_cache"], CALL["slot_mapping"]
CODED = {"k_cache": CACHE.to(FP8), "v_cache": CACHE.to(FP8)}
SCALES = {"k_scale": torch.ones(1), "v_scale": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": CALL["v"][:3]}, ValueError, r"v is \[3, 2, 64\], expected \[4, 2, Dv\]"),
        (
            {"k_cache": CACHE[:, :, :1]},
            ValueError,
            r"k_cache is \[7, 16, 1, 64\], .* \[blocks, block_size, 2, 64\], a",
        ),
        ({"v_cache": CACHE[:3]}, ValueError, r"v_cache is \[3, 16, 2, 64\], expected \[7, 16, 2, 64\]"),
        ({"k_cache": CACHE.half()}, TypeError, "k_cache is torch.float16"),
        ({"k_cache": CACHE.transpose(-1, -2)}, ValueError, "k_cache is"),
        ({"k_cache": CACHE[..., :1].expand_as(CACHE)}, ValueError, "k_cache has strides"),
        ({"k_cache": CACHE[:1].expand_as(CACHE)}, ValueError, "k_cache has strides .* share memory"),
        ({"v_cache": CACHE}, ValueError, "v_cache shares memory with k_cache"),
        ({"v": CACHE.flatten(0, 1)[:4]}, ValueError, "k_cache shares memory with v"),
        (CODED, TypeError, "k_scale is None, expected a Tensor"),
        (
            {**CODED, **SCALES, "k_scale": torch.ones(3)},
            ValueError,
            r"k_scale is \[3\], .* float32 \[1\] or \[2\]",
        ),
        ({**CODED, **SCALES, "k_scale": torch.ones(1).half()}, TypeError, "k_scale is torch.float16"),
        ({**CODED, **SCALES, "v_cache": CACHE.to(torch.int8)}, TypeError, "v_cache is torch.int8, expected .* as k_"),
        (SCALES, ValueError, "k_scale is given, but k_cache is torch.bfloat16, which takes none"),
        ({"slot_mapping": SLOTS.float()}, TypeError, "slot_mapping is torch.float32"),
        ({"slot_mapping": torch.arange(5)}, ValueError, r"slot_mapping is \[5\], expected at most 4"),
        ({"slot_mapping": torch.tensor([0, 112])}, ValueError, "slot_mapping has 112, expected -1 to 111"),
        ({"slot_mapping": torch.tensor([-2])}, ValueError, "slot_mapping has -2, expected -1 to 111"),
        ({"positions": torch.full((4,), 4096)}, ValueError, "positions has 4096, expected 0 to 4095"),
        ({"q_quant_key": "fp8"}, TypeError, "q_quant_key is str, expected a QuantKey or None"),
        ({"q_quant_key": FP8_DYNAMIC_TENSOR}, ValueError, "q_quant_key is FP8_DYNAMIC_TENSOR, expected a symm"),
        ({"q_quant_key": FP8_STATIC_TENSOR}, ValueError, "q_scale is None, FP8_STATIC_TENSOR takes"),
        ({"q_quant_key": NVFP4, "q_scale": torch.ones(1)}, ValueError, "q_quant_key is NVFP4, expected a symmetric"),
        ({"q_quant_key": FP8_DYNAMIC_TOKEN, "q_scale": torch.ones(1)}, ValueError, "q_scale is given, which only"),
        (
            {"q_quant_key": FP8_DYNAMIC_TOKEN.with_scale(group_shape=GroupShape(128, 128))},
            ValueError,
            "q_quant_key has groups that span rows",
        ),
        (
            {"q_quant_key": INT8_STATIC_TENSOR_ASYM, "q_scale": torch.ones(1)},
            ValueError,
            "q_quant_key is INT8_STATIC_TENSOR_ASYM, expected a symmetric",
        ),
        ({"q_scale": torch.ones(1)}, ValueError, "q_scale is given, which only a static"),
        ({"return_key": 1}, TypeError, "return_key is 1, expected a bool"),
        ({"return_key": True, "out": CALL["q"]}, TypeError, r"out is Tensor, expected \(a Tensor, k\)"),
        ({"out": CACHE.flatten(0, 1)[:8].view(4, 4, 64)}, ValueError, ".*shares memory|.*overlaps"),
    ],
)
@every_backend
def test_errors_name_argument_got_and_expected(backend, change, error, message):
    call = {**CALL, **change}
    before = call["k_cache"].clone(), call["v_cache"].clone()
    with fused_ops.use_backend(backend), pytest.raises(error, match="rope_kv_cache_write: " + message):
        fused_ops.rope_kv_cache_write(**call)
    for cache, was in zip((call["k_cache"], call["v_cache"]), before, strict=True):
        assert_same(cache.contiguous(), was.contiguous(), "written before it was refused")


VIEWS = {  # of keys and values in one tensor, which lie between each other and share no byte
    "[blocks, heads, 2, block, D]": lambda: torch.zeros(7, 2, 2, 16, 64).transpose(1, 3).unbind(2),
    "[blocks, heads, block, 2 * D]": lambda: torch.zeros(7, 2, 16, 128).transpose(1, 2).split(64, dim=-1),
    "[heads, blocks, block, 2, D]": lambda: torch.zeros(2, 7, 16, 2, 64).permute(1, 2, 3, 0, 4).unbind(2),
    "[block, blocks, 2, heads, D]": lambda: torch.zeros(16, 7, 2, 2, 64).transpose(0, 1).unbind(2),
    "[blocks, layers, block, 2, heads, D]": lambda: torch.zeros(7, 3, 16, 2, 2, 64)[:, 1].unbind(2),
    "every second block": lambda: torch.zeros(14, 16, 2, 2, 64)[::2].unbind(2),
}


@pytest.mark.parametrize("views", VIEWS)
@every_backend
def test_any_memory_order(backend, views):
    call = inputs(tokens=4, dtype=torch.float32)
    call["k_cache"], call["v_cache"] = VIEWS[views]()
    with fused_ops.use_backend(backend):
        _, k = fused_ops.rope_kv_cache_write(**call, return_key=True)
    for name, rows in ("k_cache", k), ("v_cache", call["v"]):
        cache = torch.zeros(7, 16, 2, 64)
        assert_same(raw(call[name].contiguous()), expected_cache(cache, rows, call["slot_mapping"]), name)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels on this machine")
def test_an_output_in_the_place_of_an_input_is_in_no_others():
    """Of several inputs that begin at one address it is the one that may be written."""
    call = inputs(tokens=4, heads=2)
    out = torch.empty_like(call["q"]), call["k"]
    for again in {"v": call["k"]}, {"q": call["k"]}, {"q": call["k"], "v": call["k"]}:
        with pytest.raises(ValueError, match="overlaps another argument"):
            fused_ops.rope_kv_cache_write(**{**call, **again}, return_key=True, out=out)
    latents = latent(tokens=4)
    latents["q_pe"] = latents["k_pe"][:, None]
    with pytest.raises(ValueError, match="overlaps another argument"):
        fused_ops.mla_rope_kv_cache_concat(**latents, out=latents["q_pe"])


@pytest.mark.parametrize("options", [{"return_key": True}, {"q_quant_key": FP8_DYNAMIC_TOKEN}, {"gate": 1}], ids=str)
def test_every_option_compiles_to_one_graph(options):
    call = {**inputs(), "q_weight": None, "k_weight": None, "eps": 1e-6}
    options = {name: call["q"].clone() if name == "gate" else value for name, value in options.items()}
    caches = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    torch._dynamo.reset()
    compiled = torch.compile(fused_ops.qk_norm_rope_kv_cache_write, fullgraph=True, backend="aot_eager")
    actual = compiled(**call, **options)
    expected = fused_ops.qk_norm_rope_kv_cache_write(**{**call, **caches}, **options)
    pair = [x if isinstance(x, tuple) else (x,) for x in (actual, expected)]
    for a, e in zip(*pair, strict=True):
        data = [x.data if isinstance(x, QuantizedActivation) else x for x in (a, e)]
        assert_same(*data)
    for name, cache in caches.items():
        assert_same(call[name].contiguous(), cache.contiguous(), name)


LATENT = latent(tokens=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_pe": LATENT["k_pe"][:, None]}, ValueError, r"k_pe is \[4, 1, 64\], expected \[4, 64\]"),
        ({"kv_c": LATENT["kv_c"].float()}, TypeError, "kv_c is torch.float32, expected torch.bfloat16 as q_pe"),
        (
            {"kv_cache": LATENT["kv_cache"][..., 1:]},
            ValueError,
            r"kv_cache is \[5, 4, 575\], .* block_size, 576\]",
        ),
        ({"kv_scale": torch.ones(1)}, ValueError, "kv_scale is given, but kv_cache is torch.bfloat16"),
        ({"kv_cache": LATENT["kv_cache"].to(FP8), "kv_scale": torch.ones(4)}, ValueError, r"kv_scale is \[4\]"),
        ({"slot_mapping": torch.tensor([20])}, ValueError, "slot_mapping has 20, expected -1 to 19"),
    ],
)
@every_backend
def test_errors_of_latents(backend, change, error, message):
    with fused_ops.use_backend(backend), pytest.raises(error, match="mla_rope_kv_cache_concat: " + message):
        fused_ops.mla_rope_kv_cache_concat(**{**LATENT, **change})
