"""Answers drawn by a step's operators from given logits, canvas after canvas, as the engine draws them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import dgemma_ext as dg
from automaton_cases import step
from dgemma_ext.engine.matching import matching_of
from dgemma_ext.ops import denoise
from dgemma_ext.sampling import Constraint, resolve_sampler
from models import random_model

# Positions of a canvas, few enough that answers have several.
CANVAS = 24
Logits = Callable[[np.random.Generator, int, int], np.ndarray]


def tokenizer() -> dg.Tokenizer:
    """One whose chat template lets a model think."""
    found = random_model().tokenizer
    assert found is not None
    return found


def defaults() -> dg.GenerationDefaults:
    return random_model().defaults


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, special_tokens="tokens")


def marker(text: str) -> int:
    return tokenizer().markers[text]


def flat(random: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    return random.standard_normal((length, vocabulary))


def peaked(random: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    return random.standard_normal((length, vocabulary)) * 12


def hostile(random: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    """Three tokens far above all others, and every special token far below."""
    found = random.standard_normal((length, vocabulary))
    found[:, random.integers(0, vocabulary, 3)] += 60
    found[:, sorted(tokenizer().special_ids)] -= 40
    return found


def answer(
    grammar: dg.Grammar, budget: int, seed: int, logits: Logits, prompt: str = "", drawn: bool = False
) -> list[int]:
    """An answer of at most `budget` tokens up to its end: of each canvas the draft, or with `drawn` the joint draw."""
    size = tokenizer().vocab_size
    sampler = resolve_sampler(dg.SamplerConfig(), defaults(), CANVAS)
    pad = defaults().pad_token_id
    matching = matching_of(grammar, tokenizer(), size, pad, ids_of(prompt), sampler, budget, None)
    random, tokens = np.random.default_rng(seed), list[int]()
    ends = sampler.eos_token_ids
    while len(tokens) < budget and not set(ends) & set(tokens):
        held: Constraint = matching.constraint(len(tokens), CANVAS)
        z = torch.from_numpy(logits(random, CANVAS, size)).float()
        # What is beyond the budget is the text's end alone.
        masks = denoise.pack_allowed([sorted({*ends, *([] if pad is None else [pad])})], size)
        rows = torch.tensor([[0 if len(tokens) + i >= budget else -1 for i in range(CANVAS)]], dtype=torch.int32)
        out = step(
            [held.grammar],
            z[None],
            [held.state],
            [held.tokens_left],
            closing_left=[held.closing_left],
            numbers=[seed],
            allowed=masks.expand(CANVAS, -1).contiguous(),
            allowed_row=rows,
        )
        assert out["matches"].tolist() == [1]
        canvas = out["sampled" if drawn else "argmax"][0].tolist()
        assert matching.follow(canvas)
        tokens += canvas
    tokens = tokens[:budget]
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
