"""The GPU's peers: none of them is needed, and none of them can stop the benchmark."""

import sys

import flashinfer_double
import pytest
import torch

from bench import attention, rows
from bench.peers import gpu
from fused_ops import OPS, _flashinfer


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_loaded", {})
    monkeypatch.setenv("FUSED_OPS_PEERS", str(tmp_path))
    for package in "liger_kernel", "sgl_kernel", "flashinfer":
        monkeypatch.setitem(sys.modules, package, None)  # as if it weren't installed


def small_case(name: str) -> tuple[tuple, list[torch.Tensor]]:
    case = next(case for case in rows.cases([name]) if case.cols != rows.LARGE)
    args = case.inputs(3)
    return case.with_key(args), list(case.outputs(args).values())


def test_without_packages():
    found = gpu.load()
    assert found.keys() == gpu.PEERS.keys()
    assert all(version.startswith("not available: ") for version in found.values()), found
    for name in "rms_norm", "silu_mul_quant", "rope":
        assert gpu.bind(name, *small_case(name)) == {}


def test_a_library_that_does_not_load(tmp_path):
    for folder in "sm100", "sm90":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / gpu.SGLANG_LIBRARY).write_text("not a library")
    assert gpu._find_sglang().parent.name == "sm90"
    assert gpu.load()["sglang"].startswith("not available: OSError: ")


def test_what_fails_is_left_out(monkeypatch, capsys):
    def refuse(*_):
        raise AttributeError("no such kernel")

    peers = {"one": (None, lambda *_: {"works": list, "fails": lambda: 1 / 0}), "other": (None, refuse)}
    monkeypatch.setattr(gpu, "PEERS", peers)
    monkeypatch.setattr(gpu, "_loaded", dict.fromkeys(peers))
    assert gpu.bind("rms_norm", *small_case("rms_norm")) == {"works": list}
    assert capsys.readouterr().out.splitlines() == [
        "fails, rms_norm: ZeroDivisionError: division by zero",
        "other, rms_norm: AttributeError: no such kernel",
    ]


def test_halves_of_one_tensor():
    both = torch.randn(3, 16)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(gpu._packed(gate, up), both)
    assert gpu._packed(gate, up).data_ptr() == both.data_ptr()
    three = torch.randn(3, 24).chunk(3, dim=-1)
    for others in (up, gate), (gate, gate), (gate.clone(), up.clone()), three[:2]:
        assert gpu._packed(*others) is None


@pytest.mark.parametrize("case", list(attention.quick_cases()), ids=lambda case: case.name)
def test_flashinfers_attention_is_planned_beforehand(case, monkeypatch):
    monkeypatch.setattr(gpu, "_loaded", {"flashinfer": flashinfer_double.LIBRARY})
    monkeypatch.setattr(_flashinfer, "WORKSPACE", 16)
    gpu._flashinfer_workspace.cache_clear()
    sets = [case.inputs("cpu") for _ in range(2)]
    bound = [gpu.bind(case.op, args, []) for args in sets]
    flashinfer_double.PLANNED.clear()
    for args, others in zip(sets, bound, strict=True):
        assert attention.agreeing(others, OPS[case.op].default(*args)).keys() == {"flashinfer"}
    assert not flashinfer_double.PLANNED
    unknown = attention.Case("decode", case.lengths, torch.int8, latent=case.latent)
    assert gpu.bind(unknown.op, unknown.inputs("cpu"), []) == {}
