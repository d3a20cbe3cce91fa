"""Which models can be patched: a table of classes, and the forwards that the fused ones may take the place of.

The functions here are never run. They say what a stock forward must compute; `source.formula` compares the two, so a
model that does something else, or that another version of transformers changed, is noticed and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from .source import formula, reads


def _layer(self, hidden_states, **kwargs):
    x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    return x + self.mlp(self.post_attention_layernorm(x))


def _norm(self, hidden_states):
    x = hidden_states.to(torch.float32)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * y.to(hidden_states.dtype)


def _mlp(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _silu(self, input):
    return nn.functional.silu(input)


@dataclass(frozen=True)
class Family:
    """The stock forwards of a family of models, by role.

    loop: what the model's own forward does with `hidden_states`, as `source.reads` tells it.
    layer, norm, mlp, activation: a decoder layer, its norms and the model's last one, its MLP, the MLP's activation.
    """

    loop: tuple[str, ...]
    layer: Callable
    norm: Callable
    mlp: Callable
    activation: Callable


PRE_NORM = Family(
    loop=(
        "self.rotary_emb(hidden_states)",
        "decoder_layer(hidden_states)",
        "self.norm(hidden_states)",
        "BaseModelOutputWithPast(hidden_states)",
    ),
    layer=_layer,
    norm=_norm,
    mlp=_mlp,
    activation=_silu,
)

# A model whose forwards compute the same is one line. SmolLM and SmolLM2 are Llamas.
MODELS = {
    "LlamaModel": PRE_NORM,
    "MistralModel": PRE_NORM,
    "Qwen2Model": PRE_NORM,
}


def family_of(module: nn.Module) -> Family | None:
    """The family of a model without head, by the name of its class or of the nearest base class that has one."""
    return next((MODELS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in MODELS), None)


def mismatch(module: nn.Module, stock: Callable) -> str | None:
    """Why a fused forward can't take the place of the forward of `module`; None where it computes what `stock` does."""
    found = formula(type(module).forward)
    if found is not None and found == formula(stock):
        return None
    return f"{type(module).__name__}.forward of {_version()} is not a known {stock.__name__.strip('_')}"


def mismatch_loop(model: nn.Module, family: Family) -> str | None:
    """Why decoder layers of `model` can't hand each other anything but tensors; None where they can."""
    if reads(type(model).forward, "hidden_states") == family.loop:
        return None
    return f"{type(model).__name__}.forward of {_version()} is not a known loop over layers"


def passes_on(module: nn.Module, argument: str, linears: tuple[str, ...]) -> bool:
    """Whether all that `module` does with `argument` is to ask for its leading shape and give it to these layers."""
    allowed = {f"self.{linear}({argument})" for linear in linears} | {f"{argument}.shape[:-1]"}
    return allowed.issuperset(reads(type(module).forward, argument) or ("unknown",))


def _version() -> str:
    try:
        return f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        return "an unknown transformers"
