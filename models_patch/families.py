"""Which models can be patched: a table of classes, and how the layers of each family are made.

A family says what a stock forward must compute; `source.formula` compares the two, so a model that does something else,
or that another version of transformers changed, is noticed and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from types import FunctionType
from typing import Any

from torch import nn

from fused_ops import gelu_tanh_mul_quant, silu_mul_quant, swiglu_oai_mul_quant

from . import stock
from .forwards import experts_gate, gated_mlp, oai_experts_gate, packed_mlp
from .roles import Norm, Sublayer
from .source import first_argument, formula, reads, statements


@dataclass(frozen=True)
class Gated:
    """A kind of gated activation in an MLP.

    stock, body: what is computed, and the fused function that takes its place. method: the module's that has it.
    activation: the attribute that says which of `ACTIVATIONS` it is; None where it is always `operation`.
    """

    stock: type
    body: Callable
    method: str = "forward"
    activation: str | None = None
    operation: Callable | None = None


@dataclass(frozen=True)
class Family:
    """How the models of a family are made.

    attention, mlp: the two halves of a decoder layer. norm: the kind of its norms and the model's last one.
    """

    attention: Sublayer
    mlp: Sublayer
    norm: Norm

    @property
    def layer(self) -> str:
        """What a decoder layer's forward computes, as `source.formula` tells it."""
        return self.mlp.formula(self.attention.formula("hidden_states"))


