"""`dg.accelerate` in `generate`: the sampler step by step, whole generations, streamers, and rows that stop early.

Transformers draws with torch.multinomial and torch.randint; tests give both sides the Philox uniforms of (seed of the
row, canvas, step, position, purpose). Generations are compared near zero temperature, on the seeds that
test_parity_generate.py found: there transformers' two attentions agree, and no rounding decides anything.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

import dgemma_ext as dg
import transformers_oracle as oracle
from accelerated import all_on_kernels
from dgemma_ext.integrations.transformers import denoising
from dgemma_ext.ops.denoise import Purpose
from test_parity_generate import SEEDS, SETTINGS, case_of, models, oracle_of
from test_parity_sampler import (
    BOUNDARY,
    CASES,
    EXCUSED_SHARE,
    HIDDEN,
    SOFTCAP,
    Case,
    Oracle,
    logits_of_canvas,
    near_bound,
)
from transformers_oracle import Settings, Trace, inverse_cdf, uniforms

# The sampler step by step ---------------------------------------------------------------------------------------------

ROWS = 2


class Table(torch.nn.Module):
    """The attributes of the decoder's embedding module that the step uses."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(case.vocabulary, HIDDEN).to(case.dtype))
        self.embed_scale = torch.tensor(HIDDEN**0.5)


