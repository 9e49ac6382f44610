"""Runs requests: scheduling, batching, and driving the device.

`prompt` makes tokens and images of a prompt; `scheduler` admits requests and turns steps into events; `prefill` brings
what a canvas sees into its slot, and `prefix_cache` keeps what later requests continue from; `group` keeps the rows of
requests that are stepped together; `runner` and `cuda_graphs` run the steps, and `loop` drives the steps of a whole
canvas; `memory` counts the memory of all this. `generation`, `chat` and `decision` are built on the
scheduler.
"""

from __future__ import annotations

from dgemma_ext.engine.chat import Chat
from dgemma_ext.engine.decision import Choices, Decision, decide, decision_canvas, end_of_turn, ids_read, label_ids
from dgemma_ext.engine.events import Commit, Draft, Event, Failure
from dgemma_ext.engine.generation import Generation
from dgemma_ext.engine.memory import (
    USUAL_CONTEXT,
    MemoryPlan,
    NotEnoughMemory,
    adapter_bytes,
    available_bytes,
    batch_plan,
    check_adapter_memory,
    check_memory,
    mapped_bytes,
    memory_plan,
    plan_row,
)
from dgemma_ext.engine.output import Output
from dgemma_ext.engine.prefix_cache import USUAL_SNAPSHOTS, PrefixCache
from dgemma_ext.engine.prompt import Prompt, PromptOptions, TokenizedPrompt, tokenize_prompt
from dgemma_ext.engine.request import Request, RequestState
from dgemma_ext.engine.scheduler import Scheduler
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.engine.training_memory import TrainingSizes
