"""Writes an answer from the model's events: as streamed text, as JSON, or as the watched canvas."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dgemma_ext.checkpoint import GenerationDefaults, ModelConfig, Tokenizer, resolve_checkpoint
from dgemma_ext.cli import images
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.watch import Watch, canvas_picture, status_line, visible
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import Commit, Draft, Output, Request


def load_model(arguments: Arguments) -> DiffusionGemma:
    """Loads the model of a command line. The sampler is checked first, because loading weights can take a minute."""
    path = resolve_checkpoint(arguments.model)
    config = ModelConfig.from_file(path)
    arguments.sampler.resolve(GenerationDefaults.from_file(path, config), config.canvas_length)
    return load_checkpoint(path, arguments)


def load_checkpoint(path: Path, arguments: Arguments) -> DiffusionGemma:
    """Loads a checkpoint with the command line's device, dtype, weights, activations, images and adapters."""
    unnamed, named = arguments.adapters
    with images.spelled_as_flags():
        return DiffusionGemma.from_pretrained(
            path,
            device=arguments.device,
            dtype=arguments.dtype,
            weights=arguments.weights,
            activations=arguments.activations,
            adapter=unnamed,
            adapters=named,
            passes=arguments.adapter_passes if unnamed is not None or named else None,
            **images.loading(arguments),
        )


def tokenizer_of(model: DiffusionGemma) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json, which text needs")
    return model.tokenizer


def write_answer(
    events: Iterable[Draft | Commit], tokenizer: Tokenizer, arguments: Arguments, **fields: Any
) -> Output | None:
    """Writes an answer in the form that the command line asks for. Returns it, or None where `events` ended early.

    `fields` are added to the JSON result.
    """
    timed = Timed(events)
    request: Request | None = None
    if arguments.json:
        for event in timed:
            request = event.request
            if arguments.watch:
                write_json(event_fields(event) | fields)
    else:
        console = Console(stderr=True, highlight=False)
        thoughts, text = _ThoughtWriter(console if arguments.thinking else None), _TextWriter()
        with Watch(console, partial(canvas_picture, tokenizer=tokenizer), status_line) as watch:
            for event in timed:
                request = event.request
                if isinstance(event, Commit):
                    watch.clear()
                    thoughts.write(event)
                    text.write(request, event.finish_reason is not None)
                elif arguments.watch:
                    watch.show(event)
        thoughts.finish()
        text.finish()
    if request is None or request.finish_reason is None:
        return None
    if arguments.json:
        write_json(result_fields(request.output, timed.seconds) | {"seed": request.seed} | fields)
        return request.output
    for invalid in request.output.invalid_tool_calls:
        print(f"dgemma: a tool call cannot be read, {invalid.error}: {visible(invalid.text)}", file=sys.stderr)
    if arguments.watch or sys.stderr.isatty():
        print(summary(request.output, timed.seconds), file=sys.stderr)
    return request.output


def summary(output: Output, seconds: float) -> str:
    canvases, steps = len(output.denoising_steps), sum(output.denoising_steps)
    return (
        f"{len(output.token_ids)} tokens in {canvases} canvas{'es' if canvases > 1 else ''}, "
        f"{steps} denoising step{'s' if steps > 1 else ''}, {output.tokens_per_forward:.1f} tokens per forward, "
        f"{seconds:.2f} s; ended by {'its end of text' if output.finish_reason == 'eos' else 'its length'}"
    )


def event_fields(event: Draft | Commit) -> dict[str, Any]:
    """A draft or a commit as JSON types. Canvases count from 0 and steps from 1, as in the Python interface."""
    common: dict[str, Any] = {"canvas_index": event.canvas_index, "token_ids": list(event.token_ids)}
    if isinstance(event, Commit):
        return {
            "event": "commit",
            **common,
            "text": event.text,
            "thinking": event.thinking,
            "denoising_steps": event.denoising_steps,
            "finish_reason": event.finish_reason,
        }
    return {
        "event": "draft",
        **common,
        "step": event.step,
        "temperature": event.request.sampler.temperature(event.step),
        "mean_entropy": event.mean_entropy,
        "text": event.text,
        "thinking": event.thinking,
        "entropy": event.entropy.tolist(),
        "accepted": event.accepted.tolist(),
    }


def result_fields(output: Output, seconds: float) -> dict[str, Any]:
    choices = {} if output.choices is None else {"choices": dict(output.choices)}
    return {
        "event": "result",
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "denoising_steps": list(output.denoising_steps),
        "tokens_per_forward": output.tokens_per_forward,
        "thinking": output.thinking,
        "tool_calls": [asdict(call) for call in output.tool_calls],
        "invalid_tool_calls": [asdict(call) for call in output.invalid_tool_calls],
        "seconds": seconds,
        **choices,
    }


def write_json(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


class Timed:
    """An iterator over events that sums the seconds spent in making them, without the time between."""

    def __init__(self, events: Iterable[Draft | Commit]) -> None:
        self._events = events
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Draft | Commit]:
        events = iter(self._events)
        while True:
            began = time.perf_counter()
            event = next(events, None)
            self.seconds += time.perf_counter() - began
            if event is None:
                return
            yield event


class _ThoughtWriter:
    """Writes the model's thoughts to a console, dimmed, after each canvas; to None not at all."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._is_in_line = False

    def write(self, commit: Commit) -> None:
        """Writes what a canvas adds, and ends the line before what comes after the thoughts on stdout."""
        if self._console is None:
            return
        if commit.thinking:
            self._console.print(Text(visible(commit.thinking), style="dim"), end="", soft_wrap=True)
            self._is_in_line = True
        if commit.text or commit.finish_reason is not None:
            self.finish()

    def finish(self) -> None:
        if self._console is not None and self._is_in_line:
            self._console.print()
            self._is_in_line = False


class _TextWriter:
    """Writes an answer to stdout: in a terminal after each canvas, elsewhere once at the end."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._written = ""

    def write(self, request: Request, is_whole: bool) -> None:
        """Writes what is new of the answer, and of a whole one its tool calls, an object of JSON on each line."""
        response = request.settled_response
        calls = [json.dumps(asdict(call), ensure_ascii=False) for call in response.tool_calls] if is_whole else []
        if is_whole and not self._is_terminal:
            lines = [response.text.removesuffix("\n")] if response.text or not calls else []
            print("\n".join(lines + calls), flush=True)
        elif self._is_terminal:
            ready = response.text
            if calls:
                ready = "\n".join([ready.removesuffix("\n"), *calls]).removeprefix("\n")
            print(visible(ready[len(self._written) :]), end="", flush=True)
            self._written = ready

    def finish(self) -> None:
        if self._written and not self._written.endswith("\n"):
            print(flush=True)
