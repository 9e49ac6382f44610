"""The encode pass by its public method: chunks, batches, spans, bad input."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

import dgemma_ext as dg
from checkpoints import make_checkpoint
from models import random_model

WINDOW = 16


@pytest.fixture(scope="module")
def model() -> dg.DiffusionGemma:
    return random_model()


def ids(count: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (rows, count), generator=torch.Generator().manual_seed(seed))


def contents(cache: dg.Cache, slot: int) -> list[torch.Tensor]:
    saved = cache.snapshot(slot)
    return [*saved.keys, *saved.values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["unquantized", "int4", "fp8", "nvfp4"])
@pytest.mark.parametrize("window", [WINDOW, 150])
def test_any_pieces_leave_the_same_bits_in_the_cache(dtype: torch.dtype, weights: str, window: int) -> None:
    """Also where a piece ends inside a tile of attention, inside a block of dense products, or at their borders."""
    length = 400
    model = quantized(dtype, weights, window)
    prompt, whole = ids(length), model.new_cache(1, length)
    model.encode(prompt, whole)
    draw = random.Random(window)
    for first in (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65):
        pieces, at, size = model.new_cache(1, length), 0, first
        while at < length:
            model.encode(prompt[:, at : at + size], pieces)
            at, size = at + size, draw.choice([1, 2, 3, 31, 63, 64, 65, 100, 128, 256, 300])
        for one, other in zip(contents(whole, 0), contents(pieces, 0), strict=True):
            assert torch.equal(one, other), f"first piece {first}"


@cache
def quantized(dtype: torch.dtype, weights: str, window: int) -> dg.DiffusionGemma:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), dtype=torch.float32, window=window, max_positions=512)
        return dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=dtype, weights=weights)


@pytest.mark.parametrize("chunk", [1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 33])
def test_any_chunk_size_leaves_the_same_cache(model: dg.DiffusionGemma, chunk: int) -> None:
    whole, pieces = model.new_cache(1, 100), model.new_cache(1, 100)
    prompt = ids(70)
    model.encode(prompt, whole)
    model.encode(prompt, pieces, chunk=chunk)
    for one, other in zip(contents(whole, 0), contents(pieces, 0), strict=True):
        assert torch.equal(one, other)


def test_padded_rows_are_the_same_bits_as_rows_alone(model: dg.DiffusionGemma) -> None:
    lengths = [1, 40, 17]
    prompt = ids(40, rows=3)
    batch = model.new_cache(4, 60)
    for row, length in enumerate(lengths):
        prompt[row, length:] = 0
    model.encode(prompt, batch, slots=[2, 0, 3], lengths=lengths)
    for row, (slot, length) in enumerate(zip([2, 0, 3], lengths, strict=True)):
        alone = model.new_cache(1, 60)
        model.encode(prompt[row : row + 1, :length], alone)
        assert batch.length(slot) == length
        for one, other in zip(contents(batch, slot), contents(alone, 0), strict=True):
            assert torch.equal(one, other)
    assert batch.length(1) == 0


def test_a_span_lets_its_tokens_see_ahead_and_no_others(model: dg.DiffusionGemma) -> None:
    """From the span's first position on, later layers' keys depend on the span's last token; earlier ones do not."""
    prompt = ids(30)
    changed = prompt.clone()
    changed[0, 19] = (changed[0, 19] + 1) % 512
    caches = []
    for spans in ([], [(12, 20)]):
        pair = []
        for tokens in (prompt, changed):
            cache = model.new_cache(1, 30)
            model.encode(tokens, cache, bidirectional_spans=[spans])
            pair.append(cache.keys[-1][0])  # in a full layer position p is in row p
        caches.append(pair)
    (plain, plain_changed), (seen, seen_changed) = caches
    assert torch.equal(plain[:19], plain_changed[:19])
    assert torch.equal(seen[:12], seen_changed[:12])
    assert not torch.equal(seen[12], seen_changed[12])


@pytest.mark.parametrize("chunk", [9, 13, 14, 16, 18])
def test_a_chunk_border_never_cuts_a_span(model: dg.DiffusionGemma, chunk: int) -> None:
    whole, pieces = model.new_cache(1, 40), model.new_cache(1, 40)
    prompt, spans = ids(30), [[(12, 17), (20, 28)]]
    model.encode(prompt, whole, bidirectional_spans=spans)
    model.encode(prompt, pieces, bidirectional_spans=spans, chunk=chunk)
    for one, other in zip(contents(whole, 0), contents(pieces, 0), strict=True):
        assert torch.equal(one, other)


def test_the_cache_is_only_read_by_the_canvas(model: dg.DiffusionGemma) -> None:
    cache = model.new_cache(1, 40)
    model.encode(ids(30), cache)
    before = [t.clone() for t in contents(cache, 0)]
    model.denoise(ids(8), cache)
    assert cache.length(0) == 30
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache, 0), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.tensor([[512]])}, r"ids must be token ids in \[0, 512\), got 512 to 512"),
        ({"ids": torch.tensor([[-1, 3]])}, r"ids must be token ids in \[0, 512\), got -1 to 3"),
        ({"ids": torch.tensor([1, 2])}, r"ids must be token ids \[B, T\], got a cpu tensor \[2\] of int64"),
        ({"ids": torch.tensor([[1.0]])}, r"ids must be token ids \[B, T\], got a cpu tensor \[1, 1\] of float32"),
        ({"ids": ids(3, rows=2), "slots": [0, 0]}, "slots must be 2 different slots"),
        ({"ids": ids(3, rows=2), "slots": [0]}, "slots must be 2 different slots"),
        ({"ids": ids(3), "slots": [5]}, r"slot must be an integer in \[0, 2\)"),
        ({"ids": ids(3), "lengths": [4]}, r"lengths\[0\] must be an integer in \[0, 4\), got 4"),
        ({"ids": ids(3), "chunk": 0}, r"chunk must be an integer in \[1, "),
        ({"ids": ids(3), "bidirectional_spans": [[], []]}, "bidirectional_spans must have 1 entries"),
        ({"ids": ids(3), "bidirectional_spans": [[(2, 1)]]}, "bidirectional_spans"),
        ({"ids": ids(3), "bidirectional_spans": [[(0, 2), (1, 3)]]}, "bidirectional_spans"),
    ],
)
def test_bad_input_is_refused(model: dg.DiffusionGemma, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode(cache=model.new_cache(2, 20), **arguments)  # type: ignore[arg-type]


def test_denoise_refuses_logits_of_another_shape(model: dg.DiffusionGemma) -> None:
    cache = model.new_cache(1, 20)
    with pytest.raises(ValueError, match=r"must be a tensor \[1, 8, 512\] or None, got a cpu tensor \[1, 8, 511\]"):
        model.denoise(ids(8), cache, self_conditioning=torch.zeros(1, 8, 511))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:0"])
def test_devices_that_are_not_there_are_refused(device: str, tmp_path: object) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    from dgemma_ext.model import resolve_device

    with pytest.raises(ValueError, match="device"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_a_driver_that_is_too_old_for_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma_ext import _C
    from dgemma_ext.model import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_C, "has_cuda", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    with pytest.raises(ValueError, match=r"driver 580 or later \(CUDA 13.0\); this one has CUDA 12.8"):
        resolve_device(device)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert resolve_device(device).type == "cuda"
    # A build without kernels runs on torch's operators, which have a runtime of their own.
    monkeypatch.setattr(_C, "has_cuda", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert resolve_device(device).type == "cuda"
