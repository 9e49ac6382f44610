"""What an adapter costs a denoising step on a CPU: two layers at true width, by turns without one, with one of rank 16
on all projections of both passes, and with one of rank 8 on the experts.

    python bench/bench_adapters.py                      # a minute; 6 GB of memory

CPU time of one thread for the layers of a step with a canvas of 256 after 128 tokens; the head and what comes after it
are the same. Compare shares, not times.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

import dgemma_ext as dg
from dgemma_ext.checkpoint import LayerConfig
from dgemma_ext.profile.true_size import random_model, true_config

LAYERS, CANVAS, PREFIX = 2, 256, 128
STACKS = ("decoder", "encoder.language_model")


def factors(config: dg.ModelConfig, kind: str, rank: int) -> dg.Adapter:
    """An adapter of the projections or the experts, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for stack in STACKS:
        for layer in config.layers:
            for module, (size_in, size_out) in _sizes(config, layer, kind).items():
                name = f"base_model.model.model.{stack}.layers.{layer.index}.{module}"
                rows = rank * config.num_experts if kind == "experts" else rank
                tensors[f"{name}.lora_A.weight"] = 0.01 * torch.randn(rows, size_in, generator=generator)
                tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(size_out, rows, generator=generator)
    return dg.Adapter.from_tensors({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors, config)


def _sizes(config: dg.ModelConfig, layer: LayerConfig, kind: str) -> dict[str, tuple[int, int]]:
    """Module of a layer → columns and rows of its weight."""
    hidden, inner, expert = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
    if kind == "experts":
        return {"experts": (expert, hidden), "experts.base_layer": (hidden, 2 * expert)}
    queries, keys = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    sizes = {"self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys)}
    if not layer.k_eq_v:
        sizes["self_attn.v_proj"] = (hidden, keys)
    sizes |= {"self_attn.o_proj": (queries, hidden), "mlp.down_proj": (inner, hidden)}
    return sizes | {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model(true_config(LAYERS), "cpu")
    network = model.network
    for name, kind, rank in (("projections, rank 16", "projections", 16), ("experts, rank 8", "experts", 8)):
        network.load_adapter(name, factors(model.config, kind, rank))
    generator = torch.Generator().manual_seed(1)
    prompt, canvas = (torch.randint(0, model.config.vocab_size, (1, n), generator=generator) for n in (PREFIX, CANVAS))
    caches, best = {}, dict.fromkeys(("base", *network.adapters), float("inf"))
    for name in best:
        caches[name] = model.new_cache(1, PREFIX)
        model.encode(prompt, caches[name], adapter=name)
    for _ in range(arguments.rounds):
        for name, cache in caches.items():
            rows = network.canvas_in_slot(canvas, cache, 0, adapter=network.adapters.named(name))
            began = time.process_time()
            network.forward(cache, rows)
            best[name] = min(best[name], time.process_time() - began)
    print(f"load {os.getloadavg()[0]:.1f}; CPU seconds, the best of {arguments.rounds}")
    for name, seconds in best.items():
        print(f"{name:22} {seconds:.3f}  {seconds / best['base']:.3f} of the base")


if __name__ == "__main__":
    main()
