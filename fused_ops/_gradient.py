"""Results are for inference: a backward pass that reaches one raises by its operation's name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def refuse_backward(op_name: str, *outputs: Tensor) -> None:
    """Make a backward pass that reaches these outputs raise by name: gradients are not defined here."""

    def refuse(_):
        raise RuntimeError(f"fused_ops.{op_name} is for inference only and has no gradient; use torch.no_grad()")

    if not torch.compiler.is_compiling():
        for output in outputs:
            if output.requires_grad:
                output.register_hook(refuse)


def refuse_backward_of(op_name: str, args: tuple, outs: Iterable[Tensor | None]) -> None:
    """The same for results that were written: by themselves they would seem to be constants."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        floats = [o for o in outs if o is not None and o.dtype.is_floating_point and not o.requires_grad]
        refuse_backward(op_name, *(o.requires_grad_() for o in floats))
