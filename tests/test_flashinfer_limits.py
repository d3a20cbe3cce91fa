"""The FlashInfer backend without FlashInfer: its workspaces, what it refuses and what must be installed."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import flashinfer_double as double
import pytest
import torch
from flashinfer_calls import (
    MISSING,
    inputs,
    latent,
    parameters,
)

import fused_ops
from fused_ops import OPS, _flashinfer
from fused_ops.attention_inputs import filled
from quant import (
    FP8_DYNAMIC_GROUP_128,
    INT8_DYNAMIC_TOKEN,
)

pytestmark = pytest.mark.usefixtures("flashinfer")


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
    with pytest.raises(ImportError, match=r"what is here can't be imported \(ZeroDivisionError"):
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


@pytest.mark.parametrize("name", SOURCES)
def test_the_double_has_flashinfers_signatures(name):
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        pytest.skip(f"FlashInfer isn't installed; they are recorded from {double.VERSION}")
    theirs = (Path(spec.submodule_search_locations[0]) / SOURCES[name]).read_text()
    ours = Path(double.__file__).read_text()
    for method in "__init__", "plan", "run":
        assert parameters(ours, method, name) == parameters(theirs, method, name)
