"""DiffusionGemma on one GPU or any CPU, with kernels written for it.

import dgemma_ext as dg

model = dg.DiffusionGemma.from_pretrained("google/diffusiongemma-26B-A4B-it")
print(model.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

import dgemma_ext.heap
import dgemma_ext.openmp  # noqa: F401  It stands first: it acts before torch is loaded.
from dgemma_ext.checkpoint import (
    Adapter,
    GenerationDefaults,
    InvalidToolCall,
    ModelConfig,
    Response,
    Tokenizer,
    ToolCall,
)
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine import (
    Chat,
    Commit,
    Decision,
    Draft,
    Event,
    Failure,
    MemoryPlan,
    NotEnoughMemory,
    Output,
    PromptOptions,
    Request,
    RequestState,
    Scheduler,
)
from dgemma_ext.errors import CheckpointError, GrammarError, NonFiniteError
from dgemma_ext.integrations import accelerate
from dgemma_ext.model import Cache, LoadedAdapter, Snapshot
from dgemma_ext.sampling import (
    Canvas,
    Choice,
    CompiledGrammar,
    Grammar,
    JsonSchema,
    Regex,
    SamplerConfig,
    TokenLogprobs,
    ToolCalls,
)
from dgemma_ext.version import __version__

__all__ = [
    "Adapter",
    "Cache",
    "Canvas",
    "Chat",
    "CheckpointError",
    "Choice",
    "Commit",
    "CompiledGrammar",
    "Decision",
    "DiffusionGemma",
    "Draft",
    "Event",
    "Failure",
    "GenerationDefaults",
    "Grammar",
    "GrammarError",
    "InvalidToolCall",
    "JsonSchema",
    "LoadedAdapter",
    "MemoryPlan",
    "ModelConfig",
    "NonFiniteError",
    "NotEnoughMemory",
    "Output",
    "PromptOptions",
    "Regex",
    "Request",
    "RequestState",
    "Response",
    "SamplerConfig",
    "Scheduler",
    "Snapshot",
    "TokenLogprobs",
    "Tokenizer",
    "ToolCall",
    "ToolCalls",
    "__version__",
    "accelerate",
]
