"""The FlashInfer backend without FlashInfer: what its wrappers are handed, on the CPU; test_gpu_attention.py has it."""

import flashinfer_double as double
import pytest
import torch
from compare import assert_attends, assert_close, assert_same
from flashinfer_calls import (
    MIXED,
    MORE,
    NAN,
    both,
    inputs,
    latent,
    terms,
)

import fused_ops
from fused_ops import OPS, _flashinfer
from fused_ops.attention_inputs import batch
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
)

pytestmark = pytest.mark.usefixtures("flashinfer")


# --- what is handed over ---


@pytest.mark.parametrize("held", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [MIXED, [(1, 33), (1, 1), (1, 48)], [(20, 90)]], ids=["mixed", "decode", "chunk"])
@pytest.mark.parametrize("outermost", [False, True])
def test_attention_is_that_of_the_reference(lengths, dtype, held, outermost):
    every = []
    for block, size, heads in (16, 64, (4, 2)), (5, 128, (3, 1)), (1, 256, (2, 2)):
        args, options = inputs(lengths, dtype, held, heads, size, block, outermost)
        every += [(args, options | more) for more in MORE]
    results = []
    for backend in "flashinfer", "reference":
        with fused_ops.use_backend(backend):
            results.append([fused_ops.paged_attention(*args, **options) for args, options in every])
    for actual, expected, (args, options) in zip(*results, every, strict=True):
        assert_close(actual, expected, str(options), terms=terms(args, **options))


@pytest.mark.parametrize("lengths", [MIXED, [(1, 33), (1, 1), (1, 48)]], ids=["mixed", "decode"])
def test_blocks_before_the_window_are_not_handed_over(lengths):
    for window in 1, 7, 16, 17:
        args, options = inputs(lengths)
        options["sliding_window"] = window
        expected, sums = fused_ops.paged_attention(*args, **options), terms(args, **options)
        for table, (queries, length) in zip(args[3], lengths, strict=True):
            table[: max(0, length - queries + 1 - window) // 16] = -1
        assert (args[3][:, :2] == -1).any()
        actual, _ = both(fused_ops.paged_attention, *args, **options)
        assert_close(actual, expected, str(window), terms=sums)


def test_single_queries_have_their_own_wrapper():
    for lengths, kind in ([(1, 33), (0, 4), (1, 1)], "Decode"), (MIXED, "Prefill"), ([(2, 2)], "Prefill"):
        args, options = inputs(lengths)
        both(fused_ops.paged_attention, *args, **options)
        assert double.PLANNED.pop() == f"Batch{kind}WithPagedKVCacheWrapper"
    assert not double.PLANNED


def test_wrappers_are_kept_for_a_choice_of_dtypes(monkeypatch):
    made = []
    monkeypatch.setattr(_flashinfer, "library", lambda: made.append(1) or double.LIBRARY)
    for _ in range(2):
        for held in None, torch.float8_e4m3fn:
            args, options = inputs([(3, 3)], held=held)
            both(fused_ops.paged_attention, *args, **options)
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [16, 3])
def test_mla_is_that_of_the_reference(dtype, block):
    """But for two roundings more: of the queries and of the results in the space of latents."""
    args = latent(dtype=dtype, block=block)
    actual, expected = both(fused_ops.mla_attention, *args, scale=192**-0.5)
    assert_attends(actual, expected, expected.abs().max())
    assert double.PLANNED == ["BatchMLAPagedAttentionWrapper"]


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_of_no_sequence_are_zeros(index):
    args, options = inputs()
    more = [torch.cat([args[0], torch.full((3, 4, 64), NAN).bfloat16()]), *args[1:3], *(t.to(index) for t in args[3:])]
    actual, expected = both(fused_ops.paged_attention, *more, **options)
    assert_close(actual, expected, terms=terms(more, **options))
    assert not actual[-3:].any()
    none = [*more[:3], *batch([], 16, "cpu")]
    actual, _ = both(fused_ops.paged_attention, *none, **options)
    assert not actual.any()


