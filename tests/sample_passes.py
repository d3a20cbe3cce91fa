"""Passes, and configurations of them, for the tests of managers."""

from dataclasses import dataclass

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from models_patch.passes import Backend, FusionPass, Pass, PassConfig, PassManager, PatternReplacement


@dataclass(frozen=True)
class Option(PassConfig):
    large: bool = False


class Nothing(Pass):
    """Sees graphs and leaves them."""

    def __call__(self, graph, outcome):
        for node in graph.nodes:
            if node.op == "call_function":
                outcome.matched(node, "seen")


class LargeOnly(Nothing):
    def __init__(self):
        super().__init__()
        self.least = 100 if getattr(self.config, "large", False) else 0

    def is_applicable(self, tokens):
        return tokens.lower >= self.least


class WithArgument(Nothing):
    def __init__(self, argument):
        super().__init__()


class TwiceTanh(PatternReplacement):
    factor = 2

    def inputs(self):
        return [{"x": torch.empty(3, 5)}]

    def pattern(self, x):
        return torch.tanh(x) * self.factor

    def replacement(self, x):
        return torch.tanh(x) + torch.tanh(x)


class TwiceTanhFusion(FusionPass):
    def __init__(self):
        super().__init__()
        self.register(TwiceTanh())


class Counting(CustomGraphPass):
    """A user's own, as the compiler takes it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph):
        self.graphs.append([str(node.target) for node in graph.nodes])

    def uuid(self):
        return "counting"


def run(config=None, function=lambda x: torch.tanh(x) * 2, x=None, **options):
    """The manager of a codegen-free compilation."""
    backend = Backend(PassManager.from_config(config))
    x = torch.randn(4, 5) if x is None else x
    torch.testing.assert_close(torch.compile(function, backend=backend, **options)(x), function(x))
    return backend.manager