@functools.cache
def compare(name: str) -> tuple[int, int]:
    """Runs a case with rows that stop at different steps, each against transformers' objects on that row by itself.
    Asserts that every step is the same except where rounding may decide; returns the number of results, and how many
    of them rounding decided."""
    case = CASES[name]
    torch.manual_seed(7)
    table, compared, excused = Table(case), 0, 0
    for _ in range(max(1, case.canvases // ROWS)):
        oracles = [Oracle(case) for _ in range(ROWS)]
        processors = [oracles[0].processor]
        logits = [logits_of_canvas(case) for _ in range(ROWS)]
        canvas = torch.randint(0, case.vocabulary, (ROWS, case.length))
        steps = case.settings.max_denoising_steps
        step = denoising.begin(canvas, torch.zeros(ROWS, dtype=torch.bool), steps, SOFTCAP)
        before = canvas
        for index in range(steps):
            draws, renoise = (torch.rand(ROWS, case.length, dtype=torch.float64) for _ in range(2))
            raw, stopped, previous = torch.stack([row[index] for row in logits]), step.stopped, copy.deepcopy(step)
            temperature = denoising.temperature_of(processors, steps - index)
            bound, stopping = case.settings.entropy_bound, oracles[0].stopping
            denoising.advance(step, raw.clone(), temperature, bound, stopping, table, (draws, renoise))
            for row in range(ROWS):
                if stopped[row]:
                    assert_frozen(step, previous, row)
                    continue
                noise = (renoise[row : row + 1] * case.vocabulary).long()
                wanted = oracles[row].step(before[row : row + 1], raw[row], index + 1, draws[row : row + 1], noise)
                unsure = near_bound(wanted.entropy, bound)[0]
                flipped = step.accepted[row] != wanted.accepted[0]
                assert not bool((flipped & ~unsure).any()), f"step {index}: other positions accepted"
                assert torch.equal(step.draft[row].long(), wanted.draft[0]), f"step {index}: another draft"
                near = wanted.draw_margin[0] <= BOUNDARY
                other = step.canvas[row].long() != wanted.canvas[0]
                assert not bool((other & ~near & ~flipped).any()), f"step {index}: another canvas"
                stops = bool(step.stopped[row])
                if stops != wanted.stop:
                    distance = abs(float(wanted.entropy.double().mean()) - case.settings.confidence_threshold)
                    assert distance <= BOUNDARY, f"step {index}: stop is {stops}, wanted {wanted.stop}"
                torch.testing.assert_close(
                    step.logits()[row].float(), wanted.processed[0].to(case.dtype).float(), rtol=2.0**-7, atol=1e-5
                )
                compared += 2 * case.length + 1
                excused += int(flipped.sum()) + int(other.sum()) + (stops != wanted.stop)
            before = step.canvas.long()
            if bool(step.stopped.all()):
                break
    return compared, excused


def assert_frozen(step: denoising.Step, previous: denoising.Step, row: int) -> None:
    """A stopped row keeps all values that are read later."""
    for name in ("canvas", "draft", "raw", "temperature", "stopped"):
        assert torch.equal(getattr(step, name)[row], getattr(previous, name)[row]), name


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str) -> None:
    compared, _ = compare(name)
    assert compared > 100


def test_few_steps_are_excused() -> None:
    counts = [compare(name) for name in CASES]
    compared, excused = (sum(numbers) for numbers in zip(*counts, strict=True))
    assert compared > 100_000
    assert excused <= EXCUSED_SHARE * compared, f"{excused} of {compared} fell to the other side of a boundary"


@pytest.mark.parametrize(("t_min", "t_max"), [(0.4, 0.8), (0.0, 1.0), (1e-3, 1e-2), (0.37, 1.93)])
def test_temperature(t_min: float, t_max: float) -> None:
    """The temperature is equal to the bit at every step."""
    for most in (1, 3, 48):
        schedule = generation.LinearTemperatureScheduleLogitsProcessor(t_min, t_max, most)
        for left in range(1, most + 1):
            one = schedule(None, torch.ones(1), cur_step=torch.tensor(left, dtype=torch.int32))
            got = denoising.temperature_of([schedule], left)
            assert float(torch.ones(1) / got) == float(one)
    assert denoising.temperature_of([], 3) == 1.0


def test_never_stops_without_a_criterion() -> None:
    case = CASES["fp32"]
    step = denoising.begin(torch.zeros(1, case.length).long(), torch.zeros(1, dtype=torch.bool), 3, SOFTCAP)
    sure = torch.zeros(1, case.length, case.vocabulary)
    sure[..., 3] = 29.0
    for _ in range(3):
        denoising.advance(step, sure.clone(), 0.5, 0.1, None, Table(case))
    assert not bool(step.stopped.any())
    assert step.draft.eq(3).all()


def test_logits_that_are_not_finite_are_an_error() -> None:
    case = CASES["fp32"]
    step = denoising.begin(torch.zeros(2, case.length).long(), torch.zeros(2, dtype=torch.bool), 3, SOFTCAP)
    raw = torch.zeros(2, case.length, case.vocabulary)
    raw[1, 5, 7] = torch.nan
    with pytest.raises(dg.NonFiniteError, match=r"request 1, denoising step 1: the logits of this row"):
        denoising.advance(step, raw, 0.5, 0.1, None, Table(case))


# Whole generations ----------------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """Replaces torch's random numbers by the package's, for a batch of seeds, on either side."""

    seeds: Sequence[int]
    length: int
    vocabulary: int
    canvas: int = -1
    step: int = 0
    renoising: bool = False

    def of(self, step: int, purpose: Purpose) -> torch.Tensor:
        return torch.stack([uniforms(seed, self.canvas, step, purpose, self.length) for seed in self.seeds])

    def initialize_canvas(self, sampler: Any, batch_size: int, device: Any) -> torch.Tensor:
        if not self.renoising:
            self.canvas, self.step = self.canvas + 1, 0
        draws = self.of(self.step, Purpose.RENOISE if self.renoising else Purpose.INITIAL_NOISE)
        return (draws * self.vocabulary).floor().long()

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        self.step += 1
        return inverse_cdf(probabilities, self.of(self.step, Purpose.SAMPLE).flatten())[0][:, None]

    def streams(self, batch: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.seeds), torch.full((batch,), self.canvas, dtype=torch.int32)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        renoise = generation.EntropyBoundSampler.renoise_canvas

        def renoising(sampler: Any, *arguments: Any) -> Any:
            self.renoising = True
            renoised = renoise(sampler, *arguments)
            self.renoising = False
            return renoised

        def initialize(sampler: Any, batch_size: int, device: Any) -> torch.Tensor:
            return self.initialize_canvas(sampler, batch_size, device)

        with (
            mock.patch.object(generation.EntropyBoundSampler, "initialize_canvas", initialize),
            mock.patch.object(generation.EntropyBoundSampler, "renoise_canvas", renoising),
            mock.patch.object(torch, "multinomial", self.multinomial),
            mock.patch.object(denoising, "draw_streams", self.streams),
        ):
            yield


@dataclass
class Streamer:
    """Records prompt, committed canvases, and the draft (or the logits) of every step."""

    _takes_logits: bool = False
    put_values: list[Any] = field(default_factory=list)
    drafts: list[torch.Tensor] = field(default_factory=list)
    ended: int = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_values.append(value.tolist())

    def put_draft(self, value: torch.Tensor | None = None, logits: torch.Tensor | None = None) -> None:
        found = logits if self._takes_logits else value
        assert found is not None
        self.drafts.append(found.clone())

    def end(self) -> None:
        self.ended += 1


def generate(
    model: Any,
    prompts: torch.Tensor,
    seeds: Sequence[int],
    settings: Settings,
    max_new_tokens: int,
    streamer: Streamer | None = None,
    **extra: Any,
) -> Any:
    draws = Draws(seeds, model.config.canvas_length, model.config.text_config.vocab_size)
    with draws.in_place():
        return model.generate(prompts, generation_config=settings.theirs(max_new_tokens), streamer=streamer, **extra)


@functools.cache
def accelerated(name: str) -> Any:
    return dg.accelerate(copy.deepcopy(models(name)[1]))


GENERATIONS = [
    (name, settings, seed)
    for name, by_settings in SEEDS.items()
    for settings, seeds in by_settings.items()
    for seed in seeds[:2]
]


@pytest.mark.parametrize(("name", "settings", "seed"), GENERATIONS)
def test_generations(name: str, settings: str, seed: int) -> None:
    """Tokens, drafts, steps and acceptance are all equal."""
    case, chosen = case_of(name, seed), SETTINGS[settings]
    wanted = oracle_of(models(name)[0].theirs, case, chosen)
    assert wanted.well_conditioned
    got, streamer, advance = Trace(), Streamer(), denoising.advance

    def recorded(step: denoising.Step, *arguments: Any, **keywords: Any) -> None:
        if int(step.number) == 1:
            got.steps.append(0)
        got.steps[-1] += 1
        advance(step, *arguments, **keywords)
        got.accepted.append(step.accepted[0].tolist())

    extra = {} if case.canvas is None else {"decoder_input_ids": torch.tensor([case.canvas])}
    with all_on_kernels(), mock.patch.object(denoising, "advance", recorded):
        out = generate(
            accelerated(name), torch.tensor([case.prompt]), [seed], chosen, case.max_new_tokens, streamer, **extra
        )
    got.drafts = [draft[0].tolist() for draft in streamer.drafts]
    answer = out.sequences[0, len(case.prompt) :].tolist()
    got.tokens, got.finish_reason = oracle._kept(answer, case.max_new_tokens, chosen.eos_token_ids)
    assert got.outcome == wanted.outcome
    assert float(out.tokens_per_forward) == wanted.tokens_per_forward
    assert streamer.put_values[0] == [case.prompt]
    assert [token for block in streamer.put_values[1:] for token in block[0]] == answer
    assert streamer.ended == 1


@functools.cache
def doubled(name: str) -> Any:
    return copy.deepcopy(models(name)[1]).double()


def batch_of(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts, left padded with noise, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, models(name)[1].config.text_config.vocab_size, (3, 21), generator=generator)
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[1, :4], mask[2, :17] = 0, 0
    return prompts, mask


# Seeds for which float32, float64 and weights that are 1e-6 off give the same generation. (Eager attention cannot be
# used for this: in generate it fails on a padded batch, whose mask it makes in the canvas's integers.)
BATCH_SEEDS = {"flat": [5, 16, 21, 23], "per_layer": [1, 7, 16, 21]}


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in BATCH_SEEDS.items() for seed in seeds])
def test_padded_batch(name: str, seed: int) -> None:
    """A padded batch against transformers' own batch; rows stop at different steps."""
    settings = replace(SETTINGS["ends"], max_denoising_steps=6)
    wanted = batch_outcome(models(name)[1], name, seed, settings)
    assert wanted == batch_outcome(doubled(name), name, seed, settings)
    with all_on_kernels():
        got = batch_outcome(accelerated(name), name, seed, settings)
    assert got == wanted


