"""What a run on a GPU alone calls, here with the CPU in the GPU's place: a first run must not fail on its own tests."""

from __future__ import annotations

import ast
import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dgemma_ext as dg
import test_gpu_loop
from dgemma_ext import demo
from test_gpu_model import check_adapters, check_layers, check_loading
from test_gpu_residency import call_all

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def test_layers_agree_with_a_copy() -> None:
    check_layers("cpu")


def test_products_are_called() -> None:
    assert call_all("cpu") == []


def test_weights_are_those_of_a_load_to_the_cpu() -> None:
    check_loading("cpu")


def test_requests_with_adapters_are_the_same_alone_and_in_a_batch() -> None:
    check_adapters("cpu")


def on_the_cpu(batch_invariant: bool = True) -> dg.DiffusionGemma:
    """Products of the CPU are invariant in either case."""
    return dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")


def test_the_tests_of_the_loop_pass_where_all_drivers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_gpu_loop, "model", on_the_cpu)
    test_gpu_loop.test_the_same_tokens_by_every_driver_alone(True)
    test_gpu_loop.test_the_same_tokens_by_every_driver_in_a_batch(3, False)
    test_gpu_loop.test_rules_of_every_request_hold_in_captured_steps(True)
    test_gpu_loop.test_grammars_of_every_request_hold_in_captured_steps(True)
    for name, stand_in in (("synchronize", lambda: None), ("Stream", object), ("stream", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    test_gpu_loop.test_schedulers_of_two_streams_and_threads_take_turns()
    with pytest.raises(AssertionError, match="cuBLAS is not the reason"):
        test_gpu_loop.assert_same({"eager": 1, "async": 2, "graph": 2}, batch_invariant=True)
    with pytest.raises(AssertionError, match="as with torch's products it may"):
        test_gpu_loop.assert_same({"eager": 1, "async": 2, "graph": 2}, batch_invariant=False)
    with pytest.raises(AssertionError):
        test_gpu_loop.assert_same({"eager": 1, "async": 1, "graph": 2}, batch_invariant=False)


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
