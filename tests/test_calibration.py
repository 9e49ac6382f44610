"""Second moments of products' inputs over a text, and what a quantizer makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext import demo
from dgemma_ext.checkpoint import convert, parse_target
from dgemma_ext.cli import main
from dgemma_ext.cli import quantize as quantize_command
from dgemma_ext.model import calibration, second_moments
from dgemma_ext.ops.layer import gelu_product, rms_norm

TEXT = "one two three four five six seven eight nine ten eleven twelve\n" * 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return make_checkpoint(tmp_path_factory.mktemp("calibration") / "unquantized")


@pytest.fixture(scope="module")
def model(source: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(source, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ids(model: dg.DiffusionGemma) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def moments(model: dg.DiffusionGemma, ids: list[int]) -> dict[tuple[int, str], Tensor]:
    return second_moments(model.network, ids)


def test_moments_of_what_goes_in(model: dg.DiffusionGemma, ids: list[int], moments: Any) -> None:
    """Of the first layer, whose input both passes take from the embeddings: a canvas's is normed once more before."""
    weights, layer = model.weights, model.weights.layers[0]
    rows = functional.embedding(torch.tensor(ids), weights.embed_tokens) * model.network.embedding_scale
    normed = rms_norm(rows, layer.input_layernorm, 1e-6)
    assert torch.allclose(moments[0, "q_proj"], normed.square().mean(0), rtol=1e-3)
    assert torch.equal(moments[0, "q_proj"], moments[0, "k_proj"])
    assert {layer for layer, _ in moments} == {0, 1, 2}
    for (index, attribute), found in moments.items():
        matrix = getattr(model.weights.layers[index], attribute)
        if matrix is not None:
            columns = matrix.shape[-1:] if attribute[:7] != "experts" else (matrix.shape[0], matrix.shape[-1])
            assert found.shape == columns
            assert bool(((found > 0) & found.isfinite()).all())
    assert model.network.options.observe is None


def test_moments_of_what_is_inside(model: dg.DiffusionGemma, ids: list[int], moments: Any) -> None:
    """down's input and each expert's are computed from what the observer was given; the sums of all rows agree."""
    seen: list[Any] = []
    cache = model.new_cache(1, len(ids))
    model.network.options.observe = seen.append
    length = model.config.canvas_length
    try:
        for start in range(0, len(ids), length):
            piece = torch.tensor([ids[start : start + length]])
            model.network.forward(cache, model.network.canvas_in_slot(piece, cache, 0))
            model.encode(piece, cache)
    finally:
        model.network.options.observe = None
    layer = model.weights.layers[1]
    mlp = torch.cat([one.mlp for one in seen if one.layer == 1])
    inner = gelu_product(mlp @ layer.gate_proj.T, mlp @ layer.up_proj.T)  # type: ignore[union-attr]
    assert torch.allclose(moments[1, "down_proj"], inner.square().mean(0), rtol=1e-3)
    rows = torch.cat([one.experts for one in seen if one.layer == 1])
    chosen = torch.cat([one.expert_ids for one in seen if one.layer == 1])
    per_expert = torch.stack([(chosen == e).any(-1).float() for e in range(model.config.num_experts)])
    sums, counts = per_expert @ rows.square(), per_expert.sum(-1, keepdim=True)
    mean = sums.sum(0) / counts.sum()
    assert torch.allclose(moments[1, "experts_gate_up"], (sums + 64 * mean) / (counts + 64), rtol=1e-3)


def test_a_text_that_is_longer_than_the_context() -> None:
    """Its parts begin anew, and all of them count."""
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(6), device="cpu")
    longer = [5 + index % 90 for index in range(model.config.max_position_embeddings + 30)]
    seen: list[int] = []
    gathered = calibration._Gathered.__call__

    def counting(self: Any, inputs: Any) -> None:
        seen.append(len(inputs.attention) if inputs.layer == 0 else 0)
        gathered(self, inputs)

    with mock.patch.object(calibration._Gathered, "__call__", counting):
        told: list[int] = []
        found = second_moments(model.network, longer, told.append)
    assert bool(found[0, "q_proj"].isfinite().all())
    assert sum(seen) == 2 * len(longer)  # by both passes
    assert sum(told) == len(longer)
    assert max(told) <= model.config.canvas_length


def test_outputs_are_nearer_with_moments_of_their_inputs(
    source: Path, model: dg.DiffusionGemma, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs of which some channels are a hundred times as large as others."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--to", "int4", "--calibrate", str(text), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["calibrated"] is True
    assert all(error["relative"] < 0.97 * error["relative_before"] for error in told["errors"])
    dg.DiffusionGemma.from_pretrained(out, device="cpu").generate("one two", max_new_tokens=8)

    uneven = {(layer, name): torch.logspace(-2, 2, 64) for layer in range(3) for name in ("q_proj", "k_proj", "v_proj")}
    uneven |= {(layer, "o_proj"): torch.ones(64 if layer < 2 else 128) for layer in range(3)}
    losses = {}
    for name, given in (("alike", None), ("weighed", uneven)):
        convert(source, tmp_path / name, parse_target("int4", ["attention"]), moments=given)
        made = dg.DiffusionGemma.from_pretrained(
            tmp_path / name, device="cpu", dtype="float32", weights="unquantized"
        ).weights
        lost = [
            (now.q_proj - then.q_proj).square() @ uneven[0, "q_proj"]  # type: ignore[operator]
            for now, then in zip(made.layers, model.weights.layers, strict=True)
        ]
        losses[name] = float(torch.cat(lost).sum())
    assert losses["weighed"] < 0.9 * losses["alike"]


def test_inputs_that_are_not_finite(source: Path, ids: list[int]) -> None:
    own = dg.DiffusionGemma.from_pretrained(source, device="cpu", dtype="float32")
    own.weights.layers[1].pre_feedforward_layernorm[:] = 3e38
    with pytest.raises(ValueError, match=r"what goes into \w+ of layer 1 is not finite"):
        second_moments(own.network, ids)


def test_texts_that_do_not_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(file: Path) -> str:
        out = str(tmp_path / "out")
        assert main(["quantize", str(source), out, "--to", "int4", "--calibrate", str(file)]) == 2
        return capsys.readouterr().err

    assert "--calibrate: " in complaint(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read as text" in complaint(tmp_path / "bytes")
    (tmp_path / "empty").write_text("")
    assert "empty has no tokens; wants a text" in complaint(tmp_path / "empty")
    (tmp_path / "long").write_text("one two")
    monkeypatch.setattr(quantize_command, "_LARGEST_TEXT", 6)
    assert "has more than 6 bytes; wants a shorter text" in complaint(tmp_path / "long")
    # What is to be written is looked at before a model is loaded.
    monkeypatch.setattr(dg.DiffusionGemma, "from_pretrained", None)
    (tmp_path / "out").mkdir()
    assert "out exists; wants a folder that does not" in complaint(tmp_path / "long")
