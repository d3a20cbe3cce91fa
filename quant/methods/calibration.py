"""What the linear layers of a model get as input: the least and the largest value of it, over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Calibration(dict[str, Tensor]):
    """float32 [2], the least and the largest value of a layer's input, by the layer's path."""


def check_batches(caller: str, name: str, batches: Any) -> None:
    """Raise TypeError unless it is an iterable of what a model takes."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise TypeError(f"{caller}: {name} is {kind}, expected a list (or another iterable) of batches")


def observe(
    caller: str,
    name: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    after: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Run the model on the batches: what it takes, or keyword arguments; `after` is called with how many are done.

    Raises TypeError where a batch is something else, ValueError where a layer gets no input, or one that isn't finite.
    """
    spans = Calibration()

    def record(path: str):
        def hook(_, args, kwargs):
            x = (args[0] if args else kwargs["input"]).detach()
            if not x.numel():  # an expert that no token of this batch goes to
                return
            low, high = x.aminmax()
            if path in spans:
                low, high = torch.minimum(spans[path][0], low), torch.maximum(spans[path][1], high)
            spans[path] = torch.stack([low, high]).float()

        return hook

    hooks = [layer.register_forward_pre_hook(record(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                if not isinstance(batch, (Tensor, Mapping)):
                    got = f"{name} has a {type(batch).__name__} as batch {done}"
                    raise TypeError(f"{caller}: {got}, expected a tensor or keyword arguments in a dict")
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                after(done)
    finally:
        for hook in hooks:
            hook.remove()
    for path in layers:
        if path not in spans:
            raise ValueError(f"{caller}: {name} never gives {path} an input, so that it has no scale")
        if not spans[path].isfinite().all():
            raise ValueError(f"{caller}: {name} gives {path} an input that isn't finite")
    return spans
