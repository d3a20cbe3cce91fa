"""Attention on a GPU: the Triton kernels by their promises, and FlashInfer by the reference: `make gpu`."""

import pairwise
import pytest
import torch
from compare import assert_attends, assert_close, assert_same
from test_ops import results

import fused_ops
from fused_ops import OPS, _flashinfer
from fused_ops._op import describe
from fused_ops.attention_inputs import batch, blocks_of, filled
from quant import FP8_DYNAMIC_GROUP_128, FP8_STATIC_TENSOR, INT8_DYNAMIC_TOKEN, NVFP4
from quant.key import FP8

pytestmark = pytest.mark.gpu
NAN = float("nan")
NAMES = ["paged_attention", "mla_attention"]
KEYS = {
    INT8_DYNAMIC_TOKEN: {},
    FP8_STATIC_TENSOR: {"output_scale": torch.tensor([0.01])},
    FP8_DYNAMIC_GROUP_128: {},
    NVFP4: {"output_scale2": torch.tensor([4 / 2688])},
}
SEQUENCES = [(1, 300), (40, 700), (1, 1), (0, 5), (1, 4097), (128, 128)]
needs_flashinfer = pytest.mark.skipif(_flashinfer.missing() is not None, reason="FlashInfer isn't installed")


@pytest.fixture
def triton():
    if "triton" not in OPS["paged_attention"].backends:
        pytest.skip("no Triton kernels")
    with fused_ops.use_backend("triton"):
        yield


def there(value):
    """On the GPU, with its strides."""
    if not isinstance(value, torch.Tensor) or value.is_cuda:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)


def inputs(name, lengths=SEQUENCES, dtype=torch.bfloat16, held=None, block=16):
    """(the tensors, the options) of a public function, on the GPU; `split` says which tensors are queries."""
    blocks, rows = blocks_of(lengths, block), sum(n for n, _ in lengths)
    if name == "mla_attention":
        q = torch.randn(rows, 16, 192, device="cuda").to(dtype)
        kv_b = (torch.randn(16, 256, 512, device="cuda") / 32).to(dtype)
        cache, scale = filled((blocks, block, 576), held or dtype, "cuda")
        tensors = [q[..., :128], q[..., 128:], cache, kv_b[:, :128], kv_b[:, 128:]]
        return [*tensors, *batch(lengths, block, "cuda")], {"scale": 192**-0.5, "kv_scale": scale}
    q = torch.randn(rows, 8, 128, device="cuda").to(dtype)
    (k, scale), (v, _) = (filled((blocks, block, 2, 128), held or dtype, "cuda") for _ in range(2))
    return [q, k, v, *batch(lengths, block, "cuda")], {"scale": 128**-0.5, "k_scale": scale, "v_scale": scale}


def split(name, tensors):
    """(queries, caches, weights, block_tables, seq_lens, query_start_loc)"""
    queries, caches = (2, 1) if name == "mla_attention" else (1, 2)
    at = queries + caches
    return tensors[:queries], tensors[queries:at], tensors[at:-3], *tensors[-3:]


def run(name, tensors, options, **more):
    return getattr(fused_ops, name)(*tensors, **options, **more)


# --- the Triton kernels ---


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_the_reference(name, triton):
    op = OPS[name]
    for args in pairwise.sample(op.cases("cpu")):
        actual = results(op, tuple(map(there, args)))["y"].cpu()
        at = op.argument("v_cache")
        with fused_ops.use_backend("reference"):
            expected = results(op, args)["y"]
            if at is None:
                terms = expected.abs().max() if expected.numel() else expected
            else:
                magnitudes = args[at].float().abs().to(args[at].dtype)
                terms = results(op, (*args[:at], magnitudes, *args[at + 1 :]))["y"]
        context = f"{name} {describe(args, op)}"
        if actual.dtype == torch.float32:
            assert_attends(actual, expected, terms, context)
        else:
            assert_close(actual, expected, context, terms=terms)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_quantized_result_is_that_of_quantize(name, key, triton):
    """Promise 1."""
    tensors, options = inputs(name)
    given = {n: value.cuda() for n, value in KEYS[key].items()}
    y = run(name, tensors, options)
    q = run(name, tensors, options, output_quant_key=key, keep_unquantized=True, **given)
    expected = fused_ops.quantize(y, key, **{n.removeprefix("output_"): value for n, value in given.items()})
    assert_same(q.unquantized, y)
    assert_same(q.data, expected.data)
    assert_same(q.scale, expected.scale)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held", [None, FP8], ids=str)
