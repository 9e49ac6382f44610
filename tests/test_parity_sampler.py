"""The sampler against transformers' own objects, step by step: the same logits, canvas, uniforms and noise.

A draw or a sum of entropies within 1e-5 of a boundary may fall to either side of it; such differences are counted, and
more than 1 in 10,000 is an error.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

from bounds import GLOBAL_BOUND, relative_distance
from dgemma_ext.model import AdapterSet, MatmulMode
from dgemma_ext.ops import denoise
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling import ResolvedSampler, begin_canvas, make_canvas_batch, make_step_buffers
from dgemma_ext.sampling.state import CanvasState
from dgemma_ext.sampling.step import logits_params, sample_and_update, soft_embedding
from transformers_oracle import Settings, inverse_cdf, uniforms

# Distance from a boundary (a share of the mass; nats) below which rounding may decide.
BOUNDARY = 1e-5
EXCUSED_SHARE = 1e-4
SOFTCAP = 30.0
HIDDEN = 48
PUBLISHED = Settings(max_denoising_steps=48)


@dataclass(frozen=True)
class Case:
    settings: Settings
    vocabulary: int
    length: int = 64
    canvases: int = 4
    dtype: torch.dtype = torch.bfloat16
    least_partial_steps: int = 10
    end: CanvasStatus = CanvasStatus.STABLE


CASES = {
    "published": Case(PUBLISHED, vocabulary=512, canvases=8),
    "published, canvas of 256": Case(PUBLISHED, vocabulary=1000, length=256, canvases=2),
    "fp32": Case(PUBLISHED, vocabulary=300, dtype=torch.float32),
    "all accepted": Case(replace(PUBLISHED, entropy_bound=1e6), vocabulary=300, least_partial_steps=0),
    "generous bound": Case(replace(PUBLISHED, entropy_bound=5.0, max_denoising_steps=24), vocabulary=777),
    "narrow bound": Case(replace(PUBLISHED, entropy_bound=1e-3), vocabulary=129),
    "at once": Case(replace(PUBLISHED, stability_threshold=0, confidence_threshold=0.5), vocabulary=300),
    "patient": Case(replace(PUBLISHED, stability_threshold=3, confidence_threshold=0.1), vocabulary=300),
    "hot": Case(replace(PUBLISHED, t_min=0.9, t_max=1.6, max_denoising_steps=16), vocabulary=300),
    "large vocabulary": Case(
        replace(PUBLISHED, max_denoising_steps=8), vocabulary=70_001, length=16, canvases=1, least_partial_steps=3
    ),
    "step cap": Case(replace(PUBLISHED, stability_threshold=30), vocabulary=300, end=CanvasStatus.STEP_CAP),
}


def stand_in_network(case: Case) -> Any:
    """The attributes of a network that the sampler uses."""
    embedding = torch.randn(case.vocabulary, HIDDEN).to(case.dtype)
    return SimpleNamespace(
        config=SimpleNamespace(
            vocab_size=case.vocabulary,
            final_logit_softcapping=SOFTCAP,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            layers=(),
        ),
        dtype=case.dtype,
        device=torch.device("cpu"),
        weights=SimpleNamespace(embed_tokens=embedding),
        adapters=AdapterSet(),
        options=SimpleNamespace(matmul=MatmulMode.PER_REQUEST),
        embedding_scale=float(torch.tensor(HIDDEN**0.5).to(case.dtype)),
        soft_embedding_tolerance=2.0**-9 if case.dtype == torch.bfloat16 else 0.0,
        max_embedding_norm=float(embedding.float().norm(dim=-1).max()),
    )


def resolved(case: Case) -> ResolvedSampler:
    values = vars(case.settings) | {"canvas_length": case.length}
    return ResolvedSampler(**values)


def logits_of_canvas(case: Case) -> list[torch.Tensor]:
    """Raw logits [L, V] for every step: noise, in which one token per position becomes certain, early or late."""
    steps = case.settings.max_denoising_steps
    target = torch.randint(0, case.vocabulary, (case.length, 1))
    surest_at = torch.rand(case.length, 1) * 0.6 * steps
    raw = []
    for step in range(steps):
        strength = 40 * torch.sigmoid((step - surest_at) / 3) * (0.9 + 0.2 * torch.rand(case.length, 1))
        logits = 2.5 * torch.randn(case.length, case.vocabulary)
        raw.append(logits.scatter_add(1, target, strength).to(case.dtype))
    return raw


class Oracle:
    """transformers' processor, sampler and stopping criterion on one canvas."""

    def __init__(self, case: Case) -> None:
        settings = case.settings
        self.case = case
        self.processor = generation.LinearTemperatureScheduleLogitsProcessor(
            settings.t_min, settings.t_max, settings.max_denoising_steps
        )
        self.sampler = generation.EntropyBoundSampler(
            generation.EntropyBoundSamplerConfig(settings.entropy_bound),
            case.length,
            case.vocabulary,
            settings.max_denoising_steps,
        )
        self.stopping = generation.StableAndConfidentStoppingCriteria(
            settings.stability_threshold, settings.confidence_threshold
        )

    def step(self, canvas: torch.Tensor, raw: torch.Tensor, step: int, draws: torch.Tensor, noise: torch.Tensor) -> Any:
        """The lines of generate's denoising step after the decoder; canvas, draws and noise [1, L]."""
        remaining = torch.tensor(self.case.settings.max_denoising_steps - step + 1, dtype=torch.int32)
        capped = torch.tanh(raw[None].float() / SOFTCAP) * SOFTCAP
        processed = self.processor(None, capped, cur_step=remaining)
        sampled, margin = inverse_cdf(torch.softmax(processed, dim=-1, dtype=torch.float32), draws)
        self.sampler.initialize_canvas = lambda batch_size, device: noise
        accepted = self.sampler.accept_canvas(canvas, sampled, processed, remaining)
        argmax = processed.argmax(-1)
        return SimpleNamespace(
            sampled=sampled,
            draw_margin=margin,
            accepted=self.sampler.accepted_token_mask,
            canvas=self.sampler.renoise_canvas(accepted, remaining),
            draft=argmax,
            stop=bool(self.stopping(argmax, processed)),
            entropy=torch.distributions.Categorical(logits=processed).entropy(),
            processed=processed,
        )


