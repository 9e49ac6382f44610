"""Requests that share a scheduler: the same tokens alone, in a batch, joined late; nothing leaks."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext import RequestState, SamplerConfig
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.model import Canvases, Network
from models import random_model, smallest_model

# Loose enough that some canvases stop early and some run to the cap.
SAMPLER = SamplerConfig(max_denoising_steps=5, confidence_threshold=4.0, entropy_bound=6.0, t_max=0.1, t_min=0.01)


def prompts(model: dg.DiffusionGemma, count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(model.config.vocab_size) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


def run(scheduler: dg.Scheduler) -> None:
    while not scheduler.idle:
        scheduler.step()


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_alone_in_a_batch_joined_late_and_twice(dtype: torch.dtype, batched: bool) -> None:
    model = random_model(dtype)
    chosen, seeds = prompts(model, 7), list(range(7))
    alone = [model.generate(p, max_new_tokens=20, sampler=SAMPLER, seed=s) for p, s in zip(chosen, seeds, strict=True)]
    again = [model.generate(p, max_new_tokens=20, sampler=SAMPLER, seed=s) for p, s in zip(chosen, seeds, strict=True)]
    batch = model.generate(chosen, max_new_tokens=20, sampler=SAMPLER, seed=seeds)
    late = dg.Scheduler(model, max_batch=3, max_length=100, batched=batched)
    requests = []
    for prompt, seed in zip(chosen, seeds, strict=True):
        requests.append(late.submit(prompt, max_new_tokens=20, sampler=SAMPLER, seed=seed))
        late.step()
    run(late)
    assert again == alone
    assert batch == alone
    assert [r.output for r in requests] == alone
    assert len({output.token_ids for output in alone}) == 7


def test_another_seed_gives_other_tokens() -> None:
    model = random_model()
    prompt = prompts(model, 1)[0]
    outputs = model.generate([prompt] * 3, max_new_tokens=16, sampler=SAMPLER, seed=[1, 2, 1])
    assert outputs[0] == outputs[2] != outputs[1]


# Property: any schedule of submit, cancel and step gives every finished request the tokens that it gets alone.

SPECIFICATIONS = 16


@cache
def specification(index: int) -> tuple[list[int], int, SamplerConfig]:
    """The prompt, length and sampler of a request; its seed is its index."""
    draw = random.Random(index)
    prompt = [draw.randrange(300) for _ in range(draw.randrange(1, 12))]
    sampler = SamplerConfig(
        max_denoising_steps=draw.randrange(1, 4),
        stability_threshold=draw.randrange(2),
        confidence_threshold=draw.choice([0.0, 6.0]),
        entropy_bound=draw.choice([0.1, 8.0]),
        canvas_length=draw.choice([3, 4]),
        eos_token_ids=tuple(draw.sample(range(300), 8)),
    )
    return prompt, draw.randrange(1, 13), sampler


@cache
def expected(index: int) -> dg.Output:
    prompt, length, sampler = specification(index)
    output = smallest_model().generate(prompt, max_new_tokens=length, sampler=sampler, seed=index)
    assert isinstance(output, dg.Output)
    return output


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, SPECIFICATIONS - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 3)),
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(schedule=st.lists(actions, min_size=1, max_size=14), max_batch=st.integers(1, 3))
def test_any_schedule_gives_every_request_the_tokens_it_gets_alone(
    schedule: list[tuple[str, int]], max_batch: int
) -> None:
    check_schedule(schedule, dg.Scheduler(smallest_model(), max_batch=max_batch, max_length=24))


@pytest.mark.parametrize("driver", list(LOOPS))
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    schedule=st.lists(st.one_of(actions, st.just(("canvas", 1))), min_size=1, max_size=14),
    max_batch=st.integers(1, 5),
)
def test_any_schedule_of_a_batch_gives_every_request_the_tokens_it_gets_alone(
    driver: str, schedule: list[tuple[str, int]], max_batch: int
) -> None:
    scheduler = dg.Scheduler(smallest_model(), max_batch=max_batch, max_length=24, batched=True, driver=driver)
    check_schedule(schedule, scheduler)


def check_schedule(schedule: list[tuple[str, int]], scheduler: dg.Scheduler) -> None:
    max_batch = scheduler.free_slots
    submitted: list[tuple[int, dg.Request]] = []
    for action, argument in schedule:
        if action == "submit":
            prompt, length, sampler = specification(argument)
            request = scheduler.submit(prompt, max_new_tokens=length, sampler=sampler, seed=argument)
            submitted.append((argument, request))
        elif action == "cancel" and submitted:
            request = submitted[argument % len(submitted)][1]
            was_done = request.done
            assert request.cancel() is not was_done
        elif action == "step":
            for _ in range(argument):
                scheduler.step()
        elif action == "canvas":
            scheduler.finish_canvas()
        running = sum(r.state is RequestState.RUNNING for _, r in submitted)
        assert scheduler.free_slots + running == max_batch
    while not scheduler.idle:
        scheduler.finish_canvas() if len(schedule) % 2 else scheduler.step()
    assert scheduler.free_slots == max_batch
    assert all(scheduler.cache.length(slot) == 0 for slot in range(max_batch))
    for index, request in submitted:
        assert request.done
        if request.state is not RequestState.CANCELLED:
            assert request.output == expected(index)


def test_the_specifications_cover_both_ends() -> None:
    reasons = {expected(index).finish_reason for index in range(SPECIFICATIONS)}
    canvases = {len(expected(index).denoising_steps) for index in range(SPECIFICATIONS)}
    assert reasons == {"eos", "length"}
    assert canvases >= {1, 2, 3}


def test_a_cancelled_request_has_no_output_and_is_cancelled_once() -> None:
    model = smallest_model()
    scheduler = dg.Scheduler(model, max_batch=1, max_length=32)
    first, second = (scheduler.submit([1, 2, 3], max_new_tokens=12, seed=s) for s in range(2))
    scheduler.step()
    assert (first.state, second.state) == (RequestState.RUNNING, RequestState.WAITING)
    assert first.cancel()
    assert not first.cancel()
    assert second.cancel()
    assert scheduler.idle
    assert scheduler.free_slots == 1
    with pytest.raises(RuntimeError, match="cancelled and has no output"):
        _ = first.output


def test_a_failing_request_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    chosen = prompts(model, 2)
    alone = model.generate(chosen[1], max_new_tokens=16, sampler=SAMPLER, seed=5)
    scheduler = dg.Scheduler(model, max_batch=2, max_length=100)
    bad = scheduler.submit(chosen[0], max_new_tokens=16, sampler=SAMPLER, seed=4)
    good = scheduler.submit(chosen[1], max_new_tokens=16, sampler=SAMPLER, seed=5)
    original = model.network.forward

    def poisoned(cache: dg.Cache, canvases: Canvases, *rest: object) -> torch.Tensor | None:
        hidden = original(cache, canvases, *rest)  # type: ignore[arg-type]
        if canvases.slot.tolist() == [0] and bad.denoising_steps[-1] == 1:
            assert hidden is not None
            hidden[0, 2, 7] = float("nan")
        return hidden

    monkeypatch.setattr(model.network, "forward", poisoned)
    events = []
    while not scheduler.idle:
        events += scheduler.step()
    failures = [e for e in events if isinstance(e, dg.Failure)]
    assert [f.request for f in failures] == [bad]
    assert isinstance(bad.error, dg.NonFiniteError)
    assert (bad.error.request, bad.error.step) == (0, 2)
    with pytest.raises(dg.NonFiniteError, match="denoising step 2"):
        _ = bad.output
    assert good.output == alone
    assert scheduler.free_slots == 2


def test_a_dropped_scheduler_frees_its_network_at_once() -> None:
    """Neither unfinished requests nor one that the caller still holds keep the network alive."""
    base = random_model()
    network = Network(base.config, base.weights)
    scheduler = dg.Scheduler(dg.DiffusionGemma(network, base.defaults, base.tokenizer), max_batch=2, max_length=100)
    held = scheduler.submit([1, 2, 3], max_new_tokens=16, sampler=SAMPLER)
    scheduler.submit([4], max_new_tokens=16, sampler=SAMPLER)
    scheduler.step()
    known = weakref.ref(network)
    gc.disable()
    try:
        del network, scheduler
        assert known() is None, "freed without a search for cycles"
    finally:
        gc.enable()
    assert held.cancel()
    assert not held.cancel()
    assert held.state is RequestState.CANCELLED


@pytest.mark.parametrize("batched", [False, True])
def test_a_debug_run_names_the_layer_and_the_request(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    chosen = prompts(model, 2)
    alone = model.generate(chosen[1], max_new_tokens=16, sampler=SAMPLER, seed=5)
    monkeypatch.setattr(model.network.options, "debug", True)
    scheduler = dg.Scheduler(model, max_batch=2, max_length=100, batched=batched)
    bad = scheduler.submit(chosen[0], max_new_tokens=16, sampler=SAMPLER, seed=4)
    good = scheduler.submit(chosen[1], max_new_tokens=16, sampler=SAMPLER, seed=5)
    scheduler.step()
    # The failure is after the head: from the second step on the first canvas's soft embedding is not finite.
    (group,) = scheduler._groups.values()
    group._batch.state.soft_embedding[0, 1, 2] = float("nan")
    while not scheduler.idle:
        scheduler.step()
    with pytest.raises(dg.NonFiniteError, match=r"request 0, .* step 2: the output of layer 0 is not finite"):
        _ = bad.output
    assert good.output == alone


def test_a_debug_run_looks_at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(model.network.options, "debug", True)
    layer = model.weights.layers[1]
    monkeypatch.setattr(layer, "decoder_layer_scalar", float("inf"))
    with pytest.raises(dg.NonFiniteError, match=r"step 1: the output of layer 1 is not finite"):
        model.generate([1, 2, 3], max_new_tokens=8, sampler=SAMPLER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [1, 512]}, r"prompt\[1\] must be a token id in \[0, 512\), got 512"),
        ({"prompt": [-1]}, r"prompt\[0\] must be a token id"),
        ({"prompt": [1] * 5000}, "more than the model's context of 4096"),
        ({"prompt": [1], "max_new_tokens": 0}, r"max_new_tokens must be an integer in \[1, 2\*\*31\), got 0"),
        ({"prompt": [1], "max_new_tokens": 1000}, "max_length is 100"),
        ({"prompt": [1], "seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        (
            {"prompt": [1], "sampler": SamplerConfig(canvas_length=9)},
            "canvas_length must be at most the checkpoint's 8",
        ),
        ({"prompt": [1], "sampler": SamplerConfig(t_min=2.0)}, "t_max must be at least t_min"),
        (
            {"prompt": [1], "sampler": SamplerConfig(t_min=0, t_max=1e-29)},
            "last step's temperature is at least",
        ),
        ({"prompt": [1], "canvas": dg.Canvas([600])}, r"canvas.tokens\[0\] must be in \[0, 512\)"),
        ({"prompt": [1], "canvas": dg.Canvas([6], pinned=[])}, "canvas.pinned must have 1 entries"),
        ({"prompt": [1], "canvas": dg.Canvas([None], pinned=[True])}, r"canvas.pinned\[0\] is set where"),
        (
            {"prompt": [1], "canvas": dg.Canvas([6], pinned=[True], allowed=[5])},
            "token 6, which canvas.allowed does not",
        ),
        ({"prompt": [1], "canvas": dg.Canvas([6], allowed=[[]])}, "canvas.allowed for position 0"),
        ({"prompt": [1], "canvas": dg.Canvas([6], start_step=99)}, r"canvas.start_step must be in"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments: dict[str, object], message: str) -> None:
    scheduler = dg.Scheduler(random_model(), max_batch=1, max_length=100)
    with pytest.raises(ValueError, match=message):
        scheduler.submit(**arguments)  # type: ignore[arg-type]
    assert scheduler.idle


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9])
def test_a_request_may_fill_the_context_and_not_a_position_more(tokens: int, trim: bool) -> None:
    """The last canvas counts as the first does, to its last position: no canvas reaches beyond the model's context."""
    model, sampler = smallest_model(), SamplerConfig(max_denoising_steps=1, trim_canvas=trim, eos_token_ids=())
    context = model.config.max_position_embeddings
    last = (tokens - 1) % 4 + 1 if trim else 4  # a quarter of four is one
    longest = context - (tokens - 1) // 4 * 4 - last
    output = model.generate([1] * longest, max_new_tokens=tokens, sampler=sampler)
    assert len(output.token_ids) == tokens
    assert len(output.denoising_steps) == -(-tokens // 4)
    message = (
        rf"prompt of {longest + 1} tokens with max_new_tokens {tokens}, .* needs 65 positions, more than the model's"
    )
    with pytest.raises(ValueError, match=message):
        model.generate([1] * (longest + 1), max_new_tokens=tokens, sampler=sampler)
    with pytest.raises(ValueError, match=message):
        dg.Scheduler(model).submit([1] * (longest + 1), tokens, sampler)


def test_what_was_not_given_is_called_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr("dgemma_ext.engine.scheduler._USUAL_LENGTH", 100)
    with pytest.raises(
        ValueError, match=r"with max_new_tokens 256 by default needs 251 .*; max_length is 100 by default$"
    ):
        dg.Scheduler(model).submit([1, 2, 3])
    with pytest.raises(ValueError, match=r"with max_new_tokens 200 needs 195 .*; max_length is 90$"):
        dg.Scheduler(model, max_length=90).submit([1, 2, 3], 200)
    # The last canvas is never in the cache.
    assert dg.Scheduler(model, max_length=90).submit([1, 2, 3], 88).max_new_tokens == 88
    with pytest.raises(ValueError, match=r"max_length must be an integer in \[1, 2\*\*31\), got 0"):
        dg.Scheduler(model, max_length=0)


def test_events_come_in_order_and_commits_add_up_to_the_text() -> None:
    model = random_model()
    events: Iterator[dg.Draft | dg.Commit] = model.stream("hello", max_new_tokens=20, sampler=SAMPLER, seed=3)
    drafts, commits = [], []
    for event in events:
        (drafts if isinstance(event, dg.Draft) else commits).append(event)
        if isinstance(event, dg.Commit):
            assert drafts[-1].token_ids[: len(event.token_ids)] == event.token_ids
    output = model.generate("hello", max_new_tokens=20, sampler=SAMPLER, seed=3)
    assert tuple(t for c in commits for t in c.token_ids) == output.token_ids
    assert [c.denoising_steps for c in commits] == list(output.denoising_steps)
    assert "".join(c.text for c in commits) == output.text
    assert [c.finish_reason for c in commits[:-1]] == [None] * (len(commits) - 1)
    assert commits[-1].finish_reason == output.finish_reason
    assert len(drafts) == sum(output.denoising_steps)
    assert output.tokens_per_forward == len(output.token_ids) / len(drafts)
    assert all(d.entropy.shape == d.accepted.shape == (8,) for d in drafts)


def test_a_character_cut_by_a_canvas_is_in_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()

    def parse(ids: list[int], prefix: list[int]) -> dg.Response:
        return dg.Response(bytes(ids).decode("utf-8", "replace"))

    monkeypatch.setattr(model.tokenizer, "parse_response", parse)
    tokens = [*b"aaaaaaa", *"é".encode(), *b"bbbbbbb"]
    canvas = dg.Canvas(tokens, [True] * 16)
    events = model.stream([5], max_new_tokens=16, sampler=SAMPLER, canvas=canvas)
    assert [e.text for e in events if isinstance(e, dg.Commit)] == ["aaaaaaa", "ébbbbbbb"]


# Errors inside a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("broken", range(1, 10))
def test_a_step_that_is_broken_off_ends_its_requests_alone(
    batched: bool, broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error of any kind, in any pass of an answer: the prompt that it was to encode may be half in the cache.

    A request of another canvas length goes on, and later ones are right.
    """
    model = random_model()
    chosen = prompts(model, 3)
    short = SamplerConfig(canvas_length=5, max_denoising_steps=3, confidence_threshold=0.0)
    other = model.generate(chosen[1], max_new_tokens=12, sampler=short, seed=1)
    later = model.generate(chosen[2], max_new_tokens=16, sampler=SAMPLER, seed=2)
    scheduler = dg.Scheduler(model, max_batch=2, max_length=100, batched=batched)
    ended = scheduler.submit(chosen[0], max_new_tokens=24, sampler=SAMPLER, seed=0)
    beside = scheduler.submit(chosen[1], max_new_tokens=12, sampler=short, seed=1)
    original, passes = model.network.forward, []

    def breaking(cache: dg.Cache, canvases: Canvases, *rest: object) -> torch.Tensor | None:
        if canvases.ids.shape[1] == 8:
            passes.append(1)
            if len(passes) == broken:
                original(cache, canvases, *rest)  # type: ignore[arg-type]
                raise KeyboardInterrupt
        return original(cache, canvases, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.network, "forward", breaking)
    events: list[dg.Event] = []

    def run() -> None:
        while not scheduler.idle:
            events.extend(scheduler.step())

    with pytest.raises(KeyboardInterrupt):
        run()
    assert ended.state is RequestState.FAILED
    assert not ended.cancel()
    follows = scheduler.submit(chosen[2], max_new_tokens=16, sampler=SAMPLER, seed=2)
    run()
    failures = [event for event in events if isinstance(event, dg.Failure)]
    assert [event.request for event in failures] == [ended]
    with pytest.raises(RuntimeError, match="a step was broken off: KeyboardInterrupt"):
        _ = ended.output
    assert beside.output == other
    assert follows.output == later
    commits = [event for event in events if isinstance(event, dg.Commit) and event.request is beside]
    assert [commit.denoising_steps for commit in commits] == list(other.denoising_steps), "no event is lost"
    assert scheduler.free_slots == 2


def test_a_prompt_that_is_refused_leaves_the_kept_scheduler_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma_ext.engine import generation

    base = random_model()
    model = dg.DiffusionGemma(base.network, base.defaults, base.tokenizer)
    monkeypatch.setattr(generation, "_keeps_schedulers", lambda model: True)
    with pytest.raises(ValueError, match="seed must be an integer in"):
        model.generate(prompts(model, 2), max_new_tokens=8, sampler=SAMPLER, seed=[3, -1])
    assert model.kept_scheduler is not None
    assert model.kept_scheduler.idle


@pytest.mark.parametrize("prefix_cache_bytes", [0, 4000])
def test_nothing_is_left_of_requests_that_have_ended(prefix_cache_bytes: int) -> None:
    """Finished, cancelled while waiting and while running, out of time, with log-probabilities and canvases of several
    lengths: the scheduler holds none of them, and its containers do not grow."""
    model, draw = smallest_model(), random.Random(0)
    scheduler = dg.Scheduler(model, 3, 40, prefix_cache_bytes=prefix_cache_bytes)
    known: list[weakref.ref[dg.Request]] = []
    sizes = []
    for turn in range(60):
        for _ in range(draw.randrange(4)):
            sampler = SamplerConfig(max_denoising_steps=2, canvas_length=draw.choice([3, 4]))
            asked = {"logprobs": draw.choice([None, 2]), "deadline": draw.choice([None, 0])}
            request = scheduler.submit([draw.randrange(300)] * 5, 7, sampler, turn, **asked)
            known.append(weakref.ref(request))
            if draw.random() < 0.3:
                request.cancel()
            del request
        events = scheduler.step()
        if events and draw.random() < 0.2:
            events[0].request.cancel()
        del events
        if turn % 20 == 19:
            while not scheduler.idle:
                scheduler.step()
            sizes.append(
                (len(scheduler._groups), len(scheduler._events), len(scheduler._waiting), scheduler.free_slots)
            )
    gc.collect()
    assert [reference for reference in known if reference() is not None] == []
    assert {size[1:] for size in sizes} == {(0, 0, 3)}
    assert max(size[0] for size in sizes) <= 4
    if scheduler.prefix_cache is not None:
        assert scheduler.prefix_cache.nbytes <= prefix_cache_bytes
