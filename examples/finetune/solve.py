"""The share of unseen puzzles that a model answers in the new code, and the denoising steps that it takes.

python solve.py runs/finetune/data/test.jsonl                                     # the bundled model as it is
python solve.py runs/finetune/data/test.jsonl --adapter runs/finetune/adapter
python solve.py runs/finetune/data/test.jsonl --adapter runs/finetune/adapter --engine transformers --count 100
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sudoku"))

Outcome = tuple[list[str], list[int]]  # answers and denoising steps, one per prompt
Solve = Callable[[list[str]], Outcome]


def with_dgemma(model: str, adapter: Path | None) -> Solve:
    import dgemma_ext as dg

    loaded = dg.DiffusionGemma.from_pretrained(model, device="cpu", dtype="float32", adapter=adapter)

    def solve(prompts: list[str]) -> Outcome:
        outputs = loaded.generate(prompts, seed=list(range(len(prompts))))
        return [output.text for output in outputs], [sum(output.denoising_steps) for output in outputs]

    return solve


def with_transformers(model: str, adapter: Path | None) -> Solve:
    """transformers' class with PEFT's adapter, not merged, under the loop in ../sudoku/sampling.py."""
    import torch
    from peft import PeftModel

    import checkpoint
    import sampling
    import tokenizer
    from dgemma_ext.checkpoint import resolve_checkpoint

    loaded = checkpoint.load(Path(resolve_checkpoint(model)))
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter).get_base_model()
    text = tokenizer.build()

    def solve(prompts: list[str]) -> Outcome:
        torch.manual_seed(0)
        ids = torch.tensor([sampling.prompt_ids(text, prompt) for prompt in prompts])
        drafts, steps = sampling.generate(loaded, ids, None)
        return [sampling.answer_text(text, draft) for draft in drafts.tolist()], steps.tolist()

    return solve


ENGINES = {"dgemma_ext": with_dgemma, "transformers": with_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="test.jsonl of make_data.py")
    parser.add_argument("--model", default="6x6")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--engine", choices=ENGINES, default="dgemma_ext")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    lines = [json.loads(line) for line in arguments.data.read_text().splitlines()][: arguments.count]
    solve = ENGINES[arguments.engine](arguments.model, arguments.adapter)
    began, right, steps = time.process_time(), 0, []
    for start in range(0, len(lines), arguments.batch):
        some = lines[start : start + arguments.batch]
        answers, taken = solve([line["prompt"] for line in some])
        right += sum(answer == line["response"] for answer, line in zip(answers, some, strict=True))
        steps += taken
    report = {
        "engine": arguments.engine,
        "adapter": None if arguments.adapter is None else str(arguments.adapter),
        "puzzles": len(lines),
        "solved": right / len(lines),
        "denoising_steps": round(statistics.mean(steps), 2),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
