"""Quantized checkpoints inside vLLM, on a CPU: `make test-vllm`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from torch import Tensor

import dgemma_ext as dg
from dgemma_ext.checkpoint import ModelConfig, parse_target
from dgemma_ext.checkpoint.quantize import convert
from dgemma_ext.model import load_weights
from dgemma_ext.ops import weights as products
from dgemma_ext.ops.formats import FORMATS, QuantizedWeight
from quantized_checkpoints import requantize
from vllm_experts import RECORDS
from vllm_server import probe, tiny

ON = {"DGEMMA_VLLM": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PROMPT = list(range(10, 30))
STEPS = 4
REQUEST = {"ids": PROMPT, "max_tokens": 40, "extra_args": {"seed": 7, "max_denoising_steps": STEPS}}
# Whatever has no quantized weight in the tests' checkpoints, as the lists of published ones have it.
IGNORED = ("self_attn", "mlp", "router", "self_conditioning", "vision", "lm_head", "embed")
# By what wrote the checkpoint: `dgemma quantize`, or compressed-tensors and (in its layout) ModelOpt.
WRITTEN = (
    "fp8",
    "int8",
    "int4",
    "int4-128",
    "nvfp4",
    *(f"package {one}" for one in ("fp8", "int4", "nvfp4", "nvfp4-modelopt")),
)
# With dense layers quantized too: in float32 int4 and nvfp4 are this package's on a CPU, fp8 and int8 are vLLM's own.
DENSE = ("int4 attention", "nvfp4 attention mlp", "package nvfp4-modelopt mlp")
DENSE_OF_VLLM = ("fp8 attention mlp", "int8 attention mlp")
# With the experts of the first layer as they were, which lists of ignored modules name as the checkpoint does.
UPPER = ("package int4 upper", "package nvfp4-modelopt upper")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two groups of int4 in a row of every expert's down projection."""
    return tiny(tmp_path_factory.mktemp("quantized") / "source", window=24, hidden=128, moe_intermediate=64)


def written(source: Path, folder: Path, by: str) -> Path:
    """The source with quantized experts, and other parts that `by` names."""
    of_package, *words = by.split()
    if of_package != "package":
        convert(source, folder, parse_target(of_package, ("experts", *words)))
        return folder
    layout, *more = words
    shutil.copytree(source, folder)
    inside = r"(mlp\.\w+_proj|experts\.\d+\.\w+)" if "mlp" in more else r"experts\.\d+\.\w+"
    requantize(folder, layout, rf"model\.decoder\.layers\.{'[12]' if 'upper' in more else '[0-9]+'}\.{inside}\.weight")
    names = [one for one in IGNORED if one not in more]
    if layout.endswith("modelopt"):
        ignored = [f"*{one}*" for one in names] + ["model.decoder.layers.0.experts*"] * ("upper" in more)
    else:
        ignored = [f"re:.*{one}.*" for one in names] + [r"re:model\.decoder\.layers\.0\..*"] * ("upper" in more)
    change(folder, lambda section: section.update(ignore=ignored))
    return folder


def change(folder: Path, edit: Any) -> None:
    """Edits the section of config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def generated(folder: Path, steps: int = STEPS) -> list[int]:
    engine = dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=torch.float32)
    sampler = dg.SamplerConfig(max_denoising_steps=steps, eos_token_ids=())
    return list(engine.generate(PROMPT, max_new_tokens=40, seed=7, sampler=sampler).token_ids)


def shard(weight: QuantizedWeight, projections: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's part of the engine's experts: rows of gate and of up, or columns of down."""
    found = {}
    for name, tensor in weight.tensors().items():
        if projections == 2:
            of_rows = tensor.shape[1] > 2  # a matrix's one scale is every rank's
            parts = [half.chunk(ranks, 1)[rank] if of_rows else half for half in tensor.chunk(2, 1)]
            found[name] = torch.cat(parts, 1)
        else:
            found[name] = tensor.chunk(ranks, 2)[rank] if tensor.dim() == 3 and tensor.shape[2] > 1 else tensor
    return found


def check_records(
    files: list[Path], folder: Path, dtype: torch.dtype, ranks: int = 1, expert_parallel: bool = False
) -> None:
    """Every recorded call has a layer's weights of the engine, bit by bit, and the operator's output over them."""
    every = load_weights(folder, ModelConfig.from_file(folder), dtype, "cpu").layers
    layers = [layer for layer in every if isinstance(layer.experts_gate_up, QuantizedWeight)]
    assert len(files) == ranks
    ranks_seen, layers_seen = set(), set()
    for file in files:
        for call in torch.load(file, weights_only=True):
            if "name" not in call["gate_up"]:  # experts that are not quantized
                continue
            matches = []
            for number, layer in enumerate(layers):
                for rank in range(ranks):
                    pairs = zip(
                        (call["gate_up"], call["down"]),
                        (layer.experts_gate_up, layer.experts_down),
                        (2, 1),
                        strict=True,
                    )
                    if all(
                        same(got, want, projections, rank, ranks, call["places"]) for got, want, projections in pairs
                    ):
                        matches.append((number, rank))
            assert len(matches) == 1, matches
            layers_seen.add(matches[0][0])
            ranks_seen.add(matches[0][1])
            ids = call["ids"].long()
            if expert_parallel:
                ids = torch.where(ids < 0, -1, call["places"].long()[ids.clamp(min=0)])
            else:
                assert call["places"] is None
            weights = [made(call[name]) for name in ("gate_up", "down")]
            out = products.experts(call["hidden"], ids.int(), call["weights"].float(), *weights)
            assert torch.equal(out, call["out"])
            assert call["hidden"].dtype == dtype
    assert len(layers_seen) == len(layers)
    assert len(ranks_seen) == ranks


