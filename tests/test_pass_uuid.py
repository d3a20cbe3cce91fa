"""What the compiler's cache knows a manager by: another as soon as anything counts, and the same in every process."""

import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from sample_passes import Counting, LargeOnly, Nothing, Option, TwiceTanhFusion, run

from models_patch.passes import (
    HOOKS,
    POST_GRAD,
    Backend,
    FusionPass,
    PassConfig,
    PassManager,
    PatternReplacement,
    compile_range,
    use_config,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

_UUID = """
import sys
sys.path.insert(0, {folder!r})
from models_patch.passes import PassConfig, PassManager
print(PassManager.from_config(PassConfig(pass_pipeline=["own.Own", "models_patch.passes.lift_norm.LiftNorm"])).uuid())
"""
_OWN = """
import torch
from models_patch.passes import FusionPass, PatternReplacement

class Twice(PatternReplacement):
    def inputs(self):
        return [{{"x": torch.empty(3, 5), "cap": {example}}}]

    def pattern(self, x, cap):
        return torch.tanh(x) * {factor}

    def replacement(self, x, cap):
        return x

class Own(FusionPass):
    def __init__(self):
        super().__init__()
        self.register(Twice())
"""


def test_the_uuid_is_that_of_the_sources(tmp_path, monkeypatch):
    """Equal in two processes, another as soon as a pattern or what it is made with changes."""
    monkeypatch.syspath_prepend(tmp_path)

    def uuid(name="own", example=1.5, factor=2):
        (tmp_path / f"{name}.py").write_text(_OWN.format(example=example, factor=factor))
        own = importlib.import_module(name).Own
        return PassManager.from_config(PassConfig(pass_pipeline=[own, "models_patch.passes.lift_norm.LiftNorm"])).uuid()

    here = uuid()
    script = _UUID.format(folder=str(tmp_path))
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert there.strip() == here
    assert len({here, uuid("other_pattern", factor=3), uuid("other_example", example=2.5)}) == 3


def test_what_else_changes_the_uuid(monkeypatch):
    def uuid(*items, config=None, hook=POST_GRAD):
        pairs = [(type(item).__name__, item) for item in items]
        return PassManager(pairs, hook, config).uuid()

    nothing, large = Nothing(), LargeOnly()
    uuids = [uuid(), uuid(nothing), uuid(nothing, large), uuid(large, nothing), uuid(nothing, hook=HOOKS[0])]
    uuids += [uuid(nothing, config=Option()), uuid(nothing, config=Option(large=True))]
    large.least = 7
    uuids.append(uuid(nothing, large))
    with compile_range(1, 8):
        uuids.append(uuid(nothing))
    with compile_range(1, 9):
        uuids.append(uuid(nothing))
    twice = TwiceTanhFusion()
    uuids.append(uuid(twice))
    twice.replacements[0].factor = 3
    uuids.append(uuid(twice))
    for name in "sources", "versions":
        with monkeypatch.context() as patched:
            patched.setattr(f"models_patch.passes.manager.{name}", lambda: "others")
            uuids.append(uuid(nothing))
    assert len(set(uuids)) == len(uuids)
    assert uuid(Nothing()) == uuid(Nothing())

    class Uncachable(Counting):
        def uuid(self):
            return None

    assert uuid(nothing, Uncachable()) is None


class Replaced(PatternReplacement):
    def __init__(self, function):
        self.function = function

    def inputs(self):
        return [{"x": torch.empty(3, 5)}]

    def pattern(self, x):
        return self.function(x)

    def replacement(self, x):
        return x + 1


def fused(function):
    fusion = FusionPass()
    fusion.register(Replaced(function))
    return fusion


def test_functions_of_one_name_are_told_apart():
    functions = [
        lambda x: x.tanh() * 2,
        lambda x: x.erf() * 2,
        *(_times(factor) for factor in (2.0, 3.0, *torch.arange(2))),
    ]
    assert len({fused(function).uuid() for function in functions}) == len(functions)
    x = torch.randn(4, 5)
    for function in functions[:2]:  # what one was traced to isn't the other's
        torch._dynamo.reset()
        backend = Backend(PassManager([("fusion", fused(function))]))
        assert torch.equal(torch.compile(lambda x: x.tanh() * 2, backend=backend)(x), x + 1) == (
            function is functions[0]
        )


def _doubled(function):
    class Doubled(PatternReplacement):
        def inputs(self):
            return [{"x": torch.empty(3, 5)}]

        def pattern(self, x):
            return function(x) * 2

        def replacement(self, x):
            return (function(x) * 2).clone()

    return Doubled


REDEFINED = """
class Cell(PatternReplacement):
    def inputs(self):
        return [{{"x": torch.empty(3, 5)}}]

    def pattern(self, x):
        return torch.{0}(x) * 2

    def replacement(self, x):
        return (torch.{0}(x) * 2).clone()
"""


def _cell(name):
    """As in a notebook, where a cell is changed and run again."""
    there = {"__name__": "__main__", "torch": torch, "PatternReplacement": PatternReplacement}
    exec(REDEFINED.format(name), there)
    return there["Cell"]


@pytest.mark.parametrize("make", [lambda name: _doubled(getattr(torch, name)), _cell], ids=["in a function", "cell"])
def test_classes_of_one_name_are_told_apart(make):
    patterns = make("relu")(), make("tanh")()
    assert patterns[0].uuid() != patterns[1].uuid() == make("tanh")().uuid()
    x = torch.randn(4, 5)
    for pattern in patterns:
        torch._dynamo.reset()
        fusion = FusionPass()
        fusion.register(pattern)
        manager = PassManager([("fusion", fusion)])
        for mine, stock in zip(torch.compile(_both, backend=Backend(manager))(x), _both(x), strict=True):
            assert torch.equal(mine, stock)
        assert sum(manager.report().operations.values()) == 1


def _both(x):
    return torch.relu(x) * 2, torch.tanh(x) * 2


def _times(factor):
    return lambda x: x.tanh() * factor


def test_a_pass_made_with_another_configuration_is_another():
    made = []
    for large in False, True:
        with use_config(Option(large=large)):
            made.append(Nothing().uuid())
    assert made[0] != made[1]


def test_managers_are_copied_and_pickled_without_what_they_saw():
    manager = run(PassConfig(pass_pipeline=[TwiceTanhFusion]))
    assert manager.report().operations == {"TwiceTanh": 1}
    copy = pickle.loads(pickle.dumps(manager))
    assert not copy.report().graphs
    assert copy.uuid() == manager.uuid()
