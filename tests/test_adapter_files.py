"""What an adapter's files may be, and how everything else is refused: by the field, or by file and tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from adapter_folders import DECODER, ENCODER, PREFIX, SETTINGS, random_tensors, write_adapter
from checkpoints import config_for

# 2 * 16 and 48 differ, so that shapes tell the experts' parameters apart.
CONFIG = dg.ModelConfig.from_dict(config_for(layers=2, hidden=48, moe_intermediate=16, experts=4))
QUERY = f"{PREFIX}decoder.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, 1)


def read(folder: Path, passes: str | None = None) -> dg.Adapter:
    return dg.Adapter.from_folder(folder, CONFIG, passes)


def test_an_adapter_has_factors_for_each_pass(tensors: Tensors, tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path, tensors, base_model_name_or_path="google/diffusiongemma-26B-A4B-it"))
    assert adapter.passes == "separate"
    assert (adapter.rank, adapter.scale) == (4, 2.0)
    assert adapter.settings.base == "google/diffusiongemma-26B-A4B-it"
    # The last layer's values come from its keys.
    assert set(adapter.modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapter.encoder) == len(adapter.decoder) == 13
    factors = adapter.decoder[0, "q_proj"]
    assert torch.equal(factors.a, tensors[f"{QUERY}.lora_A.weight"])
    assert torch.equal(factors.b, tensors[f"{QUERY}.lora_B.weight"])
    assert adapter.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_the_digest_tells_adapters_apart(tensors: Tensors) -> None:
    def digest(settings: dict[str, Any], tensors: Tensors) -> str:
        return dg.Adapter.from_tensors(SETTINGS | settings, tensors, CONFIG).digest

    same = digest({}, dict(reversed(tensors.items())))
    assert digest({}, tensors) == same
    swapped = {
        name.replace(DECODER, "?").replace(ENCODER, DECODER).replace("?", ENCODER): t for name, t in tensors.items()
    }
    others = [digest({"lora_alpha": 9}, tensors), digest({}, swapped), digest({}, random_tensors(CONFIG, 2))]
    assert len({same, *others}) == 4


def shared(tensors: Tensors) -> Tensors:
    """The decoder's factors under both names."""
    own = {name: tensor for name, tensor in tensors.items() if f".{DECODER}." in name}
    return own | {name.replace(f".{DECODER}.", f".{ENCODER}."): tensor for name, tensor in own.items()}


def test_equal_factors_are_shared(tensors: Tensors) -> None:
    adapter = dg.Adapter.from_tensors(SETTINGS, shared(tensors), CONFIG)
    assert adapter.passes == "shared"
    assert adapter.encoder[1, "o_proj"] is adapter.decoder[1, "o_proj"]
    with pytest.raises(ValueError, match="passes is both, and the adapter has factors of its own for each pass"):
        dg.Adapter.from_tensors(SETTINGS, tensors, CONFIG, "both")


@pytest.mark.parametrize("stack", [DECODER, ENCODER])
def test_the_names_of_one_pass_alone_are_ambiguous(stack: str, tensors: Tensors, tmp_path: Path) -> None:
    alone = {name: tensor for name, tensor in tensors.items() if f".{stack}." in name}
    folder = write_adapter(tmp_path / "one", alone)
    with pytest.raises(
        ValueError, match=f"passes must be both or stored: the adapter has the {stack[:7]}'s names alone"
    ):
        read(folder)
    which = "decoder" if stack == DECODER else "encoder"
    stored, both = read(folder, "stored"), read(folder, "both")
    assert stored.passes == f"{which} only"
    assert len(stored.of("encoder")) + len(stored.of("decoder")) == 13
    assert both.passes == "shared"
    assert both.encoder[0, "q_proj"] is both.decoder[0, "q_proj"]
    (folder / "automodel_peft_config.json").write_text("{}")
    assert read(folder).digest == both.digest


def test_vision_is_named_and_not_used(tensors: Tensors) -> None:
    tower = f"{PREFIX}encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.lora_A.weight"
    adapter = dg.Adapter.from_tensors(SETTINGS, tensors | {tower: torch.zeros(4, 32)}, CONFIG)
    assert adapter.ignored == (tower,)
    assert adapter.digest == dg.Adapter.from_tensors(SETTINGS, tensors, CONFIG).digest


