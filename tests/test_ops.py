"""What every operation promises, for every operation in the registry."""

import os
import subprocess
import sys

import pytest
import torch
from compare import assert_close, assert_same
from torch import Tensor

import fused_ops
from fused_ops import OPS
from quant import FP8_DYNAMIC_TOKEN, QuantKey

ALL = [pytest.param(op, id=name) for name, op in OPS.items()]
COMPILED = "cpu" in OPS["rms_norm"].backends
BITWISE = ("quantize", "rope")  # promise 4a: the same bits on every backend
PER_HEAD = ("rope", "scaled_linear")  # rows of several widths: in test_rope.py and test_linear.py


def cases(op, *, supported: bool = True):
    found = [a for a in op.cases("cpu") if not supported or op.backends["cpu"].supports(*a)]
    assert found, f"{op.name} has no cases that the backend serves"
    return found


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def outputs_for(op, args) -> list[str]:
    """The outputs that the out overload writes for these arguments: a static key's scale is given."""
    if "scale" not in op.outputs:
        return op.outputs
    key = QuantKey.from_code(args[op.argument("key")])
    absent = {"scale", "zero_point"} if key.scale.static else {"zero_point"} if key.symmetric else set()
    return [o for o in op.outputs if o not in absent]


def fresh(op, args, *, row_gap: int = 0) -> dict[str, Tensor]:
    """Poisoned outputs for the out overload; `row_gap` elements lie between the rows of those that allow it."""
    made = dict(zip(op.outputs, as_tuple(op.empty(*args)), strict=True))
    outs = {f"{name}_out": None for name in op.outputs}
    for name in outputs_for(op, args):
        want = made[name]
        if row_gap and name not in ("scale", "zero_point"):
            *rows, cols = want.shape
            want = want.new_empty((*rows, cols + row_gap))[..., :cols]
        outs[f"{name}_out"] = want
    return outs


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", ALL)
def test_compiled_kernels_match_the_reference(op):
    for args in cases(op):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        actual = as_tuple(op.default(*args))
        expected = as_tuple(op.reference(*args))[: op.returns]
        for name, a, e in zip(op.outputs, actual, expected, strict=False):
            context = f"{op.name} {name} {fused_ops._op.describe(args)}"
            if op.name in BITWISE or name == "residual":
                assert_same(a, e, context)
            elif name == "y" and op.name != "scaled_linear":
                assert_close(a, e, context, roundings=2)
            else:  # codes and scales are compared with the backend's own, below; products in test_linear.py
                assert (a.shape, a.dtype) == (e.shape, e.dtype), context
                assert a.stride() == e.stride() or not a.numel(), context
        for argument, b in zip(args, before, strict=True):
            if isinstance(argument, Tensor):
                assert_same(argument.contiguous(), b.contiguous(), f"{op.name} changed an input")


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", [p for p in ALL if p.values[0].name.endswith("_quant")])
def test_codes_are_the_backends_own_quantization_of_its_own_result(op):
    """Promises 1 and 4c: fused with the quantization or one after the other, the same bits."""
    unfused, quantize = OPS[op.name.removesuffix("_quant")], OPS["quantize"]
    key, given = op.argument("key"), op.argument("given")
    for args in cases(op):
        y, *others = as_tuple(unfused.default(*args[:key]))
        data, scale = quantize.default(y, args[key], args[given])
        outs = fresh(op, args)
        op.out(*args, **outs)
        context = f"{op.name} {fused_ops._op.describe(args)}"
        assert_same(outs["unquantized_out"], y, context)
        functional = as_tuple(op.default(*args))
        for actual in outs["data_out"], functional[0]:
            assert_same(actual, data, context)
        for actual in outs["scale_out"], functional[1]:
            assert_same(scale if actual is None else actual, scale, context)
        for other in others:
            assert_same(functional[2], other, context)
            assert_same(outs["residual_out"], other, context)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ALL)
