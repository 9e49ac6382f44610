"""DiffusionGemma on one GPU or any CPU, with kernels written for it.

import dgemma_ext as dg

model = dg.DiffusionGemma.from_pretrained("google/diffusiongemma-26B-A4B-it")
print(model.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

from dgemma_ext.checkpoint.config import GenerationDefaults, ModelConfig
from dgemma_ext.checkpoint.tokenizer import Tokenizer
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.engine.chat import Chat
from dgemma_ext.engine.events import Commit, Draft, Event, Failure, Output
from dgemma_ext.engine.memory import MemoryPlan, NotEnoughMemory
from dgemma_ext.engine.request import Request, RequestState
from dgemma_ext.engine.scheduler import Scheduler
from dgemma_ext.errors import CheckpointError, NonFiniteError
from dgemma_ext.integrations import accelerate
from dgemma_ext.model.cache import Cache, Snapshot, SnapshotStore
from dgemma_ext.sampling.sampler import Canvas, SamplerConfig

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Canvas",
    "Chat",
    "CheckpointError",
    "Commit",
    "DiffusionGemma",
    "Draft",
    "Event",
    "Failure",
    "GenerationDefaults",
    "MemoryPlan",
    "ModelConfig",
    "NonFiniteError",
    "NotEnoughMemory",
    "Output",
    "Request",
    "RequestState",
    "SamplerConfig",
    "Scheduler",
    "Snapshot",
    "SnapshotStore",
    "Tokenizer",
    "__version__",
    "accelerate",
]
