"""Quantized weights against the package that defines their formats, compressed-tensors, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgemma_ext.ops.formats import INT4_GROUPS, Fp8Weight, Int4Weight, Nvfp4Weight

pytest.importorskip("compressed_tensors", reason="compared with the package compressed-tensors, which is not here")

from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

ROWS, COLUMNS = 48, 256


def weights() -> Tensor:
    """Rows of very different sizes, a group of zeros, a row of zeros, an outlier."""
    made = torch.randn(ROWS, COLUMNS) * torch.logspace(-6, 3, ROWS)[:, None]
    made[3, 128:256] = 0
    made[5] = 0
    made[7, 11] = 1000 * made[7].abs().max()
    return made


def int4_scheme(group: int) -> QuantizationScheme:
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    assert scheme.weights is not None
    scheme.weights.group_size = group
    return scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_is_the_packages(dtype: torch.dtype) -> None:
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    weight = weights()
    ours = Fp8Weight.quantize(weight)
    scale, _ = calculate_qparams(weight.amin(1, True), weight.amax(1, True), scheme.weights)
    scale = torch.where(scale.bfloat16() == 0, torch.finfo(torch.bfloat16).eps, scale).bfloat16().float()
    # A row of zeros may have any scale, and the two packages choose different ones.
    scale[5] = ours.scales[5]
    assert torch.equal(ours.scales[:, None], scale)
    theirs = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert torch.equal(theirs["weight"].view(torch.uint8), ours.values)
    stored = {"weight": theirs["weight"], "weight_scale": scale.to(dtype)}
    back = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
    read = Fp8Weight(ours.values, scale.to(dtype).float()[:, 0])
    assert torch.equal(read.dequantized(dtype), back)


@pytest.mark.parametrize("group", INT4_GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int4_is_the_packages(group: int, dtype: torch.dtype) -> None:
    scheme = int4_scheme(group)
    weight = weights()
    ours = Int4Weight.quantize(weight, group)
    grouped = weight.unflatten(-1, (-1, group))
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    given = grouped.abs().amax(-1) > 0
    assert torch.equal(ours.scales[given], scale.bfloat16()[given])
    theirs = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": ours.scales.float()}, scheme)
    assert torch.equal(theirs["weight_packed"].view(torch.uint8), ours.values)
    stored = {**theirs, "weight_scale": ours.scales.to(dtype)}
    back = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(Int4Weight(ours.values, ours.scales.to(dtype)).dequantized(dtype), back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_is_the_packages(dtype: torch.dtype) -> None:
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    weight = weights().clamp(-100, 100)
    ours = Nvfp4Weight.quantize(weight)
    stored = {
        "weight": weight,
        "weight_scale": ours.scales.view(torch.float8_e4m3fn).float(),
        "weight_global_scale": ours.global_scales,
    }
    theirs = NVFP4PackedCompressor.compress(stored, scheme)
    assert torch.equal(theirs["weight_packed"], ours.values)
    back = NVFP4PackedCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(ours.dequantized(torch.bfloat16), back)
    assert torch.equal(ours.dequantized(dtype).bfloat16(), back)
