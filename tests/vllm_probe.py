"""Runs requests in vLLM's engine and prints what came of them; a process of its own, told by JSON on the command line.

    python vllm_probe.py '{"model": FOLDER, "requests": [{"ids": [...], "max_tokens": 16, "extra_args": {...}}],
                           "engine": {"tensor_parallel_size": 2}}'

A line on stdout that begins with FOUND has JSON: the tokens of each request, and where the engine is in this process,
which classes its model, sampler and experts are of.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def classes(llm: Any) -> dict[str, str]:
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    experts = {type(one.quant_method).__name__ for one in runner.model.modules() if hasattr(one, "quant_method")}
    return {
        "model": type(runner.model).__module__,
        "sampler": type(runner.sampler).__module__,
        "experts": ",".join(sorted(name for name in experts if "MoE" in name)),
    }


def main() -> None:
    from vllm import LLM, SamplingParams

    told = json.loads(sys.argv[1])
    engine = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "disable_log_stats": True,
        "dtype": "float32",
        **told.get("engine", {}),
    }
    llm = LLM(model=told["model"], **engine)
    requests = told["requests"]
    parameters = [
        SamplingParams(
            temperature=1.0,
            max_tokens=one["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args=one.get("extra_args"),
        )
        for one in requests
    ]
    outputs = llm.generate([{"prompt_token_ids": one["ids"]} for one in requests], parameters, use_tqdm=False)
    found: dict[str, Any] = {"tokens": [list(one.outputs[0].token_ids) for one in outputs]}
    if engine.get("tensor_parallel_size", 1) == 1:
        found["classes"] = classes(llm)
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