def test_streamer_that_takes_logits() -> None:
    """The streamer gets the processed logits of every step; those of a stopped row do not change."""
    name, seed = "flat", BATCH_SEEDS["flat"][0]
    prompts, mask = batch_of(name, seed)
    settings, found = replace(SETTINGS["ends"], max_denoising_steps=6), []
    for model in (models(name)[1], accelerated(name)):
        streamer = Streamer(_takes_logits=True)
        generate(model, prompts, [seed, seed + 100, seed + 200], settings, 16, streamer, attention_mask=mask)
        found.append(streamer.drafts)
    assert len(found[0]) == len(found[1])
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-3
    frozen = [torch.equal(a[row], b[row]) for a, b in zip(found[1], found[1][1:], strict=False) for row in range(3)]
    assert any(frozen)


def batch_outcome(model: Any, name: str, seed: int, settings: Settings) -> list[Any]:
    prompts, mask = batch_of(name, seed)
    streamer = Streamer()
    out = generate(model, prompts, [seed, seed + 100, seed + 200], settings, 16, streamer, attention_mask=mask)
    return [out.sequences.tolist(), out.tokens_per_forward.tolist(), [draft.tolist() for draft in streamer.drafts]]


@functools.cache
def nudged(name: str, number: int) -> Any:
    model = copy.deepcopy(models(name)[1])
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    return model


def find_batch_seeds() -> None:
    """Prints possible BATCH_SEEDS; uses only the draws of this package."""
    settings = replace(SETTINGS["ends"], max_denoising_steps=6)
    for name in BATCH_SEEDS:
        good = []
        for seed in range(24):
            outcome = batch_outcome(models(name)[1], name, seed, settings)
            others = (doubled(name), *(nudged(name, number) for number in range(3)))
            if all(batch_outcome(other, name, seed, settings) == outcome for other in others):
                good.append(seed)
                print(name, seed, outcome[1], len(outcome[2]), flush=True)
        print(f"{name!r}: {good}", flush=True)


if __name__ == "__main__":
    find_batch_seeds()
