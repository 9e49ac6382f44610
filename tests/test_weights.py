"""Checkpoints on disk: the published layout, loading without copies, and every kind of broken file."""

from __future__ import annotations

import builtins
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import (
    PUBLISHED_PAYLOAD_BYTES,
    load_transformers,
    make_checkpoint,
    published_names,
    published_shapes,
    write_published_layout,
)
from dgemma_ext.checkpoint import ModelConfig, expected_tensors, inspect_checkpoint, resolve_checkpoint
from dgemma_ext.checkpoint import reading as loading
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model import ModelWeights, load_weights

LAYER_0 = "model.decoder.layers.0."
INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_file(folder), dtype, "cpu", **options)


def by_stored_name(weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Loaded tensors under their stored names, spelled out here independently of the package's table."""
    decoder = "model.decoder."
    tensors = {
        f"{decoder}embed_tokens.weight": weights.embed_tokens,
        f"{decoder}norm.weight": weights.norm,
        f"{decoder}self_conditioning.pre_norm.weight": weights.self_conditioning_pre_norm,
        f"{decoder}self_conditioning.gate_proj.weight": weights.self_conditioning_gate_proj,
        f"{decoder}self_conditioning.up_proj.weight": weights.self_conditioning_up_proj,
        f"{decoder}self_conditioning.down_proj.weight": weights.self_conditioning_down_proj,
    }
    for index, layer in enumerate(weights.layers):
        prefix = f"{decoder}layers.{index}."
        tensors |= {
            f"{prefix}input_layernorm.weight": layer.input_layernorm,
            f"{prefix}post_attention_layernorm.weight": layer.post_attention_layernorm,
            f"{prefix}pre_feedforward_layernorm.weight": layer.pre_feedforward_layernorm,
            f"{prefix}post_feedforward_layernorm_1.weight": layer.post_feedforward_layernorm_1,
            f"{prefix}pre_feedforward_layernorm_2.weight": layer.pre_feedforward_layernorm_2,
            f"{prefix}post_feedforward_layernorm_2.weight": layer.post_feedforward_layernorm_2,
            f"{prefix}post_feedforward_layernorm.weight": layer.post_feedforward_layernorm,
            f"{prefix}self_attn.q_proj.weight": layer.q_proj,
            f"{prefix}self_attn.k_proj.weight": layer.k_proj,
            f"{prefix}self_attn.o_proj.weight": layer.o_proj,
            f"{prefix}self_attn.q_norm.weight": layer.q_norm,
            f"{prefix}self_attn.k_norm.weight": layer.k_norm,
            f"{prefix}mlp.gate_proj.weight": layer.gate_proj,
            f"{prefix}mlp.up_proj.weight": layer.up_proj,
            f"{prefix}mlp.down_proj.weight": layer.down_proj,
            f"{prefix}router.proj.weight": layer.router_proj,
            f"{prefix}router.scale": layer.router_scale,
            f"{prefix}router.per_expert_scale": layer.router_per_expert_scale,
            f"{prefix}experts.gate_up_proj": layer.experts_gate_up,
            f"{prefix}experts.down_proj": layer.experts_down,
            f"{prefix}layer_scalar": torch.tensor([layer.decoder_layer_scalar]),
            f"model.encoder.language_model.layers.{index}.layer_scalar": torch.tensor([layer.encoder_layer_scalar]),
        }
        if layer.v_proj is not None:
            tensors[f"{prefix}self_attn.v_proj.weight"] = layer.v_proj
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One bfloat16 file without a tokenizer."""
    return make_checkpoint(tmp_path / "checkpoint", with_tokenizer=False)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", with_tokenizer=False, shards=3)


def test_the_published_layout_from_its_headers(tmp_path: Path) -> None:
    folder = write_published_layout(tmp_path)
    config = ModelConfig.from_file(folder)
    info = inspect_checkpoint(folder, config)
    assert len(info.files) == 11
    assert len(info.tensors) == 1047
    assert len(info.vision_tensors) == 356
    assert info.total_bytes == PUBLISHED_PAYLOAD_BYTES
    assert info.vision_bytes == 1_145_588_832
    assert info.loaded_bytes == 50_501_973_624
    assert sum(math.prod(tensor.shape) for tensor in info.tensors.values()) == 25_823_781_228
    assert {name: tensor.shape for name, tensor in info.tensors.items()} == published_shapes()
    assert len(expected_tensors(config)) == 691


def test_the_published_names_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_published_layout(tmp_path)
    assert published_names(json.loads((folder / "config.json").read_text())) == published_shapes()


@pytest.mark.parametrize("dialect", ["flat", "per_layer"])
@pytest.mark.parametrize("shards", [1, 5])
def test_every_tensor_arrives_where_it_belongs(tmp_path: Path, dialect: str, shards: int) -> None:
    folder = make_checkpoint(tmp_path, dialect=dialect, shards=shards, with_tokenizer=False)
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    loaded = by_stored_name(load(folder))
    text = {name for name in stored if "vision" not in name}
    assert set(loaded) == text
    assert all(torch.equal(loaded[name].to(stored[name].dtype), stored[name]) for name in text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_transformers_loads_the_same_files(tmp_path: Path, dtype: torch.dtype, attn_implementation: str) -> None:
    folder = make_checkpoint(tmp_path, shards=2, dialect="per_layer", dtype=torch.float32, with_tokenizer=False)
    theirs = load_transformers(folder, dtype, attn_implementation)
    assert theirs.config._attn_implementation == attn_implementation
    state = theirs.state_dict()
    for name, tensor in by_stored_name(load(folder, dtype)).items():
        assert torch.equal(tensor.to(dtype), state[name]), name
    # transformers ties these tensors to the decoder, except for the layer scalars.
    encoder = "model.encoder.language_model.layers.0."
    assert torch.equal(state[f"{encoder}mlp.up_proj.weight"], state[f"{LAYER_0}mlp.up_proj.weight"])
    assert torch.equal(state["lm_head.weight"], state["model.decoder.embed_tokens.weight"])
    assert not torch.equal(state[f"{encoder}layer_scalar"], state[f"{LAYER_0}layer_scalar"])


def test_a_checkpoint_saved_by_transformers(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", with_tokenizer=False)
    load_transformers(source, torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert (tmp_path / "saved" / INDEX).exists()
    ours, again = by_stored_name(load(source)), by_stored_name(load(tmp_path / "saved"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_a_checkpoint_without_vision_loads(folder: Path) -> None:
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "vision" not in name}
    save_file(tensors, folder / "model.safetensors")
    assert inspect_checkpoint(folder, ModelConfig.from_file(folder)).vision_tensors == ()
    load(folder)


def test_weights_in_their_own_dtype_are_the_mapped_file(folder: Path) -> None:
    first, second = load(folder), load(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0] for fields in maps if fields[-1] == str(folder / "model.safetensors")]
    ranges = [tuple(int(bound, 16) for bound in span.split("-")) for span in spans]
    for weights in (first, second):
        for tensor in (weights.embed_tokens, weights.layers[0].experts_gate_up, weights.layers[2].q_norm):
            assert any(begin <= tensor.data_ptr() < end for begin, end in ranges)


def test_weights_in_another_dtype_are_rounded_copies(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype=torch.float32, with_tokenizer=False)
    exact, rounded = by_stored_name(load(folder, torch.float32)), by_stored_name(load(folder, torch.bfloat16))
    for name, tensor in exact.items():
        assert torch.equal(rounded[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name
    assert rounded["model.decoder.norm.weight"].dtype == torch.bfloat16


def test_small_pieces_give_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = by_stored_name(load(folder, torch.float32))
    monkeypatch.setattr(loading, "CHUNK_ELEMENTS", 1000)
    pieces = by_stored_name(load(folder, torch.float32))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


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


@pytest.mark.parametrize("name", ["lm_head.weight", f"{LAYER_0}mlp.up_proj.weight_scale", f"{LAYER_0}mlp.up_proj.bias"])
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
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e5m2, "F8_E5M2"), (torch.float64, "F64")]
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
    assert float(load(folder).norm[0]) == pytest.approx(3e38, rel=0.01)


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


def test_a_folder_is_its_own_path(folder: Path) -> None:
    assert resolve_checkpoint(folder) == resolve_checkpoint(str(folder)) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such", "no-such-folder", "a/b/c"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        resolve_checkpoint(name)
    assert caught.value.file == name


def test_a_path_to_a_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; wanted: the checkpoint's folder"):
        resolve_checkpoint(folder / "config.json")


def test_a_hub_id_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_hub(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        resolve_checkpoint("google/diffusiongemma-26B-A4B-it")


def test_a_hub_id_downloads_through_huggingface_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        calls.append((repo_id, sorted(allow_patterns)))
        return str(folder)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_checkpoint("owner/model") == folder
    assert calls == [("owner/model", ["*.jinja", "*.json", "*.safetensors"])]


def test_a_failed_download_names_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise OSError("no route")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(CheckpointError, match=r"owner/model: .*failed: no route"):
        resolve_checkpoint("owner/model")


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_progress_bar(folder: Path, progress: bool | None, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    # None: stderr is no terminal here.
    load(folder, progress=progress)
    assert ("loading weights" in capsys.readouterr().err) == shown


def test_the_progress_bar_on_a_terminal_waits_for_a_long_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(loading, "_PROGRESS_AFTER_SECONDS", 1e9)
    load(folder)
    assert "loading weights" not in capsys.readouterr().err
    monkeypatch.setattr(loading, "_PROGRESS_AFTER_SECONDS", 0.0)
    load(folder)
    assert "loading weights" in capsys.readouterr().err
