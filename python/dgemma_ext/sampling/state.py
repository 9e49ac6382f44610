"""Canvases under work: what a denoising step reads and writes, made once for a batch of requests.

A request has a row. Rows in use come first, so that a step may run over the first rows alone; rows of which nobody is
active are neither read nor written by an operator. Whatever differs from request to request or from step to step is a
tensor on the device, so that a step of the batch has the same arguments every time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.model import Canvases, Network, RotaryTables
from dgemma_ext.model.layers import rotary_kinds
from dgemma_ext.ops.denoise import VocabularyStatistics, soft_embedding_workspace
from dgemma_ext.ops.vocabulary_head import statistics_layout

# Fields of StepOutput with their dtypes, and whether there is a value for every position. They lie in one buffer, so
# that one device-to-host copy returns a step's outputs; the widest come first, so that each is aligned.
_OUTPUT = {
    "status": (torch.int32, False),
    "step": (torch.int32, False),
    "mean_entropy": (torch.float32, False),
    "draft": (torch.int32, True),
    "entropy": (torch.float32, True),
    "accepted": (torch.bool, True),
}
# The other fields of CanvasState that have a value for each request or position; only the device reads them.
_DEVICE = {
    "canvas": (torch.int32, True),
    "pinned": (torch.bool, True),
    "allowed_row": (torch.int32, True),
    "seed": (torch.int64, False),
    "canvas_index": (torch.int32, False),
    "max_steps": (torch.int32, False),
    "t_min": (torch.float64, False),
    "t_max": (torch.float64, False),
    "entropy_bound": (torch.float32, False),
    "stability_threshold": (torch.int32, False),
    "confidence_threshold": (torch.float32, False),
    "temperature": (torch.float32, False),
    "active": (torch.bool, False),
    "stable_steps": (torch.int32, False),
}


@dataclass(frozen=True)
class StepOutput:
    """What the host reads of a step, B rows: views of one buffer of `nbytes_of(rows, length)` bytes."""

    status: Tensor  # int32 [B], ops.denoise.CanvasStatus
    step: Tensor  # int32 [B], the next to run; a failed step does not advance it
    mean_entropy: Tensor  # fp32 [B]
    draft: Tensor  # int32 [B, L]
    entropy: Tensor  # fp32 [B, L]
    accepted: Tensor  # bool [B, L]

    @classmethod
    def over(cls, buffer: Tensor, length: int) -> StepOutput:
        rows = buffer.numel() // cls.nbytes_of(1, length)
        parts, begin = {}, 0
        for name, (dtype, by_position) in _OUTPUT.items():
            shape = (rows, length) if by_position else (rows,)
            end = begin + dtype.itemsize * rows * (length if by_position else 1)
            parts[name] = buffer[begin:end].view(dtype).view(shape)
            begin = end
        return cls(**parts)

    @staticmethod
    def nbytes_of(rows: int, length: int) -> int:
        return rows * sum(dtype.itemsize * (length if by_position else 1) for dtype, by_position in _OUTPUT.values())


@dataclass(frozen=True)
class CanvasState:
    """What a step changes, and the settings by which it does, for B requests with canvases of L tokens."""

    canvas: Tensor  # int32 [B, L]
    draft: Tensor  # int32 [B, L], -1 before the first step
    accepted: Tensor  # bool [B, L]
    entropy: Tensor  # fp32 [B, L]
    pinned: Tensor  # bool [B, L]
    # int32 bit masks [B * L, ceil(vocabulary / 32)], all of the batch's: L for each row, which no view cuts off.
    allowed: Tensor
    allowed_row: Tensor  # int32 [B, L]: the mask of each position, -1 where all tokens are allowed
    seed: Tensor  # int64 [B]
    canvas_index: Tensor  # int32 [B]
    step: Tensor  # int32 [B]
    max_steps: Tensor  # int32 [B]
    t_min: Tensor  # fp64 [B]
    t_max: Tensor  # fp64 [B]
    entropy_bound: Tensor  # fp32 [B]
    stability_threshold: Tensor  # int32 [B]
    confidence_threshold: Tensor  # fp32 [B]
    temperature: Tensor  # fp32 [B]
    active: Tensor  # bool [B]
    stable_steps: Tensor  # int32 [B]
    mean_entropy: Tensor  # fp32 [B]
    status: Tensor  # int32 [B], ops.denoise.CanvasStatus
    soft_embedding: Tensor  # [B, L, hidden]; zeros before the first step

    @property
    def length(self) -> int:
        return self.canvas.shape[1]

    def rows_between(self, begin: int, end: int) -> CanvasState:
        """Views of some rows; the masks stay whole."""
        return replace(self, **{name: tensor[begin:end] for name, tensor in vars(self).items() if name != "allowed"})


@dataclass(frozen=True)
class CanvasBatch:
    """The canvases of B requests and where they lie in the cache."""

    state: CanvasState
    slot: Tensor  # int32 [B], of the cache; -1 where no request is
    prefix_length: Tensor  # int32 [B]
    rotary: RotaryTables  # of every row's positions, [B * L, head_dim] each
    output: Tensor  # bytes of a StepOutput; the state's tensors of these names lie there

    @property
    def rows(self) -> int:
        return self.slot.shape[0]

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def nbytes(self) -> int:
        own = [getattr(self.state, name) for name in (*_DEVICE, "allowed", "soft_embedding")]
        tables = [table for kind in self.rotary.values() for table in kind]
        return sum(tensor.nbytes for tensor in (*own, *tables, self.slot, self.prefix_length, self.output))

    def rows_between(self, begin: int, end: int) -> CanvasBatch:
        """Views of some rows; `output` stays whole."""
        positions = slice(begin * self.length, end * self.length)
        return replace(
            self,
            state=self.state.rows_between(begin, end),
            slot=self.slot[begin:end],
            prefix_length=self.prefix_length[begin:end],
            rotary={kind: (cosine[positions], sine[positions]) for kind, (cosine, sine) in self.rotary.items()},
        )

    def place(self, row: int, slot: int, prefix_length: int, tables: RotaryTables) -> None:
        """Says where a row's canvas lies. tables: of its positions, [L, head_dim] each."""
        self.slot[row].fill_(slot)
        self.prefix_length[row].fill_(prefix_length)
        where = slice(row * self.length, (row + 1) * self.length)
        for kind, table in tables.items():
            for own, given in zip(self.rotary[kind], table, strict=True):
                own[where].copy_(given)

    def move(self, source: int, target: int, masks: int) -> None:
        """Puts the request of one row into another row. masks: how many of its masks it uses."""
        one, other = self.rows_between(source, source + 1), self.rows_between(target, target + 1)
        for name in (field.name for field in fields(CanvasState) if field.name not in ("allowed", "allowed_row")):
            getattr(other.state, name).copy_(getattr(one.state, name))
        self.place(target, 0, 0, one.rotary)
        other.slot.copy_(one.slot)
        other.prefix_length.copy_(one.prefix_length)
        # Every row has masks of its own, so their numbers change with the row.
        begin, moved = source * self.length, target * self.length
        self.state.allowed[moved : moved + masks].copy_(self.state.allowed[begin : begin + masks])
        of_source = one.state.allowed_row
        other.state.allowed_row.copy_(torch.where(of_source < 0, of_source, of_source + (moved - begin)))

    def clear(self, row: int) -> None:
        """Nobody has the row any more."""
        self.state.active[row].zero_()
        self.slot[row].fill_(-1)


