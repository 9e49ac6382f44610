"""How vLLM's loader fills the parameters of quantized experts, and what is refused; in vLLM's environment, without an
engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from torch import Tensor
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from dgemma_ext.checkpoint import ModelConfig
from dgemma_ext.integrations.vllm import quantized_experts
from dgemma_ext.integrations.vllm.stored_experts import Scheme
from dgemma_ext.model import load_weights
from dgemma_ext.ops.formats import QuantizedWeight
from vllm_layers import EXPERT, EXPERTS, HIDDEN, PREFIX, SCHEMES, layer_of, loaded, quantized_folders, stored_experts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return quantized_folders(tmp_path_factory.mktemp("loading"))


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


@pytest.mark.parametrize("by", SCHEMES)
def test_a_layer_that_the_checkpoint_leaves_out_is_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks of no quantized checkpoint whether all of it was there; made-up weights go through."""
    layer = layer_of(SCHEMES[by], monkeypatch)
    with pytest.raises(ValueError, match=f"^{PREFIX}: the checkpoint has no quantized weights of these experts"):
        loaded(layer, {})
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    loaded(layer, {})


@pytest.mark.parametrize("by", [*SCHEMES, "fp8 by matrix", "int4 float16"])
def test_experts_are_loaded_anew(by: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's way of loading weights while it runs: into the tensors that a captured graph reads, which are still no
    more than vLLM's own."""
    name, _, more = by.partition(" ")
    by = by if by in SCHEMES else name
    first = stored_experts(folders[by])
    if more == "float16":
        first = {key: one.half() if key.endswith("weight_scale") else one for key, one in first.items()}
    if more == "by matrix":
        first = {key: one[:1, 0].clone() if key.endswith("weight_scale") else one for key, one in first.items()}
    # Of the same layer with its experts in another order, and other scales.
    then = {f"{(int(key[0]) + 1) % EXPERTS}{key[1:]}": one.clone() for key, one in first.items()}
    for key in then:
        if key.endswith(("weight_scale", "global_scale", "scale_2")) and then[key].dtype != torch.float8_e4m3fn:
            then[key] *= 2
    scheme = Scheme("fp8", by_matrix=True) if more == "by matrix" else SCHEMES[by]
    layer = layer_of(scheme, monkeypatch)
    record_metadata_for_reloading(layer)
    weights = loaded(layer, first)
    read = [quantized_experts._operands(weight) for weight in weights]
    initialize_layerwise_reload(layer)
    list(layer.load_weights(then.items()))
    finalize_layerwise_reload(layer, None)
    wanted = loaded(layer_of(scheme, monkeypatch), then)
    assert layer.quant_method.moe_kernel.fused_experts.quantized is weights
    for kept, want in zip(read, wanted, strict=True):
        for operand, tensor in quantized_experts._operands(want).items():
            assert torch.equal(kept[operand].view(torch.uint8), tensor.view(torch.uint8)), operand
    storages = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert all(weight.values.untyped_storage().data_ptr() in storages for weight in weights)


def test_gate_and_down_may_have_other_groups(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored_experts(folders["int4"])
    _, alike = loaded(layer_of(SCHEMES["int4"], monkeypatch), tensors)
    for name in tensors:
        if name.endswith(("gate_proj.weight_scale", "up_proj.weight_scale")):
            tensors[name] = tensors[name][:, 1:].contiguous()
    gate_up, down = loaded(layer_of(Scheme("int4", (64, 32)), monkeypatch), tensors)
    assert (gate_up.group, down.group) == (64, 32)
    assert torch.equal(decoded(down), decoded(alike))
    for expert in range(EXPERTS):
        halves = [tensors[f"{expert}.{name}_proj.weight_scale"] for name in ("gate", "up")]
        assert torch.equal(gate_up.tensors()["scales"][expert], torch.cat(halves))


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


def test_a_fault_on_a_rank_has_the_experts_own_number(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored_experts(folders["fp8"])
    tensors["3.up_proj.weight_scale"] = put(float("nan"))(tensors["3.up_proj.weight_scale"])
    with pytest.raises(ValueError, match=rf"^{PREFIX}\.3\.gate_proj or up_proj has a scale"):
        loaded(layer_of(SCHEMES["fp8"], monkeypatch, 1, 2, by_expert=True), tensors)
    loaded(layer_of(SCHEMES["fp8"], monkeypatch, 0, 2, by_expert=True), tensors)


def test_padded_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(SCHEMES["int4"], monkeypatch)
    create = layer.quant_method.create_weights
    for hidden, own in ((HIDDEN + 64, EXPERT), (HIDDEN, EXPERT + 64)):
        words = rf"{PREFIX}: vLLM has padded its experts from \[64, 64\] to \[{own}, {hidden}\]"
        with pytest.raises(ValueError, match=words):
            create(layer, EXPERTS, hidden, own, torch.bfloat16, weight_loader=layer.weight_loader)


def test_a_tensor_that_belongs_to_no_parameter_is_refused(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {**stored_experts(folders["int4"]), "0.up_proj.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}
    with pytest.raises(AttributeError, match="w13_weight_zero_point"):
        loaded(layer_of(SCHEMES["int4"], monkeypatch), tensors)
