"""Whole models on a GPU against the same models on the CPU; `make gpu-check` also runs the operators' tests there."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from adapter_folders import SETTINGS, random_tensors
from bounds import relative_distance
from dgemma_ext import demo
from dgemma_ext.checkpoint import ModelConfig, convert, parse_target
from dgemma_ext.model import Network, load_weights
from models import canvas_rows, first_input, layer_alone, random_model
from solve_puzzles import answers
from test_device_reading import tensors_of

pytestmark = pytest.mark.gpu

PUZZLES = 100
# A layer in bfloat16 from the same input, beside the CPU's: the bound that a layer has beside transformers'.
LAYER_DISTANCE = 5e-4
TRUE_SIZE_BYTES = 60e9


@pytest.mark.parametrize("size", [6, 9])
def test_a_bundled_model_solves_as_many_puzzles(size: int) -> None:
    on_gpu, on_cpu = answers(size, PUZZLES, "cuda"), answers(size, PUZZLES, "cpu")
    solved = [sum(answer["solved"] for answer in side) for side in (on_gpu, on_cpu)]
    assert abs(solved[0] - solved[1]) <= 2, solved
    # bfloat16 sums in another order may change a draft, and all that follows.
    assert sum(g != c for g, c in zip(on_gpu, on_cpu, strict=True)) <= PUZZLES // 10


def test_generating_twice_gives_the_same_tokens() -> None:
    assert answers(6, 5, "cuda") == answers(6, 5, "cuda")


def moved(model: dg.DiffusionGemma, device: str) -> dg.DiffusionGemma:
    """The same model on another device."""

    def on_device(record: Any) -> Any:
        return replace(record, **{k: v.to(device) for k, v in vars(record).items() if isinstance(v, torch.Tensor)})

    weights = replace(on_device(model.weights), layers=[on_device(layer) for layer in model.weights.layers])
    return dg.DiffusionGemma(Network(model.config, weights), model.defaults, model.tokenizer)


def test_layers_agree_with_the_cpu() -> None:
    check_layers("cuda")


def check_layers(device: str) -> None:
    """Runs each layer with the CPU's input, keys and values."""
    ours = random_model(torch.bfloat16, hidden=96, head_dim=32, global_head_dim=64, window=24, canvas=16)
    theirs = moved(ours, device)
    ids = torch.randint(0, ours.config.vocab_size, (1, 40))
    canvas = torch.randint(0, ours.config.vocab_size, (1, 16))
    cache, cache_gpu = ours.new_cache(1, 64), theirs.new_cache(1, 64)
    ours.encode(ids, cache)
    theirs.encode(ids, cache_gpu)
    for mine, other in zip((*cache.keys, *cache.values), (*cache_gpu.keys, *cache_gpu.values), strict=True):
        other.copy_(mine)
    rows, rows_gpu = canvas_rows(ours.network, cache, canvas), canvas_rows(theirs.network, cache_gpu, canvas.to(device))
    hidden = first_input(ours.network, rows)
    for index in range(len(ours.config.layers)):
        got = layer_alone(theirs.network, cache_gpu, rows_gpu, hidden.to(device), index).cpu()
        wanted = layer_alone(ours.network, cache, rows, hidden, index)
        # A token whose score rounds to its neighbour may go to another expert, so only near tokens count.
        distances = (got - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
        near = distances[0] < 0.05
        assert int(near.sum()) >= 14, f"layer {index}: {distances.tolist()}"
        distance = relative_distance(got[0, near].double(), wanted[0, near].double())
        assert distance <= LAYER_DISTANCE, f"layer {index}: {distance:.2e}"
        hidden = wanted


def test_requests_with_adapters_are_the_same_alone_and_in_a_batch() -> None:
    check_adapters("cuda")


def check_adapters(device: str) -> None:
    """In captured steps: a batch's adapters, of different ranks, and a row without one."""
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device=device, batch_invariant=True)
    for rank, name in ((3, "one"), (9, "two")):
        settings, tensors = SETTINGS | {"r": rank, "lora_alpha": rank}, random_tensors(model.config, rank, rank=rank)
        model.load_adapter(name, dg.Adapter.from_tensors(settings, tensors, model.config))
    puzzles, sampler = [demo.draw(6, seed).text for seed in range(3)], dg.SamplerConfig(max_denoising_steps=3)
    names = ["one", "two", None]
    together = model.generate(puzzles, 36, sampler, range(3), adapter=names)
    alone = [model.generate(puzzles[n], 36, sampler, n, adapter=name) for n, name in enumerate(names)]
    assert together == alone
    assert alone[0].token_ids != model.generate(puzzles[0], 36, sampler, 0).token_ids


@pytest.mark.parametrize("stored", ["auto", "fp8", "int8", "int4"])
def test_weights_are_those_of_a_load_to_the_cpu(stored: str) -> None:
    check_loading("cuda", stored)


def check_loading(device: str, stored: str = "auto") -> None:
    """Through pinned buffers, where the device is a GPU. Quantized ones are stored so first: a GPU would round its own
    scales otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(demo.checkpoint(9))
        if stored != "auto":
            convert(path, Path(folder) / "quantized", parse_target(stored))
            path = Path(folder) / "quantized"
        config = ModelConfig.from_file(path)
        ours, theirs = (tensors_of(load_weights(path, config, torch.bfloat16, place)) for place in ("cpu", device))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name].cpu()), name


def test_the_true_size_generates_within_its_memory() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
    from true_size import random_model as true_size_model
    from true_size import true_config

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = true_size_model(true_config())
    sampler = dg.SamplerConfig(max_denoising_steps=4)
    out = model.generate(list(range(5, 300)), max_new_tokens=512, sampler=sampler)
    assert len(out.token_ids) > 0
    assert torch.cuda.max_memory_allocated() <= TRUE_SIZE_BYTES, f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
