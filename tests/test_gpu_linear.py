"""`scaled_linear` and `QuantLinear` on a GPU: `make gpu`. What is handed to torch is tested in test_linear_gpu.py."""

import copy

import pytest
import torch
from compare import assert_same
from linear_gpu_double import DTYPES, check, check_close, exact, halves_only, quantized, stock, unsigned_zeros
from linear_gpu_double import served as served_on
from torch import nn

import fused_ops
from fused_ops import linear_products
from fused_ops.linear import exact_values, linear_inputs
from quant import FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR
from quant.methods import SCHEMES, QuantLinear

pytestmark = pytest.mark.gpu
TOKENS = 1, 3, 16, 17, 130


def architecture() -> str:
    return linear_products.architecture(torch.device("cuda", torch.cuda.current_device()))


def served() -> list[str]:
    """Schemes with a product here; none where there is no GPU, which collecting the tests needs."""
    return sorted(served_on(architecture())) if torch.cuda.is_available() else []


each_scheme = pytest.mark.parametrize("scheme", served())


def error(scheme: str) -> float:
    """Of a sum, as a share of its terms' magnitudes: Hopper keeps some 13 bits below the largest of 32 FP8 products."""
    return 2.0**-20 if scheme.startswith("int8") else 2.0**-13


def on_cpu(layer: QuantLinear) -> QuantLinear:
    return copy.deepcopy(layer).cpu()


def test_the_table_is_this_devices():
    """Schemes that it gives a product are built, and no others."""
    assert architecture() in linear_products.DEVICES
    for scheme in SCHEMES:
        if scheme in served():
            quantized(scheme, stock().cuda(), torch.randn(4, 640, device="cuda"))
        else:
            with pytest.raises(ValueError, match=f"{architecture()} has no product of "):
                quantized(scheme, stock().cuda(), torch.randn(4, 640, device="cuda"))


@each_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, *DTYPES], ids=str)
def test_the_product_is_that_of_the_decoded_values(scheme, dtype, bias):
    """And the CPU's, but for the order of sums."""
    if dtype == torch.float32 and halves_only(scheme, architecture()):
        pytest.skip("its product makes no float32")
    for tokens in TOKENS:
        compare(scheme, stock(dtype, bias is not None).cuda(), tokens, bias)


@each_scheme
@pytest.mark.parametrize(("cols", "outs"), [(4096, 1024), (1536, 576)])
def test_other_sizes(scheme, cols, outs):
    """An N of 576 is no multiple of 128, which the 1x128 product's K has to be."""
    product = SCHEMES[scheme].product(architecture())
    if outs % product.outs:
        pytest.skip(f"the {product.name} product takes multiples of {product.outs}")
    for tokens in 1, 300:
        compare(scheme, stock(cols=cols, outs=outs).cuda(), tokens)


def compare(scheme: str, model: nn.Module, tokens: int, bias: torch.dtype | None = None) -> None:
    stock = model[0]
    x = torch.randn(tokens, stock.in_features, device="cuda").to(stock.weight.dtype)
    layer = quantized(scheme, model, x)[0]
    if bias is not None:
        layer.bias = layer.bias.to(bias)
    cpu, q = on_cpu(layer), fused_ops.quantize(x, **layer.input_quant())
    y, expected = layer(q), exact(cpu, q.to("cpu"))
    context = f"{tokens} x {stock.in_features} x {stock.out_features}"
    assert (y.shape, y.dtype, y.device.type) == ((tokens, stock.out_features), x.dtype, "cuda")
    twice = layer.bias is not None and halves_only(scheme, architecture())
    check_close(y.cpu(), *expected, context, error(scheme) + twice * torch.finfo(y.dtype).eps)
    check_close(cpu(x.cpu()), *expected, f"on the CPU: {context}")
    assert_same(layer(x), y, context)