OUT_OF_RANGE = {
    "a block beyond the cache": (3, lambda t: t[1].fill_(1000), [1]),
    "a negative block": (3, lambda t: t[3].fill_(-1), [3]),
    "more queries than tokens": (4, lambda t: t[0].fill_(4), [0]),
    "more tokens than blocks": (4, lambda t: t[3].fill_(2**31 - 1), [3]),
    "fewer than none": (4, lambda t: t[1].fill_(-5), [1]),
    "rows beyond q": (5, lambda t: t[5].fill_(11), [4]),
    "rows that go back": (5, lambda t: t[2].fill_(3), [1, 2]),
    "rows before the first": (5, lambda t: t[0].fill_(-2), [0]),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_sequences_out_of_range_are_not_handed_over(case):
    """On a GPU; arguments are checked on the CPU, so this goes past the check."""
    args, options = inputs()
    good, sums = fused_ops.paged_attention(*args, **options), terms(args, **options)
    at, spoil, broken = OUT_OF_RANGE[case]
    spoil(args[at])
    starts = args[5].tolist()
    others = [slice(*starts[i : i + 2]) for i in range(5) if i not in broken]  # in range: their rows are theirs
    y = torch.full_like(good, 7.0)
    every = (*args, options["scale"], True, 0, 0.0, None, None, None)
    _flashinfer.write_paged(every, {"y": y})
    expected = good.clone()
    for i in broken:
        expected[max(starts[i], 0) : max(starts[i + 1], 0)] = NAN
    for rows in others:
        expected[rows] = good[rows]
    assert_close(y, expected, terms=sums)


def test_rows_that_belong_to_others_are_taken_from_between():
    args, options = inputs([(2, 9), (3, 20), (1, 5)])
    good, sums = fused_ops.paged_attention(*args, **options), terms(args, **options)
    args[3][1] = -1
    y = torch.full_like(good, 7.0)
    _flashinfer.write_paged((*args, options["scale"], True, 0, 0.0, None, None, None), {"y": y})
    assert y[2:5].isnan().all()
    y, good, sums = (torch.cat([t[:2], t[5:]]) for t in (y, good, sums))
    assert_close(y, good, terms=sums)


def test_rows_of_a_sequence_in_range_are_its_own():
    """Where query_start_loc goes back, the second and third sequence claim rows of the first."""
    args, options = inputs([(5, 9), (0, 20), (3, 17)])
    good, sums = fused_ops.paged_attention(*args, **options), terms(args, **options)
    args[5] = torch.tensor([0, 5, 3, 8])
    y = torch.full_like(good, 7.0)
    _flashinfer.write_paged((*args, options["scale"], True, 0, 0.0, None, None, None), {"y": y})
    assert_close(y[:5], good[:5], terms=sums[:5])
    assert y[5:].isnan().all()


# --- quantized results ---


@pytest.mark.parametrize(
    ("key", "given"),
    [
        (INT8_DYNAMIC_TOKEN, {}),
        (FP8_DYNAMIC_GROUP_128, {}),
        (FP8_STATIC_TENSOR, {"scale": torch.tensor([0.01])}),
        (INT8_DYNAMIC_TOKEN_ASYM, {}),
        (INT8_STATIC_TENSOR, {"scale": torch.tensor([0.01])}),
    ],
    ids=str,
)
def test_a_result_is_quantized_as_it_is(key, given):
    """Promise 1 in the words of the backend: bit for bit `quantize` of its own result."""
    args, options = inputs()
    output = {f"output_{name}": value for name, value in given.items()}
    with fused_ops.use_backend("flashinfer"):
        y = fused_ops.paged_attention(*args, **options)
        q = fused_ops.paged_attention(*args, **options, output_quant_key=key, keep_unquantized=True, **output)
        plain = fused_ops.paged_attention(*args, **options, output_quant_key=key, **output)
        m = latent()
        z = fused_ops.mla_attention(*m, scale=0.1)
        p = fused_ops.mla_attention(*m, scale=0.1, output_quant_key=key, **output)
        if key.symmetric:
            made = OPS["mla_attention_quant"].default(*m, 0.1, None, key.code, given.get("scale"))
            assert_same(made[1], given.get("scale", p.scale))
    assert_same(q.unquantized, y)
    for actual, result in (q, y), (plain, y), (p, z):
        expected = fused_ops.quantize(result, key, **given)
        for name in "data", "scale", "zero_point":
            assert_same(getattr(actual, name), getattr(expected, name), name)


def test_results_may_be_given():
    args, options = inputs()
    memory = torch.full((10, 300), 7.0).bfloat16()
    with fused_ops.use_backend("flashinfer"):
        expected = fused_ops.paged_attention(*args, **options)
        fused_ops.paged_attention(*args, **options, out=memory[:, 8:264])
    assert_same(memory[:, 8:264].contiguous(), expected)
    assert (memory[:, :8] == 7).all()
    assert (memory[:, 264:] == 7).all()
