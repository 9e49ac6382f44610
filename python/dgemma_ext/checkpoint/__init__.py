"""A checkpoint's folder on disk: configuration, weights and their formats, tokenizer, chat template.

`folder` finds the files, and `foreign` recognises what is no checkpoint; `gguf_folder` unpacks a file of llama.cpp's
(`gguf_file`, `gguf_fields`, `gguf_names`, `gguf_settings`, `gguf_tokenizer`). `config`, `generation_defaults` and
`tokenizer` read the small files; `files` compares the weights' `headers` with the configuration and finds how each
weight is stored (`stored`), tied ones once or more often (`tied`); `reading` reads the values; `quantization` describes
a format to quantize to, and `quantize` writes a checkpoint in it, first into a `partial_folder`.

`adapter` reads an adapter: its settings (`adapter_settings`), which weights its tensors belong to (`adapter_names`),
and those of the experts (`adapter_experts`); `adapter_merge` adds one to weights.

`tokenizer` makes token ids of a chat (`messages`, `chat_template`, `special_tokens`), and takes answers apart
(`response`, `tool_call`).
"""

from __future__ import annotations

from dgemma_ext.checkpoint.adapter import Adapter, Factors, FactorsOf
from dgemma_ext.checkpoint.adapter_merge import Merge, quantized_already
from dgemma_ext.checkpoint.adapter_settings import AdapterSettings
from dgemma_ext.checkpoint.bundled import BUNDLED, DEMO
from dgemma_ext.checkpoint.chat_template import ChatTemplate
from dgemma_ext.checkpoint.config import FULL, SLIDING, LayerConfig, ModelConfig, RopeConfig
from dgemma_ext.checkpoint.device_reading import DeviceReader, weight_reader
from dgemma_ext.checkpoint.files import (
    CheckpointInfo,
    Layout,
    expected_tensors,
    inspect_checkpoint,
    layer_layout,
    model_layout,
)
from dgemma_ext.checkpoint.folder import resolve_checkpoint
from dgemma_ext.checkpoint.generation_defaults import GenerationDefaults, ignored_settings
from dgemma_ext.checkpoint.image_parts import IMAGE_TYPES, LOCAL_KEYS, image_source
from dgemma_ext.checkpoint.image_processor import read_soft_tokens
from dgemma_ext.checkpoint.messages import Message, checked_tools, images_of
from dgemma_ext.checkpoint.partial_folder import check_destination
from dgemma_ext.checkpoint.quantization import PARTS, Target, parse_target, resolve_weights
from dgemma_ext.checkpoint.quantize import PartError, convert, plan_conversion
from dgemma_ext.checkpoint.reading import LoadProgress, MappedFiles, Weight, WeightReader, stack_weights
from dgemma_ext.checkpoint.response import Response
from dgemma_ext.checkpoint.stored import Experts, Matrix, Stored, TensorInfo, names_of
from dgemma_ext.checkpoint.tied import check_copies
from dgemma_ext.checkpoint.tokenizer import TOKENIZER_FILE, Tokenizer
from dgemma_ext.checkpoint.tool_call import InvalidToolCall, ToolCall
