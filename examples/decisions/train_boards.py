"""Trains the bundled 6x6 model to say whether a grid has a solution, with transformers' own class and autograd.

    python train_boards.py --seconds 840 --out runs/boards

One step: prompts are encoded, and one pass without self-conditioning goes over the canvas that a decision has: noise at
the label's position, the end of the turn and padding after it. The loss is the cross-entropy there, so what is read
later is what was trained. One answer tells little of a grid, so the padding is taught as well: position i shall say
whether cell i is at fault. Nobody reads that later. Writes a loadable checkpoint with averaged weights, and
curve.jsonl, to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sudoku"))

import checkpoint
import puzzles
import sampling
import tokenizer
from boards import BLANKS, LABELS, QUESTION, SIZE, held_out, spoiled
from optimizer import Muon
from train import PuzzleStream, dense_experts, learning_rate_factor

DEMO = Path(__file__).resolve().parents[2] / "python" / "dgemma_ext" / "demo"
CANVAS = 32  # positions of a decision's canvas
FIRST_CELL = 2  # whose position is padding: the label and the end of the turn come before it
END, PAD = tokenizer.SPECIAL_TOKENS["<turn|>"], tokenizer.SPECIAL_TOKENS["<pad>"]


class Batches:
    """Boards as token ids, through the chat template."""

    def __init__(self, seed: int) -> None:
        text = tokenizer.build()
        self.stream = PuzzleStream(SIZE, BLANKS, seed)
        self.rng = random.Random(f"boards for training {seed}")
        self.digits = torch.tensor([text.token_to_id(puzzles.BLANK), *map(text.token_to_id, "123456")])
        self.labels = torch.tensor([text.token_to_id(LABELS["no"]), text.token_to_id(LABELS["yes"])])
        template = sampling.prompt_ids(text, QUESTION + puzzles.BLANK * SIZE**2)
        self.start = template.index(int(self.digits[0]))
        self.template = torch.tensor(template)

    def prompts(self, boards: list[list[int]]) -> Tensor:
        """[count, P]"""
        prompts = self.template.repeat(len(boards), 1)
        prompts[:, self.start : self.start + SIZE**2] = self.digits[torch.tensor(boards)]
        return prompts

    def next(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [count, P], their labels' ids [count], and the labels of the cells that have a place of padding
        [count, canvas - 2]; every second grid has no solution."""
        solutions, blank = self.stream.batch(count)
        solutions[blank] = 0
        boards = [
            cells if index % 2 else spoiled(cells, self.rng, hides=index % 4 == 0)
            for index, cells in enumerate(solutions.tolist())
        ]
        cells = self.labels[1 - at_fault(np.array(boards)).astype(int)]
        return self.prompts(boards), self.labels[torch.arange(count) % 2], cells[:, FIRST_CELL:CANVAS]


def at_fault(boards: np.ndarray) -> np.ndarray:
    """bool [count, cells] of grids [count, cells] (0 is a blank): clues whose digit a row, a column or a box has twice,
    and blanks that no digit is left for."""
    member = np.zeros((3 * SIZE, SIZE**2), dtype=int)
    for unit, cells in enumerate(puzzles.units(SIZE)):
        member[unit, cells] = 1
    is_digit = boards[:, :, None] == np.arange(1, SIZE + 1)
    counts = np.einsum("uc,bcd->bud", member, is_digit)
    twice = np.einsum("uc,bud->bcd", member, counts > 1) > 0
    taken = np.einsum("uc,bud->bcd", member, counts > 0) > 0
    return np.where(boards > 0, (twice & is_digit).any(-1), taken.all(-1))


def canvas_logits(model: DiffusionGemmaForBlockDiffusion, prompts: Tensor) -> Tensor:
    """The logits [B, L, V] of a decision's canvas; those of position 0 are the label's."""
    canvas = torch.full((len(prompts), CANVAS), PAD)
    canvas[:, 0] = torch.randint(tokenizer.VOCABULARY_SIZE, (len(prompts),))
    canvas[:, 1] = END
    return sampling.denoise(model, canvas, sampling.encode(model, prompts), None)


@torch.no_grad()
def share_right(model: DiffusionGemmaForBlockDiffusion, batches: Batches, count: int = 512) -> tuple[float, float]:
    """On held-out boards of another seed than the evaluation's: the share decided right, and the mean loss."""
    boards = held_out(count, seed=1)
    prompts = batches.prompts([puzzles.from_text(board.text) for board in boards])
    wanted = batches.labels[torch.tensor([int(board.has_solution) for board in boards])]
    logits = canvas_logits(model, prompts)[:, 0]
    decided = batches.labels[logits[:, batches.labels].argmax(-1)]
    return float((decided == wanted).float().mean()), float(torch.nn.functional.cross_entropy(logits, wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=840, help="training time, evaluations not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.995, help="decay of the averaged weights")
    parser.add_argument("--evaluate-every", type=float, default=60, help="seconds")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    checkpoint.save_settings(arguments.out, checkpoint.config_dictionary(SIZE))
    model = checkpoint.load(DEMO).train()
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    batches = Batches(arguments.seed)
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

    elapsed, step, last_report, recent = 0.0, 0, 0.0, 0.0
    while elapsed < arguments.seconds:
        began = time.process_time()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(elapsed, step, arguments.seconds)
        prompts, labels, cells = batches.next(arguments.batch)
        logits = canvas_logits(model, prompts)
        loss = torch.nn.functional.cross_entropy(logits[:, 0], labels)
        of_cells = torch.nn.functional.cross_entropy(logits[:, FIRST_CELL:].flatten(0, 1), cells.flatten())
        (loss + of_cells).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.data for p in trained], max(1 - arguments.average, 1 / (step + 1)))
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        step += 1
        elapsed += time.process_time() - began
        if elapsed - last_report >= arguments.evaluate_every or elapsed >= arguments.seconds:
            last_report = elapsed
            swap()
            right, held_out_loss = share_right(model, batches)
            checkpoint.save_weights(arguments.out, checkpoint.published_tensors(model))
            swap()
            line = {"cpu_seconds": round(elapsed), "steps": step, "loss": round(recent, 4)}
            line |= {"right": round(right, 4), "held_out_loss": round(held_out_loss, 4)}
            print(json.dumps(line), file=curve, flush=True)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
