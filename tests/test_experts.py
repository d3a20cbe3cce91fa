"""Quantized experts: the order of rows, the sum over a token's experts, and the layer around them."""

import copy

import pytest
import torch
import transformers
from compare import EXPERTS_ERROR, assert_codes_close, assert_same
from linear_operands import compiled_only, each_backend
from patching import count, quantize, tiny_model
from torch import nn
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

import fused_ops
from fused_ops import linear_products
from fused_ops.experts import chosen
from fused_ops.linear import decode_weight
from quant import INT8_DYNAMIC_TOKEN, MXFP8, formats
from quant.checkpoint import calibrate
from quant.methods import SCHEMES, QuantExperts, quantize_model

H, INNER, EXPERTS = 64, 96, 5


def experts_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"hidden_size": H, "num_local_experts": EXPERTS, "num_experts": EXPERTS}
    sizes |= {"moe_intermediate_size": INNER, "intermediate_size": INNER}
    if kind == "GptOss":
        config = transformers.GptOssConfig(**sizes, swiglu_alpha=1.5, swiglu_limit=2.0)
        module: nn.Module = gpt_oss.GptOssExperts(config)
    else:
        module = qwen3_moe.Qwen3MoeExperts(transformers.Qwen3MoeConfig(**sizes))
    module.config._experts_implementation = "grouped_mm"
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module.to(dtype).requires_grad_(False)


