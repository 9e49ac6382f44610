"""Prompts with images: the encode pass beside transformers' generate, and beside masks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import dgemma_ext as dg
import transformers_oracle as oracle
from checkpoints import FULL, SLIDING, make_checkpoint
from dgemma_ext.engine import tokenize_prompt
from dgemma_ext.model.vision import Patches, patches_of
from dgemma_ext.ops.block_attention import causal_attention
from pictures import gradient
from test_parity_forward import assert_same_cache, assert_within
from tokenizer_files import IMAGE_TOKENS

BEGIN, IMAGE, END = (IMAGE_TOKENS[text] for text in ("<|image>", "<|image|>", "<image|>"))
SOFT_TOKENS = 70
WINDOW = 16
# Largest difference in float32, as a share of the largest magnitude.
BOUND = 1e-5
# Where the images stand among the text: sizes, or a number of text tokens.
PROMPTS: dict[str, list[tuple[int, int] | int]] = {
    "one": [5, (48, 48), 6],
    "first": [(60, 30), 7],
    "last": [5, (60, 30)],
    "two, apart": [4, (48, 48), 3, (60, 30), 5],
    "two, side by side": [4, (90, 60), (60, 30), 5],
    "text": [9],
}


@dataclass
class Prompt:
    ids: Tensor
    images: list[Patches]
    starts: list[int]

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(start, start + image.soft_tokens) for start, image in zip(self.starts, self.images, strict=True)]


def make_prompt(parts: list[tuple[int, int] | int]) -> Prompt:
    ids, images, starts = [2], [], []
    generator = torch.Generator().manual_seed(3)
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(10, 200, (part,), generator=generator).tolist()
            continue
        images.append(patches_of(gradient(*part), SOFT_TOKENS))
        ids.append(BEGIN)
        starts.append(len(ids))
        ids += [IMAGE] * images[-1].soft_tokens + [END]
    return Prompt(torch.tensor([ids]), images, starts)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> oracle.Pair:
    """A model in float32 whose window is shorter than an image, with a full layer whose output is read."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("images"),
        layers=(SLIDING, FULL, SLIDING, FULL),
        dtype=torch.float32,
        window=WINDOW,
        vocabulary=512,
        images=True,
    )
    return oracle.load_pair(folder, torch.float32)


def placed(pair: oracle.Pair, prompt: Prompt) -> list[tuple[int, Tensor]]:
    assert pair.ours.vision is not None
    features = pair.ours.vision.tower.features
    return [(start, features(image)) for start, image in zip(prompt.starts, prompt.images, strict=True)]


@contextmanager
def rule(pair: oracle.Pair, image_attention: str) -> Iterator[None]:
    network = pair.ours.network
    options, network.options = network.options, replace(network.options, image_attention=image_attention)
    try:
        yield
    finally:
        network.options = options


def encoded(pair: oracle.Pair, prompt: Prompt, image_attention: str, chunk: int = 4096, **changes: Any) -> dg.Cache:
    with rule(pair, image_attention):
        cache = pair.ours.new_cache(1, prompt.ids.shape[1])
        pair.ours.encode(prompt.ids, cache, chunk=chunk, **{"images": [placed(pair, prompt)], **changes})
    return cache


def their_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """The tensors of transformers' processor, which pads patches."""
    room = 9 * SOFT_TOKENS
    pixels = torch.zeros(len(prompt.images), room, 768)
    positions = torch.full((len(prompt.images), room, 2), -1)
    for row, image in enumerate(prompt.images):
        pixels[row, : len(image.pixels)], positions[row, : len(image.pixels)] = image.pixels, image.positions
    kinds = (prompt.ids == IMAGE).long()
    return {"pixel_values": pixels, "image_position_ids": positions, "mm_token_type_ids": kinds}


@pytest.fixture(scope="module")
def by_generate(pair: oracle.Pair) -> Callable[[str], Any]:
    """transformers' cache of a prompt, by its name."""

    @cache
    @torch.no_grad()
    def made(name: str) -> Any:
        prompt = make_prompt(PROMPTS[name])
        torch.manual_seed(0)
        length = pair.ours.config.canvas_length
        few = {"max_new_tokens": length, "max_denoising_steps": 1, "return_dict_in_generate": True}
        inputs = their_inputs(prompt) if prompt.images else {}
        return pair.theirs.generate(prompt.ids, **inputs, **few).past_key_values

    return made


