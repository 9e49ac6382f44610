"""The model interface that the engine needs."""

from __future__ import annotations

from typing import Protocol

from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.model import Network
from dgemma_ext.model.vision import Vision


class ServedModel(Protocol):
    """A network with its checkpoint's tokenizer, sampler defaults and vision tower; `vision` is None without one."""

    network: Network
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults
    vision: Vision | None
