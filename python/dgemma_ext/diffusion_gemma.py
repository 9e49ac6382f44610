"""The two forward passes: encode (causal, fills the cache) and denoise (bidirectional over the canvas, reads it)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from dgemma_ext.checkpoint.config import GenerationDefaults, LayerConfig, ModelConfig, RopeConfig
from dgemma_ext.checkpoint.files import inspect_checkpoint, resolve_checkpoint
from dgemma_ext.checkpoint.quantization import resolve_weights
from dgemma_ext.checkpoint.tokenizer import Tokenizer
from dgemma_ext.engine.memory import check_memory, mapped_bytes, memory_plan
from dgemma_ext.model.cache import Cache
from dgemma_ext.model.joint_pass import CanvasRows, Pending, last_hidden
from dgemma_ext.model.layers import Rows, project_qkv, rms_norm, rotary_tables
from dgemma_ext.model.placement import resolve_activations, resolve_device, resolve_dtype, resolve_products
from dgemma_ext.model.weights import LayerWeights, ModelWeights, load_weights
from dgemma_ext.ops import block_attention, denoise
from dgemma_ext.ops.layer import attention_residual, layer_output
from dgemma_ext.ops.quantized_gemm import experts

if TYPE_CHECKING:
    from dgemma_ext.engine.chat import Chat
    from dgemma_ext.engine.events import Commit, Draft
    from dgemma_ext.engine.scheduler import Prompt, Scheduler
    from dgemma_ext.sampling.sampler import Canvas, SamplerConfig

# Long prompts are encoded in pieces of this many positions, which bounds the memory of a pass.
ENCODE_CHUNK = 4096

# Half a unit in the last place of the soft embedding: what leaving out vocabulary tiles may change. In fp32 nothing.
_SOFT_EMBEDDING_TOLERANCE = {torch.bfloat16: 2.0**-9, torch.float32: 0.0}

# By what the tables depend on: a layer's rope and head dimension.
RotaryTables = dict[tuple[RopeConfig, int], tuple[torch.Tensor, torch.Tensor]]

# attend(layer, query, key, value): the attention of a pass, over its cache.
Attention = Callable[[LayerConfig, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DiffusionGemma:
    """A DiffusionGemma with its tokenizer and its sampler defaults; `from_pretrained` makes one.

    Attributes: `config`, `defaults` (generation_config.json), `tokenizer` (None where the checkpoint has none),
    `weights`, `dtype`, `device`.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, defaults: GenerationDefaults, tokenizer: Tokenizer | None
    ) -> None:
        self.config = config
        self.weights = weights
        self.defaults = defaults
        self.tokenizer = tokenizer
        self.dtype = weights.embed_tokens.dtype
        self.device = weights.embed_tokens.device
        # What a request's bits may depend on; on the CPU they are its own.
        self.products = resolve_products(False, self.device, self.dtype)
        # What the experts' activations are rounded to: None or "fp8".
        self.activations: str | None = None
        # Checks every layer's output, so that a non-finite value is named where it appears first.
        self.debug = os.environ.get("DGEMMA_DEBUG", "0") not in ("", "0")
        # The factor is rounded to the model's dtype before it multiplies: 53.0 and not 53.066 for 2,816 in bfloat16.
        self.embedding_scale = float(torch.tensor(math.sqrt(config.hidden_size)).to(self.dtype))
        self.soft_embedding_tolerance = _SOFT_EMBEDDING_TOLERANCE[self.dtype]
        self.max_embedding_norm = _largest_row_norm(weights.embed_tokens)
        # What `generate` keeps on a GPU from call to call: a cache, buffers, graphs. None gives the memory back.
        self.kept_scheduler: Scheduler | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        weights: str = "stored",
        batch_invariant: bool = False,
        activations: str | None = None,
    ) -> DiffusionGemma:
        """Loads a checkpoint folder, or a Hugging Face Hub id where huggingface_hub is installed.

        `device` "auto" is the first CUDA GPU where torch sees one, else the CPU. `dtype` "auto" is the checkpoint's;
        otherwise "bfloat16" or "float32" (or the torch dtype). `weights` "stored" keeps quantized weights as they are;
        "fp8", "int4" (groups of 32), "int4-64", "int4-128" and "nvfp4" quantize plain ones while they are loaded, those
        that the published checkpoints of the format quantize; "plain" loads quantized ones as `dtype`.
        `batch_invariant`: a request's tokens are the same alone and in any batch, to the bit, on a GPU too, because its
        dense products are our own kernels' and not torch's; on the CPU they are in any case.
        `activations` "fp8" rounds what goes into the experts' products to FP8 as well, a scale for each token, where
        their weights are fp8: other tokens come out. For GPUs of compute capability 8.9, 9.0 and 12.x; on the CPU the
        same roundings, slowly.

        Raises dg.CheckpointError naming the file and the tensor, ValueError for an unknown device, dtype or format and
        for activations that weights or device do not serve, and dg.NotEnoughMemory, before anything is loaded, with a
        table of what the model would take.
        """
        path = Path(resolve_checkpoint(path_or_hub_id))
        config = ModelConfig.from_file(path)
        wanted = resolve_weights(weights)
        resolved, place = resolve_dtype(dtype, config), resolve_device(device)
        products = resolve_products(batch_invariant, place, resolved)
        info = inspect_checkpoint(path, config)
        plan = memory_plan(config, info, wanted, resolved, place, activations=activations)
        check_memory(plan, mapped_bytes(config, info, wanted, resolved) if place.type == "cpu" else 0, place)
        rounded = resolve_activations(activations, plan.weights["experts"][0], config, place, resolved)
        loaded = load_weights(path, config, resolved, place, weights=wanted, info=info)
        tokenizer = Tokenizer.from_directory(path) if (path / "tokenizer.json").exists() else None
        model = cls(config, loaded, GenerationDefaults.from_file(path, config), tokenizer)
        model.products, model.activations = products, rounded
        return model

    # The passes ---------------------------------------------------------------------------------------------------

    def new_cache(self, slots: int, max_length: int) -> Cache:
        """An empty cache for `slots` requests of up to `max_length` positions each (prompt and committed canvases)."""
        return Cache(self.config, slots, max_length, self.dtype, self.device)

    def encode(
        self,
        ids: torch.Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        bidirectional_spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        chunk: int = ENCODE_CHUNK,
    ) -> None:
        """Appends tokens to the cache: causal attention over what each slot holds and over the new tokens.

        ids: integer [B, T], right padded where `lengths` (one per row) are given. slots: which slot each row goes to,
        default 0 .. B - 1. bidirectional_spans: per row, ranges [start, end) of absolute positions whose tokens see
        each other whole (an image's soft tokens); a chunk border never cuts one.

        Raises ValueError for ids outside the vocabulary, slots used twice, rows too long for the cache.
        """
        ids, slot_list = self._checked_ids("ids", ids, cache, slots)
        counts = [ids.shape[1]] * len(slot_list) if lengths is None else list(lengths)
        if len(counts) != len(slot_list) or any(not 0 <= n <= ids.shape[1] for n in counts):
            raise ValueError(f"lengths must be {len(slot_list)} numbers in [0, {ids.shape[1]}], got {lengths}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        for slot, count in zip(slot_list, counts, strict=True):
            if cache.length(slot) + count > cache.max_length:
                raise ValueError(
                    f"ids: slot {slot} holds {cache.length(slot)} positions and cannot take {count} more; "
                    f"the cache's max_length is {cache.max_length}"
                )
        spans = [[] for _ in slot_list] if bidirectional_spans is None else [list(s) for s in bidirectional_spans]
        if len(spans) != len(slot_list):
            raise ValueError(f"bidirectional_spans must have {len(slot_list)} entries, got {len(spans)}")
        for row_spans in spans:
            borders = [border for span in sorted(row_spans) for border in span]
            if borders != sorted(borders) or any(start >= end for start, end in row_spans):
                raise ValueError(
                    f"bidirectional_spans must be ranges [start, end) that do not overlap, got {row_spans}"
                )
        # Row by row: a dense product's bits may depend on how many rows it has, and a request's must not.
        for row, (slot, count) in enumerate(zip(slot_list, counts, strict=True)):
            start = cache.length(slot)
            for first, last in _chunks(start, start + count, chunk, spans[row]):
                self._encode_block(ids[row : row + 1, first - start : last - start], cache, slot, spans[row])

    def denoise(
        self,
        canvas: torch.Tensor,
        cache: Cache,
        slots: Sequence[int] | None = None,
        self_conditioning: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One denoising pass; returns soft-capped logits, fp32 [B, L, vocabulary]. The cache is only read.

        canvas: integer [B, L]. self_conditioning: the last step's processed (temperature-scaled) logits
        [B, L, vocabulary], or None for exact zero. This is the interface of parity tests; generating stores no fp32
        logits.
        """
        canvas, slot_list = self._checked_ids("canvas", canvas, cache, slots)
        shape = (*canvas.shape, self.config.vocab_size)
        if self_conditioning is not None and tuple(self_conditioning.shape) != shape:
            raise ValueError(f"self_conditioning must be {list(shape)}, got {list(self_conditioning.shape)}")
        rows = []
        for row, slot in enumerate(slot_list):
            soft = None
            if self_conditioning is not None:
                soft = self.soft_embedding_of_logits(self_conditioning[row : row + 1])
            raw = self.raw_logits(canvas[row : row + 1], cache, slot, soft)
            cap = self.config.final_logit_softcapping
            rows.append(torch.tanh(raw.float() / cap) * cap)
        return torch.cat(rows)

    def raw_logits(
        self,
        canvas: torch.Tensor,
        cache: Cache,
        slot: int,
        soft_embedding: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The head's product in the model's dtype, before the soft cap: [1, L, vocabulary].

        canvas: int [1, L]. soft_embedding: [1, L, hidden], or None for exact zero. out: where to write.
        """
        normed = self.last_hidden(canvas, cache, slot, soft_embedding)
        if out is None:
            return functional.linear(normed, self.weights.embed_tokens)
        torch.mm(normed[0], self.weights.embed_tokens.t(), out=out[0])
        return out

    def last_hidden(
        self,
        canvas: torch.Tensor,
        cache: Cache,
        slot: int,
        soft_embedding: torch.Tensor | None,
        pending: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the head takes: the last layer's output, normalised, [1, L, hidden]. Arguments as of raw_logits.

        pending: int [1, n], tokens that the same pass encodes into the slot, for the canvas to see.
        """
        start, length, taken = cache.length(slot), canvas.shape[1], 0 if pending is None else pending.shape[1]
        rows = CanvasRows(
            hidden=self._canvas_input(canvas, soft_embedding),
            tables=self.rotary_tables(torch.arange(start + taken, start + taken + length, device=self.device)),
            whose=self._rows(length),
            attend=self._canvas_attention(cache, slot, taken),
        )
        return last_hidden(self, cache, rows, [] if pending is None else [Pending(slot, pending)])

    def soft_embedding_of_logits(self, processed: torch.Tensor) -> torch.Tensor:
        """The expected embedding [B, L, hidden] under softmax(processed), for processed logits [B, L, vocabulary].

        The logits are rounded to the model's dtype first, as transformers keeps them between steps.
        """
        logits = processed.to(self.device, self.dtype).contiguous()
        reading: dict[str, Any] = {
            "softcap": 0.0,
            "temperature": torch.ones(logits.shape[0], device=self.device),
            "active": None,
            "allowed": None,
            "allowed_row": None,
        }
        statistics = denoise.vocabulary_statistics(logits, **reading)
        return denoise.soft_embedding(
            logits,
            **reading,
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

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weights.embed_tokens) * self.embedding_scale

    def _canvas_input(self, canvas: torch.Tensor, soft_embedding: torch.Tensor | None) -> torch.Tensor:
        """The first layer's input [1, B * L, hidden]: the embeddings of the tokens [B, L] and the self-conditioning,
        normalised together."""
        weights, epsilon = self.weights, self.config.rms_norm_eps
        hidden = self._embed(canvas.reshape(-1))
        if soft_embedding is not None:
            normed = rms_norm(soft_embedding.flatten(0, 1), weights.self_conditioning_pre_norm, epsilon)
            hidden = hidden + self._rows(*[canvas.shape[1]] * canvas.shape[0]).gated_mlp(
                normed,
                weights.self_conditioning_gate_proj,
                weights.self_conditioning_up_proj,
                weights.self_conditioning_down_proj,
            )
        return rms_norm(hidden, None, epsilon)[None]

    def _canvas_attention(self, cache: Cache, slot: int, more: int = 0) -> Attention:
        """The attention of a denoising pass over what the slot holds, and `more` positions that it will hold."""
        place = self._place(cache, slot, more)

        def attend(layer: LayerConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            prefix = (cache.keys[layer.index], cache.values[layer.index], *place)
            return block_attention.canvas_attention(query, key, value, *prefix, window=layer.sliding_window)

        return attend

    def _causal_attention(self, cache: Cache, slot: int, spans: torch.Tensor | None) -> Attention:
        """The attention of an encode pass; it appends the block's keys and values to the slot's rows."""
        place = self._place(cache, slot)

        def attend(layer: LayerConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            prefix = (cache.keys[layer.index], cache.values[layer.index], *place)
            attended = block_attention.causal_attention(
                query, key, value, *prefix, spans=spans, window=layer.sliding_window
            )
            block_attention.append_to_cache(key, value, *prefix)
            return attended

        return attend

    def _layers(
        self, start: int, count: int
    ) -> Iterator[tuple[LayerConfig, LayerWeights, tuple[torch.Tensor, torch.Tensor]]]:
        """Each layer with its weights and the rotary tables of positions start .. start + count - 1."""
        tables = self.rotary_tables(torch.arange(start, start + count, device=self.device))
        for layer, weights in zip(self.config.layers, self.weights.layers, strict=True):
            yield layer, weights, tables[layer.rope, layer.head_dim]

    def rotary_tables(self, positions: torch.Tensor) -> RotaryTables:
        """Cosines and sines of int positions [n] for every kind of layer, each [n, head_dim]."""
        kinds = dict.fromkeys((layer.rope, layer.head_dim) for layer in self.config.layers)
        return {kind: rotary_tables(*kind, positions, self.dtype) for kind in kinds}

    def _encode_block(self, ids: torch.Tensor, cache: Cache, slot: int, spans: list[tuple[int, int]]) -> None:
        """Encodes int [1, n] ids after what the slot holds."""
        start, count = cache.length(slot), ids.shape[1]
        inside = [span for span in spans if span[0] < start + count and span[1] > start]
        span_tensor = torch.tensor([inside], dtype=torch.int32, device=self.device) if inside else None
        attend = self._causal_attention(cache, slot, span_tensor)
        hidden, normed = self._embed(ids), None
        for layer, weights, tables in self._layers(start, count):
            if layer.index == len(self.config.layers) - 1:
                # Nobody looks at what follows the last layer's keys and values.
                _, key, value = self._project(hidden, layer, weights, tables, normed)
                self._append(layer, key, value, cache, slot)
            else:
                hidden, normed = self._layer(hidden, layer, weights, tables, count, attend, normed)
        cache.advance(slot, count)

    def _append(self, layer: LayerConfig, key: torch.Tensor, value: torch.Tensor, cache: Cache, slot: int) -> None:
        """Puts keys and values [1, n, key heads, head_dim] behind what a layer has of the slot."""
        rows = (cache.keys[layer.index], cache.values[layer.index])
        block_attention.append_to_cache(key, value, *rows, *self._place(cache, slot))

    def _place(self, cache: Cache, slot: int, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot and its length, with `more` positions, as the kernels want them: int32 [1] each."""
        # Filled on the device: a copy from the host would wait for what runs there.
        slots = torch.full((1,), slot, dtype=torch.int32, device=self.device)
        return slots, torch.full((1,), cache.length(slot) + more, dtype=torch.int32, device=self.device)

    def _rows(self, *counts: int) -> Rows:
        """Rows of a pass, so many of each request."""
        return Rows(counts, self.products)

    def _project(
        self,
        hidden: torch.Tensor,
        layer: LayerConfig,
        weights: LayerWeights,
        tables: tuple[torch.Tensor, torch.Tensor],
        normed: torch.Tensor | None,
        whose: Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of hidden [1, L, hidden], each [1, L, heads, head_dim]."""
        epsilon = self.config.rms_norm_eps
        if normed is None:
            normed = rms_norm(hidden, weights.input_layernorm, epsilon)
        whose = whose or self._rows(hidden.shape[1])
        query, key, value = project_qkv(normed[0], weights, layer, tables, epsilon, whose)
        return query[None], key[None], value[None]

    def _layer(
        self,
        hidden: torch.Tensor,
        layer: LayerConfig,
        weights: LayerWeights,
        tables: tuple[torch.Tensor, torch.Tensor],
        encoded: int,
        attend: Attention,
        normed: torch.Tensor | None = None,
        whose: Rows | None = None,
        idle: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer on hidden [1, n, hidden]; `attend` is the pass's attention, `normed` the layer's first norm of
        hidden where it is known. Returns the output and the norm of it that comes next.

        encoded: so many of the last rows are encoded, the others denoised: they have other scalars. idle: bool [n, 1],
        rows that no expert is to see.
        """
        epsilon = self.config.rms_norm_eps
        whose = whose or self._rows(hidden.shape[1])
        attended = attend(layer, *self._project(hidden, layer, weights, tables, normed, whose))
        rows, dense_input, sparse = attention_residual(
            hidden[0],
            whose.dense(attended[0].flatten(-2), weights.o_proj),
            weights.post_attention_layernorm,
            weights.pre_feedforward_layernorm,
            weights.pre_feedforward_layernorm_2,
            epsilon,
        )
        router = (weights.router_scale, weights.router_proj, weights.router_per_expert_scale)
        ids, scales = whose.route(rows, *router, self.config.top_k_experts, epsilon)
        if idle is not None:
            ids.masked_fill_(idle, -1)
        mlp = whose.gated_mlp(dense_input, weights.gate_proj, weights.up_proj, weights.down_proj)
        sparse = experts(sparse, ids, scales, weights.experts_gate_up, weights.experts_down, self.activations)
        norms = (
            weights.post_feedforward_layernorm_1,
            weights.post_feedforward_layernorm_2,
            weights.post_feedforward_layernorm,
            self._norm_after(layer),
        )
        sides = ((rows.shape[0] - encoded, weights.decoder_layer_scalar), (encoded, weights.encoder_layer_scalar))
        parts = [(count, scalar) for count, scalar in sides if count]
        counts = [count for count, _ in parts]
        made = [
            layer_output(residual, of_mlp, of_experts, *norms, scalar, epsilon)
            for (_, scalar), residual, of_mlp, of_experts in zip(
                parts, rows.split(counts), mlp.split(counts), sparse.split(counts), strict=True
            )
        ]
        out, next_normed = made[0] if len(made) == 1 else (torch.cat(side) for side in zip(*made, strict=True))
        if self.debug and not bool(torch.isfinite(out).all()):
            raise FloatingPointError(f"the output of layer {layer.index} is not finite")
        return out[None], next_normed[None]

    def _norm_after(self, layer: LayerConfig) -> torch.Tensor:
        """The weight of the norm that a layer's output meets next: the next layer's first, or the last of all."""
        following = self.weights.layers[layer.index + 1 :]
        return following[0].input_layernorm if following else self.weights.norm

    def _checked_ids(
        self, name: str, ids: torch.Tensor, cache: Cache, slots: Sequence[int] | None
    ) -> tuple[torch.Tensor, list[int]]:
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be an int32 or int64 tensor [B, T], got {ids.dtype} {list(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"{name} must be token ids in [0, {self.config.vocab_size}), got {int(ids.min())} to {int(ids.max())}"
            )
        chosen = list(range(ids.shape[0])) if slots is None else [int(s) for s in slots]
        if len(chosen) != ids.shape[0] or len(set(chosen)) != len(chosen):
            raise ValueError(f"slots must be {ids.shape[0]} different slots, one per row of {name}, got {chosen}")
        for slot in chosen:
            cache.length(slot)  # refuses a slot that does not exist
        # Without waiting for what runs on a GPU, but where the caller could change the ids under the copy.
        return ids.to(self.device, non_blocking=not ids.is_pinned()), chosen

    # Text -----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int | Sequence[int] = 0,
        canvas: Canvas | Sequence[Canvas | None] | None = None,
        on_draft: Callable[[Draft], None] | None = None,
    ) -> Any:
        """Answers a prompt (an Output) or a list of prompts (a list of them); see engine.generate."""
        from dgemma_ext.engine import generate  # the loop is built on the model, so it is imported late

        return generate.generate(self, prompt, max_new_tokens, sampler, seed, canvas, on_draft)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        sampler: SamplerConfig | None = None,
        seed: int | Sequence[int] = 0,
        canvas: Canvas | Sequence[Canvas | None] | None = None,
    ) -> Iterator[Draft | Commit]:
        """Yields a Draft at every denoising step and a Commit for every finished canvas."""
        from dgemma_ext.engine import generate

        return generate.stream(self, prompt, max_new_tokens, sampler, seed, canvas)

    def chat(self, system: str | None = None, max_length: int | None = None) -> Chat:
        """A conversation that keeps its cache from turn to turn."""
        from dgemma_ext.engine.chat import Chat

        return Chat(self, system=system, max_length=max_length)


def _chunks(start: int, end: int, size: int, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cuts [start, end) into pieces of `size`, moving a cut that falls inside a span to the span's start (or, where the
    piece starts with that span, to its end)."""
    while start < end:
        cut = min(start + size, end)
        for first, last in spans:
            if first < cut < last:
                cut = first if first > start else min(last, end)
        yield start, cut
        start = cut


def _largest_row_norm(embedding: torch.Tensor) -> float:
    """max over v of ||embedding[v]||, in pieces so that no fp32 copy of the table exists."""
    return max(float(piece.float().norm(dim=-1).max()) for piece in embedding.split(16_384))
