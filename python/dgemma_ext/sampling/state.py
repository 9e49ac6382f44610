"""The tensors that a denoising step reads and writes, allocated once for a batch of requests.

Each request has a row. Rows in use come first, so that a step may run over the first rows only; operators neither read
nor write inactive rows. Values that differ by request or by step are tensors on the device, so that every step of the
batch has the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dgemma_ext.model import Canvases, MatmulMode, Network, RotaryTables
from dgemma_ext.model.layers import rotary_kinds
from dgemma_ext.ops.denoise import VocabularyStatistics, soft_embedding_workspace
from dgemma_ext.ops.vocabulary_head import statistics_layout
from dgemma_ext.sampling.adapter_rows import AdapterRows
from dgemma_ext.sampling.constraint import Constraints

# Fields of StepOutput with their dtypes, and whether they have a value for every position. They share one buffer, so
# that one device-to-host copy returns a step's outputs; the widest come first, so that each is aligned.
_OUTPUT = {
    "status": (torch.int32, False),
    "step": (torch.int32, False),
    "matches": (torch.int32, False),
    "mean_entropy": (torch.float32, False),
    "draft": (torch.int32, True),
    "entropy": (torch.float32, True),
    "accepted": (torch.bool, True),
}
# The other fields of CanvasState with a value for each request or position; only the device reads them.
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
    """The outputs of a step that the host reads, for B rows: views of one buffer of `nbytes_of(rows, length)` bytes."""

    status: Tensor  # int32 [B], ops.denoise.CanvasStatus
    step: Tensor  # int32 [B], the next step to run; a failed step does not advance it
    matches: Tensor  # int32 [B], 0 where no canvas matched the row's grammar in the last step, else 1
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
    """The state and settings of B requests with canvases of L tokens."""

    canvas: Tensor  # int32 [B, L]
    draft: Tensor  # int32 [B, L], -1 before the first step
    accepted: Tensor  # bool [B, L]
    entropy: Tensor  # fp32 [B, L]
    pinned: Tensor  # bool [B, L]
    # int32 bit masks [B * L, ceil(vocabulary / 32)], L for each row of the batch. Views of some rows keep all masks.
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
    matches: Tensor  # int32 [B], as in StepOutput
    soft_embedding: Tensor  # [B, L, hidden]; zeros before the first step

    @property
    def length(self) -> int:
        return self.canvas.shape[1]

    def rows_between(self, begin: int, end: int) -> CanvasState:
        """Views of some rows, with all masks."""
        return replace(self, **{name: tensor[begin:end] for name, tensor in vars(self).items() if name != "allowed"})


@dataclass(frozen=True)
class CanvasBatch:
    """The canvases of B requests and their places in the cache."""

    state: CanvasState
    slot: Tensor  # int32 [B], the slot in the cache; -1 for a row without a request
    prefix_length: Tensor  # int32 [B]
    rotary: RotaryTables  # of every row's positions, [B * L, head_dim] each
    output: Tensor  # the buffer of a StepOutput; the state's tensors of these names are views of it
    constraints: Constraints  # of the rows of the whole batch, also in views of some rows
    adapters: AdapterRows  # the same
    first_row: int = 0  # of the whole batch

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
        """Views of some rows, with the whole `output`."""
        positions = slice(begin * self.length, end * self.length)
        return replace(
            self,
            state=self.state.rows_between(begin, end),
            slot=self.slot[begin:end],
            prefix_length=self.prefix_length[begin:end],
            rotary={kind: (cosine[positions], sine[positions]) for kind, (cosine, sine) in self.rotary.items()},
            first_row=self.first_row + begin,
        )

    def place(self, row: int, slot: int, prefix_length: int, tables: RotaryTables) -> None:
        """Sets the slot and the positions of a row's canvas. tables: those of its positions, [L, head_dim] each."""
        self.slot[row].fill_(slot)
        self.prefix_length[row].fill_(prefix_length)
        where = slice(row * self.length, (row + 1) * self.length)
        for kind, table in tables.items():
            for own, given in zip(self.rotary[kind], table, strict=True):
                own[where].copy_(given)

    def move(self, source: int, target: int, masks: int) -> None:
        """Moves a request from one row to another. masks: how many masks of allowed tokens it uses."""
        one, other = self.rows_between(source, source + 1), self.rows_between(target, target + 1)
        for name in (field.name for field in fields(CanvasState) if field.name not in ("allowed", "allowed_row")):
            getattr(other.state, name).copy_(getattr(one.state, name))
        self.place(target, 0, 0, one.rotary)
        other.slot.copy_(one.slot)
        other.prefix_length.copy_(one.prefix_length)
        # Each row has its own range of masks, so mask indices change with the row.
        begin, moved = source * self.length, target * self.length
        self.state.allowed[moved : moved + masks].copy_(self.state.allowed[begin : begin + masks])
        mask = one.state.allowed_row
        other.state.allowed_row.copy_(torch.where(mask < 0, mask, mask + (moved - begin)))
        self.constraints.move(source, target)
        self.adapters.move(source, target)

    def clear(self, row: int) -> None:
        """Marks the row as unused."""
        self.state.active[row].zero_()
        self.slot[row].fill_(-1)
        self.constraints.clear(row)
        self.adapters.clear(row)


