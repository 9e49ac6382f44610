"""Tokens that a canvas's first step encodes: the same bits as an encode pass before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dgemma_ext as dg
from backend import DTYPES
from dgemma_ext import _C, SamplerConfig
from dgemma_ext.engine import scheduler as scheduler_module
from dgemma_ext.model import MatmulMode, PrefillChunk, resolve_matmul
from dgemma_ext.model import forward as forward_module
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.sampling import begin_canvas, denoising_step, make_canvas_batch, make_step_buffers
from models import head_input, random_model

# The default model of the tests has windows of 16 and canvases of 8.
WINDOW, LENGTH = 16, 8
SAMPLER = SamplerConfig(max_denoising_steps=4, confidence_threshold=4.0, entropy_bound=6.0, t_max=0.1, t_min=0.01)


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 512, (1, count), generator=torch.Generator().manual_seed(seed))


def slot_of(cache: dg.Cache, slot: int) -> list[torch.Tensor]:
    saved = cache.snapshot(slot)
    return [*saved.keys, *saved.values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 3, WINDOW - 1, WINDOW, 41])
@pytest.mark.parametrize("count", [1, LENGTH, WINDOW - 1, WINDOW + 1, 37])
def test_one_pass_gives_what_two_give(prefix: int, count: int, dtype: torch.dtype) -> None:
    model = random_model(dtype)
    assert model.config.layers[0].sliding_window == WINDOW
    assert model.config.canvas_length == LENGTH
    cache, more, canvas = model.new_cache(2, 128), ids(count, 1), ids(LENGTH, 2)
    soft = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    if prefix:
        for slot in range(2):
            model.encode(ids(prefix, 4), cache, slots=[slot])
    model.encode(more, cache, slots=[0])
    expected = head_input(model, canvas, cache, 0, soft)
    actual = head_input(model, canvas, cache, 1, soft, appended=more)
    assert torch.equal(actual, expected)
    assert cache.length(1) == cache.length(0) == prefix + count
    for one, other in zip(slot_of(cache, 1), slot_of(cache, 0), strict=True):
        assert torch.equal(one, other)
    # The next pass sees the appended positions.
    assert torch.equal(head_input(model, canvas, cache, 1, soft), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_join_with_their_tokens(dtype: torch.dtype) -> None:
    """Two requests join, one with more than a window; one is in the middle of its canvas; a row has no request."""
    model = random_model(dtype)
    cache, apart = model.new_cache(4, 128), model.new_cache(4, 128)
    resolved = SAMPLER.resolve(model.defaults, LENGTH)
    waiting = {0: ids(5, 10), 2: ids(WINDOW + 3, 12)}
    batches = []
    for which in (cache, apart):
        batch, buffers = make_canvas_batch(model.network, 4, LENGTH), make_step_buffers(model.network, 4, LENGTH)
        model.encode(ids(7, 11), which, slots=[1])
        model.encode(ids(WINDOW, 13), which, slots=[2])
        for row in (1, 0, 2):
            if which is apart and row in waiting:
                model.encode(waiting[row], which, slots=[row])
            prefix = which.length(row) + (waiting[row].shape[1] if which is cache and row in waiting else 0)
            tables = model.network.rotary_tables(torch.arange(prefix, prefix + LENGTH))
            begin_canvas(model.network, batch, row, resolved, seed=row, index=0)
            batch.place(row, row, prefix, tables)
            if row == 1:
                denoising_step(model.network, which, batch, buffers)
        batches.append((batch, buffers))
    chunks = [PrefillChunk(slot, tokens[0]) for slot, tokens in waiting.items()]
    denoising_step(model.network, cache, *batches[0], chunks)
    denoising_step(model.network, apart, *batches[1])
    for _ in range(2):
        for name in ("canvas", "draft", "entropy", "step", "soft_embedding"):
            one, other = (getattr(batch.state, name)[:3] for batch, _ in batches)
            assert torch.equal(one, other), name
        for slot in range(3):
            assert all(map(torch.equal, slot_of(cache, slot), slot_of(apart, slot)))
        denoising_step(model.network, cache, *batches[0])
        denoising_step(model.network, apart, *batches[1])
    assert batches[0][0].state.step.tolist() == [4, 5, 4, 0]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("most", [0, 12, 1024])
def test_a_short_prompt_needs_no_encode_pass(batched: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`most`: the tokens that a step may encode; with 0 every chunk has its own pass, as the expected answers do."""
    model = random_model()
    prompts = [ids(count, count)[0].tolist() for count in (3, 12, 13)]
    passes, original = [], model.network.encode

    def counted(tokens: torch.Tensor, *rest: object, **more: object) -> None:
        passes.append(tokens.shape[1])
        original(tokens, *rest, **more)  # type: ignore[arg-type]

    def answers() -> list[dg.Output]:
        scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=batched)
        requests = [scheduler.submit(p, 20, SAMPLER, seed) for seed, p in enumerate(prompts)]
        while not scheduler.idle:
            scheduler.finish_canvas()
        return [request.output for request in requests]

    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", 0)
    expected = answers()
    monkeypatch.setattr(model.network, "encode", counted)
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", most)
    assert answers() == expected
    assert all(len(output.denoising_steps) == 3 for output in expected), "each commits two canvases"
    if most == 0:
        assert sorted(passes) == sorted([3, 12, 13] + 6 * [LENGTH])
    elif most == 1024:
        assert passes == []
    elif batched:
        assert passes[:2] == [12, 13], "what does not fit beside the first request's three"
    else:
        assert passes == [13]


