"""Teaches the bundled 6x6 model whether a die is loaded, with transformers' own class and autograd.

    python train_dice.py --seconds 180 --out runs/dice

One step: prompts of equally many rolls are encoded, and one pass without self-conditioning goes over their canvases:
the answer's label, the end of the turn and padding. In half of the batches the canvas is a decision's (noise at the
label alone), so what is read later is what was trained; in the others every position is noise with a random
probability, so that the model can write the answer too. Writes a loadable checkpoint with averaged weights, and
curve.jsonl, to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sudoku"))

import checkpoint
import sampling
import tokenizer
from dice import FEWEST, LABELS, MOST, Rolls, held_out, rolled
from optimizer import Muon
from train import dense_experts, learning_rate_factor

DEMO = Path(__file__).resolve().parents[2] / "python" / "dgemma_ext" / "demo"
CANVAS = 32  # positions of a decision's canvas
END, PAD = tokenizer.SPECIAL_TOKENS["<turn|>"], tokenizer.SPECIAL_TOKENS["<pad>"]
_TEXT = tokenizer.build()
YES, NO = (_TEXT.token_to_id(LABELS[answer]) for answer in ("yes", "no"))


def prompts_of(rolls: list[Rolls]) -> Tensor:
    """[count, P] of rolls of one length."""
    return torch.tensor([sampling.prompt_ids(_TEXT, one.prompt) for one in rolls])


def answers_of(rolls: list[Rolls], length: int) -> Tensor:
    """The canvases [count, length]: label, end of the turn, padding."""
    answers = torch.full((len(rolls), length), PAD)
    answers[:, 0] = torch.tensor([YES if one.is_loaded else NO for one in rolls])
    answers[:, 1] = END
    return answers


def corrupted(answers: Tensor, level: Tensor) -> Tensor:
    """Every position becomes a uniform token with probability `level` [count, length]."""
    noise = torch.randint(tokenizer.VOCABULARY_SIZE, answers.shape)
    return torch.where(torch.rand(answers.shape) < level, noise, answers)


def decision_level(answers: Tensor) -> Tensor:
    """Noise at the label alone."""
    level = torch.zeros(answers.shape)
    level[:, 0] = 1.0
    return level


def training_loss(model: DiffusionGemmaForBlockDiffusion, rng: random.Random, count: int, decides: bool) -> Tensor:
    """The cross-entropy of a batch: at the label, and where all is noise over the rest of the canvas too."""
    number = rng.randint(FEWEST, MOST)
    rolls = [rolled(rng, number) for _ in range(count)]
    answers = answers_of(rolls, CANVAS if decides else CANVAS + 5)  # 37 is the bundled model's own canvas
    level = decision_level(answers) if decides else torch.rand(count, 1).expand(answers.shape)
    logits = sampling.denoise(model, corrupted(answers, level), sampling.encode(model, prompts_of(rolls)), None)
    label = torch.nn.functional.cross_entropy(logits[:, 0], answers[:, 0])
    if decides:
        return label
    return label + torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), answers[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: DiffusionGemmaForBlockDiffusion, count: int = 256) -> float:
    """The mean loss of decisions about other rolls than the evaluation's, above that of the exact probability."""
    losses = []
    by_length: dict[int, list[Rolls]] = {}
    for one in held_out(count, seed=1):
        by_length.setdefault(len(one.faces), []).append(one)
    for rolls in by_length.values():
        answers = answers_of(rolls, CANVAS)
        canvas = corrupted(answers, decision_level(answers))
        logits = sampling.denoise(model, canvas, sampling.encode(model, prompts_of(rolls)), None)[:, 0]
        exact = torch.tensor([one.probability if one.is_loaded else 1 - one.probability for one in rolls])
        losses.append(torch.nn.functional.cross_entropy(logits, answers[:, 0], reduction="none") + exact.log())
    return float(torch.cat(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="training time (CPU), evaluations not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.98, help="decay of the averaged weights")
    parser.add_argument("--evaluate-every", type=float, default=20, help="seconds")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(f"dice for training {arguments.seed}")
    checkpoint.save_settings(arguments.out, checkpoint.config_dictionary(6))
    model = checkpoint.load(DEMO).train()
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    parameters = {name: p for name, p in model.named_parameters() if "vision" not in name}
    matrices = [p for name, p in parameters.items() if p.ndim >= 2 and "embed" not in name and "router" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters.values() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=arguments.muon_rate),
        torch.optim.AdamW(others, lr=arguments.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    trained = list(parameters.values())
    average = [p.detach().clone() for p in trained]
    curve = (arguments.out / "curve.jsonl").open("w")

    def swap() -> None:
        """Exchanges the trained weights with their average."""
        for parameter, mean in zip(trained, average, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    elapsed, step, last_report = 0.0, 0, 0.0
    while elapsed < arguments.seconds:
        began = time.process_time()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(elapsed, step, arguments.seconds)
        training_loss(model, rng, arguments.batch, decides=step % 2 == 0).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.data for p in trained], max(1 - arguments.average, 1 / (step + 1)))
        step += 1
        elapsed += time.process_time() - began
        if elapsed - last_report >= arguments.evaluate_every or elapsed >= arguments.seconds:
            last_report = elapsed
            swap()
            line = {"cpu_seconds": round(elapsed), "steps": step, "loss_above_exact": round(held_out_loss(model), 4)}
            checkpoint.save_weights(arguments.out, checkpoint.published_tensors(model))
            swap()
            print(json.dumps(line), file=curve, flush=True)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
