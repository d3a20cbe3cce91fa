import copy

import pytest
import torch
from compare import assert_same
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fused_ops
from fused_ops.linear import decode_weight
from quant import FP8_DYNAMIC_TOKEN, INT8_DYNAMIC_TOKEN, MXFP8, QuantizedActivation
from quant.methods import SCHEMES, QuantLinear, ScaledLinearMethod, quantize_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The largest relative error (norm) that a scheme may make on normally distributed weights and inputs.
FORMAT_ERROR = {"int8": 0.02, "fp8": 0.06, "mxfp8": 0.06, "mxfp4": 0.25, "nvfp4": 0.2}


def model(dtype=torch.bfloat16, bias=True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(576, 160, bias=bias), nn.SiLU(), nn.Linear(160, 192, bias=False)).to(dtype)


def quantized(scheme: str, stock: nn.Module, x: torch.Tensor) -> nn.Module:
    return quantize_model(copy.deepcopy(stock), scheme, [x] if SCHEMES[scheme].calibrated else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_what_the_format_costs(scheme, dtype):
    stock, x = model(dtype), torch.randn(2, 9, 576).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        y = quantized(scheme, stock, x)(x)
    assert (y.dtype, y.shape) == (dtype, (2, 9, 192))
    assert (y.double() - exact).norm() / exact.norm() < FORMAT_ERROR[scheme.split("_")[0]] * 1.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_is_that_of_the_decoded_values(scheme):
    """Against float64, with nothing but float32 accumulation and one rounding between."""
    x = torch.randn(5, 576)
    layer = quantized(scheme, model(torch.float32), x)[0]
    activation = fused_ops.quantize(x, **layer.input_quant())
    scale2 = layer._buffers.get("weight_scale2")
    weight = decode_weight(layer.weight, layer.weight_scale, SCHEMES[scheme].weight_key, scale2).double()
    exact = activation.dequantize(torch.float32).double() @ weight.t() + layer.bias.double()
    bound = activation.dequantize(torch.float32).double().abs() @ weight.abs().t() * 2.0**-21 + 1e-6
    assert ((layer(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plain_tensor_and_its_activation_give_the_same_bits(scheme):
    x = torch.randn(5, 576).bfloat16()
    layer = quantized(scheme, model(), x)[0]
    assert_same(layer(fused_ops.quantize(x, **layer.input_quant())), layer(x))


def test_a_producer_takes_what_the_layer_says():
    x, w = torch.randn(5, 576).bfloat16(), torch.randn(576).bfloat16()
    for scheme in SCHEMES:
        layer = quantized(scheme, model(), x)[0]
        q, r = fused_ops.fused_add_rms_norm_quant(x, x, w, 1e-6, **layer.input_quant())
        assert q.quant_key == layer.input_quant_key
        assert_same(layer(q), layer(fused_ops.rms_norm(r, w, 1e-6)))


def test_another_key_is_refused_by_name():
    layer = quantized("int8_token", model(), None)[0]
    with pytest.raises(ValueError, match="0: x is quantized as FP8_DYNAMIC_TOKEN, expected INT8_DYNAMIC_TOKEN"):
        layer(fused_ops.quantize(torch.randn(5, 576), FP8_DYNAMIC_TOKEN))


def test_layers_that_share_an_input_share_its_scale_and_it_covers_the_largest():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 16)

        def forward(self, x):
            return self.a(x).sum() + self.b(x).sum()

    batches = [torch.randn(4, 64) for _ in range(3)]
    pair = quantize_model(Pair(), "fp8_static", batches)
    assert_same(pair.a.input_scale, pair.b.input_scale)
    assert pair.a.input_scale.item() == (max(b.abs().max() for b in batches) / 448).item()


def calibrated(scheme: str, *inputs: list[float], weight: float = 1.0) -> QuantLinear:
    """A layer whose weights are all the same, calibrated with these inputs, one a batch."""
    stock = nn.Linear(len(inputs[0]), 3)
    nn.init.constant_(stock.weight, weight)
    return quantize_model(nn.Sequential(stock), scheme, [torch.tensor([x]) for x in inputs])[0]


def test_calibration_by_hand():
    """Of inputs between -3 and 5, over two batches."""
    inputs = [0.0, -3.0, 1.0, 0.5] * 4, [5.0, 2.0, 0.0, -1.0] * 4
    assert_same(calibrated("int8_static", *inputs).input_scale, torch.tensor([5.0]) / 127)
    layer = calibrated("int8_static_asym", *inputs)
    assert_same(layer.input_scale, torch.tensor([8.0]) / 255)
    assert_same(layer.input_zero_point, torch.tensor([-128 + 96], dtype=torch.int32))  # 3 * 255 / 8 is 95.6
    layer = calibrated("nvfp4", *inputs, weight=-0.25)
    assert_same(layer.input_scale2, 1 / (1 / (torch.tensor([5.0]) / 2688)))  # a reciprocal, as files hold its divisor
    assert_same(layer.weight_scale2, torch.tensor([0.25]) / 2688)


def test_calibration_with_inputs_of_one_sign_and_of_zeros():
    """The range always includes zero, and scales don't get smaller than the formats' smallest."""
    layer = calibrated("int8_static_asym", [2.0, 51.0] * 8)
    assert_same(layer.input_scale, torch.tensor([51.0]) / 255)
    assert layer.input_zero_point.tolist() == [-128]
    assert calibrated("int8_static_asym", [0.0] * 16).input_scale.tolist() == [2.0**-23]
    layer = calibrated("nvfp4", [0.0] * 16, weight=0.0)
    assert layer.input_scale2.tolist() == layer.weight_scale2.tolist() == [2.0**-126]


def test_a_layer_has_the_buffers_its_keys_ask_for():
    x = torch.randn(5, 576)
    extra = {
        "int8_static": {"input_scale"},
        "int8_static_asym": {"input_scale", "input_zero_point"},
        "fp8_static": {"input_scale"},
        "nvfp4": {"input_scale2", "weight_scale2"},
    }
    for scheme in SCHEMES:
        layer = quantized(scheme, model(), x.bfloat16())[0]
        assert layer.state_dict().keys() == {"bias", "weight", "weight_scale"} | extra.get(scheme, set())
        given = layer.input_quant()
        assert given["scale"] is layer._buffers.get("input_scale")
        assert given["scale2"] is layer._buffers.get("input_scale2")
        assert given["zero_point"] is layer._buffers.get("input_zero_point")
    layer = quantized("mxfp8", model(), None)[0]
    assert (layer.weight_scale.shape, layer.weight_scale.dtype) == ((160, 18), MXFP8.scale.dtype)
    assert quantized("mxfp4", model(), None)[0].weight.shape == (160, 288)


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("fp8_static", "input_scale", 0.0),
        ("int8_static_asym", "input_zero_point", 128),
        ("mxfp8", "weight_scale", float("nan")),
        ("nvfp4", "weight_scale", float("nan")),
        ("nvfp4", "weight_scale2", -1.0),
        ("nvfp4", "input_scale2", float("inf")),
        ("nvfp4", "input_scale2", 2.0**-130),
        ("int8_static", "input_scale", 2.0**-149),
    ],
)
def test_scales_that_mean_nothing_are_refused(scheme, name, value):
    layer = quantized(scheme, model(), torch.randn(5, 576).bfloat16())[0]
    layer.get_buffer(name).flatten()[:1].fill_(value)
    with pytest.raises(ValueError, match=f"0: {name} "):
        layer.method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(8).double(), TypeError, "up: bias is torch.float64, expected"),
        ([0.0] * 8, TypeError, "up: bias is list, expected"),
        (torch.zeros(1, 8), ValueError, r"up: bias is \[1, 8\], expected \[8\]"),
    ],
)
def test_biases_that_no_product_takes_are_refused(bias, error, message):
    with pytest.raises(error, match=message):
        QuantLinear(64, 8, ScaledLinearMethod(SCHEMES["int8_token"]), bias, name="up")


