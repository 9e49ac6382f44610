"""A conversation: turns through the chat template, with the cache carried from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator

from dgemma_ext.engine.events import Commit, Draft, Failure
from dgemma_ext.engine.request import Request
from dgemma_ext.engine.scheduler import Scheduler
from dgemma_ext.engine.served import ServedModel
from dgemma_ext.engine.snapshots import SnapshotStore
from dgemma_ext.sampling import SamplerConfig

Message = dict[str, object]


class Chat:
    """Keeps the messages, and encodes only the part of each turn's prompt that is in no snapshot of earlier turns.

    A sliding layer's ring cannot be rewound and the template rewrites history (it drops earlier thoughts), so a turn
    continues from the longest snapshot that is a prefix of the new prompt, not from the end of the last answer.
    """

    def __init__(self, model: ServedModel, system: str | None = None, max_length: int | None = None) -> None:
        if model.tokenizer is None:
            raise ValueError("a chat needs a checkpoint with tokenizer.json")
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._snapshots = SnapshotStore()
        self._scheduler = Scheduler(model, max_batch=1, max_length=max_length, kept_snapshots=self._snapshots.limit)

    def send(
        self, text: str, max_new_tokens: int | None = None, sampler: SamplerConfig | None = None, seed: int = 0
    ) -> str:
        """Adds a user turn and returns the model's answer."""
        for _ in self.stream(text, max_new_tokens, sampler, seed):
            pass
        return str(self.messages[-1]["content"])

    def stream(
        self, text: str, max_new_tokens: int | None = None, sampler: SamplerConfig | None = None, seed: int = 0
    ) -> Iterator[Draft | Commit]:
        """`send` as a stream of events. A turn that is left early, or fails, does not become part of the chat."""
        turn: Message = {"role": "user", "content": text}
        request = self._scheduler.submit(
            [*self.messages, turn], max_new_tokens, sampler, seed, snapshots=self._snapshots
        )
        try:
            yield from self._events(request)
        finally:
            request.cancel()
        self.messages += [turn, {"role": "assistant", "content": request.output.text}]

    def _events(self, request: Request) -> Iterator[Draft | Commit]:
        while not request.done:
            for event in self._scheduler.step():
                if event.request is not request:
                    continue  # of a turn that was left early
                if isinstance(event, Failure):
                    raise event.error
                yield event