def test_given_outputs_get_the_same_bits_and_nothing_beside_them(op, backend):
    if backend == "cpu" and not COMPILED:
        pytest.skip("no compiled kernels on this machine")
    for args in cases(op)[::3]:
        with fused_ops.use_backend(backend):
            expected = dict(zip(op.outputs, as_tuple(op.default(*args)), strict=False))
            outs = fresh(op, args, row_gap=5)
            bases = {name: out._base for name, out in outs.items() if out is not None and out._base is not None}
            edges = {name: base[..., -5:].clone() for name, base in bases.items()}
            op.out(*args, **outs)
        for name, out in [item for item in outs.items() if item[1] is not None]:
            if (output := name.removesuffix("_out")) in expected:
                assert_same(out.contiguous() if name in bases else out, expected[output], f"{op.name} {name}")
            if name in bases:
                assert_same(bases[name][..., -5:].contiguous(), edges[name].contiguous(), f"{op.name} {name} beside")


@pytest.mark.parametrize("op", ALL)
def test_registration(op):
    """Schemas, fakes and dynamic shapes, by torch's own checker, on both overloads."""
    seen = set()
    for args in cases(op):
        kind = (args[0].ndim, args[0].dtype, args[0].numel() == 0)
        if kind in seen or args[0].dtype == torch.float16:
            continue
        seen.add(kind)
        # The checker copies neither views nor eight-bit floats.
        args = tuple(a.new_empty(a.shape).copy_(a) if isinstance(a, Tensor) else a for a in args)
        outs = fresh(op, args)
        for overload, given in (op.default, {}), (op.out, outs):
            tensors = [t for t in (*args, *given.values(), *as_tuple(op.default(*args))) if isinstance(t, Tensor)]
            narrow = any(t.dtype == torch.float8_e4m3fn for t in tensors)
            tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            if overload is op.out and not args[0].numel():
                continue
            torch.library.opcheck(
                overload,
                args,
                given,
                test_utils=tests if narrow else ("test_schema", *tests),
            )


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("op", [p for p in ALL if p.values[0].name not in PER_HEAD])
def test_a_row_does_not_depend_on_its_neighbours(op):
    """Promise 2: alone, in a batch, strided, with other numbers of threads."""
    for args in cases(op):
        if args[0].shape[0] < 3 or args[0].ndim != 2:
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
            results.append(as_tuple(op.default(*args)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(op.outputs, results[0], other, strict=False):
            assert_same(a, b, f"{op.name} {name}")


ISA_SCRIPT = """
import hashlib, torch
from fused_ops import OPS
from compare import raw
for op in OPS.values():
    torch.manual_seed(0)
    digest = hashlib.sha256()
    for args in op.cases("cpu"):
        if op.backends["cpu"].supports(*args):
            results = op.default(*args)
            for r in results if isinstance(results, tuple) else (results,):
                digest.update(raw(r).numpy().tobytes())
    print(op.name, digest.hexdigest())
"""


@pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
def test_instruction_sets_give_the_same_bits():
    """Promise 2: the portable kernels and the AVX2 ones, in processes of their own."""
    digests = []
    for isa in "base", "":
        environment = {**os.environ, "FUSED_OPS_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
        done = subprocess.run([sys.executable, "-c", ISA_SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1]
    assert len(digests[0].splitlines()) == len(OPS)


@pytest.mark.parametrize("op", ALL)
def test_compiles_to_one_graph_with_dynamic_rows(op):
    torch._dynamo.reset()
    args = next(a for a in cases(op) if a[0].numel() and a[0].ndim >= 2)
    compiled = torch.compile(lambda *a: op.default(*a), fullgraph=True, backend="aot_eager", dynamic=True)
    for a, e in zip(as_tuple(compiled(*args)), as_tuple(op.default(*args)), strict=True):
        assert_same(a, e, op.name)
