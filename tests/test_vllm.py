"""The plug-in in a stock vLLM, in a virtual environment of its own: `make test-vllm`."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import assert_as_near, assert_close, assert_predicts_alike, assert_same, assert_same_scheme
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench import models
from fused_ops import quantize, scaled_linear
from fused_ops.linear import block_key, quantize_weight
from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_TOKEN,
    INT8_STATIC_TENSOR,
    INT8_STATIC_TENSOR_ASYM,
)
from quant.checkpoint import load_quantized, save_quantized
from quant.methods import quantize_model

pytestmark = pytest.mark.vllm
INT8 = [INT8_DYNAMIC_TOKEN, INT8_STATIC_TENSOR, INT8_STATIC_TENSOR_ASYM]
FP8 = [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_GROUP_128, FP8_DYNAMIC_GROUP_64]
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
def quantized(stock, tmp_path_factory):
    """Checkpoints that `save_quantized` wrote, by scheme."""
    root, made = tmp_path_factory.mktemp("quantized"), {}

    def checkpoint(scheme):
        if scheme not in made:
            made[scheme] = root / scheme
            save_quantized(quantize_model(copy.deepcopy(stock[0]), scheme), made[scheme])
        return made[scheme]

    return checkpoint


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


# vLLM alone has no product of fp8_group64.
@pytest.mark.parametrize(("scheme", "eager"), [("int8_token", True), ("int8_token", False), ("fp8_group64", True)])
def test_a_checkpoint_predicts_as_it_does_here(engine, quantized, scheme, eager):
    folder = quantized(scheme)
    saved, log = engine(folder, count=16, max_num_batched_tokens=64, enforce_eager=eager, apart=eager)
    assert_predicts_alike(saved["logits"], logits(load_quantized(folder), saved["ids"]), saved["ids"], torch.int8)
    for operation, takes in {
        "(fused_add_)rms_norm_quant": "qkv_proj",
        "silu_mul_quant": "down_proj",
        "paged_attention_quant": "o_proj",
    }.items():
        assert any(operation in line and line.endswith(takes) for line in log.splitlines()), operation
    if eager:  # fusing never changes a bit
        assert_same(saved["apart"], saved["logits"])


def test_one_layer_is_quantized_as_it_is_here(engine, stock, tmp_path):
    """Where errors of many layers don't hide whether it is quantized at all."""
    one = copy.deepcopy(stock[0])
    one.model.layers, one.config.num_hidden_layers = one.model.layers[:1], 1
    save_quantized(quantize_model(copy.deepcopy(one), "int8_token"), tmp_path / "one")
    saved, _ = engine(tmp_path / "one")
    ids = saved["ids"]
    assert_same_scheme(saved["logits"], logits(load_quantized(tmp_path / "one"), ids), logits(one, ids))


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


# Norms of q and k, and Gemma's by vLLM's IR; windows of 64 tokens; gpt-oss's sinks, and arguments in another order.
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config),
        (Gemma3ForCausalLM, partial(Gemma3TextConfig, sliding_window=64)),
        (GptOssForCausalLM, partial(GptOssConfig, sliding_window=64, **EXPERTS)),
    ],
    ids=["qwen3", "gemma3", "gpt_oss"],
)
def test_small_models_of_other_families(engine, tmp_path, model, config):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 49152}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    made = model(config(**sizes, **heads, architectures=[model.__name__], initializer_range=0.1)).bfloat16().eval()
    made.save_pretrained(tmp_path / "model")
    saved, log = engine(tmp_path / "model", count=16, max_num_batched_tokens=64)
    theirs = logits(made, saved["ids"])
    assert_as_near(saved["logits"], logits(made.float(), saved["ids"]), theirs)
    assert ", 0 left as they were" in log
    write = "rope_kv_cache_write" if model is GptOssForCausalLM else "qk_norm_rope_kv_cache_write"
    assert f" {write}, paged_attention" in log