def test_a_row_is_the_same_in_any_batch(name, held, triton):
    """Promise 2: each sequence alone, in other blocks, and its last query without those before it.

    But for MLA: there, whether projections are absorbed depends on how many queries a sequence has.
    """
    tensors, options = inputs(name, held=held)
    whole = run(name, tensors, options)
    queries, caches, weights, tables, lengths, starts = split(name, tensors)
    for i, (count, length) in enumerate(SEQUENCES):
        rows = slice(*starts[i : i + 2].tolist())
        moved = torch.randperm(len(caches[0]), device="cuda")
        others = [torch.empty_like(cache.view(torch.uint8)).view(cache.dtype) for cache in caches]
        for other, cache in zip(others, caches, strict=True):
            other.view(torch.uint8)[moved] = cache.view(torch.uint8)
        used = tables[i : i + 1].clamp_min(0).long()
        for last in {count} if name == "mla_attention" else {count, min(count, 1)}:
            own = [q[rows][count - last :] for q in queries]
            sequence = (moved[used], lengths[i : i + 1], torch.tensor([0, last], device="cuda"))
            alone = run(name, [*own, *others, *weights, *sequence], options)
            assert_same(alone, whole[rows][count - last :].clone(), f"{count} of {length}")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_row_does_not_see_may_be_anything(name, triton):
    """Later tokens, what lies behind a sequence in its last block, and blocks that nobody uses."""
    tensors, options = inputs(name)
    queries, caches, weights, tables, lengths, starts = split(name, tensors)
    whole = run(name, tensors, options)
    spoilt = [torch.full_like(cache, NAN) for cache in caches]
    for i, (_, length) in enumerate(SEQUENCES):
        places = torch.arange(length, device="cuda")
        block, row = tables[i, places // 16].long(), places % 16
        for bad, cache in zip(spoilt, caches, strict=True):
            bad[block, row] = cache[block, row]
    assert_same(run(name, [*queries, *spoilt, *weights, tables, lengths, starts], options), whole)
    last = SEQUENCES[-1][1] - 1  # of a prefill: seen by its last query only
    block, row = int(tables[-1, last // 16]), last % 16
    for bad in spoilt:
        bad[block, row] = NAN
    y = run(name, [*queries, *spoilt, *weights, tables, lengths, starts], options)
    assert_same(y[:-1], whole[:-1])
    assert y[-1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays_with_other_sequences(name, triton):
    tensors, options = inputs(name, [(1, 300), (1, 70), (1, 9)])
    queries, caches, _, tables, lengths, _ = split(name, tensors)
    more = {"output_quant_key": INT8_DYNAMIC_TOKEN}
    fused_ops.warmup(lambda: run(name, tensors, options), lambda: run(name, tensors, options, **more))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, q = run(name, tensors, options), run(name, tensors, options, **more)
    for seen in [300, 70, 9], [1, 40, 9], [299, 1, 1]:
        lengths.copy_(torch.tensor(seen))
        used = tables[tables >= 0]
        tables[tables >= 0] = used[torch.randperm(len(used), device="cuda")]
        for tensor in queries + caches:
            tensor.normal_()
        graph.replay()
        assert_same(y, run(name, tensors, options))
        assert_same(q.data, run(name, tensors, options, **more).data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["triton", pytest.param("flashinfer", marks=needs_flashinfer)])
def test_sequences_out_of_range_are_nan(name, backend):
    if backend not in OPS[name].backends:
        pytest.skip(f"{backend} has none")
    tensors, options = inputs(name)
    starts = tensors[-1].tolist()
    with fused_ops.use_backend(backend):
        good = run(name, tensors, options)
        for i in 0, 1, 4:
            for at, spoil in (
                (-3, lambda t: t[0].fill_(1 << 30)),
                (-3, lambda t: t[0].fill_(-1)),
                (-2, lambda t: t.mul_(999)),
            ):
                spoilt = [*tensors[:at], tensors[at].clone(), *tensors[len(tensors) + at + 1 :]]
                spoil(spoilt[at][i : i + 1])
                y = run(name, spoilt, options)
                rows = slice(*starts[i : i + 2])
                assert y[rows].isnan().all()
                y, others = (torch.cat([t[: rows.start], t[rows.stop :]]) for t in (y, good))
                assert y.isfinite().all()
                if backend == "triton":
                    assert_same(y, others)


# --- FlashInfer ---


@needs_flashinfer
@pytest.mark.parametrize("lengths", [SEQUENCES, [(1, n) for n in (1, 16, 300, 4097)]], ids=["mixed", "decode"])
@pytest.mark.parametrize("held", [None, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("more", [{}, {"sliding_window": 1}, {"sliding_window": 33}, {"soft_cap": 5.0}], ids=str)
@pytest.mark.parametrize("outermost", [False, True])
def test_flashinfer_is_the_reference(lengths, held, dtype, more, outermost):
    tensors, options = inputs("paged_attention", lengths, dtype, held)
    if outermost:
        tensors[1:3] = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in tensors[1:3])
    with fused_ops.use_backend("flashinfer"):
        actual = run("paged_attention", tensors, options, **more)
    with fused_ops.use_backend("reference"):
        expected = run("paged_attention", tensors, options, **more)
        magnitudes = tensors[2].float().abs().to(tensors[2].dtype)
        terms = run("paged_attention", [*tensors[:2], magnitudes, *tensors[3:]], options, **more)
    assert_attends(actual, expected, terms)


@needs_flashinfer
@pytest.mark.parametrize("lengths", [SEQUENCES, [(1, n) for n in (1, 16, 300, 4097)]], ids=["mixed", "decode"])
def test_flashinfers_mla_is_the_reference(lengths):
    tensors, options = inputs("mla_attention", lengths)
    with fused_ops.use_backend("flashinfer"):
        actual = run("mla_attention", tensors, options)
    with fused_ops.use_backend("reference"):
        expected = run("mla_attention", tensors, options)
    assert_attends(actual, expected, expected.abs().max())


@needs_flashinfer
def test_flashinfer_quantizes_its_own_result_and_leaves_padding_zero():
    tensors, options = inputs("paged_attention")
    tensors[0] = torch.cat([tensors[0], torch.full_like(tensors[0][:3], NAN)])
    with fused_ops.use_backend("flashinfer"):
        q = run("paged_attention", tensors, options, output_quant_key=INT8_DYNAMIC_TOKEN, keep_unquantized=True)
    assert not q.unquantized[-3:].any()
    expected = fused_ops.quantize(q.unquantized, INT8_DYNAMIC_TOKEN)
    assert_same(q.data, expected.data)
    assert_same(q.scale, expected.scale)


@needs_flashinfer
def test_flashinfer_refuses_to_be_captured():
    tensors, options = inputs("paged_attention")
    with fused_ops.use_backend("flashinfer"):
        run("paged_attention", tensors, options)
        with (
            pytest.raises(RuntimeError, match="which a CUDA graph can't capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            run("paged_attention", tensors, options)
