"""The plug-in in a stock vLLM, in a virtual environment of its own: `make test-vllm`."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_predicts_alike, assert_same
from torch import nn

from bench import models
from bench.cache import cached
from quant.checkpoint import load_quantized, save_quantized
from quant.methods import quantize_model

pytestmark = pytest.mark.vllm
ENGINE = Path(__file__).with_name("vllm_engine.py")
LAYERS = 30  # of SmolLM2-135M


@pytest.fixture(scope="module")
def stock():
    return models.load()


@pytest.fixture(scope="module")
def text(stock, tmp_path_factory):
    """(tokens, the file that they are in)"""
    path = tmp_path_factory.mktemp("ids") / "ids.pt"
    ids = models.tokens(stock[1])[:, :150]
    torch.save(ids, path)
    return ids, path


@pytest.fixture(scope="module")
def int8(stock, tmp_path_factory):
    """A checkpoint that `save_quantized` wrote."""
    folder = tmp_path_factory.mktemp("int8") / "int8"
    save_quantized(quantize_model(copy.deepcopy(stock[0]), "int8_token"), folder)
    return folder


@pytest.fixture
def engine(text, tmp_path):
    """Runs one: engine(model, options.., environment) -> (what it saved, what it logged)."""

    def run(model, environment=None, **options):
        out = tmp_path / "out.pt"
        asked = {"model": str(model), "ids": str(text[1]), "out": str(out), **options}
        command = [sys.executable, str(ENGINE), json.dumps(asked)]
        variables = {**os.environ, "PYTHONPATH": str(ENGINE.parents[1]), **(environment or {})}
        variables.pop("TRITON_INTERPRET", None)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return torch.load(out), done.stdout + done.stderr

    return run


@torch.no_grad()
def logits(model, ids):
    return model(ids[None]).logits[0].float()


# Chunks of 64 tokens: reading goes on from blocks that were written before.
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_it_predicts_as_hugging_face_does(engine, stock, eager):
    saved, log = engine(models.path(), count=16, max_num_batched_tokens=64, enforce_eager=eager)
    assert_predicts_alike(saved["logits"], logits(stock[0], saved["ids"]), saved["ids"], torch.bfloat16)
    assert f"fused operations in {4 * LAYERS + 1} places, 0 left" in log
    assert "rope_kv_cache_write, paged_attention" in log


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_int8_predicts_as_the_checkpoint_does_here(engine, int8, eager):
    saved, log = engine(int8, count=16, max_num_batched_tokens=64, enforce_eager=eager, apart=eager)
    assert_predicts_alike(saved["logits"], logits(load_quantized(int8), saved["ids"]), saved["ids"], torch.bfloat16)
    for operation, takes in {
        "fused_add_rms_norm_quant": "qkv_proj",
        "silu_mul_quant": "down_proj",
        "paged_attention_quant": "o_proj",
    }.items():
        assert any(operation in line and line.endswith(takes) for line in log.splitlines()), operation
    if eager:  # fusing never changes a bit
        assert_same(saved["apart"], saved["logits"])


def test_vllms_own_int8_agrees_with_load_quantized(engine, int8):
    saved, log = engine(int8, environment={"VLLM_PLUGINS": ""})
    assert "fused operations" not in log
    assert_predicts_alike(saved["logits"], logits(load_quantized(int8), saved["ids"]), saved["ids"], torch.bfloat16)


def test_parts_are_switched_by_the_environment(engine):
    _, log = engine(models.path(), environment={"FUSED_OPS_VLLM": "activation"})
    assert f"fused operations in {LAYERS} places" in log
    assert "silu_mul" in log
    assert "rms_norm" not in log.partition("fused operations")[2].partition("KV cache")[0]


def test_a_worker_of_its_own_loads_it_too(text, tmp_path):
    """As vLLM runs it: the engine and its worker are other processes. They say once what was replaced."""
    program = tmp_path / "program.py"
    program.write_text(f"""
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    engine = LLM({str(models.path())!r}, enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 28)
    print("wrote", engine.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0))[0].outputs)
""")
    variables = {**os.environ, "PYTHONPATH": str(ENGINE.parents[1])}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, program], env=variables, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "Paris" in log.partition("wrote")[2]
    assert log.count("fused operations in") == 1


# --- the contract ---


def test_another_vllm_is_left_alone(monkeypatch):
    import vllm

    import models_patch.vllm as plugin

    assert plugin.refusal() is None
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 31, 0))
    assert plugin.refusal() == f"vLLM is {vllm.__version__}, this plug-in is written for 0.32 and 0.33"
    monkeypatch.undo()
    monkeypatch.setitem(plugin.CONTRACTS, "vllm._custom_ops:onednn_scaled_mm", "x weight")
    assert plugin.refusal().startswith("vllm._custom_ops.onednn_scaled_mm takes (dnnl_handler x output")
    monkeypatch.setitem(plugin.CONTRACTS, "vllm._custom_ops:nothing_there", "x")
    assert plugin.parameters("vllm._custom_ops:nothing_there") is None


def test_parts_that_there_are_not():
    from models_patch.vllm import PARTS, wanted

    assert wanted(None) == set(PARTS)
    assert wanted(" norm ,linear") == {"norm", "linear"}
    assert wanted("") == set()
    with pytest.raises(ValueError, match="FUSED_OPS_VLLM names norms, expected some of norm, activation"):
        wanted("norms")


def test_results_are_followed_to_the_layer_that_takes_them():
    """By what forwards compute; a result that something else reads too is quantized for nobody."""
    import vllm.config
    from vllm.model_executor.layers.linear import LinearBase

    from models_patch.vllm.loading import taker

    class Linear(LinearBase):
        def __init__(self):
            nn.Module.__init__(self)

    class Sublayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = Linear(), Linear(), nn.Identity()

    class Plain(Sublayer):
        def forward(self, positions, x):
            x, _ = self.up(x)
            x = self.norm(x)
            x, _ = self.down(x)
            return x

    class Branched(Sublayer):
        def forward(self, x):
            y, _ = self.up(x)
            return y + self.norm(x)

    class Layer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.first, self.inner = nn.Identity(), inner

        def forward(self, positions, h, residual):
            if residual is None:
                residual = h
                h = self.first(h)
            else:
                h, residual = self.first(h, residual)
            h = self.inner(positions=positions, x=h)
            return h, residual

    plain = Plain()
    assert taker(Layer(plain), "first") == (plain, "up")
    assert taker(plain, "norm") == (plain, "down")
    assert taker(Layer(Branched()), "first") is None
    other = Layer(plain)
    other.forward = lambda *args: None
    assert taker(other, "first") is None
