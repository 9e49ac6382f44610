"""The prefix cache: what it finds and drops, and that no bit of an answer depends on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma_ext as dg
from dgemma_ext import SamplerConfig
from dgemma_ext.engine import PrefixCache
from dgemma_ext.engine import prefix_cache as module
from dgemma_ext.model import Cache, Network, Snapshot
from models import random_model, smallest_model

SAMPLER = SamplerConfig(max_denoising_steps=3, confidence_threshold=4.0, entropy_bound=6.0)
ROOM = 1 << 30


def snapshot(length: int, nbytes: int = 40) -> Snapshot:
    """A snapshot of the given size without meaning."""
    half = torch.zeros(nbytes // 2, dtype=torch.uint8)
    return Snapshot(length, (half,), (half.clone(),))


def storage_bytes(store: PrefixCache) -> int:
    """What the store's tensors take, by their storages."""
    tensors = [t for entry in store._entries.values() for t in (*entry.saved.keys, *entry.saved.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# The store -----------------------------------------------------------------------------------------------------------

few_ids = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    actions=st.lists(st.tuples(st.booleans(), few_ids, st.sampled_from([None, "adapter"])), max_size=25),
    room=st.integers(0, 6),
)
def test_the_store_does_what_a_list_of_prefixes_would(
    actions: list[tuple[bool, list[int], str | None]], room: int
) -> None:
    """Against a plain list: the longest prefix under the same key; who was used longest ago goes first."""
    store = PrefixCache(room * 40)
    plain: list[tuple[str | None, list[int], Snapshot]] = []  # the newest last
    for adds, ids, key in actions:
        if adds:
            saved = snapshot(len(ids))
            store.add(ids, saved, key)
            known = next((entry for entry in plain if entry[:2] == (key, ids)), None)
            if known is not None:
                plain.remove(known)
            plain = [*plain, known or (key, ids, saved)][-room:] if room else []
        else:
            fitting = [entry for entry in plain if entry[0] == key and ids[: len(entry[1])] == entry[1]]
            best = max(fitting, key=lambda entry: len(entry[1]), default=None)
            assert store.longest_prefix(ids, key) is (None if best is None else best[2])
            if best is not None:
                plain.remove(best)
                plain.append(best)
        assert len(store) == len(plain)
        assert store.nbytes == 40 * len(plain) <= store.max_bytes


def test_ids_are_compared_and_not_only_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FACTOR", module.np.uint64(0))  # every prefix of a length has the same hash
    store = PrefixCache(400)
    store.add([1, 2], snapshot(2))
    assert store.longest_prefix([1, 3, 4]) is None
    assert store.longest_prefix([1, 2, 4]) is not None
    store.add([1, 3], snapshot(2))
    assert store.longest_prefix([1, 2, 4]) is None, "the place is taken by the newer one"
    assert store.longest_prefix([1, 3, 4]) is not None
    assert (len(store), store.nbytes) == (1, 40)


def test_a_snapshot_larger_than_the_budget_drops_nothing() -> None:
    store = PrefixCache(100)
    store.add([1], snapshot(1))
    store.add([1, 2], snapshot(2, nbytes=120))
    assert len(store) == 1
    with pytest.raises(ValueError, match="a snapshot of 2 positions cannot stand for 1 ids"):
        store.add([1], snapshot(2))
    store.clear()
    assert (len(store), store.nbytes) == (0, 0)


def test_what_prompts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_SHARED", 2)
    store = PrefixCache(100)
    assert store.shared_length([1, 2, 3, 4], 0) == 0
    assert store.shared_length([1, 2, 3, 4], 0) == 0, "all of it; the snapshot at its end is taken anyway"
    assert store.shared_length([1, 2, 3, 5, 6], 0) == 3
    assert store.shared_length([1, 2, 3, 6, 7], 2) == 0, "too little beyond what is cached"
    assert store.shared_length([1, 2, 3, 6, 7], 0, key="adapter") == 0


# Answers -------------------------------------------------------------------------------------------------------------

models = {
    "small": smallest_model,  # a window of 6
    "bfloat16": lambda: random_model(torch.bfloat16),  # a window of 16
    "blocks": lambda: random_model(window=150, max_positions=1024),  # prompts longer than a block and a tile
}


@cache
def alone(name: str, prompt: tuple[int, ...], length: int, seed: int) -> dg.Output:
    output = models[name]().generate(list(prompt), length, SAMPLER, seed)
    assert isinstance(output, dg.Output)
    return output


def conversations(draw: random.Random, name: str) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Prompts with few beginnings, and turns that go on from answers, as (ids, most new tokens, seed)."""
    longest = {"small": 12, "bfloat16": 40, "blocks": 300}[name]
    beginnings = [[draw.randrange(300) for _ in range(draw.randrange(1, longest))] for _ in range(3)]
    for index in range(8):
        ids = list(draw.choice(beginnings))[: draw.randrange(1, longest)]
        for _ in range(draw.randrange(1, 4)):
            ids += [draw.randrange(300) for _ in range(draw.randrange(4))]
            yield tuple(ids), draw.choice([3, 8, 20]), index % 3
            ids += alone(name, tuple(ids), 8, 0).token_ids


@pytest.mark.parametrize(
    ("name", "seeds"), [("small", range(5)), ("bfloat16", range(2)), ("blocks", range(1))], ids=list(models)
)
@pytest.mark.parametrize("budget", ["tiny", "large"])
def test_answers_are_the_same_bits_with_any_budget(
    name: str, seeds: range, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chats of several turns and shared beginnings in any order and batch, sliding rings that have gone round, budgets
    that hold few snapshots, and prompts that are encoded by passes of their own."""
    model, hits = models[name](), 0
    monkeypatch.setattr(module, "_LEAST_SHARED", 2)
    most = 400 if name == "blocks" else 60
    size = model.new_cache(1, most).nbytes
    for seed in seeds:
        draw = random.Random(seed)
        monkeypatch.setattr("dgemma_ext.engine.scheduler.MAX_PREFILL_TOKENS", draw.choice([0, 10, 1024]))
        scheduler = dg.Scheduler(
            model,
            draw.randrange(1, 4),
            most,
            batched=draw.random() < 0.5,
            prefix_cache_bytes=2 * size // 3 if budget == "tiny" else ROOM,
        )
        asked = list(conversations(draw, name))
        draw.shuffle(asked)
        asked = [one for one in asked if len(one[0]) + one[1] <= most]
        requests = []
        for prompt, length, one_seed in asked:
            requests.append(scheduler.submit(list(prompt), length, SAMPLER, one_seed))
            for _ in range(draw.randrange(3)):
                scheduler.step()
        while not scheduler.idle:
            scheduler.step()
        for one, request in zip(asked, requests, strict=True):
            assert request.output == alone(name, *one)
            assert 0 <= request.cached_tokens <= len(one[0])
        hits += sum(request.cached_tokens > 0 for request in requests)
        store = scheduler.prefix_cache
        assert store is not None
        assert store.nbytes == storage_bytes(store) <= store.max_bytes
    assert hits > 0


@pytest.mark.parametrize("row", [0, 3])
def test_a_ring_that_is_restored_with_one_wrong_row_shows(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is one that fails where the cache's content is wrong."""
    model = smallest_model()
    restore = Cache.restore

    def wrong(self: Cache, slot: int, saved: Snapshot) -> None:
        restore(self, slot, saved)
        self.values[0][slot, row] = self.values[0][slot, (row + 1) % 5]

    monkeypatch.setattr(Cache, "restore", wrong)
    differ = 0
    for seed in range(6):
        draw = random.Random(seed)
        prompt = tuple(draw.randrange(300) for _ in range(12))
        scheduler = dg.Scheduler(model, 1, 60, prefix_cache_bytes=ROOM)
        for _ in range(2):
            request = scheduler.submit(list(prompt), 20, SAMPLER, seed)
            while not scheduler.idle:
                scheduler.step()
        assert request.cached_tokens == 12
        differ += request.output != alone("small", prompt, 20, seed)
    assert differ


# What is encoded -----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that passes encode."""
    counts: list[int] = []
    forward = Network.forward

    def counting(self: Network, cache: Cache, canvases: object, chunks: tuple[list[int], ...] = ()) -> object:
        counts.extend(map(len, chunks))
        return forward(self, cache, canvases, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(Network, "forward", counting)
    return counts


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("max_batch", [1, 2, 6])
def test_n_answers_to_a_prompt_encode_it_once(max_batch: int, batched: bool, encoded: list[int]) -> None:
    model, prompt = random_model(), list(range(3, 33))
    scheduler = dg.Scheduler(model, max_batch, 100, batched=batched, prefix_cache_bytes=ROOM)
    requests = [scheduler.submit(prompt, 8, SAMPLER, seed) for seed in range(5)]
    longer = scheduler.submit([*prompt, 7, 8], 8, SAMPLER, 0)
    while not scheduler.idle:
        scheduler.step()
    assert encoded == [30, 2]
    assert sorted(request.cached_tokens for request in requests) == [0, 30, 30, 30, 30]
    assert longer.output.cached_tokens == 30
    for seed, request in enumerate(requests):
        assert request.output == model.generate(prompt, 8, SAMPLER, seed)


def test_a_beginning_that_prompts_share_is_encoded_twice_at_most(encoded: list[int]) -> None:
    """The second prompt shows what is shared; from then on it is in the cache."""
    model, system = random_model(), list(range(3, 83))
    scheduler = dg.Scheduler(model, 2, 200, prefix_cache_bytes=ROOM)
    for turn in range(4):
        request = scheduler.submit([*system, 100 + turn, 7, 8], 8, SAMPLER, 0)
        while not scheduler.idle:
            scheduler.step()
        assert request.cached_tokens == (0 if turn < 2 else 80)
        assert request.output == model.generate([*system, 100 + turn, 7, 8], 8, SAMPLER, 0)
    assert encoded[0] == 83
    assert [80, 3] in [list(pair) for pair in pairwise(encoded)]


def test_a_turn_encodes_only_what_no_earlier_turn_has(encoded: list[int]) -> None:
    model = random_model()
    scheduler = dg.Scheduler(model, 1, 200, prefix_cache_bytes=ROOM)
    steady = SamplerConfig(max_denoising_steps=2, confidence_threshold=0.0, eos_token_ids=())

    def ask(prompt: list[int]) -> dg.Request:
        request = scheduler.submit(prompt, 20, steady)
        while not scheduler.idle:
            scheduler.step()
        return request

    first = ask([5] * 10)
    assert encoded == [10, 8, 8], "the prompt and two canvases; the last is never encoded"
    encoded.clear()
    second = ask([5] * 10 + list(first.output.token_ids) + [6, 7])
    assert second.cached_tokens == 26
    assert encoded[0] == 6


def test_a_failed_or_cancelled_request_leaves_the_cache_right() -> None:
    model, prompt = smallest_model(), list(range(3, 15))
    scheduler = dg.Scheduler(model, 1, 60, prefix_cache_bytes=ROOM)
    for steps in range(4):
        request = scheduler.submit(prompt, 20, SAMPLER, 1)
        for _ in range(steps):
            scheduler.step()
        request.cancel()
    final = scheduler.submit(prompt, 20, SAMPLER, 1)
    while not scheduler.idle:
        scheduler.step()
    assert final.output == alone("small", tuple(prompt), 20, 1)
    assert final.cached_tokens == 12
