"""Every kind of broken checkpoint is refused with a CheckpointError that names file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import ModelConfig, inspect_checkpoint
from dgemma_ext.checkpoint import reading as loading
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model import load_weights

LAYER_0 = "model.decoder.layers.0."
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One bfloat16 file without a tokenizer."""
    return make_checkpoint(tmp_path / "checkpoint", with_tokenizer=False)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", with_tokenizer=False, shards=3)


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    # A new file, because the loaded tensors are a map of the old one.
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / file)


def assert_refused(folder: Path, file: str | None, tensor: str | None, match: str, only_load: bool = False) -> None:
    """Asserts that inspection and loading raise the same CheckpointError, which names file and tensor."""
    config = ModelConfig.from_file(folder)
    actions: list[Callable[[], object]] = [lambda: load_weights(folder, config, torch.bfloat16, "cpu")]
    if not only_load:
        actions.append(lambda: inspect_checkpoint(folder, config))
    for action in actions:
        with pytest.raises(CheckpointError, match=match) as caught:
            action()
        assert caught.value.file == str(folder / file if file else folder)
        assert caught.value.tensor == tensor
        assert caught.value.file in str(caught.value)
        assert tensor is None or tensor in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.decoder.norm.weight", f"{LAYER_0}self_attn.v_proj.weight", f"{LAYER_0}layer_scalar"]
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    replace_tensor(folder, name, None)
    assert_refused(folder, "model.safetensors", name, "is missing")


@pytest.mark.parametrize("name", ["lm_head.bias", f"{LAYER_0}mlp.up_proj.weight_scale", f"{LAYER_0}mlp.up_proj.bias"])
def test_an_extra_tensor(folder: Path, name: str) -> None:
    replace_tensor(folder, name, torch.ones(4))
    assert_refused(folder, "model.safetensors", name, "is not part of the model")


def test_a_value_projection_on_a_full_layer_is_extra(folder: Path) -> None:
    name = "model.decoder.layers.2.self_attn.v_proj.weight"
    replace_tensor(folder, name, torch.ones(32, 64))
    assert_refused(folder, "model.safetensors", name, "is not part of the model")


def test_a_misshapen_tensor(folder: Path) -> None:
    name = f"{LAYER_0}experts.down_proj"
    replace_tensor(folder, name, torch.ones(8, 32, 64))
    assert_refused(
        folder, "model.safetensors", name, r"has shape \[8, 32, 64\]; the configuration asks for \[8, 64, 32\]"
    )


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int16, "I16"), (torch.float8_e5m2, "F8_E5M2"), (torch.float64, "F64")]
)
def test_a_dtype_that_cannot_be_loaded(folder: Path, dtype: torch.dtype, name: str) -> None:
    tensor = f"{LAYER_0}mlp.up_proj.weight"
    replace_tensor(folder, tensor, torch.ones(96, 64).to(dtype))
    assert_refused(folder, "model.safetensors", tensor, f"has dtype {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "position"),
    [("model.decoder.embed_tokens.weight", [511, 63]), (f"{LAYER_0}experts.down_proj", [3, 0, 31])],
)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_non_finite_weight(
    folder: Path, stored: torch.dtype, name: str, position: list[int], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "CHUNK_ELEMENTS", 777)
    tensor = load_file(folder / "model.safetensors")[name].to(stored)
    tensor[tuple(position)] = value
    replace_tensor(folder, name, tensor)
    pattern = rf"has {value} at \[{', '.join(map(str, position))}\]"
    assert_refused(folder, "model.safetensors", name, pattern, only_load=True)


def test_a_non_finite_layer_scalar(folder: Path) -> None:
    name = "model.encoder.language_model.layers.1.layer_scalar"
    replace_tensor(folder, name, torch.tensor([float("nan")]))
    assert_refused(folder, "model.safetensors", name, "has nan", only_load=True)


def test_a_finite_value_that_the_dtype_cannot_hold(folder: Path) -> None:
    # bfloat16 ends a little below fp32; the stored values and their sum are finite.
    norm = torch.zeros(64)
    norm[5] = torch.finfo(torch.float32).max
    assert norm.sum().isfinite()
    replace_tensor(folder, "model.decoder.norm.weight", norm)
    assert_refused(folder, "model.safetensors", "model.decoder.norm.weight", r"has inf at \[5\]", only_load=True)


