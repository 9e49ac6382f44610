"""Requests with images: the same bits in any batch and with any prefix cache, turns of a chat, and failures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

import dgemma_ext as dg
from backend import BACKEND
from checkpoints import FULL, SLIDING
from dgemma_ext.engine import TokenizedPrompt, prefix_cache, tokenize_prompt
from dgemma_ext.engine import scheduler as scheduler_module
from dgemma_ext.engine.loop import LOOPS
from dgemma_ext.model import PrefillChunk
from dgemma_ext.model.vision import KEPT_FEATURES, Patches, PromptImage, VisionTower
from models import random_model
from pictures import gradient

SAMPLER = dg.SamplerConfig(max_denoising_steps=3, confidence_threshold=4.0, entropy_bound=6.0)
ROOM = 1 << 26
WIDE, SQUARE = Image.fromarray(gradient(97, 61)), Image.fromarray(gradient(48, 48))  # 60 and 64 soft tokens of 70
TURNED = WIDE.transpose(Image.Transpose.ROTATE_180)
CONTEXT = 400
Steps = list[tuple[tuple[int, ...], bytes]]


def vision_model() -> dg.DiffusionGemma:
    """Of windows shorter than an image. The kernels of a GPU are for bfloat16, and slow on the test bed."""
    if BACKEND != "cpu":
        return random_model(torch.bfloat16, layers=(SLIDING, FULL), images=True)
    return random_model(layers=(SLIDING, FULL, SLIDING, FULL), images=True)


def prompt_of(text: str, *images: Any) -> TokenizedPrompt:
    return tokenize_prompt(text, vision_model(), options=dg.PromptOptions(image_tokens=70), images=list(images))


@cache
def prompts() -> tuple[TokenizedPrompt, ...]:
    """Seven, of which some begin with the same image, or with another one of the same size."""
    return (
        prompt_of("What is this?", WIDE),
        prompt_of("hello"),
        prompt_of("Where?", WIDE),
        prompt_of("What is this?", TURNED),
        prompt_of("Which of both?", WIDE, SQUARE),
        prompt_of("a longer question without a picture in it"),
        prompt_of("?", SQUARE),
    )


def answers(scheduler: dg.Scheduler, asked: Sequence[TokenizedPrompt], seeds: Sequence[int]) -> list[Steps]:
    """Of each answer the drafts of its steps, and the bits of their entropies."""
    requests = [scheduler.submit(one, 12, SAMPLER, seed) for one, seed in zip(asked, seeds, strict=True)]
    steps: dict[int, Steps] = {request.number: [] for request in requests}
    while not scheduler.idle:
        for event in scheduler.step():
            assert not isinstance(event, dg.Failure), event.error
            if isinstance(event, dg.Draft):
                steps[event.request.number].append((event.token_ids, event.entropy.numpy().tobytes()))
    return list(steps.values())


@cache
def alone(index: int) -> Steps:
    (steps,) = answers(dg.Scheduler(vision_model(), 1, CONTEXT), [prompts()[index]], [index])
    return steps


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each chunk has that a pass encodes."""
    seen: list[int] = []
    advance = dg.Cache.advance

    def spy(self: dg.Cache, slot: int, count: int) -> None:
        seen.append(count)
        advance(self, slot, count)

    monkeypatch.setattr(dg.Cache, "advance", spy)
    return seen


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft tokens of each image that the tower computes; no features are kept from before."""
    seen: list[int] = []
    features = VisionTower.features

    def spy(self: VisionTower, image: Patches) -> torch.Tensor:
        seen.append(image.soft_tokens)
        return features(self, image)

    vision = vision_model().vision
    assert vision is not None
    vision._features.clear()
    monkeypatch.setattr(VisionTower, "features", spy)
    return seen


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("most", "prefix_bytes"), [(0, 0), (1024, 0), (1024, ROOM), (100, ROOM)])
def test_the_same_bits_alone_and_beside_others(
    batched: bool, most: int, prefix_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded by passes of their own (`most` 0) or by the first step, and continued from each other's prefixes."""
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", most)
    scheduler = dg.Scheduler(vision_model(), 7, CONTEXT, batched=batched, prefix_cache_bytes=prefix_bytes)
    for _ in range(2 if prefix_bytes else 1):
        found = answers(scheduler, prompts(), range(7))
        for index, steps in enumerate(found):
            assert steps == alone(index), index
    assert alone(0) != alone(3), "the image changes nothing here"


