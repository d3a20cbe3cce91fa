"""The FlashInfer backend without FlashInfer: what its wrappers are handed, on the CPU; test_gpu_attention.py has it."""

import ast
import importlib.util
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import flashinfer_double as double
import pytest
import torch
from compare import assert_attends, assert_close, assert_same

import fused_ops
from fused_ops import OPS, _flashinfer
from fused_ops.attention_inputs import batch, blocks_of, filled
from quant import (
    FP8_DYNAMIC_GROUP_128,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN_ASYM,
    INT8_STATIC_TENSOR,
)

MIXED = [(5, 5), (1, 40), (0, 9), (3, 17), (1, 3)]
MORE = {}, {"causal": False}, {"sliding_window": 1}, {"sliding_window": 7}, {"soft_cap": 3.0}
NAN = float("nan")
MISSING = _flashinfer.missing


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch):
    """The backend of CPU tensors, by the double."""
    kept = {name: OPS[name].backends.get("flashinfer") for name in OPS}
    monkeypatch.setattr(_flashinfer, "missing", lambda: None)
    monkeypatch.setattr(_flashinfer, "library", lambda: double.LIBRARY)
    monkeypatch.setattr(_flashinfer, "_kept", OrderedDict())
    monkeypatch.setattr(_flashinfer, "WORKSPACE", 16)
    _flashinfer.load(("CPU",))
    double.PLANNED.clear()
    yield
    for name, backend in kept.items():
        if backend is not None:
            OPS[name].backends["flashinfer"] = backend


def inputs(lengths=MIXED, dtype=torch.bfloat16, held=None, heads=(4, 2), size=64, block=16, outermost=False):
    """(the tensors, the options) of `paged_attention`."""
    shape = (blocks_of(lengths, block), block, heads[1], size)
    (k, k_scale), (v, _) = (filled(shape, held or dtype, "cpu") for _ in range(2))
    if outermost:
        k, v = (c.transpose(1, 2).contiguous().transpose(1, 2) for c in (k, v))
    q = torch.randn(sum(n for n, _ in lengths), heads[0] + 2, size).to(dtype)[:, : heads[0]]
    options = {"scale": size**-0.5}
    if k_scale is not None:  # FlashInfer multiplies a rounded result with v_scale: here that is exact
        options |= {"k_scale": k_scale, "v_scale": torch.tensor([2.0**-5])}
    return [q, k, v, *batch(lengths, block, "cpu")], options


def latent(lengths=MIXED, dtype=torch.bfloat16, block=16):
    q = torch.randn(sum(n for n, _ in lengths), 3, 192).to(dtype)
    kv_b = (torch.randn(3, 256, 512) / 32).to(dtype)
    cache, _ = filled((blocks_of(lengths, block), block, 576), dtype, "cpu")
    return [q[..., :128], q[..., 128:], cache, kv_b[:, :128], kv_b[:, 128:], *batch(lengths, block, "cpu")]


def both(function, *args, **options):
    """(by FlashInfer, by the reference)"""
    with fused_ops.use_backend("flashinfer"):
        actual = function(*args, **options)
    with fused_ops.use_backend("reference"):
        return actual, function(*args, **options)


def terms(args, **options):
    """Of the sums that results are: weights times magnitudes."""
    v = args[2].float().abs().to(args[2].dtype)
    return fused_ops.paged_attention(*args[:2], v, *args[3:], **options)


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


# --- workspaces ---


def test_the_workspaces_of_the_last_streams_are_kept(monkeypatch):
    made, stream = [], []
    monkeypatch.setattr(_flashinfer, "Workspace", lambda device: made.append(device) or object())
    monkeypatch.setattr(_flashinfer, "_stream", lambda device: stream[-1])

    def use(number, device=0):
        stream.append(number)
        with _flashinfer.workspace(torch.device("cpu", device)) as lent:
            return lent

    first = [use(0), use(1), use(0, device=1)]
    assert [use(0), use(1), use(0, device=1)] == first
    assert use(0) is first[0]
    use(2)  # in place of 1, which was used before 0
    assert use(0) is first[0]
    assert use(1) is not first[1]
    assert use(0, device=1) is first[2]
    assert len(made) == 5
    assert len(_flashinfer._kept) == _flashinfer.KEPT + 1


