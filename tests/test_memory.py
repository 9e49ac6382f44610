"""The memory plan: its bytes are those that a load takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext import _C
from dgemma_ext.checkpoint import ModelConfig, convert, inspect_checkpoint, parse_target, resolve_weights
from dgemma_ext.checkpoint.vision_config import VisionConfig
from dgemma_ext.cli import main
from dgemma_ext.engine import MemoryPlan, batch_plan, check_memory, cuda_graphs, mapped_bytes, memory_plan
from dgemma_ext.engine import groups as groups_module
from dgemma_ext.engine import memory as memory_module
from dgemma_ext.engine.gpu_memory import cublas_workspace_bytes, unused_in_pools
from dgemma_ext.model.vision import PromptImage, VisionTower, resolve_images, tower_workspace_bytes
from dgemma_ext.ops.formats import QuantizedWeight
from dgemma_ext.ops.weights import linear
from dgemma_ext.units import format_bytes
from models import random_model
from pictures import gradient
from published_layout import write_published_layout
from test_vision_tower import SMALL, tensors_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan_of(
    folder: Path, weights: str, device: torch.device = CPU, context: int | None = None, images: str | bool = "auto"
) -> MemoryPlan:
    config = ModelConfig.from_file(folder)
    info = inspect_checkpoint(folder, config)
    vision = resolve_images(images, info, config)
    return memory_plan(config, info, resolve_weights(weights), torch.bfloat16, device, context, vision=vision)


def bytes_of(model: dg.DiffusionGemma) -> int:
    """The bytes of the loaded weights, without the layer scalars, which are Python numbers."""
    values = list(vars(model.weights).values())
    for layer in model.weights.layers:
        values += vars(layer).values()
    tower = 0 if model.vision is None else model.vision.tower.nbytes
    return tower + sum(value.nbytes for value in values if isinstance(value, Tensor | QuantizedWeight))


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


def test_the_tower_is_planned(tmp_path: Path) -> None:
    """Its bytes, what stays in its file, and the memory that its operators ask for, for the largest image."""
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    with_tower, without = (plan_of(folder, "auto", images=images) for images in ("auto", False))
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    assert model.vision is not None
    tower = model.vision.tower
    assert with_tower.weights["vision"] == ("bfloat16", tower.nbytes)
    assert "vision" not in without.weights
    assert with_tower.total > without.total + tower.nbytes
    assert "vision weights" in with_tower.table()
    config = ModelConfig.from_file(folder)
    stored = mapped_bytes(config, inspect_checkpoint(folder, config), "auto", torch.bfloat16, tower.config)
    assert stored - mapped_bytes(config, inspect_checkpoint(folder, config), "auto", torch.bfloat16) == tower.nbytes


@pytest.mark.parametrize("widths", [(64, 96, 2), (256, 1536, 2), (256, 64, 24)], ids=["entry", "MLP", "attention"])
def test_the_tower_s_workspace_is_what_it_takes(widths: tuple[int, int, int]) -> None:
    """The largest sum of tensors at a time, beside weights and input. Each width makes another part the largest."""
    sizes = dict(zip(("hidden_size", "intermediate_size", "num_attention_heads"), widths, strict=True))
    config = VisionConfig.from_dict({**SMALL, **sizes, "num_key_value_heads": widths[-1]})
    tower = VisionTower.from_tensors(config, tensors_of(config, torch.bfloat16))
    image = PromptImage(gradient(14 * 48, 20 * 48)).patches  # 280 soft tokens
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        tower.features(image)
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    planned = tower_workspace_bytes(config, torch.bfloat16, 280)
    on_cpu = planned - image.pixels.nbytes  # where the pixels lie already
    assert 0.7 * on_cpu < most < planned


def test_the_published_model_in_4_bits_fits_18_gb(tmp_path: Path) -> None:
    """Text only, a context of 8,192, on a GPU where the build knows the workspaces of its kernels."""
    folder = write_published_layout(tmp_path)
    device = CUDA if _C.has_cuda() else CPU
    plan = plan_of(folder, "int4", device, 8192, images=False)
    print(f"\n{plan.table()}")
    assert plan.total <= 18_000_000_000
    assert plan.cache == 25 * 2 * 1023 * 8 * 256 * 2 + 5 * 2 * 8192 * 2 * 512 * 2
    assert plan.logits == 256 * 262_144 * 2
    for weights, least, most in (("auto", 50.4e9, 50.6e9), ("fp8", 25e9, 28e9), ("nvfp4", 16e9, 18e9)):
        total = sum(nbytes for _, nbytes in plan_of(folder, weights, device, 8192, False).weights.values())
        assert least < total < most, (weights, total)


@pytest.mark.skipif(not _C.has_cuda(), reason="of the CUDA kernels' workspace")
def test_the_workspace_is_that_of_the_format(tmp_path: Path) -> None:
    """A pass of 4,096 positions: 4 bits permute the input; activations of FP8 and of INT8 are copies of input and h
    with their scales."""
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
    assert copies <= workspace("int8") - unquantized < copies + 4096


def test_the_workspace_of_dense_products_is_planned(tmp_path: Path) -> None:
    """INT8 rounds the rows that a dense product multiplies into its workspace. Here the MLP's last product takes more
    than experts or attention do: 4,096 rows of 4,096 values, as much as torch's allocator hands out for them."""
    folder = make_checkpoint(tmp_path, intermediate=4096, top_k=1, with_tokenizer=False)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights="int8")
    rows = torch.randn(4096, 4096, dtype=torch.bfloat16)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        linear(rows, model.weights.layers[0].down_proj)
    events = profiler.profiler.kineto_results.events()
    taken = sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
    of_rows = 4096 * 2 * (6 * 64 + 3 * 4096 + 2 * (4 + 2) * 32)
    planned = {weights: plan_of(folder, weights, CPU, 4096).workspace for weights in ("auto", "int8")}
    assert planned["int8"] == of_rows + taken[-1] > planned["auto"]
    loaded, plain = (
        batch_plan(one.network, 1, one.config.canvas_length, 4096, 1).workspace
        for one in (model, dg.DiffusionGemma.from_pretrained(folder, device="cpu"))
    )
    assert loaded - plain == planned["int8"] - planned["auto"]


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
    info = inspect_checkpoint(folder, config)
    mapped = mapped_bytes(config, info, "auto", torch.bfloat16, resolve_images("auto", info, config))
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


