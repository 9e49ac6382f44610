"""Quantized checkpoints in every published layout: loaded to the last bit, and errors for wrong ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import ModelConfig, parse_target
from dgemma_ext.model import ModelWeights, load_weights
from dgemma_ext.ops.formats import QuantizedWeight
from quantized_checkpoints import LAYER, MATRICES, requantize

pytest.importorskip("compressed_tensors", reason="writes checkpoints with the package compressed-tensors, not here")

LAYOUTS = sorted(MATRICES)
LAYER_0 = "model.decoder.layers.0."
FORMAT_OF = {"nvfp4-modelopt": "nvfp4"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, with_tokenizer=False)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_file(folder), dtype, "cpu", **options)


def matrices_of(weights: ModelWeights) -> dict[str, Tensor | QuantizedWeight]:
    """Every matrix of the layers by the name that it has unstacked."""
    found: dict[str, Tensor | QuantizedWeight] = {}
    for number, layer in enumerate(weights.layers):
        base = f"model.decoder.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if getattr(layer, name) is not None:
                found[f"{base}self_attn.{name}.weight"] = getattr(layer, name)
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"{base}mlp.{name}.weight"] = getattr(layer, name)
        found[f"{base}experts.down_proj"] = layer.experts_down
        found[f"{base}experts.gate_up_proj"] = layer.experts_gate_up
    return found


def read_back(weights: ModelWeights, name: str, dtype: torch.dtype) -> Tensor:
    """The loaded matrix that is stored as `name`, dequantized."""
    found = matrices_of(weights)
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
    if expert is None:
        weight = found[name]
        assert isinstance(weight, QuantizedWeight)
        return weight.dequantized(dtype)
    down = expert[3] == "down"
    stack = found[f"{expert[1]}.{'down' if down else 'gate_up'}_proj"]
    assert isinstance(stack, QuantizedWeight)
    matrix = stack.dequantized(dtype)[int(expert[2])]
    return matrix if down else matrix.chunk(2)[expert[3] == "up"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_the_packages_to_the_last_bit(layout: str, dtype: torch.dtype, folder: Path) -> None:
    back = requantize(folder, layout, scale_dtype=dtype)
    weights = load(folder)
    assert len(back) >= 3 * 8 * 3  # three matrices of eight experts in three layers
    for name, wanted in back.items():
        assert torch.equal(read_back(weights, name, wanted.dtype), wanted), name
    for name, weight in matrices_of(weights).items():
        stored_plain = not any(re.sub(r"\.\d+\.\w+_proj\.weight$", "", key) in name or key == name for key in back)
        assert isinstance(weight, Tensor) == stored_plain, name
        if isinstance(weight, QuantizedWeight):
            assert weight.name == FORMAT_OF.get(layout, layout)
    unquantized = load(folder, weights="unquantized")
    for name, weight in matrices_of(unquantized).items():
        assert isinstance(weight, Tensor)
        original = matrices_of(weights)[name]
        if isinstance(original, QuantizedWeight):
            assert torch.equal(weight, original.dequantized(torch.bfloat16)), name


def test_a_checkpoint_that_mixes_formats_by_layer(folder: Path) -> None:
    requantize(folder, "int4", matrices=r"model\.decoder\.layers\.0\.(self_attn|experts)\..*_proj\.weight")
    requantize(folder, "fp8", matrices=r"model\.decoder\.layers\.1\.(mlp|experts)\..*_proj\.weight")
    requantize(folder, "nvfp4", matrices=r"model\.decoder\.layers\.2\.experts\.\d+\.down_proj\.weight")
    weights = load(folder)
    names = [layer.experts_down.name or "unquantized" for layer in weights.layers]
    # Where only down is quantized both are read unquantized, because one kernel reads them.
    assert names == ["int4", "fp8", "unquantized"]
    assert isinstance(weights.layers[0].q_proj, QuantizedWeight)
    assert isinstance(weights.layers[1].q_proj, Tensor)
    logits = denoised(dg.DiffusionGemma.from_pretrained(folder, device="cpu"))
    unquantized = denoised(dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights="unquantized"))
    assert cosine(logits, unquantized) > 0.999


def test_experts_of_several_formats_are_read_unquantized(folder: Path) -> None:
    requantize(folder, "int4", matrices=rf"{LAYER}experts\.[0-3]\..*")
    requantize(folder, "fp8", matrices=rf"{LAYER}experts\.[4-5]\..*")
    assert all(isinstance(layer.experts_down, Tensor) for layer in load(folder).layers)


def test_router_and_embedding_are_always_read_unquantized(folder: Path) -> None:
    requantize(folder, "fp8", matrices=r"model\.decoder\.(embed_tokens|layers\.\d+\.router\.proj)\.weight")
    weights = load(folder)
    assert isinstance(weights.embed_tokens, Tensor)
    assert isinstance(weights.layers[0].router_proj, Tensor)


def test_a_float16_checkpoint_is_computed_in_bfloat16(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype=torch.float16, with_tokenizer=False)
    requantize(folder, "int4", scale_dtype=torch.float16)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    assert model.dtype == torch.bfloat16
    assert bool(denoised(model).isfinite().all())


def denoised(model: dg.DiffusionGemma) -> Tensor:
    """The logits of a random canvas after a prompt."""
    generator = torch.Generator().manual_seed(1)
    cache = model.new_cache(1, 64)
    model.encode(torch.randint(0, model.config.vocab_size, (1, 20), generator=generator), cache)
    canvas = torch.randint(0, model.config.vocab_size, (1, model.config.canvas_length), generator=generator)
    return model.denoise(canvas, cache)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x.flatten().double(), y.flatten().double(), dim=0))


@pytest.mark.parametrize(("asked", "least"), [("fp8", 0.98), ("int4", 0.7), ("nvfp4", 0.7)])
def test_quantizing_while_loading(asked: str, least: float, folder: Path) -> None:
    unquantized = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights=asked)
    target = parse_target(asked)
    for number, layer in enumerate(model.weights.layers):
        for attribute, original in vars(unquantized.weights.layers[number]).items():
            weight = getattr(layer, attribute)
            assert isinstance(weight, QuantizedWeight) == (original is not None and target.wants(attribute)), attribute
            if isinstance(weight, QuantizedWeight):
                error = (weight.dequantized(torch.float32) - original.float()).norm() / original.float().norm()
                assert 0.01 < float(error) < (0.04 if asked == "fp8" else 0.12)
    logits, wanted = denoised(model), denoised(unquantized)
    agreement = float((logits.argmax(-1) == wanted.argmax(-1)).float().mean())
    print(f"{asked}: cosine {cosine(logits, wanted):.4f}, top-1 agreement {agreement:.3f}")
    assert cosine(logits, wanted) > least


# Bad input ------------------------------------------------------------------------------------------------------------


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    if tensor is None:
        del stored[name]
    else:
        stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def assert_refused(folder: Path, tensor: str | None, match: str) -> None:
    with pytest.raises(dg.CheckpointError, match=match) as raised:
        load(folder)
    assert raised.value.tensor == tensor
    assert raised.value.file is not None


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("quant_method", "gptq", r"quant_method is 'gptq' \(GPTQ\); supported: compressed-tensors, modelopt"),
        ("format", "marlin-24", "format is 'marlin-24'; supported: float-quantized, int-quantized, pack-quantized"),
        ("quantization_status", "frozen", "quantization_status is 'frozen'; supported: compressed"),
        ("config_groups.group_0.weights.symmetric", False, "config_groups.group_0.weights.symmetric is False"),
        ("config_groups.group_0.weights.actorder", "group", "config_groups.group_0.weights.actorder is 'group'"),
    ],
)
def test_an_unknown_format(field: str, value: Any, match: str, folder: Path) -> None:
    requantize(folder, "int4")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    section = config["quantization_config"]
    *path, last = field.split(".")
    for part in path:
        section = section[part]
    section[last] = value
    file.write_text(json.dumps(config))
    assert_refused(folder, None, match)


def test_an_unknown_algorithm_of_modelopt(folder: Path) -> None:
    requantize(folder, "nvfp4-modelopt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, None, "quant_algo is 'W4A8_AWQ'; supported: NVFP4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("layout", "suffix"), [("fp8", "weight_scale"), ("int4", "weight_scale")])
def test_a_bad_scale(layout: str, suffix: str, value: float, folder: Path) -> None:
    requantize(folder, layout)
    name = f"{LAYER_0}experts.3.up_proj.{suffix}"
    scale = load_file(folder / "model.safetensors")[name]
    scale[5, 0] = value
    change(folder, name, scale)
    assert_refused(folder, name, rf"has a scale of {value} at \[5, 0\]")


@pytest.mark.parametrize("layout", ["fp8", "int4", "nvfp4", "nvfp4-modelopt"])
def test_a_scale_of_zero_is_that_of_zeros(layout: str, folder: Path) -> None:
    """Of a pruned expert, or of a block whose values are all zero."""
    requantize(folder, layout)
    names = [f"{LAYER_0}experts.3.up_proj", f"{LAYER_0}self_attn.o_proj"]
    stored = load_file(folder / "model.safetensors")
    for name in names:
        if f"{name}.weight_scale" in stored:
            stored[f"{name}.weight_scale"][5, 0] = 0
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    layer = load(folder).layers[0]
    assert isinstance(layer.experts_gate_up, QuantizedWeight)
    up = layer.experts_gate_up.dequantized(torch.float32)[3].chunk(2)[1]
    group = layer.experts_gate_up.group or up.shape[1]
    assert not up[5, :group].any()
    assert up[4].any()
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    assert torch.isfinite(denoised(model)).all()


@pytest.mark.parametrize(("suffix", "value"), [("weight_scale", float("nan")), ("weight_global_scale", 0.0)])
def test_a_bad_scale_of_nvfp4(suffix: str, value: float, folder: Path) -> None:
    requantize(folder, "nvfp4")
    name = f"{LAYER_0}experts.3.up_proj.{suffix}"
    scale = load_file(folder / "model.safetensors")[name]
    changed = scale.float()
    changed.view(-1)[-1] = value
    change(folder, name, changed.to(scale.dtype))
    assert_refused(folder, name, f"has a scale of {value}")


def test_a_nan_code(folder: Path) -> None:
    requantize(folder, "fp8")
    name = f"{LAYER_0}self_attn.o_proj.weight"
    codes = load_file(folder / "model.safetensors")[name].view(torch.uint8)
    codes[2, 7] = 0xFF
    change(folder, name, codes.view(torch.float8_e4m3fn))
    assert_refused(folder, name, r"has nan at \[2, 7\]")


@pytest.mark.parametrize(
    ("layout", "suffix", "wrong", "match"),
    [
        ("int4", "weight_packed", torch.zeros(32, 16).int(), r"has shape \[32, 16\].* asks for \[32, 8\]"),
        (
            "int4",
            "weight_scale",
            torch.ones(32, 4).bfloat16(),
            r"has shape \[32, 4\].* asks for \[32, 2\] or \[32, 1\]",
        ),
        ("int4", "weight_scale", torch.ones(32, 2), "has dtype F32; supported: BF16, F16"),
        (
            "nvfp4",
            "weight_packed",
            torch.zeros(32, 64, dtype=torch.uint8),
            r"has shape \[32, 64\].* asks for \[32, 32\]",
        ),
        ("nvfp4", "weight_scale", torch.ones(32, 4), "has dtype F32; supported: F8_E4M3"),
        (
            "nvfp4-modelopt",
            "weight_scale_2",
            torch.ones(2),
            r"has shape \[2\]; the configuration asks for \[1\] or \[\]",
        ),
        ("fp8", "weight_scale", torch.ones(64, 1), r"has shape \[64, 1\]"),
    ],
)
def test_a_part_of_the_wrong_shape(layout: str, suffix: str, wrong: Tensor, match: str, folder: Path) -> None:
    requantize(folder, layout)
    name = f"{LAYER_0}experts.3.up_proj.{suffix}"
    change(folder, name, wrong)
    assert_refused(folder, name, match)


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [("fp8", "weight_scale"), ("int4", "weight_scale"), ("nvfp4", "weight_global_scale"), ("nvfp4", "weight_scale")],
)
def test_a_missing_part(layout: str, suffix: str, folder: Path) -> None:
    requantize(folder, layout)
    name = f"{LAYER_0}experts.3.up_proj.{suffix}"
    change(folder, name, None)
    assert_refused(folder, name, "is missing, and the quantized weight needs it")


def test_a_missing_expert(folder: Path) -> None:
    requantize(folder, "int4")
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        change(folder, f"{LAYER_0}experts.3.up_proj.{suffix}", None)
    with pytest.raises(dg.CheckpointError, match="is missing"):
        load(folder)


def test_asymmetric_weights(folder: Path) -> None:
    requantize(folder, "int4")
    name = f"{LAYER_0}experts.3.up_proj.weight_zero_point"
    change(folder, name, torch.zeros(4, 2, dtype=torch.int32))
    assert_refused(folder, name, "not supported .weight_zero_point.; supported: symmetric")


@pytest.mark.parametrize("asked", ["fp4", "int4-16", "int2", "", "fp8-32"])
def test_an_unknown_target_format(asked: str, folder: Path) -> None:
    with pytest.raises(
        ValueError, match="weights must be one of auto, unquantized, fp8, int8, int4, int4-32, int4-64, int4-128, nv"
    ):
        dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights=asked)


def test_a_format_other_than_the_stored_one(folder: Path) -> None:
    requantize(folder, "int4")
    with pytest.raises(ValueError, match=r"weights fp8 was asked for, and the checkpoint has .* as int4"):
        dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights="fp8")
