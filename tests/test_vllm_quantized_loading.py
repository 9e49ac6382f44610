"""How vLLM's loader fills the parameters of quantized experts, which checkpoints are ours, and what is refused; in
vLLM's environment, without an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import ModelConfig, parse_target
from dgemma_ext.checkpoint.quantize import convert
from dgemma_ext.integrations.vllm import quantization, quantized_experts
from dgemma_ext.integrations.vllm.configuration import ARCHITECTURE
from dgemma_ext.integrations.vllm.quantization import Unsupported, scheme_of
from dgemma_ext.integrations.vllm.quantized_experts import DGemmaQuantizedFusedMoEMethod
from dgemma_ext.integrations.vllm.stored_experts import Scheme
from dgemma_ext.model import load_weights
from dgemma_ext.ops.formats import QuantizedWeight
from quantized_checkpoints import requantize

HIDDEN, EXPERT, EXPERTS = 64, 64, 4
PREFIX = "model.layers.0.experts"
STORED = "model.decoder.layers.0.experts."
SCHEMES = {
    "fp8": Scheme("fp8"),
    "int8": Scheme("int8"),
    "int4": Scheme("int4", (32, 32)),
    "nvfp4": Scheme("nvfp4", (16, 16)),
    "package nvfp4-modelopt": Scheme("nvfp4", (16, 16), modelopt=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loading")
    sizes = {"hidden": HIDDEN, "moe_intermediate": EXPERT, "experts": EXPERTS, "layers": 1}
    source = make_checkpoint(root / "source", with_tokenizer=False, **sizes)
    for by in SCHEMES:
        if " " in by:
            shutil.copytree(source, root / by)
            requantize(root / by, by.rpartition(" ")[2], r"model\.decoder\.layers\.\d+\.experts\.\d+\.\w+\.weight")
        else:
            convert(source, root / by, parse_target(by, ("experts",)))
    return {by: root / by for by in SCHEMES}


def stored_experts(folder: Path) -> dict[str, Tensor]:
    """The experts' tensors, by the names that vLLM hands to a layer."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name.removeprefix(STORED): tensor for name, tensor in tensors.items() if name.startswith(STORED)}


def layer_of(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch, rank: int = 0, ranks: int = 1, by_expert: bool = False
) -> Any:
    """vLLM's layer of experts as far as loading goes, with our method."""
    layer: Any = torch.nn.Module.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    split = 1 if by_expert else ranks
    own = EXPERTS // ranks if by_expert else EXPERTS
    first = own * rank if by_expert else 0
    places = torch.tensor([e - first if first <= e < first + own else -1 for e in range(EXPERTS)], dtype=torch.int32)
    moe = SimpleNamespace(
        tp_rank=0 if by_expert else rank,
        tp_size=split,
        num_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        intermediate_size=EXPERT,
        intermediate_size_per_partition=EXPERT // split,
        hidden_dim=HIDDEN,
        hidden_dim_unpadded=HIDDEN,
        is_act_and_mul=True,
        tp_shard_with_padding=False,
        moe_parallel_config=SimpleNamespace(tp_size=split),
    )
    method = DGemmaQuantizedFusedMoEMethod(moe, scheme)
    fields = {
        "layer_name": PREFIX,
        "moe_config": moe,
        "quant_config": None,
        "quant_method": method,
        "local_num_experts": own,
        "expert_map_manager": SimpleNamespace(
            map_global_to_local=lambda expert: int(places[expert]),
            expert_map=places if by_expert else None,
            num_fused_shared_experts=0,
        ),
        "ckpt_gate_proj_name": "gate_proj",
        "ckpt_up_proj_name": "up_proj",
        "ckpt_down_proj_name": "down_proj",
        "lora_base_layer_prefix": "",
        "is_fused_checkpoint_transposed": False,
        "_fused_shared_expert_quantizer": None,
    }
    for name, value in fields.items():
        setattr(layer, name, value)
    method.create_weights(
        layer,
        own,
        HIDDEN,
        EXPERT // split,
        torch.bfloat16,
        weight_loader=layer.weight_loader,
        global_num_experts=EXPERTS,
    )
    kernel = SimpleNamespace(fused_experts=SimpleNamespace())
    monkeypatch.setattr(quantized_experts, "make_unquantized_moe_kernel", lambda **_: kernel)
    monkeypatch.setattr(layer, "_expert_routing_tables", lambda: None)
    return layer


