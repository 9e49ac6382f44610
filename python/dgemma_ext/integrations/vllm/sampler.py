"""A step of all canvases together, in place of vLLM's sampler: from hidden states to the next canvases.

vLLM calls the sampler after each forward pass with the rows of all requests. A request is in one of three phases: its
prompt is read, its canvas is denoised, or its finished canvas is encoded (vLLM's "encoder phase"); the last two are
told apart on the device alone. What the host knows - the slots, how many rows each has - comes as arrays of numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models import diffusion_gemma as theirs
from vllm.utils.torch_utils import async_tensor_h2d

from dgemma_ext.integrations.vllm.contents import Window
from dgemma_ext.integrations.vllm.requests import Requests
from dgemma_ext.integrations.vllm.slots import Rows
from dgemma_ext.integrations.vllm.vocabulary import AllowedOfShard, Buffers, Vocabulary, advance
from dgemma_ext.ops.denoise import CanvasStatus
from dgemma_ext.sampling.constraint import ConstraintRows, Constraints

# Logits of a step that are kept at a time: 8 canvases of the published model in bf16. A step with more goes in parts.
_LOGITS_BYTES = 1 << 30

Array = np.ndarray[Any, Any]


class Sampler(theirs.DiffusionSampler):  # type: ignore[misc]
    """made: the sampler that vLLM made, whose bookkeeping of requests stays."""

    def __init__(self, requests: Requests, made: Any, vocabulary: Vocabulary) -> None:
        self.__dict__.update(vars(made))
        self._requests, self._vocabulary = requests, vocabulary
        count, length = requests.count, requests.limits.canvas_length
        rows = max(1, min(count, _LOGITS_BYTES // Buffers.bytes_of_a_row(vocabulary, length)))
        self._buffers = Buffers(vocabulary, rows, length)
        self._constraints = Constraints(count, vocabulary.embedding.device)
        self._allowed_of_shard = AllowedOfShard(vocabulary)
        ends = requests.limits.defaults.eos_token_ids
        self._end = ends[0] if ends else 0

    def __call__(self, logits: Tensor, input_batch: Any, draft_logits: Tensor | None = None) -> Any:
        """logits: the normalized hidden states of the rows, [rows, hidden] (DiffusionGemma.compute_logits)."""
        hidden, count = logits, input_batch.num_reqs
        if input_batch.num_draft_tokens == 0:
            return self._handle_prefill(input_batch, hidden.device)
        lengths = np.diff(input_batch.cu_num_logits_np[: count + 1])
        reading = np.where(lengths == 0)[0]
        if len(reading):
            self._finish_prefills(input_batch, reading)
        sampled, num_sampled = self._sampled[:count], self._num_sampled[:count]
        sampled.zero_()
        num_sampled.zero_()
        with_canvas = np.where(lengths > 0)[0]
        first = np.concatenate(([0], np.cumsum(lengths[with_canvas])))
        for begin in range(0, len(with_canvas), self._buffers.rows):
            part = with_canvas[begin : begin + self._buffers.rows]
            own = hidden[int(first[begin]) : int(first[begin + len(part)])]
            slots = input_batch.idx_mapping_np[part]
            self._step(own, part, slots, lengths[part], input_batch.seq_lens, sampled, num_sampled)
        return self._build_output(input_batch, sampled, num_sampled, lengths, hidden.device)

    def _step(
        self,
        hidden: Tensor,
        index: Array,
        slots: Array,
        lengths: Array,
        sequence_lengths: Tensor,
        sampled: Tensor,
        num_sampled: Tensor,
    ) -> None:
        """Advances some requests. hidden: their rows one after the other. index: where they are in the batch; lengths:
        how many positions each canvas has here, at most L; sequence_lengths: of the batch's requests with these rows.

        A canvas at the end of the context is cut to what fits. One with fewer positions because the step has no more
        tokens for it is left as it is, and vLLM schedules it again.
        """
        requests, states, device = self._requests, self.diffusion_states, hidden.device
        at = async_tensor_h2d(slots.astype(np.int64), device=device)
        where = async_tensor_h2d(index.astype(np.int64), device=device)
        valid = async_tensor_h2d(lengths.astype(np.int32), device=device)
        rows = requests.slots.gather(at)
        room = self.req_states.max_model_len - sequence_lengths.index_select(0, where) + valid
        is_whole, was_active = valid >= torch.minimum(rows.width, room), rows.active.clone()
        is_encoded = is_whole & ~was_active  # the pass has encoded the finished canvas: it is handed out
        rows.active.logical_and_(is_whole)
        draft = torch.where(is_encoded[:, None], rows.draft, 0)
        window = self._window(slots, at, rows)
        positions = torch.arange(requests.limits.canvas_length, device=device)
        # Positions that a canvas has not are held like pinned ones, which no statistic counts.
        pinned = positions >= torch.minimum(valid, rows.width)[:, None]
        if window is not None:
            pinned = pinned | window.pinned
        soft = states.self_conditioning_embeds.index_select(0, at)
        self._advance(_canvases(hidden, lengths, rows.canvas.shape[1]), slots, at, rows, pinned, window, soft)
        is_over = is_whole & was_active & ~rows.active
        failed = is_over & (rows.status == CanvasStatus.NON_FINITE)
        rows.draft.copy_(torch.where(failed[:, None], self._end, rows.draft))
        soft.masked_fill_((is_whole & ~rows.active)[:, None, None], 0.0)
        rows.canvas.copy_(torch.where(is_over[:, None], rows.draft, rows.canvas))
        self._begin_next(slots, at, rows, is_encoded, draft)
        rows.active.copy_(torch.where(is_whole, rows.active, was_active))
        requests.slots.scatter(at, rows)
        states.is_encoder_phase.index_copy_(0, at, ~rows.active)
        states.self_conditioning_embeds.index_copy_(0, at, soft)
        self._show(at, rows.canvas)
        sampled.index_copy_(0, where, draft)
        num_sampled.index_copy_(0, where, torch.where(is_encoded, valid, 0))

    def _advance(
        self,
        hidden: Tensor,
        slots: Array,
        at: Tensor,
        rows: Rows,
        pinned: Tensor,
        window: Window | None,
        soft: Tensor,
    ) -> None:
        contents, allowed, nonempty = self._requests.contents, None, None
        if window is not None and contents.rules(slots.tolist()):
            masks = contents.allowed
            if self._vocabulary.ranks is not None:
                masks, nonempty = self._allowed_of_shard(masks, contents.version)
            allowed = (masks, window.allowed_row)
        constraints = self._constraints_of(slots, at)
        advance(self._vocabulary, self._buffers, hidden, rows, pinned, soft, allowed, nonempty, constraints)

    def _begin_next(self, slots: Array, at: Tensor, rows: Rows, where: Tensor, finished: Tensor) -> None:
        """Begins the next canvas of the rows whose canvas is handed out."""
        rows.canvas_index.add_(where)
        self._follow_grammars(slots, where, finished, rows)
        self._requests.slots.begin(rows, where, self._window(slots, at, rows))

    def _window(self, slots: Array, at: Tensor, rows: Rows) -> Window | None:
        contents = self._requests.contents
        if not contents.any_of(slots.tolist()):
            return None
        return contents.window(at, rows.canvas_index, rows.width)

    def _show(self, at: Tensor, canvas: Tensor) -> None:
        """Gives vLLM the canvases that its next pass reads."""
        tokens = canvas.to(torch.int64)
        self.diffusion_states.canvas.index_copy_(0, at, tokens)
        self.req_states.draft_tokens[:, : tokens.shape[1]].index_copy_(
            0, at, tokens.to(self.req_states.draft_tokens.dtype)
        )

    def _finish_prefills(self, input_batch: Any, prefill_indices_np: Array) -> None:
        """Begins the first canvas of the requests whose prompt is read."""
        read = (
            input_batch.num_computed_prefill_tokens_np[prefill_indices_np]
            + input_batch.num_scheduled_tokens[prefill_indices_np]
        )
        done = prefill_indices_np[read >= input_batch.prefill_len_np[prefill_indices_np]]
        slots = input_batch.idx_mapping_np[done]
        if not len(slots):
            return
        requests, states = self._requests, self.diffusion_states
        at = async_tensor_h2d(slots.astype(np.int64), device=states.device)
        rows = requests.slots.gather(at)
        requests.slots.begin(rows, torch.ones_like(rows.active), self._window(slots, at, rows))
        requests.slots.scatter(at, rows)
        states.is_encoder_phase.index_fill_(0, at, False)
        self._show(at, rows.canvas)
        for row, slot in enumerate(slots.tolist()):
            self._constraints.clear(slot)
            if requests.has_grammar(slot):
                self._hold(slot, rows, row)

    # Grammars ---------------------------------------------------------------------------------------------------------

    def _constraints_of(self, slots: Array, at: Tensor) -> ConstraintRows | None:
        if not any(map(self._requests.has_grammar, slots.tolist())):
            return None
        self._constraints.update()
        every = self._constraints.rows_between(0, self._requests.count)
        return every._replace(
            descriptor=every.descriptor.index_select(0, at),
            state=every.state.index_select(0, at),
            tokens_left=every.tokens_left.index_select(0, at),
        )

    def _follow_grammars(self, slots: Array, where: Tensor, finished: Tensor, rows: Rows) -> None:
        """Walks finished canvases through their grammars on the host. Such steps alone wait for the device."""
        held = [(row, slot) for row, slot in enumerate(slots.tolist()) if self._requests.has_grammar(slot)]
        if not held:
            return
        handed_out = where.tolist()
        for row, slot in held:
            if handed_out[row]:
                width = int(rows.width[row])
                self._requests.follow(slot, finished[row, :width].tolist())
                self._hold(slot, rows, row)

    def _hold(self, slot: int, rows: Rows, row: int) -> None:
        """Holds a slot's next canvas to its grammar."""
        constraint = self._requests.constraint(slot, int(rows.canvas_index[row]), int(rows.width[row]))
        self._constraints.place(slot, constraint)


def _canvases(hidden: Tensor, lengths: Array, length: int) -> Tensor:
    """Rows one after the other as [n, L, hidden], with zeros where a canvas is shorter."""
    if bool((lengths == length).all()):
        return hidden.view(len(lengths), length, -1).contiguous()
    padded = hidden.new_zeros(len(lengths) * length, hidden.shape[1])
    at = np.concatenate([row * length + np.arange(count) for row, count in enumerate(lengths)])
    padded.index_copy_(0, async_tensor_h2d(at.astype(np.int64), device=hidden.device), hidden)
    return padded.view(len(lengths), length, -1)
