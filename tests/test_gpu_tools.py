"""What prepares, probes and times a GPU, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_build
import gpu_check
import gpu_session
import host_probe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import first_light  # noqa: E402
import gpu_clock  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def run(*words: str | Path, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=300)


# A build that was carried ---------------------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """A folder like build/carry, with this build's own module, whatever GPU it is for."""
    from dgemma_ext import _C

    folder = tmp_path / "carry"
    (folder / "site" / "dgemma_ext").mkdir(parents=True)
    (folder / "site" / "dgemma_ext" / Path(_C.__file__).name).symlink_to(_C.__file__)
    (folder / "probe").write_text("a program")
    (folder / gpu_build.DIGEST).write_text(gpu_build.digest_of_sources() + "\n")
    return folder


def test_a_build_that_fits_is_taken(carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "LOADS", "from dgemma_ext import _C; assert 'place' in _C.__file__, _C.__file__")
    # -S: the editable installation of this environment would come first.
    monkeypatch.setattr(gpu_build.sys, "executable", str(_python_without_site(tmp_path)))
    assert gpu_build.take(carried, tmp_path / "place") is None
    assert os.access(tmp_path / "place" / "probe", os.X_OK)
    assert not (tmp_path / "place" / "conformance").exists()
    assert (tmp_path / "place" / "site" / "dgemma_ext" / "version.py").exists()


def _python_without_site(folder: Path) -> Path:
    """This Python, without what its environment puts before PYTHONPATH."""
    torch_folder = Path(torch.__file__).parent.parent
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{torch_folder}" exec "{sys.executable}" -S "$@"\n')
    script.chmod(0o755)
    return script


