"""What `make wheel` refuses to hand out. The wheel itself takes minutes to build, so that is not done here."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

import wheel

NAME = f"dgemma_ext-0.1.0-cp311-abi3-{wheel.PLATFORM}.whl"
FILES = ("dgemma_ext/__init__.py", "dgemma_ext/_C.abi3.so", "dgemma_ext-0.1.0.dist-info/licenses/LICENSE")


def made(folder: Path, files: Iterable[str] = FILES, name: str = NAME, size: int = 8) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(file, b"\0" * size)
    return path


def test_a_good_one_has_no_problem(tmp_path: Path) -> None:
    assert wheel.problems(made(tmp_path)) == []


@pytest.mark.parametrize(("files", "name", "words"), [
    (FILES, NAME.replace("abi3", "cp311"), "its name"),
    (FILES, NAME.replace("many", ""), "its name"),
    ((*FILES, "tests/conftest.py"), NAME, "it installs dgemma_ext, tests"),
    ((*FILES, "dgemma_ext.libs/libcudart.so.13"), NAME, "compiled files"),
    ((FILES[0], FILES[2]), NAME, "compiled files are none"),
    (FILES[:2], NAME, "no licence"),
])  # fmt: skip
def test_what_speaks_against_one(tmp_path: Path, files: tuple[str, ...], name: str, words: str) -> None:
    assert any(words in problem for problem in wheel.problems(made(tmp_path, files, name)))


def test_its_size_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, size=1000)
    monkeypatch.setattr(wheel, "MOST_BYTES", path.stat().st_size - 1)
    assert any("MB, more than" in problem for problem in wheel.problems(path))
    monkeypatch.setattr(wheel, "MOST_BYTES", path.stat().st_size)
    assert wheel.problems(path) == []


def test_symbols_of_a_later_system_are_named() -> None:
    shown = {
        "libc.so.6": ["GLIBC_2.14", "GLIBC_2.28"],
        "libm.so.6": ["GLIBC_2.29"],
        "libstdc++.so.6": ["GLIBCXX_3.4.26"],
    }
    found = wheel.newer_symbols({"versioned_symbols": shown})
    assert found == ["GLIBC_2.29 of libm.so.6", "GLIBCXX_3.4.26 of libstdc++.so.6"]
    assert wheel.newer_symbols({"versioned_symbols": {"libx.so": ["X_1"]}}) == ["X_1 of libx.so"]


def test_the_wheel_has_code_for_every_family_of_gpus() -> None:
    command = " ".join(wheel.wheel_command("nvcc", wheel.ARCHITECTURES, Path("old")))
    assert "DGEMMA_CUDA_ARCHITECTURES=80;86;89;90a;100;120" in command
    assert "DGEMMA_OLD_GLIBC=old" in command
    assert "--no-build-isolation" in command
