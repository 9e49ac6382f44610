"""One side of bench_step_cpu: loads the model, then runs denoising steps on command.

It runs in its own process, so that the peak memory of a step is that of this side. Reads commands from stdin ("first",
"step", "sampler", "products", "memory"), one per line, and answers each with one JSON line: wall and processor seconds,
and those of the decoder layers alone, or bytes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from layers_clock import LayersClock

PROMPT_TOKENS = 128


class Side(Protocol):
    clock: LayersClock

    def first(self) -> None:
        """The first step of a canvas: no self-conditioning."""

    def step(self) -> None:
        """Any later step, with self-conditioning."""

    def sampler(self) -> None:
        """A step without its pass over the layers and without its two products with the vocabulary."""


class Ours:
    def __init__(self, checkpoint: Path) -> None:
        import dgemma_ext as dg
        from dgemma_ext import sampling

        self.sampling = sampling
        self.clock = LayersClock()
        self._watch(importlib.import_module("dgemma_ext.model.forward"))
        self.model = dg.DiffusionGemma.from_pretrained(checkpoint)
        self.network, defaults = self.model.network, self.model.defaults
        self.resolved = dg.SamplerConfig(confidence_threshold=0.0).resolve(defaults, 256)
        self.last = dg.SamplerConfig(confidence_threshold=0.0, max_denoising_steps=1).resolve(defaults, 256)
        self.cache = self.model.new_cache(1, PROMPT_TOKENS)
        self.model.encode(prompt_ids(self.model.config.vocab_size), self.cache)
        self.batch = sampling.make_canvas_batch(self.network, 1, 256)
        self.batch.place(
            0, 0, PROMPT_TOKENS, self.network.rotary_tables(torch.arange(PROMPT_TOKENS, PROMPT_TOKENS + 256))
        )
        self.buffers = sampling.make_step_buffers(self.network, 1, 256)
        self.narrow = self.model.weights.embed_tokens[:, :64].contiguous()
        self._first(self.resolved)

    def _watch(self, forward: Any) -> None:
        layer = forward.decoder_layer

        def watched(*arguments: Any) -> Any:
            self.clock.start()
            result = layer(*arguments)
            self.clock.stop()
            return result

        forward.decoder_layer = watched

    def _first(self, sampler: Any) -> None:
        self.sampling.begin_canvas(self.network, self.batch, 0, sampler, seed=0, index=0)
        self._step(self_conditioned=False)

    def _step(self, self_conditioned: bool = True) -> None:
        self.sampling.denoising_step(
            self.network, self.cache, self.batch, self.buffers, self_conditioned=self_conditioned
        )

    def first(self) -> None:
        # A cap of one step ends the canvas, so that no soft embedding is computed for a next one.
        self._first(self.last)

    def step(self) -> None:
        if not bool(self.batch.state.active):
            self._first(self.resolved)
        self._step()

    def sampler(self) -> None:
        from dgemma_ext.ops import denoise
        from dgemma_ext.sampling.step import logits_params, sample_and_update, soft_embedding

        # With 64 of the table's columns the soft embedding computes all its probabilities and hardly any product.
        weights, buffers = self.model.weights, self.buffers
        whole, weights.embed_tokens = weights.embed_tokens, self.narrow
        self.sampling.begin_canvas(self.network, self.batch, 0, self.resolved, seed=0, index=0)
        state = replace(self.batch.state, soft_embedding=self.batch.state.soft_embedding[..., :64].contiguous())
        params = logits_params(self.network, state, buffers)
        denoise.vocabulary_statistics(buffers.logits, **params, out=buffers.statistics_of(state))
        sample_and_update(self.network, state, buffers, params)
        soft_embedding(self.network, state, buffers, params)
        weights.embed_tokens = whole


class Transformers:
    def __init__(self, checkpoint: Path) -> None:
        from transformers import DiffusionGemmaForBlockDiffusion, LogitsProcessorList
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

        self.generation = generation
        self.clock = LayersClock()
        self.model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        for layer in self.model.model.decoder.layers:
            layer.register_forward_pre_hook(lambda *_: self.clock.start())
            layer.register_forward_hook(lambda *_: self.clock.stop())
        vocabulary = self.model.config.text_config.vocab_size
        ids = prompt_ids(vocabulary)
        with torch.no_grad():
            encoded = self.model.model.encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None]
            )
        # Since transformers 5.24 it is called cache, before past_key_values.
        self.cache_name = "cache" if hasattr(encoded, "cache") else "past_key_values"
        self.cache = getattr(encoded, self.cache_name)
        self.sampler_object = generation.EntropyBoundSampler(
            generation.EntropyBoundSamplerConfig(entropy_bound=0.1), 256, vocabulary, 48
        )
        self.stopping = generation.StableAndConfidentStoppingCriteria(1, 0.005)
        self.processors = LogitsProcessorList([generation.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, 48)])
        torch.manual_seed(0)
        self.canvas = self.sampler_object.initialize_canvas(1, torch.device("cpu"))
        self.conditioning: torch.Tensor | None = None
        self.step()

    @torch.no_grad()
    def _step(self, conditioning: torch.Tensor | None, forward: Callable[..., Any]) -> torch.Tensor:
        ids = prompt_ids(self.model.config.text_config.vocab_size)
        canvas, _, conditioning, _ = self.model._denoising_step(
            decoder_forward=forward,
            current_canvas=self.canvas,
            argmax_canvas=self.canvas,
            input_ids=ids,
            decoder_position_ids=torch.arange(PROMPT_TOKENS, PROMPT_TOKENS + 256)[None],
            self_conditioning_logits=conditioning,
            mask_mapping=None,
            **{self.cache_name: self.cache},
            finished_denoising=torch.zeros(1, dtype=torch.bool),
            cur_step=40,
            sampler=self.sampler_object,
            logits_processor=self.processors,
            diffusion_stopping_criteria=self.stopping,
        )
        self.canvas = canvas
        assert conditioning is not None
        return conditioning

    def first(self) -> None:
        self._step(None, self.model.forward)

    def step(self) -> None:
        self.conditioning = self._step(self.conditioning, self.model.forward)

    @torch.no_grad()
    def sampler(self) -> None:
        """The part around the two products: soft cap, sampling, and the next step's probabilities."""
        if not hasattr(self, "raw"):
            self.raw = torch.randn(1, 256, self.model.config.text_config.vocab_size).to(torch.bfloat16)

        def head(**_: Any) -> Any:
            logits = self.raw.to(torch.float32)
            logits = torch.tanh(logits / 30.0) * 30.0
            return type("Logits", (), {"logits": logits})

        conditioning = self._step(None, head)
        conditioning.softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16)


def prompt_ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))


def vocabulary_products(side: Side) -> Callable[[], None]:
    """The head's product and the soft embedding's by torch, on this side's matrices."""
    model = side.model  # type: ignore[attr-defined]
    table = model.weights.embed_tokens if isinstance(side, Ours) else model.lm_head.weight.data
    hidden = torch.randn(256, table.shape[1]).to(table.dtype)
    probabilities = torch.rand(256, table.shape[0]).to(table.dtype)

    def run() -> None:
        torch.mm(hidden, table.t())
        torch.mm(probabilities, table)

    return run


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def peak_of(run: Callable[[], None]) -> int:
    """The peak resident memory during `run` above the resident memory before it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "transformers"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side: Side = Ours(arguments.checkpoint) if arguments.side == "ours" else Transformers(arguments.checkpoint)
    products = vocabulary_products(side)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = line.strip()
        if command == "memory":
            print(json.dumps({"bytes": peak_of(side.step)}), flush=True)
            continue
        run = products if command == "products" else getattr(side, command)
        side.clock.take()
        start, processor = time.perf_counter(), time.process_time()
        run()
        figures = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
        print(json.dumps(figures | side.clock.take()), flush=True)


if __name__ == "__main__":
    main()
