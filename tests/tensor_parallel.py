"""Models cut over ranks, which are threads: that costs no process."""

import copy
import threading

import torch
from patching import tokens
from ranks import threads

import models_patch
from fused_ops.workspace import AllReduceWorkspace

SECONDS = 20  # that a rank waits for one that failed
parsing = threading.Lock()


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
    with parsing:  # of sources, by which modules are recognised: Python 3.11's `ast` fails in two threads at once
        return model, models_patch.shard(model, workspace)


def patch(model):
    with parsing:
        return models_patch.patch(model)


def stepwise(model, cache):
    """Logits of a sequence that comes in parts."""
    parts = tokens(9, 1).split((6, 2, 1), 1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
