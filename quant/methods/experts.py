"""`QuantExperts`: the experts of a mixture, which take their input quantized once for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fused_ops

from ..activation import QuantizedActivation
from ..key import QuantKey
from .linear import QuantLinear, ScaledLinearMethod
from .scheme import Scheme

PROJECTIONS = ("gate_up_proj", "down_proj")


class QuantGroupedLinear(QuantLinear):
    """A `QuantLinear` with a weight, and a bias, for each of several experts.

    Codes and scales are stacked, [experts, ...]; the input's scale, where it is static, is one for all experts.

    Args:
        experts: how many.
        in_features, out_features, method, name, device: as in `QuantLinear`.
        bias: [experts, N] or None.
    """

    method: ScaledLinearMethod
    experts: int

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        method: ScaledLinearMethod,
        bias: Tensor | None = None,
        *,
        name: str = "QuantGroupedLinear",
        device: torch.device | str | None = None,
    ):
        self.experts = experts
        super().__init__(in_features, out_features, method, bias, name=name, device=device)

    def forward(  # type: ignore[override]
        self, x: Tensor | QuantizedActivation, tokens_per_expert: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Rows of x, those of each expert after another's, by their expert's weight: `grouped_scaled_linear`."""
        x = self.method.taken(self, x)
        buffers = self._buffers
        return fused_ops.grouped_scaled_linear(
            x,
            self.weight,
            self.weight_scale,
            tokens_per_expert,
            buffers["bias"],
            out_dtype=x.orig_dtype,
            rows=rows,
            weight_scale2=buffers.get("weight_scale2"),
        )

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class QuantExperts(nn.Module):
    """Routed experts whose weights are stored, and whose input is taken, quantized.

        y_t = sum_k weight_tk * down_e(act(gate_up_e(x_t)))         e = index_tk

    It takes the place of a Hugging Face module of experts. A token is quantized once, whatever the number of its
    experts: by whoever produced it, or here; rows are sorted by expert, so that a weight is read for many. Activations
    in between are the model's own, until `models_patch.patch` has them quantize for `down_proj`. Products are rounded
    to the activations' dtype, then weighted and summed as transformers' "grouped_mm" does, in the order of the index.

    Args:
        gate_up_proj, down_proj: the products.
        stock: the module whose place it takes, without weights; its `_apply_gate` is the activation.
    """

    def __init__(self, gate_up_proj: QuantGroupedLinear, down_proj: QuantGroupedLinear, stock: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.stock = gate_up_proj, down_proj, stock

    @property
    def input_quant_key(self) -> QuantKey | None:
        """What the experts want their input to be."""
        return self.gate_up_proj.input_quant_key

    def input_quant(self, prefix: str = "") -> dict[str, Any]:
        """What a producer of their input needs, as `QuantLinear.input_quant`."""
        return self.gate_up_proj.input_quant(prefix)

    def forward(
        self, hidden_states: Tensor | QuantizedActivation, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The weighted sum over each token's experts, [..., H].

        Args:
            hidden_states: [..., H], T tokens; a `QuantizedActivation` has this key.
            top_k_index: int [T, k], experts.
            top_k_weights: [T, k], in the dtype of the activations or in float32.
        """
        tokens, rows, positions = fused_ops.sort_by_expert(top_k_index, self.gate_up_proj.experts)
        x = self.gate_up_proj.method.taken(self.gate_up_proj, hidden_states)
        if len(top_k_index) != (count := math.prod(x.shape[:-1])):
            got = f"top_k_index is {list(top_k_index.shape)}"
            raise ValueError(f"{self.gate_up_proj.name}: {got}, expected [{count}, k], of as many tokens")
        y = self._apply_gate(self.gate_up_proj(x, tokens, rows))
        return fused_ops.sum_experts(self.down_proj(y, tokens), positions, top_k_weights).view(hidden_states.shape)

    def _apply_gate(self, gate_up: Tensor) -> Tensor | QuantizedActivation:
        return self.stock._apply_gate(gate_up)  # type: ignore[operator]


# --- from a model's experts ---


def experts_of(caller: str, model: nn.Module, ignored: set[str]) -> dict[str, nn.Module]:
    """The modules of experts to quantize, by path: those of transformers, which hold weights [E, ...].

    Raises TypeError or ValueError where one of them can't be.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if {path, path.rpartition(".")[2]} & ignored:
            continue
        kind = type(module).__name__
        if not holds_experts(module):
            if stacks_weights(module):
                raise ValueError(f"{caller}: {path} is {kind}, expected transformers' experts interface (or ignore it)")
            continue
        if not serves(module):
            raise ValueError(f"{caller}: {path} is {kind}, expected gated experts without norms (or ignore it)")
        if module._is_expert_parallel:
            raise ValueError(f"{caller}: {path} has a part of the experts, expected all of them (or ignore it)")
        found[path] = module
    return found


def holds_experts(module: nn.Module) -> bool:
    """Whether it is one that transformers' experts interface serves, and not what `strip` left of one."""
    served = all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "_is_expert_parallel"))
    return served and any(True for _ in module.parameters(recurse=False))