# What a GPU takes besides -------------------------------------------------------------------------------------------

MIB = 2**20


def as_seen(plan: MemoryPlan) -> dict[str, int]:
    return {purpose: nbytes for purpose, _, nbytes in plan.rows()}


@pytest.mark.skipif(not _C.has_cuda(), reason="steps are captured where the build has CUDA kernels")
def test_captured_steps_and_workspaces_of_cublas_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the published size, a step of a canvas of 256: six rows of hidden size, three of the dense MLP and two times
    the projections of a full layer for each position, beside the largest workspace of an operator."""
    folder = write_published_layout(tmp_path)
    monkeypatch.delenv("DGEMMA_KERNELS", raising=False)
    monkeypatch.delenv("DGEMMA_SYNC", raising=False)
    found, on_cpu = plan_of(folder, "auto", CUDA, 8192), plan_of(folder, "auto", CPU, 8192)
    # Of a captured step: for each of 256 positions six rows of hidden size, three of the dense MLP, and the projections
    # of a full layer twice; and what sorting the experts' pairs takes, or the slices of a long prefix.
    rows = 256 * (6 * 2816 + 3 * 2112 + 2 * (16 + 2 * 2) * 512) * 2
    assert rows < found.graphs < rows + 64 * MIB
    assert found.cublas == 3 * 32 * MIB
    assert found.total == sum(nbytes for purpose, nbytes in as_seen(found).items() if purpose != "total")
    assert as_seen(found)["graphs"] == found.graphs
    assert (on_cpu.graphs, on_cpu.cublas) == (0, 0)
    assert not {"graphs", "cuBLAS", "prefix cache"} & as_seen(on_cpu).keys()
    monkeypatch.setenv("DGEMMA_SYNC", "1")
    launched = plan_of(folder, "auto", CUDA, 8192)
    assert (launched.graphs, launched.cublas) == (0, 32 * MIB)
    assert "workspaces of one stream" in launched.table()


class Gpu:
    """A GPU of compute capability 8.9 with 20 GiB, in place of torch.cuda: another process uses 5 of them; torch has
    reserved 3, of which tensors use 1, and 300 MiB are left in pools of graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools = {(0, 0): (2 * 1024, 800), (0, 7): (700, 500), (3, 1): (324, 224)}
        stand_ins = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_capability": lambda device: (8, 9),
            "mem_get_info": lambda device: (12 * 1024 * MIB, 20 * 1024 * MIB),
            "memory_reserved": lambda device: sum(total for total, _ in self.pools.values()) * MIB,
            "memory_allocated": lambda device: sum(used for _, used in self.pools.values()) * MIB,
            "memory_snapshot": self.segments,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def segments(self) -> list[dict[str, object]]:
        here = [
            {"device": 0, "segment_pool_id": pool, "total_size": total * MIB, "allocated_size": used * MIB}
            for pool, (total, used) in self.pools.items()
        ]
        return [*here, {"device": 1, "segment_pool_id": (0, 7), "total_size": 9 * MIB, "allocated_size": 0}]


