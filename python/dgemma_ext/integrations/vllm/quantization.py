"""The quantized checkpoints whose experts our grouped GEMM multiplies: vLLM's own configurations of them, with another
method for the experts, and for dense layers that vLLM has no kernel for.

They are registered under names of their own (`register_quantization_config`) and take over, by
`override_quantization_method`, checkpoints of DiffusionGemma alone: other models never meet them. Every other layer
has vLLM's own method. Configurations travel between vLLM's processes, so their classes stand in a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.platforms import current_platform

from dgemma_ext.integrations.vllm import configuration
from dgemma_ext.integrations.vllm.experts import experts_target, serves
from dgemma_ext.integrations.vllm.quantized_experts import DGemmaQuantizedFusedMoEMethod
from dgemma_ext.integrations.vllm.quantized_linear import DGemmaLinearScheme, lacks_a_kernel
from dgemma_ext.integrations.vllm.stored_experts import Scheme
from dgemma_ext.ops.formats import INT4_GROUPS, NVFP4_GROUP

COMPRESSED_TENSORS, MODELOPT = "dgemma-compressed-tensors", "dgemma-modelopt"

_logger = init_logger("vllm.plugins.dgemma")
_STAYS = "The checkpoint's experts stay with vLLM's own kernels: %s"


class Unsupported(Exception):
    """Experts that our formats do not hold; the text says why."""


@register_quantization_config(COMPRESSED_TENSORS)
class CompressedTensors(CompressedTensorsConfig):  # type: ignore[misc]
    """compressed-tensors, as `dgemma quantize` and llm-compressor write it."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        theirs = "compressed-tensors"
        is_theirs = hf_quant_cfg.get("quant_method") == theirs
        return COMPRESSED_TENSORS if is_theirs and _takes(hf_config, user_quant, theirs, COMPRESSED_TENSORS) else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        ours = _method(layer, lambda: self._scheme(layer, prefix)) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)

    def get_scheme_dict(self, layer: Any, layer_name: str | None = None) -> Any:
        """By vLLM's name of a module and by the checkpoint's: vLLM rewrites exact names in lists of targets and of what
        is ignored, and leaves regular expressions, which were written for the checkpoint's."""
        names = _spellings(layer_name)
        if any(should_ignore_layer(name, self.ignore, self.packed_modules_mapping) for name in names):
            return None
        # A class of modules is the last resort, after all names.
        for name in names[:-1]:
            found = super().get_scheme_dict(torch.nn.Module(), name)
            if found is not None:
                return found
        return super().get_scheme_dict(layer, names[-1])

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        """Of a dense layer."""
        settings = self.get_scheme_dict(layer, layer_name)
        if settings is not None and settings.get("weights") is not None:
            with contextlib.suppress(Unsupported):
                scheme = scheme_of(settings, settings)
                if lacks_a_kernel(scheme, torch.get_default_dtype()):  # which is the model's while it is made
                    return DGemmaLinearScheme(scheme, layer_name)
        return super().get_scheme(layer, layer_name)

    def _scheme(self, layer: Any, prefix: str) -> Scheme | None:
        """None where the experts are not quantized."""
        if self.transform_config is not None:
            raise Unsupported("transform_config may rotate what goes into them")
        # In the checkpoint's model every projection is a Linear, which is what lists of targets name.
        linear = torch.nn.Linear(1, 1, device="meta")
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        gate, up, down = (self.get_scheme_dict(linear, f"{prefix}.0.{name}") for name in names)
        if gate != up or (gate is None) != (down is None):
            raise Unsupported("their gate, up and down projections are not quantized alike")
        return None if gate is None else scheme_of(gate, down)


