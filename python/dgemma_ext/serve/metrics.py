"""What Prometheus reads: counts of tokens, steps and requests, and how long they take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dgemma_ext.engine import Commit

if TYPE_CHECKING:
    from dgemma_ext.serve.answer import Answer
    from dgemma_ext.serve.engine_thread import EngineThread
    from dgemma_ext.serve.job_runner import Job

# Seconds, from a step of a small model to a long answer on a CPU.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The server's metrics, in a registry of its own: a process may have several servers."""

    def __init__(self, engine: EngineThread) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "dgemma_http_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._answers = Counter("dgemma_answers", "Finished answers by reason.", ["reason"], registry=registry)
        self._prompt_tokens = Counter("dgemma_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter(
            "dgemma_prompt_tokens_cached", "Tokens of prompts that the prefix cache had.", registry=registry
        )
        self._completion_tokens = Counter("dgemma_completion_tokens", "Tokens of answers.", registry=registry)
        self._steps = Counter("dgemma_denoising_steps", "Denoising steps.", registry=registry)
        self._canvases = Counter("dgemma_canvases", "Finished canvases.", registry=registry)
        self._seconds = Histogram("dgemma_answer_seconds", "Answers.", buckets=_SECONDS, registry=registry)
        self._first_draft = Histogram(
            "dgemma_first_draft_seconds", "Until the first draft, where drafts are sent.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._first_canvas = Histogram(
            "dgemma_first_canvas_seconds", "Until the first finished canvas.", buckets=_SECONDS, registry=registry
        )
        running = Gauge("dgemma_requests_running", "Requests that have a slot.", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("dgemma_requests_waiting", "Requests that wait for a slot.", registry=registry)
        waiting.set_function(lambda: engine.waiting)

    def note_request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def note_prompt(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def note_first_draft(self, job: Job) -> None:
        if not job.has_first_draft:
            job.has_first_draft = True
            self._first_draft.observe(time.monotonic() - job.began)

    def note_commit(self, job: Job, commit: Commit) -> None:
        self._completion_tokens.inc(len(commit.token_ids))
        self._steps.inc(commit.denoising_steps)
        self._canvases.inc()
        if commit.canvas_index == 0:
            self._cached_tokens.inc(commit.request.cached_tokens)
            self._first_canvas.observe(time.monotonic() - job.began)

    def note_answer(self, answer: Answer, seconds: float) -> None:
        self._answers.labels(answer.finish_reason or "none").inc()
        self._seconds.observe(seconds)
