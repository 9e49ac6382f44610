"""Both passes against transformers: fp32 logits and caches of whole models, bf16 layer by layer.

Whole random models amplify rounding (transformers' own sdpa and eager differ by more than this package and eager do),
so bf16 is compared one layer at a time, each with transformers' input, cache and experts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
import transformers_oracle as oracle
from bounds import relative_distance
from checkpoints import FULL, SLIDING, make_checkpoint
from dgemma_ext.model import Network, PrefillChunk, matmul
from dgemma_ext.model.rows import Rows
from dgemma_ext.ops import router
from dgemma_ext.ops.layer import rms_norm
from dgemma_ext.ops.plain import router as router_plain
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from models import canvas_rows, first_input, layer_alone
from transformers_oracle import Pair, load_pair
from transformers_releases import OLDER, run_under

# Largest difference, as a share of the largest magnitude in the reference; ten times the worst seen (5e-6).
FP32_BOUND = 5e-5
# The bound on 1 - 2<x,y> / (|x|^2 + |y|^2) of a layer's output.
BF16_DISTANCE = 5e-4
# The most that our error may exceed transformers' own.
OWN_ERRORS = 2.0

# The square root of 96 is 9.798, which bf16 rounds to 9.8125: a scale left unrounded shows.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "flat": dict(hidden=96, vocabulary=300, window=16, canvas=8, dtype=torch.float32, seed=1),
    "per_layer": dict(
        dialect="per_layer",
        layers=[SLIDING, FULL, SLIDING, SLIDING, FULL],
        hidden=96,
        heads=6,
        kv_heads=3,
        global_kv_heads=2,
        head_dim=16,
        global_head_dim=48,
        experts=12,
        top_k=3,
        vocabulary=384,
        window=12,
        canvas=16,
        softcap=20.0,
        partial_rotary_factor=0.5,
        shards=3,
        dtype=torch.bfloat16,
        seed=2,
    ),
}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """pair_of(name, dtype): a checkpoint loaded by both sides, made once."""

    @functools.cache
    def folder(name: str) -> Path:
        return make_checkpoint(tmp_path_factory.mktemp(name), with_tokenizer=False, **CHECKPOINTS[name])

    @functools.cache
    def pair(name: str, dtype: torch.dtype) -> Pair:
        return load_pair(folder(name), dtype)

    return pair


def random_ids(pair: Pair, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, pair.ours.config.vocab_size, (1, count), generator=generator)


def window_of(pair: Pair) -> int:
    return max(layer.sliding_window for layer in pair.ours.config.layers)


def assert_within(actual: torch.Tensor, wanted: torch.Tensor, what: str, bound: float = FP32_BOUND) -> None:
    assert actual.shape == wanted.shape, f"{what}: {list(actual.shape)}, wanted {list(wanted.shape)}"
    worst = float((actual - wanted).abs().max() / wanted.abs().max())
    assert worst <= bound, f"{what}: off by {worst:.2e} of the largest magnitude"


def assert_same_cache(pair: Pair, ours: dg.Cache, slot: int, theirs: Any, bound: float = FP32_BOUND) -> None:
    """Our cache has every position of transformers' cache, with the same keys and values."""
    length = ours.length(slot)
    assert length == theirs.get_seq_length()
    for layer in pair.ours.config.layers:
        keys, values = oracle.cached(theirs, layer.index)
        assert len(keys) == (min(length, layer.sliding_window - 1) if layer.is_sliding else length)
        kept = oracle.cached_ours(ours, layer.index, slot, range(length - len(keys), length))
        assert_within(kept[0], keys, f"keys of layer {layer.index}", bound)
        assert_within(kept[1], values, f"values of layer {layer.index}", bound)


