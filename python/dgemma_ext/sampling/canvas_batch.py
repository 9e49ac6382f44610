"""The buffers of a batch of canvases: made once, so that a step of the batch has the same arguments every time.

A request has a row. Rows in use come first, so a step runs over as many of the first rows as its bucket has; those of
them that nobody uses are not active, and no operator reads or writes what is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from dgemma_ext.ops.denoise import VocabularyStatistics, soft_embedding_workspace
from dgemma_ext.ops.vocabulary_head import statistics_layout
from dgemma_ext.sampling.sampler import CanvasState

if TYPE_CHECKING:
    from dgemma_ext.diffusion_gemma import DiffusionGemma, RotaryTables

# Of CanvasState, what the host reads between steps, with dtype and whether there is one for every position. They lie in
# one buffer, so that a step is told by one copy. The widest come first, so that each is aligned.
_TOLD = {
    "status": (torch.int32, False),
    "step": (torch.int32, False),
    "mean_entropy": (torch.float32, False),
    "draft": (torch.int32, True),
    "entropy": (torch.float32, True),
    "accepted": (torch.bool, True),
}
# Of CanvasState, what only the device reads.
_KEPT = {
    "canvas": (torch.int32, True),
    "pinned": (torch.bool, True),
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


def bucket_of(requests: int) -> int:
    """The batch size that so many requests run in: the next power of two, so that few graphs serve all."""
    return 1 << max(requests - 1, 0).bit_length()


@dataclass(frozen=True)
class Told:
    """What a step tells the host, B rows."""

    status: torch.Tensor  # int32 [B], denoise.CanvasStatus
    step: torch.Tensor  # int32 [B], the next one
    mean_entropy: torch.Tensor  # fp32 [B]
    draft: torch.Tensor  # int32 [B, L]
    entropy: torch.Tensor  # fp32 [B, L]
    accepted: torch.Tensor  # bool [B, L]

    @classmethod
    def over(cls, buffer: torch.Tensor, rows: int, length: int) -> Told:
        """Views of a buffer of `told_bytes(rows, length)` bytes."""
        parts, begin = {}, 0
        for name, (dtype, by_position) in _TOLD.items():
            shape = (rows, length) if by_position else (rows,)
            end = begin + dtype.itemsize * rows * (length if by_position else 1)
            parts[name] = buffer[begin:end].view(dtype).view(shape)
            begin = end
        return cls(**parts)


def told_bytes(rows: int, length: int) -> int:
    return rows * sum(dtype.itemsize * (length if by_position else 1) for dtype, by_position in _TOLD.values())


@dataclass(frozen=True)
class CanvasBatch:
    """Everything that a step of B requests with canvases of L tokens reads and writes, but weights and cache."""

    state: CanvasState
    slot: torch.Tensor  # int32 [B], of the cache; -1 where no request is
    prefix_length: torch.Tensor  # int32 [B]
    tables: RotaryTables  # of every row's positions, [B * L, head_dim] each
    logits: torch.Tensor  # raw, [B, L, vocabulary]
    statistics: VocabularyStatistics
    sampled: torch.Tensor  # int32 [B, L]
    temperature: torch.Tensor  # fp32 [B], the step's own; state.temperature is the next one's
    attended: dict[int, torch.Tensor]  # by head dimension: [B, L, heads, head_dim]
    workspace: torch.Tensor  # bytes, of the soft embedding
    told: torch.Tensor  # bytes: what Told looks at; the state's tensors of these names lie there

    @property
    def rows(self) -> int:
        return self.slot.shape[0]

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def nbytes(self) -> int:
        own = [getattr(self.state, name) for name in (*_KEPT, "soft_embedding")]
        tables = [table for kind in self.tables.values() for table in kind]
        # The entropies of the statistics lie in `told`.
        statistics = [t for name, t in self.statistics._asdict().items() if name != "entropy"]
        own += [self.slot, self.prefix_length, self.logits, self.sampled, self.temperature, self.workspace, self.told]
        return sum(tensor.nbytes for tensor in (*own, *tables, *statistics, *self.attended.values()))

    def first(self, rows: int) -> CanvasBatch:
        """Views of the first rows. `told` stays whole."""

        positions = rows * self.length
        return replace(
            self,
            state=_rows_of(self.state, slice(rows)),
            slot=self.slot[:rows],
            prefix_length=self.prefix_length[:rows],
            tables={kind: (cosine[:positions], sine[:positions]) for kind, (cosine, sine) in self.tables.items()},
            logits=self.logits[:rows],
            statistics=VocabularyStatistics(*(tensor[:rows] for tensor in self.statistics)),
            sampled=self.sampled[:rows],
            temperature=self.temperature[:rows],
            attended={head_dim: tensor[:rows] for head_dim, tensor in self.attended.items()},
        )

    def load(self, row: int, canvas: CanvasState, slot: int, prefix_length: int, tables: RotaryTables) -> None:
        """Puts a canvas of one request into a row. tables: of its positions, [L, head_dim] each."""
        for name in (*_TOLD, *_KEPT):
            value = getattr(canvas, name)
            if value is None:
                getattr(self.state, name)[row].zero_()  # nothing is pinned
            else:
                getattr(self.state, name)[row].copy_(value[0])
        assert self.state.soft_embedding is not None
        if canvas.soft_embedding is None:
            self.state.soft_embedding[row].zero_()
        else:
            self.state.soft_embedding[row].copy_(canvas.soft_embedding[0])
        self.slot[row].fill_(slot)
        self.prefix_length[row].fill_(prefix_length)
        place = slice(row * self.length, (row + 1) * self.length)
        for kind, (cosine, sine) in tables.items():
            self.tables[kind][0][place].copy_(cosine)
            self.tables[kind][1][place].copy_(sine)

    def move(self, source: int, target: int) -> None:
        """Puts one row's request into another row."""
        one = self.first(source + 1)
        place = slice(source * self.length, None)
        tables = {kind: (cosine[place], sine[place]) for kind, (cosine, sine) in one.tables.items()}
        self.load(target, _rows_of(one.state, slice(source, None)), 0, 0, tables)
        self.slot[target].copy_(self.slot[source])
        self.prefix_length[target].copy_(self.prefix_length[source])

    def clear(self, row: int) -> None:
        """Nobody has the row any more."""
        self.state.active[row].zero_()
        self.slot[row].fill_(-1)


