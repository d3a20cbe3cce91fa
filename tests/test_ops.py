"""What every operation promises, for every operation in the registry."""

import functools
import os
import re
import subprocess
import sys

import pairwise
import pytest
import torch
from compare import assert_attention_close, assert_close, assert_same
from torch import Tensor

import fused_ops
from fused_ops import OPS
from fused_ops._op import NO_KEY
from quant import FP8_DYNAMIC_TOKEN, QuantKey, ScaleLayout

ALL = [pytest.param(op, id=name) for name, op in OPS.items()]
COMPILED = "cpu" in OPS["rms_norm"].backends
# Promise 4a: the same bits on every backend.
MOVES = ("all_reduce", "reduce_scatter", "all_gather", "all_gather_quantized")
EXPERTS = ("sort_by_expert", "sum_experts")
BITWISE = ("quantize", *EXPERTS, "rope", "rope_kv_cache_write", "mla_rope_kv_cache_concat", *MOVES)
HEADS = [name for name in OPS if "rope" in name]  # more in their own files
ATTENTION = [name for name in OPS if "attention" in name]
COLLECTIVES = [name for name, op in OPS.items() if op.argument("workspace") is not None]
GATHERS = ("all_gather", "all_gather_quantized")
OTHER_ROWS = (
    *HEADS,
    *ATTENTION,
    *GATHERS,
    "scaled_linear",
    "grouped_scaled_linear",
    *EXPERTS,
    "dual_rms_norm",
    "qk_all_reduce_rms_norm",
)  # of several widths: in their own files


@functools.cache
def cases(op):
    """Arguments that every backend serves; tests don't write to them."""
    torch.manual_seed(0)
    found = [args for args in pairwise.sample(op.cases("cpu")) if "cpu" not in op.backends or served(op, args)]
    assert found, f"{op.name} has no cases that the backend serves"
    return found


def served(op, args) -> bool:
    return op.backends["cpu"].supports(*args)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def own(op, args) -> tuple:
    """The arguments, with copies of those that the operation writes."""

    def copy(a: Tensor) -> Tensor:
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a)

    return tuple(copy(a) if name in op.written else a for name, a in zip(op.arguments, args, strict=False))


def written(op, args) -> dict[str, Tensor]:
    return {name: args[op.argument(name)] for name in op.written}


def outputs_for(op, args) -> list[str]:
    """The outputs that the out overload writes for these arguments: a static key's scale is given."""
    absent = {name for name, made in zip(op.outputs, as_tuple(op.empty(*args)), strict=True) if made is None}
    for name in op.outputs:
        if name.endswith("scale") and name not in absent:
            prefix = name.removesuffix("scale")
            code = args[op.argument(f"{prefix}key")]
            key = None if code == NO_KEY else QuantKey.from_code(code)
            absent |= {name} if key is not None and key.scale.static else set()
            absent |= {f"{prefix}zero_point"} if key is None or key.symmetric or key.scale.static else set()
            absent |= {f"{prefix}unquantized"} if key is None else set()
    return [o for o in op.outputs if o not in absent]


def fresh(op, args, *, row_gap: int = 0) -> dict[str, Tensor]:
    """Poisoned outputs for the out overload; `row_gap` elements lie between the rows of those that allow it."""
    made = dict(zip(op.outputs, as_tuple(op.empty(*args)), strict=True))
    outs = {f"{name}_out": None for name in op.outputs}
    for name in outputs_for(op, args):
        want = made[name]
        if row_gap and not name.endswith(("scale", "zero_point")):
            *rows, cols = want.shape
            want = want.new_empty((*rows, cols + row_gap))[..., :cols]
        outs[f"{name}_out"] = want
    return outs


