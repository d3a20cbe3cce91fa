"""Numbers that `torch.compile(dynamic=True)` makes inputs of a graph, such as a norm's eps.

An operation takes numbers as they are, as a model that is patched by hand shows it: guarded, and part of the graph. So
Dynamo starts again with them as constants, as it does where the compiler itself can't take a number as a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Graph

from .compiler import (
    CustomGraphPass,
    FakeTensor,
    ShapeEnv,
    SymT,
    TensorifyScalarRestartAnalysis,
    TensorifyState,
    hints,
    symbol_is_type,
)
from .config import use_config
from .fusion import FusionPass, Outcome
from .manager import PassManager, current_compilation
from .matcher import value


@dataclass(frozen=True)
class SpecializeFloats(CustomGraphPass):
    """For Inductor, at `HOOK`: exceptions of later hooks don't reach Dynamo as what they are.

    manager: whose patterns tell whether a number is wanted. All of the graph's are constants then.
    """

    HOOK: ClassVar[str] = "joint_custom_pre_pass"
    manager: PassManager

    def __call__(self, graph: Graph) -> None:
        if _floats(graph) is not None and self._are_wanted(graph):
            self.manager.ran.asked.discard(current_compilation())  # which ends here
            specialize_floats(graph)

    def _are_wanted(self, graph: Graph) -> bool:
        copied, outcome = Graph(), Outcome()
        copied.output(copied.graph_copy(graph, {}))
        with use_config(self.manager.config):
            for _, item in self.manager.passes:
                if isinstance(item, FusionPass):
                    item(copied, outcome)
        return outcome.wants_numbers

    def uuid(self) -> str | None:
        return self.manager.uuid()


def _floats(graph: Graph) -> ShapeEnv | None:
    """Where the symbols of numbers are that are inputs of this graph; None where none is."""
    inputs = [value(node) for node in graph.find_nodes(op="placeholder")]
    if not any(isinstance(i, Tensor) and not i.dim() and i.dtype.itemsize == 8 for i in inputs):
        return None
    return next((tensor.fake_mode.shape_env for tensor in inputs if isinstance(tensor, FakeTensor)), None)


def specialize_floats(graph: Graph) -> None:
    """Let Dynamo start again with all floats as constants, if any is an input of this graph.

    Raises what Dynamo knows as the wish for that.
    """
    env = _floats(graph)
    if env is None:
        return
    symbols = [str(symbol) for symbol in hints(env) if symbol_is_type(symbol, SymT.FLOAT)]
    new = [name for name in symbols if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis
