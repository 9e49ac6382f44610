"""Sampling of canvases: settings, initial tokens, state, and the one denoising step.

`settings` and `canvas` are the caller's options; `state` holds the tensors of a batch of canvases; `step` begins a
canvas and advances the batch; `constraint` holds a step to a grammar, and `viable` tells what pins leave of one;
`logprobs` and `choices` read a finished canvas's log-probabilities and scores.
"""

from __future__ import annotations

from dgemma_ext.sampling.canvas import Canvas
from dgemma_ext.sampling.choices import Spellings, choice_scores, spellings_of
from dgemma_ext.sampling.constraint import Constraint, closing
from dgemma_ext.sampling.grammar import (
    CLOSE,
    FAILED,
    OPEN,
    THINK,
    Choice,
    CompiledGrammar,
    Grammar,
    JsonSchema,
    Regex,
    ToolCalls,
    Walks,
    compile_grammar,
    tokenizer_vocabulary,
)
from dgemma_ext.sampling.logprobs import MAX_LOGPROBS, Alternatives, TokenLogprobs, canvas_logprobs
from dgemma_ext.sampling.settings import ResolvedSampler, SamplerConfig, resolve_sampler
from dgemma_ext.sampling.state import (
    CanvasBatch,
    CanvasState,
    StepBuffers,
    StepOutput,
    make_canvas_batch,
    make_step_buffers,
)
from dgemma_ext.sampling.step import begin_canvas, denoising_step
from dgemma_ext.sampling.viable import AnswerShape, grammars_of_canvases
