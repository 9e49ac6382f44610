"""The network: weights on a device and the two passes over them, encode and denoise. It does not know of requests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext import arguments, environment
from dgemma_ext.checkpoint import Adapter, ModelConfig
from dgemma_ext.model.adapter_set import AdapterSet
from dgemma_ext.model.cache import Cache
from dgemma_ext.model.forward import ForwardOptions, forward
from dgemma_ext.model.layers import RotaryTables, rotary_tables
from dgemma_ext.model.loaded_adapter import EXPERT_ATTRIBUTES, LoadedAdapter
from dgemma_ext.model.matmul import MatmulMode
from dgemma_ext.model.placement import resolve_matmul
from dgemma_ext.model.rows import Canvases, PrefillChunk
from dgemma_ext.model.weights import ModelWeights
from dgemma_ext.ops import denoise
from dgemma_ext.torch_state import in_own_torch_state

# Long prompts are encoded in chunks of this many positions, which bounds the memory of a pass.
ENCODE_CHUNK = 4096

_SPANS = "a list of ranges [start, end) per row"
IMAGE_ATTENTION = ("sliding", "all")

# An adapter by its name, or itself; None is the default one.
AdapterName = str | LoadedAdapter | None

# The relative error that skipping vocabulary tiles may add to a soft embedding: half a unit in the last place of
# bfloat16. In fp32 no tile is skipped.
SOFT_EMBEDDING_TOLERANCE = {torch.bfloat16: 2.0**-9, torch.float32: 0.0}


class Network:
    """Weights and passes.

    Attributes: `config`, `weights`, `adapters`, `dtype`, `device`, `options` (of every pass), `embedding_scale`, and
    for ops.denoise.soft_embedding `soft_embedding_tolerance` and `max_embedding_norm`.
    """

    @in_own_torch_state
    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        matmul: MatmulMode | None = None,
        activations: str | None = None,
        image_attention: str = "sliding",
    ) -> None:
        self.config = config
        self.weights = weights
        self.adapters = AdapterSet()
        self.dtype = weights.embed_tokens.dtype
        self.device = weights.embed_tokens.device
        # The factor is rounded to the model's dtype before it multiplies: 53.0 and not 53.066 for 2,816 in bfloat16.
        self.embedding_scale = float(
            torch.tensor(math.sqrt(config.hidden_size), dtype=torch.float32, device="cpu").to(self.dtype)
        )
        self.options = ForwardOptions(
            matmul=matmul or resolve_matmul(False, self.device, self.dtype),
            embedding_scale=self.embedding_scale,
            activations=activations,
            image_attention=arguments.choice("image_attention", image_attention, IMAGE_ATTENTION),
            debug=environment.debug(),
        )
        self.soft_embedding_tolerance = SOFT_EMBEDDING_TOLERANCE[self.dtype]
        self.max_embedding_norm = largest_row_norm(weights.embed_tokens)

    def new_cache(self, slots: int, max_length: int) -> Cache:
        """An empty cache for `slots` requests of up to `max_length` positions each (prompt and committed canvases)."""
        return Cache(self.config, slots, max_length, self.dtype, self.device)

    def load_adapter(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Copies an adapter to the device, in the model's dtype. Raises ValueError for a name that is taken, and for
        weights that an adapter cannot stand beside here."""
        self.adapters.check_new(name)
        modules, options = adapter.modules, self.options
        if options.activations is not None and any(attribute in modules for attribute in EXPERT_ATTRIBUTES):
            raise ValueError(f"adapter: it adapts experts, whose inputs activations {options.activations} rounds")
        if options.matmul is MatmulMode.INVARIANT and "router_proj" in modules:
            raise ValueError("adapter: it adapts the router, which batch_invariant on a GPU cannot run")
        loaded = LoadedAdapter.load(name, adapter, self.dtype, self.device)
        self.adapters.add(loaded)
        return loaded

    def rotary_tables(self, positions: Tensor) -> RotaryTables:
        """Cosines and sines of int positions [n] for every kind of layer, each [n, head_dim]."""
        return rotary_tables(self.config, positions, self.dtype)

    def forward(self, cache: Cache, canvases: Canvases | None, chunks: Sequence[PrefillChunk] = ()) -> Tensor | None:
        """One pass over canvases and chunks; see model.forward."""
        return forward(self.config, self.weights, self.options, cache, canvases, chunks)

    @in_own_torch_state
    def encode(
        self,
        ids: Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        bidirectional_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        chunk: int = ENCODE_CHUNK,
        images: Sequence[Sequence[tuple[int, Tensor]]] | None = None,
        adapter: AdapterName | Sequence[AdapterName] = None,
    ) -> None:
        """Appends tokens to the cache: causal attention over what each slot holds and over the new tokens.

        ids: integer [B, T], a tensor, an array or lists, right padded where `lengths` (one per row) are given. slots:
        the slot of each row, default 0 .. B - 1. bidirectional_spans: per row, ranges [start, end) of absolute
        positions whose tokens all see each other, on layers of every kind; a chunk border never cuts one. images: per
        row, the absolute position of each image's first soft token, and its features [soft tokens, hidden], which stand
        in place of the tokens' embeddings. The tokens of an image see each other on sliding layers, or with
        image_attention "all" on every layer. adapter: the name of a loaded one, or a list of one per row; None is the
        default one, "base" none.

        Raises ValueError for ids outside the vocabulary, slots used twice, rows too long for the cache, images outside
        the new positions or on top of each other.
        """
        ids, slot_list = self._checked_ids("ids", ids, cache, slots)
        counts = [ids.shape[1]] * len(slot_list)
        if lengths is not None:
            counts = arguments.integers("lengths", lengths, "integers, one per row of ids", end=ids.shape[1] + 1)
        if len(counts) != len(slot_list):
            raise ValueError(f"lengths must be {len(slot_list)} integers, one per row of ids, got {len(counts)}")
        chunk = arguments.integer("chunk", chunk, least=1)
        for slot, count in zip(slot_list, counts, strict=True):
            if cache.length(slot) + count > cache.max_length:
                raise ValueError(
                    f"ids: slot {slot} holds {cache.length(slot)} positions and cannot take {count} more; "
                    f"the cache's max_length is {cache.max_length}"
                )
        spans = _checked_spans(bidirectional_spans, len(slot_list))
        placed = self._checked_images(images, slot_list, counts, cache)
        adapters = self.adapters.named_each(adapter, len(slot_list))
        # One pass for each row: the bits of a dense product may depend on its number of rows, and those of a request
        # must not depend on other requests.
        for row, (slot, count) in enumerate(zip(slot_list, counts, strict=True)):
            start = cache.length(slot)
            of_images = [(first, first + len(features)) for first, features in placed[row]]
            for first, last in _chunks(start, start + count, chunk, spans[row] + of_images):
                tokens = ids[row, first - start : last - start]
                part = self.prefill_chunk(slot, tokens, first, placed[row], spans[row], adapters[row])
                self.forward(cache, None, [part])

    def prefill_chunk(
        self,
        slot: int,
        ids: Tensor,
        start: int,
        images: Sequence[tuple[int, Tensor]] = (),
        spans: Sequence[tuple[int, int]] = (),
        adapter: LoadedAdapter | None = None,
    ) -> PrefillChunk:
        """The chunk of ids, int [n] on the model's device, at positions from `start` on.

        images, spans: as in `encode`, those of one row; what lies outside the chunk is left out.
        """
        end = start + ids.shape[0]
        placed = [(first, features) for first, features in images if start <= first < end]
        everywhere, sliding = list(spans), list(spans)
        # Without "vision" in config.json's use_bidirectional_attention a model reads images as it reads text.
        if self.config.bidirectional_attention is not None:
            of_images = [(first, first + len(features)) for first, features in placed]
            sliding += of_images
            everywhere += of_images if self.options.image_attention == "all" else []
        return PrefillChunk(
            slot,
            ids,
            sliding_spans=self._span_tensor(sliding, start, end),
            full_spans=self._span_tensor(everywhere, start, end),
            features=tuple((first - start, features) for first, features in placed),
            adapter=adapter,
        )

    def _span_tensor(self, spans: list[tuple[int, int]], first: int, last: int) -> Tensor | None:
        """Those of some spans that reach into [first, last)."""
        inside = [span for span in spans if span[0] < last and span[1] > first]
        if not inside:
            return None
        # The copy does not wait for a GPU's queued work.
        return torch.tensor([inside], dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)

    @in_own_torch_state
    def denoise(
        self,
        canvas: Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        self_conditioning: Tensor | None = None,
        adapter: AdapterName | Sequence[AdapterName] = None,
    ) -> Tensor:
        """One denoising pass; returns soft-capped logits, fp32 [B, L, vocabulary]. The cache is only read.

        canvas: integer [B, L], a tensor, an array or lists. self_conditioning: the last step's processed
        (temperature-scaled) logits, a tensor [B, L, vocabulary], or None for exact zero; no gradient flows through
        them. adapter: as in `encode`. Parity tests use this interface; `generate` stores no fp32 logits.
        """
        canvas, slot_list = self._checked_ids("canvas", canvas, cache, slots)
        shape = (*canvas.shape, self.config.vocab_size)
        if self_conditioning is not None:
            wanted = f"a tensor {list(shape)} or None"
            given = arguments.instance("self_conditioning", self_conditioning, Tensor, wanted)
            if tuple(given.shape) != shape or not given.is_floating_point() or given.is_meta:
                raise arguments.refusal("self_conditioning", wanted, given)
        adapters = self.adapters.named_each(adapter, len(slot_list))
        cap, logits = self.config.final_logit_softcapping, []
        for row, slot in enumerate(slot_list):
            soft_embedding = None
            if self_conditioning is not None:
                soft_embedding = self.soft_embedding_of_logits(self_conditioning[row : row + 1])
            of_row = self.canvas_in_slot(canvas[row : row + 1], cache, slot, soft_embedding, adapter=adapters[row])
            hidden = self.forward(cache, of_row)
            assert hidden is not None, "the pass has a canvas"
            raw = functional.linear(hidden, self.weights.embed_tokens)
            logits.append(torch.tanh(raw.float() / cap) * cap)
        return torch.cat(logits)

    def canvas_in_slot(
        self,
        ids: Tensor,
        cache: Cache,
        slot: int,
        soft_embedding: Tensor | None = None,
        appended: int = 0,
        adapter: LoadedAdapter | None = None,
    ) -> Canvases:
        """One canvas, int [1, L], that sees a slot's positions and `appended` more, which the same pass encodes."""
        prefix = cache.length(slot) + appended
        return Canvases(
            ids=ids,
            # Filled on the device, because a copy from the host would wait for the work that is queued there.
            slot=torch.full((1,), slot, dtype=torch.int32, device=self.device),
            prefix_length=torch.full((1,), prefix, dtype=torch.int32, device=self.device),
            rotary=self.rotary_tables(torch.arange(prefix, prefix + ids.shape[1], device=self.device)),
            soft_embedding=soft_embedding,
            adapters=(adapter,),
        )

    def soft_embedding_of_logits(self, processed: Tensor) -> Tensor:
        """The expected embedding [B, L, hidden] under softmax(processed), for processed logits [B, L, vocabulary].

        The logits are rounded to the model's dtype first, as transformers keeps them between steps.
        """
        logits = processed.to(self.device, self.dtype).contiguous()
        temperature = torch.ones(logits.shape[0], dtype=torch.float32, device=self.device)
        statistics = denoise.vocabulary_statistics(logits, 0.0, temperature)
        return denoise.soft_embedding(
            logits,
            softcap=0.0,
            temperature=temperature,
            active=None,
            allowed=None,
            allowed_row=None,
            row_max=statistics.row_max,
            row_sum=statistics.row_sum,
            tile_max=statistics.tile_max,
            tile_sum=statistics.tile_sum,
            pinned=None,
            embedding=self.weights.embed_tokens,
            embedding_scale=self.embedding_scale,
            tolerance=0.0,
            max_embedding_norm=self.max_embedding_norm,
        )

    def _checked_images(
        self, images: Any, slots: list[int], counts: list[int], cache: Cache
    ) -> list[list[tuple[int, Tensor]]]:
        """The images of each row, in order, with features of the model's dtype on its device."""
        wanted = f"(position, features) per image, with features a tensor [soft tokens, {self.config.hidden_size}]"
        rows = [[] for _ in slots] if images is None else arguments.sequence("images", images, "a list per row of ids")
        if len(rows) != len(slots):
            raise ValueError(f"images must have {len(slots)} entries, one per row of ids, got {len(rows)}")
        placed = []
        for row, slot, count in zip(rows, slots, counts, strict=True):
            found = []
            for position, features in arguments.sequence("images", row, f"a list of {wanted}"):
                given = arguments.instance("images", features, Tensor, wanted)
                if given.dim() != 2 or given.shape[0] < 1 or given.shape[1] != self.config.hidden_size:
                    raise arguments.refusal("images", wanted, given)
                found.append((arguments.integer("images", position), given.to(self.device, self.dtype)))
            found.sort(key=lambda one: one[0])
            start = cache.length(slot)
            ends = [start, *(position + len(features) for position, features in found)]
            begins = [*(position for position, _ in found), start + count]
            if any(end > begin for end, begin in zip(ends, begins, strict=True)):
                where = ", ".join(f"[{begin}, {end})" for begin, end in zip(begins, ends[1:], strict=False))
                raise ValueError(
                    f"images must lie apart in [{start}, {start + count}), where the new tokens are, got {where}"
                )
            placed.append(found)
        return placed

    def _checked_ids(self, name: str, ids: Any, cache: Cache, slots: Sequence[int] | None) -> tuple[Tensor, list[int]]:
        checked = arguments.integer_matrix(name, ids, "token ids [B, T]")
        if checked.numel() and not 0 <= int(checked.min()) <= int(checked.max()) < self.config.vocab_size:
            found = f"{int(checked.min())} to {int(checked.max())}"
            raise ValueError(f"{name} must be token ids in [0, {self.config.vocab_size}), got {found}")
        arguments.instance("cache", cache, Cache, "a dg.Cache")
        rows = checked.shape[0]
        chosen = list(range(rows)) if slots is None else arguments.integers("slots", slots, "slots of the cache")
        if len(chosen) != rows or len(set(chosen)) != len(chosen):
            raise ValueError(f"slots must be {rows} different slots, one per row of {name}, got {chosen}")
        for slot in chosen:
            cache.length(slot)  # refuses a slot that does not exist
        # The copy does not wait for a GPU's queued work. Pinned ids are copied synchronously: the caller could change
        # them while they are copied.
        return checked.to(self.device, non_blocking=not checked.is_pinned()), chosen


