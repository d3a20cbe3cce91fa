"""What patched modules hand to each other in the place of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops import (
    all_reduce,
    all_reduce_fused_add_rms_norm_quant,
    fused_add_rms_norm_quant,
    rms_norm_add,
    rms_norm_add_rms_norm_quant,
)
from fused_ops.workspace import AllReduceWorkspace


class Pending:
    """A residual addition that is still to be done: a decoder layer's output, `residual + delta * multiplier`.

    With `post`, the arguments of a norm, it is `residual + rms_norm(delta, **post)`. With a `workspace`, delta is this
    rank's part of it, and the sum over the ranks is still to be done too.

    The next norm does it in the same pass. Whoever else gets hold of one (a forward pre-hook on a decoder layer, say)
    has the tensor by `.sum()`, which all ranks call where there are several.
    """

    __slots__ = ("delta", "multiplier", "post", "residual", "workspace")

    def __init__(
        self,
        delta: Tensor,
        residual: Tensor,
        multiplier: float = 1.0,
        post: dict[str, Any] | None = None,
        workspace: AllReduceWorkspace | None = None,
    ):
        self.delta, self.residual, self.multiplier, self.post = delta, residual, multiplier, post
        self.workspace = workspace

    def sum(self) -> Tensor:
        """The layer's output as the unpatched model has it."""
        delta = self._whole_delta()
        if self.post is not None:
            return rms_norm_add(delta, self.residual, **self.post)
        return self.residual + (delta if self.multiplier == 1.0 else delta * self.multiplier)

    def norm(self, norm: dict[str, Any], quant: dict[str, Any]) -> tuple[Any, Tensor]:
        """(`rms_norm(sum, **norm)`, quantized as `quant` says; sum) in one pass, or two where `post` is after ranks."""
        if self.post is not None:
            post = {"post_weight": self.post["weight"], "post_eps": self.post["eps"]}
            return rms_norm_add_rms_norm_quant(self._whole_delta(), self.residual, **post, **norm, **quant)
        options = {"x_multiplier": self.multiplier, **norm, **quant}
        if self.workspace is not None:
            return all_reduce_fused_add_rms_norm_quant(self.delta, self.residual, workspace=self.workspace, **options)
        return fused_add_rms_norm_quant(self.delta, self.residual, **options)

    def _whole_delta(self) -> Tensor:
        return self.delta if self.workspace is None else all_reduce(self.delta, self.workspace)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Pending:
        """The same on another device, for models that are spread over several."""
        delta, residual = (t.to(device, non_blocking=non_blocking) for t in (self.delta, self.residual))
        post = self.post
        if post is not None:
            post = {**post, "weight": post["weight"].to(device, non_blocking=non_blocking)}
        return Pending(delta, residual, self.multiplier, post, self.workspace)
