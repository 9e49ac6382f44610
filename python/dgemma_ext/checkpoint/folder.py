"""Finds the folder of a checkpoint, and the files in it that hold the weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dgemma_ext import arguments
from dgemma_ext.checkpoint.bundled import bundled_checkpoint
from dgemma_ext.checkpoint.file_faults import check_link
from dgemma_ext.checkpoint.foreign import (
    ADAPTER_FILE,
    CONFIG_FILE,
    check_not_foreign,
    check_not_foreign_file,
    weight_files,
)
from dgemma_ext.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from dgemma_ext.checkpoint.gguf_folder import gguf_in, unpack
from dgemma_ext.checkpoint.json_section import read_json
from dgemma_ext.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The hub's form: owner/name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
_ADAPTER_FILES = ["*.json", "*.safetensors"]
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """`files` hold the tensors; `listing` is the file that says so, named where one is missing; `index`: tensor → file
    name, where there is an index."""

    listing: Path
    files: list[Path]
    index: dict[str, str] | None = None


def resolve_checkpoint(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: itself, that of a bundled model by its name (bundled.py; `./demo` is a folder of that
    name), or a hub id (`owner/name`) downloaded, or found in the hub's cache.

    A model's folder in the hub's cache stands for the snapshot that was downloaded last. A GGUF file, or a folder with
    one and no safetensors, is unpacked (gguf_folder.py). Raises ValueError for what is
    no path; CheckpointError for a path that is not there, for a folder with something else than a checkpoint in
    safetensors, saying what it is, and, for a hub id, when huggingface_hub is not installed or the download fails.
    """
    path = Path(arguments.path("path_or_hub_id", path_or_hub_id))
    name = os.fsdecode(path_or_hub_id)
    if (bundled := bundled_checkpoint(name)) is not None:
        return bundled
    if path.is_dir():
        folder = _snapshot(path)
        if (file := gguf_in(folder)) is not None:
            return unpack(file)
        check_not_foreign(folder)
        return folder
    if path.exists():
        if path.suffix == GGUF_SUFFIX:
            return unpack(path)
        check_not_foreign_file(path)
    if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(name):
        raise CheckpointError("does not exist; wanted: the checkpoint's folder, or a hub id (owner/name)", file=name)
    folder = _downloaded(name, _HUB_FILES)
    check_not_foreign(folder)
    return folder


def resolve_adapter(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The folder of an adapter: itself, or a hub id (`owner/name`) downloaded, or found in the hub's cache.

    Raises ValueError for what is no path; CheckpointError for what is not there or holds no adapter of PEFT.
    """
    path = Path(arguments.path("adapter", path_or_hub_id))
    if path.is_dir():
        folder = path
    elif path.exists():
        raise CheckpointError("is a file; wanted: an adapter's folder, or a hub id (owner/name)", file=path)
    else:
        name = os.fsdecode(path_or_hub_id)
        if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(name):
            raise CheckpointError("does not exist; wanted: an adapter's folder, or a hub id (owner/name)", file=name)
        folder = _downloaded(name, _ADAPTER_FILES)
    check_link(folder / ADAPTER_FILE)
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"holds no adapter of PEFT: {ADAPTER_FILE} is missing", file=folder)
    return folder


def _downloaded(name: str, patterns: list[str]) -> Path:
    """The folder of a hub id."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            "is no folder here, and downloading it as a hub id needs huggingface_hub (pip install huggingface_hub); "
            "or fetch the repository's files yourself and give their folder",
            file=name,
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and the operating system's errors
        raise CheckpointError(
            f"is no folder here, and downloading it as a hub id failed: {error}", file=name
        ) from error


def _snapshot(folder: Path) -> Path:
    """The snapshot in a model's folder of the hub's cache (models--owner--name); another folder as it is."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or (folder / CONFIG_FILE).exists():
        return folder
    reference = folder / "refs" / "main"
    if reference.is_file():
        main = snapshots / reference.read_text(encoding="utf-8", errors="replace").strip()
        if main.is_dir():
            return main
    found = sorted(snapshots.iterdir())
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"is a model's folder in the hub's cache with {len(found)} snapshots, none of them main: give one of the "
        "folders in snapshots, or the hub id",
        file=folder,
    )


def find_weight_files(folder: Path) -> WeightFiles:
    """The files that hold the tensors: model.safetensors, else those of the index, else what leaves no doubt.

    A single model.safetensors is taken before an index, as transformers does. Without both, one file or one complete
    set of numbered shards is taken. Raises CheckpointError, naming what is missing or in doubt.
    """
    if not folder.is_dir():
        raise CheckpointError("is not a folder", file=folder)
    single, index_file = folder / SINGLE_FILE, folder / INDEX_FILE
    check_link(single)
    if single.is_file():
        return WeightFiles(single, [single])
    check_link(index_file)
    if not index_file.is_file():
        return WeightFiles(folder, _files_without_index(folder))
    document = read_json(index_file)
    index = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(index, dict) or not index or any(not isinstance(name, str) for name in index.values()):
        raise CheckpointError("has no weight_map of tensor names to file names", file=index_file)
    for tensor, name in index.items():
        # A plain file name: an index must not reach outside its folder.
        if Path(name).name != name or "\0" in name:
            raise CheckpointError(
                f"is said to be in {name!r}, which is not a file name", file=index_file, tensor=tensor
            )
        check_link(folder / name)
        if not (folder / name).is_file():
            raise CheckpointError(f"is said to be in {name}, which is missing", file=index_file, tensor=tensor)
    return WeightFiles(index_file, [folder / name for name in sorted(set(index.values()))], index)


def _files_without_index(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if not files:
        check_not_foreign(folder)
        raise CheckpointError(f"has neither {SINGLE_FILE} nor {INDEX_FILE}", file=folder)
    if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
        return files
    shards = [_SHARD.fullmatch(file.name) for file in files]
    sets = {(shard[1], shard[3]) for shard in shards if shard}
    if len(sets) != 1 or not all(shards):
        shown = ", ".join(file.name for file in files[:6]) + (", ..." if len(files) > 6 else "")
        raise CheckpointError(
            f"has no {INDEX_FILE}, and its files are no single set of shards ({shown}): give a folder with one of them",
            file=folder,
        )
    prefix, count = sets.pop()
    numbers = {int(shard[2]) for shard in shards if shard}
    missing = next((number for number in range(1, int(count) + 1) if number not in numbers), None)
    if missing is not None:
        name = f"{prefix}-{missing:0{len(count)}}-of-{count}.safetensors"
        raise CheckpointError(f"has no {INDEX_FILE}, and of its {int(count)} shards {name} is missing", file=folder)
    return files
