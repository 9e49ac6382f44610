"""The memory plan: its bytes are those that a load takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
from checkpoints import make_checkpoint, write_published_layout
from dgemma_ext import _C
from dgemma_ext.checkpoint import ModelConfig, convert, inspect_checkpoint, parse_target, resolve_weights
from dgemma_ext.cli import main
from dgemma_ext.engine import MemoryPlan, mapped_bytes, memory_plan
from dgemma_ext.engine import memory as memory_module
from dgemma_ext.ops.formats import QuantizedWeight

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan_of(folder: Path, weights: str, device: torch.device = CPU, context: int | None = None) -> MemoryPlan:
    config = ModelConfig.from_file(folder)
    info = inspect_checkpoint(folder, config)
    return memory_plan(config, info, resolve_weights(weights), torch.bfloat16, device, context)


def bytes_of(model: dg.DiffusionGemma) -> int:
    """The bytes of the loaded weights, without the layer scalars, which are Python numbers."""
    values = list(vars(model.weights).values())
    for layer in model.weights.layers:
        values += vars(layer).values()
    return sum(value.nbytes for value in values if isinstance(value, Tensor | QuantizedWeight))


@pytest.mark.parametrize("weights", ["auto", "unquantized", "fp8", "int4", "int4-64", "nvfp4"])
def test_the_plan_is_what_is_loaded(weights: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights=weights)
    planned = sum(nbytes for _, nbytes in plan_of(folder, weights).weights.values())
    # The plan leaves out nvfp4's scale of a matrix: four bytes each for an expert's gate, up and down.
    left_out = 3 * 8 * 3 * 4 if weights == "nvfp4" else 0
    scalars = 2 * 3 * 2
    assert planned == bytes_of(model) - left_out + scalars


@pytest.mark.parametrize("to", ["fp8", "int4", "nvfp4"])
def test_a_stored_format_takes_as_much_as_one_made_while_loading(to: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "unquantized", with_tokenizer=False)
    convert(folder, tmp_path / "out", parse_target(to))
    assert plan_of(tmp_path / "out", "auto") == plan_of(folder, to)
    assert plan_of(tmp_path / "out", "unquantized") == plan_of(folder, "auto")


def test_the_published_model_in_4_bits_fits_18_gb(tmp_path: Path) -> None:
    """Text only, a context of 8,192, on a GPU where the build knows the workspaces of its kernels."""
    folder = write_published_layout(tmp_path)
    device = CUDA if _C.has_cuda() else CPU
    plan = plan_of(folder, "int4", device, 8192)
    print(f"\n{plan.table()}")
    assert plan.total <= 18_000_000_000
    assert plan.cache == 25 * 2 * 1023 * 8 * 256 * 2 + 5 * 2 * 8192 * 2 * 512 * 2
    assert plan.logits == 256 * 262_144 * 2
    for weights, least, most in (("auto", 50.4e9, 50.6e9), ("fp8", 25e9, 28e9), ("nvfp4", 16e9, 18e9)):
        total = sum(nbytes for _, nbytes in plan_of(folder, weights, device, 8192).weights.values())
        assert least < total < most, (weights, total)


@pytest.mark.skipif(not _C.has_cuda(), reason="of the CUDA kernels' workspace")
def test_the_workspace_is_that_of_the_format(tmp_path: Path) -> None:
    """A pass of 4,096 positions: 4 bits permute the input, FP8 activations copy input and h with their scales."""
    folder = write_published_layout(tmp_path)
    config = ModelConfig.from_file(folder)
    info = inspect_checkpoint(folder, config)

    def workspace(weights: str, activations: str | None = None) -> int:
        return memory_plan(config, info, resolve_weights(weights), torch.bfloat16, CUDA, 8192, activations).workspace

    unquantized = workspace("auto")
    assert workspace("fp8") == unquantized
    assert 0 < workspace("int4") - unquantized < 2 * 4096 * (8 * 768 + 2816) * 2
    copies = 4096 * (2816 + 8 * 704) + 4 * 4096 * 9
    assert copies <= workspace("fp8", "fp8") - unquantized < copies + 4096


def test_activations_are_planned_for_fp8_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path)
    assert main(["info", str(folder), "--weights", "fp8", "--activations", "fp8"]) == 0
    assert "memory on cpu" in capsys.readouterr().out
    assert main(["info", str(folder), "--weights", "int4", "--activations", "fp8"]) == 2
    assert "these are in int4" in capsys.readouterr().err


def test_a_load_that_does_not_fit_is_refused_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    config = ModelConfig.from_file(folder)
    plan = plan_of(folder, "auto")
    mapped = mapped_bytes(config, inspect_checkpoint(folder, config), "auto", torch.bfloat16)
    # bfloat16 weights stay in the file, so only the rest must fit.
    assert mapped == sum(nbytes for _, nbytes in plan.weights.values())
    loads: list[object] = []
    load = dg.diffusion_gemma.load_weights
    monkeypatch.setattr(dg.diffusion_gemma, "load_weights", lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total - mapped)
    dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    assert len(loads) == 1
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total - mapped - 1)
    with pytest.raises(dg.NotEnoughMemory) as caught:
        dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    assert len(loads) == 1, "nothing is loaded before the refusal"
    assert caught.value.plan == plan
    assert plan.table() in str(caught.value)
    with pytest.raises(dg.NotEnoughMemory):
        dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype="float32")


def test_the_plan_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path)
    assert main(["info", str(folder), "--weights", "int4", "--context", "512"]) == 0
    printed = capsys.readouterr().out
    assert "memory on cpu" in printed
    assert plan_of(folder, "int4", context=512).table() in printed
    assert main(["info", str(folder), "--weights", "int4", "--context", "512", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["checkpoint"]["memory"]
    assert memory["weights"]["experts"]["kept"] == "int4"
    assert memory["total_bytes"] == plan_of(folder, "int4", context=512).total
    assert main(["info", str(folder), "--weights", "int5"]) == 2
    assert "weights must be one of auto, unquantized, fp8" in capsys.readouterr().err
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 1)
    assert main(["generate", str(folder), "hello", "--weights", "int4"]) == 1
    assert plan_of(folder, "int4").table() in capsys.readouterr().err


def test_available_bytes() -> None:
    free = memory_module.available_bytes(CPU)
    assert free is None or 2**20 < free < 2**50
