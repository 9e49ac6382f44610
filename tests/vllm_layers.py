"""vLLM's layer of quantized experts as far as loading goes, without an engine, and checkpoints for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts

from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import parse_target
from dgemma_ext.checkpoint.quantize import convert
from dgemma_ext.integrations.vllm import quantized_experts
from dgemma_ext.integrations.vllm.quantized_experts import DGemmaQuantizedFusedMoEMethod
from dgemma_ext.integrations.vllm.stored_experts import Scheme
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


def quantized_folders(root: Path) -> dict[str, Path]:
    """A checkpoint of each scheme, by what writes it."""
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
