"""Numerical comparison: the one place for tolerances. See `docs/numerics.md` for the promises behind them."""

from math import exp, log, sqrt

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Between backends, results of norms and activations may differ by one step of a 16-bit dtype (the sum's order, exp),
# in at most this share of elements: a value must lie that close to a rounding boundary.
NEIGHBOURS = 1 / 5000
# float32 results carry the sum's and exp's own rounding errors, in units of the last place.
FLOAT32_ULP = 6
# Logits of whole models: a share of the largest in float32, and by how much a token must lead in bfloat16, and where
# layers are quantized.
LOGITS, MARGIN, QUANTIZED_MARGIN = 1e-5, 0.5, 0.75
# By how much the log likelihood of a token differs between two orders of sums: in bfloat16 the standard deviation, and
# so with layers quantized to INT8 by token or FP8 (0.18 to 0.31 between two engines), where a code turns now and then.
LIKELIHOOD = {torch.float32: 1e-5, torch.bfloat16: 0.058, torch.int8: 0.28}
# Two quantizations of a model by the same scheme, whose scales are over other columns, differ in their errors.
QUANTIZED_ALIKE = 1.5
# Another run of a layer quantized alike: how far its logits may be, of what quantizing it costs. Those of vLLM are 0.47
# (with the plug-in) and 0.59 of that away, those of a layer that isn't quantized 1. With many layers all are.
SAME_SCHEME = 0.75
# By what factor simulated times of collectives are off the measured ones, each and typically: with more ranks than
# cores these vary by two themselves.
SIMULATED, SIMULATED_TYPICALLY = 2.5, 1.4

# Where a value between two products is of another order of sums, its code may be the next one: by how much a result
# may differ then, of the largest. And what quantizing both products may cost, by scheme, as a relative error (norm).
NEXT_CODE = 0.02
EXPERTS_ERROR = {"int8_token": 0.03, "fp8_token": 0.08, "nvfp4": 0.35}


# Attention on GPUs rounds its weights to S, and those of others or of MLA more on the way; its sums are float32, whose
# logits' rounding errors are relative errors of the weights: steps of the largest term.
ATTENTION_STEPS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 64}
# Attention's float32 sums in another order, of the largest result.
ATTENTION_ERROR = 2**-17


def ordered(x: Tensor) -> Tensor:
    """Integers in the order of x's values, neighbouring values one apart; -0 and +0 are the same."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    signed = x.contiguous().view(bits).long()
    magnitude = signed & (2 ** (8 * x.element_size() - 1) - 1)
    return torch.where(signed < 0, -magnitude, magnitude)


def steps(actual: Tensor, expected: Tensor) -> Tensor:
    """How many representable values lie between each pair; NaNs are equal to each other and far from all else."""
    apart = (ordered(actual) - ordered(expected)).abs()
    nan, other = actual.isnan(), expected.isnan()
    return torch.where(nan | other, torch.where(nan & other, 0, 1 << 40), apart)


def assert_close(
    actual: Tensor, expected: Tensor, context: str = "", roundings: int = 1, terms: Tensor | None = None
) -> None:
    """Results of two backends: at most a step apart, and seldom; float32 within a few ulp.

    roundings: with a second rounding (Llama's, before the weight) the first one's step may become two in the product.
    terms: where the result is a sum of terms that may cancel, the largest's magnitude: steps are of its size.
    """
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), context
    apart = steps(actual, expected)
    if terms is not None:
        step = 2.0 ** (terms.double().abs().clamp_min(1e-30).log2().floor()) * torch.finfo(actual.dtype).eps
        far = float(1 << 40)
        cancelled = ((actual.double() - expected.double()).abs() / step).round().nan_to_num(far).clamp(max=far).long()
        apart = torch.minimum(apart, cancelled)
    if actual.dtype == torch.float32:
        assert (apart <= FLOAT32_ULP).all(), f"{context}: {apart.max()} ulp apart"
    else:
        assert (apart <= roundings).all(), f"{context}: {apart.max()} steps apart"
        allowed = 1 + roundings * NEIGHBOURS * apart.numel()  # one boundary case is always allowed
        assert (apart > 0).sum() <= allowed, f"{context}: {int((apart > 0).sum())} of {apart.numel()} elements differ"


def assert_attends(actual: Tensor, exact: Tensor, terms: Tensor, context: str = "") -> None:
    """Results of attention against float64, in steps of S relative to `terms`, the weighted values' magnitudes."""
    assert actual.shape == exact.shape, context
    error = (actual.double() - exact).abs() / (terms * torch.finfo(actual.dtype).eps).clamp_min(1e-300)
    error = error.nan_to_num(float("inf"))
    assert error.numel() == 0 or error.max() <= ATTENTION_STEPS[actual.dtype], f"{context}: {error.max()} steps"


def assert_logits_close(actual: Tensor, expected: Tensor) -> None:
    """Logits of float32 models of a few layers whose attentions add up in another order."""
    assert (actual.shape, actual.dtype) == (expected.shape, torch.float32)
    apart = (actual - expected).abs().max() / expected.abs().max()
    assert apart <= LOGITS, f"{apart:.2g} of the largest logit apart"


def assert_same_choice(actual: Tensor, expected: Tensor, margin: float = MARGIN) -> None:
    """Logits [..., vocabulary] choose the same token wherever the choice is clear."""
    first, second = expected.float().topk(2).values.unbind(-1)
    clear = first - second > margin
    assert clear.float().mean() > (0.5 if margin == MARGIN else 0.4)
    assert torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def assert_same(actual: Tensor | None, expected: Tensor | None, context: str = "") -> None:
    """The same shape, dtype, strides and bytes; any NaN equals any other of its sign-less kind."""
    if actual is None or expected is None:
        assert actual is expected, context
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), f"{context}: {actual.dtype}{actual.shape}"
    assert actual.stride() == expected.stride() or actual.numel() <= 1 or 1 in actual.shape, (
        f"{context}: strides {actual.stride()}, expected {expected.stride()}"
    )
    a, e = raw(actual), raw(expected)
    assert torch.equal(a, e), f"{context}: {int((a != e).sum())} of {a.numel()} elements differ in their bits"


