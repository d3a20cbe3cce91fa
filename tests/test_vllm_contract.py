"""What the plug-in takes of vLLM for granted, and what it reads off its modules: `make test-vllm`."""

import pytest
import torch
from compare import assert_same
from torch import nn

pytestmark = pytest.mark.vllm


def test_vllm_finds_the_plug_in():
    from vllm.plugins import load_plugins_by_group

    import models_patch.vllm as plugin

    assert load_plugins_by_group("vllm.general_plugins")["fused_ops"] is plugin.register


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


def test_lists_and_layouts_of_another_vllm(monkeypatch):
    from vllm.model_executor.kernels import linear as kernels
    from vllm.platforms import PlatformEnum
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    import models_patch.vllm as plugin

    monkeypatch.setattr(CPUAttentionBackend, "supported_kv_cache_layouts", classmethod(lambda cls: ()))
    assert plugin.refusal() == "caches are of no known layout, expected LBHNC"
    monkeypatch.setitem(kernels._POSSIBLE_INT8_KERNELS, PlatformEnum.CPU, [])
    assert plugin.refusal().endswith(
        "_INT8_KERNELS has nothing for CPUs, expected CPUInt8ScaledMMLinearKernel among them"
    )


def test_layers_share_one_table_of_angles():
    from models_patch.vllm.attention import _table

    rotary = nn.Module()
    rotary.register_buffer("cos_sin_cache", torch.randn(8, 4).bfloat16(), persistent=False)
    assert _table(rotary) is _table(rotary)
    assert_same(_table(rotary), rotary.cos_sin_cache.float())


def test_compiled_graphs_of_other_parts_are_kept_apart(monkeypatch):
    from vllm import envs
    from vllm.config.utils import hash_factors

    from models_patch.vllm import PARTS, keep_apart

    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    keys = {hash_factors(envs.compile_factors())}
    for parts in (PARTS, PARTS[:3]):
        keep_apart(frozenset(parts))
        keys.add(hash_factors(envs.compile_factors()))
    assert len(keys) == 3


def test_attention_whose_cache_another_layer_reads_is_left(monkeypatch):
    from vllm.model_executor.layers.attention import Attention

    from models_patch.vllm import attention, loading

    monkeypatch.setattr(attention, "problem", lambda module: None)
    monkeypatch.setattr(attention, "bind", lambda module: "rope_kv_cache_write")
    model = nn.Module()
    for name, target in {"lends": None, "reads": "lends.attn", "alone": None}.items():
        block = nn.Module()
        block.attn = Attention.__new__(Attention)
        nn.Module.__init__(block.attn)
        block.attn.layer_name, block.attn.kv_sharing_target_layer_name = f"{name}.attn", target
        block.o_proj = nn.Identity()
        model.add_module(name, block)
    left = loading.connect(model, frozenset({"attention"})).left
    assert [(entry.path, entry.note) for entry in left] == [("lends", "another layer reads its cache")]


def test_a_norm_of_two_modules_quantizes_for_none(monkeypatch):
    """It may quantize in one way only; and Gemma's are ours as long as vLLM's IR has us first."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    from models_patch.vllm import layers, loading

    monkeypatch.setattr(loading, "taker", lambda parent, name: pytest.fail("it was followed"))
    model, norm, gemma = (
        nn.Module(),
        layers.FusedRMSNorm.__new__(layers.FusedRMSNorm),
        GemmaRMSNorm.__new__(GemmaRMSNorm),
    )
    for module in norm, gemma:
        nn.Module.__init__(module)
    norm.is_fused = True
    for name in "first", "second":
        block = nn.Module()
        block.norm = norm
        model.add_module(name, block)
    model.gemma = gemma
    entries = loading.connect(model, frozenset({"norm"}), provided=False)
    assert [(entry.operation, entry.note) for entry in entries] == [
        (None, "ir_op_priority has another first"), *[(loading.NORM, "2 modules call it")] * 2
    ]  # fmt: skip
    assert norm.feeds is None


def test_parts_that_there_are_not():
    from models_patch.vllm import PARTS, wanted

    assert wanted(None) == set(PARTS)
    assert wanted(" norm ,linear") == {"norm", "linear"}
    assert wanted("") == set()
    with pytest.raises(ValueError, match="FUSED_OPS_VLLM names norms, expected some of norm, activation"):
        wanted("norms")


def test_results_are_followed_to_the_layer_that_takes_them():
    """By what forwards compute; a result that something else reads too is quantized for nobody."""
    from vllm.model_executor.layers.linear import LinearBase

    from models_patch.vllm.dataflow import computes, taker

    class Linear(LinearBase):
        def __init__(self):
            nn.Module.__init__(self)

    class Sublayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm, self.rotates = Linear(), Linear(), nn.Identity(), False

    class Plain(Sublayer):
        def forward(self, positions, x):
            x, _ = self.up(x)
            x = self.norm(x)
            if self.rotates:
                x = -x
            x, _ = self.down(x)
            return x

    class Branched(Sublayer):
        def forward(self, x):
            y, _ = self.up(x)
            return y + self.norm(x)

    class ByMethod(Sublayer):
        def apart(self, x):
            return self.up(x)[0]

        def forward(self, x):
            return self.apart(self.norm(x))

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

    class FirstRow(Sublayer):
        def forward(self, x):
            return self.up(self.norm(x)[0])[0]

    class ReadTwice(Sublayer):
        def forward(self, x):
            x = self.norm(x)
            _unread, _ = self.down(x)
            return self.up(x)[0]

    plain = Plain()
    assert taker(Layer(plain), "first") == (plain, "up")
    assert taker(FirstRow(), "norm") is None
    assert taker(ReadTwice(), "norm") is None
    assert taker(plain, "norm") == (plain, "down")
    assert taker(Layer(Branched()), "first") is None
    assert taker(ByMethod(), "norm") is None
    plain.rotates = False
    assert computes(plain) == "self.down(self.norm(self.up(x)[0]))[0]"
    plain.rotates = True
    assert taker(plain, "norm") is None
    other = Layer(plain)
    other.forward = lambda *args: None
    assert taker(other, "first") is None
