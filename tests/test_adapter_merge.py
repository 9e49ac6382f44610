"""An adapter that is added to the weights: where that is sound, and before they are quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dgemma_ext as dg
from adapter_folders import DECODER, ENCODER, SETTINGS, experts_tensors, random_tensors, write_adapter
from checkpoints import make_checkpoint
from command import dgemma
from dgemma_ext.checkpoint import Merge, convert, parse_target, quantize
from dgemma_ext.model import load_weights
from quantized_checkpoints import unfuse
from test_quantize import assert_same

SIZES = dict(layers=2, hidden=64, moe_intermediate=64, experts=4, vocabulary=128, with_tokenizer=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"), dtype=torch.float32, **SIZES)


@pytest.fixture(scope="module")
def config(source: Path) -> dg.ModelConfig:
    return dg.ModelConfig.from_file(source)


@pytest.fixture(scope="module")
def adapter(config: dg.ModelConfig) -> dg.Adapter:
    """One stack for both passes: projections, router, experts and the self-conditioning."""
    tensors = {n: t for n, t in experts_tensors(config, 0.1).items() if f".{ENCODER}." not in n}
    tensors |= random_tensors(config, 1, [DECODER], scale=0.1)
    return dg.Adapter.from_tensors(SETTINGS, tensors, config, "both")


def logits(model: dg.DiffusionGemma) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    prompt, canvas = (torch.randint(0, 128, (1, count), generator=generator) for count in (20, 8))
    cache = model.new_cache(1, 32)
    model.encode(prompt, cache)
    first = model.denoise(canvas, cache)
    return torch.cat((first, model.denoise(canvas, cache, self_conditioning=first)))


def test_merged_is_what_stands_beside(source: Path, adapter: dg.Adapter) -> None:
    beside = logits(dg.DiffusionGemma.from_pretrained(source, device="cpu", adapter=adapter))
    model = dg.DiffusionGemma.from_pretrained(source, device="cpu", adapter=adapter, merge=True)
    assert not model.adapters
    scale = float(beside.abs().max())
    assert float((logits(model) - beside).abs().max()) < 1e-5 * scale
    base = logits(dg.DiffusionGemma.from_pretrained(source, device="cpu"))
    assert float((base - beside).abs().max()) > 0.1 * scale


@pytest.mark.parametrize("experts", ["stacked", "one by one"])
def test_quantizing_comes_after_merging(
    experts: str, source: Path, config: dg.ModelConfig, adapter: dg.Adapter, tmp_path: Path
) -> None:
    """In a file and while loading the same, whichever way the experts are stored."""
    target = parse_target("nvfp4")
    folder = source
    if experts == "one by one":
        folder = tmp_path / "unfused"
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        save_file(unfuse(load_file(source / "model.safetensors")), folder / "model.safetensors")
    convert(folder, tmp_path / "out", target, merge=Merge(adapter))
    written = load_weights(tmp_path / "out", config, torch.float32, "cpu")
    direct = load_weights(source, config, torch.float32, "cpu", weights=target, merge=Merge(adapter))
    plain = load_weights(source, config, torch.float32, "cpu", merge=Merge(adapter))
    for layer, (ours, theirs) in enumerate(zip(written.layers, direct.layers, strict=True)):
        for attribute, value in vars(ours).items():
            assert_same(value, getattr(theirs, attribute))
        for attribute in ("q_proj", "router_proj", "down_proj"):
            assert_same(getattr(ours, attribute), getattr(plain.layers[layer], attribute))
    assert_same(written.self_conditioning_up_proj, plain.self_conditioning_up_proj)


def test_an_adapter_of_the_self_conditioning_alone_can_be_merged(source: Path, config: dg.ModelConfig) -> None:
    tensors = {n: t for n, t in experts_tensors(config).items() if "self_conditioning" in n}
    adapter = dg.Adapter.from_tensors(SETTINGS, tensors, config)
    assert Merge(adapter).attributes == {"self_conditioning_up_proj"}


def test_what_cannot_be_merged(source: Path, config: dg.ModelConfig, adapter: dg.Adapter, tmp_path: Path) -> None:
    def refused(message: str, folder: Path = source, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            dg.DiffusionGemma.from_pretrained(folder, device="cpu", merge=True, **options)

    separate = dg.Adapter.from_tensors(SETTINGS, random_tensors(config, 1), config)
    alone = dg.Adapter.from_tensors(SETTINGS, random_tensors(config, 1, [DECODER]), config, "stored")
    refused("the adapter changes the weights differently for each pass, and both have one copy", adapter=separate)
    refused(r"changes the weights of one pass alone \(decoder only\)", adapter=alone)
    refused("merge adds one adapter to the weights; wanted: adapter")
    refused("wanted: adapter, and no adapters", adapter=adapter, adapters={"one": adapter})
    convert(source, tmp_path / "int4", parse_target("int4"))
    refused(
        "merge: the checkpoint has .* as int4, which would round the adapter away", tmp_path / "int4", adapter=adapter
    )


def test_the_command(source: Path, config: dg.ModelConfig, tmp_path: Path) -> None:
    decoder = random_tensors(config, 1, [DECODER])
    one = str(write_adapter(tmp_path / "one", decoder))
    separate = str(write_adapter(tmp_path / "separate", random_tensors(config, 1)))
    command = ["quantize", str(source), str(tmp_path / "out"), "--to", "fp8", "--json"]
    run = dgemma(*command, "--adapter", separate)
    assert (run.code, "differently for each pass" in run.err) == (2, True)
    run = dgemma(*command, "--adapter", one)
    assert (run.code, "passes must be both or stored" in run.err) == (2, True)
    assert dgemma(*command, "--adapter", one, "--adapter-passes", "both").object["merged"] is True
    adapter = dg.Adapter.from_folder(one, config, "both")
    written = dg.DiffusionGemma.from_pretrained(tmp_path / "out", device="cpu")
    direct = dg.DiffusionGemma.from_pretrained(source, device="cpu", weights="fp8", adapter=adapter, merge=True)
    assert torch.equal(logits(written), logits(direct))


def test_a_run_with_another_adapter_is_not_continued(
    source: Path, adapter: dg.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    target = parse_target("fp8")
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_write_companions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", target)
    with pytest.raises(ValueError, match="was begun from another source or for another format"):
        convert(source, tmp_path / "out", target, merge=Merge(adapter))
