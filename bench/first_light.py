"""Times every kernel of a denoising step on a GPU, the most telling first: a JSON line for each as soon as it is known.

    python bench/first_light.py                          all of them, to the terminal
    python bench/first_light.py --out kernels.jsonl      and into a file, which is added to
    python bench/first_light.py --only experts           those whose names hold the word
    python bench/first_light.py --small                  small sizes, on a CPU too: proves the code, not a speed
    python bench/first_light.py --list                   the names

Kernels run in a process of their own that goes from one to the next. Where one faults or hangs (--seconds), its line
says so and a new process goes on behind it.

Fields: us is one call with a cold L2 cache, us_in_a_row one of eight calls in a row with inputs that differ; both are
the GPU's time, and `hidden` says that the host had queued all of it before (host_us is what that took). bytes and
operations are what the call has to move and to multiply, floor_us what they take at best, share is floor_us / us.
peer_us is torch's or cuBLAS's time for the same, distance the relative difference of the results.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
# What a new process takes before its first kernel, beyond the limit for one.
STARTING_SECONDS = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="N", help="limit for one kernel (default 25)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args(arguments)
    size = "small" if chosen.small else "full"
    listed = subprocess.run(_worker(size, ["list"]), capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        print((listed.stderr.strip().splitlines() or ["no worker"])[-1], file=sys.stderr)
        return 2
    names = [name for name in listed.stdout.split() if all(word in name for word in chosen.only)]
    if chosen.list:
        print("\n".join(names))
        return 0
    failed = 0
    for line in measured(names, chosen.seconds, size):
        failed += "error" in line
        print(told(line), flush=True)
        if chosen.out is not None:
            with chosen.out.open("a", encoding="utf-8") as out:
                print(json.dumps(line), file=out)
    return int(failed > 0)


def _worker(size: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, str(FOLDER / "first_light_worker.py"), size, *words]


def measured(names: Sequence[str], seconds: float, size: str) -> Iterator[dict[str, Any]]:
    """A line for each kernel, whatever becomes of it."""
    left = list(names)
    while left:
        worker = subprocess.Popen(
            _worker(size, left), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        last, limit = "", seconds + STARTING_SECONDS
        try:
            while left:
                try:
                    text = lines.get(timeout=limit)
                except queue.Empty:
                    yield {"kernel": left.pop(0), "error": f"not ended after {limit:g} s"}
                    break
                if text is None:
                    yield {"kernel": left.pop(0), "error": f"its process ended with {worker.wait()}: {last}"[:300]}
                    break
                line = _parsed(text)
                if line is None:
                    last = text.strip() or last
                    continue
                limit = seconds
                left.remove(line["kernel"])
                yield line
        finally:
            worker.kill()


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for text in worker.stdout:
        lines.put(text)
    lines.put(None)


def _parsed(text: str) -> dict[str, Any] | None:
    """A kernel's line, or None of what libraries say."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "kernel" in line else None


def told(line: dict[str, Any]) -> str:
    """A line for people."""
    if "error" in line:
        return f"{line['kernel']:24} {line['error']}"
    words = [f"{line['kernel']:24} {line['us']:9.1f} us"]
    if line.get("us_in_a_row") is not None:
        words.append(f"{line['us_in_a_row']:9.1f} in a row")
    if line.get("share") is not None:
        words.append(f"{line['share']:6.1%} of the floor")
    if line.get("bytes"):
        words.append(f"{line['bytes'] / line['us'] * 1e-3:6.0f} GB/s")
    if line.get("operations"):
        words.append(f"{line['operations'] / line['us'] * 1e-6:6.0f} TFLOP/s")
    if line.get("peer_us") is not None:
        words.append(f"peer {line['peer_us']:.1f} us, distance {line['distance']:.1e}")
    if not line.get("hidden", True):
        words.append("NOT HIDDEN: the host's time")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
