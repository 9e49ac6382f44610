"""The server's parts by themselves: stop strings, mailboxes, seeds, temperatures, canvases, options."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext.serve.errors import ApiError
from dgemma_ext.serve.mailbox import Mailbox
from dgemma_ext.serve.options import ServeOptions
from dgemma_ext.serve.protocol.diffusion import DiffusionOptions
from dgemma_ext.serve.steering import canvas_of, sampler_of, seeds_of
from dgemma_ext.serve.stop import StopCutter
from serving import bundled

DEFAULTS = dg.GenerationDefaults()
AS_IT_IS = DiffusionOptions()


# Stop strings ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "ba", ""]), min_size=4, max_size=12),
    st.lists(st.text("ab", min_size=2, max_size=5), max_size=3),
)
def test_text_is_cut_where_a_stop_string_begins(pieces: list[str], stops: list[str]) -> None:
    """Whatever the pieces, the text is that before the stop string that ends first in the pieces so far, and what is
    passed on never has to be taken back."""
    cutter, passed, whole = StopCutter(stops), "", ""
    for piece in pieces:
        whole += piece
        passed += cutter.feed(piece)
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            assert cutter.found
            assert passed == whole[: min(found)]
            assert cutter.feed("more") == ""
            return
        assert not cutter.found
        rest = whole[len(passed) :]
        assert whole.startswith(passed)
        assert not rest or any(stop.startswith(rest) for stop in stops), "held back without a reason"
    assert passed + cutter.feed("", is_last=True) == whole


def test_the_end_of_a_stop_string_is_not_needed_to_hold_it_back() -> None:
    cutter = StopCutter(["\n\nUser:"])
    assert [cutter.feed(piece) for piece in ("Yes.\n", "\nUs", "e it.", "\n\nUser: no")] == [
        "Yes.",
        "",
        "\n\nUse it.",
        "",
    ]
    assert cutter.found


# Mailboxes ------------------------------------------------------------------------------------------------------------


def draft(step: int) -> dg.Draft:
    nothing: Any = torch.empty(0, device="cpu", dtype=torch.float32)
    request: Any = None
    return dg.Draft(request, 0, step, (), nothing, nothing, 0.0)


def commit(index: int) -> dg.Commit:
    request: Any = None
    return dg.Commit(request, index, (), "", 1, None)


def test_a_mailbox_drops_the_oldest_drafts_and_nothing_else() -> None:
    async def run() -> list[Any]:
        mailbox = Mailbox()
        for number in range(20):
            mailbox.put(0, draft(number))
            if number % 10 == 5:
                mailbox.put(0, commit(number))
        taken = [(await mailbox.get(1.0))[1] for _ in range(10)]
        with pytest.raises(TimeoutError):
            await mailbox.get(0.01)
        mailbox.put(0, draft(99))
        return [*taken, (await mailbox.get(1.0))[1]]

    events = asyncio.run(run())
    assert [event.canvas_index for event in events if isinstance(event, dg.Commit)] == [5, 15]
    steps = [event.step for event in events if isinstance(event, dg.Draft)]
    assert steps == [*range(12, 20), 99]
    assert events.index(next(e for e in events if getattr(e, "step", 0) == 15)) < 5  # the order is kept


# Temperatures and seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 1, 1.0])
def test_temperature_1_is_the_checkpoints_schedule(temperature: float | None) -> None:
    assert sampler_of(temperature, AS_IT_IS, DEFAULTS, True) == dg.SamplerConfig(trim_canvas=True)


def test_temperature_scales_the_schedule() -> None:
    half = sampler_of(0.5, AS_IT_IS, DEFAULTS, False).resolve(DEFAULTS, 8)
    usual = dg.SamplerConfig().resolve(DEFAULTS, 8)
    for step in (1, 20, 48):
        assert half.temperature(step) == pytest.approx(0.5 * usual.temperature(step))
    given_too = sampler_of(0.5, DiffusionOptions(t_min=0.2, t_max=2.0), DEFAULTS, False)
    assert (given_too.t_min, given_too.t_max) == (0.1, 1.0)


def test_temperature_0_takes_the_most_likely_token() -> None:
    """Only equal logits share a draw: the entropy is the logarithm of how many there are."""
    model = bundled()
    prompt = [{"role": "user", "content": "." * 36}]
    mixed = {}
    for temperature in (0, 1):
        drafts: list[dg.Draft] = []
        sampler = sampler_of(temperature, DiffusionOptions(max_denoising_steps=3), model.defaults, True)
        model.generate(prompt, sampler=sampler, on_draft=drafts.append)
        counts = torch.cat([draft.entropy for draft in drafts]).double().exp()
        mixed[temperature] = int(((counts - counts.round()).abs() > 1e-3).sum())
    assert mixed[0] == 0
    assert mixed[1] > 50


def test_seeds() -> None:
    assert seeds_of(7, None, 3) == [7, 8, 9]
    assert seeds_of(2**63 - 1, 0.5, 2) == [2**63 - 1, 0]
    assert seeds_of(-1, None, 1) == [2**63 - 1]
    assert seeds_of(None, 0, 2) == [0, 1]
    drawn = {seeds_of(None, 1.0, 1)[0] for _ in range(50)}
    assert len(drawn) == 50
    assert max(drawn) < 2**53


# Canvases -------------------------------------------------------------------------------------------------------------


def test_parts_of_a_canvas() -> None:
    tokenizer = bundled().tokenizer
    assert tokenizer is not None
    canvas = canvas_of(
        DiffusionOptions.model_validate(
            {"start_text": [{"text": "12", "pinned": True}, {"blank": 2}, {"text": "3"}], "start_step": 4}
        ),
        tokenizer,
        37,
    )
    one, two, three = tokenizer.encode("123")
    assert canvas == dg.Canvas([one, two, None, None, three], [True, True, False, False, False], start_step=4)
    spans = DiffusionOptions(start_text="12345", pinned=[[3, 5], [0, 1]])
    assert canvas_of(spans, tokenizer, 5) == dg.Canvas(tokenizer.encode("12345"), [True, False, False, True, True])
    assert canvas_of(AS_IT_IS, tokenizer, 5) is None


@pytest.mark.parametrize(
    "given",
    [
        {"pinned": [[0, 1]]},
        {"start_step": 2},
        {"start_text": "12", "pinned": [[0, 3]]},
        {"start_text": "12", "pinned": [[1, 1]]},
        {"start_text": "123", "pinned": [[0, 2], [1, 3]]},
        {"start_text": [{"blank": 1}], "pinned": [[0, 1]]},
        {"start_text": [{"blank": 3}, {"blank": 2}]},
        {"start_text": [{"blank": 2**20}] * 3},
        {"start_text": "12345"},
    ],
)
def test_canvases_that_cannot_be_made(given: dict[str, Any]) -> None:
    tokenizer = bundled().tokenizer
    assert tokenizer is not None
    with pytest.raises(ApiError) as caught:
        canvas_of(DiffusionOptions.model_validate(given), tokenizer, 4)
    assert (caught.value.param or "").startswith("diffusion.")


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 65536}, "port must be an integer in"),
        ({"max_batch": 0}, "max_batch must be"),
        ({"max_waiting": -1}, "max_waiting must be"),
        ({"request_timeout": 0}, "request_timeout must be"),
        ({"served_model_names": ()}, "served_model_names must be"),
        ({"cors_origins": "x"}, "cors_origins must be"),
        ({"max_length": 0}, "max_length must be"),
    ],
)
def test_options_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeOptions(**given)


def test_a_key_is_never_shown() -> None:
    assert "hunter2" not in repr(ServeOptions(api_key="hunter2"))
    for bad in ("", "hunter2\n", 3):
        with pytest.raises(ValueError, match="api_key") as caught:
            ServeOptions(api_key=bad)  # type: ignore[arg-type]
        assert "hunter2" not in str(caught.value)
