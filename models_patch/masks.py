"""Which keys a model's masks let its layers see, found by asking its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

_ARGUMENTS = {"config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids"}


@dataclass(frozen=True)
class _Mask:
    """What stands for a mask that its maker would let see the last `window` keys; None: all."""

    window: int | None


class _Loop:
    """A model without its layers, which take note of the mask that each would get."""

    gradient_checkpointing = False

    def __init__(self, model: Any) -> None:
        self.model, self.masks = model, list[Any]()
        self.layers = [self._layer] * len(model.layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def _layer(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> Tensor:
        self.masks.append(attention_mask)
        return hidden_states

    def norm(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def rotary_emb(self, *_: Any, **__: Any) -> None:
        return None


def windows(model: Any) -> list[int | None] | None:
    """How many keys up to itself each layer's mask lets a token see; None where that isn't known.

    The stock forward runs without layers, norm and table, and with stand-ins for the mask makers of transformers that
    make causal masks, plain or of a window. It isn't known where a layer gets anything else, or a maker is handed more
    than the model's config and inputs: a mask to be joined with, say.
    """
    from transformers import masking_utils as makers  # not before there is a model of it

    def plain(**given: Any) -> _Mask | None:
        return _Mask(None) if _is_usual(given) else None

    def sliding(**given: Any) -> _Mask | None:
        return _Mask(model.config.sliding_window) if _is_usual(given) else None

    def _is_usual(given: dict[str, Any]) -> bool:
        return _ARGUMENTS.issuperset(given) and given["config"] is model.config and given["attention_mask"] is None

    stand_ins = {makers.create_causal_mask: plain, makers.create_sliding_window_causal_mask: sliding}
    forward: Any = inspect.unwrap(type(model).forward)
    loop = _Loop(model)
    x = torch.zeros(1, 1, 1, device=next(model.parameters()).device)
    try:
        _with(forward, stand_ins)(loop, None, None, None, None, x, use_cache=False)
    except Exception:  # whatever a forward does with what it isn't made for
        return None
    masks = [mask.window for mask in loop.masks if isinstance(mask, _Mask)]
    return masks if len(masks) == len(loop.masks) == len(loop.layers) else None


def _with(function: Any, stand_ins: dict[Callable, Callable]) -> Callable:
    """The same function, with others in the place of some that it finds by a global name."""
    found = function.__globals__.items()
    names = {name: stand_ins.get(value, value) if isinstance(value, FunctionType) else value for name, value in found}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
