"""As many blocks fit a multiprocessor as the plans of products and attention count on; no GPU has answered this yet.

A block takes its share of the work from the start, so one that had to wait for another to end would double the time and
change no number: only the driver knows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgemma_ext.ops import block_attention, grouped_gemm, quantized_gemm
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, Int8Weight, Nvfp4Weight, QuantizedWeight

HIDDEN, EXPERT, EXPERTS, TOP_K = 256, 128, 4, 2
# Every token tile of every path: 32, 64 and 128 or more.
TOKENS = [16, 64, 128, 512]


def products(device: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every call whose grid counts on blocks at once, by a name that says where it fails."""
    gate_up = torch.randn(EXPERTS, 2 * EXPERT, HIDDEN, device=device).bfloat16()
    down = torch.randn(EXPERTS, HIDDEN, EXPERT, device=device).bfloat16()
    weight = gate_up[0]
    quantized: dict[str, tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]] = {
        "fp8": (Fp8Weight.quantize(gate_up), Fp8Weight.quantize(down), Fp8Weight.quantize(weight)),
        "int8": (Int8Weight.quantize(gate_up), Int8Weight.quantize(down), Int8Weight.quantize(weight)),
        "int4": (Int4Weight.quantize(gate_up, 32), Int4Weight.quantize(down, 32), Int4Weight.quantize(weight, 32)),
        "nvfp4": (Nvfp4Weight.quantize(gate_up, 2), Nvfp4Weight.quantize(down), Nvfp4Weight.quantize(weight)),
    }
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
        ids = torch.arange(tokens * TOP_K, dtype=torch.int32, device=device).view(tokens, TOP_K) % EXPERTS
        call = x, ids, torch.ones(tokens, TOP_K, device=device)
        found: dict[str, Callable[[], Tensor]] = {
            "experts, bfloat16": partial(grouped_gemm.moe_ffn, *call, gate_up, down),
            "dense, bfloat16": partial(grouped_gemm.dense, x, weight),
            "experts, fp8 with activations": partial(quantized_gemm.moe_ffn_fp8, *call, *quantized["fp8"][:2]),
        }
        for name, (*experts, single) in quantized.items():
            found[f"experts, {name}"] = partial(quantized_gemm.moe_ffn, *call, *experts)
            found[f"dense, {name}"] = partial(quantized_gemm.dense, x, single)
        for name, product in found.items():
            yield f"{name}, {tokens} tokens", product
    slot, prefix_length = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, 96))
    for head_dim in (16, 32, 64, 128, 256, 512):
        shapes = ((64, 2), (64, 1), (96, 1))
        query, key, prefix = (torch.randn(1, *shape, head_dim, device=device).bfloat16() for shape in shapes)
        operands = query, key, key, prefix, prefix, slot, prefix_length
        yield f"attention, head dimension {head_dim}", partial(block_attention.canvas_attention, *operands)


def call_all(device: str) -> list[str]:
    """What was refused, by name."""
    refused = []
    for name, product in products(device):
        try:
            product()
        except (RuntimeError, ValueError) as error:
            if "this GPU has compute capability" not in str(error):  # not every GPU has products of e4m3
                refused.append(f"{name}: {error}")
    return refused


@pytest.mark.gpu
def test_blocks_fit_as_the_plans_count_on() -> None:
    """In a process of its own: the kernels read the environment once."""
    program = "import sys, test_gpu_residency as t; refused = t.call_all('cuda'); sys.exit('\\n'.join(refused) or 0)"
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "DGEMMA_RESIDENCY": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
