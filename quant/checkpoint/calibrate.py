"""Static scales: running a model on data, once, for whichever schemes want them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch import Tensor, nn

from ..methods.calibration import Calibration, check_batches
from ..methods.convert import calibrated_inputs, layers_of


def calibrate(
    model: nn.Module,
    data: Iterable[Tensor | Mapping[str, Any]],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    progress: bool = True,
) -> Calibration:
    """The span of what each linear layer, and each product of experts, gets over `data`: static scales come from it.

        spans = calibrate(model, batches)
        save_quantized(quantize_model(model, "nvfp4", spans), "smollm2-nvfp4")

    The same spans serve "fp8_static", "int8_static", "int8_static_asym" and "nvfp4", on the model or on a copy of it:
    `scale = max(|least|, |largest|) / 448` (FP8), `/ 127` (INT8), `/ 2688` (NVFP4's second scale).

    Args:
        model: not quantized; it is run as it is and stays so.
        data: batches, what `model(batch)` takes, or keyword arguments.
        ignore: layers left out, as `quantize_model`'s.
        progress: print how far it is, to stderr, once a second.

    Returns:
        For `quantize_model`'s `calibration`.

    Raises:
        TypeError, ValueError: an argument is not as above, a layer never gets an input, or one that isn't finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model is {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(progress, bool):
        raise TypeError(f"calibrate: progress is {progress!r}, expected a bool")
    check_batches("calibrate", "data", data)
    after = _Progress(data) if progress else lambda done: None
    return calibrated_inputs("calibrate", "data", model, *layers_of("calibrate", model, ignore), data, after)


class _Progress:
    def __init__(self, data: Iterable):
        self.count = f" of {len(data)}" if isinstance(data, Sized) else ""
        self.total = len(data) if isinstance(data, Sized) else None
        self.start = self.printed = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.printed >= 1 or done == self.total:
            self.printed = now
            print(f"calibrate: {done}{self.count} batches, {now - self.start:.0f} s", file=sys.stderr, flush=True)
