"""The vision tower beside transformers' modules, whose bits it has, and beside values that were noted."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma_ext.checkpoint.vision_config import VisionConfig, vision_tensors
from dgemma_ext.model.vision import VisionTower, patches_of
from dgemma_ext.profile.tower import tower_work
from pictures import gradient

TEXT_HIDDEN = 48
# Fields of config.json; two layers of a small tower.
SMALL: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 128,
    "standardize": True,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "use_clipped_linears": False,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}

# What the published checkpoint has otherwise.
PUBLISHED: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "position_embedding_size": 10_240,
    "standardize": True,
}


def by_formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32; entry i is a hash of i and of the name's CRC, made uniform in [-1, 1), scaled by the kind of tensor."""
    low = 0xFFFFFFFF
    bits = (torch.arange(torch.Size(shape).numel()) * 2654435761 + zlib.crc32(name.encode())) & low
    bits = ((bits ^ bits >> 16) * 2246822519) & low
    value = ((bits ^ bits >> 13).double() / 2**31 - 1).float().view(shape)
    if name.endswith("position_embedding_table"):
        return value / 2
    if name.endswith("std_bias"):
        return value
    return 1 + value / 4 if len(shape) == 1 else value * (3.0 / shape[-1]) ** 0.5


def tensors_of(config: VisionConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = vision_tensors(config, TEXT_HIDDEN)
    return {name: by_formula(name.removeprefix("model.encoder."), shape).to(dtype) for name, shape in shapes.items()}


def small_tower(dtype: torch.dtype = torch.float32, **changes: Any) -> VisionTower:
    config = VisionConfig.from_dict({**SMALL, **changes})
    return VisionTower.from_tensors(config, tensors_of(config, dtype))


# Soft tokens → the sum of all features, of their squares, the first features of the first row, those of the last;
# transformers 5.23 in float32.
NOTED = {
    70: (1.81310, 2764.7238, [0.72612, -0.93665, -0.59744, -1.04543], [-0.25820, -1.55120, 0.91218, 1.02708]),
    280: (884.55301, 12539.3284, [-1.04556, 0.45935, -0.96097, -0.63158], None),
}


@pytest.mark.parametrize("soft_tokens", NOTED)
def test_features_are_those_that_were_noted(soft_tokens: int) -> None:
    total, squares, first, last = NOTED[soft_tokens]
    found = small_tower().features(patches_of(gradient(97, 61), soft_tokens))
    assert found.double().sum().item() == pytest.approx(total, abs=5e-3)
    assert found.double().square().sum().item() == pytest.approx(squares, rel=1e-6)
    assert found[0, :4].tolist() == pytest.approx(first, abs=1e-4)
    if last is not None:
        assert found[-1, :4].tolist() == pytest.approx(last, abs=1e-4)


def transformers_tower(dtype: torch.dtype, **changes: Any) -> Any:
    """transformers' modules with the same weights, as a function of pixels and positions."""
    gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    diffusion_gemma = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    from transformers import Gemma4VisionConfig

    config = Gemma4VisionConfig(**{**SMALL, **changes})
    config._attn_implementation = "sdpa"
    tower = gemma4.Gemma4VisionModel(config).eval()
    projector = diffusion_gemma.DiffusionGemmaMultimodalEmbedder(
        config, type("Text", (), {"hidden_size": TEXT_HIDDEN})()
    ).eval()
    weights = tensors_of(VisionConfig.from_dict({**SMALL, **changes}), dtype)
    frequencies = tower.encoder.rotary_emb.inv_freq.clone()
    for prefix, module in (("vision_tower.", tower), ("embed_vision.", projector)):
        module.to(dtype)
        names = module.state_dict().keys()
        module.load_state_dict({name: weights[f"model.encoder.{prefix}{name}"] for name in names})
    tower.encoder.rotary_emb.inv_freq = frequencies  # from_pretrained keeps them in float32

    @torch.no_grad()
    def features(pixels: Tensor, positions: Tensor) -> Tensor:
        found = tower(pixel_values=pixels[None], pixel_position_ids=positions[None]).last_hidden_state
        return projector(inputs_embeds=found).reshape(-1, TEXT_HIDDEN)

    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(97, 61), (61, 97), (48, 3360), (300, 300)], ids=str)
