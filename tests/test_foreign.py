"""Folders that are no checkpoint of this engine: each is recognised, and the message says what to do. And folders that
are one in an unusual form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import resolve_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", shards=3)


def load(folder: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(folder, device="cpu")


def refused(folder: Path, match: str, file: str | None = None) -> None:
    with pytest.raises(dg.CheckpointError, match=match) as caught:
        load(folder)
    assert caught.value.file == str(folder / file if file else folder)


def write(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "google/diffusiongemma-26B-A4B-it"}
# Name → (the files beside config.json, what the message says). None: config.json is not there.
FOLDERS: dict[str, tuple[bool, tuple[str, ...], str]] = {
    "fsdp": (False, ("__0_0.distcp", ".metadata"), "holds a torch.distributed checkpoint .* merge it"),
    "deepspeed": (True, ("zero_to_fp32.py", "global_step8/mp_rank_00_model_states.pt"), "a DeepSpeed checkpoint"),
    "pickles": (True, ("pytorch_model.bin",), "weights as Python pickles.* save it by save_pretrained"),
    "jax": (False, ("_CHECKPOINT_METADATA", "manifest.ocdbt"), r"a checkpoint of JAX \(Orbax\)"),
    "tensorrt": (True, ("rank0.engine",), "a model that was built for another engine"),
    "npz": (False, ("weights.npz",), "weights of MLX"),
    "runs": (
        False,
        ("step-500/config.json", "step-900/config.json"),
        r"give one of its folders \(step-500, step-900\)",
    ),
    "nothing": (True, ("README.md",), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_other_formats(name: str, folder: Path, tmp_path: Path) -> None:
    has_config, files, match = FOLDERS[name]
    other = tmp_path / "other"
    write(other, *files)
    if has_config:
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(other, match)


def test_another_format_beside_the_checkpoint_does_not_matter(folder: Path) -> None:
    write(folder, "model-Q4_K_M.gguf", "pytorch_model.bin", "checkpoint-500/config.json", "._model.safetensors")
    load(folder)


def test_a_gguf_file_that_is_none(folder: Path, tmp_path: Path) -> None:
    """What is one: test_gguf.py."""
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "model-Q4_K_M.gguf")
    (tmp_path / "other" / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(tmp_path / "other", "is no GGUF file: it does not begin with GGUF", "model-Q4_K_M.gguf")
    write(tmp_path, "model.gguf", data=b"GGUF")
    with pytest.raises(dg.CheckpointError, match=r"is cut short or corrupt"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("beside", [True, False], ids=["beside a model", "alone"])
def test_an_adapter(beside: bool, folder: Path, tmp_path: Path) -> None:
    """Beside a model too: an answer without the adapter would be another one than expected."""
    place = folder if beside else tmp_path / "adapter"
    write(place, "adapter_config.json", data=json.dumps(ADAPTER).encode())
    write(place, "adapter_model.safetensors")
    refused(place, r"an adapter of PEFT \(LORA\) for google/diffusiongemma-26B-A4B-it, .* load the base and give")
    write(place, "adapter_config.json", data=b"[]")
    refused(place, "is a list; wanted: an object", "adapter_config.json")


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is that of MLX"),
    "mlx, both sections": ({"quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"}}, "that of MLX"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quant_method is 'gptq' \(GPTQ\)"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quant_method is 'awq' \(AWQ\)"),
    "bnb": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method is 'bitsandbytes'"),
    "int8, older": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "naive-quantized"}},
        r"format is 'naive-quantized' \(INT8\)",
    ),
    "int8, packed": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 8}}},
            }
        },
        r"config_groups\.group_0\.weights\.num_bits is 8; supported: 4",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_other_quantizations_say_what_to_load(name: str, folder: Path) -> None:
    fields, match = QUANTIZED[name]
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    refused(folder, f"{match}.*load the unquantized checkpoint", "config.json")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_git_lfs_pointers(name: str, folder: Path) -> None:
    write(folder, name, data=POINTER)
    refused(folder, "is a git-lfs pointer in place of the file: run `git lfs pull`", name)


def test_a_pointer_in_place_of_a_shard_or_an_index(sharded: Path) -> None:
    for name in ("model-00002-of-00003.safetensors", INDEX):
        write(sharded, name, data=POINTER)
        refused(sharded, "is a git-lfs pointer", name)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"text"', "true", "[1, 2]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", INDEX])
def test_json_that_is_no_object(name: str, text: str, sharded: Path) -> None:
    (sharded / name).write_text(text)
    refused(sharded, "weight_map" if name == INDEX else "wanted: an object", name)


# Shards without an index ----------------------------------------------------------------------------------------------


def shuffled(sharded: Path) -> list[Path]:
    (sharded / INDEX).unlink()
    return sorted(sharded.glob("*.safetensors"))


def test_complete_shards_need_no_index(sharded: Path) -> None:
    wanted = load(sharded).generate([2, 108], max_new_tokens=8).token_ids
    shuffled(sharded)
    assert load(sharded).generate([2, 108], max_new_tokens=8).token_ids == wanted


def test_one_file_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "diffusion_gemma.safetensors")
    load(folder)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda files: files[1].unlink(), r"of its 3 shards model-00002-of-00003\.safetensors is missing"),
        (lambda files: [file.unlink() for file in files[1:]], r"of its 3 shards model-00002-of-00003\.safetensors"),
        (lambda files: files[0].with_name("extra.safetensors").write_bytes(b""), r"no single set of shards \(extra\."),
        (lambda files: files[0].rename(files[0].with_name("other-00001-of-00003.safetensors")), "no single set"),
    ],
)
def test_shards_in_doubt(edit: Callable[[list[Path]], object], match: str, sharded: Path) -> None:
    edit(shuffled(sharded))
    refused(sharded, match)


# The hub's cache ------------------------------------------------------------------------------------------------------


def hub_cache(folder: Path, root: Path, commits: list[str]) -> Path:
    """The cache's folder of a model: snapshots of links to blobs."""
    model = root / "models--owner--name"
    (model / "blobs").mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(model / "blobs" / file.name)
    for commit in commits:
        (model / "snapshots" / commit).mkdir(parents=True)
        for blob in (model / "blobs").iterdir():
            (model / "snapshots" / commit / blob.name).symlink_to(Path("../../blobs") / blob.name)
    return model


def test_a_model_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    model = hub_cache(folder, tmp_path / "hub", ["aaa", "bbb"])
    with pytest.raises(dg.CheckpointError, match="a model's folder in the hub's cache with 2 snapshots"):
        load(model)
    write(model, "refs/main", data=b"bbb\n")
    assert resolve_checkpoint(model) == model / "snapshots" / "bbb"
    load(model)
    write(model, "refs/main", data=b"ccc")
    with pytest.raises(dg.CheckpointError, match="none of them main"):
        load(model)
    load(model / "snapshots" / "aaa")


def test_the_only_snapshot_needs_no_reference(folder: Path, tmp_path: Path) -> None:
    model = hub_cache(folder, tmp_path / "hub", ["aaa"])
    assert resolve_checkpoint(model) == model / "snapshots" / "aaa"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_link_to_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    """A missing tokenizer, or sampler settings, would be no error without the link."""
    model = hub_cache(folder, tmp_path / "hub", ["aaa"])
    (model / "blobs" / name).unlink()
    place = model / "snapshots" / "aaa"
    refused(
        place,
        rf"is a link to \.\./\.\./blobs/{re.escape(name)}, which is missing .*download the checkpoint again",
        name,
    )
