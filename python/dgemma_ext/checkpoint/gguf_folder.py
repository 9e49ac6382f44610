"""Unpacks the small parts of a GGUF file into a folder, so that everything that reads a checkpoint's folder reads it.

The folder has config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja, and an
index of where each tensor lies in the file, which stays where it is. It is made once for a file, its size and its time,
under the user's cache (XDG_CACHE_HOME): reading the published files' half a million strings takes some seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.file_faults import unreadable
from dgemma_ext.checkpoint.generation_defaults import GenerationDefaults
from dgemma_ext.checkpoint.gguf_file import SUFFIX, GgufFile, package, read_gguf
from dgemma_ext.checkpoint.gguf_names import ROPE_FACTORS, published_name_of
from dgemma_ext.checkpoint.gguf_settings import check_architecture, config_of, generation_of
from dgemma_ext.checkpoint.gguf_tokenizer import template_of, tokenizer_config_of, tokenizer_of
from dgemma_ext.checkpoint.json_section import read_object
from dgemma_ext.checkpoint.stored import TensorInfo
from dgemma_ext.checkpoint.tokenizer import Tokenizer
from dgemma_ext.errors import CheckpointError

# Not .json: a converted checkpoint takes those with it.
_INDEX = "tensors.gguf-index"
# Changes where the folder's content would be another: older folders are then not taken.
_VERSION = 2


def gguf_in(folder: Path) -> Path | None:
    """The one GGUF model in a folder without safetensors. Files for images (mmproj) are none; raises CheckpointError
    where there are several."""
    if any(folder.glob("*.safetensors")):
        return None
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if not file.name.startswith((".", "mmproj")))
    if len(found) > 1:
        shown = ", ".join(file.name for file in found[:6]) + (", ..." if len(found) > 6 else "")
        raise CheckpointError(f"holds {len(found)} GGUF files: give one of them ({shown})", file=folder)
    return found[0] if found else None


def unpack(file: Path) -> Path:
    """The folder for a GGUF file. Raises CheckpointError for one that cannot be read, or is of another model."""
    package(file)
    try:
        status = file.stat()
    except OSError as error:
        raise unreadable(file, error) from error
    # The path that was given is in it too: the index holds that one. A link of the hub's cache has the file's name,
    # and what it leads to has none.
    identity = f"{_VERSION} {file.absolute()} {file.resolve()} {status.st_size} {status.st_mtime_ns}"
    # A name is of 255 bytes at most.
    stem = "".join(letter for letter in file.stem if letter.isascii() and letter.isprintable())[:60]
    name = f"{stem}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}"
    for parent in _places():
        folder = parent / name
        if (folder / _INDEX).is_file():
            return folder
        try:
            parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
        except OSError:  # a cache that cannot be written
            continue
        try:
            _fill(unfinished, read_gguf(file))
            if not folder.exists():
                os.replace(unfinished, folder)
        except OSError:  # a place that is full, or another process has made the folder meanwhile
            if not (folder / _INDEX).is_file():
                continue
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder
    raise CheckpointError("has no place for its small parts: the cache folder cannot be written", file=file)


def read_index(folder: Path) -> dict[str, TensorInfo] | None:
    """The tensors of an unpacked GGUF file by their published names; None for another folder."""
    index = folder / _INDEX
    if not index.is_file():
        return None
    content = read_object(index)
    file = Path(content["file"])
    try:
        size = file.stat().st_size
    except OSError as error:
        raise unreadable(file, error) from error
    found = {}
    for name, (dtype, shape, nbytes, offset) in content["tensors"].items():
        if offset + nbytes > size:
            raise CheckpointError(f"is cut short: it ends at byte {offset + nbytes} of {size}", file=file, tensor=name)
        found[name] = TensorInfo(file, name, dtype, tuple(shape), nbytes, offset)
    return found


def _places() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME")
    home = [Path(cache)] if cache else [Path("~/.cache").expanduser()]
    own = f"dgemma_ext-{os.getuid()}" if hasattr(os, "getuid") else "dgemma_ext"
    return [place / "dgemma_ext" / "gguf" for place in home] + [Path(tempfile.gettempdir()) / own / "gguf"]


def _fill(folder: Path, file: GgufFile) -> None:
    check_architecture(file)
    tensors: dict[str, Any] = {}
    for name, info in file.tensors.items():
        if name.removesuffix(".weight") == ROPE_FACTORS:
            continue
        published = published_name_of(name)
        if published is None:
            raise CheckpointError("is not part of a DiffusionGemma", file=file.path, tensor=name)
        if published in tensors:
            raise CheckpointError(f"is a second {published}", file=file.path, tensor=name)
        tensors[published] = (info.dtype, info.shape, info.nbytes, info.offset)
    # The tokenizer first: where it is not there, that is the message.
    parts: dict[str, Any] = {"tokenizer.json": tokenizer_of(file), "tokenizer_config.json": tokenizer_config_of(file)}
    parts |= {"config.json": config_of(file), "generation_config.json": generation_of(file)}
    try:
        GenerationDefaults.from_dict(parts["generation_config.json"], ModelConfig.from_dict(parts["config.json"]))
    except ValueError as error:
        raise CheckpointError(str(error), file=file.path) from error
    for name, content in parts.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    template = template_of(file)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    try:
        Tokenizer.from_directory(folder)
    except CheckpointError as error:
        raise CheckpointError(f"has a broken tokenizer: {error.message}", file=file.path) from error
    index = {"file": str(file.path.absolute()), "tensors": tensors}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
