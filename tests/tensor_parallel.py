"""Models cut over ranks, which are threads: that costs no process."""

import copy

import torch
from patching import tokens
from ranks import threads

import models_patch
from fused_ops.workspace import AllReduceWorkspace

SECONDS = 20  # that a rank waits for one that failed


def on_ranks(world, function):
    """What `function(group)` returns on each of so many ranks, which are threads."""

    def run(group):
        with torch.no_grad():
            return function(group)

    return threads(world, run, seconds=SECONDS)


def cut(model, group):
    """(this rank's part of a copy of the model, the report)"""
    model = copy.deepcopy(model)
    workspace = AllReduceWorkspace(group, 64, model.config.hidden_size, model.dtype, timeout=SECONDS)
    return model, models_patch.shard(model, workspace)


def stepwise(model, cache):
    """Logits of a sequence that comes in parts."""
    parts = tokens(9, 1).split((6, 2, 1), 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