_ATTENTION = Sublayer(
    "self_attn",
    call="self.self_attn(hidden_states={}, **kwargs)[0]",
    linears=("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    before="input_layernorm",
)
_MLP = Sublayer(
    "mlp", call="self.mlp({})", linears=("gate_proj", "up_proj", "gate_up_proj"), before="post_attention_layernorm"
)

_LLAMA_NORM = Norm(stock.LlamaNorm, round_before_weight=True)
_OLMO2_NORM = Norm(stock.Olmo2Norm)
_GEMMA_NORM = Norm(stock.GemmaNorm, eps="eps", weight_bias=1.0)
NORMS = (_LLAMA_NORM, _OLMO2_NORM, _GEMMA_NORM)

# Where in a layer an activation may be, and what it may be there.
GATED = {
    "mlp": (
        Gated(stock.GatedMLP, gated_mlp, activation="act_fn"),
        Gated(stock.PackedMLP, packed_mlp, activation="activation_fn"),
    ),
    "mlp.shared_experts": (Gated(stock.GatedMLP, gated_mlp, activation="act_fn"),),
    "mlp.experts": (
        Gated(stock.PackedExperts, experts_gate, "_apply_gate", activation="act_fn"),
        Gated(stock.OaiExperts, oai_experts_gate, "_apply_gate", operation=swiglu_oai_mul_quant),
    ),
}

PRE_NORM = Family(_ATTENTION, _MLP, _LLAMA_NORM)
GRANITE = replace(
    PRE_NORM,
    attention=replace(_ATTENTION, multiplier="residual_multiplier"),
    mlp=replace(_MLP, multiplier="residual_multiplier"),
)
PHI3 = replace(
    PRE_NORM,
    attention=replace(_ATTENTION, dropout="resid_attn_dropout"),
    mlp=replace(_MLP, dropout="resid_mlp_dropout"),
)
GLM4 = replace(
    PRE_NORM,
    attention=replace(_ATTENTION, after="post_self_attn_layernorm"),
    mlp=replace(_MLP, after="post_mlp_layernorm"),
)
GEMMA2 = Family(
    replace(_ATTENTION, after="post_attention_layernorm"),
    replace(_MLP, before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
    _GEMMA_NORM,
)
OLMO2 = Family(
    replace(_ATTENTION, before=None, after="post_attention_layernorm"),
    replace(_MLP, before=None, after="post_feedforward_layernorm"),
    _OLMO2_NORM,
)
GPT_OSS = Family(_ATTENTION, replace(_MLP, call="self.mlp({})[0]"), _OLMO2_NORM)

# A model whose forwards compute the same is one line; one that isn't here is recognised by them. SmolLM and SmolLM2 are
# Llamas.
MODELS = {
    "LlamaModel": PRE_NORM,
    "MistralModel": PRE_NORM,
    "Qwen2Model": PRE_NORM,
    "Qwen3Model": PRE_NORM,
    "Qwen3MoeModel": PRE_NORM,
    "SmolLM3Model": PRE_NORM,
    "GraniteModel": GRANITE,
    "Phi3Model": PHI3,
    "Glm4Model": GLM4,
    "Glm4MoeModel": PRE_NORM,
    "DeepseekV2Model": PRE_NORM,
    "DeepseekV3Model": PRE_NORM,
    "MiniMaxM2Model": PRE_NORM,
    "Gemma2Model": GEMMA2,
    "Gemma3TextModel": GEMMA2,
    "Olmo2Model": OLMO2,
    "GptOssModel": GPT_OSS,
}

ACTIVATIONS = (
    (stock.SiLUActivation, silu_mul_quant),
    (stock.SiLU, silu_mul_quant),
    (stock.GELUTanh, gelu_tanh_mul_quant),
    (stock.GELU, gelu_tanh_mul_quant),
)


# What a model's forward does with `hidden_states` before it returns them, as `source.reads` tells it.
_LOOP = ("self.rotary_emb(hidden_states)", "decoder_layer(hidden_states)", "self.norm(hidden_states)")


def family_of(module: nn.Module) -> Family | None:
    """The family of a model without head, by the name of its class or of the nearest base class that has one.

    A model that isn't listed is of the family whose loop and layers it has, with norms of any kind.
    """
    listed = next((MODELS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in MODELS), None)
    if listed is not None or not isinstance(getattr(module, "layers", None), nn.ModuleList) or mismatch_loop(module):
        return listed
    known = (replace(family, norm=norm) for family in dict.fromkeys(MODELS.values()) for norm in NORMS)
    return next((family for family in known if mismatch_stream(module, family) is None), None)


def expected_instead(model: nn.Module) -> str:
    """For messages: what a model in which no family is known should have been, and why its layers aren't."""
    stacks = [module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList)]
    reasons = dict.fromkeys(filter(None, map(_nearest_mismatch, stacks)))
    if not stacks:
        reasons = {"no module in it has layers by that name": None}
    return f"expected one of {', '.join(MODELS)}, or of the same layers" + "".join(f"; {each}" for each in reasons)


def _nearest_mismatch(model: Any) -> str | None:
    """Why a model is of no family: its loop, its layers, or where those are a family's, the rest."""
    if problem := mismatch_loop(model):
        return problem
    made = (family for family in MODELS.values() if not any(mismatch_layer(layer, family) for layer in model.layers))
    return mismatch_stream(model, next(made, PRE_NORM))


def mismatch(module: nn.Module, expected: type, role: str) -> str | None:
    """Why a fused body can't take the place of `module`; None where it computes what `expected`, of `stock`, does."""
    for name, value in vars(expected).items():
        if name.startswith("__"):
            continue
        if isinstance(value, FunctionType):
            known = _alike(getattr(type(module), name, None), value)
        else:
            known = _same(getattr(module, name, None), value)
        if not known:
            return f"{type(module).__name__}.{name} of {version()} is not a known {role}"
    return None


def mismatch_layer(layer: nn.Module, family: Family) -> str | None:
    """Why the fused body can't take the place of a decoder layer's forward; None where it can."""
    if computes(type(layer).forward, family.layer):
        return None
    return f"{type(layer).__name__}.forward of {version()} is not a known layer"


def mismatch_stream(model: Any, family: Family) -> str | None:
    """Why the additions between the layers of `model` can't be fused; None where they can."""
    norms = [*family.attention.norms, *family.mlp.norms]
    problems = [mismatch_loop(model)]
    for layer in model.layers:
        problems.append(mismatch_layer(layer, family))
        if problems[-1] is None:
            problems += [mismatch(getattr(layer, name), family.norm.stock, "norm") for name in norms]
    problems.append(mismatch(model.norm, family.norm.stock, "norm"))
    return next(filter(None, problems), None)


def mismatch_loop(model: nn.Module) -> str | None:
    """Why decoder layers of `model` can't hand each other anything but tensors; None where they can."""
    *calls, output = reads(type(model).forward, "hidden_states") or ("",)
    if tuple(calls) == _LOOP and output.partition("(")[0].endswith("ModelOutputWithPast"):
        return None
    return f"{type(model).__name__}.forward of {version()} is not a known loop over layers"


def activation_of(module: nn.Module) -> tuple[Callable | None, str | None]:
    """(the fused operation of this activation and the product after it, why there is none)"""
    problems = [mismatch(module, expected, "activation") for expected, _ in ACTIVATIONS]
    return (ACTIVATIONS[problems.index(None)][1], None) if None in problems else (None, problems[0])


def passes_on(module: nn.Module, linears: tuple[str, ...]) -> bool:
    """Whether all that `module` does with its input is to ask for its leading shape and give it to these layers.

    It may have some of them only.
    """
    argument = first_argument(type(module).forward)
    if argument is None:
        return False
    allowed = {f"self.{linear}({argument})" for linear in linears} | {f"{argument}.shape[:-1]"}
    return allowed.issuperset(reads(type(module).forward, argument) or ("unknown",))


def computes(function: Any, expected: str | None) -> bool:
    """Whether the formula of `function`, where there is one, is this."""
    found = None if function is None else formula(function)
    return found is not None and found == expected


def _alike(found: Any, expected: FunctionType) -> bool:
    """Whether a function computes what `expected` does, or has its very statements where it isn't one expression."""
    if (wanted := formula(expected)) is not None:
        return computes(found, wanted)
    return found is not None and statements(found) == statements(expected)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, partial):
        parts = (expected.func, expected.args, expected.keywords)
        return isinstance(found, partial) and (found.func, found.args, found.keywords) == parts
    return bool(found == expected)


def version() -> str:
    """Which transformers this is, for messages."""
    try:
        return f"transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        return "an unknown transformers"