def test_patterns_of_rank_and_alpha(tensors: Tensors) -> None:
    def scale(**settings: Any) -> tuple[float, float]:
        adapter = dg.Adapter.from_tensors(SETTINGS | settings, tensors, CONFIG)
        return adapter.decoder[0, "q_proj"].scale, adapter.decoder[1, "q_proj"].scale

    assert scale(use_rslora=True) == (4.0, 4.0)
    assert scale(alpha_pattern={"q_proj": 12}) == (3.0, 3.0)
    assert scale(alpha_pattern={r"layers\.1\..*": 4, "q_proj": 12}) == (3.0, 1.0)
    # Of more than one that match, the first counts; part of a name does not match.
    assert scale(alpha_pattern={"layers.0.self_attn.q_proj": 16, "_proj": 1, "q_proj": 12}) == (4.0, 3.0)
    query = {name: t.repeat(2, 1) if "_A" in name else t.repeat(1, 2) for name, t in tensors.items() if QUERY in name}
    longer = dg.Adapter.from_tensors(
        SETTINGS | {"rank_pattern": {"decoder.layers.0.self_attn.q_proj": 8}}, tensors | query, CONFIG
    )
    assert (longer.rank, longer.decoder[0, "q_proj"].scale) == (8, 1.0)


def experts_of(a: Any, b: Any, nested: bool = False) -> Tensors:
    name = f"{PREFIX}decoder.layers.0.experts" + (".base_layer" if nested else "")
    return {f"{name}.lora_A.weight": torch.randn(a), f"{name}.lora_B.weight": torch.randn(b)}


def test_the_layouts_of_experts() -> None:
    """A is by expert and B by rank; up to PEFT 0.18 in and out are exchanged."""
    experts, rank, hidden, inner = 4, 4, 48, 16
    for is_old in (False, True):
        sizes = (hidden, 2 * inner), (inner, hidden)
        first, second = (size[::-1] for size in sizes) if is_old else sizes
        outer = experts_of((experts * rank, second[0]), (second[1], rank * experts))
        inside = experts_of((experts * rank, first[0]), (first[1], rank * experts), nested=True)
        adapter = dg.Adapter.from_tensors(SETTINGS, outer | inside, CONFIG, "stored")
        for tensors, attribute in ((inside, "experts_gate_up"), (outer, "experts_down")):
            a, b = tensors.values()
            factors = adapter.decoder[0, attribute]
            for expert in range(experts):
                # PEFT's formula of each release: the change of this expert's weight [out, in].
                ours, theirs = factors.b[expert] @ factors.a[expert], b[:, expert::experts] @ a[expert * rank :][:rank]
                torch.testing.assert_close(ours, theirs.T if is_old else theirs)


