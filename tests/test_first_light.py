"""tools/first_light.sh on a machine without a GPU, with stand-ins for its commands: whatever goes wrong costs only
itself, and what is known comes back."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from cuda_tools import OPERATOR_TESTS
from test_sim_conformance import CASES

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "first_light.sh"
PARTS = ["facts", "prepare", "probe", "conformance", "families", "layers", "loop", "kernels", "model", "profile"]
PARTS += ["sanitizer"]
LINE = re.compile(r"(ok  |FAIL|TIME|DIED|LOST|----)  (\S+) (.*)")
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout of GNU coreutils")


@cache
def names_of_tests(file: str) -> list[str]:
    """The test functions of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


LOOP = [name.removeprefix("test_") for name in names_of_tests("tests/test_gpu_loop.py")]
PLANTED = {
    "FIRST_LIGHT_HANG": "conformance.5 kernels.all",
    "FIRST_LIGHT_FAULT": "families.layer",
    "FIRST_LIGHT_KILL": "model.fixed",
    "FIRST_LIGHT_FAIL": f"loop.{LOOP[1]}",
}


@dataclass
class Run:
    status: int
    out: Path

    @property
    def summary(self) -> str:
        return (self.out / "summary.txt").read_text()

    @property
    def verdicts(self) -> dict[str, str]:
        """What is said of each case before the summary, which repeats some of it."""
        lines = self.summary.split("== summary")[0].splitlines()
        return {found[2]: found[1].strip() for line in lines if (found := LINE.match(line))}

    @property
    def logs(self) -> dict[str, str]:
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            return {Path(m.name).name: archive.extractfile(m).read().decode() for m in members}  # type: ignore[union-attr]


def environment(out: Path, **settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FIRST_LIGHT", "DGEMMA"))}
    dry = {"FIRST_LIGHT_DRY": "1", "FIRST_LIGHT_LIMIT": "5", "GRACE": "2", "OUT": str(out), "PYTHON": sys.executable}
    return {**inherited, **dry, **settings}


def light(out: Path, **settings: str) -> Run:
    command = ["bash", str(SCRIPT)]
    done = subprocess.run(command, env=environment(out, **settings), capture_output=True, timeout=300, check=False)
    return Run(done.returncode, out)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return light(tmp_path_factory.mktemp("planted"), **PLANTED)


def test_every_part_runs_in_its_order(planted: Run) -> None:
    assert list(dict.fromkeys(name.split(".")[0] for name in planted.verdicts)) == PARTS


def test_each_planted_fault_costs_only_itself(planted: Run) -> None:
    bad = {name: verdict for name, verdict in planted.verdicts.items() if verdict != "ok"}
    assert bad == {
        **dict.fromkeys(PLANTED["FIRST_LIGHT_HANG"].split(), "TIME"),
        "families.layer": "DIED",
        "model.fixed": "DIED",
        PLANTED["FIRST_LIGHT_FAIL"]: "FAIL",
    }


def test_the_summary_is_whole(planted: Run) -> None:
    """The last part repeats what was not ok, and counts."""
    assert planted.status == 1
    last = planted.summary.split("== summary: ")[1]
    good = sum(verdict == "ok" for verdict in planted.verdicts.values())
    assert last.startswith(f"{good} ok, 5 not, in ")
    assert {found[2] for line in last.splitlines() if (found := LINE.match(line))} == {
        name for name, verdict in planted.verdicts.items() if verdict != "ok"
    }


def test_what_comes_back(planted: Run) -> None:
    """A log for each case, and no more files than may come back from a lent machine."""
    assert set(planted.logs) >= {f"{name}.log" for name in planted.verdicts}
    files = {file.name for file in planted.out.iterdir()}
    assert (
        {"summary.txt", "logs.tar.gz"}
        <= files
        <= {*("summary.txt", "logs.tar.gz", "kernels.jsonl", "report.json", "cuda.log", "cores.txt")}
    )


def test_a_process_for_each_case(planted: Run) -> None:
    of_part = {part: [name for name in planted.verdicts if name.startswith(f"{part}.")] for part in PARTS}
    assert len(of_part["conformance"]) == len(CASES)
    assert len(of_part["families"]) == len(OPERATOR_TESTS)
    assert len(of_part["loop"]) == len(LOOP)
    listed = subprocess.run([sys.executable, "tools/host_probe.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert {name.removeprefix("probe.") for name in of_part["probe"]} == {"gpu", "pdl_off", *listed.stdout.split()}


def test_commands_name_files_and_tests_that_exist(planted: Run) -> None:
    commands = [log.split("stand-in for")[0] for log in planted.logs.values()]
    for command in commands:
        for path in re.findall(r"(?:tests|tools|bench)/[\w/]+\.(?:py|sh|cu)", command):
            assert (ROOT / path).exists(), command
        for file, test in re.findall(r"(tests/\w+\.py)::(\w+)", command):
            assert test in names_of_tests(file)
        for file, words in re.findall(r"(tests/\w+\.py) -k '?(\w+)", command):
            assert any(words in test for test in names_of_tests(file)), command
    assert sum("-k" in command for command in commands) >= 14


def test_limits_of_a_part_hold(tmp_path: Path) -> None:
    """A part whose cases all hang ends at its limit, and cases behind the first ones are not begun."""
    hanging = " ".join(f"conformance.{number}" for number in range(len(CASES)))
    run = light(tmp_path, PARTS="conformance layers", FIRST_LIGHT_HANG=hanging, FIRST_LIGHT_LIMIT="1")
    verdicts = [verdict for name, verdict in run.verdicts.items() if name.startswith("conformance.")]
    assert len(verdicts) == len(CASES)
    assert set(verdicts) == {"TIME", "----"}
    layers = {name: verdict for name, verdict in run.verdicts.items() if name.startswith("layers.")}
    assert set(layers) == {"layers.layers", "layers.twice", "layers.puzzles"}


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    run = light(tmp_path, TOTAL="12", PARTS="facts loop")
    assert set(run.verdicts.values()) == {"----"}
    assert {"facts.gpu", "prepare.build", "loop"} <= set(run.verdicts)
    assert "== summary: 0 ok" in run.summary


def test_parts_can_be_chosen_and_without_the_build_others_still_run(tmp_path: Path) -> None:
    run = light(tmp_path, PARTS="facts loop kernels", FIRST_LIGHT_FAIL="prepare.build")
    if any((ROOT / "build" / "gpu" / "site" / "dgemma_ext").glob("_C*.so")):
        pytest.skip("a build for a GPU is there")
    verdicts = {name: verdict for name, verdict in run.verdicts.items() if not name.startswith("facts.")}
    assert verdicts == {"prepare.build": "FAIL", "prepare.dumps": "ok", "loop": "----", "kernels": "----"}
    assert [v for name, v in run.verdicts.items() if name.startswith("facts.")] == ["ok"] * 3


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_was_known(word: signal.Signals, tmp_path: Path) -> None:
    """The archive is packed anew after each part."""
    settings = {"PARTS": "layers loop kernels", "FIRST_LIGHT_HANG": "kernels.all", "FIRST_LIGHT_LIMIT": "20"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=environment(tmp_path, **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run, end = Run(-1, tmp_path), time.monotonic() + 120
    last = f"loop.{LOOP[-1]}.log"
    try:
        while not ((tmp_path / "logs.tar.gz").exists() and last in run.logs):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        process.send_signal(word)
        process.wait(60)
    assert len([name for name in run.verdicts if name.startswith("loop.")]) == len(
        names_of_tests("tests/test_gpu_loop.py")
    )
    assert "layers.layers.log" in run.logs
    assert "== summary" not in run.summary
