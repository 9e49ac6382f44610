"""transformers' own model with and without dg.accelerate on the CPU, with two layers of true width, by turns.

    python bench/bench_transformers.py            # about ten minutes and 12 GB of memory; the checkpoint (5 GB) goes
    under build/, where bench_step_cpu.py looks for it too

One model in one process, accelerated and not by turns: transformers with its defaults (sdpa, its own choice for the
experts) against the same weights on this package's kernels. Hidden 2816, 128 experts of 704, top 8, vocabulary 262,144,
bf16, canvas 256, prompt 128; random weights as drawn (peaked distributions) and flattened (final norm x 0.05). The
figures are medians of the seconds and of each round's ratio. Compare ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step_cpu import FLATTENING, ROOT, write_checkpoint
from step_cpu_worker import PROMPT_TOKENS, prompt_ids
from torch import Tensor

import dgemma_ext as dg

# Speedups (the project's goals for two cores).
GOALS = {"step": 2.0, "sampler": 3.0}
CANVAS = 256


class Bench:
    """transformers' model, and the parts of a step as its generate calls them."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import DiffusionGemmaForBlockDiffusion, LogitsProcessorList
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

        self.model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.vocabulary = self.model.config.text_config.vocab_size
        ids = prompt_ids(self.vocabulary)
        with torch.no_grad():
            encoded = self.model.model.encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(PROMPT_TOKENS)[None]
            )
        # Since transformers 5.24 it is called cache, before past_key_values.
        self.cache_name = "cache" if hasattr(encoded, "cache") else "past_key_values"
        self.cache = getattr(encoded, self.cache_name)
        self.sampler_object = generation.EntropyBoundSampler(
            generation.EntropyBoundSamplerConfig(entropy_bound=0.1), CANVAS, self.vocabulary, 48
        )
        # A threshold that is never met, so that every step computes the next step's self-conditioning.
        self.stopping = generation.StableAndConfidentStoppingCriteria(1, 0.0)
        self.processors = LogitsProcessorList([generation.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, 48)])
        self.narrow = _NarrowTable(self.model.model.decoder.embed_tokens)

    def start(self, final_norm: float) -> None:
        """Sets the width of the distributions, and runs the first step of a canvas on both sides."""
        with torch.no_grad():
            self.model.model.decoder.norm.weight.fill_(final_norm)
        torch.manual_seed(0)
        canvas = self.sampler_object.initialize_canvas(1, torch.device("cpu"))
        self.canvas = {True: canvas, False: canvas}
        self.carried: dict[bool, Any] = {True: None, False: None}
        for enabled in (False, True):
            self.seconds(self.step, enabled)
        self.raw = torch.randn(1, CANVAS, self.vocabulary).to(torch.bfloat16)
        if final_norm == 1.0:
            # As peaked as the model's distributions: the largest logit is well above the others.
            self.raw[..., 7] += 25.0

    def seconds(self, part: Callable[[bool], None], enabled: bool) -> float:
        dg.accelerate(self.model, enabled)
        start = time.perf_counter()
        part(enabled)
        return time.perf_counter() - start

    @torch.no_grad()
    def first(self, enabled: bool) -> None:
        """The first step of a canvas, without self-conditioning. Accelerated, it also computes the next step's,
        which transformers computes in that step."""
        self._denoising_step(enabled, None, self.model.forward)

    @torch.no_grad()
    def step(self, enabled: bool) -> None:
        """Any later step, with self-conditioning."""
        found = self._denoising_step(enabled, self.carried[enabled], self.model.forward)
        self.canvas[enabled], _, self.carried[enabled], _ = found

    @torch.no_grad()
    def sampler(self, enabled: bool) -> None:
        """The part between the two products with the vocabulary: soft cap, statistics, sampling, acceptance, renoising,
        stop and the next step's probabilities."""
        if enabled:
            from dgemma_ext.integrations.transformers import denoising

            running = torch.zeros(1, dtype=torch.bool)
            step = denoising.begin(self.canvas[True], running, 48, self.model.final_logit_softcapping)
            temperature = denoising.temperature_of(self.processors, 40)
            denoising.advance(step, self.raw, temperature, 0.1, self.stopping, self.narrow)
            return

        def head(**_: Any) -> Any:
            cap = self.model.final_logit_softcapping
            logits = torch.tanh(self.raw.to(torch.float32) / cap) * cap
            return type("Logits", (), {"logits": logits})

        conditioning = self._denoising_step(False, None, head)[2]
        conditioning.softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16)

    def _denoising_step(self, enabled: bool, conditioning: Any, forward: Callable[..., Any]) -> Any:
        self.stopping.reset()
        return self.model._denoising_step(
            decoder_forward=forward,
            current_canvas=self.canvas[enabled],
            argmax_canvas=self.canvas[enabled],
            input_ids=None,
            decoder_position_ids=torch.arange(PROMPT_TOKENS, PROMPT_TOKENS + CANVAS)[None],
            self_conditioning_logits=conditioning,
            mask_mapping={"full_attention": None, "sliding_attention": None},
            **{self.cache_name: self.cache},
            finished_denoising=torch.zeros(1, dtype=torch.bool),
            cur_step=40,
            sampler=self.sampler_object,
            logits_processor=self.processors,
            diffusion_stopping_criteria=self.stopping,
        )


class _NarrowTable(torch.nn.Module):
    """64 columns of the table: the soft embedding computes all its probabilities and hardly any product."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.weight: Tensor = table.weight.detach()[:, :64].contiguous()
        self.embed_scale = table.embed_scale


def measure(bench: Bench, weights: str, final_norm: float, rounds: int) -> dict[str, Any]:
    bench.start(final_norm)
    result: dict[str, Any] = {"weights": weights, "threads": torch.get_num_threads(), "rounds": rounds}
    for part in ("first", "step", "sampler"):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for enabled in seconds:
                seconds[enabled].append(bench.seconds(getattr(bench, part), enabled))
        plain, accelerated = (statistics.median(seconds[enabled]) for enabled in (False, True))
        # The median of ratios of neighbouring rounds, which a machine that gets busier slows alike.
        times = statistics.median(a / b for a, b in zip(seconds[False], seconds[True], strict=True))
        result[part] = {"transformers": plain, "accelerated": accelerated, "times": times}
    return result


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['weights']}: {result['threads']} threads, median of {result['rounds']}")
    for part in ("first", "step", "sampler"):
        row, goal = result[part], GOALS.get(part)
        words = f"transformers {row['transformers']:7.3f} s   accelerated {row['accelerated']:7.3f} s"
        print(
            f"  {part:8} {words}   {row['times']:5.2f} times as fast" + (f"   goal {goal}" if goal else ""), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench_step_cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(write_checkpoint(arguments.directory / "peaked", 1.0))
    results = []
    for weights, final_norm in (("peaked", 1.0), ("flat", FLATTENING)):
        results.append(measure(bench, weights, final_norm, arguments.rounds))
        print_table(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