def test_huge_finite_weights_are_no_fault(folder: Path) -> None:
    # Their sum overflows, which alone is no error.
    replace_tensor(folder, "model.decoder.norm.weight", torch.full((64,), 3e38, dtype=torch.bfloat16))
    weights = load_weights(folder, ModelConfig.from_file(folder), torch.bfloat16, "cpu")
    assert float(weights.norm[0]) == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_a_file_cut_short_in_its_header(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(folder, "model.safetensors", None, "is cut short")


@pytest.mark.parametrize("lost", [1, 1000, 100_000])
def test_a_file_cut_short_names_the_first_tensor_that_suffers(folder: Path, lost: int) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-lost])
    entries = inspect_names(raw)
    kept = max(entry["data_offsets"][1] for entry in entries.values()) - lost
    first = next(name for name, entry in entries.items() if entry["data_offsets"][1] > kept)
    assert_refused(folder, "model.safetensors", first, "is cut short")


def inspect_names(raw: bytes) -> dict[str, Any]:
    """A safetensors file's entries in the order of their bytes."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def test_a_shard_cut_short_is_named(sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-2])
    assert_refused(sharded, file.name, list(inspect_names(raw))[-1], "is cut short")


def test_bytes_after_the_last_tensor(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"1234")
    assert_refused(folder, "model.safetensors", None, "has 4 bytes after its last tensor")


def write_header(folder: Path, header: bytes, payload: bytes = b"") -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + payload)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"{", "corrupt header"),
        (b"\xff\xfe", "corrupt header"),
        (b"[]", "corrupt header: not an object"),
        (b'{"a": 1, "a": 2}', "corrupt header: a is listed twice"),
        (b"[" * 100_000, "corrupt header: it is nested too deeply"),
    ],
)
def test_a_corrupt_header(folder: Path, header: bytes, match: str) -> None:
    write_header(folder, header)
    assert_refused(folder, "model.safetensors", None, match)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (b'{"dtype": "BF16", "shape": [1]}', "corrupt header entry"),
        (b'{"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}', "corrupt header entry"),
        (b'{"dtype": "BF16", "shape": [1], "data_offsets": [2, 0]}', "has -2 bytes"),
        (b'{"dtype": "BF16", "shape": [2], "data_offsets": [0, 2]}', r"has 2 bytes; BF16 \[2\] takes another number"),
        (b'{"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]}', "begins at byte 2"),
        (b'{"dtype": "F4", "shape": [1], "data_offsets": [0, 2]}', "has dtype F4"),
        (b'{"dtype": "BF16", "shape": [36893488147419103232], "data_offsets": [0, 2]}', "corrupt header entry"),
        (b'{"dtype": "BF16", "shape": [4294967296, 4294967296, 2], "data_offsets": [0, 0]}', "has 0 bytes"),
    ],
)
def test_a_corrupt_header_entry(folder: Path, entry: bytes, match: str) -> None:
    write_header(folder, b'{"a": ' + entry + b"}", bytes(4))
    assert_refused(folder, "model.safetensors", "a", match)


def test_a_header_length_that_the_file_cannot_hold(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])
    assert_refused(folder, "model.safetensors", None, "a header of 4611686018427387904 bytes")


def edit_index(folder: Path, edit: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model.decoder.norm.weight"


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()
    first = next(n for n, f in json.loads((sharded / INDEX).read_text())["weight_map"].items() if "00003-of" in f)
    assert_refused(sharded, INDEX, first, r"model-00003-of-00003\.safetensors, which is missing")


def test_an_index_that_reaches_outside_its_folder(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({NORM: "../other.safetensors"}))
    assert_refused(sharded, INDEX, NORM, "is not a file name")


def test_an_index_that_leaves_a_tensor_out(sharded: Path) -> None:
    file = json.loads((sharded / INDEX).read_text())["weight_map"][NORM]
    edit_index(sharded, lambda weight_map: weight_map.pop(NORM))
    assert_refused(sharded, file, NORM, "has it nowhere")


def test_an_index_that_lists_a_tensor_too_many(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(ghost="model-00001-of-00003.safetensors"))
    assert_refused(sharded, INDEX, "ghost", r"is not in model-00001-of-00003\.safetensors")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
    name = next(iter(load_file(sharded / first)))
    replace_tensor(sharded, name, load_file(sharded / first)[name], last)
    assert_refused(sharded, last, name, rf"is stored in {first} too")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_corrupt_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert_refused(sharded, INDEX, None, "JSON|weight_map")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_refused(folder, None, None, r"has neither model\.safetensors nor")