def test_memory_that_only_captures_can_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    assert memory_module.available_bytes(CUDA) == (12 * 1024 + 2048 - 800) * MIB
    assert unused_in_pools(CUDA) == {(0, 7): 200 * MIB, (3, 1): 100 * MIB}
    assert cublas_workspace_bytes(CUDA) == 8_519_680


@pytest.mark.parametrize("graphs", [150, 250])
def test_later_graphs_use_the_pool_of_earlier_ones(graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    device = torch.device("cuda", 0)
    free = memory_module.available_bytes(device)
    assert free is not None
    plan = MemoryPlan({}, cache=free, workspace=0, logits=0, context=9, graphs=graphs * MIB, cublas=3, streams=3)
    with pytest.raises(dg.NotEnoughMemory, match="cuBLAS"):
        check_memory(plan, 0, device)
    monkeypatch.setattr(cuda_graphs, "_places", {device: SimpleNamespace(pool=(0, 7))})
    beyond = max(0, graphs - 200) * MIB
    check_memory(replace(plan, cache=free - beyond), 0, CUDA)
    with pytest.raises(dg.NotEnoughMemory):
        check_memory(replace(plan, cache=free - beyond + 1), 0, CUDA)
    gpu.pools[0, 7] = (700, 700)
    with pytest.raises(dg.NotEnoughMemory):
        check_memory(replace(plan, cache=free - beyond), 0, device)


def test_a_scheduler_makes_sure_that_graphs_and_the_prefix_cache_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr(groups_module, "can_capture", lambda network: True)
    length = model.config.canvas_length
    slot, budget = model.new_cache(1, 100).nbytes, 123_456
    assert model.vision is not None
    vision = model.vision.tower.config
    plan = batch_plan(model.network, 4, length, 100, slots=3, captured=True, prefix_cache_bytes=budget, vision=vision)
    assert plan.cache == 3 * slot
    assert plan.prefix_cache == budget
    without = batch_plan(model.network, 4, length, 100, slots=3, vision=vision)
    assert plan.total == without.total + budget + plan.graphs
    assert plan.graphs > 0
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: plan.total - 1)
    with pytest.raises(dg.NotEnoughMemory) as caught:
        dg.Scheduler(model, 3, 100, batched=True, make_runner=cuda_graphs.cuda_runner, prefix_cache_bytes=budget)
    assert caught.value.plan == plan
    assert "prefix cache" in str(caught.value)
    dg.Scheduler(model, 3, 100, batched=True, prefix_cache_bytes=budget)
    # Where requests take turns, the budget alone is looked at.
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: budget - 1)
    with pytest.raises(dg.NotEnoughMemory, match="prefix cache"):
        dg.Scheduler(model, 3, 100, batched=False, prefix_cache_bytes=budget)
    dg.Scheduler(model, 3, 100, batched=False, prefix_cache_bytes=budget - 1)


def test_a_chat_has_room_for_four_slots() -> None:
    model = random_model()
    prefixes = model.chat(max_length=400)._scheduler.prefix_cache
    assert prefixes is not None
    assert prefixes.max_bytes == 4 * model.new_cache(1, 400).nbytes
    without_length = model.chat()._scheduler
    assert without_length.prefix_cache is not None
    assert without_length.prefix_cache.max_bytes == 4 * without_length.cache.nbytes


def test_info_tells_what_a_chat_takes_besides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path)
    plan = plan_of(folder, "auto", context=64)
    assert main(["info", str(folder), "--context", "64"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("for a chat besides")]
    assert line.endswith(f" {format_bytes(4 * plan.cache)}")
    assert "  up to 4 slots  " in line
    assert main(["info", str(folder), "--context", "64", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["checkpoint"]["memory"]
    assert memory["chat_snapshots_bytes"] == 4 * plan.cache
    assert (memory["graphs_bytes"], memory["cublas_bytes"]) == (0, 0)


def test_available_bytes() -> None:
    free = memory_module.available_bytes(CPU)
    assert free is None or 2**20 < free < 2**50
