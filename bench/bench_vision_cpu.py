"""The vision tower beside transformers' on the CPU: two layers of true width, one thread, by turns in one process.

    python bench/bench_vision_cpu.py              # a minute on an idle core, 1 GB of memory

Hidden 1152, 16 heads of 72, MLP 4304, random bf16 weights, an image of 280 soft tokens (2,520 patches) with the entry,
the pooling and the projector. transformers runs with its defaults (sdpa). Times are processor seconds, which other
work on the machine changes little; the ratio is the median of each round's. Prints how many features differ as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgemma_ext.checkpoint.vision_config import VisionConfig, vision_tensors
from dgemma_ext.model.vision import Patches, PromptImage, VisionTower

TEXT_HIDDEN = 2816
FIELDS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "position_embedding_size": 10_240,
    "standardize": True,
    "rms_norm_eps": 1e-6,
}


def random_weights(config: VisionConfig) -> dict[str, Tensor]:
    """Matrices that keep the variance of what they multiply, and norms around 1."""
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (1 + values / 5 if len(shape) == 1 else values * shape[-1] ** -0.5).to(torch.bfloat16)

    return {name: made(shape) for name, shape in vision_tensors(config, TEXT_HIDDEN).items()}


def transformers_features(weights: dict[str, Tensor]) -> Callable[[Patches], Tensor]:
    """transformers' tower and projector with these weights."""
    from transformers import Gemma4VisionConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    config = Gemma4VisionConfig(**FIELDS)
    config._attn_implementation = "sdpa"
    tower: Any = Gemma4VisionModel(config).eval()
    text = type("Text", (), {"hidden_size": TEXT_HIDDEN})()
    projector: Any = DiffusionGemmaMultimodalEmbedder(config, text).eval()
    frequencies = tower.encoder.rotary_emb.inv_freq.clone()
    for prefix, module in (("vision_tower", tower), ("embed_vision", projector)):
        module.to(torch.bfloat16)
        names = module.state_dict()
        module.load_state_dict({name: weights[f"model.encoder.{prefix}.{name}"] for name in names})
    tower.encoder.rotary_emb.inv_freq = frequencies  # from_pretrained keeps them in float32

    @torch.no_grad()
    def features(image: Patches) -> Tensor:
        found = tower(pixel_values=image.pixels[None], pixel_position_ids=image.positions[None]).last_hidden_state
        projected: Tensor = projector(inputs_embeds=found).reshape(-1, TEXT_HIDDEN)
        return projected

    return features


def measure(rounds: int) -> dict[str, Any]:
    config = VisionConfig.from_dict(FIELDS)
    weights = random_weights(config)
    image = PromptImage(np.random.default_rng(0).integers(0, 256, (672, 960, 3), np.uint8)).patches
    sides = {"ours": VisionTower.from_tensors(config, weights).features, "theirs": transformers_features(weights)}
    found = {name: side(image) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.process_time()
            side(image)
            seconds[name].append(time.process_time() - began)
    differ = (found["ours"].float() - found["theirs"].float()).abs()
    return {
        "soft_tokens": image.soft_tokens,
        "rounds": rounds,
        "ours": statistics.median(seconds["ours"]),
        "transformers": statistics.median(seconds["theirs"]),
        "ratio": statistics.median(a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)),
        "features": differ.numel(),
        "features_that_differ": int(differ.count_nonzero()),
        "largest_difference": float(differ.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds)
    print(
        f"{result['soft_tokens']} soft tokens, 2 layers: {result['ours']:.2f} processor seconds, transformers "
        f"{result['transformers']:.2f}; {result['ratio']:.2f} of its time, median of {result['rounds']} rounds; "
        f"{result['features_that_differ']:,} of {result['features']:,} features differ, by "
        f"{result['largest_difference']:.2g} at most"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
