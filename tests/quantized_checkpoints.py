"""Writes small checkpoints in the published quantized layouts, by the package that defines the layout if there is one.

`requantize` rewrites an unquantized checkpoint: experts one by one, as all publishers store them, and matrices in a
layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, Nvfp4Weight

LAYER = r"model\.decoder\.layers\.\d+\."
# The parts that the published checkpoint of a layout quantizes.
MATRICES = {
    "fp8": rf"{LAYER}(self_attn\.[qkvo]_proj|mlp\.\w+_proj|experts\.\d+\.\w+)\.weight",
    "int4": rf"{LAYER}(self_attn\.[qkvo]_proj|experts\.\d+\.\w+)\.weight",
    "nvfp4": rf"{LAYER}(mlp\.\w+_proj|experts\.\d+\.\w+)\.weight",
    "nvfp4-modelopt": rf"{LAYER}experts\.\d+\.\w+\.weight",
}
# Publishers' lists of ignored modules use the names of the encoder or of the decoder.
IGNORED = ["lm_head", "model.encoder.language_model.layers.0.router.proj", "model.decoder.layers.1.router.proj"]

Stored = dict[str, Tensor]
Decompress = Callable[[Stored], Tensor]


def schemes() -> Any:
    """The package's schemes by layout, and its compressor of each."""
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    int4 = preset_name_to_scheme("W4A16", ["Linear"])
    assert int4.weights is not None
    int4.weights.group_size = 32
    return {
        "fp8": (preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]), FloatQuantizationCompressor),
        "int4": (int4, PackedQuantizationCompressor),
        "nvfp4": (preset_name_to_scheme("NVFP4", ["Linear"]), NVFP4PackedCompressor),
    }


def compress(layout: str, weight: Tensor, scale_dtype: torch.dtype) -> tuple[Stored, Tensor]:
    """A matrix as the layout stores it (by suffix), and as the defining package reads it back in `scale_dtype`."""
    if layout == "nvfp4-modelopt":
        made = Nvfp4Weight.quantize(weight)
        scale = made.global_scales.reciprocal()
        parts = {
            "weight": made.values,
            "weight_scale": made.scales.view(torch.float8_e4m3fn),
            "weight_scale_2": scale[0],
            "input_scale": torch.tensor(0.01),
        }
        # ModelOpt's NVFP4QTensor.dequantize: block scales times the scale of the tensor, times the values.
        return parts, Nvfp4Weight(made.values, made.scales, scale, divides=False).dequantized(torch.bfloat16)
    scheme, compressor = schemes()[layout]
    given = {"weight": weight.float()}
    if layout == "fp8":
        given["weight_scale"] = Fp8Weight.quantize(weight).scales[:, None].to(scale_dtype)
    elif layout == "int4":
        given["weight_scale"] = Int4Weight.quantize(weight, 32).scales.to(scale_dtype)
    else:
        made = Nvfp4Weight.quantize(weight)
        given["weight_scale"] = made.scales.view(torch.float8_e4m3fn).float()
        given["weight_global_scale"] = made.global_scales
    parts = compressor.compress(given, scheme)
    back = compressor.decompress(parts, scheme)["weight"]
    if layout == "nvfp4":
        parts["input_global_scale"] = torch.tensor([2.0])
    return parts, back


def unfuse(tensors: Stored) -> Stored:
    """Splits stacked experts."""
    result: Stored = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(half.chunk(2) for half in tensor):
                result[f"{base}{expert}.gate_proj.weight"] = gate.contiguous()
                result[f"{base}{expert}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                result[f"{base}{expert}.down_proj.weight"] = down.contiguous()
        else:
            result[name] = tensor
    return result


def requantize(
    folder: Path, layout: str, matrices: str | None = None, scale_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Rewrites model.safetensors and config.json; returns the quantized matrices as the package dequantizes them."""
    file = folder / "model.safetensors"
    stored: Stored = {}
    back: dict[str, Tensor] = {}
    pattern = re.compile(matrices or MATRICES[layout])
    for name, tensor in unfuse(load_file(file)).items():
        if pattern.fullmatch(name):
            parts, back[name] = compress(layout, tensor, scale_dtype)
            stored |= {f"{name.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(layout)
    (folder / "config.json").write_text(json.dumps(config))
    return back


def quantization_config(layout: str) -> dict[str, Any]:
    if layout == "nvfp4-modelopt":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": IGNORED}
    from compressed_tensors.quantization import QuantizationConfig

    scheme = schemes()[layout][0]
    names = {"fp8": "float-quantized", "int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
    written = QuantizationConfig(
        config_groups={"group_0": scheme}, format=names[layout], quantization_status="compressed", ignore=IGNORED
    )
    return json.loads(json.dumps(written.to_dict(), default=str))  # type: ignore[no-any-return]
