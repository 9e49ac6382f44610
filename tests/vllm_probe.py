"""Runs requests in vLLM's engine and prints what came of them; a process of its own, told by JSON on the command line.

    python vllm_probe.py '{"model": FOLDER, "requests": [{"ids": [...], "max_tokens": 16, "extra_args": {...}, "n": 1}],
                           "engine": {"tensor_parallel_size": 2}}'

A line on stdout that begins with FOUND has JSON: the tokens of each request's answers one after the other, and where
the engine is in this process, which classes its model, sampler and experts are of, and whose rms_norm comes first.
Where the engine keeps statistics (disable_log_stats false), how often requests were preempted. With `models`, a list of
folders, one engine after the other runs the requests, and the JSON is a list.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any


def classes(llm: Any) -> dict[str, str]:
    from vllm import ir

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    methods = {type(one.quant_method).__name__ for one in runner.model.modules() if hasattr(one, "quant_method")}
    return {
        "model": type(runner.model).__module__,
        "sampler": type(runner.sampler).__module__,
        "experts": ",".join(sorted(name for name in methods if "MoE" in name)),
        "others": ",".join(sorted(name for name in methods if "MoE" not in name)),
        "rms_norm": ir.ops.rms_norm.get_priority()[0],
    }


def run(model: str, told: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "disable_log_stats": True,
        "dtype": "float32",
        **told.get("engine", {}),
    }
    llm = LLM(model=model, **engine)
    requests = told["requests"]
    parameters = [
        SamplingParams(
            temperature=1.0,
            max_tokens=one["max_tokens"],
            n=one.get("n", 1),
            ignore_eos=True,
            detokenize=False,
            extra_args=one.get("extra_args"),
        )
        for one in requests
    ]
    outputs = llm.generate([{"prompt_token_ids": one["ids"]} for one in requests], parameters, use_tqdm=False)
    found: dict[str, Any] = {
        "tokens": [[token for answer in one.outputs for token in answer.token_ids] for one in outputs]
    }
    if not engine["disable_log_stats"]:
        found["preemptions"] = sum(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")
    if engine.get("tensor_parallel_size", 1) == 1:
        found["classes"] = classes(llm)
    return found


def run_each(told: dict[str, Any]) -> list[dict[str, Any]]:
    """One engine after the other; one that does not start leaves the text of its error."""
    from vllm.distributed import cleanup_dist_env_and_memory

    found: list[dict[str, Any]] = []
    for model in told["models"]:
        os.environ["TEST_VLLM_MODEL"] = Path(model).name
        try:
            found.append(run(model, told))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


def main() -> None:
    told = json.loads(sys.argv[1])
    if "TEST_VLLM_EXPERTS" in os.environ:
        import vllm_experts  # noqa: F401
    found = run_each(told) if "models" in told else run(told["model"], told)
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
