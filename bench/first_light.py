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
# A relative distance from the peer's result that rounding does not explain.
FAR = 0.02
# The status of a process that can measure no kernel.
CANNOT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", default=[], metavar="WORD")
    parser.add_argument("--seconds", type=float, default=25.0, metavar="N", help="limit for one kernel (default 25)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args(arguments)
    size = "small" if chosen.small else "full"
    if chosen.list:
        listed = subprocess.run(_worker(size, "list", chosen.only), stdout=subprocess.PIPE, text=True, check=False)
        print("\n".join(_parsed(listed.stdout, "kernels")["kernels"]))
        return listed.returncode
    failed = 0
    for line in measured(chosen.only, chosen.seconds, size):
        failed += "error" in line
        print(told(line), flush=True)
        if chosen.out is not None:
            with chosen.out.open("a", encoding="utf-8") as out:
                print(json.dumps(line), file=out)
    return int(failed > 0)


def _worker(size: str, mode: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, str(FOLDER / "first_light_worker.py"), size, mode, *words]


def measured(words: Sequence[str], seconds: float, size: str) -> Iterator[dict[str, Any]]:
    """A line for each kernel whose name holds all words, whatever becomes of it."""
    left: list[str] | None = None  # not known before the first worker says so
    while left is None or left:
        command = _worker(size, "all", words) if left is None else _worker(size, "named", left)
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        last, limit, problem = "", seconds + STARTING_SECONDS, ""
        try:
            while left is None or left:
                text = lines.get(timeout=limit)
                if text is None:
                    status = worker.wait()
                    problem = f"its process ended with {status}: {last}"[:300]
                    if status == CANNOT:
                        left = []
                    break
                if named := _parsed(text, "kernels"):
                    left, limit = list(named["kernels"]), seconds
                elif left is not None and (line := _parsed(text, "kernel")):
                    left.remove(line["kernel"])
                    yield line
                else:
                    last = text.strip() or last
        except queue.Empty:
            problem = f"not ended after {limit:g} s"
        finally:
            worker.kill()
        if problem:
            yield {"kernel": left.pop(0) if left else "all", "error": problem}
            left = left or []


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for text in worker.stdout:
        lines.put(text)
    lines.put(None)


def _parsed(text: str, key: str) -> dict[str, Any]:
    """A line of the worker that has this key; empty for anything else, such as a library's words."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) and key in line else {}


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
        if not line["distance"] < FAR:
            words.append("WRONG")
    if not line.get("hidden", True):
        words.append("NOT HIDDEN: the host's time")
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
