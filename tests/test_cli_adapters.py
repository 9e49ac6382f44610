"""--adapter: of the commands that answer, of info, and of serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dgemma_ext as dg
from adapter_folders import DECODER, random_tensors, write_adapter
from command import CANVAS, dgemma, library_model, random_checkpoint
from dgemma_ext.cli.arguments import Arguments, build_parser

SURE = ["--confidence-threshold", "4", "--max-new-tokens", str(CANVAS), "--json", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config, folder = library_model().config, tmp_path_factory.mktemp("adapters")
    tower = "base_model.model.model.encoder.vision_tower.patch_embedder.input_proj.lora_A.weight"
    tensors = random_tensors(config, 1)
    vision = {tower: torch.zeros(4, 32)}
    return {
        "one": write_adapter(folder / "one", tensors | vision, base_model_name_or_path="its/base"),
        "two": write_adapter(folder / "two", random_tensors(config, 2, [DECODER])),
    }


def test_answers(folders: dict[str, Path]) -> None:
    model, one = random_checkpoint(), str(folders["one"])
    refused = dgemma("generate", model, "hello", *SURE, "--adapter", str(folders["two"]))
    assert (refused.code, refused.out) == (2, "")
    assert "passes must be both or stored" in refused.err
    base = dgemma("generate", model, "hello", *SURE).object["token_ids"]
    found = dgemma("generate", model, "hello", *SURE, "--adapter", one).object["token_ids"]
    other = dgemma("generate", model, "hello", *SURE, "--adapter", str(folders["two"]), "--adapter-passes", "both")
    assert len({tuple(ids) for ids in (base, found, other.object["token_ids"])}) == 3
    loaded = dg.DiffusionGemma.from_pretrained(model, device="cpu", adapter=one)
    sampler = dg.SamplerConfig(confidence_threshold=4.0)
    assert found == list(loaded.generate("hello", CANVAS, sampler).token_ids)
    assert dgemma("chat", model, *SURE, "--adapter", one, stdin="hello\n").object["token_ids"] == found
    decide = ["decide", model, "which?", "--choice", "a", "--choice", "b", "--json", "--device", "cpu"]
    decisions = [dgemma(*decide, *more).object["probabilities"] for more in ([], ["--adapter", one])]
    assert decisions[0] != decisions[1] == loaded.decide("which?", ["a", "b"]).probabilities


def test_info_tells_what_an_adapter_changes(folders: dict[str, Path]) -> None:
    model, one = random_checkpoint(), str(folders["one"])
    facts = dgemma("info", model, "--adapter", one, "--json").object
    adapter = facts["adapter"]
    assert (adapter["base"], adapter["rank"], adapter["scale"], adapter["passes"]) == ("its/base", 4, 2.0, "separate")
    assert adapter["bytes"] == facts["checkpoint"]["memory"]["adapters_bytes"] == 2 * adapter["parameters"]
    text = dgemma("info", model, "--adapter", one).out
    for line in (
        "adapter         rank 4, scale 2, for its/base",
        "passes          separate",
        "vision, not used  base_model",
    ):
        assert line.split()[0] in text
    assert "vision_tower.patch_embedder.input_proj.lora_A.weight" in text
    assert "adapters" in text.split("memory on")[1]
    run = dgemma("info", "--adapter", one)
    assert (run.code, "--adapter needs MODEL" in run.err) == (2, True)


def test_several_adapters_of_a_server(tmp_path: Path) -> None:
    def given(*adapters: str) -> tuple[str | None, dict[str, str]]:
        flags = [part for adapter in adapters for part in ("--adapter", adapter)]
        return build_parser().parse_args(["serve", "demo", *flags], namespace=Arguments()).adapters

    assert given() == (None, {})
    assert given("a/b") == ("a/b", {})
    assert given("sql=a/b", "c/d", "art=e=f") == ("c/d", {"sql": "a/b", "art": "e=f"})
    (tmp_path / "rank=8").mkdir()
    assert given(str(tmp_path / "rank=8")) == (str(tmp_path / "rank=8"), {})
    for wrong in (["a", "b"], ["a=b", "a=c"], ["=b"], ["a="]):
        with pytest.raises(ValueError, match="--adapter"):
            given(*wrong)
