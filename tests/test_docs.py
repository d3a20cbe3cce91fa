"""What the documentation shows runs."""

import re
from pathlib import Path

import pytest
import torch
from compare import assert_same
from patching import tiny, tokens
from ranks import everywhere, workspaces

import models_patch
from fused_ops import fused_add_rms_norm_quant
from models_patch.paged_cache import OutOfBlocks, PagedKVCache
from quant import QuantizedActivation
from quant.methods import quantize_model


def blocks() -> list[str]:
    page = Path(__file__).parents[1] / "docs" / "attention.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_collectives_by_hand():
    """README's, on two ranks: the same bits as one rank's unfused operations of the sum."""
    page = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "all_gather_quantized" in block
    ]
    parts, residual = torch.randn(2, 5, 64), torch.randn(5, 64)
    norm, projections = torch.nn.RMSNorm(64), [torch.nn.Linear(64, 64, bias=False) for _ in range(2)]
    up_proj = quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), "int8_token")[0]
    made = workspaces(2, 4, 64)

    def run(w):
        of_rank = {"workspace": w, "y": parts[w.rank], "o_proj": projections[w.rank]}
        names = {"residual": residual, "norm": norm, "eps": 1e-6, "up_proj": up_proj, **of_rank}
        with torch.no_grad():
            exec(code, names)
        return names["x"], names["new_residual"], names["new_own"]

    with torch.no_grad():
        total = projections[0](parts[0]) + projections[1](parts[1])
        x, new = fused_add_rms_norm_quant(total, residual, norm.weight, 1e-6, **up_proj.input_quant())
    for w, (codes, new_residual, new_own) in zip(made, everywhere(made, run), strict=True):
        assert_same(codes.data, x.data)
        assert_same(codes.scale, x.scale)
        assert_same(new_residual, new)
        assert_same(new_own, new[w.rows(5)])


def test_attention():
    first, engine, second = blocks()
    names: dict = {}
    exec(first, names)
    assert isinstance(names["y"], QuantizedActivation)
    assert names["hidden"].shape == (21, 256)
    exec(engine, names)
    exec(second, names)
    assert (names["y"].shape, names["y"].dtype) == ((21, 128), torch.bfloat16)
    assert names["y"].isfinite().all()


def test_the_engine_gives_every_request_what_it_gets_alone():
    """Where blocks run out, prompts come in chunks, and begin alike."""
    code = next(block for block in blocks() if "def serve" in block)
    names = {"torch": torch}
    exec(code, names)
    model = tiny(dtype=torch.float32, num_hidden_layers=2)
    begin = tokens(11, batch=1)[0].tolist()
    prompts = [[*begin, i, 7, i + 3] for i in range(6)] + [[5, 6], begin[:3]]
    alone = [greedily(model, prompt, 9) for prompt in prompts]
    assert any(entry.operation == "paged_attention" for entry in models_patch.patch(model))
    for num_blocks, refusals in (64, False), (9, True):
        cache = Watched(model.config, num_blocks, 4)
        assert names["serve"](model, cache, prompts, 9, chunk=5) == alone
        assert cache.free_blocks == num_blocks
        assert cache.shared > 0
        assert (cache.refused > 0) is refusals
    model.model.layers[1].mlp.register_forward_pre_hook(_fail)
    cache = PagedKVCache(model.config, 64, 4)
    with pytest.raises(RuntimeError, match="midway"):
        names["serve"](model, cache, prompts, 9)
    assert (cache.length(0), cache.free_blocks) == (0, 64)


def greedily(model, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


class Watched(PagedKVCache):
    """Counts tokens that are shared, and refused steps."""

    shared = refused = 0

    def add(self, prefix_of=None, length=None):
        self.shared += length or 0
        return super().add(prefix_of, length)

    def step(self, tokens):
        try:
            return super().step(tokens)
        except OutOfBlocks:
            self.refused += 1
            raise


def _fail(*_):
    raise RuntimeError("midway")
