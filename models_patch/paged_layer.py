"""The memory of one layer of a key-value cache in blocks, and the scales of one that holds codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from fused_ops.kv_cache import CODES

from .blocks import Step

Scales = tuple[Tensor, Tensor]


def kv_scales(model: nn.Module) -> list[Scales]:
    """The buffers `k_scale` and `v_scale` of a model's attentions, by layer: `load_quantized` makes them.

    Raises ValueError where a layer from the first to the last that has them has none, or none has.
    """
    modules: list[Any] = [module for module in model.modules() if {"k_scale", "v_scale"} <= module._buffers.keys()]
    found: dict[int, Scales] = {module.layer_idx: (module.k_scale, module.v_scale) for module in modules}
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"kv_scales: model has scales of layers {sorted(found)}, expected all, from 0 on")
    return [found[layer] for layer in range(len(found))]


def checked_scales(dtype: torch.dtype | None, scales: Any, layers: int, latent: bool) -> list[Scales | None]:
    """What `PagedKVCache` was given, float32 [1] or [kv_heads] of each layer; None where it holds S."""
    if dtype is None:
        if scales is not None:
            raise ValueError("PagedKVCache: scales are given, but dtype is None, which takes none")
        return [None] * layers
    if dtype not in CODES:
        raise TypeError(f"PagedKVCache: dtype is {dtype!r}, expected None or one of {CODES}")
    if latent:
        raise ValueError(f"PagedKVCache: dtype is {dtype}, expected None: latents are held in S")
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise TypeError(f"PagedKVCache: scales is {type(scales).__name__}, expected (k_scale, v_scale) of each layer")
    if len(scales) != layers:
        raise ValueError(f"PagedKVCache: scales has {len(scales)}, expected {layers}, (k_scale, v_scale) of each layer")
    for layer, pair in enumerate(scales):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"PagedKVCache: scales has {pair!r} for layer {layer}, expected (k_scale, v_scale)")
    k, v = ([_scale(value) for value in each] for each in zip(*scales, strict=True))
    return list(zip(k, v, strict=True))


def _scale(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        good = value.ndim == 1 and value.numel() > 0 and bool((value.isfinite() & (value > 0)).all())
    elif type(value) in (int, float):
        good = 2**-150 < value <= torch.finfo(torch.float32).max  # half of float32's least is 0 there
    else:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"PagedKVCache: scales has {got}, expected numbers or float32 Tensors")
    if not good:
        raise ValueError(f"PagedKVCache: scales has {value}, expected what is positive and finite, [1] or [kv_heads]")
    return value.detach() if isinstance(value, Tensor) else torch.tensor([float(value)])


class PagedLayer(CacheLayerMixin):
    """The memory of one layer, made when its first keys and values are seen.

    k_cache, v_cache: [blocks, block_size, kv_heads, head_dim] in S, or codes, of which k_scale and v_scale are float32
        [1] or [kv_heads].
    kv_cache: for latents [blocks, block_size, kv_lora_rank + rope_dim], whose parts the two are; None for others.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    k_cache: Tensor
    v_cache: Tensor
    kv_cache: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        latent: bool = False,
        codes: torch.dtype | None = None,
        scales: Scales | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.latent, self.codes = (num_blocks, block_size), latent, codes
        if scales is not None:
            self.k_scale, self.v_scale = scales
        self.device = torch.device("cpu")
        self.written: Step | None = None  # the last step whose tokens this layer has got

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        for name, scale in ("k_scale", self.k_scale), ("v_scale", self.v_scale):
            if scale is not None and scale.numel() not in (1, heads):
                raise ValueError(
                    f"PagedKVCache: scales has a {name} of {list(scale.shape)}, expected [1] or the [{heads}] of this "
                    "layer's kv_heads"
                )
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: where a mask makes a probability zero, what it weighs must be finite.
        if self.latent and key_states.shape[1] == 1:
            widths = key_states.shape[-1], value_states.shape[-1]
            self.kv_cache = key_states.new_zeros((*self.shape, sum(widths)))
            self.k_cache, self.v_cache = self.kv_cache.unsqueeze(2).split(widths, -1)
        else:
            new, held = (key_states, value_states), self.codes or self.dtype
            self.k_cache, self.v_cache = (x.new_zeros((*self.shape, *x.shape[1::2]), dtype=held) for x in new)
        if self.k_scale is not None and self.v_scale is not None:
            self.k_scale, self.v_scale = self.k_scale.to(self.device), self.v_scale.to(self.device)
        self.is_initialized = True

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks, from the first of each pair to the second."""
        if self.is_initialized and copies:
            source, target = torch.tensor(copies, device=self.device).unbind(1)
            for cache in map(_bytes, (self.k_cache, self.v_cache)):
                cache[target] = cache[source]

    def read(self, step: Step, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a step's sequences: [batch, kv_heads, length, head_dim], or packed in one row."""
        caches = (self.k_cache, self.k_scale), (self.v_cache, self.v_scale)
        k, v = (self._values(self._gathered(_bytes(cache), step, batch), scale) for cache, scale in caches)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _values(self, gathered: Tensor, scale: Tensor | None) -> Tensor:
        """In S, of [..., kv_heads, head_dim]."""
        if scale is None or self.codes is None:
            return gathered
        return (gathered.view(self.codes).float() * scale.view(-1, 1)).to(self.dtype)

    def _gathered(self, cache: Tensor, step: Step, batch: int) -> Tensor:
        tables = step.block_tables.to(cache.device)
        if batch == len(step.sequences):
            return cache[tables].flatten(1, 2)[:, : step.lengths[0]]
        each = zip(tables, step.lengths, strict=True)
        return torch.cat([cache[table].flatten(0, 1)[:length] for table, length in each])[None]

    def get_max_length(self) -> int:
        return self.shape[0] * self.shape[1]

    # What else `Cache` asks of its layers none can do alone: blocks are those of all.

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("PagedLayer: call update of the PagedKVCache")

    def get_mask_sizes(self, *args: Any) -> Any:
        raise NotImplementedError("PagedLayer: call get_mask_sizes of the PagedKVCache")

    def get_seq_length(self) -> Any:
        raise NotImplementedError("PagedLayer: call get_seq_length of the PagedKVCache")


def _bytes(cache: Tensor) -> Tensor:
    """The memory of codes, since torch can't index all of their dtypes; others as they are."""
    return cache.view(torch.uint8) if cache.dtype in CODES else cache
