"""Passes that find rotations of q and k, their norms and the write into a cache: as the patched model has them."""

import contextlib
import copy

import pairwise
import pytest
import torch
from passes import WRITES
from patching import assert_equal, tiny, tiny_model, tokens
from torch import nn
from transformers import DynamicCache, StaticCache

import fused_ops
import models_patch
from models_patch.passes import Backend, inductor_options
from models_patch.passes import report as passes_report
from quant import NAMED_KEYS

CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=16),
}


def model_of(name):
    return tiny(name, num_hidden_layers=2) if name == "Llama" else tiny_model(name)


def run(model, cache):
    """Logits of a prompt and of a token more, and what the cache holds then."""
    if cache is None:
        return [model(tokens(), use_cache=False).logits]
    logits = [model(x, past_key_values=cache).logits for x in (tokens(), tokens()[:, :1])]
    return [*logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))]


def compiled(function, **options):
    torch._dynamo.reset()
    backend = Backend()
    return torch.compile(function, backend=backend, **options), backend.manager.report()


def check_bits(model, patched, function, cache="none"):
    with torch.no_grad():
        for backend in (contextlib.nullcontext(), fused_ops.use_backend("reference")):
            with backend:
                make = CACHES[cache]
                assert_equal(run(function, make(model.config)), run(patched, make(model.config)))


# Generated code has the same bits in these models; it takes a while.
WAYS = ["run as it is", "generated"] if pairwise.everything else ["run as it is"]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "written"), [("Llama", 2), ("Qwen3", 2), ("Gemma3Text", 1), ("DeepseekV3", 0)][: 3 + pairwise.everything]
)
def test_static_cache(name, written, way):
    model = model_of(name)
    patched = copy.deepcopy(model)
    models_patch.patch(patched)
    function, report = compiled(model)
    if way == "generated":
        torch._dynamo.reset()
        options = inductor_options()
        function, report = torch.compile(model, options=options), passes_report(options)
    check_bits(model, patched, function, "static")
    for graph in report.graphs:  # the layer with a window keeps its own way
        writes = [site for item in graph.passes for site in item.matches if site.operation in WRITES]
        assert len(writes) == written


def test_growing_cache():
    model = model_of("Qwen3")
    patched = copy.deepcopy(model)
    models_patch.patch(patched)
    function, report = compiled(model)
    check_bits(model, patched, function, "dynamic")
    assert not WRITES & set(report.operations)
    assert any("no place for them" in miss.reason for miss in report.misses)


def test_table_once():
    with torch.no_grad():
        shown = []
        backend = Backend()
        backend.manager.add(Show(shown), "show")
        torch._dynamo.reset()
        torch.compile(model_of("Llama"), backend=backend)(tokens(), use_cache=False)
    (graph,) = shown
    tables = {node.args[3] for node in graph.find_nodes(op="call_function", target=torch.ops.fused_ops.rope.default)}
    assert len(tables) == 1


class Show(models_patch.passes.Pass):
    def __init__(self, shown):
        super().__init__()
        self.shown = shown

    def __call__(self, graph, outcome):
        self.shown.append(graph)


# Spellings of other code: [tokens, heads, D], tables of half as many columns.


def turned(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def as_chunks(q, k, cos, sin):
    return turned(q, cos, sin), turned(k, cos, sin)


def as_pairs(q, k, cos, sin):
    def pairs(x):
        x1, x2 = x[..., ::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)

    return pairs(q), pairs(k)


def as_last_of_pairs(q, k, cos, sin):
    def pairs(x):
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2)

    return pairs(q), pairs(k)


def as_first_columns(q, k, cos, sin):
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return tuple(torch.cat((turned(x[..., : 2 * half], cos, sin), x[..., 2 * half :]), -1) for x in (q, k))


def the_other_way(q, k, cos, sin):
    return as_chunks(q, k, cos, -sin)


def one_alone(q, k, cos, sin):
    return turned(q, cos, sin), k


def with_unequal_angles(q, k, cos, sin):
    cos, sin = (torch.cat((x, x[..., 4:], x[..., :4]), -1) for x in (cos, sin))
    return tuple(x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin for x in (q, k))


def heads_and_table(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(5, 4, 16).to(dtype), torch.randn(5, 2, 16).to(dtype)
    angles = torch.rand(5, 1, 8) * 6
    return q, k, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("spelling", [as_chunks, as_pairs, as_last_of_pairs, as_first_columns])
def test_spellings(spelling, rounds, dtype):
    def function(q, k, cos, sin):
        if rounds:
            return spelling(q, k, cos.to(q.dtype), sin.to(q.dtype))
        return tuple(x.to(q.dtype) for x in spelling(q.float(), k.float(), cos, sin))

    inputs = heads_and_table(dtype)
    rotates, report = compiled(function)
    for backend in (contextlib.nullcontext(), fused_ops.use_backend("reference")):
        with backend, torch.no_grad():
            assert_equal(rotates(*inputs), function(*inputs))
    assert report.operations["rope"] == 1, str(report)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [(the_other_way, "other way round"), (one_alone, "only one"), (with_unequal_angles, "equal cosines")],
)
def test_rotations_left(spelling, reason):
    inputs = heads_and_table(torch.bfloat16)
    inputs = (*inputs[:2], *(x.bfloat16() for x in inputs[2:]))
    rotates, report = compiled(spelling)
    with torch.no_grad():
        assert_equal(rotates(*inputs), spelling(*inputs))
    assert "rope" not in report.operations
    assert any(reason in miss.reason for miss in report.misses), str(report)


def test_a_rotation_that_is_taken_apart_and_put_together_again():
    def function(q, k, cos, sin):
        q, k = as_chunks(q, k, cos, sin)
        for _ in range(30):
            q = torch.cat(q.chunk(2, -1), -1)
        return q, k

    rotates, report = compiled(function)
    with torch.no_grad():
        inputs = heads_and_table(torch.float32)
        assert_equal(rotates(*inputs), function(*inputs))
    assert report.operations["rope"] == 1


def test_norms_that_differ_stay():
    q_norm, k_norm = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-6)

    def function(q, k, cos, sin):
        return as_chunks(q_norm(q), k_norm(k), cos, sin)

    rotates, report = compiled(function)
    with torch.no_grad():
        inputs = heads_and_table(torch.float32)
        rotates(*inputs)
    assert report.operations["rope"] == 1
    assert report.operations["qk_norm_rope"] == 0
    assert any("norms of q and k differ" in miss.reason for miss in report.misses), str(report)


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
def test_attention_quantized(name):
    op = fused_ops.OPS[name]
    args = next(args for args in op.cases("cpu") if op.check(*args) % 128 == 0)
    for key in NAMED_KEYS.values():
        given = {"scale": torch.tensor([0.02])} if key.scale.static else {}
        given |= {"zero_point": torch.tensor([-3], dtype=torch.int32)} if given and not key.symmetric else {}
        given |= {"scale2": torch.tensor([0.002])} if key.scale2 is not None else {}

        def function(*inputs, key=key, given=given):
            y = op.default(*inputs)
            made = fused_ops.quantize(y.view(1, *y.shape).flatten(0, 1), key, **given)
            return made.data, made.scale

        attends, report = compiled(function)
        with torch.no_grad(), fused_ops.use_backend("reference"):
            for actual, wanted in zip(attends(*args), function(*args), strict=True):
                assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8)), key
        if key.per_tensor and not key.scale.static:
            assert any("expected static scales" in miss.reason for miss in report.misses), str(report)
        else:
            assert report.operations[f"{name}_quant"] == 1, (key, str(report))