@pytest.mark.parametrize("batched", [False, True])
def test_tokens_that_a_step_encodes_go_to_the_prefix_cache(batched: bool) -> None:
    model = random_model()
    scheduler = dg.Scheduler(model, max_batch=1, max_length=100, batched=batched, prefix_cache_bytes=1 << 30)
    store = scheduler.prefix_cache
    assert store is not None
    prompt = ids(9, 5)[0].tolist()
    request = scheduler.submit(prompt, 12, SAMPLER, 0)
    while not scheduler.idle:
        scheduler.step()
    canvas = list(request.output.token_ids[:LENGTH])
    for known, length in ((prompt, 9), (prompt + canvas, 9 + LENGTH)):
        saved = store.longest_prefix(known)
        assert saved is not None
        cache = model.new_cache(1, 100)
        for part in (known[:9], known[9:]):
            if part:
                model.encode(torch.tensor([part]), cache)
        assert saved.length == length
        assert all(map(torch.equal, [*saved.keys, *saved.values], slot_of(cache, 0)))


def test_a_request_that_is_cancelled_leaves_nothing_to_encode() -> None:
    model = random_model()
    alone = model.generate(ids(6, 1)[0].tolist(), 8, SAMPLER, 1)
    scheduler = dg.Scheduler(model, max_batch=2, max_length=100, batched=True)
    kept = scheduler.submit(ids(6, 1)[0].tolist(), 8, SAMPLER, 1)
    gone = scheduler.submit(ids(4, 2)[0].tolist(), 20, SAMPLER, 2)
    while len(gone.denoising_steps) < 2:
        scheduler.finish_canvas()
    gone.cancel()
    (group,) = scheduler._groups.values()
    assert group.num_prefill == 0
    while not scheduler.idle:
        scheduler.step()
    assert kept.output == alone
    assert scheduler.cache.length(0) == scheduler.cache.length(1) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_products_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`batch_invariant`: one product for the rows of all requests, in which a row's bits do not depend on others."""
    model = random_model(dtype)
    prompts = [ids(count, count)[0].tolist() for count in (3, 12, 13)]
    rows: list[int] = []
    product = grouped_gemm.dense

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[0])
        return product(x, weight)

    monkeypatch.setattr(grouped_gemm, "dense", counted)
    monkeypatch.setattr(model.network.options, "matmul", MatmulMode.INVARIANT)
    alone = [model.generate(prompt, 20, SAMPLER, seed) for seed, prompt in enumerate(prompts)]
    del rows[:]
    scheduler = dg.Scheduler(model, max_batch=3, max_length=100, batched=True)
    requests = [scheduler.submit(prompt, 20, SAMPLER, seed) for seed, prompt in enumerate(prompts)]
    while not scheduler.idle:
        scheduler.finish_canvas()
    assert [request.output for request in requests] == alone
    # Three canvases in four rows, and the prompts with the first step.
    assert max(rows) == 4 * LENGTH + 3 + 12 + 13


@pytest.mark.parametrize("mode", MatmulMode)
def test_attention_looks_at_the_batch_where_products_do(mode: MatmulMode, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(torch.bfloat16)
    attention, seen = forward_module.canvas_attention, set[bool]()

    def watched(*operands: Any, batch_invariant: bool, **keywords: Any) -> torch.Tensor:
        seen.add(batch_invariant)
        return attention(*operands, batch_invariant=batch_invariant, **keywords)

    wanted = model.generate([3, 4, 5], 4, SAMPLER, 0)
    monkeypatch.setattr(forward_module, "canvas_attention", watched)
    monkeypatch.setattr(model.network.options, "matmul", mode)
    found = model.generate([3, 4, 5], 4, SAMPLER, 0)
    assert seen == {mode is not MatmulMode.BATCHED}
    if mode is not MatmulMode.INVARIANT:
        assert found == wanted, "on a CPU the operators and products are the same"


def test_a_gpu_that_cannot_be_batch_invariant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for invariant in (False, True):
        assert resolve_matmul(invariant, cpu, torch.float32) is MatmulMode.PER_REQUEST
    assert resolve_matmul(False, cuda, torch.float32) is MatmulMode.BATCHED
    with pytest.raises(ValueError, match=r"batch_invariant on a GPU is for dtype bfloat16, got torch.float32"):
        resolve_matmul(True, cuda, torch.float32)
    monkeypatch.setattr(_C, "has_cuda", lambda: False)
    with pytest.raises(ValueError, match="needs a build with CUDA kernels"):
        resolve_matmul(True, cuda, torch.bfloat16)
    monkeypatch.setattr(_C, "has_cuda", lambda: True)
    assert resolve_matmul(True, cuda, torch.bfloat16) is MatmulMode.INVARIANT
