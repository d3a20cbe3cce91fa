"""Patterns are found in every spelling, at any size, and what isn't found says why."""

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from models_patch.passes import Backend, FusionPass, PassManager, PatternReplacement

CAP = 30.25


class DoubledRelu(PatternReplacement):
    def inputs(self):
        return [{"x": torch.empty(3, 5)}]

    def pattern(self, x):
        return torch.relu(x) * 2

    def replacement(self, x):
        return (torch.relu(x) * 2).clone()


class DoubledTanh(PatternReplacement):
    inputs = DoubledRelu.inputs

    def pattern(self, x):
        return torch.tanh(x) * 2

    def replacement(self, x):
        return (torch.tanh(x) * 2).clone()


class Rooted(PatternReplacement):
    """1 / sqrt of what a cap is added to; two results."""

    def inputs(self):
        return [{"x": torch.empty(3, 5, dtype=dtype), "cap": CAP} for dtype in (torch.float32, torch.bfloat16)]

    def pattern(self, x, cap):
        total = (x * x).mean(-1, keepdim=True) + cap
        return total.rsqrt(), total

    def replacement(self, x, cap):
        total = (x * x).mean(-1, keepdim=True) + cap
        return total.rsqrt().clone(), total


class Flat(Rooted):
    def pattern(self, x, cap):
        total = (x * x).mean(-1) + cap
        return total.rsqrt(), total


class Refusing(Rooted):
    def replacement(self, x, cap):
        raise ValueError("not today")


class Shrinking(Rooted):
    def replacement(self, x, cap):
        return x[..., :1], x[..., :2]


class Short(Rooted):
    def replacement(self, x, cap):
        return x[..., :1]


class Checked(Rooted):
    def check(self, x, cap):
        return "" if isinstance(cap, float) and cap > 1 else f"cap is {cap}"


class Writing(Rooted):
    def replacement(self, x, cap):
        total = x.square_().mean(-1, keepdim=True) + cap
        return total.rsqrt(), total


class Halved(Rooted):
    def replacement(self, x, cap):
        return None, x[..., :1].clone()


class Apart(PatternReplacement):
    """Two results that only their input connects."""

    def inputs(self):
        return [{"x": torch.empty(3, 5)}]

    def pattern(self, x):
        return x.exp(), torch.sqrt(x)

    def replacement(self, x):
        return x.exp().clone(), torch.sqrt(x).clone()


class Returning(Apart):
    def pattern(self, x):
        return x.exp(), x


class Grouped(PatternReplacement):
    """A norm by groups of four."""

    def inputs(self):
        return [{"x": torch.empty(3, 8)}]

    def pattern(self, x):
        rows = x.reshape(-1, 4)
        return (rows * rows.square().mean(-1, keepdim=True).rsqrt()).reshape(3, 8)

    def replacement(self, x):
        return self.pattern(x).clone() if x.shape == (3, 8) else x


def find(function, *inputs, pattern=Rooted, dynamic=None):
    """(matches, reasons of misses) of a pattern in a function, whose results stay what they are."""
    torch._dynamo.reset()
    fusion = FusionPass()
    fusion.register(pattern())
    backend = Backend(PassManager([("fusion", fusion)]))
    with torch.no_grad():
        actual = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
        expected = function(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    report = backend.manager.report()
    return len(report.sites), [site.reason for site in report.misses]


def rooted(x, cap=2.0):
    return torch.rsqrt(cap + x.square().mean(-1, keepdim=True))


@pytest.mark.parametrize(
    "function",
    [
        rooted,
        lambda x: (x.pow(2).mean(dim=-1, keepdim=True) + 2.0).rsqrt(),
        lambda x: torch.rsqrt((x * x).mean(x.dim() - 1, True) + 2.0),
        lambda x: rooted(x) * (x * x).sum(),  # the square has another user
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (2, 3, 64), (7, 1, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spellings_and_sizes(function, shape, dtype):
    assert find(function, torch.randn(shape).to(dtype)) == (1, [])


def test_symbolic_sizes_and_numbers():
    assert find(rooted, torch.randn(4, 5), dynamic=True) == (1, [])
    assert find(lambda x, cap: rooted(x, cap), torch.randn(4, 5), 3.5, dynamic=True) == (1, [])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.rsqrt(x.mean(-1, keepdim=True) + 2.0), "arg0_1 is an input, expected square"),
        (lambda x: torch.rsqrt(x.square().mean(0, keepdim=True) + 2.0), "expected -1, found -2"),
        (lambda x: torch.rsqrt(x.square().mean(-1, keepdim=True) + x), "arg0_1 is no number"),
        (lambda x: torch.rsqrt(x.square().mean(-1, True) + x.sum()), "sum_1 is no number"),
        (lambda x: torch.rsqrt(x.square().mean(-1) + 2.0), "mean has the default keepdim, expected True"),
    ],
)
def test_the_first_condition_that_failed_is_named(function, reason):
    matches, reasons = find(function, torch.rand(4, 4))
    assert matches == 0
    assert len(reasons) == 1
    assert any(part in reasons[0] for part in reason.split("|")), reasons


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (Refusing, "refused: not today"),
        (Shrinking, r"its result is float32[4, 2], where the graph has float32[4, 1]"),
        (Halved, "a result of the replacement is None, expected a tensor"),
        (Short, "the replacement has 1 results, and the pattern 2"),
        (Checked, "cap is 0.5"),
        (Flat, "mean has keepdim True, expected none"),
        (Writing, "the replacement writes in place, by aten.square_.default|aten.copy_.default"),
    ],
)
def test_what_is_found_and_must_stay_stays(pattern, reason):
    matches, (found,) = find(lambda x: rooted(x, 0.5), torch.randn(4, 5), pattern=pattern)
    assert matches == 0
    assert found.startswith(reason.partition(", by")[0])


