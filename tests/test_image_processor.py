"""processor_config.json and preprocessor_config.json: what they may say about images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_ext import CheckpointError
from dgemma_ext.checkpoint.image_processor import read_soft_tokens
from dgemma_ext.model.vision import SOFT_TOKENS

# As the published checkpoint has them.
PUBLISHED: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_seq_length": 280,
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": 280,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def write(folder: Path, name: str, values: Any) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_folder_without_either_file_has_the_default(tmp_path: Path) -> None:
    assert read_soft_tokens(tmp_path) == 280


@pytest.mark.parametrize("soft_tokens", SOFT_TOKENS)
def test_both_files_are_read_and_the_newer_one_first(tmp_path: Path, soft_tokens: int) -> None:
    write(tmp_path, "preprocessor_config.json", {**PUBLISHED, "max_soft_tokens": soft_tokens})
    assert read_soft_tokens(tmp_path) == soft_tokens
    write(tmp_path, "processor_config.json", {"image_processor": {**PUBLISHED, "max_soft_tokens": 140}})
    assert read_soft_tokens(tmp_path) == 140


def test_what_copies_of_the_model_say_beside_is_ignored(tmp_path: Path) -> None:
    block = {**PUBLISHED, "size": {"height": 224, "width": 224}}
    write(tmp_path, "processor_config.json", {"processor_class": "DiffusionGemma4Processor", "image_processor": block})
    assert read_soft_tokens(tmp_path) == 280


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 14),
        ("pooling_kernel_size", 2),
        ("do_normalize", True),
        ("do_resize", False),
        ("resample", 2),
        ("rescale_factor", 1 / 127.5),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("max_soft_tokens", 256),
        ("max_soft_tokens", "many"),
    ],
)
def test_other_pixels_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, "processor_config.json", {"image_processor": {**PUBLISHED, field: value}})
    with pytest.raises(CheckpointError, match=rf"processor_config\.json: image_processor\.{field} is "):
        read_soft_tokens(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_processor": 3}'])
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"processor_config\.json: "):
        read_soft_tokens(tmp_path)