def test_a_part_of_the_batch_has_images() -> None:
    """Requests join beside others that are in the middle of their canvases."""
    scheduler = dg.Scheduler(vision_model(), 3, CONTEXT, batched=True)
    first = scheduler.submit(prompts()[1], 12, SAMPLER, 1)
    scheduler.step()
    second, third = (scheduler.submit(prompts()[index], 12, SAMPLER, index) for index in (4, 5))
    while not scheduler.idle:
        scheduler.step()
    for index, request in ((1, first), (4, second), (5, third)):
        assert request.output.token_ids == vision_model().generate(prompts()[index], 12, SAMPLER, index).token_ids


@pytest.mark.parametrize("driver", LOOPS)
def test_every_driver_begins_with_images(driver: str) -> None:
    """A captured step takes no chunks: a canvas's first step, with its images, is run by itself."""
    asked = [prompt_of("?", Image.fromarray(gradient(1790, 100))), TokenizedPrompt([2, 5, 6])]  # 35 soft tokens
    scheduler = dg.Scheduler(vision_model(), 2, CONTEXT, True, driver)
    made = [scheduler.submit(one, 8, SAMPLER, seed) for seed, one in enumerate(asked)]
    while not scheduler.idle:
        scheduler.finish_canvas()
    for seed, request in enumerate(made):
        assert request.output == vision_model().generate(asked[seed], 8, SAMPLER, seed)


