"""Answers that match, on the bundled 6x6 model, which wants to write digits whatever the grammar says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch

import dgemma_ext as dg
from backend import BACKEND
from command import dgemma
from dgemma_ext import _C, demo
from dgemma_ext.sampling import FAILED
from grammar_cases import SCHEMAS

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="grammars are on the CPU alone")

FAST = dg.SamplerConfig(max_denoising_steps=3)
PROMPT = demo.draw(6, 1).text


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")


@pytest.mark.parametrize("name", ["person", "list", "recursive", "times", "optional"])
def test_a_schema_holds_over_canvases_and_closes_in_time(model: dg.DiffusionGemma, name: str) -> None:
    schema = SCHEMAS[name][0]
    grammar = dg.JsonSchema(schema, "compact")
    shortest = model.compile(grammar).shortest
    # Canvases have 37 positions: one and a bit, more than two, and not a token more than is needed.
    for seed, budget in enumerate((shortest, shortest + 1, shortest + 40, 111)):
        out = model.generate(PROMPT, max_new_tokens=budget, sampler=FAST, seed=seed, grammar=grammar)
        assert len(out.token_ids) <= budget
        assert out.finish_reason in ("eos", "length")
        jsonschema.validate(out.parsed, schema)
        assert json.loads(out.text) == out.parsed


@pytest.mark.parametrize("expression", [r"[A-Z]{2}[0-9]{4}", r"(ab|c)*d{3,50}", r"x{60}", r"(?s:.)*!"])
def test_an_expression_holds(model: dg.DiffusionGemma, expression: str) -> None:
    for seed in range(3):
        out = model.generate(PROMPT, max_new_tokens=70, sampler=FAST, seed=seed, grammar=dg.Regex(expression))
        assert re.fullmatch(expression, out.text), out.text


def test_every_draft_is_the_beginning_of_a_text_that_matches(model: dg.DiffusionGemma) -> None:
    grammar = dg.JsonSchema(SCHEMAS["person"][0])
    compiled = model.compile(grammar)
    state, drafts = compiled.start, 0
    for event in model.stream(PROMPT, max_new_tokens=80, sampler=FAST, seed=3, grammar=grammar):
        if isinstance(event, dg.Draft):
            drafts += 1
            after = compiled.walk(state, event.token_ids)
            assert after != FAILED
            assert compiled.distance[after] <= max(80 - 37 * (event.canvas_index + 1), 0)
        elif event.finish_reason is None:
            state = compiled.walk(state, event.token_ids)
    assert drafts > 4


def test_grammars_differ_in_a_batch_and_give_the_bits_of_each_alone(model: dg.DiffusionGemma) -> None:
    grammars = [dg.Choice(["yes", "no"]), None, dg.JsonSchema(SCHEMAS["list"][0]), dg.Regex("[0-9]{6}( [0-9]{6})*")]
    prompts = [demo.draw(6, seed).text for seed in range(4)]
    given = {"max_new_tokens": 60, "sampler": FAST}
    together = model.generate(prompts, seed=[1, 2, 3, 4], grammar=grammars, **given)
    for index, out in enumerate(together):
        alone = model.generate(prompts[index], seed=index + 1, grammar=grammars[index], **given)
        assert (out.token_ids, out.denoising_steps, out.parsed) == (
            alone.token_ids,
            alone.denoising_steps,
            alone.parsed,
        )
    assert together[0].parsed in ("yes", "no")
    assert together[1].parsed is None


def test_the_shortest_text_and_the_room_for_it(model: dg.DiffusionGemma) -> None:
    grammar = dg.Regex("q{45}")
    shortest = model.compile(grammar).shortest
    assert model.generate(PROMPT, max_new_tokens=shortest, sampler=FAST, grammar=grammar).text == "q" * 45
    message = f"max_new_tokens is {shortest - 1}, and the shortest text that the grammar matches has {shortest} tokens"
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=shortest - 1, sampler=FAST, grammar=grammar)


def test_pinned_and_allowed_tokens_go_with_a_grammar(model: dg.DiffusionGemma) -> None:
    assert model.tokenizer is not None
    three = model.tokenizer.id_of("3")
    digits = [model.tokenizer.id_of(digit) for digit in "123"]
    canvas = dg.Canvas([None, three], [False, True], allowed=[digits] * 6)
    out = model.generate(PROMPT, max_new_tokens=8, sampler=FAST, canvas=canvas, grammar=dg.Regex("[1-6]{6}"))
    assert re.fullmatch("[123]3[123]{4}", out.text)


def pinned_at(model: dg.DiffusionGemma, at: int, text: str) -> dg.Canvas:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    return dg.Canvas([*[None] * at, *ids], [*[False] * at, *[True] * len(ids)])


def test_pins_of_a_later_canvas_are_seen_by_the_one_before(model: dg.DiffusionGemma) -> None:
    # With 37 positions a canvas: x may not stand in the first canvas, from which nothing leads to the pinned y.
    grammar, canvas = dg.Regex("x[ab]*|[ab]*y[ab]*"), pinned_at(model, 50, "y")
    for seed in range(4):
        out = model.generate(PROMPT, max_new_tokens=70, sampler=FAST, seed=seed, canvas=canvas, grammar=grammar)
        assert re.fullmatch("[ab]{50}y[ab]*", out.text)


@pytest.mark.parametrize(
    ("expression", "at", "text", "budget"),
    [
        ("[1-6]{6}", 1, "a", 8),
        ("[ab]{10}", 10, "a", 12),
        ("[ab]*", 50, "c", 70),
        ("(?:ab)*", 51, "a", 70),
        ("[ab]{60}", 60, "<turn|>", 58 + 37),
        ("[ab]*c", 19, "b", 20),
    ],
)
def test_pins_that_leave_no_text_are_refused_when_a_request_is_submitted(
    expression: str, at: int, text: str, budget: int, model: dg.DiffusionGemma
) -> None:
    scheduler = dg.Scheduler(model, max_batch=1)
    given = {"max_new_tokens": budget, "canvas": pinned_at(model, at, text), "grammar": dg.Regex(expression)}
    with pytest.raises(dg.GrammarError, match="canvas has pinned and allowed tokens with which no text"):
        scheduler.submit(PROMPT, **given)  # type: ignore[arg-type]
    assert scheduler.idle
    assert scheduler.free_slots == 1


def test_allowed_tokens_that_leave_no_text_are_refused(model: dg.DiffusionGemma) -> None:
    assert model.tokenizer is not None
    digits = [model.tokenizer.id_of(digit) for digit in "123"]
    grammar = dg.Regex("[1-3]{40}")
    with pytest.raises(
        dg.GrammarError, match="ends within 74 tokens"
    ):  # neither the end of text nor padding is allowed
        model.generate(PROMPT, max_new_tokens=74, sampler=FAST, canvas=dg.Canvas(allowed=digits), grammar=grammar)
    out = model.generate(PROMPT, max_new_tokens=40, sampler=FAST, canvas=dg.Canvas(allowed=digits), grammar=grammar)
    assert re.fullmatch("[1-3]{40}", out.text)


@pytest.mark.parametrize("batched", [False, True])
def test_a_request_that_does_not_match_fails_alone(
    batched: bool, model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are checked when they are submitted, so one is made to fail: nothing may follow its canvas."""
    scheduler = dg.Scheduler(model, max_batch=3, batched=batched)
    given = {"max_new_tokens": 20, "sampler": FAST, "grammar": dg.Regex("[ab]{10,}")}
    requests = [scheduler.submit(PROMPT, seed=seed, **given) for seed in range(3)]  # type: ignore[arg-type]
    impossible = requests[1].constraint
    monkeypatch.setattr(requests[1], "constraint", lambda length: replace(impossible(length), tokens_left=-1))
    while not scheduler.idle:
        scheduler.finish_canvas()
    with pytest.raises(dg.GrammarError, match="no canvas matches it"):
        requests[1].output  # noqa: B018
    assert requests[1].denoising_steps == [1]
    for seed in (0, 2):
        alone = model.generate(PROMPT, seed=seed, **given)
        assert requests[seed].output.token_ids == alone.token_ids


