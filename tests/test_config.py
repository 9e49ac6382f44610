"""config.json and generation_config.json: both forms read as in transformers, and errors that name the field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import FULL, GENERATION_CONFIG, SLIDING, config_for
from dgemma_ext.checkpoint import GenerationDefaults, ModelConfig
from dgemma_ext.errors import CheckpointError
from published_layout import PUBLISHED_CONFIG

MISSING = object()


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the configuration with one dotted field set, or removed."""
    config = copy.deepcopy(config)
    *parents, field = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if value is MISSING:
        del section[field]
    else:
        section[field] = value
    return config


def transformers_config(config: dict[str, Any]) -> Any:
    from transformers import DiffusionGemmaConfig

    return DiffusionGemmaConfig.from_dict(copy.deepcopy(config))


def assert_agrees_with_transformers(config: dict[str, Any]) -> None:
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

    ours, theirs = ModelConfig.from_dict(config), transformers_config(config)
    text = theirs.text_config
    for field in (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "top_k_experts",
        "vocab_size",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "final_logit_softcapping",
        "hidden_activation",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(ours, field) == getattr(text, field), field
    assert ours.bidirectional_attention == text.use_bidirectional_attention
    assert ours.canvas_length == theirs.canvas_length
    assert len(ours.layers) == text.num_hidden_layers
    rotary = DiffusionGemmaTextRotaryEmbedding(text)
    for layer in ours.layers:
        layer_type = text.layer_types[layer.index]
        theirs_layer = text.per_layer_config[layer.index]
        assert layer.is_sliding == (layer_type == SLIDING)
        assert layer.head_dim == theirs_layer.head_dim
        assert layer.num_key_value_heads == theirs_layer.num_key_value_heads
        assert layer.sliding_window == (text.sliding_window if layer.is_sliding else 0)
        assert layer.k_eq_v == (layer_type == FULL)
        frequencies = layer.rope.inverse_frequencies(layer.head_dim)
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, getattr(rotary, f"{layer_type}_inv_freq"))


@settings(max_examples=60, deadline=None)
@given(
    dialect=st.sampled_from(["flat", "per_layer"]),
    layers=st.lists(st.sampled_from([SLIDING, FULL]), max_size=6).map(lambda types: [*types, FULL]),
    head_dim=st.integers(1, 64).map(lambda n: 2 * n),
    global_head_dim=st.integers(1, 64).map(lambda n: 2 * n),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    global_kv_heads=st.sampled_from([1, 2, 4, 8]),
    window=st.integers(1, 4096),
    sliding_theta=st.floats(2.0, 1e7),
    full_theta=st.floats(2.0, 1e7),
    partial_rotary_factor=st.floats(0.0, 1.0),
)
def test_both_spellings_agree_with_transformers(dialect: str, **sizes: Any) -> None:
    assert_agrees_with_transformers(config_for(dialect=dialect, heads=8, **sizes))


def test_the_spellings_agree_with_each_other() -> None:
    flat, per_layer = (
        ModelConfig.from_dict(config_for(dialect=dialect, layers=8)) for dialect in ("flat", "per_layer")
    )
    assert flat == per_layer


def test_a_configuration_written_by_transformers() -> None:
    config = config_for(layers=8)
    written = json.loads(transformers_config(config).to_json_string())
    assert "per_layer_config" in written["text_config"]
    assert ModelConfig.from_dict(written).layers == ModelConfig.from_dict(config).layers


@pytest.mark.parametrize(
    "field",
    [
        "global_head_dim",
        "num_global_key_value_heads",
        "layer_types",
        "rope_parameters",
        "sliding_window",
        "head_dim",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "pad_token_id",
        "bos_token_id",
    ],
)
def test_an_absent_field_takes_the_default_of_transformers(field: str) -> None:
    assert_agrees_with_transformers(changed(config_for(layers=7), f"text_config.{field}", MISSING))


