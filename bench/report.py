"""From pytest-benchmark's JSON to the results that are kept: bench/results/<device>.json and a table on the screen.

    pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' -m gpu --benchmark-json=raw.json
    python bench/report.py raw.json

A row's figures are what the benchmark put into `extra_info`: microseconds on the GPU's clock, GB/s, TFLOP/s, per cent
of the floor, the peer's time, the goal.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COLUMNS = (
    "microseconds",
    "host_microseconds",
    "goal",
    "floor",
    "floor_share",
    "gigabytes_per_second",
    "teraflops",
    "peer",
    "ratio",
)


def environment() -> dict[str, str]:
    """Device, driver, torch, CUDA and commit."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    version = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(version, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": commit or "unknown",
    }


def rows_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": entry["name"], **entry["extra_info"]} for entry in raw["benchmarks"]]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with a column for each figure that any of them has."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    cells = [["name", *columns]]
    for row in rows:
        cells.append([row["name"], *(_text(row.get(column)) for column in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 10
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    raw = json.loads(Path(arguments[0]).read_text())
    rows = rows_of(raw)
    if not rows:
        print("bench/report.py: no benchmark ran", file=sys.stderr)
        return 1
    about = {**environment(), "date": raw["datetime"][:10]}
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
