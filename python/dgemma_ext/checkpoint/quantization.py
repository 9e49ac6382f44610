"""The quantization section of config.json, and the formats that weights can be quantized to.

Which tensors are quantized, and how, is read off the tensors themselves (stored.py). The section's lists of ignored
modules are not read: publishers spell them with the encoder's names or the decoder's, both for the same tensors. Only
the kind of the files is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dgemma_ext import arguments
from dgemma_ext.checkpoint.json_section import kind_of
from dgemma_ext.ops.formats import FORMATS, INT4_GROUPS
from dgemma_ext.ops.quantize import Quantized, quantize

_ADVICE = "load the unquantized checkpoint: weights quantizes it while loading, `dgemma quantize` once for all"
# What other methods and layouts are called by those who use them.
_CALLED = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8 with a scale for each block",
    "gptq": "GPTQ",
    "naive-quantized": "INT8",
    "mxfp4": "MXFP4",
}

# compressed-tensors' names of layouts, and ModelOpt's of algorithms.
_LAYOUTS = ("float-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized", "dense", "mixed-precision")
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")

# Attributes of LayerWeights by the part of a layer that they belong to.
PARTS: dict[str, tuple[str, ...]] = {
    "experts": ("experts_gate_up", "experts_down"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# The parts that published checkpoints of each format quantize (RedHatAI FP8-dynamic, cyankiwi INT4, nvidia NVFP4).
_USUAL_PARTS = {"fp8": ("experts", "attention", "mlp"), "int4": ("experts", "attention"), "nvfp4": ("experts",)}
_USUAL_PARTS["int8"] = _USUAL_PARTS["fp8"]  # as in aidendle94's INT8-dynamic

# What weights can be quantized to; "int4" has groups of 32.
_TARGETS = ("fp8", "int8", "int4", *(f"int4-{group}" for group in INT4_GROUPS), "nvfp4")


def check_quantization_config(section: Any) -> None:
    """Raises ValueError, naming the field of config.json, for a quantization that cannot be read."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise ValueError(f"quantization_config is {kind_of(section)}; wanted: an object or null")
    method = section.get("quant_method")
    if method is None and {"group_size", "bits"} <= section.keys():
        raise ValueError(f"quantization is that of MLX, whose weights this engine does not read; {_ADVICE}")
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
    if section.get("transform_config"):  # rotations of what a layer takes in, which the weights alone do not tell
        raise _refusal("transform_config", section["transform_config"], ("null",))
    groups = section.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"quantization_config.config_groups is {kind_of(groups)}; wanted: an object")
    for name, group in groups.items():
        path = f"config_groups.{name}"
        if isinstance(group, Mapping) and group.get("format") not in (None, *_LAYOUTS):
            raise _refusal(f"{path}.format", group.get("format"), _LAYOUTS)
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        if weights.get("symmetric") is False:
            raise _refusal(f"{path}.weights.symmetric", False, ("true",))
        if weights.get("actorder") in ("group", True):
            raise _refusal(f"{path}.weights.actorder", weights.get("actorder"), ("null", "static"))
        if weights.get("type", "int") == "int":
            _check_integers(path, group, weights, section["format"])


def _check_integers(path: str, group: Mapping[str, Any], weights: Mapping[str, Any], layout: str) -> None:
    """Raises ValueError for integers other than those of 4 bits, and of 8 with inputs that are rounded alike."""
    bits = weights.get("num_bits")
    is_int8 = (group.get("format") or layout) == "int-quantized"
    if bits != (8 if is_int8 else 4):
        wanted = "8 for integers of int-quantized" if is_int8 else "4 for integers"
        raise _refusal(f"{path}.weights.num_bits", bits, (wanted,))
    if not is_int8:
        return
    if weights.get("strategy") not in ("channel", "tensor"):
        raise _refusal(f"{path}.weights.strategy", weights.get("strategy"), ("channel", "tensor"))
    inputs = group.get("input_activations")
    if not isinstance(inputs, Mapping):
        raise _refusal(f"{path}.input_activations", inputs, ("8 bits, dynamic, by token",))
    settings: dict[str, Any] = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token", "type": "int"}
    for field, wanted in settings.items():
        if inputs.get(field, "int" if field == "type" else None) != wanted:
            raise _refusal(f"{path}.input_activations.{field}", inputs.get(field), (str(wanted).lower(),))


def _refusal(field: str, got: Any, wanted: tuple[str, ...]) -> ValueError:
    shown = arguments.shown(got) + (f" ({_CALLED[got]})" if isinstance(got, str) and got in _CALLED else "")
    return ValueError(f"quantization_config.{field} is {shown}; supported: {', '.join(wanted)}; or {_ADVICE}")


@dataclass(frozen=True)
class Target:
    """A format to quantize weights to, and the parts of a layer that are quantized."""

    format: str
    group: int
    parts: tuple[str, ...]

    def wants(self, attribute: str) -> bool:
        """Whether the matrix of this attribute of LayerWeights is quantized."""
        return any(attribute in PARTS[part] for part in self.parts)

    def group_for(self, columns: int) -> int | None:
        """The number of columns that share a scale, 0 where a whole row does. For int4 the wanted group is halved until
        it divides `columns`. None where no group divides them: such a matrix stays unquantized."""
        group = self.group
        while group and columns % group:
            if group == min(FORMATS[self.format].groups):
                return None
            group //= 2
        return group

    def quantize(self, matrices: list[Tensor], importance: Tensor | None = None) -> list[Quantized]:
        """Quantizes matrices [rows, columns] that other engines multiply as one (an expert's gate and up).

        In nvfp4 they share the global scale. importance: ops.quantize. `group_for` of their columns must not be None.
        """
        group = self.group_for(matrices[0].shape[-1])
        assert group is not None, "the caller has checked that a group divides the columns"
        return quantize(matrices, self.format, group, importance)


def parse_target(text: str, parts: Sequence[str] | None = None, name: str = "weights") -> Target:
    """Parses "fp8", "int8", "int4" (groups of 32), "int4-64", "int4-128" or "nvfp4"; raises ValueError, naming the
    argument `name`, for anything else.

    `parts` of a layer default to those that the published checkpoints of the format quantize.
    """
    format, _, group = arguments.choice(name, text, _TARGETS).partition("-")
    wanted = f"some of {', '.join(PARTS)}"
    chosen = _USUAL_PARTS[format] if parts is None else arguments.sequence("parts", parts, wanted)
    if not chosen:
        raise ValueError(f"parts must be {wanted}, got none")
    for part in chosen:
        arguments.choice("parts", part, PARTS)
    return Target(format, int(group) if group else FORMATS[format].usual_group, tuple(chosen))


def resolve_weights(text: str) -> Target | str:
    """The option `weights`: "auto", "unquantized" or a format of parse_target. Raises ValueError for anything else."""
    arguments.choice("weights", text, ("auto", "unquantized", *_TARGETS))
    return text if text in ("auto", "unquantized") else parse_target(text)
