"""A back end of `torch.compile` that runs the passes and then the graph, node by node: no code is generated."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

from .compiler import aot_autograd, auto_functionalized_v2, auto_functionalized_v2_dense, reinplace
from .config import PassConfig
from .floats import specialize_floats
from .fusion import POST_GRAD
from .manager import PassManager
from .matcher import aten, decompositions, value
from .rewrite import mode_of


class Backend:
    """`torch.compile(model, backend=Backend())`: the graph as the passes leave it, run by PyTorch's own kernels.

    What the fused operations don't take the place of gives the bits of eager code, so that a model has those it has
    when it is patched by hand. It is for inference.

    Args:
        passes: a `PassManager`, or the configuration that one is made from; `.manager` is it.
    """

    def __init__(self, passes: PassManager | PassConfig | None = None) -> None:
        if passes is not None and not isinstance(passes, (PassManager, PassConfig)):
            raise TypeError(f"Backend: passes is {type(passes).__name__}, expected a PassManager or a PassConfig")
        self.manager = passes if isinstance(passes, PassManager) else PassManager.from_config(passes)
        if self.manager.hook != POST_GRAD:
            raise ValueError(f"Backend: passes are bound to {self.manager.hook}, expected {POST_GRAD}")
        self._compile = aot_autograd(
            fw_compiler=self._rewritten, decompositions=decompositions(), keep_inference_input_mutations=True
        )

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable:
        return self._compile(graph, inputs)

    def _rewrite(self, graph: GraphModule) -> None:
        for name in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
            if isinstance(branch := attrgetter(name)(graph), GraphModule):  # of torch.cond, say
                self._rewrite(branch)
        specialize_floats(graph.graph)
        # Results of fused operations are contiguous where those before were perhaps not.
        for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
        self.manager(graph.graph)
        _refresh(graph.graph)
        _write_in_place(graph.graph)
        graph.recompile()

    def _rewritten(self, graph: GraphModule, inputs: list[Any]) -> Callable:
        self._rewrite(graph)

        def run(arguments: list[Any]) -> Any:
            with torch.no_grad():
                held = list(arguments)
                arguments.clear()
                return graph(*held)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _refresh(graph: Graph) -> None:
    """Make the fake results anew, as Inductor does: they show which nodes share memory, and passes change that."""
    for node in graph.nodes:
        known = node.op == "call_function" and all("val" in n.meta for n in (node, *node.all_input_nodes))
        if known and "unbacked_bindings" not in node.meta:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            with mode_of([node, *node.all_input_nodes]), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _write_in_place(graph: Graph) -> None:
    """Let calls that functionalization has made of those that write write again, where nobody needs what was there."""
    reinplace(graph)  # finds out where
    for node in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
        node.args = (*node.args, node.meta.get("only_clone_these_tensors"))
        node.target = auto_functionalized_v2_dense