@dataclass(frozen=True)
class StepBuffers:
    """What a step over B rows writes and nothing after it reads: one set serves all rows that are stepped by turns."""

    logits: Tensor  # raw, [B, L, vocabulary]
    statistics: tuple[Tensor, ...]  # VocabularyStatistics without the entropy, which is the state's
    sampled: Tensor  # int32 [B, L]
    temperature: Tensor  # fp32 [B], the step's own; the state's is the next one's
    attention_out: dict[int, Tensor]  # by head dimension: [B, L, heads, head_dim]
    workspace: Tensor  # bytes, of the soft embedding

    @property
    def rows(self) -> int:
        return self.logits.shape[0]

    @property
    def nbytes(self) -> int:
        own = (self.logits, self.sampled, self.temperature, self.workspace)
        return sum(tensor.nbytes for tensor in (*own, *self.statistics, *self.attention_out.values()))

    def first(self, rows: int) -> StepBuffers:
        """Views of the first rows."""
        return replace(
            self,
            logits=self.logits[:rows],
            statistics=tuple(tensor[:rows] for tensor in self.statistics),
            sampled=self.sampled[:rows],
            temperature=self.temperature[:rows],
            attention_out={head_dim: tensor[:rows] for head_dim, tensor in self.attention_out.items()},
        )

    def statistics_of(self, state: CanvasState) -> VocabularyStatistics:
        """Where the statistics of a step of `state` are written."""
        argmax, *softmax = self.statistics
        return VocabularyStatistics(argmax, state.entropy, *softmax)


