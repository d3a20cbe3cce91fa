"""Calls of attention by the FlashInfer backend on the CPU, by its double."""

import ast
from collections import OrderedDict

import flashinfer_double as double
import pytest
import torch

import fused_ops
from fused_ops import OPS, _flashinfer
from fused_ops.attention_inputs import batch, blocks_of, filled

MIXED = [(5, 5), (1, 40), (0, 9), (3, 17), (1, 3)]
MORE = {}, {"causal": False}, {"sliding_window": 1}, {"sliding_window": 7}, {"soft_cap": 3.0}
NAN = float("nan")
MISSING = _flashinfer.missing


@pytest.fixture
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


def parameters(source: str, name: str, kind: str | None = None) -> list[tuple[str, str | None]]:
    """Of a function, or of a method of a class: with their defaults, as they are written."""
    tree = ast.parse(source)
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind]
    (scope,) = classes or [tree]
    *_, found = (n for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == name)  # the last of overloads
    a = found.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    named = list(zip([x.arg for x in a.args], defaults, strict=True))
    named += [("*", None)] if a.vararg else []
    return named + [(x.arg, d and ast.unparse(d)) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]


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
