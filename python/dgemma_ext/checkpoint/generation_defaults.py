"""The sampler's defaults, from generation_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.json_section import Section, json_file, read_object
from dgemma_ext.errors import CheckpointError

_FILE = "generation_config.json"
# What a library notes of the file itself: no setting, and not listed as one that is ignored.
_NOTES = ("_commit_hash", "_from_model_config", "transformers_version")


@dataclass(frozen=True)
class GenerationDefaults:
    """The sampler's settings in generation_config.json. Defaults are those of `DiffusionGemmaGenerationConfig`.

    Temperatures divide logits; `entropy_bound` and `confidence_threshold` are in nats.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_new_tokens: int = 256

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], config: ModelConfig | None = None) -> GenerationDefaults:
        """Reads generation_config.json from its path or its folder; a missing file gives the defaults.

        Where the file names no end-of-sequence or padding id, `config` gives them. A setting that means nothing to
        block diffusion (`use_cache`, `max_length`, `top_k`) is ignored: `ignored_settings` lists it. Raises
        CheckpointError naming the file and the field.
        """
        file = json_file(path, _FILE)
        try:
            return cls.from_dict(_read(file), config)
        except ValueError as error:
            raise CheckpointError(str(error), file=file) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], config: ModelConfig | None = None) -> GenerationDefaults:
        """Reads the parsed generation_config.json; raises ValueError naming the field."""
        fields = Section("", {name: value for name, value in Section("", values).values.items() if value is not None})
        sampler = Section("sampler_config", fields.get("sampler_config", {}))
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            raise sampler.error("_cls_name", "EntropyBoundSamplerConfig")
        for field in sampler.values:
            if field not in ("_cls_name", "entropy_bound"):
                raise sampler.error(field, "entropy_bound only")
        defaults = cls(
            max_denoising_steps=fields.integer("max_denoising_steps", cls.max_denoising_steps),
            entropy_bound=sampler.number("entropy_bound", cls.entropy_bound, zero=True),
            t_min=fields.number("t_min", cls.t_min, zero=True),
            t_max=fields.number("t_max", cls.t_max),
            stability_threshold=fields.integer("stability_threshold", cls.stability_threshold, minimum=0),
            # Zero stops no canvas early, which other engines' benchmarks use to make every step.
            confidence_threshold=fields.number("confidence_threshold", cls.confidence_threshold, zero=True),
            eos_token_ids=fields.token_ids("eos_token_id") or (() if config is None else config.eos_token_ids),
            pad_token_id=fields.token_id("pad_token_id", None if config is None else config.pad_token_id),
            max_new_tokens=fields.integer("max_new_tokens", cls.max_new_tokens),
        )
        if defaults.t_max < defaults.t_min:
            raise ValueError(f"t_max is {defaults.t_max}; supported: at least t_min, which is {defaults.t_min}")
        return defaults


def ignored_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of generation_config.json that are not used, by name. Raises CheckpointError for a file that is no
    JSON object."""
    file = json_file(path, _FILE)
    used = {"sampler_config", "eos_token_id", *GenerationDefaults.__dataclass_fields__}
    used -= {"entropy_bound", "eos_token_ids"}
    return {
        name: value
        for name, value in _read(file).items()
        if value is not None and name not in used and name not in _NOTES
    }


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() or file.is_symlink() else {}