def near_bound(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """Positions [1, L] whose acceptance rounding may decide: the sum before them is near the bound, or their entropy is
    equal to that of such a position."""
    ordered, order = entropy.double().sort(-1)
    close = ((ordered.cumsum(-1) - ordered) - bound).abs() <= BOUNDARY
    close = torch.zeros_like(close).scatter(-1, order, close)
    as_sure = (entropy[..., None] - entropy[..., None, :]).abs() <= BOUNDARY
    return (as_sure & close[..., None, :]).any(-1)


@dataclass
class Tally:
    compared: int = 0
    excused: int = 0
    partial_steps: int = 0
    ends: set[CanvasStatus] = field(default_factory=set)


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str) -> None:
    tally = compare(name)
    # The case must reach the bound and the stop, or it would not test them.
    assert tally.partial_steps >= CASES[name].least_partial_steps
    assert tally.ends == {CASES[name].end}


def test_few_steps_are_excused() -> None:
    tallies = [compare(name) for name in CASES]
    compared, excused = sum(t.compared for t in tallies), sum(t.excused for t in tallies)
    assert compared > 100_000
    assert excused <= EXCUSED_SHARE * compared, f"{excused} of {compared} fell to the other side of a boundary"


@contextlib.contextmanager
def kept_samples() -> Iterator[list[torch.Tensor]]:
    """Records the samples inside the block, because the canvas keeps only the accepted ones."""
    kept: list[torch.Tensor] = []
    sample = denoise.sample

    def keeping(*arguments: Any, **keywords: Any) -> torch.Tensor:
        kept.append(sample(*arguments, **keywords))
        return kept[-1]

    with mock.patch.object(denoise, "sample", keeping):
        yield kept


@functools.cache
def compare(name: str) -> Tally:
    """Runs a case on both sides and asserts that every step is the same, except where rounding may decide."""
    case, tally = CASES[name], Tally()
    torch.manual_seed(7)
    model = stand_in_network(case)
    for _ in range(case.canvases):
        batch, buffers = make_canvas_batch(model, 1, case.length), make_step_buffers(model, 1, case.length)
        begin_canvas(model, batch, 0, resolved(case), seed=1, index=0)
        state = batch.state
        oracle = Oracle(case)
        for step, raw in enumerate(logits_of_canvas(case), start=1):
            draws = torch.rand(1, case.length, dtype=torch.float64)
            renoise = torch.rand(1, case.length, dtype=torch.float64)
            assert int(state.step) == step
            wanted = oracle.step(state.canvas.long(), raw, step, draws, (renoise * case.vocabulary).long())
            with kept_samples() as sampled:
                params = logits_params(model, state, buffers)
                buffers.logits.copy_(raw)
                denoise.vocabulary_statistics(buffers.logits, **params, out=buffers.statistics_of(state))
                sample_and_update(model, state, buffers, params, draws, renoise)
                soft_embedding(model, state, buffers, params)

            moved = sampled[0] != wanted.sampled
            assert not bool((moved & (wanted.draw_margin > BOUNDARY)).any()), f"step {step}: other tokens drawn"
            flipped = state.accepted != wanted.accepted
            unsure = near_bound(wanted.entropy, case.settings.entropy_bound)
            assert not bool((flipped & ~unsure).any()), f"step {step}: other positions accepted"
            assert torch.equal(state.draft, wanted.draft.int()), f"step {step}: another draft"
            same = ~moved & ~flipped
            assert torch.equal(state.canvas[same], wanted.canvas.int()[same]), f"step {step}: another canvas"
            torch.testing.assert_close(state.entropy, wanted.entropy, rtol=1e-4, atol=1e-5)
            assert_soft_embedding(model, case, state, wanted.processed)

            stops = CanvasStatus(int(state.status)) is CanvasStatus.STABLE
            if stops != wanted.stop:
                distance = abs(float(wanted.entropy.double().mean()) - case.settings.confidence_threshold)
                assert distance <= BOUNDARY, f"step {step}: stop is {stops}, wanted {wanted.stop}"
            tally.compared += 2 * case.length + 1
            tally.excused += int(moved.sum()) + int(flipped.sum()) + (stops != wanted.stop)
            tally.partial_steps += 0 < int(state.accepted.sum()) < case.length
            if stops or wanted.stop:
                break
        tally.ends.add(CanvasStatus(int(state.status)))
        assert stops == wanted.stop or not bool(state.active)
    return tally


