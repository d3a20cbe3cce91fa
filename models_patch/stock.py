"""What the stock modules compute whose place a fused operation may take.

Nothing here is ever run. A module is one of these if each function of the class has the same formula as the module's of
that name, and each other attribute the same value: `families.mismatch` compares.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

# Norms.


class LlamaNorm:
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(hidden_states.dtype)


class Olmo2Norm:
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * y).to(hidden_states.dtype)


class GemmaNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


# MLPs.


class GatedMLP:
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP:
    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class Experts:
    def _apply_gate(self, gate_up):
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(min=None, max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


# Activations: those of transformers, then torch's own.


class SiLUActivation:
    def forward(self, input):
        return nn.functional.silu(input)


class GELUTanh:
    act = partial(F.gelu, approximate="tanh")

    def forward(self, input):
        return self.act(input)


class SiLU:
    def forward(self, input):
        return F.silu(input, inplace=self.inplace)


class GELU:
    approximate = "tanh"

    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)
