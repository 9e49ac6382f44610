"""INT8 with activations that are rounded too: checkpoints, and what is refused. Products: test_int8_products.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgemma_ext as dg
from backend import cpu_only
from checkpoints import make_checkpoint
from dgemma_ext import demo
from dgemma_ext.checkpoint import ModelConfig, convert, parse_target
from dgemma_ext.model import load_weights
from dgemma_ext.ops.formats import Int8Weight
from quantized_checkpoints import unfuse

pytestmark = cpu_only


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("int8") / "unquantized")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    convert(source, source.parent / "int8", parse_target("int8"))
    return source.parent / "int8"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_checkpoint_of_compressed_tensors_loads_to_the_last_bit(
    source: Path, tmp_path: Path, converted: Path
) -> None:
    """Scales and codes as the package makes them; what is loaded is its own dequantized weight."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    own = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    theirs, wanted = {}, {}
    for name, tensor in unfuse(tensors(source)).items():
        if (".experts." not in name and "self_attn" not in name and ".mlp." not in name) or "norm" in name:
            theirs[name] = tensor
            continue
        scale, zero = calculate_qparams(tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True), own)
        codes = quantize(tensor, scale, zero, own, dtype=torch.int8)
        theirs |= {name: codes, name + "_scale": scale}
        wanted[name] = dequantize(codes, scale, zero, own)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((converted / "config.json").read_bytes())
    loaded = load_weights(folder, ModelConfig.from_file(folder), torch.bfloat16, "cpu")
    for index, layer in enumerate(loaded.layers):
        prefix = f"model.decoder.layers.{index}."
        assert isinstance(layer.q_proj, Int8Weight)
        assert torch.equal(layer.q_proj.dequantized(torch.bfloat16), wanted[f"{prefix}self_attn.q_proj.weight"])
        assert isinstance(layer.experts_down, Int8Weight)
        for expert in range(8):
            one = layer.experts_down.expert(expert).dequantized(torch.bfloat16)
            assert torch.equal(one, wanted[f"{prefix}experts.{expert}.down_proj.weight"])
            codes = theirs[f"{prefix}experts.{expert}.down_proj.weight"]
            assert torch.equal(layer.experts_down.values[expert].view(torch.int8), codes)


def test_written_and_read_and_quantized_while_loading(source: Path, converted: Path) -> None:
    section = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert section["format"] == "int-quantized"
    config = ModelConfig.from_file(source)
    written = load_weights(converted, config, torch.bfloat16, "cpu")
    direct = load_weights(source, config, torch.bfloat16, "cpu", weights=parse_target("int8"))
    for left, right in zip(written.layers, direct.layers, strict=True):
        for attribute in ("q_proj", "o_proj", "gate_proj", "down_proj", "experts_gate_up", "experts_down"):
            one, other = getattr(left, attribute), getattr(right, attribute)
            assert isinstance(one, Int8Weight)
            assert torch.equal(one.values, other.values)
            assert torch.equal(one.scales, other.scales)
    dg.DiffusionGemma.from_pretrained(converted, device="cpu").generate("one two", max_new_tokens=8)


@pytest.mark.parametrize(("size", "least"), [(6, 22), (9, 20)])
def test_a_bundled_model_solves(size: int, least: int) -> None:
    model = dg.DiffusionGemma.from_pretrained(demo.checkpoint(size), device="cpu", weights="int8")
    puzzles = [demo.draw(size, 777, index) for index in range(25)]
    chats = [[{"role": "user", "content": puzzle.text}] for puzzle in puzzles]
    answers = model.generate(chats, max_new_tokens=model.config.canvas_length, seed=list(range(25)))
    solved = sum(demo.check(answer.text, puzzle.text) for answer, puzzle in zip(answers, puzzles, strict=True))
    assert solved >= least


def spoilt(converted: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    stored = tensors(converted)
    change(stored)
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_bytes((converted / "config.json").read_bytes())
    with pytest.raises(dg.CheckpointError) as caught:
        dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    return str(caught.value)


def test_tensors_that_are_refused(converted: Path, tmp_path: Path) -> None:
    base = "model.decoder.layers.1.self_attn.q_proj.weight"
    scale = f"{base}_scale"

    def at(value: float) -> Callable[[dict[str, Tensor]], None]:
        def change(stored: dict[str, Tensor]) -> None:
            stored[scale][3] = value

        return change

    assert f"{scale}: has a scale of 0.0 at [3, 0]" in spoilt(converted, tmp_path / "a", at(0.0))
    assert f"{scale}: has a scale of nan at [3, 0]" in spoilt(converted, tmp_path / "b", at(float("nan")))
    shape = spoilt(converted, tmp_path / "c", lambda stored: stored.update({scale: stored[scale][:-1].clone()}))
    assert f"{scale}: has shape [63, 1]; the configuration asks for [64, 1]" in shape
    missing = spoilt(converted, tmp_path / "d", lambda stored: stored.__delitem__(scale))
    assert f"{scale}: is missing" in missing
    zero = torch.zeros(64, 1, dtype=torch.int8)
    point = spoilt(converted, tmp_path / "e", lambda stored: stored.update({f"{base}_zero_point": zero}))
    assert "is of a quantization that is not supported (weight_zero_point); supported: symmetric" in point
    wide = spoilt(converted, tmp_path / "f", lambda stored: stored.update({base: stored[base][:, :-1].clone()}))
    assert f"{base}: has shape [64, 63]" in wide


def refusal_of(converted: Path, **changes: Any) -> str:
    config = json.loads((converted / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = group
        for parent in parents:
            place = place[parent]
        place[last] = value
    with pytest.raises(ValueError, match="quantization_config") as caught:
        ModelConfig.from_dict(config)
    return str(caught.value)


def test_settings_that_are_refused(converted: Path) -> None:
    assert "weights.symmetric is False; supported: true" in refusal_of(converted, weights__symmetric=False)
    assert "weights.strategy is 'group'" in refusal_of(converted, weights__strategy="group")
    assert "weights.num_bits is 4" in refusal_of(converted, weights__num_bits=4)
    assert "input_activations is None; supported: 8 bits" in refusal_of(converted, input_activations=None)
    assert "input_activations.dynamic is False" in refusal_of(converted, input_activations__dynamic=False)
    assert "input_activations.symmetric is False" in refusal_of(converted, input_activations__symmetric=False)
    assert "input_activations.type is 'float'" in refusal_of(converted, input_activations__type="float")
    config = json.loads((converted / "config.json").read_text())
    section = config["quantization_config"]
    group = section["config_groups"]["group_0"]
    del group["weights"]["type"]  # which stands for integers
    four = group["weights"] | {"num_bits": 4}
    with pytest.raises(ValueError, match=r"weights\.num_bits is 4"):
        ModelConfig.from_dict(
            config | {"quantization_config": section | {"config_groups": {"group_0": group | {"weights": four}}}}
        )
    ModelConfig.from_dict(config)
    with pytest.raises(ValueError, match=r"transform_config is \{'config_groups'.*supported: null"):
        ModelConfig.from_dict(config | {"quantization_config": section | {"transform_config": {"config_groups": {}}}})