def test_a_block_of_zero_weights_is_no_error():
    stock = model()
    stock[0].weight.data[3, :64] = 0
    x = torch.randn(5, 576).bfloat16()
    for scheme in SCHEMES:
        y = quantized(scheme, stock, x)(x)
        assert y.isfinite().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_the_model_leaves_codes_and_scales(cast):
    for scheme in SCHEMES:
        layer = quantized(scheme, model(), torch.randn(5, 576).bfloat16())[0]
        before = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "bias"}
        getattr(layer, cast)()
        for name, buffer in before.items():
            assert_same(layer.get_buffer(name), buffer, name)
        assert layer.bias.dtype == getattr(torch.zeros(1), cast)().dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_deepcopy_compile(scheme):
    torch._dynamo.reset()
    x = torch.randn(5, 576).bfloat16()
    one = quantized(scheme, model(), x)
    other = quantized(scheme, nn.Sequential(*[copy.deepcopy(m) for m in model().apply(_scramble)]), x)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert_same(other(x), one(x))
    assert_same(copy.deepcopy(one)(x), one(x))
    assert_same(torch.compile(one, fullgraph=True, backend="aot_eager")(x), one(x))


def _scramble(module):
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def test_a_language_model_keeps_its_head_and_generates():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    llama = quantize_model(LlamaForCausalLM(config).eval().bfloat16(), "int8_token")
    kinds = [type(m) for name, m in llama.named_modules() if name.endswith(("_proj", "lm_head"))]
    assert kinds.count(QuantLinear) == 14
    assert kinds.count(nn.Linear) == 1
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    tokens = llama.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)
    with pytest.raises(ValueError, match="the weight of lm_head is shared by"):
        quantize_model(LlamaForCausalLM(config), "int8_token", ignore=())


