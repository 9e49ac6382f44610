"""The formats of quantized weights: every code, and how numbers are rounded to them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dgemma_ext.checkpoint import Target
from dgemma_ext.ops.formats import (
    E2M1_VALUES,
    FORMATS,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Nvfp4Weight,
    QuantizedWeight,
    format_by_number,
)
from dgemma_ext.ops.quantize import quantize
from sim.build import ROOT


def test_every_fp8_code() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)[None]
    exact = codes.view(torch.float8_e4m3fn).double()
    scales = torch.tensor([0.375])
    assert torch.equal(Fp8Weight(codes, scales).dequantized(torch.float32).double(), exact * 0.375)


def test_every_int8_code() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)[None]
    weight = Int8Weight(codes.view(torch.uint8), torch.tensor([0.375]))
    assert weight.dequantized(torch.float32)[0].tolist() == [0.375 * code for code in range(-128, 128)]


def test_every_int4_code() -> None:
    codes = torch.arange(32) % 16
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)[None]
    weight = Int4Weight(packed, torch.tensor([[0.25]], dtype=torch.bfloat16))
    assert weight.group == 32
    assert weight.dequantized(torch.float32)[0].tolist() == [(int(code) - 8) / 4 for code in codes]


def test_every_nvfp4_code() -> None:
    codes = torch.arange(16)
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)[None]
    scale = torch.tensor([[1.5]]).to(torch.float8_e4m3fn).view(torch.uint8)
    for divides, factor in ((True, 1 / 4), (False, 4.0)):
        weight = Nvfp4Weight(packed, scale, torch.tensor([4.0]), divides)
        assert weight.dequantized(torch.float32)[0].tolist() == [value * 1.5 * factor for value in E2M1_VALUES]
        assert weight.kernel_row_scales.tolist() == [factor]


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    # The largest value of a group is 6 and its scale one, so that the values are the codes' own.
    row = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6]])
    weight = Nvfp4Weight.quantize(row, global_scales=torch.tensor([1.0]))
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert weight.dequantized(torch.float32)[0].tolist() == wanted + [-value for value in wanted]


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.03), ("int8", 0.012), ("int4", 0.11), ("nvfp4", 0.11)])
def test_error_of_normal_weights(name: str, bound: float) -> None:
    """The error of normal weights, which a wrong scale or a swapped pair of columns would far exceed."""
    weight = torch.randn(64, 256)
    made = quantized(name, weight)
    error = float((made.dequantized(torch.float32) - weight).norm() / weight.norm())
    assert bound / 4 < error < bound


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_experts_are_quantized_one_by_one(name: str) -> None:
    stack = torch.randn(3, 16, 64) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    together = quantized(name, stack)
    assert together.shape == (3, 16, 64)
    for expert in range(3):
        alone = quantized(name, stack[expert])
        assert torch.equal(together.dequantized(torch.float32)[expert], alone.dequantized(torch.float32))
    assert together.nbytes == 3 * quantized(name, stack[0]).nbytes


def quantized(name: str, weight: Tensor) -> QuantizedWeight:
    if name == "int4":
        return Int4Weight.quantize(weight, 32)
    if name == "int8":
        return Int8Weight.quantize(weight)
    return Fp8Weight.quantize(weight) if name == "fp8" else Nvfp4Weight.quantize(weight)


def test_the_list_of_formats_is_that_of_the_c_interface() -> None:
    header = (ROOT / "csrc" / "include" / "dgemma" / "grouped_gemm.h").read_text()
    enumerators = dict(re.findall(r"DGEMMA_WEIGHTS_(\w+) = (\d+)", header))
    assert {form.name.upper(): str(form.number) for form in FORMATS.values()} == enumerators
    assert all(form.weight.name == name for name, form in FORMATS.items())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_bytes_are_told_before_anything_is_quantized(name: str) -> None:
    form = FORMATS[name]
    made = quantize([torch.randn(6, 64)], name, 32 if name == "int4" else 0)[0].weight
    whole_tensor = made.tensors().get("global_scales", torch.empty(0)).nbytes
    assert form.nbytes(6 * 64, 64, made.group) == made.nbytes - whole_tensor


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_weight_comes_back_from_what_kernels_take(name: str) -> None:
    made = quantized(name, torch.randn(6, 64))
    parts = (made.values, made.kernel_scales, made.kernel_row_scales)
    back = format_by_number(FORMATS[name].number).weight.from_kernel(*parts)
    assert torch.allclose(back.dequantized(torch.float32), made.dequantized(torch.float32), rtol=1e-6)
    with pytest.raises(ValueError, match=f"scales: got None, wants those of {name}"):
        FORMATS[name].weight.from_kernel(made.values, None, None)


def test_a_format_that_is_in_no_list_is_not_taken_for_another() -> None:
    with pytest.raises(KeyError, match="int3"):
        Target("int3", 32, ("experts",)).quantize([torch.randn(8, 64)])
    with pytest.raises(KeyError, match="5"):
        format_by_number(5)