def spread(outs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What lies around the outputs that `fresh` has spread."""
    exact = ("scale_out", "zero_point_out")
    return {name: out._base for name, out in outs.items() if out is not None and not name.endswith(exact)}


def results(op, args) -> dict[str, Tensor]:
    """Every output by name, and what it writes besides, from the out overload."""
    args = own(op, args)
    outs = fresh(op, args)
    op.out(*args, **outs)
    return {name: outs[f"{name}_out"] for name in outputs_for(op, args)} | written(op, args)


def functional(op, args) -> bool:
    """Whether the functional overload takes these arguments: no optional input, no zero point."""
    key = op.argument("key")
    return len(args) == op.required and (key is None or QuantKey.from_code(args[key]).symmetric)


def tokens_of(op, args) -> Tensor | None:
    at = op.argument("tokens_per_expert")
    return args[at] if at is not None and len(args) > at else None


def terms_of(op, args) -> Tensor | None:
    """The largest magnitude among the terms of a result that is a sum, as broadcasts to it."""
    if op.name in ("rms_norm_add", "rms_norm_add_rms_norm"):
        residual, weight = args[1].float(), args[2]
        normed = fused_ops.rms_norm(args[0].float(), weight, 1e-6, weight_bias=float(args[-1] // 2)).float()
        terms = torch.maximum(residual.abs(), normed.abs())
        if op.name == "rms_norm_add":
            return terms
        scale = fused_ops.rms_norm(residual + normed, args[3], 1e-6, weight_bias=float(args[-1] // 2)).float()
        return torch.maximum(terms, terms * (scale / (residual + normed)).abs())
    if op.name == "layer_norm":
        x, weight, bias, _ = args
        x = x.float()
        mean = x.mean(-1, keepdim=True)
        factor = (x - mean).square().mean(-1, keepdim=True).clamp_min(1e-6).rsqrt()
        terms = (x.abs() + mean.abs()) * factor * (1 if weight is None else weight.abs())
        return terms if bias is None else torch.maximum(terms, bias.abs().float())
    return None


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", [p for p in ALL if not re.search("_quant|dual_rms_norm|qk_norm", p.id)])
def test_compiled_kernels_match_the_reference(op):
    for args in cases(op):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        actual = results(op, args)
        with fused_ops.use_backend("reference"):
            expected = results(op, args)
        for name, e in expected.items():
            context = f"{op.name} {name} {fused_ops._op.describe(args)}"
            if op.name in BITWISE or (name == "residual" and op.name.startswith("fused_add")):
                assert_same(actual[name], e, context)
            elif op.name in ATTENTION:
                assert_attention_close(actual[name], e, context)
            elif "scaled_linear" not in op.name:  # products in their own files
                a = actual[name]
                if (tokens := tokens_of(op, args)) is not None:
                    used = torch.arange(a.shape[1]) < tokens[:, None]
                    assert a[~used].isnan().all(), f"{context}: a row beyond an expert's tokens was written"
                    a, e = a[used], e[used]
                assert_close(a, e, context, roundings=2, terms=terms_of(op, args))
        for name, argument, b in zip(op.arguments, args, before, strict=False):
            if isinstance(argument, Tensor) and name != "workspace":
                assert_same(argument.contiguous(), b.contiguous(), f"{op.name} changed an input")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", [p for p in ALL if p.values[0].name.endswith("_quant")])
def test_codes_are_the_backends_own_quantization_of_its_own_result(op, backend):
    """Promises 1 and 4c: fused with the quantization or one after the other, the same bits."""
    if backend == "cpu" and not COMPILED:
        pytest.skip("no compiled kernels on this machine")
    unfused, quantize = OPS[op.name.removesuffix("_quant")], OPS["quantize"]
    n = unfused.required
    for args in cases(op)[:: 1 if backend == "cpu" else 5]:
        context = f"{op.name} {fused_ops._op.describe(args)}"
        with fused_ops.use_backend(backend):
            fused = results(op, args)
            y, *others = results(unfused, (*args[:n], *args[n + 3 :])).values()
            if (tokens := tokens_of(op, args)) is not None:
                used = torch.arange(y.shape[1]) < tokens[:, None]
                key = QuantKey.from_code(args[n])
                if (key.per_tensor and not key.scale.static) or key.scale.layout == ScaleLayout.SWIZZLED_128X4:
                    y = torch.where(used[..., None], y, 0)
                expected = results(quantize, (y, *args[n : n + 3]))
                assert_same(fused["data"][used], expected["data"][used], context)
                for name in fused.keys() & {"scale", "zero_point"}:
                    if fused[name].ndim == 2:
                        assert_same(fused[name][used.flatten()], expected[name][used.flatten()], context)
                    elif fused[name].numel() == 1:
                        assert_same(fused[name], expected[name], context)
                continue
            expected = results(quantize, (y, *args[n : n + 3]))
        assert fused.keys() == {*outputs_for(op, args)}
        for name, value in {**expected, "unquantized": y, **dict(zip(op.outputs[2:-2], others, strict=True))}.items():
            assert_same(fused[name], value, f"{context} {name}")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ALL)
def test_the_functional_overload_returns_what_the_other_writes(op, backend):
    if backend == "cpu" and not COMPILED:
        pytest.skip("no compiled kernels on this machine")
    for args in cases(op)[:: 1 if backend == "cpu" else 5]:
        if functional(op, args):
            mine = own(op, args)
            with fused_ops.use_backend(backend):
                returned = dict(zip(op.outputs, as_tuple(op.default(*mine)), strict=False)) | written(op, mine)
                expected = results(op, args)
            for name, value in expected.items():
                if name in returned and value.numel():
                    assert_same(returned[name], value, f"{op.name} {name} {fused_ops._op.describe(args)}")
            if "scale" in returned and "scale" not in expected:  # a static one
                assert_same(returned["scale"], args[op.argument("given")], op.name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ALL)
def test_given_outputs_get_the_same_bits_and_nothing_beside_them(op, backend):
    if backend == "cpu" and not COMPILED:
        pytest.skip("no compiled kernels on this machine")
    for args in cases(op)[::5]:
        with fused_ops.use_backend(backend):
            expected = results(op, args)
            outs = fresh(op, args, row_gap=5)
            bases = spread(outs)
            edges = {name: base[..., -5:].clone() for name, base in bases.items()}
            op.out(*own(op, args), **outs)
        for name, out in [item for item in outs.items() if item[1] is not None]:
            value = expected[name.removesuffix("_out")]
            assert_same(out.contiguous() if name in bases else out, value, f"{op.name} {name}")
            if name in bases:
                assert_same(bases[name][..., -5:].contiguous(), edges[name].contiguous(), f"{op.name} {name} beside")


@pytest.mark.parametrize("op", ALL)
def test_registration(op):
    """Schemas, fakes and dynamic shapes, by torch's own checker, on both overloads."""
    seen = set()
    for args in cases(op):
        kind = (args[0].ndim, args[0].dtype, args[0].numel() == 0)
        if kind in seen or args[0].dtype == torch.float16 or not functional(op, args):
            continue
        seen.add(kind)
        # The checker copies neither views nor eight-bit floats.
        args = tuple(a.new_empty(a.shape).copy_(a) if isinstance(a, Tensor) else a for a in args)
        outs = fresh(op, args)
        for overload, given in (op.default, {}), (op.out, outs):
            tensors = [
                t for t in (*args, *given.values(), *as_tuple(op.default(*own(op, args)))) if isinstance(t, Tensor)
            ]
            narrow = any(t.is_floating_point() and t.element_size() == 1 for t in tensors)
            tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            if overload is op.out and not args[0].numel():
                continue
            torch.library.opcheck(
                overload,
                args,
                given,
                test_utils=tests if narrow else ("test_schema", *tests),
            )


def depends_on_all_rows(op, args) -> bool:
    """One scale for the tensor, or scales whose place in memory depends on the number of rows."""
    if op.argument("key") is None:
        return False
    key = QuantKey.from_code(args[op.argument("key")])
    return key.scale.layout != ScaleLayout.ROW_MAJOR or (key.per_tensor and not key.scale.static)


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", [p for p in ALL if p.id not in OTHER_ROWS])
def test_a_row_does_not_depend_on_its_neighbours(op):
    """Promise 2: alone, in a batch, strided, with other numbers of threads."""
    for args in cases(op):
        if args[0].shape[0] < 3 or args[0].ndim != 2 or not functional(op, args) or depends_on_all_rows(op, args):
            continue
        whole = as_tuple(op.default(*args))
        rows = args[0].shape
        for row in 0, 2:
            alone = [a[row : row + 1] if isinstance(a, Tensor) and a.shape == rows else a for a in args]
            for name, a, w in zip(op.outputs, as_tuple(op.default(*alone)), whole, strict=False):
                if w.shape[0] == rows[0]:
                    assert_same(a, w[row : row + 1].contiguous(), f"{op.name} {name}")
        spread = [
            torch.stack([a, torch.full_like(a, float("nan"))], dim=1).flatten(0, 1)[::2]
            if isinstance(a, Tensor) and a.shape == rows
            else a
            for a in args
        ]
        for name, a, w in zip(op.outputs, as_tuple(op.default(*spread)), whole, strict=False):
            assert_same(a, w, f"{op.name} {name} strided")


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", ALL)
def test_threads_do_not_change_a_bit(op):
    key = None if op.argument("key") is None else FP8_DYNAMIC_TOKEN
    args = op.workload(200, 512, key, torch.bfloat16, "cpu")
    results = []
    before = torch.get_num_threads()
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            mine = own(op, args)
            results.append((*as_tuple(op.default(*mine)), *written(op, mine).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b, op.name)


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("offset", [0, 16, 1])
def test_results_beyond_the_caches_may_lie_anywhere(offset):
    """They are written around the caches, by stores that take multiples of 32 or 64 bytes only."""
    x, some = torch.randn(5000, 4096, dtype=torch.bfloat16), torch.arange(0, 4400, 999)
    y = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:]
    fused_ops.relu2(x, out=y.view_as(x))
    assert_same(y.view_as(x)[some], fused_ops.relu2(x[some]), "relu2")
    q, table, positions = x[:4400].view(4400, 32, 128), torch.randn(4400, 128), torch.arange(4400)
    k, out = q[:, :1].clone(), y[: q.numel()].view_as(q)
    fused_ops.rope(q, k, positions, table, out=(out, torch.empty_like(k)))
    assert_same(out[some], fused_ops.rope(q[some], k[some], positions[some], table)[0], "rope")


SHORT_SCRIPT = """
import torch, fused_ops
from compare import assert_same
from quant import FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_GROUP_128
for cols in *range(1, 36), 257:
    for at in range(max(0, cols - 16), cols):
        x = torch.zeros(1, cols, dtype=torch.bfloat16)
        x[0, at] = 100
        for key in FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_GROUP_128:
            actual = fused_ops.quantize(x, key)
            with fused_ops.use_backend("reference"):
                expected = fused_ops.quantize(x, key)
            assert_same(actual.scale, expected.scale, f"{cols} {at} {key}")
"""


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("isa", ["base", "v3", ""])
def test_every_element_of_a_short_group_counts(isa):
    environment = {**os.environ, "FUSED_OPS_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", SHORT_SCRIPT], env=environment, check=True)


