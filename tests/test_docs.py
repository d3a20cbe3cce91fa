"""What the documentation shows runs."""

import re
from pathlib import Path

import torch

from quant import QuantizedActivation


def test_attention():
    page = Path(__file__).parents[1] / "docs" / "attention.md"
    first, second = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    exec(first, names)
    assert isinstance(names["y"], QuantizedActivation)
    assert names["hidden"].shape == (21, 256)
    exec(second, names)
    assert (names["y"].shape, names["y"].dtype) == ((21, 128), torch.bfloat16)
    assert names["y"].isfinite().all()