class Block(nn.Module):
    """What calibration runs."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.experts = experts_of(kind, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, *routed(len(x), x.dtype))


def routed(tokens: int, dtype: torch.dtype, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    return chosen(tokens, top_k, EXPERTS, "cpu"), torch.rand(tokens, top_k).to(dtype)


def quantized(kind: str, scheme: str, dtype: torch.dtype = torch.bfloat16) -> QuantExperts:
    batches = [torch.randn(20, H).to(dtype)] if SCHEMES[scheme].calibrated else None
    return quantize_model(Block(kind, dtype), scheme, batches).experts


def gated(kind: str, gate_up: torch.Tensor) -> torch.Tensor:
    if kind == "GptOss":
        gate, up = gate_up[..., ::2].clamp(max=2.0), gate_up[..., 1::2].clamp(-2.0, 2.0)
        return (up + 1) * gate * torch.sigmoid(1.5 * gate)
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


# --- the order of rows, and the sum ---


@each_backend
def test_rows_are_sorted_by_expert_and_keep_their_order(backend):
    index = torch.tensor([[2, 0], [2, 4], [0, 2]])
    with fused_ops.use_backend(backend):
        count, rows, positions = fused_ops.sort_by_expert(index, 5)
    assert count.tolist() == [2, 0, 3, 0, 1]
    assert rows.tolist() == [0, 2, 0, 1, 2, 1]
    assert positions.tolist() == [[2, 0], [3, 5], [1, 4]]
    for index in chosen(1, 8, 8, "cpu"), chosen(70, 1, 3, "cpu").int(), torch.empty(0, 2, dtype=torch.int64):
        with fused_ops.use_backend(backend):
            count, rows, positions = fused_ops.sort_by_expert(index, 8)
        assert_same(count, index.flatten().bincount(minlength=8).int())
        assert_same(rows[positions.long()], torch.arange(len(index)).int()[:, None].expand(index.shape).contiguous())


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_sum_is_that_of_transformers(backend, dtype):
    """In columns that it adds in order; of weights in S, whose products are rounded, and in float32."""
    for total, top_k in (1, 1), (9, 8), (300, 2), (0, 2):
        for weights in torch.rand(total, top_k), torch.rand(total, top_k).to(dtype):
            y = torch.randn(total * top_k, H).to(dtype)
            positions = torch.randperm(total * top_k).view(total, top_k)
            expected = (y[positions.flatten()] * weights.view(-1, 1)).view(total, top_k, H).sum(1).to(dtype)
            with fused_ops.use_backend(backend):
                assert_same(fused_ops.sum_experts(y, positions, weights), expected)


@compiled_only
def test_a_sum_does_not_depend_on_the_others():
    y, positions = torch.randn(600, 577).bfloat16(), torch.randperm(600).view(100, 6)
    weights = torch.rand(100, 6)
    whole = fused_ops.sum_experts(y, positions, weights)
    for row in 0, 57, 99:
        here = slice(row, row + 1)
        assert_same(fused_ops.sum_experts(y, positions[here], weights[here]), whole[here])
    spread = torch.stack([y, y], 1).flatten(1)[:, :577]
    assert_same(fused_ops.sum_experts(spread, positions.int(), weights), whole)


INDEX, Y = torch.tensor([[0, 1]]), torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fused_ops.sort_by_expert(INDEX, 1), ValueError, "top_k_index.* has 1, expected 0 to 0"),
        (lambda: fused_ops.sort_by_expert(-INDEX, 4), ValueError, "top_k_index.* has -1, expected 0 to 3"),
        (lambda: fused_ops.sort_by_expert(INDEX.float(), 4), TypeError, "top_k_index is torch.float32"),
        (lambda: fused_ops.sort_by_expert(INDEX[0], 4), ValueError, r"top_k_index is \[2\], expected \[T, k\]"),
        (lambda: fused_ops.sort_by_expert(torch.zeros(3, 2).long().t(), 4), ValueError, "expected .*contiguous"),
        (lambda: fused_ops.sort_by_expert(INDEX, 0), ValueError, "num_experts is 0, expected 1 to 65536"),
        (lambda: fused_ops.sum_experts(Y, INDEX + 1, Y[:1, :2]), ValueError, "positions.* has 2, expected 0 to 1"),
        (lambda: fused_ops.sum_experts(Y, INDEX, Y[:1, :1]), ValueError, r"weights is \[1, 1\], expected \[1, 2\]"),
        (
            lambda: fused_ops.sum_experts(Y.bfloat16(), INDEX, Y[:1, :2].half()),
            TypeError,
            "weights is torch.float16, expected torch.float32 or torch.bfloat16 as y",
        ),
    ],
)
@each_backend
def test_bad_arguments_raise_by_name(backend, call, error, message):
    with fused_ops.use_backend(backend), pytest.raises(error, match=message):
        call()


# --- the layer ---


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layer_is_its_decoded_weights(scheme, kind):
    """Expert by expert in float64; of a small batch some get no token."""
    layer = quantized(kind, scheme, torch.float32)
    gate_up, down = layer.gate_up_proj, layer.down_proj
    key = SCHEMES[scheme].weight_key

    def product(x, projection, e):
        scale2 = projection._buffers.get("weight_scale2")
        w = decode_weight(projection.weight[e], projection.weight_scale[e], key, None if scale2 is None else scale2[e])
        bias = projection._buffers["bias"]
        return x.double() @ w.double().t() + (0 if bias is None else bias[e].double())

    for total, top_k in (1, 1), (7, 2), (3, 4), (0, 2):
        x, (index, weights) = torch.randn(total, H), routed(total, torch.float32, top_k)
        expected = torch.zeros(total, H, dtype=torch.float64)
        taken = fused_ops.quantize(x, **gate_up.input_quant()).dequantize(torch.float32)
        for t, j in torch.cartesian_prod(torch.arange(total), torch.arange(top_k)).tolist():
            e = int(index[t, j])
            inner = gated(kind, product(taken[t : t + 1], gate_up, e).float())
            inner = fused_ops.quantize(inner, **down.input_quant()).dequantize(torch.float32)
            expected[t] += weights[t, j] * product(inner, down, e)[0]
        assert_codes_close(layer(x, index, weights), expected)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_the_error_is_what_the_format_costs(kind):
    block = Block(kind, torch.float32)
    x = torch.randn(40, H)
    expected = block(x)
    for scheme, most in EXPERTS_ERROR.items():
        y = quantize_model(copy.deepcopy(block), scheme, [x] if scheme == "nvfp4" else None)(x)
        assert (y - expected).norm() / expected.norm() < most, scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8_token", "fp8_block", "mxfp8", "nvfp4"])
def test_a_token_does_not_depend_on_the_others(scheme, dtype):
    """Quantized before or by the layer, alone or in a batch, with leading dimensions."""
    layer = quantized("Qwen3Moe", scheme, dtype)
    x, (index, weights) = torch.randn(30, H).to(dtype), routed(30, torch.float32, 3)
    whole = layer(x, index, weights)
    assert (whole.dtype, whole.shape) == (dtype, (30, H))
    for row in 0, 13, 29:
        here = slice(row, row + 1)
        assert_same(layer(x[here], index[here], weights[here]), whole[here])
    activation = fused_ops.quantize(x.view(5, 6, H), **layer.input_quant())
    assert_same(layer(activation, index, weights), whole.view(5, 6, H))


def test_a_token_is_quantized_once():
    layer = quantized("Qwen3Moe", "int8_token")
    x, (index, weights) = torch.randn(6, H).bfloat16(), routed(6, torch.bfloat16, 4)
    calls = count(lambda: layer(x, index, weights))
    assert dict(calls) == {
        "sort_by_expert": 1, "quantize": 2, "grouped_scaled_linear": 2, "sum_experts": 1,  # the second in between
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: x is quantized as MXFP8, expected INT8_DYNAMIC_TOKEN"):
        layer(fused_ops.quantize(x, MXFP8), index, weights)
    assert layer.input_quant_key == INT8_DYNAMIC_TOKEN


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_calibration_sees_what_the_products_get(kind):
    """Whatever implementation the model has, and leaves it as it was."""
    for implementation in "eager", "grouped_mm":
        block = Block(kind, torch.float32)
        block.experts.config._experts_implementation = implementation
        x = torch.randn(20, H)
        expected = block(x)
        spans = calibrate(block, [x], progress=False)
        assert_same(block(x), expected)
        assert_same(spans["experts.gate_up_proj"], torch.stack([x.min(), x.max()]))
        weight, bias = block.experts.gate_up_proj, getattr(block.experts, "gate_up_proj_bias", None)
        index, _ = routed(20, x.dtype)
        rows = [
            x[t] @ (weight[e] if kind == "GptOss" else weight[e].t()) + (0 if bias is None else bias[e])
            for t in range(20)
            for e in index[t]
        ]
        inner = gated(kind, torch.stack(rows))
        torch.testing.assert_close(spans["experts.down_proj"], torch.stack([inner.min(), inner.max()]))
        layer = quantize_model(block, "fp8_static", spans).experts
        _, scale, _ = formats.quantize(
            spans["experts.down_proj"].view(1, 2), SCHEMES["fp8_static"].input_quant_key.with_scale(static=False)
        )
        assert_same(layer.down_proj.input_scale, scale.view(1))


def test_copies_state_dicts_and_dtypes():
    layer = quantized("GptOss", "nvfp4")
    x, (index, weights) = torch.randn(6, H).bfloat16(), routed(6, torch.bfloat16)
    expected = layer(x, index, weights)
    assert_same(copy.deepcopy(layer)(x, index, weights), expected)
    other = quantized("GptOss", "nvfp4")
    for buffer in other.buffers():
        buffer.view(torch.uint8).zero_()
    other.load_state_dict(layer.state_dict())
    assert_same(other(x, index, weights), expected)
    assert layer.gate_up_proj.weight.shape == (EXPERTS, 2 * INNER, H // 2)
    assert layer.half()(x.half(), index, weights.half()).dtype == torch.float16


def test_on_a_gpu_they_are_refused(monkeypatch):
    monkeypatch.setattr(linear_products, "architecture", lambda device: "sm_90")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: no product on cpu takes the weights of 5 experts"):
        quantized("Qwen3Moe", "int8_token")


def test_one_scheme_for_the_experts_and_then_another_for_the_rest():
    model, others = tiny_model("Qwen3Moe"), ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj")
    quantize(model, "mxfp8", ignore=others)
    experts = model.model.layers[0].mlp.experts
    quantize(model, "int8_token")
    assert model.model.layers[0].mlp.experts is experts
    assert model.model.layers[0].self_attn.q_proj.input_quant_key == INT8_DYNAMIC_TOKEN
    with pytest.raises(ValueError, match=r"contains no nn\.Linear to replace"):
        quantize(model, "int8_token")


def test_a_model_without_its_experts_or_with_others():
    model = tiny_model("Qwen3Moe")
    quantize(model, "int8_token", ignore=("lm_head", "experts"))
    assert not any(isinstance(module, QuantExperts) for module in model.modules())
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    for name, value, message in (
        ("has_gate", False, "expected gated experts without norms"),
        ("has_post_expert_norm", True, "expected gated experts without norms"),
        ("_is_expert_parallel", True, "has a part of the experts, expected all of them"),
    ):
        model = tiny_model("Qwen3Moe")
        setattr(model.model.layers[1].mlp.experts, name, value)
        with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.experts (is Qwen3MoeExperts, )?{message}"):
            quantize(model, "int8_token")
        assert isinstance(model.model.layers[0].mlp.experts, qwen3_moe.Qwen3MoeExperts)  # as it was
    model = tiny_model("Qwen3Moe", moe_intermediate_size=40)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: .*has 40 columns, MXFP8 expects a multiple"):
        quantize(model, "mxfp8")
    model.model.layers[0].mlp.experts.down_proj[2, 5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: weight has values that aren't finite"):
        quantize(model, "int8_token")
    assert isinstance(model.model.layers[1].mlp.experts, qwen3_moe.Qwen3MoeExperts)
