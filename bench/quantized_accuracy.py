"""The effect of quantized weights on the logits of a denoising pass, against the same checkpoint unquantized.

    python bench/quantized_accuracy.py                 # the bundled model, and a random one at true width (5 GB)
    python bench/quantized_accuracy.py FOLDER ...      # checkpoints

For each format: the cosine between the logits (fp32, soft-capped, of all positions together), the share of positions
whose largest logit is at the same token, and the mean over positions of KL(unquantized || quantized) in nats. int4
quantizes experts and attention, nvfp4 only experts, fp8 the dense MLP too: the usual parts of each. The canvas is
noise, after a prompt of 128 random tokens (or as many as the checkpoint's context has room for).

With random weights the share means little: their largest logits are close together, and nothing was learnt that
rounding could keep. The solve rate of a trained model (examples/sudoku/evaluate.py --weights) says more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from bench_step_cpu import FLATTENING, ROOT, write_checkpoint

import dgemma_ext as dg
import dgemma_ext.demo

# Formats of weights, and the format that the experts' inputs are rounded to.
FORMATS = (("fp8", None), ("fp8", "fp8"), ("int4", None), ("int4-64", None), ("int4-128", None), ("nvfp4", None))
PROMPT_TOKENS = 128


@torch.inference_mode()
def logits_of(folder: Path, weights: str, activations: str | None = None) -> torch.Tensor:
    """The logits, fp32 [L, V], of one pass over a canvas of noise."""
    model = dg.DiffusionGemma.from_pretrained(
        folder, device="cpu", dtype="bfloat16", weights=weights, activations=activations
    )
    config = model.config
    generator = torch.Generator().manual_seed(0)
    prompt = min(PROMPT_TOKENS, config.max_position_embeddings - config.canvas_length)
    ids = torch.randint(0, config.vocab_size, (1, prompt), generator=generator)
    canvas = torch.randint(0, config.vocab_size, (1, config.canvas_length), generator=generator)
    cache = model.new_cache(1, prompt)
    model.encode(ids, cache)
    return model.denoise(canvas, cache)[0]


def compare(plain: torch.Tensor, quantized: torch.Tensor) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(plain.flatten(), quantized.flatten(), dim=0)
    top = (plain.argmax(-1) == quantized.argmax(-1)).float().mean()
    of_plain, of_quantized = plain.log_softmax(-1), quantized.log_softmax(-1)
    divergence = (of_plain.exp() * (of_plain - of_quantized)).sum(-1).mean()
    figures = {"cosine": cosine, "top_1": top, "divergence": divergence}
    return {name: round(float(value), 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    arguments = parser.parse_args()
    folders = arguments.checkpoints or [
        Path(dgemma_ext.demo.checkpoint(6)),
        write_checkpoint(ROOT / "build" / "bench_step_cpu" / "peaked", 1.0),
        write_checkpoint(ROOT / "build" / "bench_step_cpu" / "flat", FLATTENING),
    ]
    for folder in folders:
        plain = logits_of(folder, "auto")
        for weights, activations in FORMATS:
            options = {"weights": weights, "activations": activations}
            figures = compare(plain, logits_of(folder, weights, activations))
            print(json.dumps({"checkpoint": folder.name, **options, **figures}), flush=True)


if __name__ == "__main__":
    main()