def test_two_calls_at_one_time_have_a_workspace_each():
    device = torch.device("cpu")
    with _flashinfer.workspace(device) as kept:
        pass
    with _flashinfer.workspace(device) as first, _flashinfer.workspace(device) as second:
        assert first is kept
        assert first is not second
    assert list(_flashinfer._kept.values()) == [first]


def test_a_workspace_survives_what_fails():
    with pytest.raises(ZeroDivisionError), _flashinfer.workspace(torch.device("cpu")) as first:
        raise ZeroDivisionError
    with _flashinfer.workspace(torch.device("cpu")) as again:
        assert again is first


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


# --- refusals ---


def refused(message, function, *args, **options):
    with fused_ops.use_backend("flashinfer"), pytest.raises(ValueError, match=message) as found:
        function(*args, **options)
    assert "the flashinfer backend does not serve" in str(found.value)
    assert "use_backend('reference')" in str(found.value)


def test_what_it_does_not_serve():
    attend, (args, options) = fused_ops.paged_attention, inputs()
    refused("q is torch.float32, it takes bfloat16 and float16", attend, *inputs(dtype=torch.float32)[0], scale=1.0)
    for held in torch.int8, torch.float8_e4m3fnuz:
        other, scales = inputs(held=held)
        refused(f"k_cache is {held}, it takes torch.bfloat16 and ", attend, *other, **scales)
    refused(r"heads are of 96 and 96 columns, it takes \(64, 128, 256\)", attend, *inputs(size=96)[0], scale=1.0)
    refused("its wrappers ignore sinks", attend, *args, **options, sinks=torch.zeros(4))
    refused("scale is -1.0, it takes a positive one", attend, *args, scale=-1.0)
    other, scales = inputs(held=torch.float8_e4m3fn)
    scales["k_scale"] = torch.rand(2)
    refused("k_scale and v_scale are those of heads", attend, *other, **scales)
    wide = torch.cat([args[1], args[1]], -1)
    refused("k_cache has strides .* and v_cache", attend, args[0], wide[..., :64], *args[2:], **options)
    refused("heads are of 64 and 128 columns", attend, *args[:2], wide, *args[3:], **options)
    odd = torch.randn(10, 4, 68).bfloat16()[..., :64]
    refused(r"q has strides \(272, 68, 1\), it takes multiples of 16 bytes", attend, odd, *args[1:], **options)


def test_an_odd_address_is_refused():
    args, options = inputs()
    memory = torch.zeros(args[0].shape[0] * 256 + 1, dtype=torch.bfloat16)[1:]
    with (
        fused_ops.use_backend("flashinfer"),
        pytest.raises(ValueError, match=r"paged_attention: q begins at 0x.*multiples of 16"),
    ):
        fused_ops.paged_attention(memory.view(-1, 4, 64), *args[1:], **options)


def test_what_mla_does_not_serve():
    args = latent(dtype=torch.float32)
    refused("q_pe is torch.float32", fused_ops.mla_attention, *args, scale=1.0)
    args = latent()
    cache, scale = filled(args[2].shape, torch.float8_e4m3fn, "cpu")
    eight = [*args[:2], cache, *args[3:]]
    refused("kv_cache is torch.float8_e4m3fn", fused_ops.mla_attention, *eight, scale=1.0, kv_scale=scale)
    small = [*args[:2], args[2][..., 64:], *(w[..., 64:] for w in args[3:5]), *args[5:]]
    refused(r"latents have 448 \+ 64 columns, it takes 512 \+ 64", fused_ops.mla_attention, *small, scale=1.0)


def test_a_key_that_quantize_does_not_serve_is_refused_beforehand():
    if "cpu" not in OPS["quantize"].backends:
        pytest.skip("no compiled kernels on this machine")
    key = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 48))
    args, options = inputs(heads=(3, 1))
    message = "its result is for `quantize` on the cpu backend: .*groups of 16"
    refused(message, fused_ops.paged_attention, *args, **options, output_quant_key=key)
    assert not double.PLANNED


