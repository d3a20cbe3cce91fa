"""Blocks of routed experts: how they are recognised, and the body that hands on what a norm quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant import QuantizedActivation

from .families import mismatch

# What the stock blocks compute; nothing of it is ever run.


class Routed:
    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        states = hidden_states.view(-1, width)
        routed = self.gate(states)
        return self.experts(states, routed[2], routed[1]).reshape(batch, length, width)


class RoutedAndShared:
    def forward(self, hidden_states):
        routed = self.gate(hidden_states)
        states = hidden_states.view(-1, hidden_states.shape[-1])
        output = self.experts(states, routed[2], routed[1]).view(*hidden_states.shape)
        return output + self.shared_experts(hidden_states)


class RoutedWithScores:
    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        states = hidden_states.reshape(-1, width)
        routed = self.router(states)
        return self.experts(states, routed[2], routed[1]).reshape(batch, length, width), routed[1]


# Noise where they are trained; compared as they stand, since it is added in place.


class RoutedWithJitter:
    def forward(self, hidden_states):
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
        hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
        return hidden_states


class RoutedWithCorrection:
    def forward(self, hidden_states):
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(hidden_states, self.e_score_correction_bias)
        hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
        hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
        return hidden_states


# How they are told apart, and what takes their place.


@dataclass(frozen=True)
class Mixture:
    """A block of routed experts, `experts`.

    stock: what its forward computes.
    router: the module that gives (logits, weights, index) of them.
    correction: the attribute that it is handed too.
    shared: the module that every token goes to, whose result is added.
    scores: whether the router's weights are returned besides.
    """

    stock: type
    router: str = "gate"
    correction: str | None = None
    shared: str | None = None
    scores: bool = False


MIXTURES = (
    Mixture(Routed),
    Mixture(RoutedAndShared, shared="shared_experts"),
    Mixture(RoutedWithScores, router="router", scores=True),
    Mixture(RoutedWithJitter),
    Mixture(RoutedWithCorrection, correction="e_score_correction_bias"),
)


def mixture_of(module: nn.Module) -> tuple[Mixture | None, str]:
    """(how its experts are routed, why that isn't known)"""
    problems = [mismatch(module, each.stock, "mixture of experts") for each in MIXTURES]
    return (MIXTURES[problems.index(None)], "") if None in problems else (None, str(problems[0]))


def mixture(self: Any, hidden_states: Tensor | QuantizedActivation, *, role: Mixture, shares: bool) -> Any:
    """Routed experts, and shared ones; the router reads its input unquantized.

    shares: whether the shared ones take the activation that the routed ones do.
    """
    plain: Any = hidden_states
    if isinstance(hidden_states, QuantizedActivation):
        plain = hidden_states.unquantized
    if self.training:  # where a router may add noise
        return type(self).forward(self, plain)
    correction = () if role.correction is None else (getattr(self, role.correction),)
    _, weights, index = getattr(self, role.router)(plain.view(-1, plain.shape[-1]), *correction)
    y = self.experts(hidden_states, index, weights)
    if role.shared is not None:
        y = y + getattr(self, role.shared)(hidden_states if shares else plain)
    return (y, weights) if role.scores else y