def test_features_are_those_of_transformers_to_the_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    patches = patches_of(gradient(*size), 70)
    changes = {"position_embedding_size": 256}
    found = small_tower(dtype, **changes).features(patches)
    assert found.shape == (patches.soft_tokens, TEXT_HIDDEN)
    assert torch.equal(found, transformers_tower(dtype, **changes)(patches.pixels, patches.positions))


def test_the_published_width_in_bfloat16() -> None:
    """Heads of 72, and sums so long that another order of adding them would show."""
    changes = {"hidden_size": 1152, "intermediate_size": 4304, "head_dim": 72, "num_hidden_layers": 1}
    changes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 16)
    patches = patches_of(gradient(97, 61), 70)
    found = small_tower(torch.bfloat16, **changes).features(patches)
    assert torch.equal(found, transformers_tower(torch.bfloat16, **changes)(patches.pixels, patches.positions))


def test_without_standardising() -> None:
    changes = {"standardize": False}
    patches = patches_of(gradient(97, 61), 70)
    found = small_tower(**changes).features(patches)
    assert torch.equal(found, transformers_tower(torch.float32, **changes)(patches.pixels, patches.positions))


def test_an_image_longer_than_the_table_of_positions() -> None:
    with pytest.raises(ValueError, match="the image has 210 patches in a line, and the model's vision tower has 128"):
        small_tower().features(patches_of(gradient(3000, 10), 70))


def test_the_work_of_the_published_tower() -> None:
    """2.75 TFLOP of products and 0.79 of attention for 280 soft tokens, and 1.1 GB of weights."""
    config = VisionConfig.from_dict({**SMALL, **PUBLISHED})
    with torch.device("meta"):
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in vision_tensors(config, 2816).items()
        }
    moved, flops = tower_work(VisionTower.from_tensors(config, tensors), 280)
    assert flops == pytest.approx(3.55e12, rel=3e-3)
    assert moved == pytest.approx(1.10e9, rel=3e-3)


def test_the_published_tower_has_356_tensors_of_1_1_gb() -> None:
    shapes = vision_tensors(VisionConfig.from_dict({**SMALL, **PUBLISHED}), 2816)
    assert len(shapes) == 356
    assert sum(2 * torch.Size(shape).numel() for shape in shapes.values()) == 1_145_588_832


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
        {"rope_parameters": None},
        {"rope_parameters": None, "rope_theta": 100},
    ],
    ids=str,
)
def test_every_spelling_of_the_rotation_means_the_same(rope: dict[str, Any]) -> None:
    assert VisionConfig.from_dict({**SMALL, **rope}) == VisionConfig.from_dict(SMALL)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "clipped": ({"use_clipped_linears": True}, "vision_config.use_clipped_linears is True"),
    "key heads": ({"num_key_value_heads": 1}, "vision_config.num_key_value_heads is 1; supported: num_attention_heads"),
    "no head_dim": ({"head_dim": None}, "vision_config.head_dim is None"),
    "odd head_dim": ({"head_dim": 30}, "vision_config.head_dim is 30; supported: a multiple of 4"),
    "rotation": ({"rope_parameters": {"rope_type": "yarn"}}, "vision_config.rope_parameters.rope_type is 'yarn'"),
    "patches": ({"patch_size": 14}, "vision_config.patch_size is 14; supported: 16"),
    "cells": ({"pooling_kernel_size": 2}, "vision_config.pooling_kernel_size is 2"),
    "activation": ({"hidden_activation": "gelu"}, "vision_config.hidden_activation is 'gelu'"),
    "bias": ({"attention_bias": True}, "vision_config.attention_bias is True"),
    "another model": ({"model_type": "siglip"}, "vision_config.model_type is 'siglip'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_towers_of_another_kind_are_refused_by_name(what: str) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_dict({**SMALL, **changes})


def test_a_head_dim_that_is_left_out_is_missing() -> None:
    """transformers takes 64 then, whatever the hidden size is."""
    with pytest.raises(ValueError, match=r"vision_config\.head_dim is missing"):
        VisionConfig.from_dict({name: value for name, value in SMALL.items() if name != "head_dim"})
