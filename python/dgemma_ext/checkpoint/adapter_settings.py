"""The settings of an adapter: adapter_config.json as PEFT writes it.

What changes the mathematics and is not implemented is an error that names the field. Fields that rule training alone,
and which modules were chosen (the tensors tell), are not read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dgemma_ext.checkpoint.foreign import ADAPTER_FILE
from dgemma_ext.checkpoint.json_section import Section, json_file, read_json
from dgemma_ext.errors import CheckpointError

# Fields of LoraConfig (PEFT 0.21) that change what the tensors mean, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# Initialisations that change the base's weights too: such an adapter is the difference from other weights.
_INITS_OF_ANOTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Of a rank: no adapter has more, and a corrupt number must not allocate without end.
_MAX_RANK = 1 << 16


@dataclass(frozen=True)
class AdapterSettings:
    """rank, alpha: where no pattern says otherwise. rslora: whether alpha is divided by the root of the rank. base: the
    model that it was trained on, as it was called there. version: PEFT's, None where the file does not say.

    rank_pattern, alpha_pattern: regular expressions of module paths → values; the first that matches counts, as in
    PEFT's `get_pattern_key`.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    base: str | None = None
    version: tuple[int, int] | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> AdapterSettings:
        """Reads adapter_config.json from its path or its folder; raises CheckpointError naming file and field."""
        file = json_file(path, ADAPTER_FILE)
        try:
            return cls.from_dict(read_json(file))
        except ValueError as error:
            raise CheckpointError(str(error), file=file) from error

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> AdapterSettings:
        """Reads the parsed adapter_config.json; raises ValueError naming the field."""
        top = Section("", settings)
        if "peft_type" not in top.values:
            raise ValueError("peft_type is missing; supported: LORA")
        top.check_neutral(_NEUTRAL)
        initial = top.get("init_lora_weights", True)
        if isinstance(initial, str) and initial.lower().startswith(_INITS_OF_ANOTHER_BASE):
            raise top.error(
                "init_lora_weights",
                "those that leave the base's weights as they are (PEFT's save_pretrained converts others by "
                "path_initial_model_for_weight_conversion)",
            )
        ranks, alphas = (Section(name, top.get(name) or {}) for name in ("rank_pattern", "alpha_pattern"))
        for patterns in (ranks, alphas):
            for pattern in patterns.values:
                _check_pattern(patterns, pattern)
        base, version = top.get("base_model_name_or_path"), top.get("peft_version")
        return cls(
            rank=top.integer("r", 8, maximum=_MAX_RANK),
            alpha=top.number("lora_alpha", 8),
            rslora=_flag(top, "use_rslora"),
            rank_pattern={pattern: ranks.integer(pattern, maximum=_MAX_RANK) for pattern in ranks.values},
            alpha_pattern={pattern: alphas.number(pattern) for pattern in alphas.values},
            target_parameters=_texts(top, "target_parameters"),
            base=base if isinstance(base, str) and base else None,
            version=_version(version),
        )

    @property
    def scale(self) -> float:
        """What a product of the two factors is multiplied by, where no pattern says otherwise."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path in the model: model.decoder.layers.0.self_attn.q_proj."""
        return next((rank for pattern, rank in self.rank_pattern.items() if _matches(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) with rslora."""
        alphas = (alpha for pattern, alpha in self.alpha_pattern.items() if _matches(pattern, module))
        return self._scale(self.rank_of(module), next(alphas, self.alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _check_pattern(section: Section, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{section.name} has {pattern!r}, which is no regular expression: {error}") from error


def _flag(section: Section, name: str) -> bool:
    value = section.get(name)
    if value not in (None, True, False):
        raise section.error(name, "true or false")
    return bool(value)


def _texts(section: Section, name: str) -> tuple[str, ...]:
    value = section.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise section.error(name, "a list of names, or null")
    return tuple(value)


def _version(text: Any) -> tuple[int, int] | None:
    """(major, minor) of "0.21.2", None for what is no version."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return None if found is None else (int(found[1]), int(found[2]))
