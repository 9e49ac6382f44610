"""One layer's experts at true width beside AMD's zentorch, in one process by turns: processor seconds of one thread.

    OMP_WAIT_POLICY=passive .venv/vllm/bin/python bench/peers_experts.py --zentorch zen build/*/libdgemma.so

Runs in the Python that zentorch is made for (docs/performance.md says how to get both) and calls this package's C
library: several of them, say of two builds, have their turns. Random weights in bfloat16, uniform routing, 3 GB of
memory, under a minute. The error is that of fp32 arithmetic on 16 tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import c_interface

HIDDEN, EXPERT, EXPERTS, TOP_K = 2816, 704, 128, 8
Side = Callable[[], Tensor]


class Layer:
    """Inputs and weights of a call."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        self.tokens = tokens
        self.input = torch.randn(tokens, HIDDEN).bfloat16()
        self.gate_up = torch.empty(EXPERTS, 2 * EXPERT, HIDDEN, dtype=torch.bfloat16).normal_(0, 0.02)
        self.down = torch.empty(EXPERTS, HIDDEN, EXPERT, dtype=torch.bfloat16).normal_(0, 0.02)
        self.ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
        self.weights = torch.rand(tokens, TOP_K)

    def exact(self, token: int) -> Tensor:
        """A token's result in fp32."""
        result, x = torch.zeros(HIDDEN), self.input[token].float()
        for expert, weight in zip(self.ids[token].tolist(), self.weights[token], strict=True):
            gate, up = (self.gate_up[expert].float() @ x).chunk(2)
            result += weight * (self.down[expert].float() @ (functional.gelu(gate, approximate="tanh") * up))
        return result


def ours(layer: Layer, path: str) -> Side:
    library = ctypes.CDLL(path)
    output = torch.empty_like(layer.input)
    operands = {
        "tokens": layer.tokens,
        "hidden_size": HIDDEN,
        "expert_size": EXPERT,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "dtype": torch.bfloat16,
        "input": layer.input,
        "expert_ids": layer.ids,
        "expert_weights": layer.weights,
        "gate_up": layer.gate_up,
        "down": layer.down,
        "output": output,
    }
    workspace = c_interface.workspace(library, "cpu_moe_ffn", **operands)

    def run() -> Tensor:
        c_interface.must(library, "cpu_moe_ffn", **operands, workspace=workspace, workspace_bytes=workspace.numel())
        return output

    return run


def zentorch(layer: Layer) -> Side:
    output = torch.zeros_like(layer.input)

    def run() -> Tensor:
        torch.ops.zentorch.zentorch_fused_moe(
            output,
            layer.input,
            layer.gate_up,
            layer.down,
            None,
            None,
            layer.weights,
            layer.ids,
            False,
            "gelu_tanh",
        )
        return output

    return run


def seconds_by_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side()
            found[name].append(time.process_time() - start)
    return {name: sorted(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", help="libdgemma.so of this package")
    parser.add_argument("--zentorch", required=True, help="the folder that zentorch is in")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.zentorch)
    import zentorch as _  # noqa: F401  It registers its operators.

    torch.set_num_threads(1)
    layer = Layer(arguments.tokens)
    sides = {"zentorch": zentorch(layer), **{path: ours(layer, path) for path in arguments.libraries}}
    exact = torch.stack([layer.exact(token) for token in range(min(16, layer.tokens))])
    errors = {
        name: ((side()[: len(exact)].float() - exact).norm() / exact.norm()).item() for name, side in sides.items()
    }
    times = seconds_by_turns(sides, arguments.rounds)
    least, middle = times["zentorch"][0], times["zentorch"][arguments.rounds // 2]
    print(f"{layer.tokens} tokens, {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for name, found in times.items():
        half = found[arguments.rounds // 2]
        print(
            f"{name}: least {found[0] * 1e3:.1f} ms ({found[0] / least:.3f} of zentorch), median {half * 1e3:.1f} ms "
            f"({half / middle:.3f}), relative error {errors[name]:.1e}"
        )


if __name__ == "__main__":
    main()
