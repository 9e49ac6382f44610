"""The initial content of a canvas: tokens, pinned positions, allowed sets, a later first step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import dgemma_ext as dg
from dgemma_ext.engine import memory
from dgemma_ext.model import Canvases
from models import begun, random_model, step_alone

SAMPLER = dg.SamplerConfig(max_denoising_steps=6, confidence_threshold=1e-9, entropy_bound=4.0)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> dg.DiffusionGemma:
    return random_model(request.param)


def drafts_of(
    model: dg.DiffusionGemma, canvas: dg.Canvas, tokens: int = 20, seed: int = 0, sampler: dg.SamplerConfig = SAMPLER
) -> list[dg.Draft]:
    events = model.stream([5, 6, 7], max_new_tokens=tokens, sampler=sampler, seed=seed, canvas=canvas)
    return [event for event in events if isinstance(event, dg.Draft)]


def test_pinned_positions_hold_their_token_in_every_step(model: dg.DiffusionGemma) -> None:
    tokens = [11, None, 13, None, None, 16, None, None, 21, 22, None]
    pinned = [token is not None for token in tokens]
    canvas = dg.Canvas(tokens, pinned)
    drafts = drafts_of(model, canvas)
    assert {d.canvas_index for d in drafts} == {0, 1, 2}
    for draft in drafts:
        for position, token in enumerate(tokens):
            if token is not None and position // 8 == draft.canvas_index:
                assert draft.token_ids[position % 8] == token
    output = model.generate([5, 6, 7], max_new_tokens=20, sampler=SAMPLER, canvas=canvas)
    assert [output.token_ids[i] for i, token in enumerate(tokens) if token is not None] == [11, 13, 16, 21, 22]


def test_pinned_positions_stand_in_the_canvas_between_steps(
    model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = model.network.forward

    def spy(cache: dg.Cache, canvases: Canvases, *rest: object) -> torch.Tensor | None:
        seen.append(canvases.ids[0].tolist())
        return original(cache, canvases, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.network, "forward", spy)
    model.generate(
        [5], max_new_tokens=8, sampler=SAMPLER, canvas=dg.Canvas([None, 9, None, 9], [False, True, False, True])
    )
    assert len(seen) == 6
    assert all(canvas[1] == canvas[3] == 9 for canvas in seen)
    assert len({canvas[0] for canvas in seen}) > 1


def test_a_fully_pinned_canvas_comes_back_as_it_is(model: dg.DiffusionGemma) -> None:
    tokens = list(range(10, 18))
    output = model.generate([5], max_new_tokens=8, sampler=SAMPLER, canvas=dg.Canvas(tokens, [True] * 8))
    assert output.token_ids == tuple(tokens)


def test_allowed_rules_samples_and_drafts_and_leaves_the_noise(
    model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_position: list[list[int] | None] = [[4, 9, 300], None, [7], *[[20, 21, 22, 23]] * 5]
    seen = []
    original = model.network.forward

    def spy(cache: dg.Cache, canvases: Canvases, *rest: object) -> torch.Tensor | None:
        seen.append(canvases.ids[0].tolist())
        return original(cache, canvases, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.network, "forward", spy)
    noise: set[int] = set()
    doubtful = replace(SAMPLER, entropy_bound=0.0)  # few positions are accepted
    for seed in range(8):
        drafts_of(model, dg.Canvas(), 8, seed, doubtful)
        free = seen[0]
        seen.clear()
        drafts = drafts_of(model, dg.Canvas(allowed=per_position), 8, seed, doubtful)
        assert seen[0] == free, "the noise that a canvas begins with"
        held: list[list[int | None]] = [list(draft.token_ids) for draft in drafts]
        for draft, canvas in itertools.zip_longest(drafts[:-1], seen[1:]):
            kept = draft.accepted.tolist()
            held.append([token if keep else None for token, keep in zip(canvas, kept, strict=True)])
            noise |= {token for token, keep in zip(canvas, kept, strict=True) if not keep}
        for ids in held:
            for allowed, token in zip(per_position, ids, strict=True):
                assert allowed is None or token is None or token in allowed
        seen.clear()
    assert len(noise) > 60


def test_one_allowed_list_rules_every_canvas(model: dg.DiffusionGemma) -> None:
    output = model.generate([5], max_new_tokens=24, sampler=SAMPLER, canvas=dg.Canvas(allowed=[30, 31, 32]))
    assert set(output.token_ids) <= {30, 31, 32}
    assert len(output.token_ids) == 24


def test_tokens_take_the_place_of_noise(model: dg.DiffusionGemma) -> None:
    resolved = SAMPLER.resolve(model.defaults, 8)

    def canvas_of(index: int, content: dg.Canvas | None = None) -> torch.Tensor:
        return begun(model, resolved, 3, index, content)[0].state.canvas

    content = dg.Canvas([0] * 8 + [1, None, 2])
    expected = canvas_of(1).clone()
    expected[0, 0], expected[0, 2] = 1, 2
    assert torch.equal(canvas_of(1, content), expected)
    assert torch.equal(canvas_of(2, content), canvas_of(2))


def test_noise_is_uniform_over_the_vocabulary(model: dg.DiffusionGemma) -> None:
    resolved = SAMPLER.resolve(model.defaults, 8)
    draws = torch.cat([begun(model, resolved, s, 0)[0].state.canvas[0] for s in range(2000)])
    counts = torch.bincount(draws.long(), minlength=512).double()
    expected = draws.numel() / 512
    # Chi-square with 511 degrees of freedom: mean 511, deviation 32; five deviations.
    assert float(((counts - expected) ** 2 / expected).sum()) < 511 + 5 * 32


def test_a_later_start_step_makes_fewer_steps_at_a_lower_temperature(model: dg.DiffusionGemma) -> None:
    canvas = dg.Canvas(list(range(8)), start_step=4)
    drafts = drafts_of(model, canvas, tokens=12)
    assert [d.step for d in drafts if d.canvas_index == 0] == [4, 5, 6]
    assert [d.step for d in drafts if d.canvas_index == 1] == [1, 2, 3, 4, 5, 6]
    resolved = SAMPLER.resolve(model.defaults, 8)
    assert float(begun(model, resolved, 0, 0, canvas)[0].state.temperature) == pytest.approx(0.4 + 0.4 * 3 / 6)


def test_a_shorter_canvas_than_the_checkpoints(model: dg.DiffusionGemma) -> None:
    sampler = dg.SamplerConfig(max_denoising_steps=2, canvas_length=3)
    output = model.generate([5], max_new_tokens=7, sampler=sampler)
    assert len(output.denoising_steps) == 3
    assert len(output.token_ids) == 7


# An end of text (77) is allowed only at one pinned position, so that it can only be there.
WITHOUT_END, END = list(range(10)), 77


def test_an_end_of_text_inside_a_canvas_ends_the_answer_there(model: dg.DiffusionGemma) -> None:
    canvas = dg.Canvas([*[None] * 9, END], [*[False] * 9, True], allowed=[*[WITHOUT_END] * 9, [END]])
    sampler = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=(END,))
    output = model.generate([5], max_new_tokens=40, sampler=sampler, canvas=canvas)
    assert output.finish_reason == "eos"
    assert output.token_ids[9] == END
    assert len(output.token_ids) == 10
    assert len(output.denoising_steps) == 2


def test_an_end_of_text_beyond_the_length_does_not_count(model: dg.DiffusionGemma) -> None:
    canvas = dg.Canvas([*[None] * 6, END], [*[False] * 6, True], allowed=[*[WITHOUT_END] * 6, [END]])
    sampler = dg.SamplerConfig(max_denoising_steps=2, eos_token_ids=(END,))
    output = model.generate([5], max_new_tokens=6, sampler=sampler, canvas=canvas)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 6


# A trimmed last canvas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "end", "lengths"),
    [
        (256, 256, [256]),
        (256, 257, [256, 64]),
        (256, 64, [64]),
        (256, 65, [128]),
        (256, 193, [256]),
        (8, 13, [8, 6]),
        # A quarter of ten is three positions, and four quarters are more than ten.
        (10, 10, [10]),
        (10, 9, [9]),
        (10, 11, [10, 3]),
        (3, 1, [1]),
    ],
)
def test_lengths_of_trimmed_canvases(length: int, end: int, lengths: list[int], model: dg.DiffusionGemma) -> None:
    for trim, expected in ((True, lengths), (False, [length] * len(lengths))):
        sampler = dg.SamplerConfig(canvas_length=length, trim_canvas=trim).resolve(model.defaults, 256)
        assert [sampler.length_of(index, end) for index in range(len(lengths))] == expected


def test_an_end_of_text_is_certain_where_it_is_pinned() -> None:
    tokens, pinned = [5, END, None, END, END], [True, False, False, True, True]
    assert dg.Canvas(tokens, pinned).certain_length((END, 3)) == 4
    assert dg.Canvas(tokens, pinned).certain_length((3,)) is None
    assert dg.Canvas(tokens).certain_length((END,)) is None
    assert dg.Canvas().certain_length((END,)) is None


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("ends", ["by length", "by a pinned end of text"])
def test_a_trimmed_canvas_is_one_of_that_length(ends: str, batched: bool, model: dg.DiffusionGemma) -> None:
    """Thirteen tokens in canvases of eight: the second has six positions, with the noise and draws of a whole one."""
    common = {"max_denoising_steps": 4, "confidence_threshold": 0.0, "entropy_bound": 6.0, "eos_token_ids": (END,)}
    canvas, limit = None, 13
    if ends == "by a pinned end of text":
        canvas, limit = dg.Canvas([*[None] * 12, END], [*[False] * 12, True]), 30
    scheduler = dg.Scheduler(model, max_batch=2, max_length=64, batched=batched)
    settings = dg.SamplerConfig(**common, trim_canvas=True)  # type: ignore[arg-type]
    request = scheduler.submit([5, 6], limit, settings, seed=9, canvas=canvas)
    beside = scheduler.submit([7], 16, settings, seed=10)
    lengths = []
    while not scheduler.idle:
        lengths += [len(event.token_ids) for event in scheduler.step() if getattr(event, "request", None) is request]
    resolved = settings.resolve(model.defaults, 8)
    cache, drafts = model.new_cache(1, 64), []
    model.encode(torch.tensor([[5, 6]]), cache)
    for index, length in enumerate((8, 6)):
        trimmed, whole = (begun(model, resolved, 9, index, canvas, size) for size in (length, 8))
        state = trimmed[0].state
        assert torch.equal(state.canvas, whole[0].state.canvas[:, :length])
        while bool(state.active):
            step_alone(model, cache, 0, trimmed)
        drafts += state.draft[0].tolist()
        model.encode(state.draft, cache)
    assert END not in drafts[:12], "another seed"
    assert list(request.output.token_ids) == drafts[:13]
    # Drafts, then what was committed.
    assert lengths == [8] * 5 + [6] * 4 + [5]
    assert beside.output == model.generate([7], 16, settings, seed=10)


def test_a_trimmed_canvas_that_does_not_fit_is_refused_when_it_is_submitted(
    model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = dg.Scheduler(model, max_batch=2, max_length=64, batched=True)
    monkeypatch.setattr(memory, "available_bytes", lambda _: 0)
    scheduler.submit([5], 16, dg.SamplerConfig(trim_canvas=True))
    with pytest.raises(dg.NotEnoughMemory):
        scheduler.submit([5], 13, dg.SamplerConfig(trim_canvas=True))
    assert len(scheduler._waiting) == 1
