"""Trains a small DiffusionGemma to solve Sudoku, with transformers' own model class and autograd.

    python train.py --size 6 --seconds 1500 --out runs/6x6

One step: a batch of puzzles is encoded once; the answer, corrupted by uniform tokens, is denoised without
self-conditioning; then a second canvas is denoised with the first pass's logits as self-conditioning. Every second
canvas is either a fresh corruption at a lower noise level or what the sampler would have made of the first pass.
Writes `config.json`, `model.safetensors` (averaged weights), `curve.jsonl` and `state.pt` (for --resume) to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import checkpoint
import puzzles
import sampling
import tokenizer
from optimizer import Muon

CLUE_WEIGHT = 0.1  # of a cell that the prompt already tells, relative to a blank one
BASE_PUZZLES = 4000  # each puzzle is seen in a new symmetric form every time


def dense_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes all experts for all tokens, with weight zero for those not chosen: two products in place of gathers."""
    experts, width = module.num_experts, module.intermediate_dim
    weights = hidden.new_zeros(hidden.shape[0], experts).scatter(1, top_k_index, top_k_weights.to(hidden.dtype))
    gate, up = (
        torch.nn.functional.linear(hidden, module.gate_up_proj.flatten(0, 1))
        .view(-1, experts, 2 * width)
        .chunk(2, dim=-1)
    )
    inner = module.act_fn(gate) * up * weights[..., None]
    return torch.nn.functional.linear(inner.flatten(1), module.down_proj.transpose(0, 1).flatten(1))