def test_absent_layer_fields_take_the_defaults_of_transformers() -> None:
    config = config_for(layers=6, dialect="per_layer", heads=8)
    for field in ("per_layer_config", "head_dim", "num_key_value_heads"):
        config = changed(config, f"text_config.{field}", MISSING)
    assert_agrees_with_transformers(config)


def test_a_sliding_last_layer_is_read_as_full_as_in_transformers() -> None:
    config = config_for(layers=[SLIDING, FULL, SLIDING])
    with pytest.warns(UserWarning, match="layer_types"):
        assert_agrees_with_transformers(config)


def test_agreeing_spellings_may_be_mixed_and_contradicting_ones_not() -> None:
    config = config_for(dialect="per_layer")
    config["text_config"] |= {"global_head_dim": 32, "num_global_key_value_heads": 1}
    assert ModelConfig.from_dict(config) == ModelConfig.from_dict(config_for())
    with pytest.raises(ValueError, match=r"per_layer_config gives layer 2 head_dim 32, the flat fields give 64"):
        ModelConfig.from_dict(changed(config, "text_config.global_head_dim", 64))


def test_per_layer_windows_are_honoured() -> None:
    config = changed(config_for(dialect="per_layer"), "text_config.per_layer_config.1", {"sliding_window": 5})
    assert [layer.sliding_window for layer in ModelConfig.from_dict(config).layers] == [16, 5, 0]


def test_the_published_configuration() -> None:
    config = ModelConfig.from_dict(PUBLISHED_CONFIG)
    assert_agrees_with_transformers(PUBLISHED_CONFIG)
    assert [layer.index for layer in config.layers if not layer.is_sliding] == [5, 11, 17, 23, 29]
    sliding, full = config.layers[0], config.layers[5]
    assert (sliding.head_dim, sliding.num_key_value_heads, sliding.sliding_window) == (256, 8, 1024)
    assert (full.head_dim, full.num_key_value_heads, full.sliding_window) == (512, 2, 0)
    frequencies = full.rope.inverse_frequencies(512)
    # The first 64 of 256 pairs rotate, with frequencies spaced as if all did.
    assert int((frequencies != 0).sum()) == 64
    assert float(frequencies[63]) == pytest.approx(1e6 ** (-126 / 512), rel=1e-6)
    assert config.dtype == torch.bfloat16
    assert config.eos_token_ids == (1, 106)


