"""/v1/completions, /v1/fim/completions, /v1/responses, /tokenize and /detokenize on the bundled model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import dgemma_ext as dg
from dgemma_ext import demo
from serving import MODEL, PUZZLE, SAMPLER, Running, bundled, running

FAST = {"diffusion": {"max_denoising_steps": 3}}
QUICK = dg.SamplerConfig(trim_canvas=True, max_denoising_steps=3)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bundled()) as started:
        yield started


@pytest.fixture(scope="module")
def chat_ids(server: Running) -> list[int]:
    """A puzzle as a chat's token ids, by the server itself."""
    answer = httpx2.post(
        f"{server.url}/tokenize", json={"model": MODEL, "messages": [{"role": "user", "content": PUZZLE}]}
    ).json()
    assert answer["count"] == len(answer["tokens"])
    tokens: list[int] = answer["tokens"]
    return tokens


def test_tokens_of_a_chat_are_a_prompt(server: Running, chat_ids: list[int]) -> None:
    wanted = server.model.generate([{"role": "user", "content": PUZZLE}], seed=3, sampler=SAMPLER)
    completion = server.client().completions.create(model=MODEL, prompt=chat_ids, seed=3)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == (wanted.text, "stop")


def test_raw_text_goes_through_no_template(server: Running) -> None:
    tokenizer = server.service.tokenizer
    wanted = server.model.generate(tokenizer.encode("62<|turn>", add_bos=True), 9, sampler=QUICK, seed=3)
    completion = server.client().completions.create(
        model=MODEL, prompt="62<|turn>", max_tokens=9, seed=3, extra_body=FAST
    )
    assert completion.choices[0].text == wanted.text
    assert completion.choices[0].finish_reason == ("stop" if wanted.finish_reason == "eos" else "length")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(tokenizer.encode("62<|turn>", add_bos=True))


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(stream: bool, server: Running) -> None:
    tokenizer = server.service.tokenizer
    prompts = ["12", "34"]
    seeds = [5, 6]
    wanted = [
        server.model.generate(tokenizer.encode(prompt, add_bos=True), sampler=QUICK, seed=seed).text
        for prompt in prompts
        for seed in seeds
    ]
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompts, "n": 2, "seed": 5, "extra_body": FAST}
    texts = [""] * 4
    if stream:
        options: Any = {"include_usage": True}
        usage = None
        for chunk in server.client().completions.create(**asked, stream=True, stream_options=options):
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        completion = server.client().completions.create(**asked)
        usage = completion.usage
        for choice in completion.choices:
            texts[choice.index] = choice.text
    assert texts == wanted
    assert usage is not None
    assert usage.prompt_tokens == sum(len(tokenizer.encode(prompt, add_bos=True)) for prompt in prompts)
    assert usage.model_extra is not None
    assert usage.model_extra["diffusion"]["seeds"] == [5, 6, 5, 6]


@pytest.mark.parametrize("path", ["completions", "fim/completions"])
def test_a_suffix_is_pinned_behind_the_canvas(path: str, server: Running) -> None:
    tokenizer = server.service.tokenizer
    prompt, suffix = tokenizer.encode("62..14", add_bos=True), tokenizer.encode("653.5.42")
    canvas = dg.Canvas(tokens=[*[None] * 10, *suffix], pinned=[*[False] * 10, *[True] * 8])
    seen: list[dg.Draft] = []
    out = server.model.generate(prompt, 18, sampler=QUICK, seed=3, canvas=canvas, on_draft=seen.append)
    assert len(seen[0].token_ids) == 20  # trimmed to quarters
    asked = {"model": MODEL, "prompt": "62..14", "suffix": "653.5.42", "max_tokens": 10, "seed": 3, **FAST}
    answer = httpx2.post(f"{server.url}/v1/{path}", json=asked, timeout=60).json()
    (choice,) = answer["choices"]
    assert choice["text"] == tokenizer.decode(out.token_ids[:10])
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == min(10, len(out.token_ids))


def test_a_long_suffix_leaves_half_a_canvas(server: Running) -> None:
    length = server.model.config.canvas_length
    completion = server.client().completions.create(
        model=MODEL, prompt="1", suffix="2" * 200, max_tokens=length, extra_body=FAST
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= length - length // 2


def test_stop_strings_end_the_answer_and_never_show(server: Running) -> None:
    client = server.client()
    messages: list[Any] = [{"role": "user", "content": PUZZLE}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, seed=3).choices[0].message.content
    assert whole is not None
    stop = whole[10:13]
    wanted = whole[: whole.index(stop)]
    for stops in (stop, ["nothing", stop]):
        (choice,) = client.chat.completions.create(model=MODEL, messages=messages, seed=3, stop=stops).choices
        assert (choice.message.content, choice.finish_reason) == (wanted, "stop")
    text, reason = "", None
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, seed=3, stop=stop, stream=True):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (text, reason) == (wanted, "stop")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_diffusing_sends_the_whole_text_each_time(path: str, server: Running, chat_ids: list[int]) -> None:
    prompt = {"messages": [{"role": "user", "content": PUZZLE}]} if "chat" in path else {"prompt": chat_ids}
    asked = {"model": MODEL, "seed": 3, "stream": True, "diffusing": True, **prompt}
    out = server.model.generate(chat_ids, seed=3, sampler=SAMPLER)
    texts = []
    with httpx2.stream("POST", f"{server.url}/v1/{path}", json=asked, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts.append(choice["delta"].get("content") if "chat" in path else choice["text"])
    shown = [text for text in texts if text]
    assert shown[-1] == out.text
    assert len(shown) >= sum(out.denoising_steps)


def test_an_edit_in_place(server: Running) -> None:
    solution = demo.draw(6, seed=1).solution
    asked: Any = {"start_text": "1" * 6 + solution[6:], "pinned": [[6, 36]]}
    client = server.client()
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": PUZZLE}], seed=1, extra_body={"diffusion": asked}
    ).choices
    text = choice.message.content
    assert text is not None
    assert text[6:36] == solution[6:]
    assert text == solution


