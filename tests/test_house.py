"""The rooms of the package: which may import which, and that no import goes around the contracts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "dgemma_ext"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of pyproject.toml on the package in `folder`/python."""
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        f"sys.path.insert(0, {str(folder / 'python')!r})\n"
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_imports_run_one_way() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("sampling/canvas.py", "from dgemma_ext.engine import Request", "Imports run from the higher room"),
        ("checkpoint/stored.py", "from dgemma_ext.checkpoint.files import CheckpointInfo", "No circle inside a room"),
    ],
)
def test_an_import_upwards_or_in_a_circle_is_found(file: str, line: str, contract: str, tmp_path: Path) -> None:
    """Under TYPE_CHECKING too."""
    for source in PACKAGE.rglob("*.py"):
        copy = tmp_path / "python" / "dgemma_ext" / source.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    changed = tmp_path / "python" / "dgemma_ext" / file
    changed.write_text(changed.read_text() + f"\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert re.search(f"{contract}.* BROKEN", result.stdout)


def test_nothing_inside_imports_the_face_of_the_package() -> None:
    """`from dgemma_ext import ...` is for the compiled module and for rooms."""
    rooms = {path.stem for path in PACKAGE.iterdir()} | {"_C"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "dgemma_ext":
                assert {name.name for name in node.names} <= rooms, file
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import"


# What makes tensors on the default device, and of these what has the default dtype, if they are not named.
MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros"}
FLOATS = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}


def test_no_tensor_is_made_on_the_program_s_default_device_or_in_its_default_dtype() -> None:
    """Both belong to the program around the package. (Code inside transformers' models goes by theirs.)"""
    made = 0
    for file in PACKAGE.rglob("*.py"):
        if "integrations" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
                continue
            if called.value.id != "torch" or called.attr not in MAKERS:
                continue
            assert isinstance(node, ast.Call)
            wanted = {"device", "dtype"} if called.attr in FLOATS else {"device"}
            named = {keyword.arg for keyword in node.keywords}
            assert wanted <= named, f"{file}:{node.lineno}: torch.{called.attr} names no {wanted - named}"
            made += 1
    assert made > 20, "torch's functions are called by other names"
