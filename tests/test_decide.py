"""Decisions: probabilities of choices against float64 from the canvas of the one step, batches, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from backend import BACKEND
from command import dgemma
from dgemma_ext import demo
from dgemma_ext.engine import decision_canvas, label_ids
from dgemma_ext.model import Canvases

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="the bundled model is loaded on the CPU")

PROMPTS = [demo.draw(6, seed).text for seed in range(4)]


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")


@pytest.fixture
def canvases(model: dg.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The canvases that passes see, in order."""
    seen: list[torch.Tensor] = []
    original = model.network.forward

    def recording(cache: dg.Cache, canvases: Canvases | None, *rest: Any) -> torch.Tensor | None:
        if canvases is not None:
            seen.append(canvases.ids.clone())
        return original(cache, canvases, *rest)

    monkeypatch.setattr(model.network, "forward", recording)
    return seen


@pytest.mark.parametrize(("template", "position"), [("{}", 0), ("4{}", 1), ("3 {}45\n", 1)])
def test_probabilities_are_those_of_the_labels_position(
    template: str, position: int, model: dg.DiffusionGemma, canvases: list[torch.Tensor]
) -> None:
    choices = {"one": "1", "two": ["2", "4"], "letter": "A"}
    found = model.decide(PROMPTS[0], choices, template, seed=5)
    (canvas,) = canvases
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert canvas.shape == (1, 32)
    text = [*tokenizer.encode(template.replace(" {}", "{}").replace("{}", "5")), tokenizer.id_of("<turn|>")]
    pinned = text + [0] * (32 - len(text))
    differing = [place for place in range(32) if int(canvas[0, place]) != pinned[place]]
    assert differing in ([position], []), "all but the label is pinned, and that is noise"

    ids = tokenizer.encode_prompt(PROMPTS[0], "text", None)
    cache = model.new_cache(1, len(ids) + 1)
    model.encode(torch.tensor([ids]), cache)
    row = model.denoise(canvas, cache)[0, position].double().softmax(-1)
    # The byte token of a character writes it too.
    spelled = {name: [tokenizer.id_of(name), tokenizer.id_of(f"<0x{ord(name):02X}>")] for name in "124A"}
    mass = {name: float(row[ids].sum()) for name, ids in spelled.items()}
    wanted = {"one": mass["1"], "two": mass["2"] + mass["4"], "letter": mass["A"]}
    total = sum(wanted.values())
    assert found.probabilities == pytest.approx({name: value / total for name, value in wanted.items()}, rel=1e-4)
    assert found.mass == pytest.approx(total, rel=1e-4)
    assert found.choice == max(wanted, key=lambda name: wanted[name])
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.steps == 1
    assert found.seconds > 0


def test_a_batch_gives_the_bits_of_each_alone(model: dg.DiffusionGemma) -> None:
    choices = [["1", "2"], {"a": "3", "b": ["4", "5"]}, ["6", "x", "1"], ["2", "1"]]
    together = model.decide(PROMPTS, choices, "1{}", seed=[3, 4, 5, 6])
    assert len({decision.seconds for decision in together}) == 1
    for index, decision in enumerate(together):
        assert decision == model.decide(PROMPTS[index], choices[index], "1{}", seed=3 + index)
    one_for_all = model.decide(PROMPTS, ["1", "2"])
    assert one_for_all == [model.decide(text, ["1", "2"]) for text in PROMPTS]
    assert one_for_all[0] != one_for_all[1]
    assert len(one_for_all) == 4


def test_improbable_labels_have_probabilities_too(model: dg.DiffusionGemma) -> None:
    found = model.decide(PROMPTS[0], ["Q", "Z"])
    assert 0 <= found.mass < 1e-3
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert all(0 < value < 1 for value in found.probabilities.values())


def test_nothing_is_encoded_after_the_step(model: dg.DiffusionGemma, canvases: list[torch.Tensor]) -> None:
    model.decide(PROMPTS[:3], ["1", "2"])
    assert [tuple(ids.shape) for ids in canvases] == [(1, 32)] * 3


def test_labels_are_all_their_spellings() -> None:
    texts = [b"<pad>", b"yes", b" yes", b"Yes", b"no", b"yes", b" no", b"y", b" "]

    class Tokens(dg.Tokenizer):
        special_ids = frozenset({0})

        def __init__(self) -> None:
            pass

        def token_bytes(self) -> list[bytes | None]:
            return [None, *texts[1:]]

        def encode(self, text: str, add_bos: bool = False, special_tokens: str = "text") -> list[int]:
            return [7] * len(text)

    tokens = Tokens()
    assert label_ids(["yes", "no"], tokens, 9) == {"yes": [1, 5, 2], "no": [4, 6]}
    assert label_ids({"a": ["yes", "Yes"], "b": " no "}, tokens, 9) == {"a": [1, 5, 2, 3], "b": [4, 6]}
    with pytest.raises(ValueError, match="choices has the label 'maybe', which is 5 tokens, and a decision reads one"):
        label_ids(["yes", "maybe"], tokens, 9)
    with pytest.raises(ValueError, match="choices has 'yes' and ' yes', which share the label ' yes'"):
        label_ids(["yes", " yes"], tokens, 9)


