"""Which quantized checkpoints' experts are ours inside vLLM; in vLLM's environment, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.models.diffusion_gemma import DiffusionGemmaForConditionalGeneration as Model

from dgemma_ext.integrations.vllm import experts, quantization
from dgemma_ext.integrations.vllm.configuration import ARCHITECTURE
from dgemma_ext.integrations.vllm.quantization import Unsupported, scheme_of
from dgemma_ext.integrations.vllm.quantized_experts import DGemmaQuantizedFusedMoEMethod
from dgemma_ext.integrations.vllm.stored_experts import Scheme
from vllm_layers import EXPERTS, SCHEMES, layer_of, quantized_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantized_folders(tmp_path_factory.mktemp("loading"))


def settings(
    weights: dict[str, Any], inputs: dict[str, Any] | None = None, format: str | None = None
) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(**weights)
    return {"weights": args, "input_activations": inputs and QuantizationArgs(**inputs), "format": format}


BYTES = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
BY_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True, "type": "int"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}


def test_settings_mean_schemes() -> None:
    assert scheme_of(*[settings({**BYTES, "type": "float"})] * 2) == Scheme("fp8")
    by_matrix = settings({**BYTES, "type": "float", "strategy": "tensor"})
    assert scheme_of(by_matrix, by_matrix) == Scheme("fp8", by_matrix=True)
    assert scheme_of(*[settings(BYTES, BY_TOKEN, "int-quantized")] * 2) == Scheme("int8")
    assert scheme_of(settings(INT4), settings({**INT4, "group_size": 32})) == Scheme("int4", (64, 32))
    nvfp4 = settings({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})
    assert scheme_of(nvfp4, nvfp4) == Scheme("nvfp4", (16, 16))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (settings({**INT4, "symmetric": False}), "int4 weights are not symmetric"),
        (settings({**INT4, "group_size": 256}), "weights are int4 with scales one for 256 columns"),
        (settings({**INT4, "group_size": None, "strategy": "channel"}), "int4 with scales by channel"),
        (settings(INT4, BY_TOKEN), "int4 weights want inputs of 8 bits"),
        (
            settings({**BYTES, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
            "float8 with scales by block",
        ),
        (settings(BYTES, None, "int-quantized"), "inputs that are not rounded to int8 for each token"),
        (settings(BYTES, {**BY_TOKEN, "dynamic": False, "strategy": "tensor"}, "int-quantized"), "for each token"),
        (settings(BYTES, BY_TOKEN, "pack-quantized"), "are pack-quantized, in place of int-quantized"),
        (
            settings({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
            "float4 with scales one for 32",
        ),
    ],
)
def test_what_the_formats_do_not_hold_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        scheme_of(given, given)


INT4_OF_ALL = {"targets": ["Linear"], "weights": {**INT4, "symmetric": True}}
DECODER, ENCODER = r"model\.decoder\.layers\.", r"model\.encoder\.language_model\.layers\."


def chosen_schemes(groups: list[dict[str, Any]], ignore: list[str], **more: Any) -> list[Scheme | None]:
    """Of the experts of two layers, by a section of config.json as vLLM reads it."""
    section = {"format": "pack-quantized", "ignore": ignore, "config_groups": dict(enumerate(groups)), **more}
    config = quantization.CompressedTensors.from_config(section)
    config.packed_modules_mapping = Model.packed_modules_mapping
    config.apply_vllm_mapper(Model.hf_to_vllm_mapper)
    names: Any = {f"ckpt_{one}_proj_name": f"{one}_proj" for one in ("gate", "up", "down")}
    return [config._scheme(SimpleNamespace(**names), f"model.layers.{layer}.experts") for layer in range(2)]


def projections(prefix: str) -> list[str]:
    return [f"{prefix}.experts.{expert}.{one}_proj" for expert in range(EXPERTS) for one in ("gate", "up", "down")]


INT4_64 = Scheme("int4", (64, 64))


@pytest.mark.parametrize(
    ("targets", "ignore", "wanted"),
    [
        (["Linear"], [], [INT4_64, INT4_64]),
        (["Linear"], projections("model.decoder.layers.0"), [None, INT4_64]),
        (["Linear"], projections("model.encoder.language_model.layers.1"), [INT4_64, None]),
        (["Linear"], [r"re:.*layers\.0\..*"], [None, INT4_64]),
        (["Linear"], [rf"re:{DECODER}0\..*"], [None, INT4_64]),
        (["Linear"], [rf"re:{ENCODER}1\..*"], [INT4_64, None]),
        ([rf"re:{DECODER}1\.experts\..*"], [], [None, INT4_64]),
        ([rf"re:{ENCODER}\d+\.experts\..*"], [], [INT4_64, INT4_64]),
        (projections("model.decoder.layers.1"), [], [None, INT4_64]),
        (["re:.*self_attn.*"], [], [None, None]),
    ],
)
def test_lists_of_modules_are_matched_by_the_checkpoints_names_too(
    targets: list[str], ignore: list[str], wanted: list[Scheme | None]
) -> None:
    assert chosen_schemes([{**INT4_OF_ALL, "targets": targets}], ignore) == wanted


def test_a_name_goes_before_a_class() -> None:
    """Whichever spelling it has, and whichever group comes first."""
    named = {"targets": [rf"re:{DECODER}1\..*"], "weights": {**INT4, "group_size": 32}}
    for groups in ([INT4_OF_ALL, named], [named, INT4_OF_ALL]):
        assert chosen_schemes(groups, []) == [INT4_64, Scheme("int4", (32, 32))]


def test_experts_whose_projections_differ_stay_vllms() -> None:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    ups = {"targets": ["re:.*(gate|up)_proj$"], "weights": fp8, "format": "float-quantized"}
    downs = {"targets": ["re:.*down_proj$"], "weights": {**fp8, "strategy": "tensor"}, "format": "float-quantized"}
    with pytest.raises(Unsupported, match="gate and up are fp8, and down is fp8 with a scale for a matrix"):
        chosen_schemes([ups, downs], [])
    with pytest.raises(Unsupported, match="gate, up and down projections are not quantized alike"):
        chosen_schemes([INT4_OF_ALL], ["re:.*up_proj$"])
    with pytest.raises(Unsupported, match="gate, up and down projections are not quantized alike"):
        chosen_schemes([INT4_OF_ALL], ["re:.*down_proj$"])


def test_experts_whose_inputs_may_be_rotated_stay_vllms() -> None:
    rotation = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
    with pytest.raises(Unsupported, match="transform_config may rotate"):
        chosen_schemes([INT4_OF_ALL], [], transform_config={"config_groups": {"r": rotation}})


def modelopt(ignore: list[str], **more: Any) -> Any:
    """A configuration as vLLM makes it of a section of config.json."""
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ignore, **more}
    config = quantization.ModelOptNvFp4.from_config(section)
    config.packed_modules_mapping = Model.packed_modules_mapping
    config.apply_vllm_mapper(Model.hf_to_vllm_mapper)
    return config


def test_modelopts_lists_leave_layers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = modelopt(["lm_head", "*mlp*", "model.decoder.layers.0.experts*", *projections("model.decoder.layers.2")])
    layers = {}
    for number in range(3):
        layer = layer_of(SCHEMES["nvfp4"], monkeypatch)
        vars(layer)["moe_config"] = experts_layer().moe_config
        layers[number] = type(config.get_quant_method(layer, f"model.layers.{number}.experts"))
    assert layers == {0: type(None), 1: DGemmaQuantizedFusedMoEMethod, 2: type(None)}


def test_modelopts_dense_layers_are_ours_where_vllm_has_no_kernel() -> None:
    config = modelopt(["*self_attn*"])
    for name, ours in (("layers.0.mlp.down_proj", True), ("layers.0.self_attn.o_proj", False)):
        layer: Any = torch.nn.Module.__new__(RowParallelLinear)
        torch.nn.Module.__init__(layer)
        method = config.get_quant_method(layer, f"model.{name}")
        assert type(method) is (CompressedTensorsLinearMethod if ours else UnquantizedLinearMethod)
        assert not ours or layer.scheme.scheme == Scheme("nvfp4", (16, 16), modelopt=True)
    tower: Any = torch.nn.Module.__new__(RowParallelLinear)
    torch.nn.Module.__init__(tower)
    assert type(config.get_quant_method(tower, "vision_tower.layers.0.mlp.down_proj")) is UnquantizedLinearMethod


def test_modelopts_dtypes_and_groups() -> None:
    assert torch.float32 in modelopt([]).get_supported_act_dtypes()
    with pytest.raises(Unsupported, match="32 columns share a scale, in place of 16"):
        modelopt([], group_size=32)._scheme()


def experts_layer(ranks: int = 1, **more: Any) -> Any:
    moe = SimpleNamespace(
        activation=MoEActivation.GELU_TANH,
        is_act_and_mul=True,
        has_bias=False,
        in_dtype=torch.float32,
        hidden_dim=64,
        intermediate_size_per_partition=64 // ranks,
        tp_size=ranks,
    )
    vars(moe).update(more)
    return SimpleNamespace(moe_config=moe)


def test_groups_that_lie_across_ranks_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"over 4 ranks gives each 16 columns .* and 32 of them share a scale; .*expert-parallel"
    ):
        quantization._method(experts_layer(4), lambda: SCHEMES["int4"])
    assert quantization._method(experts_layer(2), lambda: SCHEMES["int4"]) is not None
    assert quantization._method(experts_layer(4), lambda: SCHEMES["nvfp4"]) is not None


def test_experts_that_stay_vllms_leave_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        quantization._logger, "warning_once", lambda text, *given: said.append(text % given), raising=False
    )
    assert quantization._method(experts_layer(activation=MoEActivation.SILU), lambda: SCHEMES["fp8"]) is None
    assert quantization._method(experts_layer(hidden_dim=24), lambda: SCHEMES["nvfp4"]) is None

    def unsupported() -> Scheme:
        raise Unsupported("their weights are float8 with scales by block")

    assert quantization._method(experts_layer(), unsupported) is None
    for method in (None, quantization.MODELOPT, "fp8"):
        quantization.say_what_stays(SimpleNamespace(model_config=SimpleNamespace(quantization=method)))
    assert [one.removeprefix("The checkpoint's experts stay with vLLM's own kernels: ") for one in said] == [
        "no kernel of ours takes silu in torch.float32 on this device",
        "the hidden size is 24, and nvfp4 wants a multiple of 16 up to 16384",
        "their weights are float8 with scales by block",
        "they are quantized by fp8",
    ]


def test_another_format_than_the_checkpoints_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_VLLM_EXPERTS", "int4")
    with pytest.raises(ValueError, match="DGEMMA_VLLM_EXPERTS is int4, and the checkpoint has its experts in fp8"):
        quantization._method(experts_layer(), lambda: SCHEMES["fp8"])
    assert quantization._method(experts_layer(), lambda: SCHEMES["int4"]) is not None
    with pytest.raises(ValueError, match="is int4, and the checkpoint has its experts quantized already: no kernel of"):
        quantization._method(experts_layer(activation=MoEActivation.SILU), lambda: SCHEMES["fp8"])


def test_what_was_quantized_at_loading_is_not_loaded_anew() -> None:
    class Theirs:
        times = 0

        def __init__(self, moe: Any) -> None:
            pass

        def process_weights_after_loading(self, layer: Any) -> None:
            self.times += 1

    layer: Any = SimpleNamespace(layer_name="model.layers.0.experts")
    method: Any = experts._method(Theirs)(experts_layer().moe_config)
    method.process_weights_after_loading(layer)
    method.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(quantized=None))
    method.process_weights_after_loading(layer)
    method.moe_kernel.fused_experts.quantized = "gate and up", "down"
    with pytest.raises(ValueError, match=r"^model.layers.0.experts: DGEMMA_VLLM_EXPERTS has quantized its"):
        method.process_weights_after_loading(layer)
    assert method.times == 2


def test_other_models_keep_vllms_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    """By vLLM's own choice of a configuration, for DiffusionGemma and for a mixture of experts of another kind."""
    from vllm.config import ModelConfig as Chosen
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    ours = SimpleNamespace(architectures=[ARCHITECTURE])
    other = SimpleNamespace(architectures=["Qwen3MoeForCausalLM"])
    stored = {"quant_method": "compressed-tensors"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    for config, section in zip((quantization.CompressedTensors, quantization.ModelOptNvFp4), stored, strict=True):
        take = config.override_quantization_method
        name = take(section, None, hf_config=ours)
        assert name == take(section, name, hf_config=ours)
        assert get_quantization_config(name) is config
        for user, model in ((None, other), (None, None), ("fp8", ours)):
            assert take(section, user, hf_config=model) is None
        assert take({"quant_method": "awq"}, None, hf_config=ours) is None
    assert get_quantization_config("compressed-tensors") is CompressedTensorsConfig
    assert get_quantization_config("modelopt_fp4") is ModelOptNvFp4Config
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "quantization_config": json.loads((folders["fp8"] / "config.json").read_text())["quantization_config"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Chosen(model=str(tmp_path), skip_tokenizer_init=True).quantization == "compressed-tensors"
    assert Chosen(model=str(folders["fp8"]), skip_tokenizer_init=True).quantization == quantization.COMPRESSED_TENSORS
    assert (
        Chosen(model=str(folders["package nvfp4-modelopt"]), skip_tokenizer_init=True).quantization
        == quantization.MODELOPT
    )
