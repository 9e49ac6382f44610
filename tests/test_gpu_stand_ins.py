"""What a run on a GPU alone calls, here with the CPU in the GPU's place: a first run must not fail on its own tests."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from test_gpu_model import check_layers

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def test_layers_agree_with_a_copy() -> None:
    check_layers("cpu")


@pytest.mark.parametrize("file", sorted(BENCH.glob("*.py")), ids=lambda file: file.stem)
def test_what_a_bench_names_of_a_module_is_there(file: Path) -> None:
    """Most run on a GPU alone, and type checking does not see them."""
    if file.stem == "conftest":
        pytest.skip("pytest's own")
    module = importlib.import_module(file.stem)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = getattr(module, node.value.id, None)
            if isinstance(named, ModuleType):
                assert hasattr(named, node.attr), f"{file.name}:{node.lineno}: {node.value.id}.{node.attr}"
