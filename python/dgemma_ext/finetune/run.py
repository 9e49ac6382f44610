"""A run from its folder's state to its last step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import end_of_turn
from dgemma_ext.finetune.adapter import TrainedAdapter
from dgemma_ext.finetune.data import Example, Examples
from dgemma_ext.finetune.evaluate import Evaluation, evaluate
from dgemma_ext.finetune.files import (
    STATE_FILE,
    Log,
    Progress,
    is_ours,
    read_state,
    remove_partial,
    write_adapter,
    write_state,
)
from dgemma_ext.finetune.forward import Passes
from dgemma_ext.finetune.loss import losses
from dgemma_ext.finetune.recipe import Batch, make_batch
from dgemma_ext.finetune.settings import FinetuneSettings
from dgemma_ext.ops.formats import Int8Weight, QuantizedWeight


@dataclass(frozen=True)
class Report:
    """What a step or an evaluation tells. loss: of the step, canvas and encoder together; None after an evaluation.
    tokens: positions that the step's passes read; seconds: that it took."""

    step: int
    steps: int
    loss: float | None = None
    rate: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    evaluation: Evaluation | None = None


class Run:
    """A run in `folder`: with `resume` the one whose state is there, else a new one.

    examples, held_out: as `open_examples` gives them. base_model: what adapter_config.json calls the base. recompute:
    as in `Passes`.

    Raises ValueError for weights that no gradient goes through; for a folder with a state that is not to be resumed, or
    with files and no state; for a state of other settings or other data.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        examples: Examples,
        folder: Path,
        settings: FinetuneSettings,
        held_out: Examples | None = None,
        base_model: str = "",
        resume: bool = False,
        recompute: bool = False,
    ) -> None:
        check_formats(_formats(model))
        self.model, self.settings, self.folder, self.base_model = model, settings, folder, base_model
        self.examples = examples
        self.held_out = [] if held_out is None else held_out.first(settings.eval_count)
        self.adapter = TrainedAdapter(model.config, settings.lora, settings.seed, model.device)
        self._parameters = self.adapter.parameters()
        self._passes = Passes(model.network, self.adapter, recompute)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.rate,
            betas=(settings.beta1, settings.beta2),
            eps=1e-8,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self._updating = False
        self._deciding = {**settings.deciding(), "data": examples.digest, "dtype": str(model.dtype)}
        folder.mkdir(parents=True, exist_ok=True)
        exists = (folder / STATE_FILE).exists()
        if exists and not resume:
            raise ValueError(f"{folder} has a run already; continue it with resume, or name another folder")
        # A run that was killed before its first state has left nothing that counts.
        strange = [] if exists else [file.name for file in folder.iterdir() if not is_ours(file.name)]
        if strange:
            raise ValueError(f"{folder} has {strange[0]} and no {STATE_FILE}; name a new folder, or one with a run")
        self.progress = Progress()
        if exists:
            self.progress = read_state(folder, self._parameters, self._optimizer, self._deciding)
        remove_partial(folder)
        self.log = Log(folder, self.progress.step)
        if exists:
            # The adapter may be that of the state before, because it is written after the state.
            write_adapter(folder, self.adapter, base_model)
        else:
            self.save()

    @property
    def _fill(self) -> int:
        """The token behind an answer's end: the tokenizer's end of text, at which generation stops too."""
        tokenizer, ends = self.model.tokenizer, self.model.defaults.eos_token_ids
        eos = None if tokenizer is None else tokenizer.eos_token_id
        return eos if eos is not None and eos in ends else ends[0]

    @property
    def _pad(self) -> int:
        pad = self.model.defaults.pad_token_id
        return self._fill if pad is None else pad

    def save(self) -> None:
        """Writes state and adapter, each whole."""
        write_state(self.folder, self._parameters, self._optimizer, self.progress, self._deciding)
        write_adapter(self.folder, self.adapter, self.base_model)

    def steps(self) -> Iterator[Report]:
        """Makes the steps that are left, and tells of each. States are written between them, also where the caller
        stops early."""
        settings, saved = self.settings, self.progress.step
        examples = self._drawn()
        try:
            while True:
                # An evaluation comes before the state of its step, so that a run that goes on has it in its log.
                if self._evaluation_is_due():
                    yield self._evaluated()
                step = self.progress.step
                if saved < step and (step % settings.save_every == 0 or step == settings.steps):
                    self.save()
                    saved = step
                if step == settings.steps:
                    return
                yield self._step(examples)
        finally:
            # Interrupted inside an update, factors are of no step.
            if saved < self.progress.step and not self._updating:
                self.save()

    # Steps ------------------------------------------------------------------------------------------------------------

    def _drawn(self) -> Iterator[tuple[Example, Progress]]:
        """The examples from the state's place on, without end, each with the progress after it."""
        epoch, skipped = self.progress.epoch, self.progress.drawn
        while True:
            lines = self.examples.epoch(self.settings.seed, epoch, self.settings.shuffle_buffer)
            for drawn, line in enumerate(lines, start=1):
                if drawn > skipped:
                    yield self.examples.example(line), Progress(epoch=epoch, drawn=drawn)
            epoch, skipped = epoch + 1, 0

    def _step(self, examples: Iterator[tuple[Example, Progress]]) -> Report:
        began = time.perf_counter()
        settings, config = self.settings, self.model.config
        drawn = [next(examples) for _ in range(settings.batch)]
        batch = make_batch(
            [example for example, _ in drawn],
            [place.epoch for _, place in drawn],
            settings,
            config.canvas_length,
            config.vocab_size,
            self._fill,
            self._pad,
        )
        self._optimizer.zero_grad(set_to_none=True)
        canvas, encoder = self._backward(batch)
        loss = canvas + settings.encoder_loss * encoder
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.clip)
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            number = self.progress.step + 1
            raise FloatingPointError(f"step {number} has a loss of {loss} and a gradient of norm {float(norm)}")
        rate = self.rate(self.progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        place, before = drawn[-1][1], self.progress
        self._updating = True
        self._optimizer.step()
        self.progress = replace(place, step=before.step + 1, tokens=before.tokens + batch.tokens)
        self._updating = False
        seconds = time.perf_counter() - began
        numbers = {"loss": loss, "canvas_loss": canvas, "encoder_loss": encoder, "rate": rate}
        self.log.write(
            {
                "step": self.progress.step,
                **{name: float(f"{value:.6g}") for name, value in numbers.items()},
                "gradient_norm": float(f"{float(norm):.6g}"),
                "tokens": self.progress.tokens,
                "seconds": round(seconds, 4),
            }
        )
        return Report(self.progress.step, settings.steps, loss, rate, batch.tokens, seconds)

    def _backward(self, batch: Batch) -> tuple[float, float]:
        """The mean losses over canvases and next tokens, whose gradients are added up."""
        counted = max(float(batch.weights.sum()), 1.0), max(float(batch.next_weights.sum()), 1.0)
        totals = [0.0, 0.0]
        for first in range(0, len(batch), self.settings.pass_batch):
            part = batch.rows(first, first + self.settings.pass_batch).to(self.model.device)
            found = losses(self._passes, part)
            means: list[Tensor] = [found.canvas / counted[0], found.encoder / counted[1]]
            (means[0] + self.settings.encoder_loss * means[1]).backward()
            totals = [total + float(mean.detach()) for total, mean in zip(totals, means, strict=True)]
        return totals[0], totals[1]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear rise, then a cosine to a tenth at the last step."""
        settings = self.settings
        if step < settings.warmup:
            return settings.rate * (step + 1) / settings.warmup
        share = (step - settings.warmup) / max(1, settings.steps - 1 - settings.warmup)
        return settings.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))

    def _evaluation_is_due(self) -> bool:
        step, settings = self.progress.step, self.settings
        due = bool(self.held_out) and (step % settings.eval_every == 0 or step == settings.steps)
        return due and not any(line["step"] == step and "exact_match" in line for line in self.log.lines)

    def _evaluated(self) -> Report:
        began = time.perf_counter()
        found = evaluate(self.model, self.adapter, self.held_out, self.settings.seed)
        step = self.progress.step
        seconds = round(time.perf_counter() - began, 4)
        self.log.write({"step": step, **asdict(found), "seconds": seconds})
        return Report(step, self.settings.steps, evaluation=found)


def check_formats(formats: Mapping[str, str]) -> None:
    """formats: of weights by what they are. Raises ValueError for one that no gradient goes through."""
    for name, format in formats.items():
        if format == Int8Weight.name:
            raise ValueError(
                f"weights: got int8 for {name}, which rounds what it multiplies too, and has no gradient; "
                "wants unquantized weights, or those in fp8, int4 or nvfp4"
            )


def _formats(model: DiffusionGemma) -> dict[str, str]:
    return {
        attribute: weight.name
        for holder in (model.weights, *model.weights.layers)
        for attribute, weight in vars(holder).items()
        if isinstance(weight, QuantizedWeight)
    }


def open_examples(
    file: Path, tokenizer: Tokenizer | None, defaults: GenerationDefaults, settings: FinetuneSettings
) -> Examples:
    """The examples of a JSONL file, for a checkpoint's tokenizer and defaults. Raises ValueError as `Examples` does,
    and for a checkpoint that cannot be trained on text."""
    if tokenizer is None:
        raise ValueError("fine-tuning needs a checkpoint with tokenizer.json")
    end = end_of_turn(tokenizer, defaults)
    if end is None:
        raise ValueError("fine-tuning needs a checkpoint with an end of sequence, which ends an answer")
    return Examples(file, tokenizer, end, settings.max_length)