class Odd(nn.Linear):
    pass


def _with_nan() -> nn.Module:
    broken = model()
    broken[2].weight.data[3, 5] = float("nan")
    return broken


INFINITE = torch.full((1, 576), float("-inf")).bfloat16()


def _uneven() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 8))


@pytest.mark.parametrize(
    ("make", "scheme", "calibration", "error", "message"),
    [
        (model, "int3", None, ValueError, "scheme is 'int3', expected one of"),
        (model, "fp8_static", None, ValueError, "calibration is missing, fp8_static takes batches"),
        (model, "int8_token", [1], ValueError, "calibration is given, int8_token computes its scales"),
        (model, "fp8_static", torch.ones(2, 64), TypeError, "calibration is Tensor, expected a list"),
        (model, "fp8_static", {"x": 1}, TypeError, "calibration is dict, expected a list"),
        (model, "fp8_static", 3, TypeError, "calibration is int, expected a list"),
        (model, "fp8_static", [], ValueError, "calibration never gives 0 an input"),
        (model, "fp8_static", ["text"], TypeError, "calibration has a str as batch 1, expected a tensor or keyword"),
        (_with_nan, "int8_token", None, ValueError, "2: weight has values that aren't finite"),
        (_with_nan, "mxfp4", None, ValueError, "2: weight has values that aren't finite"),
        (_uneven, "mxfp8", None, ValueError, "1: input has 40 columns, MXFP8 expects a multiple of 32"),
        (_uneven, "mxfp4", None, ValueError, "1: input has 40 columns, MXFP4 expects a multiple of 32"),
        (_uneven, "nvfp4", [torch.zeros(1, 64)], ValueError, "1: input has 40 columns, NVFP4 expects a multiple of 16"),
        (model, "nvfp4", None, ValueError, "calibration is missing, nvfp4 takes batches"),
        (model, "int8_static", [INFINITE], ValueError, "calibration gives 0 an input that isn't finite"),
        (lambda: nn.Sequential(nn.ReLU()), "int8_token", None, ValueError, "model is Sequential and contains no nn.L"),
        (
            lambda: quantize_model(model(), "int8_token"),
            "fp8_token",
            None,
            ValueError,
            "model is Sequential, quantized already, and contains no nn.Linear",
        ),
        (lambda: nn.Sequential(Odd(4, 4)), "int8_token", None, ValueError, "0 is Odd, expected nn.Linear"),
        (lambda: {}, "int8_token", None, TypeError, "model is dict, expected a torch.nn.Module"),
    ],
)
def test_errors_leave_the_model_as_it_was(make, scheme, calibration, error, message):
    subject = make()
    before = list(subject.modules()) if isinstance(subject, nn.Module) else None
    with pytest.raises(error, match="quantize_model: " + message):
        quantize_model(subject, scheme, calibration)
    if before is not None:
        assert list(subject.modules()) == before
        assert not any(m._forward_pre_hooks for m in before)


