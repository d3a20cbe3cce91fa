"""What only a GPU can show of the CUDA and Triton kernels: `make gpu`.

The rest of the suite for them, test_cuda*.py and test_triton*.py, runs there too, with FUSED_OPS_TEST_DEVICE=cuda.
"""

import threading

import pytest
import torch
from compare import assert_same, raw

import fused_ops
from fused_ops import OPS, _cuda
from fused_ops.heads_inputs import rope_inputs
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    MXFP4,
    NVFP4,
)

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
KEYS = [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, INT8_DYNAMIC_TOKEN, FP8_DYNAMIC_TENSOR]


def add_norm_quant(x, residual, weight, key):
    (q, residual) = fused_ops.fused_add_rms_norm_quant(x, residual, weight, 1e-6, key)
    return q.data, q.scale, residual


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_16_bit_dtype(backend, dtype):
    """The hardware's conversions are those of the CPU, whose squares cover every rounding."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(64, 1024)
    scale = torch.tensor([0.37])
    with fused_ops.use_backend(backend):
        squares = fused_ops.relu2(values.cuda())
        codes = fused_ops.quantize(values.cuda(), FP8_STATIC_TENSOR, scale=scale.cuda())
        gated = fused_ops.silu_mul(values.cuda(), values.flip(0).cuda())
    assert_same(squares.cpu(), fused_ops.relu2(values))
    assert_same(codes.data.cpu(), fused_ops.quantize(values, FP8_STATIC_TENSOR, scale=scale).data)
    assert_same(gated.cpu(), fused_ops.silu_mul(values, values.flip(0)))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (10, 0), reason="no FP4 there")
def test_fp4_by_the_hardware_is_the_same(monkeypatch):
    """Of every float that isn't beyond 6, in groups whose scale a 6 makes one. The same rows, once cut in two, so that
    kernels with the instruction and without are told apart; others test what saturates and what isn't finite.
    """
    chunk = 31 << 22
    for sign in 0, -(1 << 31):
        for first in range(0, 0x40C00001, chunk):
            values = torch.arange(first, first + chunk, device="cuda").clamp(max=0x40C00000) + sign
            x = torch.full((1 << 22, 32), 6.0, device="cuda")
            x[:, :31] = values.to(torch.int32).view(torch.float32).view(-1, 31)
            with fused_ops.use_backend("cuda"):
                expected = fused_ops.quantize(x.view(-1, 2048), MXFP4)
                monkeypatch.setattr(_cuda, "HARDWARE_FP4", True)
                actual = fused_ops.quantize(x.view(-1, 4096), MXFP4)
                monkeypatch.setattr(_cuda, "HARDWARE_FP4", False)
            assert torch.equal(actual.data.flatten(), expected.data.flatten())
    monkeypatch.setattr(_cuda, "HARDWARE_FP4", True)
    x = torch.randn(64, 8192, device="cuda") * torch.logspace(-38, 38, 64, device="cuda")[:, None]
    x[::7, 5], x[::9, 300] = float("nan"), float("inf")
    with fused_ops.use_backend("cuda"):
        actual = fused_ops.quantize(x, NVFP4, scale2=torch.tensor([0.01]).cuda())
    assert_same(actual.data.cpu(), fused_ops.quantize(x.cpu(), NVFP4, scale2=torch.tensor([0.01])).data)


@BACKENDS
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_captured_graph_replays_with_new_inputs(backend, key):
    x, r = torch.randn(2, 16, 4096, device="cuda").bfloat16()
    w = torch.randn(4096, device="cuda")
    with fused_ops.use_backend(backend):
        fused_ops.warmup(lambda: add_norm_quant(x, r, w, key))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = add_norm_quant(x, r, w, key)
        for _ in range(3):
            x.normal_()
            graph.replay()
            for got, expected in zip(captured, add_norm_quant(x, r, w, key), strict=True):
                assert_same(got, expected)


@BACKENDS
def test_work_waits_on_the_current_stream(backend):
    x, w = torch.randn(4096, 8192, device="cuda").bfloat16(), torch.ones(8192, device="cuda")
    with fused_ops.use_backend(backend):
        expected = fused_ops.rms_norm(x * 3, w, 1e-6)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            torch.cuda._sleep(50_000_000)
            actual = fused_ops.rms_norm(x * 3, w, 1e-6)
        aside.synchronize()
    assert_same(actual, expected)


@BACKENDS
def test_a_thread_that_has_not_used_cuda(backend):
    x = torch.randn(4, 640, device="cuda").bfloat16()
    found = []
    with fused_ops.use_backend(backend):
        expected = fused_ops.relu2(x)
        out = torch.empty_like(x)
        thread = threading.Thread(target=lambda: found.append(fused_ops.relu2(x, out=out)))
        thread.start()
        thread.join()
    assert_same(found[0], expected)


@BACKENDS
@pytest.mark.parametrize("key", [FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128], ids=str)
def test_beyond_two_to_the_31_elements(backend, key):
    rows, cols = (1 << 19) + 3, 4096 + 128
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").normal_()
    with fused_ops.use_backend(backend):
        whole = fused_ops.quantize(x, key)
        for part in slice(0, 5), slice(rows - 5, rows):
            alone = fused_ops.quantize(x[part].clone(), key)
            assert torch.equal(raw(whole.data[part]), raw(alone.data))
            assert torch.equal(whole.scale[part], alone.scale)


@BACKENDS
@pytest.mark.parametrize("key", KEYS[:3], ids=str)
def test_a_row_is_the_same_in_any_batch(backend, key):
    """Promise 2, at sizes that fill the device."""
    x = torch.randn(5000, 7168, device="cuda").bfloat16()
    r, w = torch.randn_like(x), torch.randn(7168, device="cuda")
    with fused_ops.use_backend(backend):
        whole = add_norm_quant(x, r, w, key)
        for rows in (slice(0, 1), slice(4093, 5000)):
            for got, expected in zip(add_norm_quant(x[rows], r[rows], w, key), whole, strict=True):
                assert_same(got, expected[rows].clone())


def heads(backend, tokens, dtype=torch.bfloat16, dim=128):
    """q, k, v, positions, table, k_cache, v_cache and slots of rope_kv_cache_write, on the GPU."""
    if backend not in OPS["rope_kv_cache_write"].backends:
        pytest.skip(f"{backend} has no heads")
    q, k, positions, table = rope_inputs(tokens, 8, 2, dim, dim, dtype, "cuda")
    caches = torch.zeros(2, -(-tokens // 16), 16, 2, dim, device="cuda").to(dtype)
    return q, k, torch.randn_like(k), positions, table, *caches, torch.randperm(tokens, device="cuda")


@BACKENDS
@pytest.mark.parametrize("held", [None, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_16_bit_dtype_as_a_head(backend, dtype, held):
    *_, positions, table, k_cache, v_cache, slots = heads(backend, 256, dtype)
    q = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(256, 2, 128).cuda()
    k, scales = q.flip(0), {"k_scale": torch.tensor([0.37]), "v_scale": torch.tensor([3.7])} if held else {}
    k_cache, v_cache = (cache.to(held or dtype) for cache in (k_cache, v_cache))
    there = (q, k, k.flip(1), positions, table, k_cache, v_cache, slots)
    here = [x.cpu() for x in there]
    with fused_ops.use_backend(backend):
        actual = fused_ops.rope_kv_cache_write(*there, **{name: scale.cuda() for name, scale in scales.items()})
    assert_same(actual.cpu(), fused_ops.rope_kv_cache_write(*here, **scales))
    assert_same(k_cache.cpu(), here[5])
    assert_same(v_cache.cpu(), here[6])


@BACKENDS
def test_a_captured_graph_writes_into_other_slots(backend):
    q, k, v, positions, _, k_cache, v_cache, slots = args = heads(backend, 16)
    weight = torch.randn(128, device="cuda")
    norms = (weight, weight, 1e-6)
    with fused_ops.use_backend(backend):
        call = lambda *caches: fused_ops.qk_norm_rope_kv_cache_write(*args[:5], *norms, *caches, slots)  # noqa: E731
        fused_ops.warmup(lambda: call(k_cache, v_cache))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(k_cache, v_cache)
        for _ in range(3):
            q.normal_(), k.normal_(), v.normal_()
            positions.random_(0, 4096), slots.copy_(torch.randperm(16))
            graph.replay()
            mine = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
            assert_same(captured, call(*mine))
            assert_same(k_cache, mine[0])
            assert_same(v_cache, mine[1])


@BACKENDS
def test_heads_beyond_two_to_the_31_elements(backend):
    tokens = (1 << 21) + 3
    q, k, v, positions, table, k_cache, v_cache, slots = heads(backend, tokens)
    with fused_ops.use_backend(backend):
        whole = fused_ops.rope_kv_cache_write(q, k, v, positions, table, k_cache, v_cache, slots)
        for part in slice(0, 5), slice(tokens - 5, tokens):
            alone = fused_ops.rope(q[part], k[part], positions[part], table)
            assert_same(whole[part], alone[0])
            assert_same(k_cache.flatten(0, 1)[slots[part]], alone[1])
            assert_same(v_cache.flatten(0, 1)[slots[part]], v[part].contiguous())