def test_shapes_that_fit_two_parameters_need_the_settings() -> None:
    """With hidden 64 and experts of 32, gate_up_proj is square for an adapter."""
    config = dg.ModelConfig.from_dict(config_for(layers=2, experts=4))
    square = experts_of((16, 64), (64, 16))
    without = {name: value for name, value in SETTINGS.items() if name != "peft_version"}
    with pytest.raises(dg.CheckpointError, match=r"layers\.0\.experts\.lora_A.*fits more than one parameter or layout"):
        dg.Adapter.from_tensors(without, square, config, "stored")
    for version, change in (("0.21.2", lambda a, b: b @ a), ("0.18.1", lambda a, b: (b @ a).T)):
        settings = SETTINGS | {"peft_version": version}
        factors = dg.Adapter.from_tensors(settings, square, config, "stored").decoder[0, "experts_gate_up"]
        a, b = square.values()
        torch.testing.assert_close(factors.b[0] @ factors.a[0], change(a[:4], b[:, ::4]))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"peft_type": None}, 'peft_type is None; supported: "LORA"'),
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "dora": ({"use_dora": True}, "use_dora is True"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "bias of B": ({"lora_bias": True}, "lora_bias is True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "rank": ({"r": 0}, "r is 0"),
    "a scale": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj is -1"),
    "a pattern": ({"alpha_pattern": {"q_proj(": 1}}, "alpha_pattern has 'q_proj[(]', which is no regular expression"),
    "another rank": ({"r": 8}, r"lora_A\.weight: has rank 4, and adapter_config\.json says 8"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_settings_that_are_refused_by_field(name: str, tensors: Tensors, tmp_path: Path) -> None:
    settings, message = FIELDS[name]
    with pytest.raises(dg.CheckpointError, match=message) as refused:
        read(write_adapter(tmp_path, tensors, **settings))
    assert refused.value.file is not None
    assert Path(refused.value.file).parent == tmp_path


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "half a pair": (lambda t: without(t, B), rf"{A}: is there without its B"),
    "a rank": (lambda t: t | {B: torch.ones(64, 3)}, rf"{A}: is \[4, 48\], and its B \[64, 3\]; wanted: \[rank, 48\]"),
    "columns": (lambda t: t | {A: torch.ones(4, 47)}, rf"{A}: is \[4, 47\], and its B"),
    "a vector": (lambda t: t | {A: torch.ones(48)}, rf"{A}: is a cpu tensor \[48\] .*; wanted: a matrix"),
    "a value": (lambda t: t | {A: torch.full((4, 48), torch.nan)}, rf"{A}: has values that are not finite"),
    "integers": (lambda t: t | {A: torch.ones(4, 48, dtype=torch.int32)}, rf"{A}: has dtype I32; supported"),
    "a layer": (
        lambda t: {n.replace("layers.1", "layers.2"): v for n, v in t.items()},
        "is of layer 2, and the model has 2",
    ),
    "dora": (lambda t: t | {f"{QUERY}.lora_magnitude_vector": torch.ones(64)}, "is a magnitude of DoRA"),
    "the head": (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)}, "adapts the head"),
    "the embedding": (
        lambda t: t | {f"{PREFIX}decoder.embed_tokens.lora_embedding_A": torch.ones(4, 512)},
        "adapts an embed",
    ),
    "a bias": (lambda t: t | {f"{QUERY}.lora_B.bias": torch.ones(64)}, "is a bias"),
    "another model": (
        lambda t: {f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight": t[A]},
        "is not a factor of an adapter",
    ),
    "values of a full layer": (
        lambda t: {n.replace("layers.1.self_attn.k", "layers.1.self_attn.v"): v for n, v in t.items()},
        "adapts v_proj of layer 1, whose values come from its keys",
    ),
    "experts": (lambda t: experts_of((15, 48), (32, 15)), r"wanted: .* a multiple of the 4 experts"),
    "sizes of experts": (
        lambda t: experts_of((16, 48), (40, 16)),
        "has 48 columns, and its B 40 rows; wanted: 48 and 32",
    ),
    "nothing": (lambda t: {}, "has no factors"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused_by_name(name: str, tensors: Tensors, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    folder = write_adapter(tmp_path, change(tensors))
    with pytest.raises(dg.CheckpointError, match=message) as refused:
        read(folder)
    assert refused.value.file == str(folder / "adapter_model.safetensors")


def test_folders_that_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    def refused(place: Path, message: str) -> None:
        with pytest.raises(dg.CheckpointError, match=message):
            read(place)

    refused(tmp_path / "nowhere", "nowhere: does not exist; wanted: an adapter's folder")
    refused(tmp_path, re.escape(f"{tmp_path}: holds no adapter of PEFT: adapter_config.json is missing"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    refused(tmp_path / "adapter_config.json", "is a file; wanted: an adapter's folder")
    refused(tmp_path, r"adapter_model\.safetensors: is missing")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, r"adapter_model\.bin: is a Python pickle, which is a program and is not run")
    write_adapter(tmp_path, tensors)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, r"adapter_model\.safetensors: .*is cut short")


def test_a_hub_id_is_downloaded(tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = write_adapter(tmp_path, tensors), []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert dg.Adapter.from_folder("owner/my-lora", CONFIG).passes == "separate"
    assert asked == [("owner/my-lora", ["*.json", "*.safetensors"])]
