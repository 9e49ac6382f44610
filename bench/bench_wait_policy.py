"""How long a denoising step takes by how torch's threads wait for each other, with and without other work beside it.

    python bench/bench_wait_policy.py                     the bundled 6x6 model, on the machine as it is
    python bench/bench_wait_policy.py --busy 3            with three other processes that use what they get of the cores
    python bench/bench_wait_policy.py --layers 2          random weights of the published width; 6 GB, minutes

A process for each setting and round, by turns; libgomp reads its settings when it is loaded. `package` is what a
process gets that imports dgemma_ext before torch (python/dgemma_ext/openmp.py), `torch` what it gets without that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

SETTINGS = {
    "torch": {},
    "package": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 3000, 10000, 30000)},
}
# The waste of a core: what a busy machine has beside the process that is measured.
SPIN = "while True: pass"


def worker(setting: str, layers: int | None, steps: int) -> None:
    """Prints the median of the milliseconds of a step."""
    if setting == "torch":
        import torch  # noqa: F401
    import dgemma_ext as dg
    from dgemma_ext import demo
    from dgemma_ext.profile.true_size import random_model, true_config

    if layers is None:
        model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6))
        prompts: list[str | list[int]] = [demo.draw(6, seed).text for seed in range(steps)]
    else:
        model = random_model(true_config(layers), "cpu")
        prompts = [list(range(2, 130))]
    sampler = dg.SamplerConfig(confidence_threshold=1e-9, max_denoising_steps=4)
    model.generate(prompts[0], sampler=sampler)
    milliseconds = []
    for prompt in prompts:
        began = time.perf_counter()
        out = model.generate(prompt, sampler=sampler, max_new_tokens=model.config.canvas_length)
        milliseconds.append((time.perf_counter() - began) * 1e3 / sum(out.denoising_steps))
    print(statistics.median(milliseconds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other processes beside it")
    parser.add_argument("--layers", type=int, help="of a random model of the published width")
    parser.add_argument("--steps", type=int, default=12, help="generations of a process")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker is not None:
        worker(chosen.worker, chosen.layers, chosen.steps)
        return 0
    options = ["--steps", str(chosen.steps)] + (["--layers", str(chosen.layers)] if chosen.layers else [])
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found: dict[str, list[float]] = {setting: [] for setting in chosen.settings}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(chosen.busy)]
    try:
        for _ in range(chosen.rounds):
            for setting, values in found.items():
                command = [sys.executable, "-W", "ignore", __file__, "--worker", setting, *options]
                environment = {**clean, **SETTINGS[setting]}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                values.append(float(done.stdout))
    finally:
        for other in others:
            other.kill()
    print(f"milliseconds of a step, {chosen.busy} processes beside it, load {os.getloadavg()[0]:.1f}")
    for setting, values in found.items():
        least, most = min(values), max(values)
        print(f"  {setting:12} median {statistics.median(values):8.2f}   {least:8.2f} to {most:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