ISA_SCRIPT = """
import hashlib, torch
from fused_ops import OPS
from compare import raw
from test_ops import cases, results
torch.use_deterministic_algorithms(True, warn_only=True)  # fills what isn't written
for op in OPS.values():
    digest = hashlib.sha256()
    for args in cases(op):
        for r in results(op, args).values():
            digest.update(raw(r).numpy().tobytes())
    print(op.name, digest.hexdigest())
"""


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
def test_instruction_sets_give_the_same_bits():
    """Promise 2: the portable kernels, AVX2's and AVX-512's where the machine has it, in processes of their own."""
    digests = []
    for isa in "base", "v3", "":
        environment = {**os.environ, "FUSED_OPS_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", ISA_SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1] == digests[2]
    assert len(digests[0].splitlines()) == len(OPS)


@pytest.mark.parametrize("op", ALL)
def test_compiles_to_one_graph_with_dynamic_rows(op):
    torch._dynamo.reset()
    args = next(a for a in cases(op) if a[0].numel() and a[0].ndim >= 2 and functional(op, a))
    compiled = torch.compile(lambda *a: op.default(*a), fullgraph=True, backend="aot_eager", dynamic=True)
    mine, theirs = own(op, args), own(op, args)
    actual = (*as_tuple(compiled(*mine)), *written(op, mine).values())
    expected = (*as_tuple(op.default(*theirs)), *written(op, theirs).values())
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e, op.name)
