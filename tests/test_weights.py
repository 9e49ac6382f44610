"""Checkpoints on disk: the published layout, and loading without copies."""

from __future__ import annotations

import builtins
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import load_transformers, make_checkpoint, published_names
from dgemma_ext.checkpoint import ModelConfig, expected_tensors, inspect_checkpoint, resolve_checkpoint
from dgemma_ext.checkpoint import reading as loading
from dgemma_ext.errors import CheckpointError
from dgemma_ext.model import ModelWeights, load_weights
from published_layout import PUBLISHED_PAYLOAD_BYTES, published_shapes, write_published_layout

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
