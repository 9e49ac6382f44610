"""One point of `make report` by transformers' own generate, with its static cache, compiled on request.

    python bench/report_transformers.py JSON

It runs in its own process, because two models of the true size do not fit in memory. Prints a JSON line; before a
compiled run, whose compilation may take longer than there is time, one of an uncompiled run.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch


class CanvasTimes:
    """A streamer that records when each canvas is done (the prompt comes first)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # `value` is on the host, so the device has finished

    def end(self) -> None:
        pass


def make_model(order: dict[str, Any]) -> Any:
    """transformers' class with normal weights and unit norms; router rows of experts that are not hit are zero."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(order["device"]):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(order["config"]))
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(order["device"]).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith("router.proj.weight"):
                parameter[order["experts"] :] = 0.0
    return model.eval()


def generation_settings(order: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """Every canvas takes all its steps: its draft would have to stay the same for longer than there are steps."""
    settings: dict[str, Any] = {
        "max_new_tokens": order["canvases"] * order["config"]["canvas_length"],
        "max_denoising_steps": order["steps"],
        "stability_threshold": order["steps"] + 1,
        "confidence_threshold": 0.005,
        "eos_token_id": None,
        "cache_implementation": "static",
        "disable_compile": not compiled,
    }
    return settings


def main() -> None:
    order = json.loads(sys.argv[1])
    import transformers

    model = make_model(order)
    generator = torch.Generator().manual_seed(1)
    vocabulary = order["config"]["text_config"]["vocab_size"]
    ids = torch.randint(5, vocabulary, (order["batch"], order["prefix"]), generator=generator)
    for compiled in dict.fromkeys((False, order["compile"])):
        for _ in range(2 if compiled else 1):  # the first compiles
            streamer = CanvasTimes()
            model.generate(ids.to(order["device"]), streamer=streamer, **generation_settings(order, compiled))
        # Each interval between canvases has one encode and all steps, as for this package.
        seconds = median(end - begin for begin, end in pairwise(streamer.times[1:]))
        figures = {
            "canvas_seconds": seconds,
            "forward_seconds": seconds / (order["steps"] + 1),
            "tokens_per_second": order["batch"] * order["config"]["canvas_length"] / seconds,
            "transformers": transformers.__version__,
            "compiled": compiled,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
