"""The plugin inside vLLM, on a CPU: `make test-vllm`, with an environment of its own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

import dgemma_ext as dg
from vllm_server import Server, probe, serving, tiny

ON = {"DGEMMA_VLLM": "1"}
PROMPT = list(range(10, 30))
# Few steps: a random model's canvases part after many, as logits differ by 1e-5.
STEPS = 4
# Pages for two or three requests of four.
TIGHT = {"max_model_len": 160, "block_size": 16, "num_gpu_blocks_override": 20, "disable_log_stats": False}
PUZZLE = "62..14...62.4.23653.5.42..1.5654.23."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a window that prompts and canvases pass."""
    return tiny(tmp_path_factory.mktemp("vllm") / "tiny", window=24)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a window that a test's whole answer fits into: beyond it vLLM's own attention is another."""
    return tiny(tmp_path_factory.mktemp("vllm") / "wide", window=512)


@pytest.fixture(scope="module")
def engine(model: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(model, device="cpu")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--max-model-len", "384", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
    with serving(model, tmp_path_factory.mktemp("log") / "server.log", options, **ON) as started:
        yield started


def asked(server: Server, ids: list[int], max_tokens: int = 40, **extra: Any) -> list[int]:
    """The tokens of an answer."""
    status, body = server.post("/v1/completions", completion(ids, max_tokens, **extra))
    assert status == 200, body
    return list(body["choices"][0]["token_ids"])


def completion(ids: list[int], max_tokens: int = 40, **extra: Any) -> dict[str, Any]:
    xargs = {"max_denoising_steps": STEPS, **extra}
    named = {"model": "m", "prompt": ids, "max_tokens": max_tokens, "temperature": 1.0}
    return {**named, "ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs}


def generated(engine: dg.DiffusionGemma, ids: list[int], seed: int, max_tokens: int = 40, **more: Any) -> list[int]:
    """The tokens of the engine, which no token ends."""
    sampler = dg.SamplerConfig(max_denoising_steps=STEPS, eos_token_ids=(), **more.pop("sampler", {}))
    output = engine.generate(ids, max_new_tokens=max_tokens, seed=seed, sampler=sampler, **more)
    return list(output.token_ids)


def test_the_plugin_is_loaded_in_every_process(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "dgemma_ext inside vLLM" in line]
    assert len({re.split(r"[ )]", line)[1] for line in lines}) >= 2, lines  # APIServer, EngineCore
    assert all("sampler, experts, attention, rows" in line for line in lines)


def test_tokens_are_the_engines(server: Server, engine: dg.DiffusionGemma) -> None:
    """Three canvases, two of which vLLM encodes in between."""
    for seed in (7, 2**62):
        assert asked(server, PROMPT, seed=seed) == generated(engine, PROMPT, seed)
    assert asked(server, PROMPT, seed=7) != asked(server, PROMPT, seed=8)


def test_settings_of_a_request_are_the_engines(server: Server, engine: dg.DiffusionGemma) -> None:
    sampler = {"entropy_bound": 3.0, "t_min": 0.2, "t_max": 1.5}
    assert asked(server, PROMPT, seed=1, **sampler) == generated(engine, PROMPT, 1, sampler=sampler)
    tokens, pinned = [5, -1, 7, *[-1] * 15, 9], [1, 0, 1, *[0] * 15, 1]
    canvas = dg.Canvas([None if token < 0 else token for token in tokens], list(map(bool, pinned)), start_step=2)
    found = asked(server, PROMPT, seed=2, tokens=tokens, pinned=pinned, start_step=2)
    assert found == generated(engine, PROMPT, 2, canvas=canvas)
    assert (found[0], found[2], found[18]) == (5, 7, 9)
    allowed = [100, 200, 300, 400]
    found = asked(server, PROMPT, seed=3, allowed=allowed)
    assert found == generated(engine, PROMPT, 3, canvas=dg.Canvas(allowed=allowed))
    assert set(found) <= set(allowed)
    narrow = asked(server, PROMPT, seed=4, canvas_length=6)
    assert narrow == generated(engine, PROMPT, 4, sampler={"canvas_length": 6})


def test_a_grammar_holds_an_answer(server: Server, engine: dg.DiffusionGemma) -> None:
    body = {**completion(PROMPT, 32, seed=5, regex="(ab)+c"), "ignore_eos": False}
    status, answer = server.post("/v1/completions", body)
    assert status == 200, answer
    assert re.search("^(ab)+c$", answer["choices"][0]["text"], re.MULTILINE)  # behind an empty thought
    sampler = dg.SamplerConfig(max_denoising_steps=STEPS)
    output = engine.generate(PROMPT, max_new_tokens=32, seed=5, sampler=sampler, grammar=dg.Regex("(ab)+c"))
    assert answer["choices"][0]["token_ids"] == list(output.token_ids)


def test_eight_at_once_are_as_alone(server: Server, engine: dg.DiffusionGemma) -> None:
    """Of different lengths, so that prompts are read while other canvases are denoised; some in pieces, as a step takes
    128 tokens."""
    prompts = [[(31 * request + 7 * i) % 500 + 5 for i in range(5 + 30 * request)] for request in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: asked(server, one[1], seed=one[0]), enumerate(prompts)))
    for seed, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        assert tokens == generated(engine, prompt, seed), seed


def test_a_prefix_from_the_cache_gives_the_same_tokens(server: Server) -> None:
    prompt = [i % 300 + 20 for i in range(300)]
    hits = server.metric("vllm:prefix_cache_hits_total")
    assert asked(server, prompt, 16, seed=3) == asked(server, prompt, 16, seed=3)
    assert server.metric("vllm:prefix_cache_hits_total") > hits


def test_an_answer_that_nobody_waits_for_makes_room(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    body = completion(PROMPT, 320, seed=1)
    extra = {name: body[name] for name in ("ignore_eos", "vllm_xargs")}
    stream = client.completions.create(
        model="m", prompt=PROMPT, max_tokens=320, temperature=1.0, stream=True, extra_body=extra
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running"):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert len(asked(server, PROMPT, 16, seed=1)) == 16


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sead": 1}, "sead, which is not known"),
        ({"seed": 2**63}, "seed must be an integer in"),
        ({"diffusion_max_steps": 3}, "max_denoising_steps says it here"),
        ({"tokens": [5], "pinned": [1, 1]}, "canvas.pinned must have 1 entries"),
        ({"tokens": [5] * 60, "pinned": [1] * 60}, "canvases of max_tokens 40 have 48 positions"),
        ({"tokens": [5000]}, "canvas.tokens[0] must be in [0, 512)"),
        ({"canvas_length": 17}, "canvas_length must be at most the checkpoint's 16"),
        ({"t_max": 0.1}, "t_max must be at least t_min"),
        ({"regex": "(a"}, "a"),
        ({"regex": "a{60}"}, "is 40, and the shortest text that the grammar matches has 60 tokens"),
        ({"regex": "a+", "tokens": [400], "pinned": [1]}, "pinned and allowed tokens with which no text"),
        ({"allowed": "[" + "[5]," * 48 + "[5]]"}, "canvas.allowed has 49 entries"),
        ({"diffusion_canvas_length": 9}, "canvas_length says it here"),
        ({"dgemma_answers": 2}, "dgemma_answers, which is not known"),
    ],
)
def test_what_means_nothing_is_status_400_by_name(server: Server, extra: dict[str, Any], words: str) -> None:
    status, body = server.post("/v1/completions", completion(PROMPT, **extra))
    assert status == 400, body
    assert words in body["error"]["message"]


def test_what_the_sampler_does_not_give_is_status_400(server: Server) -> None:
    for more, words in (({"logprobs": 2}, "logprobs is not given"), ({"top_k": 5}, "top_k is not known")):
        status, body = server.post("/v1/completions", {**completion(PROMPT), **more})
        assert status == 400, body
        assert words in body["error"]["message"]


def test_a_bundled_model_answers_over_openais_client(tmp_path: Path) -> None:
    import openai

    folder = Path(dg.__file__).parent / "demo"
    with serving(folder, tmp_path / "log", ("--max-model-len", "256", "--max-num-seqs", "4"), **ON) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        answers = {
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": PUZZLE}],
                max_tokens=36,
                temperature=1.0,
                extra_body={"vllm_xargs": {"seed": 3}},
            )
            .choices[0]
            .message.content
            for _ in range(2)
        }
    assert len(answers) == 1
    digits = re.sub(r"[^1-6]", "", answers.pop() or "")
    assert len(digits) == 36


# What vLLM's scheduler does with requests -----------------------------------------------------------------------------


def test_short_steps_and_few_pages_change_no_token(model: Path, engine: dg.DiffusionGemma) -> None:
    """A step has room for two canvases and a half, and the cache for fewer requests than run: some wait in the middle
    of their canvases, and some give their pages back and read all again."""
    tokens, pinned = [5, -1, 7, *[-1] * 15, 9, *[-1] * 20, 11], [1, 0, 1, *[0] * 15, 1, *[0] * 20, 1]
    content = {"tokens": tokens, "pinned": pinned}
    extras: list[dict[str, Any]] = [{"seed": 0, **content}, {"seed": 1}, {"seed": 2}, {"canvas_length": 6, **content}]
    prompts = [[(31 * request + 7 * i) % 480 + 10 for i in range(20 + 11 * request)] for request in range(4)]
    asked = [
        {"ids": ids, "max_tokens": 48, "extra_args": {"seed": 3, "max_denoising_steps": STEPS, **extra}}
        for ids, extra in zip(prompts, extras, strict=True)
    ]
    told = {"model": str(model), "requests": asked, "engine": {**TIGHT, "max_num_batched_tokens": 40}}
    found, _ = probe(told, VLLM_ENABLE_V1_MULTIPROCESSING="0", **ON)
    assert found["preemptions"] > 0
    canvas = dg.Canvas([None if token < 0 else token for token in tokens], list(map(bool, pinned)))
    own: list[dict[str, Any]] = [{"canvas": canvas}, {}, {}, {"canvas": canvas, "sampler": {"canvas_length": 6}}]
    for seed, (ids, more, got) in enumerate(zip(prompts, own, found["tokens"], strict=True)):
        assert got == generated(engine, ids, seed, 48, **more), seed


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "long_prefill_token_threshold"])
def test_steps_without_room_for_a_canvas_are_refused(name: str, model: Path) -> None:
    with pytest.raises(AssertionError, match=f"{name} is 12, and a step takes a whole canvas of 16 tokens"):
        probe({"model": str(model), "requests": [], "engine": {name: 12}}, **ON)


def test_answers_that_share_a_seed_have_the_seeds_after_it(server: Server, engine: dg.DiffusionGemma) -> None:
    status, body = server.post("/v1/completions", {**completion(PROMPT, 16, seed=2**63 - 1), "n": 3})
    assert status == 200, body
    found = {choice["index"]: choice["token_ids"] for choice in body["choices"]}
    assert found == {n: generated(engine, PROMPT, seed, 16) for n, seed in enumerate((2**63 - 1, 0, 1))}


def test_a_stream_tells_a_canvas_at_a_time_and_the_usage(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    body = completion(PROMPT, 37, seed=7)
    extra = {name: body[name] for name in ("ignore_eos", "vllm_xargs", "return_token_ids")}
    options: Any = {"max_tokens": 37, "temperature": 1.0, "stream": True, "stream_options": {"include_usage": True}}
    events = list(client.completions.create(model="m", prompt=PROMPT, extra_body=extra, **options))
    parts: list[Any] = [event.choices[0].model_dump()["token_ids"] for event in events if event.choices]
    assert [len(part) for part in parts if part] == [16, 16, 5]
    assert [token for part in parts for token in part or []] == asked(server, PROMPT, 37, seed=7)
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (20, 37)


def test_an_answer_ends_inside_a_canvas(server: Server, engine: dg.DiffusionGemma) -> None:
    """By max_tokens, by a token that stops, by an end of text."""
    whole = generated(engine, PROMPT, 7, 48)
    for count in (1, 15, 17, 33):
        assert asked(server, PROMPT, count, seed=7) == whole[:count]
    stop = whole[20]
    body = {**completion(PROMPT, 48, seed=7), "stop_token_ids": [stop]}
    choice = server.post("/v1/completions", body)[1]["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == (whole[: whole.index(stop) + 1], "stop")
    allowed = [1, 106, 50, *range(200, 230)]
    sampler, reasons = dg.SamplerConfig(max_denoising_steps=STEPS), set()
    for seed in range(4):
        body = {**completion(PROMPT, 32, seed=seed, allowed=allowed), "ignore_eos": False}
        choice = server.post("/v1/completions", body)[1]["choices"][0]
        canvas = dg.Canvas(allowed=allowed)
        output = engine.generate(PROMPT, max_new_tokens=32, seed=seed, sampler=sampler, canvas=canvas)
        assert choice["token_ids"] == list(output.token_ids), seed
        assert choice["finish_reason"] == {"eos": "stop"}.get(output.finish_reason, output.finish_reason)
        reasons.add(choice["finish_reason"])
    assert "stop" in reasons


@pytest.mark.parametrize("room", [1, 5, 16, 21])
def test_the_last_canvas_is_cut_to_the_context(room: int, server: Server) -> None:
    prompt = [i % 300 + 20 for i in range(384 - room)]
    assert len(asked(server, prompt, room, seed=3)) == room


# Ranks, and what is off ---------------------------------------------------------------------------------------------

REQUESTS = [
    {"ids": PROMPT, "max_tokens": 40, "extra_args": {"seed": 7, "max_denoising_steps": STEPS}},
    {"ids": PROMPT[:9], "max_tokens": 40, "extra_args": {"seed": 8, "max_denoising_steps": STEPS, "allowed": [5, 300]}},
]


@pytest.mark.parametrize("more", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"])
def test_two_ranks_give_the_tokens_of_one(model: Path, engine: dg.DiffusionGemma, more: dict[str, Any]) -> None:
    told = {"model": str(model), "requests": REQUESTS, "engine": {"tensor_parallel_size": 2, **more}}
    found, _ = probe(told, **ON)
    assert found["tokens"][0] == generated(engine, PROMPT, 7)
    assert found["tokens"][1] == generated(engine, PROMPT[:9], 8, canvas=dg.Canvas(allowed=[5, 300]))


def test_a_plugin_that_is_off_leaves_vllm_as_it_is(wide: Path) -> None:
    """Its tokens are those of a vLLM that may load no plugin."""
    told = {"model": str(wide), "requests": [{"ids": PROMPT, "max_tokens": 16}]}
    off, log = probe(told, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    without, _ = probe(told, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")
    assert off == without
    assert "dgemma" not in "".join(off["classes"].values()).lower()
    assert "dgemma_ext inside vLLM" not in log


@pytest.mark.parametrize("part", ["sampler", "experts", "rows"])
def test_a_part_by_itself(part: str, wide: Path) -> None:
    extra = {"seed": 7, "max_denoising_steps": STEPS} if part == "sampler" else {"diffusion_max_steps": STEPS}
    told = {"model": str(wide), "requests": [{"ids": PROMPT, "max_tokens": 40, "extra_args": extra}]}
    found, _ = probe(told, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="dgemma", DGEMMA_VLLM_PARTS=part)
    classes = found["classes"]
    assert classes["sampler"].startswith("dgemma_ext" if part == "sampler" else "vllm")
    assert classes["model"].startswith("dgemma_ext" if part == "sampler" else "vllm")
    assert ("DGemma" in classes["experts"]) is (part == "experts")
    assert classes["rms_norm"] == ("dgemma" if part == "rows" else "native")
    if part == "sampler":
        engine = dg.DiffusionGemma.from_pretrained(wide, device="cpu")
        assert found["tokens"][0] == generated(engine, PROMPT, 7)
