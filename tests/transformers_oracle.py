"""transformers as the oracle of parity tests: its passes, its layers, its generate with this package's draws.

Works with transformers 5.17 to 5.24. Its sampler draws with torch.multinomial and torch.randint; here both take the
Philox uniforms of (seed, canvas, step, position, purpose), so that two runs can be compared token by token. Everything
else of transformers is used as it is: its dynamic cache (its static cache and its left padding are no oracle: the first
loses the last canvas key beyond the window, the second counts padding in the positions).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaModel

import dgemma_ext as dg
import reference.denoise as reference
from checkpoints import load_transformers
from dgemma_ext.model import Cache
from dgemma_ext.ops.denoise import Purpose

# Since transformers 5.24 methods call their cache so, before past_key_values.
CACHE = "cache" if "cache" in inspect.signature(DiffusionGemmaModel.forward).parameters else "past_key_values"


@dataclass
class Pair:
    """One checkpoint, loaded by both sides."""

    ours: dg.DiffusionGemma
    theirs: Any
    directory: Path


def load_pair(directory: Path, dtype: torch.dtype, text_only: bool = False) -> Pair:
    theirs = load_transformers(directory, dtype, text_only=text_only)
    return Pair(dg.DiffusionGemma.from_pretrained(directory, device="cpu", dtype=dtype), theirs, directory)


# The two passes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    model: Any, ids: torch.Tensor, cache: DynamicCache | None = None, spans: Sequence[tuple[int, int]] = ()
) -> DynamicCache:
    """Appends ids [1, T] to a dynamic cache at once, as generate does for a prompt; spans are image tokens."""
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1])[None]
    kinds = torch.zeros_like(ids)
    for first, last in spans:
        kinds[0, first:last] = 1
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(*ids.shape, 0, dtype=model.dtype),
        attention_mask=torch.ones(1, start + ids.shape[1], dtype=torch.bool),
        position_ids=positions,
        mm_token_type_ids=kinds if spans else None,
        **{CACHE: cache},
    )
    model.model.encoder(input_ids=ids, position_ids=positions, attention_mask=masks, **{CACHE: cache})
    return cache


@torch.no_grad()
def denoise(
    model: Any, canvas: torch.Tensor, cache: DynamicCache, self_conditioning: torch.Tensor | None = None
) -> torch.Tensor:
    """Soft-capped logits, fp32 [1, L, vocabulary]."""
    out = model(decoder_input_ids=canvas, self_conditioning_logits=self_conditioning, **{CACHE: cache})
    logits: torch.Tensor = out.logits
    return logits


def cached(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values [positions, key heads, head dim]; a sliding layer holds the last window - 1."""
    entry = cache.layers[layer]
    return entry.keys[0].transpose(0, 1), entry.values[0].transpose(0, 1)