def test_what_is_ignored_is_a_tuple_of_names():
    with pytest.raises(TypeError, match="ignore is 'lm_head', expected a tuple of names"):
        quantize_model(model(), "int8_token", ignore="lm_head")
    with pytest.raises(TypeError, match=r"the weight of 0 is torch.float64, expected bfloat16"):
        quantize_model(model().double(), "int8_token")


def test_the_weights_codes_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[127.0, -1.0], [0.0, 0.0]])
    q = quantize_model(nn.Sequential(layer), "int8_token")[0]
    assert q.weight.tolist() == [[127, -1], [0, 0]]
    assert q.weight_scale.tolist() == [[1.0], [2.0**-23]]
    assert q.input_quant_key == INT8_DYNAMIC_TOKEN
    assert isinstance(fused_ops.quantize(torch.ones(1, 2), **q.input_quant()), QuantizedActivation)


def test_what_the_calibration_may_meet():
    """Batches that give a layer no rows, and inputs by keyword."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.seldom = nn.Linear(64, 64), nn.Linear(64, 8)

        def forward(self, x, chosen):
            return self.always(input=x), self.seldom(x[:chosen])

    subject = Two()
    x = torch.randn(4, 64)
    quantize_model(subject, "fp8_static", calibration=[{"x": x, "chosen": 0}, {"x": x, "chosen": 2}])
    assert subject.seldom.input_scale == x[:2].abs().max() / 448


def test_a_prefix_that_no_operation_has_is_refused():
    layer = quantize_model(nn.Sequential(nn.Linear(64, 64)), "int8_token")[0]
    assert set(layer.input_quant("output_")) == {f"output_{name}" for name in layer.input_quant()}
    for wrong in "output", "out_", None:
        with pytest.raises(ValueError, match=rf'0: prefix is {wrong!r}, expected "output_"'):
            layer.input_quant(wrong)


def test_names_to_ignore():
    subject = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="ignore names 'lm_haed', and model has no module of that name"):
        quantize_model(subject, "int8_token", ignore=("lm_haed",))
    with pytest.raises(TypeError, match="expected a tuple of names"):
        quantize_model(subject, "int8_token", ignore=iter(["0"]))
    quantize_model(subject, "int8_token", ignore=["0"])
    assert type(subject[0]) is nn.Linear
    assert type(subject[1]) is QuantLinear


def test_codes_of_another_scheme_are_not_loaded():
    first, second = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    quantize_model(first, "fp8_token")
    quantize_model(second, "int8_token")
    before = second[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"0.weight is torch.float8_e4m3fn, expected torch.int8"):
        second.load_state_dict(first.state_dict())
    assert_same(second[0].weight, before)
    quantize_model(third := nn.Sequential(nn.Linear(64, 64)), "int8_token")
    third.load_state_dict(second.state_dict())
    assert_same(third[0].weight, before)


def test_a_plain_input_of_another_width_is_refused_by_the_layers_name():
    subject = nn.Sequential(nn.Linear(64, 8))
    quantize_model(subject, "int8_token")
    with pytest.raises(ValueError, match=r"0: x is \[2, 32\], expected \[..., 64\]"):
        subject(torch.randn(2, 32))
