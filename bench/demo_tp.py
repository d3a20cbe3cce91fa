"""A real model cut over several ranks, processes of this machine: `make demo-tp` (RANKS=3).

SmolLM2-135M-Instruct (9 heads on 3 of keys) is sharded, patched, and writes an answer on all ranks, beside the same
model in one process, and beside the same ranks where gloo sums, which is what ranks on several hosts do.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from datetime import timedelta
from hashlib import sha256
from itertools import takewhile

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

import models_patch
from fused_ops.workspace import AllReduceWorkspace
from models_patch import Report
from quant.methods import quantize_model

from . import machine, models
from .demo import Variant, prompted, read, write
from .table import table

NAMES = ALONE, SHARED, GLOO = "one process", "ranks, through shared memory", "ranks, through gloo"
A_TURN = 10  # tokens
LAUNCH = "torchrun --standalone --nproc-per-node 3 -m bench.demo_tp, or make demo-tp RANKS=3"
NOTE = """A rank has {threads} of this machine's {cores} cores, and so has the one process. Ranks sum in float32 in
their own order, and gloo in another, which turns a word now and then: texts may differ, but never between ranks."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.demo_tp", description=__doc__.splitlines()[0], usage=LAUNCH)
    parser.add_argument("--scheme", help="quantize the layers: int8_token, mxfp8, ... (default: float32)")
    parser.add_argument("--tokens", type=int, default=50, help="how many each writes (default: 50)")
    parser.add_argument("--read", type=int, default=200, help="tokens that perplexity is of (default: 200)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for a rank (default: 300)")
    options = parser.parse_args(arguments)
    absent = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise SystemExit(f"bench.demo_tp: {', '.join(absent)} not set, so there are no ranks; start it by {LAUNCH}")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    except (distributed.DistError, RuntimeError) as error:
        raise SystemExit(
            f"bench.demo_tp: rank {rank} waited {options.timeout:g} s for all {world} ranks to come: {error}"
        ) from error
    try:
        run(options)
    finally:
        distributed.destroy_process_group()


def run(options: argparse.Namespace) -> None:
    """The demo, on every rank; the first one tells of it."""
    group = distributed.group.WORLD
    assert group is not None
    rank, world, start = group.rank(), group.size(), time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // world))

    def tell(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    tell(machine.sentence(machine.describe("transformers")))
    if rank == 0:
        models.load(dtype=torch.float32)  # which converts it, the first time
    distributed.barrier()
    stock, tokenizer = models.load(dtype=torch.float32)
    reading, (asked, prompt) = models.tokens(tokenizer)[:, : options.read], prompted(tokenizer)
    variants, reports = {}, {}
    for name in NAMES:
        if rank == 0 or name != ALONE:
            model, reports[name] = made(name, stock, group, options)
            variants[name] = Variant(name, model)
    tell("\n" + "\n\n".join(map(str, reports[SHARED])) + "\n")
    for name in NAMES:
        if name in variants:
            read(variants[name], reading)
            tell(f"[{time.perf_counter() - start:4.0f} s] {name}: perplexity {variants[name].perplexity:.4f}")
        distributed.barrier()  # ranks that have nothing to do wait without using their core
    turns = -(-options.tokens // A_TURN)
    for turn in range(turns):
        tell(f"[{time.perf_counter() - start:4.0f} s] all write in turns, {turn + 1} of {turns}")
        for name in NAMES:
            if name in variants:
                write(variants[name], prompt, min(A_TURN, options.tokens - turn * A_TURN))
            distributed.barrier()
    tell(f"\n{asked}")
    for name, variant in variants.items():
        answer = takewhile(lambda token: token != tokenizer.eos_token_id, variant.tokens)
        tell(f"\n{name}:\n  {tokenizer.decode(list(answer))}")
        if name != ALONE:
            check_agreement(variant, prompt)
    tell(f"\nAll {world} ranks wrote the same tokens from the same bits of logits.\n")
    tell(f"{summary(variants)}\n\n{NOTE.format(threads=torch.get_num_threads(), cores=cores)}")


def made(
    name: str, stock: PreTrainedModel, group: ProcessGroup, options: argparse.Namespace
) -> tuple[PreTrainedModel, tuple[Report, ...]]:
    """(the model of a variant, what was done to it)"""
    embedding = stock.get_input_embeddings().weight
    model, reports = copy.deepcopy(stock, {id(embedding): embedding}), []
    if name != ALONE:
        workspace = AllReduceWorkspace(
            group, options.read, model.config.hidden_size, model.dtype, timeout=options.timeout
        )
        if name == GLOO:
            workspace.shared = False
        reports.append(models_patch.shard(model, workspace))
    if options.scheme is not None:
        quantize_model(model, options.scheme)
    return model, (*reports, models_patch.patch(model))


@torch.inference_mode()
def check_agreement(variant: Variant, ids: Tensor) -> None:
    """SystemExit unless all ranks wrote the same tokens, and have the same bits of logits."""
    logits = variant.model(ids).logits.contiguous()
    mine = variant.tokens, sha256(logits.view(torch.uint8).numpy()).hexdigest()
    every: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    differ = [rank for rank, each in enumerate(every) if each != every[0]]
    if differ:
        raise SystemExit(f"bench.demo_tp: {variant.name}: ranks {differ} differ from rank 0")


def summary(variants: dict[str, Variant]) -> str:
    base = variants.get(ALONE) or variants[SHARED]
    header = ("model", "perplexity", "decode tok/s", "", "ms a token", "weights MB a rank")
    rows = [
        (
            *(v.name, f"{v.perplexity:.4f}", f"{v.decode:.1f}", f"x {v.decode / base.decode:.2f}"),
            *(f"{1e3 / v.decode:.1f}", f"{v.megabytes:.0f}"),
        )
        for v in variants.values()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