def raw(x: Tensor) -> Tensor:
    """The bits of x as integers, every NaN the same."""
    if x.is_floating_point() and x.element_size() > 1:
        x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(bits) if x.element_size() > 1 else x.contiguous().view(torch.uint8)


def assert_attention(actual: Tensor, exact: Tensor, theirs: Tensor, context: str = "") -> None:
    """Attention, beside torch's own in float32: at most twice as far from the float64 result, and rounded once.

    Each element of a 16-bit result may be half a step further away, since that is what rounding it costs, and nothing
    else. So no 16-bit attention is much closer; torch's rounds once too, and its largest error is the same.
    """
    other = (theirs.double() - exact).abs().max().item() if theirs.numel() else 0.0
    info = torch.finfo(actual.dtype)
    half = 0.0 if info.bits == 32 else 2.0 ** exact.abs().clamp_min(info.tiny).log2().floor() * info.eps / 2
    beyond = (actual.double() - exact).abs() - half
    assert (beyond <= 2 * other).all(), f"{context}: {beyond.max()} beyond rounding, torch {other}"


def assert_attention_close(actual: Tensor, expected: Tensor, context: str = "") -> None:
    """Attention of two backends: a step of the dtype apart, and what sums in another order may differ by."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), context
    a, e = actual.double(), expected.double()
    largest = e.abs().max() if e.numel() else 0.0
    allowed = e.abs() * torch.finfo(actual.dtype).eps + ATTENTION_ERROR * largest
    assert ((a - e).abs() <= allowed).all(), f"{context}: {(a - e).abs().max()} apart, the largest is {largest}"


def assert_predicts_alike(actual: Tensor, expected: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
    """Logits [n, vocabulary] of models of this dtype give a text [n] the same perplexity, and make the same choices.

    dtype: of weights and activations; int8 for layers that are quantized, to any format of eight bits.
    """
    a, e = (cross_entropy(logits[:-1].float(), ids[1:]) for logits in (actual, expected))
    allowed = LIKELIHOOD[dtype] * (1 if dtype == torch.float32 else 3 / (len(ids) - 1) ** 0.5)
    assert abs(a - e) < allowed, f"log likelihoods a token are {abs(a - e):.2g} apart"
    assert_same_choice(actual, expected, QUANTIZED_MARGIN if dtype == torch.int8 else MARGIN)


def assert_as_near(actual: Tensor, exact: Tensor, theirs: Tensor) -> None:
    """Logits of a quantized model, beside another quantization of it: about as far from those that aren't quantized."""
    mine, other = ((logits.double() - exact).square().mean().sqrt() for logits in (actual, theirs))
    assert mine <= QUANTIZED_ALIKE * other, f"{mine:.4g} from the exact logits, the other {other:.4g}"


def assert_same_scheme(actual: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Logits of one layer: much nearer to those of its other quantization than these are to the unquantized ones."""
    mine, other = ((a.double() - expected.double()).square().mean().sqrt() for a in (actual, exact))
    assert mine <= SAME_SCHEME * other, f"{mine:.4g} from the same scheme's logits, the unquantized {other:.4g}"


def assert_as_near_as(actual: Tensor, expected: Tensor, theirs: Tensor, of_theirs: Tensor) -> None:
    """Ours differs from what it is to be at most as much as theirs does: by the mean square, of all elements."""
    mine, other = (
        (a.double() - e.double()).square().mean().sqrt() for a, e in ((actual, expected), (theirs, of_theirs))
    )
    assert mine <= other, f"{mine:.4g} apart, theirs {other:.4g}"


def assert_codes_close(actual: Tensor, exact: Tensor) -> None:
    """Two products with codes between them, against float64 ones with codes of their own."""
    assert actual.shape == exact.shape
    if actual.numel():
        apart = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert apart <= NEXT_CODE, f"{apart:.2g} of the largest apart"


def assert_simulated(ratios: dict[str, float]) -> None:
    """Simulated over measured times: none far off, and few by much."""
    far = {name: ratio for name, ratio in ratios.items() if not 1 / SIMULATED <= ratio <= SIMULATED}
    assert not far, f"off by more than {SIMULATED}: {far}"
    typically = exp(sqrt(sum(log(ratio) ** 2 for ratio in ratios.values()) / len(ratios)))
    assert typically <= SIMULATED_TYPICALLY, f"off by {typically:.2f} typically"
