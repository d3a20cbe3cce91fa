"""What is bound on a module in the place of its class's own methods."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

METHODS = ("forward", "_apply_gate")  # what is bound in the place of a class's own


def is_ours(method: Any) -> bool:
    """Whether a fused forward was bound here."""
    return isinstance(method, partial) and method.func.__module__.rpartition(".")[0] == __package__


def replaced(module: nn.Module, *methods: str) -> str | None:
    """Why a fused forward can't be bound: something else was; None where it can."""
    for name in methods or (*METHODS, "_norm", "expand_kv"):
        if callable(own := vars(module).get(name)) and not is_ours(own):
            return f"the {name} of this {type(module).__name__} has been replaced by something else already"
    return None


def changed_linear(module: Any, *, bias: bool = False) -> str | None:
    """What it is or does beside the product with its weight; None where that is all, and the weight may be used.

    bias: whether it may have one.
    """
    if type(module) is not nn.Linear:
        return f"is {type(module).__name__}"
    if module.bias is not None and not bias:
        return "has a bias"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "has a forward or hooks of its own"
    return None