@dataclass(frozen=True)
class StepBuffers:
    """Temporary buffers of a step over B rows. Rows that are stepped by turns share one set."""

    logits: Tensor  # raw, [B, L, vocabulary]
    statistics: tuple[Tensor, ...]  # VocabularyStatistics without the entropy, which is in CanvasState
    sampled: Tensor  # int32 [B, L]
    temperature: Tensor  # fp32 [B], that of this step; CanvasState has the next step's
    attention_out: dict[int, Tensor]  # by head dimension: [B, L, heads, head_dim]
    workspace: Tensor  # bytes, for the soft embedding

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
        """The buffers for the statistics of a step of `state`."""
        argmax, *softmax = self.statistics
        return VocabularyStatistics(argmax, state.entropy, *softmax)


def canvases_of(batch: CanvasBatch, buffers: StepBuffers, self_conditioned: bool, adapted: bool = True) -> Canvases:
    """The batch's canvases for the forward pass, which skips requests that are not active."""
    state, rows = batch.state, (batch.first_row, batch.first_row + batch.rows)
    adapters = batch.adapters.between(*rows) if adapted else ()
    if adapters:
        batch.adapters.update()
    return Canvases(
        ids=state.canvas,
        slot=batch.slot.masked_fill(state.active.logical_not(), -1),
        prefix_length=batch.prefix_length,
        rotary=batch.rotary,
        soft_embedding=state.soft_embedding if self_conditioned else None,
        attention_out=buffers.attention_out,
        adapters=adapters,
        adapter_rows=batch.adapters.on_device(*rows) if adapters else None,
    )


def make_canvas_batch(
    network: Network, rows: int, length: int, device: torch.device | str | None = None
) -> CanvasBatch:
    """An empty batch for `rows` requests. device: "meta" to count the bytes."""
    config, dtype = network.config, network.dtype
    device = network.device if device is None else torch.device(device)
    output = torch.zeros(StepOutput.nbytes_of(rows, length), dtype=torch.uint8, device=device)
    parts: dict[str, Any] = dict(vars(StepOutput.over(output, length)))
    for name, (field_dtype, by_position) in _DEVICE.items():
        parts[name] = torch.zeros((rows, length) if by_position else (rows,), dtype=field_dtype, device=device)
    words = -(-config.vocab_size // 32)
    # Zeroed because rows without a request are read too and must stay finite.
    parts["soft_embedding"] = torch.zeros(rows, length, config.hidden_size, dtype=dtype, device=device)
    # Not initialised: on the CPU, pages that are never written take no memory.
    parts["allowed"] = torch.empty(rows * length, words, dtype=torch.int32, device=device)
    parts["allowed_row"].fill_(-1)

    def table(head_dim: int) -> Tensor:
        return torch.zeros(rows * length, head_dim, dtype=dtype, device=device)

    return CanvasBatch(
        state=CanvasState(**parts),
        slot=torch.full((rows,), -1, dtype=torch.int32, device=device),
        prefix_length=torch.zeros(rows, dtype=torch.int32, device=device),
        rotary={kind: (table(kind[1]), table(kind[1])) for kind in rotary_kinds(config)},
        output=output,
        constraints=Constraints(rows, device),
        adapters=AdapterRows(rows, device, network.adapters, network.options.matmul is not MatmulMode.PER_REQUEST),
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
            torch.zeros(shape, dtype=field_dtype, device=device)
            for index, (shape, field_dtype) in enumerate(layout)
            if index != entropy
        ),
        sampled=torch.zeros(rows, length, dtype=torch.int32, device=device),
        temperature=torch.ones(rows, dtype=torch.float32, device=device),
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
