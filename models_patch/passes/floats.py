"""Numbers that `torch.compile(dynamic=True)` makes inputs of a graph, such as a norm's eps.

An operation takes numbers as they are, as a model that is patched by hand shows it: guarded, and part of the graph.
"""

from __future__ import annotations

from torch import Tensor
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv, symbol_is_type
from torch.utils._sympy.symbol import SymT

from .matcher import value


def specialize_floats(graph: Graph) -> None:
    """Let Dynamo start again with all floats as constants, if any is an input of this graph.

    Raises what Dynamo knows as the wish for that.
    """
    inputs = [value(node) for node in graph.find_nodes(op="placeholder")]
    env = next((tensor.fake_mode.shape_env for tensor in inputs if isinstance(tensor, FakeTensor)), None)
    if env is None or not any(isinstance(i, Tensor) and not i.dim() and i.dtype.itemsize == 8 for i in inputs):
        return
    symbols = [str(symbol) for symbol in _hints(env) if symbol_is_type(symbol, SymT.FLOAT)]
    new = [name for name in symbols if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def _hints(env: ShapeEnv) -> dict:
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