def _checked_spans(spans: Sequence[Sequence[tuple[int, int]]] | None, rows: int) -> list[list[tuple[int, int]]]:
    checked: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    if spans is not None:
        checked = [_span_row(row) for row in arguments.sequence("bidirectional_spans", spans, _SPANS)]
    if len(checked) != rows:
        raise ValueError(f"bidirectional_spans must have {rows} entries, got {len(checked)}")
    for row in checked:
        borders = [border for span in sorted(row) for border in span]
        if borders != sorted(borders) or any(start >= end for start, end in row):
            raise ValueError(f"bidirectional_spans must be ranges [start, end) that do not overlap, got {row}")
    return checked


def _span_row(row: Any) -> list[tuple[int, int]]:
    name = "bidirectional_spans"
    spans = [arguments.integers(name, span, _SPANS) for span in arguments.sequence(name, row, _SPANS)]
    if any(len(span) != 2 for span in spans):
        raise arguments.refusal(name, _SPANS, row)
    return [(start, end) for start, end in spans]


def _chunks(start: int, end: int, size: int, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cuts [start, end) into chunks of `size`. A cut inside a span moves to the span's start, or to its end where the
    chunk starts with that span."""
    while start < end:
        cut = min(start + size, end)
        for first, last in spans:
            if first < cut < last:
                cut = first if first > start else min(last, end)
        yield start, cut
        start = cut


def largest_row_norm(embedding: Tensor) -> float:
    """max over v of ||embedding[v]||, computed in pieces so that no fp32 copy of the table exists."""
    return max(float(piece.float().norm(dim=-1).max()) for piece in embedding.split(16_384))
