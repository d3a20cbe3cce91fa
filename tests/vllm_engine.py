"""One engine of vLLM in a process of its own: `python tests/vllm_engine.py '{"model": .., "ids": .., "out": ..}'`.

It reads tokens (the file `ids`), writes `count` more, and saves to `out`:
    ids: all that it read, its own included.
    logits: of every one of them.
    apart: the same once more, where `apart` is asked for: norms, activations and attention quantize for nobody, so
        that each layer quantizes its own input.
Further fields are vLLM's own options.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # so that logits can be had

import torch
from vllm import LLM, SamplingParams


def main(model: str, ids: str, out: str, count: int = 1, apart: bool = False, **options) -> None:
    defaults = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "enable_prefix_caching": False}
    engine = LLM(model, skip_tokenizer_init=True, **{**defaults, **options})
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    read = torch.load(ids)[0].tolist()
    logits, written = run(engine, runner.model, read, count)
    saved = {"ids": torch.tensor(read + written[:-1]), "logits": logits}
    if apart:
        for module in runner.model.modules():
            vars(module).pop("_input_quant_key", None)
        saved["apart"], _ = run(engine, runner.model, read, count)
    torch.save(saved, out)


def run(engine: LLM, model: torch.nn.Module, read: list[int], count: int) -> tuple[torch.Tensor, list[int]]:
    compute, calls = model.compute_logits, []
    model.compute_logits = lambda *args: calls.append(compute(*args).float()) or calls[-1]
    asked = SamplingParams(max_tokens=count, temperature=0, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    written = engine.generate({"prompt_token_ids": read}, asked)[0].outputs[0].token_ids
    model.compute_logits = compute
    # While it reads it computes, a chunk at a time, those of the last token and then those of the tokens before.
    rows, following = [], iter(calls)
    while sum(map(len, rows)) < len(read) - 1:
        last = next(following)
        rows.append(next(following))
    return torch.cat([*rows, last, *following]), list(written)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
