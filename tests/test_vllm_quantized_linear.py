"""Dense layers of quantized checkpoints that this package multiplies inside vLLM; in vLLM's environment, without an
engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from torch import Tensor

from dgemma_ext.checkpoint import parse_target
from dgemma_ext.checkpoint.quantize import stored_parts
from dgemma_ext.integrations.vllm.quantized_linear import DGemmaLinearScheme, lacks_a_kernel
from dgemma_ext.integrations.vllm.stored_experts import Scheme
from dgemma_ext.ops import quantized_gemm

HIDDEN = 64
SCHEMES = {
    "fp8": Scheme("fp8"),
    "int8": Scheme("int8"),
    "int4": Scheme("int4", (32, 32)),
    "nvfp4": Scheme("nvfp4", (16, 16)),
}
WIDTHS = [32, 16, 16]  # as those of queries, keys and values


def loaded_dense(
    format: str, edit: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """A scheme with its layer, and the projections that were loaded."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    torch.manual_seed(3)
    matrices = [(number + 1) * torch.randn(width, HIDDEN) for number, width in enumerate(WIDTHS)]
    projections = [parse_target(format).quantize([matrix])[0].weight for matrix in matrices]
    scheme = DGemmaLinearScheme(SCHEMES[format], "layer")
    layer = torch.nn.Module()

    def load(param: Any, loaded_weight: Tensor, shard: str) -> None:
        at = sum(WIDTHS[: "qkv".index(shard)])
        param.load_qkv_weight(
            loaded_weight, shard_id=shard, shard_offset=at, shard_size=WIDTHS["qkv".index(shard)], num_heads=1
        )

    scheme.create_weights(layer, WIDTHS, HIDDEN, torch.float32, load)
    for shard, weight in zip("qkv", projections, strict=True):
        parts = stored_parts(weight)
        if shard == "v":
            edit(parts)
        for suffix, tensor in parts.items():
            parameter: Any = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensor, shard)
    scheme.process_weights_after_loading(layer)
    return (scheme, layer), projections


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_dense_layer_is_the_product_of_its_projections(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own scales, by rows of different numbers."""
    (scheme, layer), projections = loaded_dense(format, lambda parts: None, monkeypatch)
    x, bias = torch.randn(2, 3, HIDDEN), torch.randn(sum(WIDTHS))
    wanted = torch.cat([quantized_gemm.dense(x.view(6, HIDDEN), weight) for weight in projections], 1).view(2, 3, -1)
    assert torch.equal(scheme.apply_weights(layer, x, None), wanted)
    assert torch.equal(scheme.apply_weights(layer, x, bias), wanted + bias)
    # vLLM compiles a model's layers in one graph, unless it is told otherwise.
    compiled = torch.compile(scheme.apply_weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(layer, x, bias), wanted + bias)


@pytest.mark.parametrize(
    ("format", "edit", "words"),
    [
        ("int4", lambda parts: parts["weight_scale"].fill_(float("nan")), "layer has a scale that is not finite"),
        ("int4", lambda parts: parts.pop("weight_scale"), "layer: a weight_scale of it is missing"),
        (
            "int4",
            lambda parts: parts.update(weight_scale=parts["weight_scale"].half()),
            "weight_scale is torch.float16",
        ),
        ("nvfp4", lambda parts: parts["weight_global_scale"].zero_(), "layer has a global scale of zero"),
        ("nvfp4", lambda parts: parts.pop("weight_packed"), "layer: a weight_packed of it is missing"),
    ],
)
def test_a_dense_layer_with_faults_is_refused(
    format: str, edit: Callable[[dict[str, Tensor]], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=words):
        loaded_dense(format, edit, monkeypatch)


def test_a_dense_layer_of_cut_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="layer: a rank has 48 columns of it, and 32 of them share a scale"):
        DGemmaLinearScheme(SCHEMES["int4"], "layer").create_weights(torch.nn.Module(), [32], 48, torch.float32, print)


def test_dense_layers_that_vllm_multiplies_stay_its_own() -> None:
    for format, dtype, ours in (
        ("nvfp4", torch.bfloat16, True),
        ("int4", torch.float32, True),
        ("int4", torch.bfloat16, False),
        ("fp8", torch.float32, False),
        ("int8", torch.float32, False),
    ):
        assert lacks_a_kernel(SCHEMES[format], dtype) is ours