# Prompt lengths relative to the window: the first is one token, the last three and a half windows.
PREFIXES = {
    "one token": lambda window: 1,
    "below": lambda window: window // 2,
    "window - 2": lambda window: window - 2,
    "window - 1": lambda window: window - 1,
    "window": lambda window: window,
    "window + 1": lambda window: window + 1,
    "far above": lambda window: 3 * window + window // 2,
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_passes(pair_of: Any, name: str, prefix: str) -> None:
    """A prompt and two canvases: the cache after each, the logits of a first and of a self-conditioned step."""
    pair = pair_of(name, torch.float32)
    length = pair.ours.config.canvas_length
    prompt = random_ids(pair, PREFIXES[prefix](window_of(pair)), 10)
    ours = pair.ours.new_cache(1, prompt.shape[1] + 2 * length)
    theirs = None
    for canvas_index, block in enumerate([prompt, random_ids(pair, length, 11), random_ids(pair, length, 12)]):
        pair.ours.encode(block, ours)
        theirs = oracle.encode(pair.theirs, block, theirs)
        assert_same_cache(pair, ours, 0, theirs)

        canvas = random_ids(pair, length, 20 + canvas_index)
        wanted = oracle.denoise(pair.theirs, canvas, theirs)
        assert_within(pair.ours.denoise(canvas, ours), wanted, f"first step of canvas {canvas_index}")
        conditioned = oracle.denoise(pair.theirs, canvas, theirs, wanted / 0.7)
        assert float((conditioned - wanted).abs().max()) > 0.01, "self-conditioning changes nothing here"
        got = pair.ours.denoise(canvas, ours, self_conditioning=wanted / 0.7)
        assert_within(got, conditioned, f"second step of canvas {canvas_index}")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_sdpa_agrees(pair_of: Any, name: str) -> None:
    """transformers' sdpa attention is as close to ours as its eager one, so the agreement is no accident."""
    pair = pair_of(name, torch.float32)
    sdpa = oracle.load_transformers(pair.directory, torch.float32, attn_implementation="sdpa")
    prompt, canvas = random_ids(pair, 40, 13), random_ids(pair, pair.ours.config.canvas_length, 14)
    cache = pair.ours.new_cache(1, 40)
    pair.ours.encode(prompt, cache)
    wanted = oracle.denoise(sdpa, canvas, oracle.encode(sdpa, prompt))
    assert_within(pair.ours.denoise(canvas, cache), wanted, "logits")


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("beyond_window", [-1, 0, 1, -1000, 1000])
def test_fp32_chunks(pair_of: Any, name: str, beyond_window: int) -> None:
    """A prompt encoded in pieces leaves the same cache as transformers leaves for the whole."""
    pair = pair_of(name, torch.float32)
    prompt = random_ids(pair, 3 * window_of(pair) + 5, 15)
    chunk = min(max(1, window_of(pair) + beyond_window), prompt.shape[1])
    cache = pair.ours.new_cache(1, prompt.shape[1])
    pair.ours.encode(prompt, cache, chunk=chunk)
    theirs = oracle.encode(pair.theirs, prompt)
    assert_same_cache(pair, cache, 0, theirs)
    canvas = random_ids(pair, pair.ours.config.canvas_length, 16)
    assert_within(pair.ours.denoise(canvas, cache), oracle.denoise(pair.theirs, canvas, theirs), "logits")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_batch_rows(pair_of: Any, name: str) -> None:
    """Rows of a batch, prompts of several lengths in mixed slots, against transformers alone on each."""
    pair = pair_of(name, torch.float32)
    window, length = window_of(pair), pair.ours.config.canvas_length
    counts = [1, window - 1, 2 * window + 3, window]
    slots = [3, 0, 4, 1]
    ids = torch.cat([random_ids(pair, max(counts), 30 + row) for row in range(len(counts))])
    canvas = torch.cat([random_ids(pair, length, 40 + row) for row in range(len(counts))])
    cache = pair.ours.new_cache(5, max(counts))
    pair.ours.encode(ids, cache, slots=slots, lengths=counts)
    first = pair.ours.denoise(canvas, cache, slots=slots)
    second = pair.ours.denoise(canvas, cache, slots=slots, self_conditioning=first * 1.5)
    for row, (count, slot) in enumerate(zip(counts, slots, strict=True)):
        theirs = oracle.encode(pair.theirs, ids[row : row + 1, :count])
        assert_same_cache(pair, cache, slot, theirs)
        wanted = oracle.denoise(pair.theirs, canvas[row : row + 1], theirs)
        assert_within(first[row : row + 1], wanted, f"row {row}")
        conditioned = oracle.denoise(pair.theirs, canvas[row : row + 1], theirs, first[row : row + 1] * 1.5)
        assert_within(second[row : row + 1], conditioned, f"row {row}, self-conditioned")


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("chunk", [4096, 16])
def test_fp32_spans(pair_of: Any, name: str, chunk: int) -> None:
    """Image tokens all see each other, on layers of both kinds, in transformers' generate and here."""
    pair = pair_of(name, torch.float32)
    window, spans = window_of(pair), [(3, 9), (20, 20 + 8)]
    prompt = random_ids(pair, 2 * window + 15, 17)
    plain, cache = (pair.ours.new_cache(1, prompt.shape[1]) for _ in range(2))
    pair.ours.encode(prompt, plain)
    pair.ours.encode(prompt, cache, bidirectional_spans=[spans], chunk=chunk)
    theirs = oracle.encode(pair.theirs, prompt, spans=spans)
    assert_same_cache(pair, cache, 0, theirs)
    # The first layer's keys do not depend on attention; the last layer's do.
    assert float((plain.keys[-1] - cache.keys[-1]).abs().max()) > 0.01


# bf16 -----------------------------------------------------------------------------------------------------------------


def assert_as_good(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """Asserts that the result is close to the exact one, with at most twice transformers' mean and largest error."""
    exact = exact.double()
    error, own_error = ours.double() - exact, theirs.double() - exact
    distance = relative_distance(ours.double(), exact)
    assert distance <= BF16_DISTANCE, f"{what}: 1 - 2<x,y>/(|x|^2+|y|^2) is {distance:.2e}"
    for name, size in (("norm", torch.Tensor.norm), ("worst", lambda error: error.abs().max())):
        ratio = float(size(error) / size(own_error))
        assert ratio <= OWN_ERRORS, f"{what}: the {name} of the error is {ratio:.2f} times transformers' own"


def with_experts(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes our layers use these experts, weighted by our own router."""

    def route(
        _: matmul.Matmul,
        residual: torch.Tensor,
        scale: torch.Tensor,
        projection: torch.Tensor,
        per_expert: torch.Tensor,
        *rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = router_plain.probabilities(residual, scale, projection, rest[1])
        return ids.to(torch.int32), router_plain.weights_of(probabilities, ids, per_expert)

    monkeypatch.setattr(matmul.Matmul, "route", route)


def chunk_rows(network: Network, cache: dg.Cache, ids: torch.Tensor) -> Rows:
    """The rows of an encode pass of ids [1, n] into slot 0."""
    return Rows.describe(None, [PrefillChunk(0, ids[0])], cache, network.config, network.dtype)


def assert_same_experts(pair: Pair, call: oracle.LayerCall, residual: torch.Tensor, layer: int) -> None:
    """Our choice is transformers', up to experts whose probabilities differ by one rounding of the score."""
    weights = pair.ours.weights.layers[layer]
    epsilon, top_k = pair.ours.config.rms_norm_eps, pair.ours.config.top_k_experts
    operands = (weights.router_scale, weights.router_proj)
    ids, _ = router.route(residual, *operands, weights.router_per_expert_scale, top_k, epsilon)
    probabilities = router_plain.probabilities(residual, *operands, epsilon)
    chosen = probabilities.gather(1, ids.long()).sort(-1).values
    wanted = probabilities.gather(1, call.expert_ids).sort(-1).values
    # Scores below 16 have half a unit in the last place of 2^-5, which the exponential turns into a ratio.
    torch.testing.assert_close(chosen, wanted, rtol=2.0**-5, atol=0)


@pytest.mark.parametrize("prefix", ["below", "window - 1", "window + 1", "far above"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_decoder_layers(pair_of: Any, name: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(name, torch.bfloat16)
    length = pair.ours.config.canvas_length
    prompt = random_ids(pair, PREFIXES[prefix](window_of(pair)), 50)
    theirs = oracle.encode(pair.theirs, prompt)
    exact_cache = oracle.double_cache(theirs)
    cache = pair.ours.new_cache(1, prompt.shape[1] + length)
    oracle.copy_cache(theirs, prompt.shape[1], cache, 0)
    with oracle.recorded_layers(pair.theirs.model.decoder) as calls:
        oracle.denoise(pair.theirs, random_ids(pair, length, 51), theirs)
    network = pair.ours.network
    rows = canvas_rows(network, cache, random_ids(pair, length, 51))
    for call, layer in zip(calls, network.config.layers, strict=True):
        table = rows.rotary[layer.rope, layer.head_dim]
        for ours, wanted in zip(table, call.arguments["position_embeddings"], strict=True):
            assert torch.equal(ours[None], wanted), f"rotary tables of layer {layer.index}"
        with_experts(call.expert_ids, monkeypatch)
        got = layer_alone(network, cache, rows, call.hidden, layer.index)
        assert_as_good(got, call.output, call.exact(exact_cache), f"layer {layer.index}")


@pytest.mark.parametrize("prefix", ["below", "window - 1", "window + 1", "far above"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_encoder_layers(pair_of: Any, name: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one and a half windows after a prefix: each layer's output and the keys and values it leaves."""
    pair = pair_of(name, torch.bfloat16)
    window = window_of(pair)
    before, count = PREFIXES[prefix](window), window + window // 2
    theirs = oracle.encode(pair.theirs, random_ids(pair, before, 60))
    exact_cache = oracle.double_cache(theirs)
    cache = pair.ours.new_cache(1, before + count)
    oracle.copy_cache(theirs, before, cache, 0)
    with oracle.recorded_layers(pair.theirs.model.encoder.language_model) as calls:
        oracle.encode(pair.theirs, random_ids(pair, count, 61), theirs)
    network = pair.ours.network
    rows = chunk_rows(network, cache, random_ids(pair, count, 61))
    for call, layer in zip(calls, network.config.layers, strict=True):
        with_experts(call.expert_ids, monkeypatch)
        got = layer_alone(network, cache, rows, call.hidden, layer.index)
        assert_as_good(got, call.output, call.exact(exact_cache), f"layer {layer.index}")
        wanted = oracle.cached(theirs, layer.index)
        positions = range(before + count - len(wanted[0]), before + count)
        kept = oracle.cached_ours(cache, layer.index, 0, positions)
        exact = oracle.cached(exact_cache, layer.index)
        for which, ours, rounded, precise in zip(("keys", "values"), kept, wanted, exact, strict=True):
            # Earlier positions of the cache are the same on all sides; only the block's rows have an error.
            new = slice(max(0, len(rounded) - count), None)
            assert_as_good(ours[new], rounded[new], precise[new], f"{which} of layer {layer.index}")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_router(pair_of: Any, name: str) -> None:
    """Our router chooses transformers' experts for the input of transformers' router."""
    pair = pair_of(name, torch.bfloat16)
    seen: list[torch.Tensor] = []
    handles = [
        layer.router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
        for layer in pair.theirs.model.encoder.language_model.layers
    ]
    with oracle.recorded_layers(pair.theirs.model.encoder.language_model) as calls:
        oracle.encode(pair.theirs, random_ids(pair, 64, 70))
    for handle in handles:
        handle.remove()
    for index, (call, residual) in enumerate(zip(calls, seen, strict=True)):
        assert_same_experts(pair, call, residual, index)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_ends(pair_of: Any, name: str) -> None:
    """The parts before the first layer and after the last: embedding, self-conditioning, final norm, head, cap."""
    pair = pair_of(name, torch.bfloat16)
    length = pair.ours.config.canvas_length
    prompt, canvas = random_ids(pair, 20, 80), random_ids(pair, length, 81)
    theirs = oracle.encode(pair.theirs, prompt)
    with oracle.recorded_layers(pair.theirs.model.encoder.language_model) as calls:
        oracle.encode(pair.theirs, prompt)
    network, cache = pair.ours.network, pair.ours.new_cache(1, 64)
    assert torch.equal(first_input(network, chunk_rows(network, cache, prompt)), calls[0].hidden)

    with oracle.recorded_layers(pair.theirs.model.decoder) as calls:
        logits = oracle.denoise(pair.theirs, canvas, theirs)
        conditioned = oracle.denoise(pair.theirs, canvas, theirs, (logits / 0.7).bfloat16())
    first, last, first_conditioned = calls[0], calls[len(calls) // 2 - 1], calls[len(calls) // 2]
    assert torch.equal(first_input(network, canvas_rows(network, cache, canvas)), first.hidden)
    weights = pair.ours.weights
    normed = rms_norm(last.output, weights.norm, pair.ours.config.rms_norm_eps)
    raw, _ = vocabulary_head(normed, weights.embed_tokens, 0.0, torch.ones(1))
    cap = pair.ours.config.final_logit_softcapping
    assert torch.equal(torch.tanh(raw.float() / cap) * cap, logits)

    soft = network.soft_embedding_of_logits(logits / 0.7)
    exact = load_pair(pair.directory, torch.float32).ours.network
    exact_soft = exact.soft_embedding_of_logits((logits / 0.7).bfloat16().float())
    exact_cache = exact.new_cache(1, 64)
    wanted = first_input(exact, canvas_rows(exact, exact_cache, canvas, exact_soft))
    got = first_input(network, canvas_rows(network, cache, canvas, soft))
    assert_as_good(got, first_conditioned.hidden, wanted, "self-conditioned input")
    assert not torch.equal(conditioned, logits)


# Other releases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", OLDER)
def test_older_releases(release: str) -> None:
    """transformers is the arbiter here: of an older release a few cases show that it still is."""
    run_under(release, Path(__file__), keywords="fp32_sdpa or bf16_router")