@register_quantization_config(MODELOPT)
class ModelOptNvFp4(ModelOptNvFp4Config):  # type: ignore[misc]
    """ModelOpt's NVFP4."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        theirs = super().override_quantization_method(hf_quant_cfg, user_quant, hf_config=hf_config)
        is_ours = theirs is not None and _takes(hf_config, user_quant, "modelopt", theirs, MODELOPT)
        return MODELOPT if is_ours else None

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes: list[torch.dtype] = super().get_supported_act_dtypes()
        return [*dtypes, torch.float32] if current_platform.is_cpu() else dtypes

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method  # which refuses on a CPU what has no kernel of vLLM's there
        if isinstance(layer, RoutedExperts) and not self.is_layer_excluded(prefix):
            return _method(layer, self._scheme) or method(layer, prefix)
        if isinstance(layer, LinearBase) and not self.is_layer_excluded(prefix) and "vision_tower" not in prefix:
            with contextlib.suppress(Unsupported):
                scheme = self._scheme()
                if lacks_a_kernel(scheme, torch.get_default_dtype()):
                    layer.scheme = DGemmaLinearScheme(scheme, prefix)
                    return CompressedTensorsLinearMethod(self)  # which hands everything to the layer's scheme
        return method(layer, prefix)

    def _scheme(self) -> Scheme:
        if self.group_size != NVFP4_GROUP:
            raise Unsupported(f"{self.group_size} columns share a scale, in place of {NVFP4_GROUP}")
        return Scheme("nvfp4", (NVFP4_GROUP, NVFP4_GROUP), modelopt=True)


def say_what_stays(vllm_config: Any) -> None:
    """A line in the log for a model of another quantization method."""
    method = vllm_config.model_config.quantization
    if method not in (None, COMPRESSED_TENSORS, MODELOPT):
        _logger.warning_once(_STAYS, f"they are quantized by {method}")


def scheme_of(gate_up: dict[str, Any], down: dict[str, Any]) -> Scheme:
    """What compressed-tensors' settings of gate and up, and of down, mean; raises Unsupported for what the formats do
    not hold."""
    first, second = _format_of(gate_up), _format_of(down)
    if first[:2] != second[:2]:
        named = [f"{one[0]} with a scale for a matrix" if one[1] else one[0] for one in (first, second)]
        raise Unsupported(f"gate and up are {named[0]}, and down is {named[1]}")
    return Scheme(first[0], (first[2], second[2]), by_matrix=first[1])


def _format_of(settings: dict[str, Any]) -> tuple[str, bool, int]:
    """Format, whether a matrix has one scale, and the columns that share one."""
    weights, inputs = settings["weights"], settings.get("input_activations")
    kind, strategy = f"{_text(weights.type)}{weights.num_bits}", _text(weights.strategy)
    group = weights.group_size or 0
    if not weights.symmetric or weights.dynamic:
        raise Unsupported(f"their {kind} weights are {'dynamic' if weights.dynamic else 'not symmetric'}")
    if kind in ("float8", "int8") and strategy in ("channel", "tensor"):
        if kind == "int8":
            _check_int8(settings.get("format"), inputs)
        return "fp8" if kind == "float8" else "int8", strategy == "tensor", 0
    if kind == "int4" and strategy == "group" and group in INT4_GROUPS:
        if inputs is not None:
            raise Unsupported(f"their int4 weights want inputs of {inputs.num_bits} bits")
        return "int4", False, group
    if kind == "float4" and strategy == "tensor_group" and group == NVFP4_GROUP:
        return "nvfp4", False, group
    sharing = f"one for {group} columns" if group else f"by {strategy}"
    raise Unsupported(f"their weights are {kind} with scales {sharing}")


def _check_int8(layout: str | None, inputs: Any) -> None:
    """INT8 weights multiply what is rounded to INT8 token by token, and no other inputs."""
    if layout != "int-quantized":
        raise Unsupported(f"their int8 weights are {layout}, in place of int-quantized")
    wanted = inputs is not None and inputs.num_bits == 8 and inputs.symmetric and inputs.dynamic is True
    if not wanted or _text(inputs.type) != "int" or _text(inputs.strategy) != "token":
        raise Unsupported("their int8 weights want inputs that are not rounded to int8 for each token")


def _spellings(name: str | None) -> list[str | None]:
    """A module's names: vLLM's, and those of the checkpoint's decoder and encoder, which share their layers."""
    if name is None or not name.startswith("model."):
        return [name]
    inner = name.removeprefix("model.")
    return [name, f"model.decoder.{inner}", f"model.encoder.language_model.{inner}"]


def _text(setting: Any) -> str:
    """An enumerator's value."""
    return str(getattr(setting, "value", setting))


def _takes(hf_config: Any, user_quant: str | None, *names: str) -> bool:
    """Whether the model is DiffusionGemma, and the user asks for no other method."""
    is_ours = configuration.ARCHITECTURE in (getattr(hf_config, "architectures", None) or ())
    return is_ours and user_quant in (None, *names)


def _method(layer: Any, find: Callable[[], Scheme | None]) -> DGemmaQuantizedFusedMoEMethod | None:
    """Our method for quantized experts that it serves; None where vLLM's own has them, with a line in the log that says
    why.

    Raises ValueError where groups of columns lie across ranks, and where DGEMMA_VLLM_EXPERTS asks for another format.
    """
    moe, target = layer.moe_config, experts_target()
    try:
        scheme = find()
        if scheme is None:
            return None
        if not serves(moe):
            raise Unsupported(f"no kernel of ours takes {moe.activation.value} in {moe.in_dtype} on this device")
        _check_shards(scheme, moe)
        own = moe.intermediate_size_per_partition
        refusal = scheme.refusal(moe.hidden_dim, own, cuda=not current_platform.is_cpu())
        if refusal is not None:
            raise Unsupported(refusal)
    except Unsupported as why:
        if target is not None:
            raise ValueError(
                f"DGEMMA_VLLM_EXPERTS is {target.format}, and the checkpoint has its experts quantized already: {why}"
            ) from why
        _logger.warning_once(_STAYS, str(why))
        return None
    if target is not None and target.format != scheme.format:
        raise ValueError(
            f"DGEMMA_VLLM_EXPERTS is {target.format}, and the checkpoint has its experts in {scheme.format}"
        )
    return DGemmaQuantizedFusedMoEMethod(moe, scheme)


def _check_shards(scheme: Scheme, moe: Any) -> None:
    own, group = moe.intermediate_size_per_partition, scheme.groups[1]
    if group and own % group:
        raise ValueError(
            f"tensor parallelism over {moe.tp_size} ranks gives each {own} columns of the experts' down projection, "
            f"and {group} of them share a scale; another --tensor-parallel-size or --enable-expert-parallel keeps them "
            "together"
        )
