"""Loading to a GPU, with the CPU in its place: two buffers, threads that read, copies that come late, checks behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import (
    MappedFiles,
    ModelConfig,
    WeightReader,
    device_reading,
    inspect_checkpoint,
    resolve_weights,
    staging,
)
from dgemma_ext.model import ModelWeights, load_weights
from dgemma_ext.ops.formats import QuantizedWeight
from quantized_checkpoints import requantize

CPU = torch.device("cpu")
LAYER_0 = "model.decoder.layers.0."


class Gpu:
    """The CPU as a GPU that is late: a copy is made when an event behind it is waited for, or when work is queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late: list[tuple[Tensor, Tensor]] = []
        self.most_late = 0
        self.pinned: list[int] = []
        self.readers: set[str] = set()
        self.spoil: Callable[[Tensor], None] = lambda target: None
        gpu, flush, read = self, staging.StagedCopies.flush, staging._read_exactly

        class Event:
            def __init__(self) -> None:
                self.behind: list[tuple[Tensor, Tensor]] = []

            def record(self, stream: object) -> None:
                assert stream == "the stream of cpu"
                self.behind = list(gpu.late)

            def synchronize(self) -> None:
                gpu.make([one for one in self.behind if any(one is late for late in gpu.late)])

        def pinned(nbytes: int) -> Tensor:
            assert self.current == [CPU], "of the GPU that is loaded to"
            self.pinned.append(nbytes)
            return torch.full((nbytes,), 0xAB, dtype=torch.uint8)

        def copy(copies: staging.StagedCopies, target: Tensor, source: Tensor) -> None:
            self.late.append((target, source))
            self.most_late = max(self.most_late, len(self.late))

        def flushed(copies: staging.StagedCopies) -> None:
            flush(copies)
            self.make(list(self.late))

        def noted(*operands: Any) -> None:
            self.readers.add(threading.current_thread().name)
            read(*operands)

        self.current: list[torch.device] = []

        class Current:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def __enter__(self) -> None:
                gpu.current.append(self.device)

            def __exit__(self, *_: object) -> None:
                gpu.current.pop()

        monkeypatch.setattr(torch.cuda, "device", Current)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
        monkeypatch.setattr(staging, "_pinned", pinned)
        monkeypatch.setattr(staging, "_read_exactly", noted)
        monkeypatch.setattr(staging.StagedCopies, "_copy", copy)
        monkeypatch.setattr(staging.StagedCopies, "flush", flushed)
        monkeypatch.setattr(device_reading, "is_in_main_memory", lambda device: False)

    def make(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in copies:
            target.copy_(source)
            self.spoil(target)
        self.late = [one for one in self.late if not any(one is made for made in copies)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def load(folder: Path, weights: str = "auto", dtype: torch.dtype = torch.bfloat16, **options: Any) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_file(folder), dtype, CPU, weights=resolve_weights(weights), **options)


def tensors_of(weights: ModelWeights) -> dict[str, Tensor]:
    """Every tensor, those of quantized weights apart, by a name."""
    found: dict[str, Tensor] = {}
    records = {"": weights, **{f"{number}.": layer for number, layer in enumerate(weights.layers)}}
    for prefix, record in records.items():
        for field in fields(record):
            value = getattr(record, field.name)
            parts = value.tensors() if isinstance(value, QuantizedWeight) else {"": value}
            for part, tensor in parts.items():
                if isinstance(tensor, Tensor | float):
                    found[f"{prefix}{field.name} {part}"] = torch.as_tensor(tensor)
    return found


def assert_same(one: ModelWeights, other: ModelWeights) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor, theirs[name]), name


def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor passes through many, and every read is several."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(staging, "READ_BYTES", 300)
    monkeypatch.setattr(device_reading, "CHUNK_ELEMENTS", 777)


