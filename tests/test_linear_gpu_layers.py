"""Layers laid out for GPUs that move, are saved and loaded."""

import copy

import pytest
import torch
from compare import assert_same
from linear_gpu_double import (
    COLS,
    each_place,
    quantized,
    stock,
    unsigned_zeros,
)

from fused_ops import linear_products
from quant.key import FP4
from quant.methods import SCHEMES


@each_place
def test_a_layer_that_moves_is_laid_out_anew(scheme, arch, pretend):
    """To "meta", which stands for a GPU here."""
    layer = quantized(scheme, stock())[0]
    scale, key = layer.weight_scale, layer.input_quant_key
    pretend(arch, "meta")
    there = copy.deepcopy(layer).to("meta")
    product = SCHEMES[scheme].product(arch)
    assert there.input_quant_key == product.activation(linear_products.native(key, arch))
    assert there.weight.dtype == (torch.uint8 if product.dtype == FP4 else product.dtype)
    assert there.input_quant()["pad_rows"] == product.pad_rows
    expected = linear_products.arrange(scale, SCHEMES[scheme].weight_key, product)
    assert (there.weight_scale.shape, there.weight_scale.stride()) == (expected.shape, expected.stride())
    assert there.state_dict()["weight_scale"].shape == scale.shape
    assert (there._buffers["weight_sums"] is None) == (scheme != "int8_static_asym")
    again = copy.deepcopy(there).to_empty(device="cpu")
    assert (again.weight_scale.shape, again.input_quant_key) == (scale.shape, key)
    assert again.input_quant()["pad_rows"] == 1
    assert again.weight.dtype == layer.weight.dtype


def test_a_layer_that_can_not_move_stays(pretend):
    layer = quantized("fp8_group64", stock())[0]
    pretend("sm_90", "meta")
    with pytest.raises(ValueError, match="sm_90 has no product of FP8_DYNAMIC_GROUP_64 with a weight of "):
        layer.to("meta")
    assert layer.weight.device.type == "cpu"
    layer(torch.randn(3, COLS).bfloat16())


def test_neither_does_one_whose_result_the_product_does_not_make(pretend):
    """It moves in float32 no more than it is built so, nor is it cast there."""
    layer = quantized("fp8_block", stock(torch.float32))[0]
    pretend("sm_100", "meta")
    message = r"the activations' dtype is torch.float32, the flashinfer 1x128 sm_10x product makes torch.bfloat16 and"
    with pytest.raises(ValueError, match=message):
        layer.to("meta")
    assert layer.weight.device.type == layer.bias.device.type == "cpu"
    layer(torch.randn(3, COLS))
    there = copy.deepcopy(layer).to("meta", torch.bfloat16)
    assert there.input_quant()["pad_rows"] == 36
    with pytest.raises(ValueError, match=message):
        there.float()
    assert there.bias.dtype == torch.bfloat16
    layer.bfloat16().to("meta").half()


@each_place
def test_state_dicts_are_those_of_a_cpu(scheme, arch, pretend, decoded):
    x, model = torch.randn(40, COLS).bfloat16(), stock()
    cpu = quantized(scheme, model, x)[0]
    y = cpu(x)
    pretend(arch)
    layer, other = quantized(scheme, model, x)[0], quantized(scheme, stock(), x)[0]
    assert layer.state_dict().keys() == cpu.state_dict().keys()
    for name, tensor in cpu.state_dict().items():
        actual = layer.state_dict()[name]
        assert actual.dtype == tensor.dtype
        assert_same(*(unsigned_zeros(t) if arch == "gfx942" else t for t in (actual, tensor)), name)
    places = {name: (buffer.data_ptr(), buffer.stride()) for name, buffer in other.named_buffers()}
    other.load_state_dict(cpu.state_dict())
    assert {name: (buffer.data_ptr(), buffer.stride()) for name, buffer in other.named_buffers()} == places
    assert_same(other(x), layer(x))
    assert_same(copy.deepcopy(layer)(x), layer(x))
    assert (layer(x).double() - y.double()).abs().max() <= 2.0**-7 * y.double().abs().max()


def test_codes_are_not_taken_for_others(pretend):
    """A state dict has float8_e4m3fn on gfx942 too."""
    pretend("gfx942")
    layer = quantized("fp8_token", stock())[0]
    state = layer.state_dict()
    for weight in layer.weight, state["weight"].view(torch.int8):
        with pytest.raises(RuntimeError, match=f"weight is {weight.dtype}, expected torch.float8_e4m3fn as "):
            layer.load_state_dict(state | {"weight": weight})