def canvases_of(batch: CanvasBatch, buffers: StepBuffers, self_conditioned: bool) -> Canvases:
    """The rows of the batch as the forward pass takes them. Requests that are not active are skipped."""
    state = batch.state
    return Canvases(
        ids=state.canvas,
        slot=batch.slot.masked_fill(state.active.logical_not(), -1),
        prefix_length=batch.prefix_length,
        rotary=batch.rotary,
        soft_embedding=state.soft_embedding if self_conditioned else None,
        attention_out=buffers.attention_out,
    )


def make_canvas_batch(
    network: Network, rows: int, length: int, device: torch.device | str | None = None
) -> CanvasBatch:
    """Room for `rows` requests, none of them there. device: "meta" to count the bytes."""
    config, dtype = network.config, network.dtype
    device = network.device if device is None else torch.device(device)
    output = torch.zeros(StepOutput.nbytes_of(rows, length), dtype=torch.uint8, device=device)
    parts: dict[str, Any] = dict(vars(StepOutput.over(output, length)))
    for name, (of, by_position) in _DEVICE.items():
        parts[name] = torch.zeros((rows, length) if by_position else (rows,), dtype=of, device=device)
    words = -(-config.vocab_size // 32)
    # Zeros where values would be read that nobody has written yet: of rows without a request, which must stay finite.
    parts["soft_embedding"] = torch.zeros(rows, length, config.hidden_size, dtype=dtype, device=device)
    # Not touched before a request brings rules: pages that are never written cost the CPU no memory.
    parts["allowed"] = torch.empty(rows * length, words, dtype=torch.int32, device=device)
    parts["allowed_row"].fill_(-1)
    return CanvasBatch(
        state=CanvasState(**parts),
        slot=torch.full((rows,), -1, dtype=torch.int32, device=device),
        prefix_length=torch.zeros(rows, dtype=torch.int32, device=device),
        rotary={
            kind: (
                torch.zeros(rows * length, kind[1], dtype=dtype, device=device),
                torch.zeros(rows * length, kind[1], dtype=dtype, device=device),
            )
            for kind in rotary_kinds(config)
        },
        output=output,
    )


def make_step_buffers(
    network: Network, rows: int, length: int, device: torch.device | str | None = None
) -> StepBuffers:
    """Buffers for a step over `rows` requests. device: "meta" to count the bytes."""
    config, dtype = network.config, network.dtype
    device = network.device if device is None else torch.device(device)
    entropy = VocabularyStatistics._fields.index("entropy")
    layout = statistics_layout(rows, length, config.vocab_size)
    return StepBuffers(
        logits=torch.empty(rows, length, config.vocab_size, dtype=dtype, device=device),
        statistics=tuple(
            torch.zeros(shape, dtype=of, device=device) for index, (shape, of) in enumerate(layout) if index != entropy
        ),
        sampled=torch.zeros(rows, length, dtype=torch.int32, device=device),
        temperature=torch.ones(rows, device=device),
        attention_out={
            head_dim: torch.zeros(rows, length, config.num_attention_heads, head_dim, dtype=dtype, device=device)
            for head_dim in {layer.head_dim for layer in config.layers}
        },
        workspace=torch.empty(
            soft_embedding_workspace(rows, length, config.vocab_size, config.hidden_size, network.device),
            dtype=torch.uint8,
            device=device,
        ),
    )