def test_a_pass_gets_its_images_where_the_slot_has_room(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a prefix that is in the cache, an image's place in the chunk is not its position; two of a size keep
    their order."""
    chunks: list[PrefillChunk] = []
    network = vision_model().network
    forward = type(network).forward

    def spy(self: Any, cache: Any, canvases: Any, given: Sequence[PrefillChunk] = ()) -> Any:
        chunks.extend(given)
        return forward(self, cache, canvases, given)

    monkeypatch.setattr(type(network), "forward", spy)
    scheduler = dg.Scheduler(vision_model(), 1, CONTEXT, prefix_cache_bytes=ROOM)
    both, vision = prompt_of("Which?", WIDE, TURNED), vision_model().vision
    assert vision is not None
    answers(scheduler, [TokenizedPrompt(both.ids[:3]), both], [0, 0])
    first, second = both.images
    (chunk,) = (one for one in chunks if one.features)
    assert [offset for offset, _ in chunk.features] == [first.start - 3, second.start - 3]
    for (_, features), placed in zip(chunk.features, both.images, strict=True):
        assert torch.equal(features, vision.features(placed.image))
    assert chunk.sliding_spans is not None
    assert chunk.sliding_spans.tolist() == [[[first.start, first.end], [second.start, second.end]]]
    assert chunk.full_spans is None


# Prefixes -------------------------------------------------------------------------------------------------------------


def test_another_image_of_the_same_size_is_another_prefix(towers: list[int], lengths: list[int]) -> None:
    scheduler = dg.Scheduler(vision_model(), 1, CONTEXT, prefix_cache_bytes=ROOM)
    one, other = prompt_of("What?", WIDE), prompt_of("What?", TURNED)
    for prompt, cached, ran in ((one, 0, [60]), (other, 0, [60, 60]), (one, len(one), [60, 60])):
        request = scheduler.submit(prompt, 8, SAMPLER)
        while not scheduler.idle:
            scheduler.step()
        assert request.cached_tokens == cached
        assert towers == ran, "no image is computed twice, and none that the prefix cache has"


@pytest.mark.parametrize("shared", [1, 4])
def test_no_prefix_ends_within_an_image(shared: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images whose hashes begin alike, and with a snapshot that somebody has put there."""
    monkeypatch.setattr(prefix_cache, "_LEAST_SHARED", 2)
    one, other = prompt_of("What?", WIDE), prompt_of("What?", TURNED)
    for prompt in (one, other):
        image = copy.copy(prompt.images[0].image)
        digest = bytes(4 * shared) + image.digest[4 * shared :]
        object.__setattr__(image, "digest", digest)
        object.__setattr__(prompt.images[0], "image", image)
    start = one.images[0].start
    assert one.keys(512)[: start + shared] == other.keys(512)[: start + shared]
    wanted = [answers(dg.Scheduler(vision_model(), 1, CONTEXT), [prompt], [0])[0] for prompt in (one, other)]
    scheduler = dg.Scheduler(vision_model(), 1, CONTEXT, prefix_cache_bytes=ROOM)
    store = scheduler.prefix_cache
    assert store is not None
    lengths.clear()
    assert answers(scheduler, [one, other], [0, 0]) == wanted
    assert lengths == [len(one), 8, start, len(other) - start, 8], "the beginning that both share ends at the image"
    within = vision_model().new_cache(1, CONTEXT)
    vision_model().encode(torch.tensor([one.ids[: start + shared]]), within)
    store.clear()
    store.add(one.keys(512)[: start + shared], within.snapshot(0))
    assert answers(scheduler, [one], [0]) == wanted[:1]


def test_features_of_the_last_images_are_kept(towers: list[int]) -> None:
    vision = vision_model().vision
    assert vision is not None
    images = [PromptImage(gradient(48, 48 * rows)) for rows in range(1, KEPT_FEATURES + 2)]
    for image in images:
        assert torch.equal(vision.features(image), vision.features(image))
    assert len(towers) == len(images)
    vision.features(images[1])
    assert len(towers) == len(images)
    vision.features(images[0])
    assert len(towers) == len(images) + 1


# Chats ----------------------------------------------------------------------------------------------------------------


def test_turns_with_images(lengths: list[int], towers: list[int], tmp_path: Any) -> None:
    """Each answer is that of the whole conversation asked anew, though only what is new is encoded."""
    model, seen = vision_model(), []
    WIDE.save(tmp_path / "a.png")
    chat = model.chat(max_length=CONTEXT, image_tokens=70)
    turns: list[tuple[Any, list[Any] | None]] = [
        ("What is this?", [tmp_path / "a.png"]),
        ("And what now?", None),
        ([{"role": "user", "content": ["Compare it with ", {"type": "image", "image": SQUARE}]}], None),
    ]
    for seed, (turn, images) in enumerate(turns):
        lengths.clear()
        chat.send(turn, 12, SAMPLER, seed, images=images)
        seen.append((chat.token_ids, sum(lengths[:1])))
        (tmp_path / "a.png").unlink(missing_ok=True)
    assert towers == [60, 64], "an earlier turn's image is in the cache"
    for seed, (ids, encoded) in enumerate(seen):
        prompt = tokenize_prompt(chat.messages[: 2 * seed + 1], model, options=dg.PromptOptions(image_tokens=70))
        fresh = model.generate(prompt, 12, SAMPLER, seed)
        assert fresh.token_ids == ids
        assert encoded < len(prompt) or seed == 0
    assert towers == [60, 64], "nor is one whose features are kept computed again"
    assert (
        pickle.loads(pickle.dumps(chat.messages))[0]["content"][0]["image"].digest
        == PromptImage(chat.messages[0]["content"][0]["image"].pixels).digest
    )


def test_images_of_a_turn_that_is_no_text() -> None:
    chat = vision_model().chat()
    with pytest.raises(ValueError, match="images are given, and turn is no text"):
        chat.send([{"role": "user", "content": "a"}], images=[WIDE])
    with pytest.raises(ValueError, match=r"messages\[0\]\['content'\]\[0\] is no image"):
        chat.send("a", images=[b""])
    assert chat.messages == []


# Failures -------------------------------------------------------------------------------------------------------------


def test_an_image_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: VisionTower, image: Patches) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room for an image")

    wanted = alone(1)
    vision = vision_model().vision
    assert vision is not None
    vision._features.clear()
    monkeypatch.setattr(VisionTower, "features", no_memory)
    scheduler = dg.Scheduler(vision_model(), 2, CONTEXT, batched=True)
    bad, good = (scheduler.submit(prompts()[index], 12, SAMPLER, index) for index in (0, 1))
    steps: Steps = []
    while not scheduler.idle:
        events = scheduler.step()
        steps += [(e.token_ids, e.entropy.numpy().tobytes()) for e in events if isinstance(e, dg.Draft)]
    assert (bad.state, good.state) == (dg.RequestState.FAILED, dg.RequestState.FINISHED)
    with pytest.raises(RuntimeError, match="no room for an image"):
        _ = bad.output
    assert steps == wanted
    assert scheduler.free_slots == 2


def test_a_prompt_that_is_refused_leaves_nothing_behind() -> None:
    scheduler = dg.Scheduler(vision_model(), 1, 100)
    with pytest.raises(ValueError, match=r"images\[1\] is no image"):
        scheduler.submit("a", 8, images=[WIDE, b"no image"], image_tokens=70)
    with pytest.raises(ValueError, match=r"prompt of 142 tokens .* needs 150 positions in the cache"):
        scheduler.submit("a", 12, images=[WIDE, SQUARE], image_tokens=70)
    assert scheduler.idle
    assert scheduler.submit("a", 8).number == 0


def test_a_copy_of_a_model_sees_the_same() -> None:
    for copied in (copy.deepcopy(vision_model()), pickle.loads(pickle.dumps(vision_model()))):
        assert copied.vision is not None
        assert copied.generate(prompts()[0], 8, SAMPLER) == vision_model().generate(prompts()[0], 8, SAMPLER)
