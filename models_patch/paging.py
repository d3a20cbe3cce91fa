"""When attention of a patched model reads keys and values in the blocks of a `PagedKVCache`, where they are.

`paged_attention` computes one thing: each token sees its sequence up to itself, or a window of that. A mask may say
something else, so the model's forward decides once, before any mask is made: where the mask it got is None, or a row of
ones for each sequence, layers get a mask of no keys, which stands for that. Any other mask (left padding, one of four
dimensions, a dict of one for each type of layer) is the model's to apply, by its attention function, to keys and values
that are gathered; and so is what only that function has: weights to return, dropout in training, `is_causal`, an
implementation of the user's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .binding import changed_linear
from .paged_cache import PagedKVCache

# Those of transformers, which differ in speed. Others may compute anything.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def model(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The stock forward of a model without head; a step of a `PagedKVCache` needs neither mask nor positions."""
    x = inputs_embeds if input_ids is None else input_ids
    if isinstance(past_key_values, PagedKVCache) and x is not None:
        kept = _why_the_models(self, kwargs)
        attention_mask, position_ids = _of_step(past_key_values, x, attention_mask, position_ids, kept)
    inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
    return type(self).forward(self, *inputs, *args, **kwargs)


def is_paged(mask: Any) -> bool:
    """Whether a mask that a layer got is the one of no keys."""
    return isinstance(mask, Tensor) and mask.shape[-1] == 0


def _why_the_models(module: Any, options: dict[str, Any]) -> str:
    """What a call asks for that only the model's attention function does; "" where that is nothing."""
    config = module.config
    if not _is_stock(config._attn_implementation):
        return f"attention {config._attn_implementation!r} isn't transformers' own"
    if module.training:
        return "the model is in training mode; eval() ends it"
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        return "output_attentions asks for weights"
    if options.get("is_causal") is not None or not getattr(config, "is_causal", True):
        return "is_causal is given"
    return "" if _absorbs(module) else "kv_b_proj is quantized or hooked"


@torch.compiler.disable
def _is_stock(implementation: str) -> bool:
    """Whether attention and masks of that name are transformers' own; one may have registered others by it."""
    found = (
        functions.get(implementation, None) for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    )
    return implementation in IMPLEMENTATIONS and all(
        function is None  # "eager", which is the model's
        or getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers.")
        for function in found
    )


@torch.compiler.disable
def _absorbs(module: Any) -> bool:
    """Whether `mla_attention` may use the weights it takes: one may have quantized them since, or hooked a layer."""
    projections = (getattr(layer.self_attn, "kv_b_proj", None) for layer in module.layers)
    return all(projection is None or changed_linear(projection) is None for projection in projections)


@torch.compiler.disable  # which tokens are whose is kept in Python
def _of_step(
    cache: PagedKVCache, x: Tensor, mask: Any, positions: Tensor | None, kept: str
) -> tuple[Any, Tensor | None]:
    """(the mask of no keys, or the one that was given; the positions of the step)

    kept: why attention is the model's, if it is.
    """
    step, (batch, length) = cache.pending, x.shape[:2]
    packed = step is not None and not step.is_batch_of(length)
    if mask is not None and not kept:
        whole = (batch, cache.get_seq_length() + length)
        fits = not packed and isinstance(mask, Tensor) and tuple(mask.shape) == whole
        if not fits or not mask.all():
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            kept = f"attention_mask is {got}"
    if not kept:
        if positions is None and step is not None and step.positions.numel() == batch * length:
            positions = step.positions.view(batch, length)
        return torch.empty(1, 1, length, 0, dtype=torch.bool, device=x.device), positions
    if packed and (mask is None or (isinstance(mask, Tensor) and mask.ndim < 4)):
        raise ValueError(
            f"PagedKVCache: {kept}, so attention is the model's, which takes tokens of several sequences in one row "
            "with an attention_mask [1, 1, tokens, all keys] that lets each see its own sequence; otherwise pass none"
        )
    return mask, positions