def assert_soft_embedding(model: Any, case: Case, state: CanvasState, processed: torch.Tensor) -> None:
    """The next step's input is the decoder's: softmax of the processed logits in the model's dtype, embedded."""
    if not bool(state.active):
        return
    probabilities = processed.to(case.dtype).softmax(-1, dtype=torch.float32).to(case.dtype)
    wanted = (probabilities @ model.weights.embed_tokens) * model.embedding_scale
    distance = relative_distance(state.soft_embedding.double(), wanted.double())
    assert distance <= GLOBAL_BOUND[case.dtype]


class _Divisor:
    """Returns its dividend when it is divided, to find the processor's temperature."""

    def __truediv__(self, divisor: Any) -> Any:
        return divisor


TEMPERATURES = [(0.4, 0.8), (0.0, 1.0), (0.1, 0.3), (1e-3, 1e-2), (0.37, 1.93), (0.4, 0.4 + 1e-9)]


@pytest.mark.parametrize(("t_min", "t_max"), TEMPERATURES)
def test_temperature(t_min: float, t_max: float) -> None:
    """Every step's temperature is equal to the bit to transformers': in the op, in its form in torch, in Python."""
    caps = [cap for cap in (1, 2, 3, 7, 10, 47, 48, 96, 1000) for _ in range(cap)]
    steps = [step for cap in sorted(set(caps)) for step in range(1, cap + 1)]
    wanted = []
    for step, cap in zip(steps, caps, strict=True):
        processor = generation.LinearTemperatureScheduleLogitsProcessor(t_min, t_max, cap)
        wanted.append(float(processor(None, _Divisor(), cur_step=torch.tensor(cap - step + 1, dtype=torch.int32))))
    settings = replace(PUBLISHED, t_min=t_min, t_max=t_max)
    config = {
        cap: resolved(Case(replace(settings, max_denoising_steps=cap), vocabulary=2, length=1)) for cap in set(caps)
    }
    in_python = [config[cap].temperature(step) for step, cap in zip(steps, caps, strict=True)]
    assert in_python == wanted

    count = len(steps)
    updated = {
        "active": torch.ones(count, dtype=torch.bool),
        "canvas": torch.zeros(count, 1, dtype=torch.int32),
        "draft": torch.full((count, 1), -1, dtype=torch.int32),
        "stable_steps": torch.zeros(count, dtype=torch.int32),
        "step": torch.tensor(steps, dtype=torch.int32),
        "temperature": torch.zeros(count),
        "accepted": torch.zeros(count, 1, dtype=torch.bool),
        "mean_entropy": torch.zeros(count),
        "status": torch.zeros(count, dtype=torch.int32),
    }
    denoise.update_canvas_(
        sampled=torch.zeros(count, 1, dtype=torch.int32),
        argmax=torch.zeros(count, 1, dtype=torch.int32),
        entropy=torch.ones(count, 1),
        pinned=None,
        uniforms=None,
        vocabulary=2,
        seed=torch.zeros(count, dtype=torch.int64),
        canvas_index=torch.zeros(count, dtype=torch.int32),
        max_steps=torch.tensor(caps, dtype=torch.int32),
        t_min=torch.full((count,), t_min, dtype=torch.float64),
        t_max=torch.full((count,), t_max, dtype=torch.float64),
        entropy_bound=torch.ones(count),
        stability_threshold=torch.ones(count, dtype=torch.int32),
        confidence_threshold=torch.zeros(count),
        **updated,
    )
    # The op writes the next step's temperature.
    following = [step for step in range(count) if steps[step] < caps[step]]
    got = updated["temperature"][following].tolist()
    assert got == [wanted[index + 1] for index in following]


def test_first_canvas_is_noise() -> None:
    """Before the first step every position has the uniform token of the request's own random numbers."""
    case = CASES["fp32"]
    network = stand_in_network(case)
    batch = make_canvas_batch(network, 1, case.length)
    begin_canvas(network, batch, 0, resolved(case), seed=77, index=3)
    draws = uniforms(77, 3, 0, denoise.Purpose.INITIAL_NOISE, case.length)
    assert batch.state.canvas[0].tolist() == (draws * case.vocabulary).floor().int().tolist()
