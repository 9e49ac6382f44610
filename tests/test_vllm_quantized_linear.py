"""Dense layers of quantized checkpoints that this package multiplies inside vLLM; in vLLM's environment, without an
engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm has an environment with vLLM")

from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from dgemma_ext.checkpoint import parse_target
from dgemma_ext.checkpoint.quantize import stored_parts
from dgemma_ext.integrations.vllm.quantized_linear import DGemmaLinearScheme, Stored, lacks_a_kernel
from dgemma_ext.ops import quantized_gemm
from dgemma_ext.ops.formats import QuantizedWeight
from vllm_layers import HIDDEN, SCHEMES

WIDTHS = [48, 32, 32]  # as those of queries, keys and values, the first no multiple of the others


def projections_of(format: str, seed: int = 3) -> list[QuantizedWeight]:
    """Of queries, keys and values."""
    torch.manual_seed(seed)
    matrices = [(number + seed) * torch.randn(width, HIDDEN) for number, width in enumerate(WIDTHS)]
    return [parse_target(SCHEMES[format].format).quantize([matrix])[0].weight for matrix in matrices]


def stored(format: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A projection as a checkpoint has it."""
    parts = stored_parts(weight)
    if format == "package nvfp4-modelopt":
        scale = parts.pop("weight_global_scale").reciprocal()[0]
        return {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"], "weight_scale_2": scale}
    return parts


def dense_layer(format: str, monkeypatch: pytest.MonkeyPatch) -> tuple[DGemmaLinearScheme, Any]:
    """A scheme with its layer, of which nothing is loaded."""
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    scheme = DGemmaLinearScheme(SCHEMES[format], "layer")
    layer: Any = torch.nn.Module()
    layer.quant_method = CompressedTensorsLinearMethod(None)
    layer.scheme = scheme

    def load(param: Any, loaded_weight: Tensor, shard: str) -> None:
        at = sum(WIDTHS[: "qkv".index(shard)])
        param.load_qkv_weight(
            loaded_weight, shard_id=shard, shard_offset=at, shard_size=WIDTHS["qkv".index(shard)], num_heads=1
        )

    scheme.create_weights(layer, WIDTHS, HIDDEN, HIDDEN, sum(WIDTHS), torch.float32, load)
    return scheme, layer


def load_dense(
    format: str, layer: Any, projections: list[QuantizedWeight], edit: Callable[[dict[str, Tensor]], None]
) -> None:
    """As vLLM does it, with an edit of the last projection's tensors."""
    for shard, weight in zip("qkv", projections, strict=True):
        parts = stored(format, weight)
        if shard == "v":
            edit(parts)
        for suffix, tensor in parts.items():
            parameter: Any = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensor, shard)


def loaded_dense(
    format: str, edit: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """A scheme with its layer, and the projections that were loaded."""
    scheme, layer = dense_layer(format, monkeypatch)
    projections = projections_of(format)
    load_dense(format, layer, projections, edit)
    scheme.process_weights_after_loading(layer)
    return (scheme, layer), projections


def nothing(parts: dict[str, Tensor]) -> None:
    """An edit that changes nothing."""


def twice(suffix: str, dim: int) -> Callable[[dict[str, Tensor]], None]:
    """An edit that doubles a tensor's rows or columns."""
    return lambda parts: parts.update({suffix: torch.cat([parts[suffix], parts[suffix]], dim)})


FORMATS = ["int4", "nvfp4", "package nvfp4-modelopt"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_dense_layer_is_the_product_of_its_projections(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own scales, by rows of different numbers."""
    (scheme, layer), projections = loaded_dense(format, nothing, monkeypatch)
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
        ("int4", twice("weight_packed", 0), r"weight_packed \(v\) is \[64, 8\]; .* asks for \[32, 8\]"),
        ("int4", twice("weight_scale", 1), r"weight_scale \(v\) is \[32, 4\]; .* asks for \[32, 2\]"),
        ("nvfp4", twice("weight_scale", 0), r"weight_scale \(v\) is \[64, 4\]; .* asks for \[32, 4\]"),
        ("nvfp4", twice("weight_global_scale", 0), r"global_scale \(v\) is \[2\]; .* asks for \[\] or \[1\]"),
        ("nvfp4", lambda parts: parts["weight_global_scale"].zero_(), "layer has a global scale of zero"),
        ("nvfp4", lambda parts: parts.pop("weight_packed"), "layer: a weight_packed of it is missing"),
    ],
)
def test_a_dense_layer_with_faults_is_refused(
    format: str, edit: Callable[[dict[str, Tensor]], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=words):
        loaded_dense(format, edit, monkeypatch)


@pytest.mark.parametrize("format", FORMATS)
def test_a_dense_layer_that_the_checkpoint_leaves_out_is_refused(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks of no quantized checkpoint whether all of it was there; made-up weights go through."""
    scheme, layer = dense_layer(format, monkeypatch)
    with pytest.raises(ValueError, match="layer: the checkpoint has no quantized weight of it"):
        scheme.process_weights_after_loading(layer)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("format", FORMATS)
def test_a_dense_layer_is_loaded_anew(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's way of loading weights while it runs, into the tensors that a captured graph reads."""
    scheme, layer = dense_layer(format, monkeypatch)
    record_metadata_for_reloading(layer)
    load_dense(format, layer, projections_of(format), nothing)
    scheme.process_weights_after_loading(layer)
    addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    projections, x = projections_of(format, seed=5), torch.randn(6, HIDDEN)
    initialize_layerwise_reload(layer)
    load_dense(format, layer, projections, nothing)
    finalize_layerwise_reload(layer, None)
    wanted = torch.cat([quantized_gemm.dense(x, weight) for weight in projections], 1)
    assert torch.equal(scheme.apply_weights(layer, x, None), wanted)
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses
    initialize_layerwise_reload(layer)
    load_dense(format, layer, projections, lambda parts: parts.pop("weight_scale"))
    with pytest.raises(ValueError, match="layer: a weight_scale of it is missing"):
        finalize_layerwise_reload(layer, None)


@pytest.mark.parametrize(("shard", "rows"), [("q", 64), ("k", 16), ("v", 16), (None, 128)])
def test_rows_of_a_stored_projection(shard: str | None, rows: int) -> None:
    """Of two ranks with all heads of keys and values each."""
    assert Stored([32, 16, 16], ranks=2, replicas=2, columns=64).rows((shard,)) == rows
    assert Stored([32, 16, 16], ranks=2, replicas=2, columns=64).rows(()) == 128


def test_a_dense_layer_of_cut_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="layer: a rank has 48 columns of it, and 32 of them share a scale"):
        DGemmaLinearScheme(SCHEMES["int4"], "layer").create_weights(
            torch.nn.Module(), [32], 48, 48, 32, torch.float32, print
        )


def test_dense_layers_that_vllm_multiplies_stay_its_own() -> None:
    for format, dtype, ours in (
        ("nvfp4", torch.bfloat16, True),
        ("int4", torch.float32, True),
        ("int4", torch.bfloat16, False),
        ("fp8", torch.float32, False),
        ("int8", torch.float32, False),
    ):
        assert lacks_a_kernel(SCHEMES[format], dtype) is ours