def test_a_build_that_does_not_fit_is_not_taken(carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_build.take(tmp_path / "nowhere", tmp_path / "place") == f"{tmp_path / 'nowhere'} is not there"
    monkeypatch.setattr(gpu_build, "LOADS", "raise ImportError('another Python')")
    problem = f"the module in {carried} does not load: ImportError: another Python"
    assert gpu_build.take(carried, tmp_path / "place") == problem
    (carried / gpu_build.DIGEST).write_text("another\n")
    assert gpu_build.take(carried, tmp_path / "place") == f"{carried} is of other sources"


def test_nothing_is_built_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done = run("tools/gpu_build.py", tmp_path, "--carried", tmp_path / "carry", PATH="/nowhere")
    assert done.returncode == 2
    assert done.stdout == f"{tmp_path / 'carry'} is not there: building\n"
    assert "was" in done.stderr
    assert not (tmp_path / "site").exists()


# Limits ---------------------------------------------------------------------------------------------------------------


def test_a_command_ends_at_its_limit_with_all_that_it_started(
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    assert not gpu_check.run("hangs", [sys.executable, "-c", program], 5)
    said = capfd.readouterr().out
    assert "== hangs: ended at its limit in" in said
    started = next(int(line) for line in said.splitlines() if line.isdigit())
    state = Path(f"/proc/{started}/stat")
    for _ in range(100):  # the kernel ends a killed process in its own time
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {started} still runs")


def test_a_session_that_dies_goes_on_behind_that_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second test ends its process; the third finds that the GPU can no longer be used; the fourth is fine."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_four.py").write_text(
        "import os, torch\n"
        "def test_one(): pass\n"
        "def test_two(): os._exit(3)\n"
        "def test_three(monkeypatch):\n"
        "    def lost(): raise RuntimeError('an illegal memory access\\nwords')\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost\n"
        "    raise AssertionError('a wrong number')\n"
        "def test_four(): pass\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    arguments = ["-p", "gpu_session", "-c", os.devnull, "--rootdir", str(tmp_path), "-q"]
    monkeypatch.setenv("PYTHONPATH", path)
    assert not gpu_check.run_tests("four", "test_four.py", 240, arguments, {})
    said = capfd.readouterr().out
    assert "== four: status 3" in said
    assert "a wrong number" in said
    assert "can no longer be used after tests/test_four.py::test_three: an illegal memory access" in said
    assert said.count("== four, the rest of it: ") == 2
    assert "1 passed, 3 deselected" in said
    begun = (tmp_path / "tests_begun").read_text().splitlines()
    assert [line.split("::")[-1] for line in begun] == ["test_one", "test_two", "test_three", "test_four", "finished"]


def test_a_test_that_hangs_is_asked_where_its_kernels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_COREDUMP_PIPE", str(tmp_path / "pipe.%p"))
    monkeypatch.delenv("DGEMMA_TESTS_BEGUN", raising=False)
    monkeypatch.setattr(gpu_session, "HANGS_AFTER_SECONDS", 0.01)
    pipe = tmp_path / f"pipe.{os.getpid()}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        gpu_session.pytest_runtest_logstart("tests/test_that_hangs.py")
        assert gpu_session._timer is not None
        gpu_session._timer.join(60)
        assert os.read(reader, 10) == b"0"
    finally:
        os.close(reader)
    gpu_session._ask_for_dump(str(tmp_path / "no_pipe"))  # without a driver that reads


def test_gpu_check_wants_a_gpu() -> None:
    done = run("tools/gpu_check.py")
    assert done.returncode == 1
    assert done.stderr.startswith("gpu-check: no NVIDIA GPU is visible to torch")


def test_the_parts_are_those_that_are_described() -> None:
    described = [line.split()[0] for line in (gpu_check.__doc__ or "").splitlines() if line.startswith("    ")]
    assert described[2:] == [*gpu_check.PARTS, *gpu_check.NAMED_ONLY]


def test_every_piece_of_the_host_probe_says_what_it_tries() -> None:
    assert len(host_probe.PIECES) >= 10
    assert all(piece.__doc__ for piece in host_probe.PIECES.values())
    assert host_probe.main(["no_such_piece"]) == 2
    done = run("tools/host_probe.py", "capture")
    assert (done.returncode, done.stdout) == (2, "host_probe: no GPU is visible to torch\n")


# Times ----------------------------------------------------------------------------------------------------------------


def lines_of(file: Path) -> dict[str, dict[str, Any]]:
    return {line["kernel"]: line for line in map(json.loads, file.read_text().splitlines())}


def test_rounds_in_which_the_host_was_late_do_not_count() -> None:
    late, hidden = (60.0, 500.0), (10.0, 40.0)
    assert gpu_clock.of_rounds([late, hidden, hidden], busy=100.0) == gpu_clock.Timing(10.0, 40.0, True)
    assert gpu_clock.of_rounds([late, late, hidden], busy=100.0) == gpu_clock.Timing(60.0, 500.0, False)


def test_the_gpu_is_busy_when_a_call_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is the GPU's work: between the events it never waits for the host."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, _end: object) -> float:
            return 0.5

    busy: list[int] = []

    def sleep(cycles: int) -> None:
        log.append("busy")
        busy.append(cycles)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(gpu_clock, "_flush", lambda: log.append("flush"))
    monkeypatch.setattr(gpu_clock, "_cycles_per_microsecond", lambda: 1000.0)

    def call() -> None:
        log.append("call")
        time.sleep(0.002)

    found = gpu_clock.timed(call, rounds=2)
    assert log[-14:] == ["wait", "flush", "busy", "event", "call", "event", "wait"] * 2
    assert found.microseconds == 500.0
    assert found.hidden
    assert min(busy) >= 2_000 * 1000 * gpu_clock.HOST_FACTOR, "longer than the host takes to queue the call"


def test_every_kernel_has_a_line(tmp_path: Path) -> None:
    done = run("bench/first_light.py", "--small", "--out", tmp_path / "kernels.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines_of(tmp_path / "kernels.jsonl")
    names = run("bench/first_light.py", "--small", "--list").stdout.split()
    assert list(found) == names
    assert names[:2] == ["experts_bf16_128", "experts_bf16_84"]
    for line in found.values():
        assert line["us"] > 0
        assert line["bytes"] > 0
        assert line.get("distance", 0.0) < 0.02, line


def test_a_kernel_that_dies_or_hangs_costs_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--small", "--only", "dense", "--seconds", "60", "--out", tmp_path / "kernels.jsonl"]
    done = run("bench/first_light.py", *words, FIRST_LIGHT_KERNEL_DIES="dense_o")
    assert done.returncode == 1
    found = lines_of(tmp_path / "kernels.jsonl")
    assert list(found) == ["dense_q", "dense_o", "dense_gate", "dense_down"]
    assert [name for name, line in found.items() if "error" in line] == ["dense_o"]
    assert "its process ended with -6" in found["dense_o"]["error"]

    monkeypatch.setenv("FIRST_LIGHT_KERNEL_HANGS", "dense_q")
    monkeypatch.setattr(first_light, "STARTING_SECONDS", 120.0)
    lines = first_light.measured(["dense_q"], 2.0, "small")
    assert list(lines) == [{"kernel": "dense_q", "error": "not ended after 2 s"}]


def test_no_kernel_is_timed_at_full_size_without_a_gpu() -> None:
    done = run("bench/first_light.py", "--only", "dense")
    assert done.returncode == 1
    assert done.stdout.startswith("all ")
    assert done.stdout.count("no GPU is visible to torch") == 1