def _rows_of(state: CanvasState, rows: slice) -> CanvasState:
    values: dict[str, Any] = {f.name: getattr(state, f.name) for f in fields(CanvasState)}
    for name, value in values.items():
        values[name] = None if value is None else value[rows]
    return CanvasState(**values)


def make_canvas_batch(
    model: DiffusionGemma, rows: int, length: int, device: torch.device | str | None = None
) -> CanvasBatch:
    """Buffers for `rows` requests, none of them there. device: "meta" to count the bytes."""
    config, dtype = model.config, model.dtype
    device = model.device if device is None else torch.device(device)
    told = torch.zeros(told_bytes(rows, length), dtype=torch.uint8, device=device)
    parts = vars(Told.over(told, rows, length))
    for name, (of, by_position) in _KEPT.items():
        parts[name] = torch.zeros((rows, length) if by_position else (rows,), dtype=of, device=device)
    hidden = torch.zeros(rows, length, config.hidden_size, dtype=dtype, device=device)
    state = CanvasState(**parts, allowed=None, allowed_row=None, soft_embedding=hidden)
    made = [
        torch.zeros(shape, dtype=of, device=device) for shape, of in statistics_layout(rows, length, config.vocab_size)
    ]
    made[VocabularyStatistics._fields.index("entropy")] = state.entropy
    kinds = {(layer.rope, layer.head_dim): None for layer in config.layers}
    # Zeros where values would be read that nobody has written yet: of rows without a request, which must stay finite.
    return CanvasBatch(
        state=state,
        slot=torch.full((rows,), -1, dtype=torch.int32, device=device),
        prefix_length=torch.zeros(rows, dtype=torch.int32, device=device),
        tables={
            kind: (
                torch.zeros(rows * length, kind[1], dtype=dtype, device=device),
                torch.zeros(rows * length, kind[1], dtype=dtype, device=device),
            )
            for kind in kinds
        },
        logits=torch.empty(rows, length, config.vocab_size, dtype=dtype, device=device),
        statistics=VocabularyStatistics(*made),
        sampled=torch.zeros(rows, length, dtype=torch.int32, device=device),
        temperature=torch.ones(rows, device=device),
        attended={
            head_dim: torch.zeros(rows, length, config.num_attention_heads, head_dim, dtype=dtype, device=device)
            for head_dim in {layer.head_dim for layer in config.layers}
        },
        workspace=torch.empty(
            soft_embedding_workspace(rows, length, config.vocab_size, config.hidden_size, model.device),
            dtype=torch.uint8,
            device=device,
        ),
        told=told,
    )
