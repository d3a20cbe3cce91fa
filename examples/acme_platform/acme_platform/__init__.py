"""A platform that fused_ops knows nothing of: it adds a pass for an operation of its own, and an option that says so.

options = inductor_options(AcmeManager.from_config(AcmeConfig(soft_cap=True)))
torch.compile(model, options=options)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models_patch.passes import POST_GRAD, FusionPass, Pass, PassConfig, PassManager, PatternReplacement

_library = torch.library.Library("acme", "DEF")
_library.define("soft_cap(Tensor x, float cap) -> Tensor")


@torch.library.impl(_library, "soft_cap", "CompositeExplicitAutograd")
def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap  # where a platform has its kernel


@torch.library.register_fake("acme::soft_cap", lib=_library)
def _(x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class AcmeConfig(PassConfig):
    """soft_cap: whether logits that are capped are one operation."""

    soft_cap: bool = True


class SoftCap(PatternReplacement):
    """cap * tanh(x / cap), which is how Gemma 2 keeps its logits in bounds."""

    name = "acme::soft_cap"

    def inputs(self) -> list[dict[str, Any]]:
        return [{"x": torch.empty(3, 5, dtype=dtype), "cap": 30.25} for dtype in (torch.bfloat16, torch.float32)]

    def pattern(self, x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap) * cap

    def replacement(self, x: Tensor, cap: float) -> Tensor:
        return torch.ops.acme.soft_cap(x, cap)


class SoftCapFusion(FusionPass):
    def __init__(self) -> None:
        super().__init__()
        self.register(SoftCap())


class AcmeManager(PassManager):
    """The library's passes, and the platform's after them."""

    @classmethod
    def default_pass_pipeline(cls, config: PassConfig, hook: str = POST_GRAD) -> list[tuple[str, Pass]]:
        pipeline = super().default_pass_pipeline(config, hook)
        if hook == POST_GRAD and isinstance(config, AcmeConfig) and config.soft_cap:
            pipeline.append(("soft_cap", SoftCapFusion()))
        return pipeline
