"""Weights on a device and the passes over them; nothing of requests.

`network` is the class that the engine is built on. `forward` is the one pass, over rows that `rows` describes;
`layers` and `matmul` are its parts, `cache` what it reads and appends to, `weights` and `placement` how it came here.
"""

from __future__ import annotations

from dgemma_ext.model.cache import Cache, Snapshot
from dgemma_ext.model.layers import RotaryTables
from dgemma_ext.model.matmul import MatmulMode
from dgemma_ext.model.network import ENCODE_CHUNK, Network
from dgemma_ext.model.placement import (
    check_activations,
    resolve_activations,
    resolve_device,
    resolve_dtype,
    resolve_matmul,
)
from dgemma_ext.model.rows import MAX_PREFILL_TOKENS, Canvases, PrefillChunk
from dgemma_ext.model.weights import LayerWeights, ModelWeights, load_weights, quantized_weight

__all__ = [
    "ENCODE_CHUNK",
    "MAX_PREFILL_TOKENS",
    "Cache",
    "Canvases",
    "LayerWeights",
    "MatmulMode",
    "ModelWeights",
    "Network",
    "PrefillChunk",
    "RotaryTables",
    "Snapshot",
    "check_activations",
    "load_weights",
    "quantized_weight",
    "resolve_activations",
    "resolve_device",
    "resolve_dtype",
    "resolve_matmul",
]