def cached_ours(cache: Cache, layer: int, slot: int, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The same positions of this package's cache."""
    rows = [position % cache.keys[layer].shape[1] for position in positions]
    return cache.keys[layer][slot, rows], cache.values[layer][slot, rows]


def copy_cache(source: DynamicCache, length: int, target: Cache, slot: int) -> None:
    """Copies transformers' cache of `length` positions to a slot of this package's cache."""
    target.free(slot)
    for layer, (keys, values) in enumerate(zip(target.keys, target.values, strict=True)):
        their_keys, their_values = cached(source, layer)
        count = min(len(their_keys), keys.shape[1])
        rows = [position % keys.shape[1] for position in range(length - count, length)]
        keys[slot, rows] = their_keys[len(their_keys) - count :]
        values[slot, rows] = their_values[len(their_values) - count :]
    target.advance(slot, length)


# Layer by layer -------------------------------------------------------------------------------------------------------


@dataclass
class LayerCall:
    """One call of one layer: its input, its output, and the experts that its router chose."""

    module: Any
    hidden: torch.Tensor
    arguments: dict[str, Any]
    output: torch.Tensor
    expert_ids: torch.Tensor

    @torch.no_grad()
    def exact(self, cache: DynamicCache) -> torch.Tensor:
        """The same layer, inputs and experts in float64 (norms and softmax stay in fp32); `cache` is its prefix."""
        module = copy.deepcopy(self.module).double()
        arguments = dict(self.arguments)
        arguments["position_embeddings"] = tuple(table.double() for table in arguments["position_embeddings"])
        if arguments["attention_mask"] is not None:
            arguments["attention_mask"] = arguments["attention_mask"].double()
        arguments[CACHE] = cache
        with mock.patch.object(module.router, "forward", _router_with(module.router, self.expert_ids)):
            out: torch.Tensor = module(self.hidden.double(), **arguments)
        return out


def _router_with(router: Any, ids: torch.Tensor) -> Any:
    """The router's forward with its choice of experts replaced by `ids`."""
    forward = router.forward

    def forced(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities = forward(hidden)[0]
        chosen = probabilities.gather(1, ids)
        return probabilities, chosen / chosen.sum(-1, keepdim=True) * router.per_expert_scale[ids], ids

    return forced


def double_cache(cache: DynamicCache) -> DynamicCache:
    """A copy of a cache in float64."""
    twin = copy.deepcopy(cache)
    for entry in twin.layers:
        if entry.keys is not None and entry.keys.numel():
            entry.keys, entry.values = entry.keys.double(), entry.values.double()
            entry.dtype = torch.float64
    return twin


@contextlib.contextmanager
def recorded_layers(stack: Any) -> Iterator[list[LayerCall]]:
    """Records every layer call inside the block; `stack` is transformers' decoder or its encoder's language model."""
    calls: list[LayerCall] = []
    chosen: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def before(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.append(arguments[0].clone())

    def after(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: torch.Tensor) -> None:
        calls.append(LayerCall(module, inputs[-1], keywords, output.clone(), chosen[-1]))

    handles = []
    for layer in stack.layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
        handles.append(layer.router.register_forward_hook(lambda module, arguments, output: chosen.append(output[2])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# Draws ----------------------------------------------------------------------------------------------------------------


def uniforms(seed: int, canvas: int, step: int, purpose: Purpose, length: int) -> torch.Tensor:
    """The uniforms of positions 0 .. length - 1, float64 [length] in [0, 1)."""
    draws = [reference.uniform(seed, canvas, step, position, int(purpose)) for position in range(length)]
    return torch.tensor(draws, dtype=torch.float64)


def inverse_cdf(probabilities: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry whose cumulative mass exceeds draw * total, and the draw's distance from the next boundary.

    probabilities [..., vocabulary], draws float64 [...]; sums in float64; the distance is a share of the total.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[..., -1:]
    target = draws[..., None] * total
    distance = ((cumulative[..., :-1] - target).abs().amin(-1, keepdim=True) / total)[..., 0]
    return (cumulative <= target).sum(-1), distance


# Generation -----------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Sampler settings for both sides."""

    max_denoising_steps: int = 8
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_ids: tuple[int, ...] = ()

    def ours(self) -> dg.SamplerConfig:
        return dg.SamplerConfig(**vars(self))

    def theirs(self, max_new_tokens: int) -> Any:
        values = {name: value for name, value in vars(self).items() if name not in ("entropy_bound", "eos_token_ids")}
        return generation.DiffusionGemmaGenerationConfig(
            **values,
            max_new_tokens=max_new_tokens,
            sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=self.entropy_bound),
            # transformers would fill an empty list from the checkpoint's file: -1 is no token.
            eos_token_id=list(self.eos_token_ids) or [-1],
            pad_token_id=0,
        )


@dataclass
class Trace:
    """A generation: the kept tokens, and for every canvas its steps in order."""

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[list[bool]] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def outcome(self) -> dict[str, Any]:
        """The values that are equal when two runs are the same generation."""
        return {name: getattr(self, name) for name in ("steps", "accepted", "drafts", "tokens", "finish_reason")}


@dataclass
class OracleTrace(Trace):
    """A generation of transformers, with its distance from another outcome."""

    tokens_per_forward: float = 0.0
    top_two_gap: float = math.inf  # the least distance of the two largest logits, as a share of the largest magnitude
    draw_margin: float = math.inf  # the least distance of a draw from the boundary of two tokens
    bound_margin: float = math.inf  # the least distance of a summed entropy from the entropy bound
    confidence_margin: float = math.inf  # the least distance of a mean entropy from the threshold

    @property
    def well_conditioned(self) -> bool:
        """Whether rounding cannot have decided anything."""
        return self.top_two_gap >= 1e-3 and min(self.draw_margin, self.bound_margin, self.confidence_margin) >= 1e-5


class _Recorder(generation.LogitsProcessor):
    """A logits processor that records every step and changes nothing."""

    def __init__(self, trace: OracleTrace) -> None:
        self.trace = trace

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, cur_step: Any) -> torch.Tensor:
        top = scores.topk(2, dim=-1).values
        gap = float((top[..., 0] - top[..., 1]).min() / scores.abs().max())
        self.trace.top_two_gap = min(self.trace.top_two_gap, gap)
        return scores


class _InjectedSampler(generation.EntropyBoundSampler):  # type: ignore[misc]
    """transformers' sampler with this package's noise and draws."""

    def __init__(self, *arguments: Any, seed: int, settings: Settings, trace: OracleTrace, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seed, self.settings, self.trace = seed, settings, trace
        self.canvas, self.step, self.renoising = -1, 0, False

    def initialize_canvas(self, batch_size: int, device: torch.device) -> torch.Tensor:
        if not self.renoising:
            self.canvas, self.step = self.canvas + 1, 0
            self.trace.steps.append(0)
        purpose = Purpose.RENOISE if self.renoising else Purpose.INITIAL_NOISE
        draws = uniforms(self.seed, self.canvas, self.step, purpose, self.canvas_length)
        return (draws * self.vocab_size).floor().long()[None]

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        self.step += 1
        self.trace.steps[-1] += 1
        draws = uniforms(self.seed, self.canvas, self.step, Purpose.SAMPLE, self.canvas_length)
        tokens, distance = inverse_cdf(probabilities, draws)
        self.trace.draw_margin = min(self.trace.draw_margin, float(distance.min()))
        return tokens[:, None]

    def accept_canvas(self, current: Any, denoised: Any, logits: torch.Tensor, cur_step: Any) -> torch.Tensor:
        accepted: torch.Tensor = super().accept_canvas(current, denoised, logits, cur_step)
        self.trace.accepted.append(self.accepted_token_mask[0].tolist())
        entropy = torch.distributions.Categorical(logits=logits).entropy()[0].double().sort().values
        before = entropy.cumsum(0) - entropy
        # The first position is accepted whatever the bound is.
        margins = (before[1:] - self.settings.entropy_bound).abs()
        self.trace.bound_margin = min(self.trace.bound_margin, float(margins.min()))
        confidence = abs(float(entropy.mean()) - self.settings.confidence_threshold)
        self.trace.confidence_margin = min(self.trace.confidence_margin, confidence)
        return accepted

    def renoise_canvas(self, accepted: torch.Tensor, cur_step: Any) -> torch.Tensor:
        self.renoising = True
        renoised: torch.Tensor = super().renoise_canvas(accepted, cur_step)
        self.renoising = False
        return renoised


class _DraftStreamer:
    def __init__(self, trace: OracleTrace) -> None:
        self.trace = trace

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor) -> None:
        self.trace.drafts.append(value[0].tolist())

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    settings: Settings,
    seed: int,
    canvas: Sequence[int] | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
) -> OracleTrace:
    """transformers' own generate on one prompt, its draws replaced; `canvas` are the tokens of the first canvas, and
    `inputs` what its processor makes of images."""
    trace = OracleTrace()
    config = settings.theirs(max_new_tokens)
    sampler = _InjectedSampler(
        config=config.sampler_config,
        canvas_length=model.config.canvas_length,
        vocab_size=model.config.text_config.vocab_size,
        max_denoising_steps=settings.max_denoising_steps,
        seed=seed,
        settings=settings,
        trace=trace,
    )
    extra = {} if canvas is None else {"decoder_input_ids": torch.tensor([canvas])}
    extra |= inputs or {}
    with (
        mock.patch.object(torch, "multinomial", sampler.multinomial),
        mock.patch.object(model, "_prepare_sampler", return_value=sampler),
    ):
        out = model.generate(
            torch.tensor([prompt]),
            generation_config=config,
            logits_processor=generation.LogitsProcessorList([_Recorder(trace)]),
            streamer=_DraftStreamer(trace),
            **extra,
        )
    answer = out.sequences[0, len(prompt) :].tolist()
    trace.tokens_per_forward = float(out.tokens_per_forward)
    trace.tokens, trace.finish_reason = _kept(answer, max_new_tokens, settings.eos_token_ids)
    return trace


def _kept(answer: list[int], max_new_tokens: int, eos_token_ids: Sequence[int]) -> tuple[list[int], str]:
    """The answer's part of transformers' whole canvases, which are padded after the first end of text."""
    kept = answer[:max_new_tokens]
    ends = [position for position, token in enumerate(kept) if token in eos_token_ids]
    if not ends:
        return kept, "length"
    assert all(token == 0 for token in answer[ends[0] + 1 :]), "tokens after the end of text are not padding"
    return kept[: ends[0] + 1], "eos"


def generate_ours(
    model: dg.DiffusionGemma,
    prompt: Any,
    max_new_tokens: int,
    settings: Settings,
    seed: int,
    canvas: dg.Canvas | None = None,
) -> Trace:
    """This package's generate, step by step."""
    trace = Trace()
    for event in model.stream(prompt, max_new_tokens, settings.ours(), seed, canvas):
        if isinstance(event, dg.Draft):
            trace.drafts.append(list(event.token_ids))
            trace.accepted.append(event.accepted.tolist())
        else:
            trace.tokens += event.token_ids
            trace.steps.append(event.denoising_steps)
            trace.finish_reason = event.finish_reason or ""
    return trace
