"""A small denoising loop over transformers' model class, for training and for the oracle evaluation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

import puzzles
import tokenizer as sudoku_tokenizer

# Since transformers 5.24 methods call their cache so, before past_key_values.
_CACHE = (
    "cache" if "cache" in inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters else "past_key_values"
)


def prompt_ids(text_tokenizer: Tokenizer, user_text: str) -> list[int]:
    """A user turn through the chat template, ready for the answer."""
    template = ImmutableSandboxedEnvironment().from_string(sudoku_tokenizer.CHAT_TEMPLATE)
    messages = [{"role": "user", "content": user_text}]
    text = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    return text_tokenizer.encode(text, add_special_tokens=False).ids


class _PrefixLayer:
    """Keys and values of one layer."""

    keys: Tensor
    values: Tensor


class Prefix:
    """The part of transformers' cache interface that one encoder pass and its decoder passes use.

    Sliding layers keep the last `window - 1` positions, as transformers' dynamic cache does; gradients flow through.
    """

    is_compileable = False

    def __init__(self, layer_types: list[str], window: int, length: int) -> None:
        self.layers = [_PrefixLayer() for _ in layer_types]
        self.kept = [window - 1 if kind == "sliding_attention" else length for kind in layer_types]
        self.final_length = length
        self.length = 0  # the encoder counts its positions from here

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        self.layers[layer].keys = keys[:, :, -self.kept[layer] :]
        self.layers[layer].values = values[:, :, -self.kept[layer] :]
        self.length = self.final_length
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def encode(model: DiffusionGemmaForBlockDiffusion, prompts: Tensor) -> Prefix:
    """The causal pass over prompts [B, P] of equal length."""
    config: Any = model.config.text_config
    length = prompts.shape[1]
    prefix = Prefix(config.layer_types, config.sliding_window, length)
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    visible = (ahead >= 0) & (ahead < config.sliding_window)
    causal, sliding = (torch.where(seen, 0.0, -1e9)[None, None] for seen in (ahead >= 0, visible))
    masks = {"full_attention": causal, "sliding_attention": sliding}
    model.model.encoder.language_model(input_ids=prompts, attention_mask=masks, **{_CACHE: prefix})
    return prefix


def denoise(
    model: DiffusionGemmaForBlockDiffusion,
    canvas: Tensor,
    prefix: Prefix,
    self_conditioning: Tensor | None,
    pinned: Tensor | None = None,
) -> Tensor:
    """One bidirectional pass over canvas [B, L]: fp32 logits [B, L, V], soft-capped.

    The soft embedding of pinned positions ([B, L], bool) is zero, as in dgemma_ext.
    """
    decoder = model.model.decoder

    def silence(_: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return inputs[0], inputs[1] if pinned is None else inputs[1].masked_fill(pinned[..., None], 0.0)

    hook = decoder.self_conditioning.register_forward_pre_hook(silence)
    try:
        hidden = decoder(
            decoder_input_ids=canvas,
            self_conditioning_logits=self_conditioning,
            decoder_attention_mask={"full_attention": None, "sliding_attention": None},
            **{_CACHE: prefix},
        ).last_hidden_state
    finally:
        hook.remove()
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden).float() / cap) * cap


def next_canvas(processed: Tensor, entropy_bound: float, frozen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, accepts by the entropy bound, renoises the rest. Returns canvas, argmax [B, L] and entropies [B, L].

    Frozen positions have entropy zero, so they use nothing of the bound.
    """
    logs = processed.float().log_softmax(-1)
    probabilities = logs.exp()
    entropies = -(probabilities * logs).sum(-1)
    if frozen is not None:
        entropies = entropies.masked_fill(frozen, 0.0)
    # Inverse CDF sampling: one uniform number per position.
    thresholds = torch.rand(*processed.shape[:-1], 1)
    sampled = (probabilities.cumsum(-1) < thresholds).sum(-1).clamp(max=processed.shape[-1] - 1)
    ordered, order = entropies.sort(dim=-1, stable=True)
    accepted = (ordered.cumsum(-1) - ordered <= entropy_bound).gather(-1, order.argsort(-1))
    return torch.where(accepted, sampled, torch.randint_like(sampled, processed.shape[-1])), logs.argmax(-1), entropies


@torch.no_grad()
def generate(
    model: DiffusionGemmaForBlockDiffusion, prompts: Tensor, clues: Tensor | None, limit: int = 48
) -> tuple[Tensor, Tensor]:
    """Denoises one canvas per prompt. `clues` [B, L] holds the pinned token ids, -1 where free.

    Returns the drafts [B, L] and the denoising steps each took [B].
    """
    config: Any = model.config
    count, length, vocabulary = prompts.shape[0], config.canvas_length, config.text_config.vocab_size
    frozen = clues >= 0 if clues is not None else torch.zeros(count, length, dtype=torch.bool)

    def pin(canvas: Tensor) -> Tensor:
        return torch.where(frozen, clues, canvas) if clues is not None else canvas

    prefix = encode(model, prompts)
    canvas = pin(torch.randint(vocabulary, (count, length)))
    draft = torch.full_like(canvas, -1)
    steps = torch.zeros(count, dtype=torch.long)
    running = torch.ones(count, dtype=torch.bool)
    processed = None
    for remaining in range(limit, 0, -1):
        logits = denoise(model, canvas, prefix, processed, frozen)
        processed = logits / (0.4 + 0.4 * remaining / limit)
        canvas, argmax, entropies = next_canvas(processed, 0.1, frozen)
        canvas, argmax = pin(canvas), pin(argmax)
        steps += running
        certain = entropies.sum(-1) / (~frozen).sum(-1).clamp(min=1) < 0.005
        stopped = (argmax == draft).all(-1) & certain
        draft = torch.where(running[:, None], argmax, draft)
        running &= ~stopped
        if not running.any():
            break
    return draft, steps


def clue_canvas(text_tokenizer: Tokenizer, puzzle: str) -> list[int]:
    """The clues of a puzzle as canvas tokens, -1 where the canvas is free (blanks and the end of the turn)."""
    tokens: dict[str, int] = text_tokenizer.get_vocab()
    return [-1 if c == puzzles.BLANK else tokens[c] for c in puzzle] + [-1]


def answer_text(text_tokenizer: Tokenizer, draft: list[int]) -> str:
    """The text of a draft up to its end of turn."""
    end = draft.index(106) if 106 in draft else len(draft)
    return text_tokenizer.decode(draft[:end], skip_special_tokens=False)


def solve_rate(
    model: DiffusionGemmaForBlockDiffusion,
    test: list[puzzles.Puzzle],
    pin: bool,
    limit: int = 48,
    batch: int = 64,
) -> tuple[float, float]:
    """The share of puzzles solved and the mean number of denoising steps."""
    text = sudoku_tokenizer.build()
    solved, steps = 0, 0
    for start in range(0, len(test), batch):
        part = test[start : start + batch]
        prompts = torch.tensor([prompt_ids(text, puzzle.text) for puzzle in part])
        clues = torch.tensor([clue_canvas(text, puzzle.text) for puzzle in part]) if pin else None
        drafts, taken = generate(model, prompts, clues, limit)
        steps += int(taken.sum())
        for puzzle, draft in zip(part, drafts.tolist(), strict=True):
            solved += puzzles.check(answer_text(text, draft), puzzle.text)
    return solved / len(test), steps / len(test)
