"""What passes use of PyTorch's compiler that isn't public, in one place: another torch may not have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx import Graph


@contextmanager
def _of_torch() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"models_patch.passes: torch {torch.__version__} differs from 2.13, which passes are tested with: {error}. "
            "models_patch.patch needs nothing of the compiler",
            name=error.name,
        ) from error


with _of_torch():
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch._guards import TracingContext, tracing
    from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2, auto_functionalized_v2_dense
    from torch._inductor import config as inductor_config
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, symbol_is_type
    from torch.utils._sympy.symbol import SymT

__all__ = [
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "SymT",
    "TensorifyScalarRestartAnalysis",
    "TensorifyState",
    "TracingContext",
    "aot_autograd",
    "auto_functionalized_v2",
    "auto_functionalized_v2_dense",
    "hints",
    "inductor_config",
    "is_fake",
    "make_fx",
    "reinplace",
    "select_decompositions",
    "symbol_is_type",
    "tracing",
    "unset_fake_temporarily",
]

# These take a second to import.


def select_decompositions() -> dict:
    """Those of the compiler's own back end."""
    with _of_torch():
        from torch._inductor.decomposition import select_decomp_table
    return dict(select_decomp_table())


def reinplace(graph: Graph) -> None:
    """Note at each `auto_functionalized_v2`, as `only_clone_these_tensors`, which memory it mustn't write into."""
    with _of_torch():
        from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
    reinplace_inplaceable_ops_core(graph)


def hints(env: ShapeEnv) -> dict:
    """The symbols of a compilation, with the numbers they stood for when it was traced."""
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # that was its name