def same(got: dict[str, Any], want: Any, projections: int, rank: int, ranks: int, places: Tensor | None) -> bool:
    if places is None:
        expected = shard(want, projections, rank, ranks)
    else:
        own = [expert for expert, place in enumerate(places.tolist()) if place >= 0]
        if own != list(range(rank * len(own), (rank + 1) * len(own))):
            return False
        expected = {name: tensor[own] for name, tensor in want.tensors().items()}
    assert got["name"] == want.name
    return all(torch.equal(got[name], tensor.view(got[name].dtype)) for name, tensor in expected.items())


def made(parts: dict[str, Any]) -> QuantizedWeight:
    tensors = {name: one for name, one in parts.items() if isinstance(one, Tensor)}
    more = {"divides": parts["divides"]} if "divides" in parts else {}
    return FORMATS[parts["name"]].weight(**tensors, **more)


@pytest.fixture(scope="module")
def served(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Any], Path]:
    """Checkpoints by what wrote them, what vLLM found of each, and the records of their experts. One process serves
    them all, one after the other: most of a process's time is its start."""
    root = tmp_path_factory.mktemp("written")
    records = root / "records"
    records.mkdir()
    every = (*WRITTEN, *DENSE, *DENSE_OF_VLLM, *UPPER)
    folders = {by: written(source, root / by.replace(" ", "-"), by) for by in every}
    requests = [REQUEST, {**REQUEST, "extra_args": {"seed": 7, "max_denoising_steps": 2}}]
    told = {"models": [str(folder) for folder in folders.values()], "requests": requests}
    found, log = probe(told, **ON, **{RECORDS: str(records)})
    assert "stay with vLLM" not in log
    return folders, dict(zip(folders, found, strict=True)), records


@pytest.mark.parametrize("by", [*WRITTEN, *DENSE, *DENSE_OF_VLLM, *UPPER])
def test_experts_are_the_checkpoints_and_tokens_the_engines(by: str, served: Any) -> None:
    folders, found, records = served
    methods = ["DGemmaQuantizedFusedMoEMethod", "DGemmaUnquantizedFusedMoEMethod"][: 2 if by in UPPER else 1]
    assert found[by].get("classes", {}).get("experts", "").split(",") == methods, found[by]
    check_records(list(records.glob(f"{folders[by].name}.*.pt")), folders[by], torch.float32)
    if by in DENSE_OF_VLLM:
        return
    # Where activations are rounded to int8, a difference of 1e-6 before moves some of them a step; by three steps of a
    # random model a token in fifty is another.
    index, steps = (1, 2) if by == "int8" else (0, STEPS)
    assert found[by]["tokens"][index] == generated(folders[by], steps)


@pytest.mark.parametrize(("by", "more"), [("int4", {}), ("nvfp4", {"enable_expert_parallel": True})])
def test_two_ranks_give_the_tokens_of_one(by: str, more: dict[str, Any], served: Any, tmp_path: Path) -> None:
    folder = served[0][by]
    engine = {"tensor_parallel_size": 2, "worker_extension_cls": "vllm_experts.Worker", **more}
    told = {"model": str(folder), "requests": [REQUEST], "engine": engine}
    # With the engine in a process of its own, to which the configuration travels.
    found, _ = probe(told, **{**ON, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", RECORDS: str(tmp_path)})
    check_records(list(tmp_path.glob("*.pt")), folder, torch.float32, 2, bool(more))
    assert found["tokens"][0] == generated(folder)


def test_without_the_part_the_choice_is_vllms(served: Any) -> None:
    """On this CPU vLLM has no kernel of its own for such experts, and says the same with the plugin's other parts."""
    told = {"models": [str(served[0][by]) for by in ("fp8", "int8", "int4", "nvfp4")], "requests": [REQUEST]}
    off, _ = probe(told, **{**ON, "DGEMMA_VLLM": "0", "VLLM_PLUGINS": ""})
    other_parts, _ = probe(told, **ON, DGEMMA_VLLM_PARTS="sampler,attention")
    assert off == other_parts
    assert all("MoE" in one["error"] for one in off), off