class PuzzleStream:
    """Endless batches of puzzles: base puzzles under random symmetries, some blanks filled back in."""

    def __init__(self, size: int, blanks: tuple[int, int], seed: int) -> None:
        rng = random.Random(f"train {size} {seed}")
        self.size, self.blanks = size, blanks
        base = [puzzles.generate(size, size * size - blanks[1], rng) for _ in range(BASE_PUZZLES)]
        self.solutions = np.array([puzzles.from_text(puzzle.solution) for puzzle in base])
        self.blank = np.array([puzzles.from_text(puzzle.text) for puzzle in base]) == 0
        self.rng = np.random.default_rng(seed)

    def _cell_order(self) -> np.ndarray:
        """A random symmetry of the grid: bands, rows in bands, stacks, columns in stacks, and for 9x9 the diagonal."""
        box_rows, box_columns = puzzles.BOX_SHAPES[self.size]
        orders = []
        for box in (box_rows, box_columns):
            groups = self.rng.permutation(self.size // box)
            orders.append(np.concatenate([group * box + self.rng.permutation(box) for group in groups]))
        cells = np.arange(self.size**2).reshape(self.size, self.size)[np.ix_(orders[0], orders[1])]
        if box_rows == box_columns and self.rng.random() < 0.5:
            cells = cells.T
        return cells.reshape(-1)

    def batch(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Solutions [count, cells] (1 ... size) and which cells are blank (bool, same shape)."""
        rows = self.rng.integers(len(self.solutions), size=count)
        orders = np.stack([self._cell_order() for _ in range(count)])
        solutions = np.take_along_axis(self.solutions[rows], orders, axis=1)
        digits = np.argsort(self.rng.random((count, self.size)), axis=1) + 1
        solutions = np.take_along_axis(digits, solutions - 1, axis=1)
        blank = np.take_along_axis(self.blank[rows], orders, axis=1)
        kept = self.rng.integers(self.blanks[0], self.blanks[1] + 1, size=(count, 1))
        rank = np.argsort(np.argsort(np.where(blank, self.rng.random(blank.shape), 2.0), axis=1), axis=1)
        return solutions, blank & (rank < kept)


class Batches:
    """Puzzles as token ids, through the chat template."""

    def __init__(self, stream: PuzzleStream) -> None:
        text = tokenizer.build()
        self.stream = stream
        self.digits = torch.tensor([text.token_to_id(puzzles.BLANK)] + [text.token_to_id(str(d)) for d in range(1, 10)])
        self.end = text.token_to_id("<turn|>")
        cells = stream.size**2
        prompt = sampling.prompt_ids(text, puzzles.BLANK * cells)
        self.start = prompt.index(int(self.digits[0]))
        self.template = torch.tensor(prompt)

    def next(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [count, P], answers [count, L] and the positions of the answer that the prompt leaves open (bool)."""
        solutions, blank = (torch.from_numpy(array) for array in self.stream.batch(count))
        prompts = self.template.repeat(count, 1)
        prompts[:, self.start : self.start + solutions.shape[1]] = self.digits[solutions.masked_fill(blank, 0)]
        ending = torch.full((count, 1), self.end)
        answers = torch.cat([self.digits[solutions], ending], dim=1)
        return prompts, answers, torch.cat([blank, torch.zeros_like(ending, dtype=torch.bool)], dim=1)


def corrupt(answers: Tensor, level: Tensor, pinned: Tensor) -> Tensor:
    """Every position not pinned becomes a uniform token with probability `level` ([B, 1])."""
    noise = torch.randint(tokenizer.VOCABULARY_SIZE, answers.shape)
    return torch.where((torch.rand(answers.shape) < level) & ~pinned, noise, answers)


def loss_of(logits: Tensor, answers: Tensor, blank: Tensor) -> Tensor:
    weights = torch.where(blank, 1.0, CLUE_WEIGHT)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def training_loss(
    model: DiffusionGemmaForBlockDiffusion, batches: Batches, count: int, autocast: bool
) -> tuple[Tensor, Tensor]:
    """The losses of the pass without and the pass with self-conditioning on one new batch."""
    prompts, answers, blank = batches.next(count)
    pinned = ~blank & (torch.rand(count, 1) < 0.5)
    level = 1 - torch.rand(count, 1) ** 2  # uniform noise levels would spend most of the time on nearly full grids
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prefix = sampling.encode(model, prompts)
        first_canvas = corrupt(answers, level, pinned)
        first_logits = sampling.denoise(model, first_canvas, prefix, None)
        with torch.no_grad():
            temperature = 0.4 + 0.4 * torch.rand(count, 1, 1)
            processed = first_logits.detach() / temperature
            sampled, _, _ = sampling.next_canvas(processed, entropy_bound=0.1)
            sampled = torch.where(pinned, answers, sampled)
            fresh = torch.where(torch.rand(answers.shape) < torch.rand(count, 1), first_canvas, answers)
            second_canvas = torch.where(torch.rand(count, 1) < 0.5, sampled, fresh)
        second_logits = sampling.denoise(model, second_canvas, prefix, processed, pinned)
    return loss_of(first_logits, answers, blank), loss_of(second_logits, answers, blank)


def learning_rate_factor(elapsed: float, step: int, seconds: float) -> float:
    """Warm-up over 50 steps, then constant, then linear to zero over the last 45 % of the time."""
    return min(1.0, (step + 1) / 50) * max(0.0, min(1.0, (1 - elapsed / seconds) / 0.45))


def build_model(dictionary: dict[str, Any], seed: int) -> DiffusionGemmaForBlockDiffusion:
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(checkpoint.transformers_config(dictionary))
    model.model.encoder.vision_tower = None  # no images here, so nothing to train or average
    model.model.encoder.embed_vision = None
    for layer in model.model.decoder.layers:
        layer.layer_scalar.fill_(0.9)
    for layer in model.model.encoder.language_model.layers:
        layer.layer_scalar.fill_(0.8)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=sorted(puzzles.BOX_SHAPES), default=6)
    parser.add_argument("--seconds", type=float, default=1500, help="training time, evaluations not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue from --out/state.pt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blanks", type=int, nargs=2, help="fewest and most blanks of a puzzle")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--average", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--evaluate-every", type=float, default=240, help="seconds")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the layers")
    parser.add_argument("--shape", type=json.loads, default={}, help="changes to checkpoint.SHAPES, as JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    blanks = tuple(arguments.blanks or {6: (10, 22), 9: (25, 47)}[arguments.size])
    test_blanks = {6: (10, 22), 9: (35, 45)}[arguments.size]
    dictionary = checkpoint.config_dictionary(arguments.size, **arguments.shape)
    checkpoint.save_settings(arguments.out, dictionary)
    model = build_model(dictionary, arguments.seed)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    if arguments.compile:
        model.set_attn_implementation("eager")  # compiled, it is faster than the fused bfloat16 CPU kernel
        for layer in [*model.model.encoder.language_model.layers, *model.model.decoder.layers]:
            layer.compile(dynamic=False)
    batches = Batches(PuzzleStream(arguments.size, blanks, arguments.seed))
    test = puzzles.held_out(arguments.size, test_blanks, 128, seed=9_999)

    parameters = dict(model.named_parameters())
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
    elapsed, step = 0.0, 0
    state_file = arguments.out / "state.pt"
    if arguments.resume:
        state = torch.load(state_file, weights_only=True)
        elapsed, step = state["elapsed"], state["step"]
        model.load_state_dict(state["model"])
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.manual_seed(step)
        batches.stream.rng = np.random.default_rng([arguments.seed, step])
    curve = (arguments.out / "curve.jsonl").open("a" if arguments.resume else "w")

    def swap() -> None:
        """Exchanges the trained weights with their average."""
        for parameter, mean in zip(trained, average, strict=True):
            parameter.data, mean.data = mean.data, parameter.data

    def report(losses: list[float]) -> None:
        swap()
        checkpoint.save_weights(arguments.out, checkpoint.published_tensors(model))
        model.train(False)
        with torch.compiler.set_stance("force_eager"):
            solved, steps = sampling.solve_rate(model, test, pin=True, limit=24)
        model.train()
        swap()
        line = {"seconds": round(elapsed), "steps": step, "losses": [round(loss, 4) for loss in losses]}
        line |= {"solved": solved, "denoising_steps": round(steps, 2)}
        print(json.dumps(line), file=curve, flush=True)
        print(json.dumps(line), flush=True)
        partial = state_file.with_suffix(".partial")
        torch.save(
            {
                "model": model.state_dict(),
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "elapsed": elapsed,
                "step": step,
            },
            partial,
        )
        partial.replace(state_file)

    first_step, last_report, recent = step, elapsed, torch.zeros(2)
    while elapsed < arguments.seconds:
        began = time.perf_counter()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(elapsed, step, arguments.seconds)
        losses = torch.stack(training_loss(model, batches, arguments.batch, arguments.bf16))
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.data for p in trained], max(1 - arguments.average, 1 / (step + 1)))
        losses = losses.detach()
        recent = losses if step == first_step else torch.lerp(recent, losses, 0.05)
        step += 1
        took = time.perf_counter() - began
        if step > first_step + 3 or not arguments.compile:
            elapsed += took  # compilation is not training
        if step <= first_step + 8 or step % 50 == 0:
            print(f"{elapsed:.0f} s, step {step}, {took:.3f} s/step, losses {recent.tolist()}", flush=True)
        if elapsed - last_report >= arguments.evaluate_every or elapsed >= arguments.seconds:
            last_report = elapsed
            report(recent.tolist())


if __name__ == "__main__":
    main()
