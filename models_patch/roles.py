"""What decoder layers are made of, as data: what the stock layer computes, and what the fused bodies do."""

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
    linears: the linear layers in it that take its input, of which a module may have some.
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


@dataclass(frozen=True)
class Rotation:
    """A form of rotary embedding.

    stock: the functions of it in the attention's module.
    tables: what the model's module may be that makes cosines and sines, in two tensors or as complex numbers.
    repeats: whether these have each angle twice.
    is_neox, round_products: as in `fused_ops.rope`.
    """

    stock: type
    tables: tuple[type, ...]
    repeats: bool = True
    is_neox: bool = True
    round_products: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """`fused_ops.rope`'s."""
        return {"is_neox": self.is_neox, "round_products": self.round_products}


# What attention functions take beside the usual, as `paged_attention` names it.
PAGED_OPTIONS = {"sliding_window": "sliding_window", "softcap": "soft_cap", "s_aux": "sinks"}


@dataclass(frozen=True)
class Attention:
    """An attention module's way from the hidden states to its output projection.

    rotation: None where it doesn't rotate.
    packed: whether `qkv_proj` gives queries, keys and values, which are views of its result then.
    norm: the kind of `q_norm` and `k_norm`; None where there are none.
    whole_vector: whether they take all heads of a token at once.
    norm_over_ranks: their kind where they do, and other ranks have the other heads; `norm` is None then.
    options: what the attention function is handed beside the usual: (keyword, path of the attribute).
    unpaged: why `paged_attention` can't take the attention function's place; "" where it can.
    """

    rotation: Rotation | None
    packed: bool = False
    norm: Norm | None = None
    whole_vector: bool = False
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unpaged: str = ""
    norm_over_ranks: Norm | None = None

    @property
    def operation(self) -> str | None:
        if self.rotation is None:
            return None
        return "rope" if self.norm is None else "qk_norm_rope"


@dataclass(frozen=True)
class LatentAttention:
    """The same of an attention over latents (MLA).

    norm: the kind of its norms. low_rank: whether queries come from latents too, by `q_a_proj` and `q_b_proj`.
    sorts_pairs: whether even columns are put before odd ones, which are halves to the rotation then.
    """

    rotation: Rotation
    norm: Norm
    low_rank: bool
    sorts_pairs: bool
    unpaged: str = ""


def value_at(module: Any, path: tuple[str, ...]) -> Any:
    """The attribute that an option of a module's attention function is read from."""
    for name in path:
        module = getattr(module, name)
    return module
