"""A real model cut over ranks, and the demo, whose ranks are processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_as_near, assert_predicts_alike
from tensor_parallel import cut, on_ranks
from torch.nn.functional import linear

from bench import demo_tp, models
from models_patch import patch
from quant.methods import quantize_model


@pytest.mark.parametrize(
    ("world", "dtype", "scheme", "length"),
    [
        (2, "float32", None, 100),
        (3, "float32", None, 100),
        (3, "bfloat16", None, 60),
        (3, "float32", "int8_token", 100),
    ],
)
def test_smollm2_predicts_on_ranks_as_in_one_process(one_thread, world, dtype, scheme, length):
    model, tokenizer = models.load("smollm2", getattr(torch, dtype))
    ids = models.tokens(tokenizer)[:, :length]

    def logits(model):
        return linear(model.model(ids).last_hidden_state[0].float(), model.lm_head.weight.float())

    def run(group):
        part, report = cut(model.requires_grad_(False), group)
        if scheme is not None:
            quantize_model(part, scheme)
        patch(part)
        assert len(report.left) == (0 if world == 3 else 30)
        return logits(part)

    results = on_ranks(world, run)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    with torch.no_grad():
        if scheme is not None:
            exact = logits(model)
            quantize_model(model, scheme)
            patch(model)
            assert_as_near(results[0], exact, logits(model))
        else:
            patch(model)
            assert_predicts_alike(results[0], logits(model), ids[0], model.dtype)


def test_the_demo_runs_in_processes(tmp_path):
    root, ranks = Path(__file__).parents[1], []
    command = [sys.executable, "-m", "bench.demo_tp", "--tokens", "2", "--read", "20", "--timeout", "120"]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    for rank in range(2):  # as torchrun does, whose own start costs as much as a rank
        where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in where.items()}}
        output = (tmp_path / f"{rank}").open("w+")
        ranks.append((subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output), output))
    try:
        statuses = [process.wait(240) for process, _ in ranks]
    finally:
        for process, output in ranks:
            process.kill()
            output.close()
    told = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert statuses == [0, 0], told
    assert "All 2 ranks wrote the same tokens from the same bits of logits." in told[0]


def test_the_demo_says_that_there_are_no_ranks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        SystemExit, match=r"WORLD_SIZE.* not set, so there are no ranks; start it by torchrun .*make demo-tp"
    ):
        demo_tp.main([])
