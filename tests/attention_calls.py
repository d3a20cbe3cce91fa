"""Calls of paged_attention for its tests, and what torch makes of them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops.attention_inputs import batch, blocks_of, filled
from quant.key import FP8, FP8_FNUZ

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = [FP8, FP8_FNUZ, torch.int8]
BACKENDS = sorted(set(fused_ops.OPS["paged_attention"].backends) & {"cpu", "reference"})
needs_kernels = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels on this machine")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MIXED = ((5, 5), (1, 300), (0, 9), (70, 530), (1, 1), (2, 257))  # (queries, tokens)


def inputs(lengths=MIXED, heads=4, kv_heads=2, cols=64, v_cols=None, dtype=torch.bfloat16, held=None, block_size=16):
    """The arguments of paged_attention by name."""
    tokens, blocks = sum(queries for queries, _ in lengths), blocks_of(lengths, block_size)
    q = torch.randn(tokens, heads, cols).to(dtype)
    caches = [filled((blocks, block_size, kv_heads, c), held or dtype, "cpu") for c in (cols, v_cols or cols)]
    tables, seq_lens, starts = batch(lengths, block_size, "cpu")
    return {
        "q": q, "k_cache": caches[0][0], "v_cache": caches[1][0], "block_tables": tables, "seq_lens": seq_lens,
        "query_start_loc": starts, "scale": cols**-0.5, "k_scale": caches[0][1], "v_scale": caches[1][1],
    }  # fmt: skip


def gathered(call, cache, i):
    """The cached rows of sequence i, as the values that they stand for, in float64."""
    size, length = call[cache].shape[1], int(call["seq_lens"][i])
    places = torch.arange(length)
    rows = call[cache][call["block_tables"][i, places // size].long(), places % size].double()
    scale = call[f"{cache[0]}_scale"]
    return rows if scale is None else rows * scale.double().view(-1, 1)


def by_torch(call, dtype):
    """Rows of every sequence in turn by torch's own attention, in `dtype`."""
    found = [call["q"].new_empty(0, call["q"].shape[1], call["v_cache"].shape[-1], dtype=dtype)]
    group = call["q"].shape[1] // call["k_cache"].shape[2]
    for i, (start, end) in enumerate(zip(call["query_start_loc"], call["query_start_loc"][1:], strict=False)):
        if start == end:
            continue
        q = call["q"][start:end].to(dtype).transpose(0, 1)
        k, v = (
            gathered(call, c, i).to(dtype).transpose(0, 1).repeat_interleave(group, 0) for c in ("k_cache", "v_cache")
        )
        ahead = torch.arange(k.shape[1]) - torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        seen = ahead <= 0 if call.get("causal", True) else torch.ones_like(ahead, dtype=torch.bool)
        if window := call.get("sliding_window"):
            seen &= ahead > -window
        if call.get("soft_cap") or call.get("sinks") is not None:
            logits = q @ k.transpose(1, 2) * call["scale"]
            if cap := call.get("soft_cap"):
                logits = torch.tanh(logits / cap) * cap
            logits = logits.masked_fill(~seen, -math.inf)
            if (sinks := call.get("sinks")) is not None:
                logits = torch.cat([logits, sinks.to(dtype)[:, None, None].expand(*logits.shape[:2], 1)], -1)
            y = logits.softmax(-1)[..., : k.shape[1]] @ v
        else:
            y = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=call["scale"])[
                0
            ]
        found.append(y.transpose(0, 1))
    return torch.cat(found).flatten(1)


def run_alone(script):
    """In a process of its own, which imports what this one does."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": paths})
