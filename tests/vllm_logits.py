"""Runs requests through vLLM and saves what its sampler was given: python tests/vllm_logits.py DIRECTORY ORDER.json.

The order has `engine`, arguments of vllm.LLM; `calls`, lists of prompts (token ids), each list one call of generate.
Saves DIRECTORY/logits.pt: for every call and prompt the first two denoising steps, each with its canvas, temperature
and logits; and the names of the classes that served the attention layers.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = 2
# Set for workers that are processes of their own: their process id and a suffix make the name.
RECORDS = "TEST_VLLM_RECORDS"


def record_steps() -> list[dict[str, Any]]:
    """Has vLLM's sampler keep its input; the list grows while vLLM runs."""
    from vllm.model_executor.models import diffusion_gemma

    records: list[dict[str, Any]] = []
    inner = diffusion_gemma.DiffusionSampler.__call__

    def call(self: Any, logits: torch.Tensor, batch: Any, draft_logits: torch.Tensor | None = None) -> Any:
        states, row = self.diffusion_states, 0
        counts = np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1]).tolist()
        for index, count in enumerate(counts):
            slot = int(batch.idx_mapping_np[index])
            if count and not bool(states.is_encoder_phase[slot]):
                slots = torch.tensor([slot])
                schedule = (float(states.max_denoising_steps), self.t_min, self.t_max)
                record = {
                    "request": batch.req_ids[index],
                    "others": batch.num_reqs - 1,
                    "canvas": states.canvas[slot, :count].clone(),
                    "temperature": float(diffusion_gemma._denoise_temperature(states.step, slots, *schedule)[0]),
                    "logits": logits[row : row + count].float().clone(),
                }
                records.append(record)
            row += count
        if RECORDS in os.environ:
            torch.save(records, f"{os.environ[RECORDS]}.{os.getpid()}")
        return inner(self, logits, batch, draft_logits)

    diffusion_gemma.DiffusionSampler.__call__ = call
    return records


class Worker:
    """What a worker is given beside its own methods: none. It imports this module for it."""


def main() -> None:
    directory, order = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    parallel = order["engine"].get("tensor_parallel_size", 1) > 1
    if parallel:
        os.environ[RECORDS] = str(directory / "records")
        order["engine"]["worker_extension_cls"] = "vllm_logits.Worker"
    records = record_steps()
    from vllm import LLM, SamplingParams

    engine = LLM(**order["engine"])
    settings = SamplingParams(temperature=1.0, max_tokens=16, extra_args={"diffusion_max_steps": STEPS})
    saved: list[Any] = []
    for prompts in order["calls"]:
        before = len(records)
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        if parallel:
            records = torch.load(next(directory.glob("records.*")), weights_only=True)
        found = records[before:]
        steps = [[r for r in found if r["request"].split("-")[0] == a.request_id][:STEPS] for a in answers]
        saved.append(steps)
    classes: list[str] = []
    if not parallel:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention import Attention

        layers = get_layers_from_vllm_config(engine.llm_engine.vllm_config, Attention)
        classes = [type(layer.impl).__name__ for layer in layers.values()]
    torch.save({"calls": saved, "classes": classes}, directory / "logits.pt")


if __name__ == "__main__":
    main()
elif RECORDS in os.environ:
    record_steps()