def test_what_must_stay_is_nearer_than_a_part_of_another_pattern():
    """A norm without weight is all there is, one with a weight almost."""
    torch._dynamo.reset()
    backend = Backend()
    with torch.no_grad():
        torch.compile(lambda x: x * rooted(x, 1e-6), backend=backend)(torch.randn(5, 4).T)
    (miss,) = backend.manager.report().misses
    assert miss.reason == "refused: rms_norm: x has strides (1, 4), expected a contiguous last dimension"


def test_patterns_of_one_file_with_the_same_inputs_are_told_apart():
    for pattern in DoubledRelu, DoubledTanh:
        assert find(lambda x: (torch.relu(x) * 2, torch.tanh(x) * 2), torch.randn(4, 5), pattern=pattern) == (1, [])
    assert DoubledRelu().uuid() != DoubledTanh().uuid()


def test_results_that_only_an_input_connects():
    assert find(lambda x: (torch.sqrt(x), x.exp()), torch.rand(4, 5), pattern=Apart) == (1, [])
    assert find(lambda x: (torch.sqrt(x + 1), x.exp()), torch.rand(4, 5), pattern=Apart)[0] == 0


class Holding(Rooted):
    def pattern(self, x, cap):
        return ((x * x).mean(-1, keepdim=True) + cap).rsqrt() * torch.tensor(2.0)


class Unknown(Rooted):
    """AttributeErrors, wherever they are wanted."""

    def __init__(self, wrong):
        self.wrong = wrong

    def inputs(self):
        return self._of("inputs") or super().inputs()

    def pattern(self, x, cap):
        return self._of("pattern") or super().pattern(x, cap)

    def check(self, x, cap):
        return self._of("check") or ""

    def replacement(self, x, cap):
        return self._of("replacement") or super().replacement(x, cap)

    def _of(self, method):
        return torch.unknown if method == self.wrong else None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Returning, r"Returning\.pattern: ValueError: it returns .*, expected only what it computes"),
        (Holding, r"Holding\.pattern: ValueError: it holds a tensor of its own, expected only its inputs and numbers"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        pattern().patterns()


@pytest.mark.parametrize("method", ["inputs", "pattern", "check", "replacement"])
def test_an_error_in_a_pattern_is_raised_by_its_name(method):
    message = rf"Unknown\.{method}: AttributeError: module 'torch' has no attribute"
    with pytest.raises(BackendCompilerFailed, match=message):
        find(rooted, torch.randn(4, 5), pattern=lambda: Unknown(method))


def test_nothing_alike_is_no_miss():
    assert find(lambda x: x.exp() + 1, torch.randn(4, 5)) == (0, [])


def test_several_users_of_an_intermediate_keep_it():
    def function(x):
        total = x.square().mean(-1, keepdim=True) + 2.0
        return total.rsqrt(), total * 3, x * total

    assert find(function, torch.randn(4, 5)) == (1, [])


def test_sizes_of_reshapes_in_a_pattern_count():
    def grouped(group):
        def function(x):
            rows = x.reshape(-1, group)
            return (rows * rows.square().mean(-1, keepdim=True).rsqrt()).reshape(x.shape)

        return function

    assert find(grouped(4), torch.randn(3, 8), pattern=Grouped) == (1, [])
    matches, (reason,) = find(grouped(8), torch.randn(3, 8), pattern=Grouped)
    assert matches == 0
    assert "has other sizes" in reason or "expected reshape" in reason


@pytest.mark.parametrize("copy", [lambda x: x * 1, lambda x: x.to(torch.float32, copy=True), lambda x: x / 1])
def test_copies_that_compute_nothing_stay_copies(copy):
    """What they are of is written, or they are returned."""

    def written(x):
        y = copy(x)
        x.add_(1)
        return y

    for function in written, copy, lambda x: (x * 2, x * 2), lambda x: (torch.zeros(3), torch.zeros(3)):
        torch._dynamo.reset()
        x, again = torch.arange(6.0), torch.arange(6.0)
        with torch.no_grad():
            made, expected = torch.compile(function, backend=Backend())(x), function(again)
        torch.testing.assert_close(made, expected)
        torch.testing.assert_close(x, again)
        results = [x, *(made if isinstance(made, tuple) else (made,))]
        assert len({result.data_ptr() for result in results}) == len(results), "memory of its own"
