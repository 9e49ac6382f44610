"""Weights on a device and the passes over them, independent of requests.

`network` is the class that the engine is built on. `forward` is the one pass, over rows that `rows` describes;
`layers` and `matmul` are its parts, with adapters (`loaded_adapter`, `adapter_set`, `adapter_table`) beside the weights
(`low_rank`, `adapted_experts`), `cache` holds the keys and values that it reads and appends, `weights` loads a
model, `placement` resolves the options of where and how it runs, and `calibration` watches what goes into the products.
"""

from __future__ import annotations

from dgemma_ext.model.adapter_set import BASE, DEFAULT, AdapterSet
from dgemma_ext.model.adapter_table import AdapterTable, CanvasAdapters
from dgemma_ext.model.cache import Cache, Snapshot
from dgemma_ext.model.calibration import second_moments
from dgemma_ext.model.layers import RotaryTables
from dgemma_ext.model.loaded_adapter import LoadedAdapter
from dgemma_ext.model.matmul import MatmulMode
from dgemma_ext.model.network import ENCODE_CHUNK, IMAGE_ATTENTION, AdapterName, Network
from dgemma_ext.model.placement import (
    check_activations,
    resolve_activations,
    resolve_device,
    resolve_dtype,
    resolve_matmul,
)
from dgemma_ext.model.rows import MAX_PREFILL_TOKENS, Canvases, PrefillChunk
from dgemma_ext.model.weights import NEVER_QUANTIZED, LayerWeights, ModelWeights, load_weights, quantized_weight
