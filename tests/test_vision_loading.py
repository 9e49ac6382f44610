"""The vision tower from a checkpoint's files: all of it or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgemma_ext as dg
import dgemma_ext.diffusion_gemma as facade
from checkpoints import make_checkpoint
from dgemma_ext import CheckpointError
from dgemma_ext.checkpoint import ModelConfig, convert, inspect_checkpoint, parse_target
from dgemma_ext.cli import main
from dgemma_ext.model.vision import VisionTower, load_tower, patches_of
from pictures import gradient

LAYER = "model.encoder.vision_tower.encoder.layers.1."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vision"), layers=1, with_tokenizer=False)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> VisionTower | None:
    config = ModelConfig.from_file(folder)
    return load_tower(inspect_checkpoint(folder, config), config, dtype, "cpu")


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any], **vision: Any) -> Path:
    """A copy of the checkpoint with other tensors, or other fields of vision_config."""
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= vision
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def without_tower(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision.")):
            del tensors[name]


def test_every_tensor_is_the_stored_one(folder: Path) -> None:
    tower = load(folder)
    assert tower is not None
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tower.layers[1].up, tensors[f"{LAYER}mlp.up_proj.linear.weight"])
    assert torch.equal(tower.layers[1].query_norm, tensors[f"{LAYER}self_attn.q_norm.weight"])
    assert torch.equal(tower.projection, tensors["model.encoder.embed_vision.embedding_projection.weight"])
    patches = patches_of(gradient(97, 61), 70)
    reference = VisionTower.from_tensors(tower.config, tensors)
    assert torch.equal(tower.features(patches), reference.features(patches))


def test_a_tower_in_float16_is_converted(folder: Path, tmp_path: Path) -> None:
    def to_half(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith("model.encoder.") and "layer_scalar" not in name:
                tensors[name] = tensors[name].half()

    tower = load(changed(folder, tmp_path, to_half))
    original = load(folder)
    assert tower is not None
    assert original is not None
    assert tower.projection.dtype == torch.bfloat16
    assert torch.equal(tower.projection, original.projection)


@pytest.mark.parametrize("vision", [True, False])
def test_a_checkpoint_without_a_tower_has_none(folder: Path, tmp_path: Path, vision: bool) -> None:
    changed(folder, tmp_path, without_tower)
    if not vision:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": None}))
    assert load(tmp_path) is None


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "missing": (
        lambda tensors: tensors.pop(f"{LAYER}self_attn.q_norm.weight"),
        {},
        r"q_norm\.weight: is missing, and other tensors",
    ),
    "extra": (
        lambda tensors: tensors.update({f"{LAYER}mlp.gate_proj.input_max": torch.ones(1)}),
        {},
        r"gate_proj\.input_max: is not part of the vision tower",
    ),
    "misshapen": (
        lambda tensors: tensors.update({f"{LAYER}self_attn.q_norm.weight": torch.ones(3)}),
        {},
        r"q_norm\.weight: .*\[3\]",
    ),
    "not finite": (
        lambda tensors: tensors[f"{LAYER}self_attn.q_norm.weight"].fill_(float("nan")),
        {},
        r"q_norm\.weight: has nan at \[0\]",
    ),
    "another tower": (lambda tensors: None, {"use_clipped_linears": True}, "vision_config.use_clipped_linears is True"),
}


@pytest.mark.parametrize("what", WRONG)
def test_half_a_tower_is_refused_by_name(folder: Path, tmp_path: Path, what: str) -> None:
    change, vision, message = WRONG[what]
    changed(folder, tmp_path, change, **vision)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# With the rest of a model ---------------------------------------------------------------------------------------------


def loaded(folder: Path, **options: Any) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(folder, device="cpu", **options)


def test_a_model_is_loaded_with_its_tower_or_without(folder: Path, tmp_path: Path) -> None:
    for images, attention in (("auto", "sliding"), (True, "all")):
        model = loaded(folder, images=images, image_attention=attention)
        assert model.vision is not None
        assert model.vision.tower.projection.dtype == model.dtype
        assert model.vision.soft_tokens == 280
        assert model.network.options.image_attention == attention
    assert loaded(folder, images=False).vision is None
    bare = changed(folder, tmp_path, without_tower)
    assert loaded(bare).vision is None
    with pytest.raises(CheckpointError, match="images is True, and the checkpoint has no vision tower"):
        loaded(bare, images=True)
    for images in ("on", 2, None):
        with pytest.raises(ValueError, match="images must be auto, True or False, got"):
            loaded(folder, images=images)
    with pytest.raises(ValueError, match="image_attention must be one of sliding, all, got 'full'"):
        loaded(folder, image_attention="full")


def test_info_says_what_becomes_of_the_tower(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^vision +2 layers of hidden 32, [0-9]+ tensors, .*; an image takes up to 280 tokens$", out, re.MULTILINE
    )
    changed(folder, tmp_path, lambda tensors: None, use_clipped_linears=True)
    assert main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^vision +cannot be loaded: vision_config.use_clipped_linears is True", shown, re.MULTILINE)
    assert "vision weights" not in shown


def test_the_checkpoint_says_how_many_tokens_an_image_takes(folder: Path, tmp_path: Path) -> None:
    changed(folder, tmp_path, lambda tensors: None)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 140}}')
    model = loaded(tmp_path)
    assert model.vision is not None
    assert model.vision.read("a", Image.fromarray(gradient(97, 61))).soft_tokens == 126


@pytest.mark.parametrize("what", [*WRONG, "a processor"])
def test_a_model_with_half_a_tower_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for values that are not finite, which are found while they are read; without its images it is loaded."""
    change, vision, message = WRONG.get(what, (lambda tensors: None, {}, "do_normalize is True"))
    changed(folder, tmp_path, change, **vision)
    if what == "a processor":
        (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    loads: list[object] = []
    load = facade.load_weights
    monkeypatch.setattr(facade, "load_weights", lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(tmp_path)
    if what not in ("not finite", "a processor"):
        assert "images=False loads the model without its vision tower" in str(caught.value)
    assert len(loads) == (what == "not finite")
    assert loaded(tmp_path, images=False).vision is None


def test_an_unquantized_tower_stays_beside_quantized_weights(folder: Path, tmp_path: Path) -> None:
    plain = load(folder)
    convert(folder, tmp_path / "out", parse_target("int4"))
    for model in (loaded(tmp_path / "out"), loaded(folder, weights="int4")):
        assert model.vision is not None
        assert plain is not None
        assert torch.equal(model.vision.tower.layers[1].up, plain.layers[1].up)
