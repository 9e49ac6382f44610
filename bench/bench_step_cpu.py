"""A denoising step on the CPU beside transformers', at true width with two layers (one sliding, one full), in one run.

    python bench/bench_step_cpu.py            # about ten minutes and 12 GB of memory; the checkpoint (5 GB) goes
    under build/

Hidden 2816, 128 experts of 704, top 8, vocabulary 262,144, bf16, canvas 256, prompt 128, random weights, both as drawn
(the tied head makes every position's distribution peaked) and flattened (final norm x 0.05). Both sides run with the
same number of threads, by turns, each in its own process; the figures are medians. Compare ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Shares of transformers' time in the same run: the project's goals for two cores. On a Zen 4 products in bfloat16 alone
# take more than the peaked one (docs/performance.md).
GOALS = {"peaked": {"step": 0.17, "sampler": 0.05}, "flat": {"step": 0.33, "sampler": 0.05}}
FLATTENING = 0.05


def write_checkpoint(directory: Path, final_norm: float, threads_seed: int = 0) -> Path:
    """A random model in the published layout: normal weights of deviation 0.02, unit norms and scalars."""
    from checkpoints import config_for
    from dgemma_ext.checkpoint import ModelConfig, expected_tensors
    from published_layout import PUBLISHED_SIZES

    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "model.safetensors").exists():
        return directory
    config = config_for(layers=("sliding_attention", "full_attention"), **PUBLISHED_SIZES)
    del config["vision_config"]
    generator = torch.Generator().manual_seed(threads_seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(ModelConfig.from_dict(config)).items():
        if len(shape) == 1:
            value = final_norm if name == "model.decoder.norm.weight" else 1.0
            tensors[name] = torch.full(shape, value, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors.partial", metadata={"format": "pt"})
    (directory / "model.safetensors.partial").rename(directory / "model.safetensors")
    return directory


class Worker:
    """A process that runs one side; it answers a line of its stdin with a line of JSON, as step_cpu_worker.py does."""

    def __init__(self, command: Sequence[str], threads: int, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})},
        )
        self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def step_worker(side: str, checkpoint: Path, threads: int) -> Worker:
    """`side`: "ours" or "transformers"."""
    script = str(Path(__file__).with_name("step_cpu_worker.py"))
    return Worker([sys.executable, script, side, str(checkpoint)], threads)


def measure(weights: str, checkpoint: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of each part, as medians over rounds that run both sides by turns; then each side's peak memory."""
    sides = {side: step_worker(side, checkpoint, threads) for side in ("ours", "transformers")}
    result: dict[str, Any] = {"weights": weights, "threads": threads, "rounds": rounds}
    for part in ("first", "step", "sampler", "products"):
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, worker in sides.items():
                seconds[side].append(worker.ask(part)["seconds"])
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        result[part] = {**medians, "ratio": medians["ours"] / medians["transformers"]}
    memory = {side: worker.ask("memory")["bytes"] for side, worker in sides.items()}
    result["memory"] = {**memory, "ratio": memory["ours"] / memory["transformers"]}
    for worker in sides.values():
        worker.close()
    return result


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['weights']}: {result['threads']} threads, median of {result['rounds']}")
    for part in ("first", "step", "sampler", "products", "memory"):
        row, goal = result[part], GOALS[result["weights"]].get(part)
        unit, scale = ("MB", 1e6) if part == "memory" else ("s ", 1.0)
        cells = "  ".join(f"{side} {row[side] / scale:9.3f} {unit}" for side in ("ours", "transformers"))
        print(f"  {part:9} {cells}  ratio {row['ratio']:.3f}" + (f"  goal {goal}" if goal else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench_step_cpu")
    parser.add_argument("--weights", choices=("peaked", "flat", "both"), default="both")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    results = []
    for weights, final_norm in (("peaked", 1.0), ("flat", FLATTENING)):
        if arguments.weights in (weights, "both"):
            checkpoint = write_checkpoint(arguments.directory / weights, final_norm)
            results.append(measure(weights, checkpoint, arguments.threads, arguments.rounds))
            print_table(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
