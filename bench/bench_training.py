"""A training step on the CPU, two layers of true width: transformers with PEFT, the same under dg.accelerate, and
`dgemma finetune`'s own, by turns in one process; and the experts' LoRA of one layer apart.

    python bench/bench_training.py            # about ten minutes and 12 GB of memory; the checkpoint (5 GB) goes under
    build/, where bench_step_cpu.py looks for it too

Hidden 2816, 128 experts of 704, top 8, vocabulary 262,144, bf16, prompt 128, canvas 256, LoRA of rank 8 on attention
and MLP; random weights, flattened (final norm x 0.05). A step is TRL's: a pass without gradients, one that is
self-conditioned on it, cross-entropy over the canvas, backward. All three read the same weights. Seconds are processor
time; peak memory is what a step takes above what was resident before. Compare ratios, not times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step_cpu import FLATTENING, ROOT, write_checkpoint
from step_cpu_worker import PROMPT_TOKENS, prompt_ids

import dgemma_ext as dg
from dgemma_ext.checkpoint import ModelConfig, layer_layout, model_layout
from dgemma_ext.finetune import LoraSettings, TrainedAdapter
from dgemma_ext.finetune.forward import Passes
from dgemma_ext.finetune.loss import losses
from dgemma_ext.finetune.recipe import Batch
from dgemma_ext.model import Network
from dgemma_ext.model.weights import LayerWeights, ModelWeights

CANVAS, RANK = 256, 8
TARGETS = r".*(language_model|decoder)\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def network_of(model: Any) -> Network:
    """A network over the weights of transformers' model, none of them copied."""
    config = ModelConfig.from_file(model.name_or_path)
    tensors = model.state_dict()

    def of(layout: Any) -> dict[str, Any]:
        return {attribute: tensors[name] for attribute, (name, _) in layout.items()}

    layers = []
    for layer in config.layers:
        values = {"v_proj": None, **of(layer_layout(config, layer))}
        for scalar in ("decoder_layer_scalar", "encoder_layer_scalar"):
            values[scalar] = values[scalar].item()
        layers.append(LayerWeights(**values))
    return Network(config, ModelWeights(**of(model_layout(config)), layers=layers))


class Steps:
    """A step of each side, for the same prompt, canvas and targets."""

    def __init__(self, checkpoint: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import DiffusionGemmaForBlockDiffusion

        base: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.bfloat16)
        with torch.no_grad():
            base.model.decoder.norm.weight.fill_(FLATTENING)
        vocabulary = base.config.text_config.vocab_size
        torch.manual_seed(0)
        self.ids = prompt_ids(vocabulary)
        self.canvas, self.targets = torch.randint(vocabulary, (2, 1, CANVAS))
        network = network_of(base)
        lora = LoraSettings(rank=RANK, alpha=2 * RANK, passes="separate")
        self.adapter = TrainedAdapter(network.config, lora, 0, torch.device("cpu"))
        self.passes = Passes(network, self.adapter)
        self.model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)).train()

    def transformers(self) -> None:
        dg.accelerate(self.model, False)
        self._step_of_trl()

    def accelerated(self) -> None:
        dg.accelerate(self.model)
        self._step_of_trl()

    def _step_of_trl(self) -> None:
        given = {"input_ids": self.ids, "decoder_input_ids": self.canvas}
        with torch.no_grad():
            first = self.model(**given).logits
        logits = self.model(**given, self_conditioning_logits=first).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten()).backward()
        self.model.zero_grad(set_to_none=True)

    def finetune(self) -> None:
        batch = Batch(
            ids=self.ids,
            next_weights=torch.zeros(self.ids.shape),
            canvas=self.canvas,
            targets=self.targets,
            weights=torch.ones(1, CANVAS),
            lengths=torch.tensor([PROMPT_TOKENS]),
            conditioned=torch.tensor([True]),
        )
        (losses(self.passes, batch).canvas / CANVAS).backward()
        for tensor in self.adapter.parameters().values():
            tensor.grad = None


class Experts:
    """Forward and backward of a layer's experts over 256 tokens, with a LoRA of PEFT on both of their parameters."""

    def __init__(self, steps: Steps) -> None:
        from peft import LoraConfig, get_peft_model

        experts = steps.model.get_base_model().model.decoder.layers[0].experts
        holder = torch.nn.Module()
        holder.experts = experts
        holder.forward = lambda *given: holder.experts(*given)  # type: ignore[method-assign]
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=RANK, target_modules="nothing", target_parameters=parameters)
        self.model = get_peft_model(holder, config)  # type: ignore[arg-type]
        torch.manual_seed(1)
        self.x = torch.randn(CANVAS, 2816).to(torch.bfloat16).requires_grad_()
        self.ids = torch.stack([torch.randperm(128)[:8] for _ in range(CANVAS)])
        self.weights = torch.full((CANVAS, 8), 0.125)

    def peft(self) -> None:
        from dgemma_ext.integrations.transformers import adapted_experts

        adapted_experts.restore_forwards(self.model)
        self._run()

    def four_products(self) -> None:
        from dgemma_ext.integrations.transformers import adapted_experts

        adapted_experts.replace_forwards(self.model.get_base_model())
        self._run()

    def _run(self) -> None:
        self.model(self.x, self.ids, self.weights).float().square().mean().backward()
        self.model.zero_grad(set_to_none=True)


def measured(call: Callable[[], None]) -> tuple[float, float]:
    """Processor seconds of a call, and the bytes that it takes at most above what is resident."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of resident memory begins anew
    before, began = resident("VmRSS"), time.process_time()
    call()
    return time.process_time() - began, resident("VmHWM") - before


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def by_turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            one = measured(call)
            if turn:  # the first round warms up
                found[name].append(one)
    return {
        name: {
            "cpu_seconds": round(statistics.median(seconds for seconds, _ in values), 3),
            "peak_mb": round(statistics.median(nbytes for _, nbytes in values) / 1e6),
        }
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench_step_cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = Steps(write_checkpoint(arguments.directory / "peaked", 1.0))
    calls = {"transformers": steps.transformers, "accelerated": steps.accelerated, "finetune": steps.finetune}
    print(json.dumps({"step": by_turns(calls, arguments.rounds)}), flush=True)
    dg.accelerate(steps.model, False)
    experts = Experts(steps)
    calls = {"peft": experts.peft, "four_products": experts.four_products}
    print(json.dumps({"experts_lora_of_a_layer": by_turns(calls, arguments.rounds)}), flush=True)


if __name__ == "__main__":
    main()