def test_responses_and_their_events_say_the_same(server: Running) -> None:
    wanted = server.model.generate([{"role": "user", "content": PUZZLE}], seed=3, sampler=SAMPLER)
    client = server.client()
    asked: dict[str, Any] = {"model": MODEL, "input": PUZZLE, "extra_body": {"seed": 3}}
    whole = client.responses.create(**asked)
    assert (whole.output_text, whole.status) == (wanted.text, "completed")
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": PUZZLE}]}]
    assert client.responses.create(**asked | {"input": parts}).output_text == wanted.text
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == wanted.text
    assert final.usage == whole.usage
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    drafts = {"extra_body": {"seed": 3, "diffusion": {"drafts": True}}}
    types = [event.type for event in client.responses.create(**asked | drafts, stream=True)]
    assert types.count("diffusion.draft") == sum(wanted.denoising_steps)  # type: ignore[arg-type]


def test_the_asynchronous_client(server: Running) -> None:
    wanted = server.model.generate([{"role": "user", "content": PUZZLE}], seed=3, sampler=SAMPLER).text

    async def run() -> tuple[str, str, str]:
        async with server.async_client() as client:
            messages: list[Any] = [{"role": "user", "content": PUZZLE}]
            whole = await client.chat.completions.create(model=MODEL, messages=messages, seed=3)
            text = ""
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=messages, seed=3, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            response = await client.responses.create(model=MODEL, input=PUZZLE, extra_body={"seed": 3})
            return str(whole.choices[0].message.content), text, response.output_text

    assert asyncio.run(run()) == (wanted, wanted, wanted)


def test_tokens_and_back(server: Running) -> None:
    text = "62..14<|turn>\n"
    made = httpx2.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert made["tokens"] == server.service.tokenizer.encode(text, add_bos=True)
    assert "".join(made["token_strs"][1:]) == text
    bare = httpx2.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == made["tokens"][1:]
    back = httpx2.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": bare["tokens"]}).json()
    assert back == {"prompt": text}


def test_a_raw_texts_tokens_have_no_tools(server: Running) -> None:
    for field, value in (("tools", [3]), ("tools", [{"type": "x"}]), ("chat_template_kwargs", {"x": 1})):
        refused = httpx2.post(f"{server.url}/tokenize", json={"prompt": "1", field: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith(field)


def test_a_long_lists_texts_are_made_in_another_thread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, threads = dg.Tokenizer.decode, set()

    def noted(self: dg.Tokenizer, *args: Any, **named: Any) -> str:
        threads.add(threading.current_thread().name)
        return decode(self, *args, **named)

    monkeypatch.setattr(dg.Tokenizer, "decode", noted)
    asked = {"prompt": "62..14", "return_token_strs": True}
    assert httpx2.post(f"{server.url}/tokenize", json=asked).json()["token_strs"][1:] == list("62..14")
    assert {name.partition(" worker")[0] for name in threads} == {"AnyIO"}


@pytest.mark.parametrize("budget", [0, 1 << 26])
def test_a_conversation_is_encoded_once(budget: int) -> None:
    """The second turn's prompt begins with the first; its answer has the bits that it has without a cache."""
    client_chat: list[Any] = [{"role": "user", "content": PUZZLE}]
    with running(bundled(), prefix_cache_bytes=budget) as started:
        client = started.client()
        told = []
        for _ in range(3):
            answer = client.chat.completions.create(model=MODEL, messages=client_chat, seed=3)
            text = answer.choices[0].message.content
            assert text == started.model.generate(client_chat, seed=3, sampler=SAMPLER).text
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            told.append((usage.prompt_tokens_details.cached_tokens or 0, usage.prompt_tokens))
            client_chat += [{"role": "assistant", "content": text}, {"role": "user", "content": PUZZLE[::-1]}]
    assert told[0][0] == 0
    for (cached, tokens), (_, before) in zip(told[1:], told, strict=False):
        assert (before - 8 <= cached < tokens) if budget else cached == 0


def test_nothing_is_left(server: Running) -> None:
    server.wait_until_empty()
