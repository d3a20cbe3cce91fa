"""What the modules of a model that is cut over ranks do beside their stock forwards, as forward hooks.

A hook stays where the linear layers of a module are quantized, and where its forward is patched.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fused_ops import all_reduce, qk_all_reduce_rms_norm
from fused_ops.workspace import AllReduceWorkspace

from .binding import is_ours
from .roles import Norm


class RankHook:
    """A forward hook of a module that is cut over the ranks of `workspace`, which a copy of the module shares."""

    def __init__(self, workspace: AllReduceWorkspace, owner: Any) -> None:
        self.workspace, self.owner = workspace, owner

    def __deepcopy__(self, memo: dict[int, Any]) -> RankHook:
        return type(self)(self.workspace, copy.deepcopy(self.owner, memo))

    def __reduce__(self) -> Any:
        raise TypeError("a model that is cut over ranks can't be pickled: its memory is shared; save its state_dict()")


class SumOverRanks(RankHook):
    """Of a module whose result is a part of a sum: gives the sum, unless the patched layer leaves that to a norm.

    owner: the decoder layer.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if is_ours(vars(self.owner).get("forward")):
            return None
        if isinstance(output, tuple):
            return all_reduce(output[0], self.workspace), *output[1:]
        return all_reduce(output, self.workspace)


class NormOverRanks(RankHook):
    """Of a norm that gets some columns of its rows, whose mean square is that of all ranks' columns.

    owner: the norm's kind.
    """

    owner: Norm

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return qk_normed(args[0], args[0], module, module, self.owner, self.workspace)[0]


def workspace_of(module: Any) -> AllReduceWorkspace | None:
    """The workspace of the ranks that `module` is cut over; None where it is whole."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, RankHook):
            return hook.workspace
    return None


def qk_normed(q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, norm: Norm, workspace: Any) -> tuple[Tensor, Tensor]:
    """This rank's columns [..., columns] of all queries and keys of a token, which are normed as one row each."""
    options = norm.of(k_norm)
    weights = q_norm.weight, options.pop("weight"), options.pop("eps")
    return qk_all_reduce_rms_norm(q, k, *weights, workspace, **options)
