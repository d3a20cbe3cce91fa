"""What a family's decoder layers are made of, as data: what the stock layer computes, and what the fused body does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Norm:
    """A kind of RMS norm.

    stock: what its forward computes.
    eps: the attribute that holds it.
    weight_bias, round_before_weight: as in `fused_ops.rms_norm`.
    """

    stock: type
    eps: str = "variance_epsilon"
    weight_bias: float = 0.0
    round_before_weight: bool = False

    def of(self, module: Any) -> dict[str, Any]:
        """`fused_ops.rms_norm`'s arguments for this norm of a model."""
        return {
            "weight": module.weight,
            "eps": getattr(module, self.eps),
            "weight_bias": self.weight_bias,
            "round_before_weight": self.round_before_weight,
        }


@dataclass(frozen=True)
class Sublayer:
    """Half a decoder layer: `x + after(dropout(call(before(x)))) * multiplier`, where what is None isn't there.

    module: attention or MLP, as the layer names it; so do before and after (norms), dropout and multiplier. No
        operation has a norm and a factor before its addition: there is no `after` with a multiplier.
    call: how the stock layer calls it.
    linears: the linear layers in it that all take its input.
    """

    module: str
    call: str
    linears: tuple[str, ...]
    before: str | None = None
    after: str | None = None
    dropout: str | None = None
    multiplier: str | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        return tuple(name for name in (self.before, self.after) if name is not None)

    def formula(self, x: str) -> str:
        """What the stock layer computes of x, as `source.formula` writes it."""
        delta = self.call.format(f"self.{self.before}({x})" if self.before else x)
        for name in (self.dropout, self.after):
            delta = f"self.{name}({delta})" if name else delta
        return f"{x} + {delta}" + (f" * self.{self.multiplier}" if self.multiplier else "")
