"""What config.json may say of quantized weights, and how a user asks for a format.

Which tensors are quantized, and how, is read off the tensors themselves (stored.py), so the lists of ignored modules
need no reading: publishers spell them with the encoder's names or the decoder's, both for the same tensors. What is
checked here is that the files are of a kind that is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.ops.formats import INT4_GROUPS, Fp8Weight, Int4Weight, Nvfp4Weight, QuantizedWeight

# compressed-tensors' names of layouts, and ModelOpt's of algorithms.
_LAYOUTS = ("float-quantized", "pack-quantized", "nvfp4-pack-quantized", "dense", "mixed-precision")
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")

# Attributes of LayerWeights by the part of a layer that they belong to.
PARTS: dict[str, tuple[str, ...]] = {
    "experts": ("experts_gate_up", "experts_down"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# The parts that published checkpoints of each format quantize (RedHatAI FP8-dynamic, cyankiwi INT4, nvidia NVFP4).
_USUAL_PARTS = {"fp8": ("experts", "attention", "mlp"), "int4": ("experts", "attention"), "nvfp4": ("experts",)}


def check_quantization_config(section: Any) -> None:
    """Refuses what cannot be read: raises ValueError naming the field of config.json."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise ValueError(f"quantization_config must be an object or null, got {section!r}")
    method = section.get("quant_method")
    if method == "modelopt":
        if section.get("quant_algo") not in _ALGORITHMS:
            raise _refusal("quant_algo", section.get("quant_algo"), _ALGORITHMS)
        return
    if method != "compressed-tensors":
        raise _refusal("quant_method", method, ("compressed-tensors", "modelopt"))
    if section.get("format") not in _LAYOUTS:
        raise _refusal("format", section.get("format"), _LAYOUTS)
    if section.get("quantization_status", "compressed") != "compressed":
        raise _refusal("quantization_status", section.get("quantization_status"), ("compressed",))
    for name, group in (section.get("config_groups") or {}).items():
        path = f"config_groups.{name}"
        if isinstance(group, Mapping) and group.get("format") not in (None, *_LAYOUTS):
            raise _refusal(f"{path}.format", group.get("format"), _LAYOUTS)
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("symmetric") is False:
            raise _refusal(f"{path}.weights.symmetric", False, ("true",))
        if isinstance(weights, Mapping) and weights.get("actorder") in ("group", True):
            raise _refusal(f"{path}.weights.actorder", weights.get("actorder"), ("null", "static"))


def _refusal(field: str, got: Any, wanted: tuple[str, ...]) -> ValueError:
    return ValueError(f"quantization_config.{field} is {got!r}; supported: {', '.join(wanted)}")


@dataclass(frozen=True)
class Target:
    """A format that plain weights are brought to, and for which parts of a layer."""

    format: str
    group: int
    parts: tuple[str, ...]

    def wants(self, attribute: str) -> bool:
        """Whether the matrix of this attribute of LayerWeights is quantized."""
        return any(attribute in PARTS[part] for part in self.parts)

    def group_for(self, columns: int) -> int | None:
        """Columns that share a scale in rows of so many, 0 where a row does: the wanted number, for int4 halved until
        it divides them. None where nothing does; such a matrix stays plain."""
        group = self.group
        while group and columns % group:
            if self.format != "int4" or group == min(INT4_GROUPS):
                return None
            group //= 2
        return group

    def quantize(self, matrices: list[Tensor]) -> list[QuantizedWeight]:
        """Matrices [rows, columns] that other engines multiply as one (an expert's gate and up), quantized: of nvfp4
        they share the global scale. Their columns have a group."""
        if self.format == "fp8":
            return [Fp8Weight.quantize(matrix) for matrix in matrices]
        if self.format == "int4":
            group = self.group_for(matrices[0].shape[-1])
            assert group, "the caller has asked for the group"
            return [Int4Weight.quantize(matrix, group) for matrix in matrices]
        together = Nvfp4Weight.quantize(torch.cat(matrices)).global_scales
        return [Nvfp4Weight.quantize(matrix, global_scales=together) for matrix in matrices]


_GROUPS = {"fp8": 0, "int4": 32, "nvfp4": 16}


def parse_target(text: str, parts: tuple[str, ...] | None = None) -> Target:
    """ "fp8", "int4" (groups of 32), "int4-64", "int4-128" or "nvfp4"; `parts` of a layer default to those that the
    published checkpoints of the format quantize. Raises ValueError for anything else."""
    format, _, group = text.partition("-")
    if format not in _GROUPS or (group and (format != "int4" or group not in map(str, INT4_GROUPS))):
        raise ValueError(f"weights must be fp8, int4, int4-64, int4-128 or nvfp4, got {text!r}")
    chosen = _USUAL_PARTS[format] if parts is None else parts
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
    return Target(format, int(group) if group else _GROUPS[format], tuple(chosen))


def resolve_weights(text: str) -> Target | str:
    """What a user asks for: "stored", "plain" or a format of parse_target. Raises ValueError for anything else."""
    return text if text in ("stored", "plain") else parse_target(text)