def stored(folder: Path, layout: str) -> Path:
    made = make_checkpoint(folder, with_tokenizer=False, dtype=torch.float32 if layout == "float32" else torch.bfloat16)
    if layout == "mixed":
        requantize(made, "fp8", rf"{LAYER_0}experts\.[135]\.\w+\.weight")
    elif layout == "one by one":
        requantize(made, "fp8", "none")
    elif layout == "scales of several kinds":
        requantize(made, "fp8")
        name = f"{LAYER_0}experts.2.up_proj.weight_scale"
        change(made, name, load_file(made / "model.safetensors")[name].float())
    elif layout not in ("bfloat16", "float32"):
        requantize(made, layout)
    return made


LAYOUTS = ["bfloat16", "float32", "one by one", "mixed", "fp8", "scales of several kinds", "int4", "nvfp4"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "nvfp4-modelopt"])
def test_the_same_weights_as_on_the_cpu(layout: str, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path / "checkpoint", layout)
    asked = ["auto", "unquantized"] if layout not in ("bfloat16", "one by one") else ["auto", "int4"]
    with monkeypatch.context() as patch:
        patch.setattr(device_reading, "is_in_main_memory", lambda device: True)
        wanted = [load(folder, weights) for weights in asked]
    assert gpu.pinned == []
    for weights, right in zip(asked, wanted, strict=True):
        assert_same(load(folder, weights), right)
    small_buffers(monkeypatch)
    assert_same(load(folder, asked[0]), wanted[0])
    assert gpu.most_late > 1, "copies must have been late"


