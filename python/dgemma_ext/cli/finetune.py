"""`dgemma finetune`: trains an adapter, shows how far it is, and tells what it has reached."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dgemma_ext.arguments import path
from dgemma_ext.checkpoint import (
    GenerationDefaults,
    ModelConfig,
    Tokenizer,
    inspect_checkpoint,
    resolve_checkpoint,
    resolve_weights,
)
from dgemma_ext.cli.answer import write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import MemoryPlan, available_bytes, check_memory, mapped_bytes, memory_plan
from dgemma_ext.finetune import (
    Examples,
    FinetuneSettings,
    LoraSettings,
    Report,
    Run,
    chart,
    check_formats,
    open_examples,
    training_sizes,
)
from dgemma_ext.model import resolve_device, resolve_dtype

# How often a run tells a log where it is.
_SECONDS_TO_A_LINE = 15.0
# The share of a step's own numbers in those that are shown.
_SMOOTHING = 0.05


def run(arguments: Arguments) -> None:
    settings = _settings(arguments)
    drawn = _chart_file(arguments)
    folder = Path(path("--out", arguments.out))
    source = Path(resolve_checkpoint(arguments.model))
    config = ModelConfig.from_file(source)
    defaults = GenerationDefaults.from_file(source, config)
    tokenizer = Tokenizer.from_directory(source)
    examples = open_examples(Path(path("DATA", arguments.data)), tokenizer, defaults, settings)
    held_out = None
    if arguments.eval is not None:
        held_out = open_examples(Path(path("--eval", arguments.eval)), tokenizer, defaults, settings)
    plan, recompute = _plan(arguments, source, config, settings, examples)
    if not arguments.json:
        print(plan.table(), file=sys.stderr)
    model = DiffusionGemma.from_pretrained(
        source, device=arguments.device, dtype=arguments.dtype, weights=arguments.weights, images=False
    )
    trained = Run(
        model,
        examples,
        folder,
        settings,
        held_out,
        base_model=str(arguments.model),
        resume=arguments.resume,
        recompute=recompute,
    )
    try:
        with _Shown(trained, arguments.json) as shown, _deferred_interrupt() as interrupted:
            for report in trained.steps():
                shown.show(report)
                if interrupted.is_set():
                    raise KeyboardInterrupt
    finally:
        if drawn is not None:
            chart.write(trained.log.lines, drawn, f"dgemma finetune {arguments.model} {Path(arguments.data).name}")
    if arguments.json:
        write_json({"event": "finetuned", "path": str(folder), **_last(trained)})
    else:
        print(f"{folder}: {trained.adapter.count:,} trained numbers after {trained.progress.step} steps")


def _settings(arguments: Arguments) -> FinetuneSettings:
    lora = LoraSettings(arguments.rank, arguments.alpha, arguments.targets.split(","), arguments.passes)
    names = ("steps", "batch", "micro_batch", "rate", "warmup", "seed", "max_length", "encoder_loss", "noise")
    others = ("shuffle_buffer", "eval_every", "eval_count", "save_every", "self_conditioning")
    return FinetuneSettings(lora=lora, **{name: getattr(arguments, name) for name in (*names, *others)})


def _chart_file(arguments: Arguments) -> Path | None:
    """Where the chart goes, checked before anything is loaded."""
    if arguments.chart is None:
        return None
    file = Path(path("--chart", arguments.chart))
    if file.suffix not in (".png", ".svg"):
        raise ValueError(f"--chart must name a file that ends in .png or .svg, got {file}")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--chart: {file.parent} is no folder")
    chart.require()
    return file


def _plan(
    arguments: Arguments, source: Path, config: ModelConfig, settings: FinetuneSettings, examples: Examples
) -> tuple[MemoryPlan, bool]:
    """What the run takes, and whether activations are recomputed: with auto where keeping them does not fit. Raises
    ValueError for weights that cannot be trained beside, and NotEnoughMemory."""
    info = inspect_checkpoint(source, config)
    weights, device = resolve_weights(arguments.weights), resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, config)
    mapped = mapped_bytes(config, info, weights, dtype) if device.type == "cpu" else 0

    def plan(recompute: bool) -> MemoryPlan:
        sizes = training_sizes(config, settings, examples, recompute)
        context = min(sizes.length, config.max_position_embeddings)
        return memory_plan(config, info, weights, dtype, device, context, training=sizes)

    recompute = arguments.recompute == "on"
    if arguments.recompute == "auto":
        available = available_bytes(device)
        recompute = available is not None and plan(False).total - mapped > available
    found = plan(recompute)
    check_formats({part: format for part, (format, _) in found.weights.items()})
    check_memory(found, mapped, device)
    return found, recompute


def _last(trained: Run) -> dict[str, Any]:
    """The numbers at the end of a run."""
    found: dict[str, Any] = {"steps": trained.progress.step, "tokens": trained.progress.tokens}
    for line in trained.log.lines:
        found |= {name: line[name] for name in ("loss", "exact_match", "denoising_steps") if name in line}
        found |= {name: line[name] for name in ("tokens_per_forward",) if name in line}
    return found


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Lets the first Ctrl-C wait for the end of a step, after which a state is written; a second one does not."""
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _smoothed(before: float | None, new: float) -> float:
    return new if before is None else before + _SMOOTHING * (new - before)


class _Shown:
    """Progress on stderr: a bar in a terminal, elsewhere a line from time to time and for each evaluation."""

    def __init__(self, trained: Run, as_json: bool) -> None:
        self._trained, self._json = trained, as_json
        self._loss: float | None = None
        self._speed: float | None = None
        self._next_line = time.monotonic() + _SECONDS_TO_A_LINE
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            *columns, TextColumn("{task.fields[told]}"), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(
            "training", total=trained.settings.steps, completed=trained.progress.step, told=""
        )

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, report: Report) -> None:
        if report.loss is not None:
            self._loss = _smoothed(self._loss, report.loss)
            self._speed = _smoothed(self._speed, report.tokens / report.seconds)
        told = ""
        if self._loss is not None and self._speed is not None:
            told = f"loss {self._loss:.3f}, rate {self._trained.rate(report.step):.2e}, {self._speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=report.step, told=told)
        found = report.evaluation
        if found is not None:
            self._line(
                f"step {report.step}: {found.exact_match:.1%} of {found.count} answers right, "
                f"{found.denoising_steps:.1f} denoising steps, {found.tokens_per_forward:.1f} tokens per forward"
            )
        elif not self._bar.console.is_terminal and time.monotonic() >= self._next_line:
            self._line(f"step {report.step} of {report.steps}: {told}")

    def _line(self, text: str) -> None:
        self._next_line = time.monotonic() + _SECONDS_TO_A_LINE
        if not self._json:
            self._bar.console.print(text)