# In "one" the image is at positions 7 to 70: a chunk ends at its begin, inside, at its end, and behind that.
CHUNKS = [*((name, 4096) for name in PROMPTS), ("two, side by side", 7), *(("one", n) for n in (7, 8, 64, 71, 72))]


@pytest.mark.parametrize(("name", "chunk"), CHUNKS)
def test_cache_and_logits_are_those_of_transformers(
    pair: oracle.Pair, by_generate: Callable[[str], Any], name: str, chunk: int
) -> None:
    """With image_attention "all", which is transformers' rule, whole and in chunks that would cut an image."""
    prompt, theirs = make_prompt(PROMPTS[name]), by_generate(name)
    ours = encoded(pair, prompt, "all", chunk)
    assert_same_cache(pair, ours, 0, theirs, BOUND)
    if chunk == 4096:
        canvas = torch.randint(0, 200, (1, pair.ours.config.canvas_length), generator=torch.Generator().manual_seed(5))
        assert_within(pair.ours.denoise(canvas, ours), oracle.denoise(pair.theirs, canvas, theirs), "logits", BOUND)


def test_rows_of_a_batch_and_turns_are_those_of_transformers(
    pair: oracle.Pair, by_generate: Callable[[str], Any]
) -> None:
    """Prompts with one, two and no images in one call, and a prompt in three turns, the images in two of them."""
    prompts = [make_prompt(PROMPTS[name]) for name in ("one", "text", "two, apart")]
    lengths = [prompt.ids.shape[1] for prompt in prompts]
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt.ids[0]
    batch, turns = pair.ours.new_cache(3, max(lengths)), pair.ours.new_cache(1, max(lengths))
    images = [placed(pair, prompt) for prompt in prompts]
    apart, (first, second) = prompts[2], images[2]
    with rule(pair, "all"):
        pair.ours.encode(ids, batch, lengths=lengths, images=images)
        # Behind the first image; behind the text after it; the second image and the rest.
        begins = [0, first[0] + len(first[1]) + 1, second[0] - 1, lengths[2]]
        for (begin, end), of_turn in zip(pairwise(begins), ([first], [], [second]), strict=True):
            pair.ours.encode(apart.ids[:, begin:end], turns, images=[of_turn])
    for row, name in enumerate(("one", "text", "two, apart")):
        assert_same_cache(pair, batch, row, by_generate(name), BOUND)
    assert_same_cache(pair, turns, 0, by_generate("two, apart"), BOUND)


def test_an_answer_is_that_of_transformers(pair: oracle.Pair) -> None:
    """From a Pillow image to the tokens of two canvases."""
    model, picture = pair.ours, Image.fromarray(gradient(60, 30))
    prompt = tokenize_prompt("What?", model, options=dg.PromptOptions(image_tokens=SOFT_TOKENS), images=[picture])
    start, patches = prompt.images[0].start, patches_of(gradient(60, 30), SOFT_TOKENS)
    ids = Prompt(torch.tensor([prompt.ids]), [patches], [start])
    settings, length = oracle.Settings(max_denoising_steps=4), 2 * model.config.canvas_length
    theirs = oracle.generate(pair.theirs, prompt.ids, length, settings, 38, inputs=their_inputs(ids))
    with rule(pair, "all"):
        ours = oracle.generate_ours(model, prompt, length, settings, 38)
        otherwise = oracle.generate_ours(model, prompt.ids, length, settings, 38)
    assert theirs.well_conditioned
    assert ours.outcome == theirs.outcome
    assert otherwise.outcome != theirs.outcome, "the image changes nothing here"


def test_features_stand_where_the_image_is_and_nowhere_else(pair: oracle.Pair) -> None:
    """Another token may have the id of an image's soft tokens: canvases have any ids."""
    prompt = make_prompt(PROMPTS["one"])
    prompt.ids[0, -2] = IMAGE
    found, plain = encoded(pair, prompt, "all"), encoded(pair, prompt, "all", images=None)
    last = prompt.ids.shape[1] - 2
    for position, same in ((last, True), (prompt.spans[0][1] - 1, False)):
        ours, without = (oracle.cached_ours(one, 0, 0, range(position, position + 1))[0] for one in (found, plain))
        assert torch.equal(ours, without) == same


