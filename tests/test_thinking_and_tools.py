"""Thoughts and tool calls in answers, streams and chats, and what a request says to the chat template.

A random model says nothing that can be read, so the answers here are pinned into the canvases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

import dgemma_ext as dg
from chats import LOOK, answering, pinned, prompts_of
from models import random_model

SAMPLER = dg.SamplerConfig(max_denoising_steps=2)
ANSWER = (
    "<|channel>thought\nLet me see.\n<channel|>One moment: "
    '<|tool_call>call:look{what:<|"|>the sky<|"|>}<tool_call|><|tool_response>'
)
ASKED = (dg.ToolCall("look", {"what": "the sky"}),)


def ids_of(text: str) -> list[int]:
    tokenizer = random_model().tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text, special_tokens="tokens")


def answer(prompt: Any = "hi", text: str = ANSWER, **settings: Any) -> dg.Output:
    output = random_model().generate(prompt, sampler=SAMPLER, canvas=pinned(ids_of(text)), **settings)
    assert isinstance(output, dg.Output)
    return output


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_output_in_its_parts() -> None:
    output = answer()
    assert output.finish_reason == "eos"
    assert list(output.token_ids) == ids_of(ANSWER)
    assert (output.text, output.thinking, output.tool_calls) == ("One moment: ", "Let me see.", ASKED)
    assert output.invalid_tool_calls == ()
    assert output.message == {
        "role": "assistant",
        "content": "One moment: ",
        "reasoning_content": "Let me see.",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"what": "the sky"}'}}
        ],
    }
    assert hash(output) == hash(answer())


def test_a_call_that_cannot_be_read_is_not_lost() -> None:
    output = answer(text="Hm.<|tool_call>call:look{what}<tool_call|><turn|>")
    assert (output.text, output.tool_calls) == ("Hm.", ())
    assert output.invalid_tool_calls == (
        dg.InvalidToolCall("<|tool_call>call:look{what}<tool_call|>", "it ends before :"),
    )
    assert output.message == {"role": "assistant", "content": "Hm."}


def test_an_answer_that_is_cut() -> None:
    output = answer(max_new_tokens=len(ids_of(ANSWER)) - 4)
    assert output.finish_reason == "length"
    assert (output.text, output.thinking, output.tool_calls) == ("One moment: ", "Let me see.", ())
    assert output.invalid_tool_calls[0].error == "it is not closed, and a string is not closed"


# Characters of several tokens, the first of which ends with its canvas.
WIDE = "abcd😀€😀€!<turn|>"


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (ANSWER, 256),
        ("<|channel>thought\né\n<channel|>ü<|channel>thought\nb\n<channel|>!<turn|>", 256),
        (WIDE, 256),
        *((WIDE, limit) for limit in range(9, 19)),
    ],
)
def test_events_add_up_to_the_answer(text: str, limit: int) -> None:
    model, ids = random_model(), ids_of(text)[:limit]
    events = list(model.stream("hi", limit, sampler=SAMPLER, canvas=pinned(ids)))
    commits = [event for event in events if isinstance(event, dg.Commit)]
    output = events[-1].request.output
    assert len(commits) == -(-len(ids) // model.config.canvas_length)
    assert "".join(commit.text for commit in commits) == output.text
    assert "".join(commit.thinking for commit in commits) == output.thinking
    # Pinned drafts are what is committed, and say so also when the answer has gone on.
    for event, following in itertools.pairwise(events):
        if isinstance(event, dg.Draft) and isinstance(following, dg.Commit):
            assert event.token_ids[: len(following.token_ids)] == following.token_ids
            # A character of several tokens waits for what follows it.
            is_certain = following.finish_reason is not None or (event.text + event.thinking).isascii()
            words, told = (event.text, event.thinking), (following.text, following.thinking)
            assert words == told if is_certain else all(map(str.startswith, words, told))


def test_a_draft_ends_where_its_answer_does() -> None:
    ids = ids_of("a<turn|>bc")
    drafts = [
        event for event in random_model().stream("hi", 8, SAMPLER, canvas=pinned(ids)) if isinstance(event, dg.Draft)
    ]
    assert {draft.text for draft in drafts} == {"a"}
    ids = ids_of("abcdefgh")
    drafts = [
        event for event in random_model().stream("hi", 3, SAMPLER, canvas=pinned(ids)) if isinstance(event, dg.Draft)
    ]
    assert {draft.text for draft in drafts} == {"abc"}


def test_a_thought_that_the_prompt_begins() -> None:
    """After a tool's result the template opens the model's thoughts itself."""
    chat = [{"role": "user", "content": "hi"}, answer().message, {"role": "tool", "content": "blue"}]
    output = answer(chat, "Blue.\n<channel|>It is blue.<turn|>", enable_thinking=True, tools=[LOOK])
    assert (output.thinking, output.text) == ("Blue.", "It is blue.")


# What a request says to the template ----------------------------------------------------------------------------------

OPTIONS = {"tools": [LOOK], "enable_thinking": True, "special_tokens": "tokens"}
HOLES = "Is <|think|> a token?"


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.generate(HOLES, 8, SAMPLER, **OPTIONS),
        lambda model: list(model.stream(HOLES, 8, SAMPLER, **OPTIONS)),
        lambda model: dg.Scheduler(model).submit(HOLES, 8, SAMPLER, **OPTIONS),
        lambda model: model.chat(**OPTIONS).send(HOLES, 8, SAMPLER),
    ],
    ids=["generate", "stream", "submit", "chat"],
)
def test_options_reach_the_template(monkeypatch: pytest.MonkeyPatch, ask: Callable[[dg.DiffusionGemma], Any]) -> None:
    model, seen = random_model(), prompts_of(monkeypatch)
    ask(model)
    assert model.tokenizer is not None
    assert seen == [model.tokenizer.encode_prompt(HOLES, **OPTIONS)]
    assert seen != [model.tokenizer.encode_prompt(HOLES, **(OPTIONS | {"special_tokens": "text"}))]
    assert seen != [model.tokenizer.encode_prompt(HOLES, **(OPTIONS | {"tools": None}))]
    assert seen != [model.tokenizer.encode_prompt(HOLES, **(OPTIONS | {"enable_thinking": None}))]


def test_options_differ_by_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = random_model(), prompts_of(monkeypatch)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    each: dict[str, Any] = {
        "tools": [None, [LOOK], []],
        "enable_thinking": [True, None, False],
        "special_tokens": ["text", "tokens", "text"],
        "chat_template_kwargs": [None, {"enable_thinking": True}, {}],
    }
    model.generate([HOLES] * 3, 8, SAMPLER, **each)
    assert seen == [
        tokenizer.encode_prompt(HOLES, enable_thinking=True),
        tokenizer.encode_prompt(HOLES, "tokens", [LOOK], enable_thinking=True),
        tokenizer.encode_prompt(HOLES, enable_thinking=False),
    ]
    assert len({tuple(ids) for ids in seen}) == 3
    seen.clear()
    model.generate([HOLES] * 2, 8, SAMPLER, tools=[LOOK], chat_template_kwargs={"enable_thinking": True})
    assert seen == [tokenizer.encode_prompt(HOLES, tools=[LOOK], enable_thinking=True)] * 2


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([5, 6], {"tools": [LOOK]}, "prompt is token ids; tools, thinking, images and special_tokens are for text"),
        ([5, 6], {"enable_thinking": False}, "prompt is token ids"),
        ([5, 6], {"special_tokens": "tokens"}, "prompt is token ids"),
        ("hi", {"enable_thinking": "yes"}, "enable_thinking must be True or False, got 'yes'"),
        (
            "hi",
            {"chat_template_kwargs": {"enable_thinkng": True}},
            "enable_thinkng is given, but the chat template .*jinja",
        ),
        ("hi", {"chat_template_kwargs": "x"}, "chat_template_kwargs must be a mapping .*, got 'x'"),
        ("hi", {"chat_template_kwargs": {1: 2}}, "a name of chat_template_kwargs must be a string, got 1"),
        ("hi", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has messages"),
        ("hi", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has tools"),
        ("hi", {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": True}, "has enable_thinking"),
        ("hi", {"chat_template_kwargs": {"tool_choice": len}}, "tool_choice is given"),
        ("hi", {"special_tokens": "none"}, "special_tokens must be one of text, tokens, got 'none'"),
        ("hi", {"tools": [len]}, r"tools\[0\] must be .* got <built-in function len>"),
        (["hi", "ho"], {"enable_thinking": [True]}, "enable_thinking must be one value or 2"),
        (["hi", "ho"], {"tools": [[LOOK]]}, "tools must be one value or 2"),
    ],
)
def test_options_that_are_refused(prompt: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        random_model().generate(prompt, 8, SAMPLER, **options)


def test_a_checkpoint_without_a_template_takes_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    assert model.tokenizer is not None
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert model.generate("hi", 8, SAMPLER).token_ids
    for options in ({"tools": [LOOK]}, {"enable_thinking": True}):
        with pytest.raises(ValueError, match="is for a chat template, and the prompt does not go through one"):
            model.generate("hi", 8, SAMPLER, **options)  # type: ignore[arg-type]


# Chats ----------------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_after_a_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answering(monkeypatch, ANSWER, "It is blue.\n<channel|>Blue.<turn|>", "Bye.<turn|>")
    model = random_model()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    chat = model.chat(tools=[LOOK], enable_thinking=True, max_length=1000)
    assert (chat.text, chat.thinking, chat.tool_calls, chat.token_ids, chat.output) == ("", "", (), (), None)

    assert chat.send("What colour is the sky?", sampler=SAMPLER) == chat.text == "One moment: "
    assert (chat.thinking, chat.tool_calls) == ("Let me see.", ASKED)
    assert list(chat.token_ids) == ids_of(ANSWER)
    with pytest.raises(ValueError, match="must be tool, with the result of the call of look, got 'user'"):
        chat.send("Well?", sampler=SAMPLER)

    # What it thought on the way to the call is still before it, and the template opens its next thought.
    assert chat.send({"role": "tool", "content": "blue"}, sampler=SAMPLER) == "Blue."
    assert (chat.thinking, chat.tool_calls, chat.invalid_tool_calls) == ("It is blue.", (), ())
    prompt = tokenizer.decode(seen[1], skip_special_tokens=False)
    assert prompt[prompt.index("<|channel>") :] == (
        '<|channel>thought\nLet me see.\n<channel|><|tool_call>call:look{what:<|"|>the sky<|"|>}<tool_call|>One moment:'
        '<|tool_response>response:look{value:<|"|>blue<|"|>}<tool_response|><|channel>thought\n'
    )

    # The next question comes without the thoughts before it.
    assert chat.send("Bye", sampler=SAMPLER) == "Bye."
    prompt = tokenizer.decode(seen[2], skip_special_tokens=False)
    assert "<|tool_call>" in prompt
    assert "Let me see." not in prompt
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [message["role"] for message in chat.messages] == roles


def test_a_chat_takes_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    two = "<|tool_call>call:look{}<tool_call|><|tool_call>call:look{what:1}<tool_call|><|tool_response>"
    seen = answering(monkeypatch, two, "Done.<turn|>")
    chat = random_model().chat(tools=[LOOK])
    chat.send("hi", sampler=SAMPLER)
    results = [{"role": "tool", "tool_call_id": "call_1", "content": "b"}, {"role": "tool", "content": "a"}]
    assert chat.send(results, sampler=SAMPLER) == "Done."
    assert [message.get("content") for message in chat.messages] == ["hi", "", "b", "a", "Done."]
    assert len(seen) == 2


def test_a_failed_turn_leaves_the_answer_before_it() -> None:
    chat = random_model().chat(max_length=400)
    chat.send("a", 8, SAMPLER)
    before = chat.output
    for turn in ("\ud800", {"role": "tool", "content": "x"}, [], [1], 3, None):
        with pytest.raises(ValueError, match=r"messages|turn"):
            chat.send(turn, 8, SAMPLER)  # type: ignore[arg-type]
    assert chat.output is before
    assert len(chat.messages) == 2
