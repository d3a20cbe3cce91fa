"""Choosing a backend, and living without the compiled one."""

import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_ops import ALL, COLLECTIVES, cases

import fused_ops
from fused_ops import OPS, _cpu
from fused_ops._op import Backend, kernels_of
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN

COMPILED = "cpu" in OPS["rms_norm"].backends
needs_kernels = pytest.mark.skipif(not COMPILED, reason="no compiled kernels on this machine")
X, W = torch.randn(4, 576).bfloat16(), torch.randn(576).bfloat16()


@pytest.fixture
def spy(monkeypatch):
    """Counts the calls that reach the reference of rms_norm."""
    calls = []
    reference = OPS["rms_norm"].reference
    monkeypatch.setattr(OPS["rms_norm"], "reference", lambda *a: calls.append(a) or reference(*a))
    return calls


@needs_kernels
def test_blocks_nest_and_end(spy):
    fused_ops.rms_norm(X, W, 1e-6)
    assert not spy
    with fused_ops.use_backend("reference"):
        fused_ops.rms_norm(X, W, 1e-6)
        assert len(spy) == 1
        with fused_ops.use_backend("cpu"):
            fused_ops.rms_norm(X, W, 1e-6)
            assert len(spy) == 1
        fused_ops.rms_norm(X, W, 1e-6)
        assert len(spy) == 2
    with pytest.raises(ZeroDivisionError), fused_ops.use_backend("reference"):
        raise ZeroDivisionError
    fused_ops.rms_norm(X, W, 1e-6)
    assert len(spy) == 2


@needs_kernels
def test_compiled_graphs_obey(spy):
    compiled = torch.compile(lambda x: fused_ops.rms_norm(x, W, 1e-6), backend="aot_eager", fullgraph=True)
    compiled(X)
    with fused_ops.use_backend("reference"):
        compiled(X)
    assert len(spy) == 1


def test_arguments_of_a_kind_are_checked_once_where_a_check_reads_no_values(monkeypatch):
    op, checked, written = OPS["relu2"], [], []
    check = op.check
    monkeypatch.setattr(op, "check", lambda *args: checked.append(args) or check(*args))
    kernels = dict(kernels_of(op, Backend("none", lambda args, outs: written.append(outs))))
    for device, checks in ("meta", 1), ("cpu", 3):
        checked.clear()
        for _ in range(3):
            y = kernels["relu2"](torch.empty(2, 8, device=device))
            assert written.pop()["y"] is y
        assert len(checked) == checks
    with pytest.raises(ValueError, match="expected at least one column"):
        kernels["relu2"](torch.empty(2, 0, device="meta"))
    out = torch.empty(2, 8)
    kernels["relu2.out"](torch.empty(2, 8), y_out=out)
    assert written.pop()["y"] is out


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="name is 'tpu', expected one of"):
        fused_ops.use_backend("tpu")


@needs_kernels
def test_what_a_backend_does_not_serve_raises_and_says_what_does():
    key = FP8_DYNAMIC_GROUP_128.with_scale(group_shape=(1, 48))
    message = (
        r"quantize: the cpu backend does not serve .*48.*groups of 16 or multiples of 32.*use_backend\('reference'\)"
    )
    with pytest.raises(ValueError, match=message):
        fused_ops.quantize(X, key)
    with pytest.raises(RuntimeError, match=r"^quantize: .* key: groups of 48 columns, expected 16 or a multiple of 32"):
        OPS["quantize"].default(X, key.code, None)
    with fused_ops.use_backend("reference"):
        assert fused_ops.quantize(X, key).data.shape == X.shape


ON_ONE_RANK = [p for p in ALL if "cpu" in p.values[0].backends and p.id not in COLLECTIVES]


@pytest.mark.parametrize("op", ON_ONE_RANK)
def test_what_a_kernel_refuses_in_a_compiled_graph_names_the_operation(op):
    """Where no Python comes behind it; public functions say it once."""
    first, *rest = cases(op)[0]
    for call, count in (op.default, op.required), (op.out, None):
        with pytest.raises(RuntimeError, match=rf"^{op.name}: \w+, csrc"):
            call(*(first.double(), *rest)[:count])