@pytest.mark.parametrize(
    ("image_attention", "pairs"), [("sliding", (575, 820)), ("all", (575, 1025)), (None, (292, 820))]
)
def test_how_many_pairs_see_each_other(pair: oracle.Pair, image_attention: str | None, pairs: tuple[int, int]) -> None:
    """On a sliding layer with a window of 8, and on a full one: 40 tokens, images at [3, 9) and [12, 32).

    Every visible value counts alike, and has a dimension of its own.
    """
    tokens = 40
    images = [(3, torch.zeros(6, 64)), (12, torch.zeros(20, 64))] if image_attention else []
    with rule(pair, image_attention or "all"):
        chunk = pair.ours.network.prefill_chunk(0, torch.zeros(tokens, dtype=torch.long), 0, images)
    query = key = torch.zeros(1, tokens, 1, tokens)
    value, nothing = torch.eye(tokens)[None, :, None], torch.zeros(1, 8, 1, tokens)
    where = torch.zeros(1, dtype=torch.int32)
    for spans, window, wanted in zip((chunk.sliding_spans, chunk.full_spans), (8, 0), pairs, strict=True):
        attended = causal_attention(query, key, value, nothing, nothing, where, where, spans=spans, window=window)
        assert int((attended > 0).sum()) == wanted


def test_an_image_is_seen_whole_on_sliding_layers_alone(pair: oracle.Pair) -> None:
    """By default. The rules part in the output of the second layer, which is a full one."""
    prompt = make_prompt(PROMPTS["one"])
    everywhere, sliding = encoded(pair, prompt, "all"), encoded(pair, prompt, "sliding")
    causal = encoded(pair, prompt, "sliding", images=None)
    for layer in (0, 1):
        assert torch.equal(everywhere.keys[layer], sliding.keys[layer])
    assert float((everywhere.keys[2] - sliding.keys[2]).abs().max()) > 0.01
    assert float((causal.keys[1] - sliding.keys[1]).abs().max()) > 0.01


def test_full_layers_are_causal_by_default(pair: oracle.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with its mask of full layers replaced by a causal one."""
    prompt = make_prompt(PROMPTS["two, apart"])
    create = type(pair.theirs.model.encoder).create_masks_for_generate

    def sliding_only(*arguments: Any, **keywords: Any) -> Any:
        masks = create(*arguments, **keywords)
        causal = create(*arguments, **{**keywords, "mm_token_type_ids": None})
        return {**masks, "full_attention": causal["full_attention"]}

    monkeypatch.setattr(pair.theirs.model.encoder, "create_masks_for_generate", sliding_only, raising=False)
    rows = placed(pair, prompt)
    theirs_embedding = pair.theirs.model.encoder.get_input_embeddings()
    plain = theirs_embedding.forward

    def with_features(ids: Tensor) -> Tensor:
        hidden = plain(ids)
        for start, features in rows:
            hidden[0, start : start + len(features)] = features
        return hidden

    monkeypatch.setattr(theirs_embedding, "forward", with_features)
    theirs = oracle.encode(pair.theirs, prompt.ids, spans=prompt.spans)
    assert_same_cache(pair, encoded(pair, prompt, "sliding"), 0, theirs)


BAD: dict[str, tuple[Any, str]] = {
    "for too many rows": ([[], []], "images must have 1 entries"),
    "of another width": ([[(2, torch.zeros(3, 5))]], r"images must be \(position, features\)"),
    "without rows": ([[(2, torch.zeros(0, 64))]], r"images must be \(position, features\)"),
    "no tensor": ([[(2, [[0.0] * 64])]], r"images must be \(position, features\)"),
    "beyond the end": ([[(8, torch.zeros(3, 64))]], r"images must lie apart in \[0, 10\), where .* got \[8, 11\)"),
    "on top of each other": (
        [[(4, torch.zeros(3, 64)), (2, torch.zeros(3, 64))]],
        r"images must lie apart in \[0, 10\), where .* got \[2, 5\), \[4, 7\)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_images_that_do_not_fit(pair: oracle.Pair, what: str) -> None:
    images, message = BAD[what]
    cache = pair.ours.new_cache(1, 16)
    with pytest.raises(ValueError, match=message):
        pair.ours.network.encode(torch.full((1, 10), 5), cache, images=images)
    assert cache.length(0) == 0


def test_another_rule_of_images_is_refused(pair: oracle.Pair) -> None:
    network = pair.ours.network
    with pytest.raises(ValueError, match="image_attention must be one of sliding, all, got 'full'"):
        type(network)(network.config, network.weights, image_attention="full")