def test_a_chat_and_its_arguments(model: dg.DiffusionGemma) -> None:
    chat = model.chat()
    assert chat.send(PROMPT, max_new_tokens=20, sampler=FAST, grammar=dg.Choice(["left", "right"])) in ("left", "right")
    with pytest.raises(
        ValueError, match=r"grammar must be a dg.Regex, dg.JsonSchema, dg.Choice, dg.ToolCalls or None, got 'a'"
    ):
        model.generate(PROMPT, grammar="a")  # type: ignore[arg-type]
    with pytest.raises(dg.GrammarError, match="cannot be read"):
        model.generate(PROMPT, grammar=dg.Regex("("))


def test_a_grammar_of_the_format_costs_nothing(model: dg.DiffusionGemma) -> None:
    """Puzzles are solved as without: noise and self-conditioning stay the model's, and the key keeps its doubt."""
    puzzles = [demo.draw(6, 20261130, index) for index in range(24)]
    prompts = [puzzle.text for puzzle in puzzles]
    solved, steps = {}, {}
    for name, grammar in (("free", None), ("digits", dg.Regex("[1-6]{36}"))):
        outputs = model.generate(prompts, max_new_tokens=37, seed=list(range(24)), grammar=grammar)
        solved[name] = sum(demo.check(out.text, puzzle.text) for out, puzzle in zip(outputs, puzzles, strict=True))
        steps[name] = sum(sum(out.denoising_steps) for out in outputs) / 24
    assert solved["digits"] >= solved["free"] - 1
    assert steps["digits"] <= steps["free"] + 0.5


def test_the_command(tmp_path: Path) -> None:
    command = ["generate", str(demo.checkpoint(6)), PROMPT, "--steps", "2", "--max-new-tokens", "40", "--device", "cpu"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS["bounded"][0]))
    run = dgemma(*command, "--json-schema", str(schema))
    assert run.code == 0
    jsonschema.validate(json.loads(run.out), SCHEMAS["bounded"][0])
    assert dgemma(*command, "--choice", "ab", "--choice", "ba").out.strip() in ("ab", "ba")
    assert re.fullmatch("[xy]{5}", dgemma(*command, "--regex", "[xy]{5}").out.strip())
    for wrong, message in (
        (["--json-schema", str(tmp_path / "no.json")], "no.json cannot be read"),
        (["--regex", "a(?=b)"], "no automaton follows"),
        (["--regex", "a", "--choice", "b"], "not allowed with"),
        (["--regex", "a{99}"], "max_new_tokens is 40"),
    ):
        run = dgemma(*command, *wrong)
        assert run.code == 2
        assert message in run.err


def test_a_build_without_kernels_refuses_a_grammar_on_a_gpu(
    model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = dg.Scheduler(model, max_batch=1)
    monkeypatch.setattr(model.network, "device", torch.device("cuda"))
    monkeypatch.setattr(_C, "has_cuda", lambda: False)
    with pytest.raises(ValueError, match="grammar is given, and this build has no kernels for a GPU"):
        scheduler.submit(PROMPT, 20, grammar=dg.Regex("[ab]{6}"))
    assert scheduler.idle