def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_environment_chooses_for_the_whole_process():
    code = "import torch, fused_ops; print(fused_ops._op.use_backend._stack)"
    assert run(code, FUSED_OPS_BACKEND="reference").stdout.strip() == "['reference']"
    assert "ValueError: FUSED_OPS_BACKEND is 'tpu', expected one of" in run(code, FUSED_OPS_BACKEND="tpu").stderr


def test_what_is_warmed_up_are_functions():
    with pytest.raises(TypeError, match="warmup: calls contains None, expected functions without arguments"):
        fused_ops.warmup(lambda: None, None)


def test_without_compiled_kernels_and_triton_everything_runs_and_says_so_once(tmp_path):
    for package in "fused_ops", "quant":
        source = Path(__file__).parent.parent / package
        for file in source.rglob("*.py"):
            target = tmp_path / package / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.read_text())
    code = """
import sys
sys.modules["triton"] = None
import torch, fused_ops
from quant import FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_TOKEN
for _ in range(2):
    q = fused_ops.rms_norm_quant(torch.ones(2, 64), torch.ones(64), 1e-6, FP8_DYNAMIC_TOKEN)
print(fused_ops.__file__, list(fused_ops.OPS["rms_norm"].backends), q.dequantize().sum().item())
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "['reference', 'triton']" in done.stdout
    assert done.stderr.count("no compiled kernels found") == 1


@needs_kernels
@pytest.mark.skipif("cpu" not in OPS["rms_norm"].backends, reason="no compiled kernels on this machine")
def test_a_library_of_older_sources_is_refused_rather_than_left_out(monkeypatch):
    """Its operations would run on the reference, and nobody would know."""
    library = torch.library.Library("fused_ops", "FRAGMENT")
    try:
        library.define("of_tomorrow(Tensor x) -> Tensor")
        known = {**OPS, "of_tomorrow": SimpleNamespace(name="of_tomorrow")}
        monkeypatch.setattr(_cpu, "OPS", known)
        with pytest.raises(ImportError, match=r"_C\..*so was built from other sources, .* of_tomorrow; .*`make build`"):
            _cpu.load()
    finally:
        library._destroy()


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set for all")
def test_every_stage_is_of_its_instruction_set():
    """What runs for AVX has no instruction from before it, and calls nothing else that computes: 26 times slower."""
    (library,) = Path(fused_ops.__file__).parent.glob("_C*.so")
    lines = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", library], stdout=subprocess.PIPE, text=True).stdout
    older, called = Counter(), Counter()
    for function in re.split(r"\n\n[0-9a-f]+ <", lines):
        name, _, body = function.partition(">:\n")
        isa = re.search(r"\bfused_ops::(v4|v3|base)::", name)
        if isa:
            older[isa[1]] += len(re.findall(r"\t(?!v)\S+ .*%xmm", body))
        if isa and isa[1] != "base":
            elsewhere = rf"\t(?:call|jmp) +[0-9a-f]+ <(?!.*\bfused_ops::{isa[1]}::)(.*?)>"
            called.update(re.findall(elsewhere, body))
    assert older["base"] > 10_000
    assert older["v3"] == older["v4"] == 0
    computes_nothing = {"memcpy@plt", "memset@plt", "fused_ops::Rows::offset_of_many(long) const"}
    copies = ("Pipeline::Pipeline", "_Sp_counted_base", "_Unwind_Resume")  # of what a pipeline holds
    assert {name for name in called if not any(copy in name for copy in copies)} <= computes_nothing


def test_quantized_activation_traces_through_a_compiled_model():
    def model(x):
        return fused_ops.rms_norm_quant(x, W, 1e-6, FP8_DYNAMIC_TOKEN, round_before_weight=True)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in 4, 3:
        a, e = compiled(X[:tokens]), model(X[:tokens])
        assert torch.equal(a.data.view(torch.uint8), e.data.view(torch.uint8))
        assert torch.equal(a.scale, e.scale)
