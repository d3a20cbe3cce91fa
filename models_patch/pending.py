"""What patched modules hand to each other in the place of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


class Pending:
    """A residual addition that is still to be done: a decoder layer's output, `residual + delta`.

    The next norm does it in the same pass. Whoever else gets hold of one (a forward pre-hook on a decoder layer, say)
    has the tensor by `.sum()`.
    """

    __slots__ = ("delta", "residual")

    def __init__(self, delta: Tensor, residual: Tensor):
        self.delta, self.residual = delta, residual

    def sum(self) -> Tensor:
        """The layer's output as the unpatched model has it."""
        return self.residual + self.delta

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Pending:
        """The same on another device, for models that are spread over several."""
        return Pending(*(t.to(device, non_blocking=non_blocking) for t in (self.delta, self.residual)))