def serves(experts: Any) -> bool:
    """Whether `QuantExperts` can take the place of these."""
    if not holds_experts(experts) or experts.has_post_expert_norm or not experts.has_gate:
        return False
    return all(isinstance(getattr(experts, name, None), nn.Parameter) for name in PROJECTIONS)


def stacks_weights(module: nn.Module) -> bool:
    """Whether it has a weight for each of several experts, though that interface doesn't serve it."""
    weights = [module._parameters.get(name) for name in PROJECTIONS]
    return all(weight is not None and weight.ndim == 3 for weight in weights)


def routes(block: nn.Module) -> bool:
    """Whether it is a block of experts, in which another kind of `nn.Linear` is a router."""
    return any(
        isinstance(each, QuantExperts) or holds_experts(each) or stacks_weights(each) for each in block.children()
    )


def weights_of(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight [E, N, K], bias [E, N]) of one of `PROJECTIONS`."""
    weight = getattr(experts, name).detach()
    bias = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    return weight.transpose(1, 2) if experts.is_transposed else weight, bias


def quantized_experts(path: str, experts: nn.Module, scheme: Scheme, spans: dict[str, Tensor | None]) -> QuantExperts:
    """The experts with both their products quantized; spans: of their inputs, by `PROJECTIONS`. Nothing is changed."""
    made = {}
    for name in PROJECTIONS:
        weight, bias = weights_of(experts, name)
        method, (count, outs, cols) = ScaledLinearMethod(scheme), weight.shape
        layer = QuantGroupedLinear(count, cols, outs, method, bias, name=f"{path}.{name}", device=weight.device)
        for expert in range(count):
            for buffer, tensor in scheme.quantize_weight(weight[expert]).items():
                layer.get_buffer(buffer)[expert].copy_(tensor)
        if (span := spans[name]) is not None:
            for buffer, tensor in scheme.calibrate(*span).items():
                layer.get_buffer(buffer).copy_(tensor)
        method.process_weights_after_loading(layer)
        made[name] = layer
    return QuantExperts(made["gate_up_proj"], made["down_proj"], experts).train(experts.training)


def strip(experts: nn.Module) -> None:
    """Take the weights from a module of experts, when they are quantized."""
    for name in PROJECTIONS:
        delattr(experts, name)
        if experts.has_bias:
            delattr(experts, f"{name}_bias")


# --- calibration ---


@contextmanager
def observed(experts: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Modules that get the input of each projection, by its path, while the model runs in this block."""
    probes: dict[str, nn.Module] = {f"{path}.{name}": nn.Identity() for path in experts for name in PROJECTIONS}
    before = {path: vars(module).get("forward") for path, module in experts.items()}
    try:
        for path, module in experts.items():
            forward: Any = partial(_observed_forward, module, [probes[f"{path}.{name}"] for name in PROJECTIONS])
            module.forward = forward
        yield probes
    finally:
        for path, module in experts.items():
            del module.forward
            if before[path] is not None:
                module.forward = before[path]  # type: ignore[assignment]


def _observed_forward(experts: Any, probes: list[nn.Module], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    weights_and_biases = [weights_of(experts, name) for name in PROJECTIONS]
    tokens, rows, positions = fused_ops.sort_by_expert(index, len(weights_and_biases[0][0]))

    def products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = x.split(tokens.tolist())
        return torch.cat([linear(x, weight[e], None if bias is None else bias[e]) for e, x in enumerate(parts)])

    y = experts._apply_gate(products(probes[0](x)[rows], *weights_and_biases[0]))
    return fused_ops.sum_experts(products(probes[1](y), *weights_and_biases[1]), positions, weights)
