"""One engine of vLLM in a process of its own: `python tests/vllm_engine.py '{"model": .., "ids": .., "out": ..}'`.

It reads tokens (the file `ids`), by teacher forcing, writes `count` more of its own, and saves {"logits": of all that
was read, "tokens": what it wrote} to `out`. Further fields are vLLM's own options.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # so that logits can be had

import torch
from vllm import LLM, SamplingParams


def run(model: str, ids: str, out: str, count: int = 1, **options) -> None:
    options = {"enforce_eager": True, "max_model_len": 512, "enable_prefix_caching": False, **options}
    engine = LLM(model, dtype="bfloat16", skip_tokenizer_init=True, **options)
    read = torch.load(ids)[0].tolist()
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    compute, seen = runner.model.compute_logits, []
    runner.model.compute_logits = lambda *args: seen.append(compute(*args)) or seen[-1]
    asked = SamplingParams(max_tokens=count, temperature=0, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    written = engine.generate({"prompt_token_ids": read}, asked)[0].outputs[0].token_ids
    prompt = next(logits for logits in seen if len(logits) == len(read) - 1)
    torch.save({"logits": torch.cat([prompt, seen[0][-1:]]).float(), "tokens": list(written)}, out)


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