def test_the_canvas_is_as_short_as_it_may_be(model: dg.DiffusionGemma) -> None:
    tokenizer, defaults = model.tokenizer, model.defaults
    assert tokenizer is not None
    for used, length in ((1, 32), (31, 32), (32, 64), (63, 64), (64, 100), (99, 100)):
        held = decision_canvas("x" * (used - 1) + "{}", tokenizer, defaults, 100)
        assert (held.length, held.position, len(held.canvas.tokens)) == (length, used - 1, length)
    with pytest.raises(ValueError, match="template has 101 tokens with the label and the end, and the canvas 100 pos"):
        decision_canvas("x" * 99 + "{}", tokenizer, defaults, 100)
    with pytest.raises(ValueError, match="the canvas 16 positions"):
        decision_canvas("x" * 15 + "{}", tokenizer, defaults, 100, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["1"]}, r"choices must be two texts or more, or a mapping from choices to their labels"),
        ({"choices": "12"}, r"choices must be two texts or more"),
        ({"choices": ["1", ""]}, r"choices must be two texts or more.* that are not empty"),
        ({"choices": ["1", 2]}, r"choices\[1\] must be a string, got 2"),
        ({"choices": ["1", "2", "1"]}, r"choices has '1' more than once"),
        ({"choices": {"a": "1", "b": []}}, r"choices\['b'\] must be a text or a list of texts that are not empty"),
        ({"choices": ["1", "yes"]}, r"choices has the label 'yes', which is 3 tokens"),
        ({"choices": [["1", "2"]]}, r"choices must be one list, got 1"),
        ({"prompt": PROMPTS[:2], "choices": [["1", "2"]]}, r"choices must be one list or 2, one per prompt, got 1"),
        (
            {"prompt": PROMPTS[:2], "choices": [["1", "2"], ["1", "no"]]},
            r"choices\[1\] has the label 'no', which is 2 tokens",
        ),
        ({"template": "x"}, r"template must be text with {} once, where the label stands, got 'x'"),
        ({"template": "{}{}"}, r"template must be text with {} once"),
        ({"canvas_length": 38}, r"canvas_length must be an integer in \[1, 38\), got 38"),
        ({"prompt": ""}, r"prompt is empty"),
        ({"seed": -1}, r"seed must be an integer"),
    ],
)
def test_what_cannot_be_decided(change: dict[str, Any], message: str, model: dg.DiffusionGemma) -> None:
    with pytest.raises(ValueError, match=message):
        model.decide(**{"prompt": PROMPTS[0], "choices": ["1", "2"], **change})


def test_log_probabilities_of_tokens_by_their_ids(model: dg.DiffusionGemma) -> None:
    scheduler = dg.Scheduler(model, 1)
    ranked = scheduler.submit(PROMPTS[0], logprobs=20)
    named = scheduler.submit(PROMPTS[0], logprob_token_ids=[7, 3])
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert ranked.output.token_ids == named.output.token_ids
    for one, other in zip(ranked.output.logprobs or (), named.output.logprobs or (), strict=True):
        assert other.top_ids == (7, 3)
        assert other.logprob == one.logprob
        known = dict(zip(one.top_ids, one.top_logprobs, strict=True))
        assert all(known.get(token, value) == value for token, value in zip((7, 3), other.top_logprobs, strict=True))
    with pytest.raises(ValueError, match="logprob_token_ids is given, and logprobs too"):
        scheduler.submit(PROMPTS[0], logprobs=1, logprob_token_ids=[3])
    with pytest.raises(ValueError, match=r"logprob_token_ids\[0\] must be a token id in \[0, 384\), got 384"):
        scheduler.submit(PROMPTS[0], logprob_token_ids=[384])


def test_the_command() -> None:
    command = ["decide", str(demo.checkpoint(6)), PROMPTS[0], "--device", "cpu"]
    run = dgemma(*command, "--choice", "first=1", "--choice", "2", "--json")
    decided = json.loads(run.out)
    assert decided["probabilities"].keys() == {"first", "2"}
    assert decided["denoising_steps"] == 1
    lines = dgemma(*command, "--choice", "first=1", "--choice", "2").out.splitlines()
    assert lines[0].split()[0] == decided["choice"]
    assert float(lines[0].split()[1]) == pytest.approx(max(decided["probabilities"].values()), abs=1e-4)
    assert lines[2].split() == ["mass", f"{decided['mass']:.4f}"]
    for wrong, message in (
        ([], "--choice is wanted two times or more"),
        (["--choice", "1", "--choice", "1"], "--choice 1 is given more than once"),
        (["--choice", "1", "--choice", "yes"], "which is 3 tokens"),
        (["--choice", "1", "--choice", "2", "--template", "x"], "template must be text with {} once"),
    ):
        run = dgemma(*command, *wrong)
        assert run.code == 2
        assert message in run.err