@pytest.mark.parametrize("key", [FP8_STATIC_TENSOR, FP8_DYNAMIC_TOKEN], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_scale_for_the_whole_weight(key, dtype):
    if "fp8_token" not in served():
        pytest.skip("no FP8 here")
    key = linear_products.native(key, architecture())
    for tokens in TOKENS:
        x, w, _, _ = linear_inputs(tokens, 640, 256, key, "cuda")
        y = fused_ops.scaled_linear(x, w, torch.tensor([0.25], device="cuda"), out_dtype=dtype).cpu()
        values, weight = exact_values(x.data.cpu(), x.scale.cpu(), key), w.cpu().double() * 0.25
        check_close(y, values @ weight.t(), values.abs() @ weight.abs().t(), f"{tokens} rows", error("fp8"))


@each_scheme
def test_a_model_that_moves(scheme):
    """From the CPU and back; its state dict stays the same, and can be loaded on either side."""
    x = torch.randn(9, 640).bfloat16()
    cpu = quantized(scheme, stock(), x)
    moved = copy.deepcopy(cpu).to("cuda")
    y = moved(x.cuda())
    q = fused_ops.quantize(x.cuda(), **moved[0].input_quant()).to("cpu")
    check(y.cpu(), cpu[0], q, "moved", error(scheme), sums=halves_only(scheme, architecture()))
    for name, tensor in cpu.state_dict().items():
        actual = moved.state_dict()[name].cpu()
        assert_same(*(unsigned_zeros(t) if architecture() == "gfx942" else t for t in (actual, tensor)), name)
    assert_same(copy.deepcopy(moved).cpu()(x), cpu(x))
    other = quantized(scheme, stock().cuda(), x.cuda())
    other.load_state_dict(cpu.state_dict())
    assert_same(other(x.cuda()), y)


@each_scheme
def test_producers_hand_over_what_the_layer_takes(scheme):
    x, r = torch.randn(2, 5, 640, device="cuda").bfloat16()
    w = torch.randn(640, device="cuda")
    layer = quantized(scheme, stock().cuda(), x)[0]
    for backend in ("triton",) if torch.version.hip else ("cuda", "triton"):
        with fused_ops.use_backend(backend):
            q, _ = fused_ops.fused_add_rms_norm_quant(x, r, w, 1e-6, **layer.input_quant())
            normed = fused_ops.fused_add_rms_norm(x, r, w, 1e-6)[0]
            again = fused_ops.quantize(normed, **layer.input_quant())
        assert_same(layer(q), layer(again))


@each_scheme
@pytest.mark.parametrize("tokens", [3, 32])
def test_a_captured_graph_replays_with_new_inputs(scheme, tokens):
    x = torch.randn(tokens, 640, device="cuda").bfloat16()
    layer = quantized(scheme, stock().cuda(), x)[0]
    fused_ops.warmup(lambda: layer(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    layer.state_dict()  # moves nothing that the graph reads
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_same(y, layer(x))


@each_scheme
def test_compiled(scheme):
    torch._dynamo.reset()
    x = torch.randn(5, 640, device="cuda").bfloat16()
    layer = quantized(scheme, stock().cuda(), x)[0]
    with torch.no_grad():
        assert_same(torch.compile(layer, fullgraph=True)(x), layer(x))


@each_scheme
def test_given_results_and_no_rows(scheme):
    x = torch.randn(5, 640, device="cuda").bfloat16()
    layer = quantized(scheme, stock(bias=False).cuda(), x)[0]
    q, expected = fused_ops.quantize(x, **layer.input_quant()), layer(x)
    memory = torch.full((5, 300), 7.0, device="cuda").bfloat16()
    for out in torch.empty_like(expected), memory[:, 8:264]:
        options = {"weight_scale2": layer._buffers.get("weight_scale2"), "weight_sums": layer._buffers["weight_sums"]}
        fused_ops.scaled_linear(q, layer.weight, layer.weight_scale, out_dtype=x.dtype, out=out, **options)
        assert_same(out.contiguous(), expected)
    assert (memory[:, :8] == 7).all()
    assert (memory[:, 264:] == 7).all()
    assert layer(x[:0]).shape == (0, 256)


def test_what_is_not_served_is_refused_and_the_reference_serves_it():
    if architecture() != "sm_90" or "fp8_block" not in served():
        pytest.skip("the 1x128 product is Hopper's")
    x, model = torch.randn(5, 640, device="cuda").bfloat16(), stock().cuda()
    layer = quantized("fp8_block", model)[0]
    q = fused_ops.quantize(x, layer.input_quant_key)
    with pytest.raises(ValueError, match="pad_rows=4"):
        layer(q)
    row_major = fused_ops.quantize(x, SCHEMES["fp8_block"].input_quant_key)
    arguments = row_major, layer.weight, layer.weight_scale
    with pytest.raises(ValueError, match=r"the cuda backend does not serve .*TMA_ALIGNED.*use_backend\('reference'\)"):
        fused_ops.scaled_linear(*arguments, out_dtype=torch.bfloat16)
    with fused_ops.use_backend("reference"):
        y = fused_ops.scaled_linear(*arguments, layer.bias, out_dtype=torch.bfloat16)
    check(y.cpu(), on_cpu(layer), row_major.to("cpu"), "reference")


def test_layers_after_one_another():
    """The second takes what the first one's result was quantized to, by an activation between."""
    model = nn.Sequential(nn.Linear(640, 512), nn.Linear(256, 640)).bfloat16().cuda()
    x = torch.randn(7, 640, device="cuda").bfloat16()
    for scheme in set(served()) & {"fp8_token", "fp8_block", "int8_token"}:
        up, down = (quantized(scheme, nn.Sequential(layer))[0] for layer in model)
        gate_up = up(x)
        q = fused_ops.silu_mul_quant(*gate_up.chunk(2, -1), **down.input_quant())
        halves = halves_only(scheme, architecture())
        check(down(q).cpu(), on_cpu(down), q.to("cpu"), scheme, error(scheme), sums=halves)
