"""Prompts with images: the encode pass beside transformers' generate, and beside masks written by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
import transformers_oracle as oracle
from checkpoints import FULL, SLIDING, make_checkpoint
from dgemma_ext.checkpoint import inspect_checkpoint
from dgemma_ext.model.vision import Patches, load_tower, patches_of
from pictures import gradient
from test_parity_forward import assert_same_cache

IMAGE, BEGIN, END = 300, 301, 302
SOFT_TOKENS = 70
WINDOW = 16
# Where the images stand among the text: sizes, or a number of text tokens.
PROMPTS: dict[str, list[tuple[int, int] | int]] = {
    "one": [5, (48, 48), 6],
    "first": [(60, 30), 7],
    "last": [5, (60, 30)],
    "two, apart": [4, (48, 48), 3, (60, 30), 5],
    "two, side by side": [4, (90, 60), (60, 30), 5],
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
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END}
    (folder / "config.json").write_text(json.dumps(config))
    return oracle.load_pair(folder, torch.float32)


def placed(pair: oracle.Pair, prompt: Prompt) -> list[tuple[int, Tensor]]:
    config = pair.ours.config
    tower = load_tower(inspect_checkpoint(pair.directory, config), config, torch.float32, "cpu")
    assert tower is not None
    return [(start, tower.features(image)) for start, image in zip(prompt.starts, prompt.images, strict=True)]


def encoded(pair: oracle.Pair, prompt: Prompt, image_attention: str, chunk: int = 4096, **changes: Any) -> dg.Cache:
    network = pair.ours.network
    options, network.options = network.options, replace(network.options, image_attention=image_attention)
    try:
        cache = pair.ours.new_cache(1, prompt.ids.shape[1])
        network.encode(prompt.ids, cache, chunk=chunk, **{"images": [placed(pair, prompt)], **changes})
    finally:
        network.options = options
    return cache


@torch.no_grad()
def by_generate(pair: oracle.Pair, prompt: Prompt) -> Any:
    """transformers' cache of the prompt, from its processor's tensors, which are padded."""
    room = 9 * SOFT_TOKENS
    pixels = torch.zeros(len(prompt.images), room, 768)
    positions = torch.full((len(prompt.images), room, 2), -1)
    for row, image in enumerate(prompt.images):
        pixels[row, : len(image.pixels)], positions[row, : len(image.pixels)] = image.pixels, image.positions
    torch.manual_seed(0)
    out = pair.theirs.generate(
        prompt.ids,
        pixel_values=pixels,
        image_position_ids=positions,
        mm_token_type_ids=(prompt.ids == IMAGE).long(),
        max_new_tokens=pair.ours.config.canvas_length,
        max_denoising_steps=1,
        return_dict_in_generate=True,
    )
    return out.past_key_values


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("name", PROMPTS)
def test_the_cache_is_that_of_transformers(pair: oracle.Pair, name: str, chunk: int) -> None:
    """With image_attention "all", which is transformers' rule, whole and in chunks that would cut an image."""
    prompt = make_prompt(PROMPTS[name])
    assert_same_cache(pair, encoded(pair, prompt, "all", chunk), 0, by_generate(pair, prompt))


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