def test_it_is_never_the_default(monkeypatch):
    args, options = inputs()
    fused_ops.paged_attention(*args, **options)
    assert not double.PLANNED
    with fused_ops.use_backend("flashinfer"), pytest.raises(ValueError, match="there is no backend 'flashinfer'"):
        fused_ops.relu2(torch.ones(2, 8))


def test_what_must_be_installed(monkeypatch):
    monkeypatch.setattr(_flashinfer, "missing", MISSING)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _flashinfer.load()
    with pytest.raises(ImportError, match=r"name is 'flashinfer': .* pip install 'flashinfer-python=="):
        fused_ops.use_backend("flashinfer")


def other_run(take):
    """A library with other parameters of one method."""
    kind = "BatchDecodeWithPagedKVCacheWrapper"
    changed = type("Other", (), vars(double.LIBRARY)[kind].__dict__ | {"run": take})
    return SimpleNamespace(**(vars(double.LIBRARY) | {kind: changed}))


@pytest.mark.parametrize(
    ("take", "what"),
    [
        (lambda self, q, cache, *, k_scale=None, v_scale=None: 0, "takes q, cache, expected q, paged_kv_cache"),
        (lambda self, q, paged_kv_cache, *, k_scale=None: 0, "has no v_scale"),
        (lambda self, q, paged_kv_cache, more, *, k_scale=None, v_scale=None: 0, "needs more, too"),
        (None, "is missing"),
    ],
)
def test_another_flashinfer_is_refused(take, what, monkeypatch):
    monkeypatch.setattr(_flashinfer, "missing", MISSING)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    _flashinfer.load(("CPU",))
    fused_ops.use_backend("flashinfer")
    monkeypatch.setattr(_flashinfer, "library", lambda: other_run(take))
    with pytest.raises(ImportError, match=rf"0\.6\.13; .* whose BatchDecodeWithPagedKVCacheWrapper.run {what}"):
        fused_ops.use_backend("flashinfer")
    monkeypatch.setattr(_flashinfer, "library", lambda: 1 / 0)
    with pytest.raises(ImportError, match=r"FlashInfer can't be imported \(ZeroDivisionError"):
        fused_ops.use_backend("flashinfer")


def test_a_refusal_allocates_no_result(monkeypatch):
    """Arguments are looked at before every call."""
    args, options = inputs()
    shapes, empty = [], OPS["paged_attention"].empty
    monkeypatch.setattr(OPS["paged_attention"], "empty", lambda *a: shapes.append(empty(*a).shape) or empty(*a))
    given = (*args, options["scale"], True, 0, 0.0, None, None, None, INT8_DYNAMIC_TOKEN.code, None)
    assert OPS["paged_attention_quant"].backends["flashinfer"].supports(*given)
    assert shapes == [(0, 256)]


# --- the double ---

SOURCES = {
    "BatchPrefillWithPagedKVCacheWrapper": "prefill.py",
    "BatchDecodeWithPagedKVCacheWrapper": "decode.py",
    "BatchMLAPagedAttentionWrapper": "mla/_core.py",
}


def signatures(source: str, name: str) -> dict[str, list[tuple[str, str | None]]]:
    """Of the methods of a class: every parameter with its default, as they are written."""
    (found,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == name)
    methods = {}
    for each in found.body:
        if isinstance(each, ast.FunctionDef) and each.name in ("__init__", "plan", "run"):
            a = each.args
            defaults = [None] * (len(a.args) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
            named = list(zip([x.arg for x in a.args], defaults, strict=True))
            named += [("*", None)] if a.vararg else []
            named += [(x.arg, d and ast.unparse(d)) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
            methods[each.name] = named  # the last of overloads
    return methods


@pytest.mark.parametrize("name", SOURCES)
def test_the_double_has_flashinfers_signatures(name):
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        pytest.skip(f"FlashInfer isn't installed; they are recorded from {double.VERSION}")
    theirs = (Path(spec.submodule_search_locations[0]) / SOURCES[name]).read_text()
    ours = Path(double.__file__).read_text()
    assert signatures(ours, name) == signatures(theirs, name)