def test_vllms_own_int8_agrees_with_load_quantized(engine, quantized):
    folder = quantized("int8_token")
    saved, log = engine(folder, environment={"VLLM_PLUGINS": ""})
    assert "fused operations" not in log
    assert_predicts_alike(saved["logits"], logits(load_quantized(folder), saved["ids"]), saved["ids"], torch.int8)


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


# --- products ---


@pytest.mark.parametrize("key", INT8 + FP8, ids=str)
def test_products_take_what_they_quantize_themselves(key):
    """The same bits of a tensor and of what `quantize` makes of it, and those of `scaled_linear` but for its order."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from models_patch.vllm import linear

    x, bias = torch.randn(5, 128).bfloat16(), torch.randn(64).bfloat16()
    cols = key.scale.group_shape.cols
    group = (1, -1) if cols == -1 else (cols, cols)
    weight, scale, _ = quantize_weight(torch.randn(64, 128), block_key(key.dtype, *group))
    layer = nn.Module()
    buffers = {"weight": weight, "weight_scale": scale, "input_scale": None, "input_zero_point": None, "azp_adj": None}
    buffers |= {"input_scale": torch.tensor([0.03])} if key.scale.static else {}
    buffers |= {} if key.symmetric else {"input_zero_point": torch.tensor([-3], dtype=torch.int8)}
    for name, buffer in buffers.items():
        layer.register_parameter(name, None if buffer is None else nn.Parameter(buffer, requires_grad=False))
    layer.logical_widths, layer.quant_method = [64], None
    theirs = next(name for name, ours in linear.KEYS.items() if ours == key)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(VllmConfig()):
            kernel = _kernel(theirs, group, layer)
            kernel.process_weights_after_loading(layer)
            options = linear._options(key, layer.input_scale, layer)
            q = quantize(x, **options)
            y = kernel.apply_weights(layer, x, bias)
            assert_same(kernel.apply_weights(layer, linear.as_vllms(q, theirs), bias), y)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = scaled_linear(q, weight, scale, bias, out_dtype=torch.bfloat16)
    assert_close(y, expected, terms=expected.float().abs() + 1)


def _kernel(key, group, layer):
    from vllm.model_executor.kernels.linear import FP8ScaledMMLinearLayerConfig, Int8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, QuantKey, ScaleDesc

    from models_patch.vllm.linear import FusedFp8Kernel, FusedInt8Kernel

    if key.dtype == torch.int8:
        config = Int8ScaledMMLinearLayerConfig(key.scale.static, True, key.symmetric)
        names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
        return FusedInt8Kernel(config, names)
    weight_key = QuantKey(key.dtype, ScaleDesc(torch.float32, True, GroupShape(*group)))
    if group == (1, -1):  # as vLLM leaves it
        layer.weight = nn.Parameter(layer.weight.t(), requires_grad=False)
    config = FP8ScaledMMLinearLayerConfig(weight_key, key, (64, 128), torch.bfloat16, torch.bfloat16)
    return FusedFp8Kernel(config, ["weight", "weight_scale", "input_scale", "input_scale_ub"])


def test_layers_that_change_their_input_first_show_no_key():
    """Hadamard transforms, and the ranks' parts of a whole input: producers hand over plain tensors."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

    from models_patch.vllm.linear import input_quant

    for what, shown in {"": True, "input_transform": False, "split": False}.items():
        layer = nn.Module()
        layer.quant_method = nn.Module()
        layer.quant_method.input_transform = nn.Identity() if what == "input_transform" else None
        layer.input_is_parallel = what != "split"
        layer.weight = nn.Parameter(torch.zeros(64, 128), requires_grad=False)
        layer.weight_scale = nn.Parameter(torch.ones(64, 1), requires_grad=False)
        with set_current_vllm_config(VllmConfig()):
            kernel = _kernel(kFp8DynamicTokenSym, (1, -1), layer)
        kernel.process_weights_after_loading(layer)
        layer._input_quant_key = kernel.input_quant_key()  # as vLLM's scheme does
        assert (input_quant(layer)[1] is not None) == shown