def test_proportional_rope_honours_its_factor() -> None:
    config = changed(config_for(), f"text_config.rope_parameters.{FULL}.factor", 8.0)
    assert_agrees_with_transformers(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "gemma4"),
        ("tie_word_embeddings", False),
        ("audio_config", {"hidden_size": 8}),
        ("quantization_config", {"quant_method": "compressed-tensors"}),
        ("dtype", "float64"),
        ("canvas_length", 0),
        ("canvas_length", None),
        ("image_token_id", -1),
        ("text_config", MISSING),
        ("text_config.model_type", "gemma4_text"),
        ("text_config.attention_bias", True),
        ("text_config.attention_chunk_size", 128),
        ("text_config.attention_k_eq_v", False),
        ("text_config.attn_logit_softcapping", 50.0),
        ("text_config.enable_moe_block", False),
        ("text_config.eos_token_id", "<eos>"),
        ("text_config.final_logit_softcapping", None),
        ("text_config.hidden_activation", "silu"),
        ("text_config.hidden_size_per_layer_input", 256),
        ("text_config.layer_types", ["linear_attention", SLIDING, FULL]),
        ("text_config.layer_types", [SLIDING, FULL]),
        ("text_config.moe_intermediate_size", MISSING),
        ("text_config.num_attention_heads", 3),
        ("text_config.num_experts", None),
        ("text_config.num_kv_shared_layers", 2),
        ("text_config.hidden_size", 64.0),
        ("text_config.hidden_size", True),
        ("text_config.head_dim", 15),
        ("text_config.per_layer_config", {"3": {"head_dim": 8}}),
        ("text_config.per_layer_config", {"0": {"intermediate_size": 8}}),
        ("text_config.per_layer_config", {"0": {"skip": ["self_attn"]}}),
        ("text_config.per_layer_config", {"0": {"sliding_window": None}}),
        ("text_config.quantization_config", {"quant_method": "fp8"}),
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        (f"text_config.rope_parameters.{SLIDING}", MISSING),
        (f"text_config.rope_parameters.{SLIDING}.partial_rotary_factor", 0.5),
        (f"text_config.rope_parameters.{SLIDING}.rope_theta", MISSING),
        (f"text_config.rope_parameters.{FULL}.rope_type", "yarn"),
        (f"text_config.rope_parameters.{FULL}.attention_factor", 0.9),
        ("text_config.rope_scaling", {"rope_type": "linear", "factor": 8.0}),
        ("text_config.sliding_window", 0),
        ("text_config.tie_word_embeddings", False),
        ("text_config.top_k_experts", 9),
        ("text_config.use_bidirectional_attention", "all"),
        ("text_config.use_double_wide_mlp", True),
        ("text_config.vocab_size", -5),
    ],
)
def test_unsupported_fields_are_named(tmp_path: Path, path: str, value: Any) -> None:
    # Without the flat fields, which would contradict the per_layer_config that replaces them.
    dialect = "per_layer" if path.endswith("per_layer_config") else "flat"
    config = changed(config_for(dialect=dialect), path, value)
    # The message names the changed field; for a layer's window, the window.
    expected = "sliding_window" if value == {"0": {"sliding_window": None}} else path.rpartition(".")[2]
    with pytest.raises(ValueError, match=expected):
        ModelConfig.from_dict(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=expected) as caught:
        ModelConfig.from_file(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


def test_neutral_values_of_related_models_are_accepted() -> None:
    config = config_for()
    config["text_config"] |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    config["text_config"] |= {"enable_moe_block": True, "use_double_wide_mlp": False}
    assert ModelConfig.from_dict(config) == ModelConfig.from_dict(config_for())


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        ModelConfig.from_file(tmp_path)


def test_the_published_generation_settings(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    assert GenerationDefaults.from_file(tmp_path) == GenerationDefaults(
        max_denoising_steps=48,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_token_ids=(1, 106, 50),
        pad_token_id=0,
        max_new_tokens=256,
    )


def test_every_generation_setting_is_read() -> None:
    values = {
        "max_denoising_steps": 7,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.25},
        "t_min": 0.1,
        "t_max": 0.9,
        "stability_threshold": 3,
        "confidence_threshold": 0.5,
        "max_new_tokens": 11,
        "eos_token_id": 9,
        "pad_token_id": 4,
    }
    assert GenerationDefaults.from_dict(values) == GenerationDefaults(7, 0.25, 0.1, 0.9, 3, 0.5, (9,), 4, 11)


def test_missing_generation_settings_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    ours = GenerationDefaults.from_file(tmp_path)
    assert ours.entropy_bound == theirs.pop("sampler_config").entropy_bound
    assert {name: getattr(ours, name) for name in theirs} == theirs
    assert (ours.eos_token_ids, ours.pad_token_id) == ((), None)


def test_missing_token_ids_are_those_of_the_configuration(tmp_path: Path) -> None:
    defaults = GenerationDefaults.from_file(tmp_path, ModelConfig.from_dict(config_for()))
    assert (defaults.eos_token_ids, defaults.pad_token_id) == ((1, 106), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_denoising_steps", 0),
        ("t_max", 0.3),
        ("t_min", -0.1),
        ("stability_threshold", 1.5),
        ("confidence_threshold", -0.1),
        ("eos_token_id", [1, "x"]),
        ("eos_token_id", 2**31),
        ("max_new_tokens", "many"),
        ("max_denoising_steps", 10**400),
        ("sampler_config", {"_cls_name": "OtherSamplerConfig"}),
        ("sampler_config", {"entropy_bound": -1.0}),
    ],
)
def test_bad_generation_settings_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG | {field: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}"):
        GenerationDefaults.from_file(tmp_path)