def loaded(layer: Any, tensors: dict[str, Tensor]) -> tuple[QuantizedWeight, QuantizedWeight]:
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    weights: tuple[QuantizedWeight, QuantizedWeight] = layer.quant_method.moe_kernel.fused_experts.quantized
    return weights


def decoded(weight: QuantizedWeight) -> Tensor:
    return weight.dequantized(torch.float32)


@pytest.mark.parametrize("by_expert", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("by", SCHEMES)
def test_a_rank_has_its_part_of_the_engines_weights(
    by: str, by_expert: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one rank and of two, by tensor and by expert; and no memory beside vLLM's parameters."""
    config = ModelConfig.from_file(folders[by])
    layer = load_weights(folders[by], config, torch.bfloat16, "cpu").layers[0]
    assert isinstance(layer.experts_gate_up, QuantizedWeight)
    assert isinstance(layer.experts_down, QuantizedWeight)
    gate, up = decoded(layer.experts_gate_up).chunk(2, 1)
    down = decoded(layer.experts_down)
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        made = layer_of(SCHEMES[by], monkeypatch, rank, ranks, by_expert)
        gate_up_of_rank, down_of_rank = loaded(made, stored_experts(folders[by]))
        if by_expert:
            wanted = [torch.cat((gate, up), 1).chunk(ranks)[rank], down.chunk(ranks)[rank]]
        else:
            halves = (gate.chunk(ranks, 1)[rank], up.chunk(ranks, 1)[rank])
            wanted = [torch.cat(halves, 1), down.chunk(ranks, 2)[rank]]
        assert torch.equal(decoded(gate_up_of_rank), wanted[0])
        assert torch.equal(decoded(down_of_rank), wanted[1])
        addresses = {parameter.data_ptr() for parameter in made.parameters()}
        for weight in (gate_up_of_rank, down_of_rank):
            assert all(tensor.data_ptr() in addresses for tensor in weight.tensors().values())


def test_one_scale_for_a_matrix_is_every_rows(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate and of up each its own, where vLLM's own method makes one of them."""
    tensors = stored_experts(folders["fp8"])
    for number, name in enumerate(sorted(name for name in tensors if name.endswith("weight_scale"))):
        tensors[name] = torch.tensor(0.5 + number, dtype=torch.bfloat16)
    gate_up, down = loaded(layer_of(Scheme("fp8", by_matrix=True), monkeypatch, 1, 2), tensors)
    for expert in range(EXPERTS):
        of = {name: float(tensors[f"{expert}.{name}_proj.weight_scale"]) for name in ("gate", "up", "down")}
        rows = gate_up.tensors()["scales"][expert]
        assert rows.tolist() == [of["gate"]] * (EXPERT // 2) + [of["up"]] * (EXPERT // 2)
        assert down.tensors()["scales"][expert].tolist() == [of["down"]] * HIDDEN


def test_int4_scales_keep_their_dtype(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored_experts(folders["int4"])
    half = {name: one.half() if name.endswith("weight_scale") else one for name, one in tensors.items()}
    weights = loaded(layer_of(SCHEMES["int4"], monkeypatch), half)
    assert all(weight.tensors()["scales"].dtype == torch.float16 for weight in weights)
    last = "3.up_proj.weight_scale"
    with pytest.raises(ValueError, match=rf"{PREFIX}.3.up_proj.weight_scale is bfloat16, and that of other"):
        loaded(layer_of(SCHEMES["int4"], monkeypatch), {**half, last: tensors[last]})


def put(value: float, index: int = 5) -> Callable[[Tensor], Tensor]:
    """Writes a value into a tensor."""

    def edit(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[min(index, tensor.numel() - 1)] = value
        return tensor

    return edit


FAULTS: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    ("fp8", "2.up_proj.weight_scale", put(float("nan")), "2.gate_proj or up_proj has a scale that is not finite"),
    ("fp8", "1.down_proj.weight_scale", put(float("inf")), "1.down_proj has a scale that is not finite"),
    ("fp8", "3.gate_proj.weight", put(float("nan")), "3.gate_proj or up_proj has NaN among its codes"),
    (
        "fp8",
        "1.up_proj.weight",
        lambda one: one[:32],
        r"1.up_proj.weight is float8_e4m3fn \[32, 64\]; .* float8_e4m3fn \[64, 64\]",
    ),
    ("fp8", "1.up_proj.weight", lambda one: one.float(), "1.up_proj.weight is float32"),
    ("fp8", "1.up_proj.weight_scale", lambda one: one[:1], r"1.up_proj.weight_scale is bfloat16 \[1, 1\]"),
    ("fp8", "3.down_proj.weight_scale", lambda _: None, "3.down_proj.weight_scale is missing"),
    ("int8", "0.down_proj.weight_scale", put(0.0), "0.down_proj has a scale of zero"),
    ("int8", "0.down_proj.weight", lambda one: one.view(torch.uint8), "0.down_proj.weight is uint8"),
    ("int4", "2.down_proj.weight_scale", put(float("nan")), "2.down_proj has a scale that is not finite"),
    (
        "int4",
        "2.down_proj.weight_scale",
        lambda one: one[:, :1].contiguous(),
        r"weight_scale is bfloat16 \[64, 1\]; .* \[64, 2\]",
    ),
    ("int4", "2.down_proj.weight_packed", lambda one: one[:, :4], r"2.down_proj.weight_packed is int32 \[64, 4\]"),
    ("int4", "2.gate_proj.weight_scale", lambda one: one.float(), "2.gate_proj.weight_scale is float32"),
    ("nvfp4", "1.up_proj.weight_global_scale", put(0.0, 0), "1.gate_proj or up_proj has a global scale of zero"),
    (
        "nvfp4",
        "1.up_proj.weight_global_scale",
        put(float("inf"), 0),
        "1.gate_proj or up_proj has a scale that is not finite",
    ),
    ("nvfp4", "3.gate_proj.weight_scale", put(float("nan")), "3.gate_proj or up_proj has a scale that is NaN"),
    (
        "nvfp4",
        "3.down_proj.weight_global_scale",
        lambda one: one.repeat(2),
        "3.down_proj.weight_global_scale is float32",
    ),
    ("package nvfp4-modelopt", "1.down_proj.weight_scale_2", lambda _: None, "1.down_proj.weight_scale_2 is missing"),
]


@pytest.mark.parametrize(("by", "name", "edit", "words"), FAULTS)
def test_what_no_weight_may_have_is_refused_by_name(
    by: str,
    name: str,
    edit: Callable[[Tensor], Tensor | None],
    words: str,
    folders: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = stored_experts(folders[by])
    changed = edit(tensors[name])
    tensors = {key: one for key, one in tensors.items() if key != name} | ({} if changed is None else {name: changed})
    with pytest.raises(ValueError, match=rf"^{PREFIX}\.") as raised:
        loaded(layer_of(SCHEMES[by], monkeypatch), tensors)
    assert raised.match(words)


def test_a_tensor_that_belongs_to_no_parameter_is_refused(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {**stored_experts(folders["int4"]), "0.up_proj.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}
    with pytest.raises(AttributeError, match="w13_weight_zero_point"):
        loaded(layer_of(SCHEMES["int4"], monkeypatch), tensors)


# Which experts are ours -------------------------------------------------------------------------------------------


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
