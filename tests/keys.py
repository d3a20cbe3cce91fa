"""The keys that tests of formats go through, and what a call takes for them."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from quant import (
    FP8_DYNAMIC_GROUP_64,
    FP8_DYNAMIC_GROUP_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    INT8_DYNAMIC_GROUP_128,
    NAMED_KEYS,
    QuantKey,
    ScaleLayout,
)
from quant.key import FP8_FNUZ

KEYS = {
    **NAMED_KEYS,
    "FP8_TOKEN_POWER": FP8_DYNAMIC_TOKEN.with_scale(power_of_two=True),
    "FP8_GROUP_POWER": FP8_DYNAMIC_GROUP_128.with_scale(power_of_two=True),
    "FNUZ_STATIC": replace(FP8_STATIC_TENSOR, dtype=FP8_FNUZ),
    "FNUZ_TOKEN": replace(FP8_DYNAMIC_TOKEN, dtype=FP8_FNUZ),
    "FNUZ_GROUP_POWER": replace(FP8_DYNAMIC_GROUP_64, dtype=FP8_FNUZ).with_scale(power_of_two=True),
    "INT8_GROUP_ASYM": replace(INT8_DYNAMIC_GROUP_128, symmetric=False),
    "INT8_TENSOR_ASYM": QuantKey(torch.int8, FP8_DYNAMIC_TENSOR.scale, symmetric=False),
}
EVERY_KEY = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
SERVED = {name: key for name, key in KEYS.items() if key.symmetric or key.scale.static or not key.per_tensor}
ACTIVATIONS = "silu_mul_quant", "gelu_tanh_mul_quant", "swiglu_oai_mul_quant", "relu2_quant"
EVERY_SERVED_KEY_AND_SOME_ACTIVATION = pytest.mark.parametrize(
    ("name", "key"), list(zip(cycle(ACTIVATIONS), SERVED.values(), strict=False)), ids=SERVED
)
BY_ROW = {name: key for name, key in KEYS.items() if key.scale.static or not key.per_tensor}
EVERY_KEY_BY_ROW = pytest.mark.parametrize("key", BY_ROW.values(), ids=BY_ROW)  # none has one dynamic scale


def layouts(key: QuantKey) -> list[QuantKey]:
    """The key in every layout that it has."""
    found = []
    for layout in ScaleLayout:
        try:
            found.append(key.with_scale(layout=layout))
        except ValueError:
            continue
    return found


def given_tensors(key: QuantKey) -> dict[str, Tensor]:
    tensors = {}
    if key.scale.static:
        tensors["scale"] = torch.tensor([0.03])
    if key.scale2 is not None:
        tensors["scale2"] = torch.tensor([4 / 2688])
    if key.scale.static and not key.symmetric:
        tensors["zero_point"] = torch.tensor([3], dtype=torch.int32)
    return tensors
