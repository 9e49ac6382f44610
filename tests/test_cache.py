"""The cache: capacities, rings, snapshots, and what is refused."""

from __future__ import annotations

import pytest
import torch

import dgemma_ext as dg
from models import random_model


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return random_model()


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (1, count), generator=torch.Generator().manual_seed(seed))


def test_sliding_layers_store_no_more_than_they_can_show(model: dg.DiffusionGemma) -> None:
    cache = model.new_cache(slots=2, max_length=100)
    for layer, keys in zip(model.config.layers, cache.keys, strict=True):
        assert keys.shape[:2] == (2, 15 if layer.is_sliding else 100)
    assert model.new_cache(1, 5).keys[0].shape[1] == 5


def test_a_snapshot_brings_back_what_a_ring_has_overwritten(model: dg.DiffusionGemma) -> None:
    cache, canvas = model.new_cache(2, 100), ids(8, seed=1)
    model.encode(ids(20), cache, slots=[1])
    before = model.denoise(canvas, cache, slots=[1])
    saved = cache.snapshot(1)
    model.encode(ids(30, seed=2), cache, slots=[1])
    assert not torch.equal(model.denoise(canvas, cache, slots=[1]), before)
    cache.restore(1, saved)
    assert cache.length(1) == 20
    assert torch.equal(model.denoise(canvas, cache, slots=[1]), before)
    cache.restore(0, saved)
    assert torch.equal(model.denoise(canvas, cache, slots=[0]), before)


def test_a_snapshot_does_not_change_when_its_slot_does(model: dg.DiffusionGemma) -> None:
    cache = model.new_cache(1, 100)
    model.encode(ids(20), cache)
    saved = cache.snapshot(0)
    copies = [t.clone() for t in (*saved.keys, *saved.values)]
    model.encode(ids(40, seed=3), cache)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*saved.keys, *saved.values), strict=True))


def test_slots_do_not_touch_each_other(model: dg.DiffusionGemma) -> None:
    cache = model.new_cache(2, 60)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    model.encode(ids(40), cache, slots=[1])
    assert all(torch.isnan(t[0]).all() for t in (*cache.keys, *cache.values))
    assert cache.length(0) == 0
    assert torch.isfinite(model.denoise(ids(8), cache, slots=[1])).all()


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_does_not_exist_is_refused(model: dg.DiffusionGemma, slot: int) -> None:
    cache = model.new_cache(2, 20)
    for use in (cache.length, cache.free, cache.snapshot):
        with pytest.raises(ValueError, match=r"slot must be an integer in \[0, 2\)"):
            use(slot)


def test_sizes_and_snapshots_that_do_not_fit(model: dg.DiffusionGemma) -> None:
    with pytest.raises(ValueError, match=r"slots must be an integer in \[1, "):
        model.new_cache(0, 10)
    with pytest.raises(ValueError, match="max_length must be in"):
        model.new_cache(1, model.config.max_position_embeddings + 1)
    cache = model.new_cache(1, 20)
    with pytest.raises(ValueError, match="cannot take 21 more"):
        model.encode(ids(21), cache)
    assert cache.length(0) == 0
    model.encode(ids(20), cache)
    saved = cache.snapshot(0)
    with pytest.raises(ValueError, match="the snapshot holds 20 positions"):
        model.new_cache(1, 10).restore(0, saved)