def test_two_buffers_serve_a_load_and_several_threads_read(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    info = inspect_checkpoint(folder, ModelConfig.from_file(folder))
    moved: list[int] = []
    small_buffers(monkeypatch)
    with MappedFiles(info) as files, device_reading.weight_reader(files, torch.bfloat16, CPU, moved.append) as reader:
        for weight in info.weights.values():
            reader.read(weight)
    assert gpu.pinned == [1000, 1000]
    assert len(gpu.readers) > 1
    assert all(name.startswith("checkpoint") for name in gpu.readers)
    assert sum(moved) == info.loaded_bytes
    assert max(moved) == 1000
    assert gpu.late == []


def test_the_cpus_weights_stay_in_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    info = inspect_checkpoint(folder, ModelConfig.from_file(folder))
    monkeypatch.setattr(device_reading, "StagedCopies", None)
    with MappedFiles(info) as files, device_reading.weight_reader(files, torch.bfloat16, CPU, lambda n: None) as reader:
        assert isinstance(reader, WeightReader)
    assert not device_reading.is_in_main_memory(torch.device("cuda"))


def test_without_pinned_memory_copies_are_made_from_other(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: operation not supported")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert staging._pinned(10).shape == (10,)


# Faults ---------------------------------------------------------------------------------------------------------------


def change(folder: Path, name: str, tensor: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert name in tensors
    tensors[name] = tensor
    save_file(tensors, folder / "new", {"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")


def with_value(tensor: Tensor, position: tuple[int, ...], value: Any) -> Tensor:
    changed = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    changed[position] = value
    return tensor


FAULTS = [
    ("bfloat16", "model.decoder.embed_tokens.weight", (511, 63), float("nan"), r"has nan at \[511, 63\]"),
    ("float32", f"{LAYER_0}experts.down_proj", (3, 0, 31), float("-inf"), r"has -inf at \[3, 0, 31\]"),
    ("float32", f"{LAYER_0}mlp.up_proj.weight", (5, 7), 3.4e38, r"has inf at \[5, 7\], read as torch.bfloat16"),
    ("one by one", f"{LAYER_0}experts.6.up_proj.weight", (1, 2), float("inf"), r"has inf at \[1, 2\]"),
    ("mixed", f"{LAYER_0}experts.2.up_proj.weight", (1, 2), float("inf"), r"has inf at \[1, 2\]"),
    ("mixed", f"{LAYER_0}experts.3.up_proj.weight", (1, 2), 0xFF, r"has nan at \[1, 2\]"),
    ("fp8", f"{LAYER_0}experts.7.down_proj.weight", (3, 4), 0x7F, r"has nan at \[3, 4\]"),
    ("fp8", f"{LAYER_0}self_attn.q_proj.weight_scale", (3, 0), float("inf"), r"has a scale of inf at \[3, 0\]"),
    ("nvfp4", f"{LAYER_0}experts.4.up_proj.weight_global_scale", (0,), 0.0, r"has a scale of 0\.0 at \[0\]"),
    ("int4", f"{LAYER_0}experts.1.gate_proj.weight_scale", (2, 1), float("nan"), r"has a scale of nan at \[2, 1\]"),
    ("nvfp4", f"{LAYER_0}experts.4.up_proj.weight_global_scale", (0,), float("inf"), r"has a scale of inf at \[0\]"),
    ("bfloat16", "model.encoder.language_model.layers.1.layer_scalar", (0,), float("nan"), "has nan"),
]


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """No thread and no open file of a load that failed."""
    files = set(os.listdir("/proc/self/fd"))
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")] == []
    assert set(os.listdir("/proc/self/fd")) <= files


@pytest.mark.usefixtures("gpu", "nothing_stays")
@pytest.mark.parametrize(("layout", "name", "position", "value", "match"), FAULTS)
def test_a_fault_is_told_with_its_tensor_and_place(
    layout: str,
    name: str,
    position: tuple[int, ...],
    value: Any,
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = stored(tmp_path / "checkpoint", layout)
    change(folder, name, with_value(load_file(folder / "model.safetensors")[name], position, value))
    told = []
    for in_main_memory in (False, True):
        monkeypatch.setattr(device_reading, "is_in_main_memory", lambda device, here=in_main_memory: here)
        with pytest.raises(dg.CheckpointError, match=match) as caught:
            load(folder)
        assert caught.value.tensor == name
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.usefixtures("gpu")
def test_huge_finite_weights_are_no_fault(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    change(folder, "model.decoder.norm.weight", torch.full((64,), 3e38, dtype=torch.bfloat16))
    assert float(load(folder).norm[0]) == pytest.approx(3e38, rel=0.01)


@pytest.mark.usefixtures("gpu", "nothing_stays")
@pytest.mark.parametrize("fault", ["shorter", "missing"])
def test_a_file_that_changes_during_the_load(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    config = ModelConfig.from_file(folder)
    info = inspect_checkpoint(folder, config)
    file = folder / "model.safetensors"
    last = max((name for name in info.tensors if "vision" not in name), key=lambda name: info.tensors[name].offset)
    if fault == "missing":
        file.unlink()
    else:
        end = info.tensors[last].offset + info.tensors[last].nbytes
        os.truncate(file, end - 1)
    wanted = {"shorter": "is cut short", "missing": "cannot be read: No such file"}[fault]
    with pytest.raises(dg.CheckpointError, match=wanted) as caught:
        load(folder, info=info)
    assert caught.value.file == str(file)
    assert caught.value.tensor == (last if fault == "shorter" else None)


@pytest.mark.usefixtures("nothing_stays")
def test_a_copy_that_arrives_broken(tmp_path: Path, gpu: Gpu) -> None:
    folder = stored(tmp_path / "checkpoint", "fp8")
    largest = max(info.nbytes for info in inspect_checkpoint(folder, ModelConfig.from_file(folder)).tensors.values())

    def spoil(target: Tensor) -> None:
        if target.numel() == largest:
            target.fill_(0xFF)

    gpu.spoil = spoil
    with pytest.raises(dg.CheckpointError, match="was read broken, and the file has it right now"):
        load(folder)


@pytest.mark.usefixtures("gpu", "nothing_stays")
def test_nothing_of_a_failed_load_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were read before the fault are freed with the error."""
    import gc
    import weakref

    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    change(folder, "model.decoder.norm.weight", torch.full((64,), float("nan")))
    made: list[weakref.ref[Any]] = []
    read = device_reading.DeviceReader.read

    def noted(reader: device_reading.DeviceReader, weight: Any) -> Any:
        found = read(reader, weight)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(device_reading.DeviceReader, "read", noted)
    with pytest.raises(dg.CheckpointError) as caught:
        load(folder)
    assert len(made) > 10
    del caught
    gc.collect()
    assert [one for one in made if one() is not None] == []
