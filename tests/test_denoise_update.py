"""update_canvas_ on the CPU and in torch, against its definition and against transformers' own classes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, library
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from backend import BACKEND, skip_if_on_device
from denoise_cases import NAN, RAW_ERRORS, bits, draws, int32
from dgemma_ext.ops import denoise
from dgemma_ext.ops.plain import denoise as denoise_plain
from reference import denoise as reference

# The update is plain C++, the same for every instruction set.
UPDATES = {"cpu": denoise.update_canvas_, "plain": denoise_plain.update_canvas_}
WRITTEN = ("active", "canvas", "draft", "stable_steps", "step", "temperature", "accepted", "mean_entropy", "status")


def make_arguments(batch: int, length: int, vocabulary: int = 1000, **changes: Any) -> dict[str, Any]:
    """Valid arguments in the middle of a canvas; outputs are poisoned."""
    tokens = {
        name: torch.randint(0, vocabulary, (batch, length), dtype=torch.int32)
        for name in ("sampled", "argmax", "canvas")
    }
    drawing = draws(batch)
    return {
        "sampled": tokens["sampled"],
        "argmax": tokens["argmax"],
        "entropy": torch.rand(batch, length) * 0.1,
        "pinned": None,
        "uniforms": None,
        "vocabulary": vocabulary,
        "seed": drawing["seed"],
        "canvas_index": drawing["canvas_index"],
        "max_steps": torch.full((batch,), 48, dtype=torch.int32),
        "t_min": torch.full((batch,), 0.4, dtype=torch.float64),
        "t_max": torch.full((batch,), 0.8, dtype=torch.float64),
        "entropy_bound": torch.full((batch,), 0.1),
        "stability_threshold": torch.full((batch,), 1, dtype=torch.int32),
        "confidence_threshold": torch.full((batch,), 0.005),
        "active": torch.ones(batch, dtype=torch.bool),
        "canvas": tokens["canvas"],
        "draft": torch.full((batch, length), -1, dtype=torch.int32),
        "stable_steps": torch.zeros(batch, dtype=torch.int32),
        "step": drawing["step"],
        "temperature": torch.full((batch,), NAN),
        "accepted": torch.ones(batch, length, dtype=torch.bool),
        "mean_entropy": torch.full((batch,), NAN),
        "status": torch.full((batch,), -7, dtype=torch.int32),
        **changes,
    }


def random_arguments(seed: int) -> dict[str, Any]:
    """Requests in every kind of state."""
    random = np.random.default_rng(seed)
    batch, length, vocabulary = 40, int(random.integers(1, 9)), 70
    arguments = make_arguments(batch, length, vocabulary)
    # Few different values, so that ties, exact bounds and unchanged drafts are common.
    entropy = random.choice([0.0, 0.001, 0.004, 0.006, 0.05, 0.1, 3.0], (batch, length))
    max_steps = torch.from_numpy(random.integers(1, 6, batch)).int()
    step = torch.from_numpy(random.integers(1, 6, batch)).int().clamp(max=max_steps)
    argmax = torch.from_numpy(random.integers(0, 2, (batch, length))).int()
    arguments |= {
        "entropy": torch.from_numpy(entropy).float(),
        "pinned": torch.from_numpy(random.random((batch, length)) < random.choice([0.0, 0.3, 1.0])),
        "argmax": argmax,
        "draft": torch.where(torch.from_numpy(random.random((batch, 1)) < 0.7), argmax, 1 - argmax).int(),
        "stability_threshold": torch.from_numpy(random.integers(0, 4, batch)).int(),
        "stable_steps": torch.from_numpy(random.integers(0, 4, batch)).int(),
        "confidence_threshold": torch.from_numpy(random.choice([0.0, 0.005, 5.0], batch)).float(),
        "entropy_bound": torch.from_numpy(random.choice([0.0, 0.1, 0.105, 9.0], batch)).float(),
        "max_steps": max_steps,
        "step": step,
        "active": torch.from_numpy(random.random(batch) < 0.8),
    }
    return arguments


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("seed", range(12))
def test_against_the_definition(seed: int, form: str) -> None:
    arguments = random_arguments(seed)
    before = copy.deepcopy(arguments)
    UPDATES[form](**arguments)
    batch, length = before["sampled"].shape
    for b in range(batch):
        if not before["active"][b]:
            for name in WRITTEN:
                assert bits(arguments[name][b]) == bits(before[name][b]), name
            continue
        key = (int(before["seed"][b]), int(before["canvas_index"][b]), int(before["step"][b]))
        fresh = [
            reference.uniform_token(list(range(70)), reference.uniform(*key, i, int(denoise.Purpose.RENOISE)))
            for i in range(length)
        ]
        wanted = reference.update_canvas(
            reference.Canvas(
                before["canvas"][b].tolist(), before["draft"][b].tolist(), int(before["stable_steps"][b]), key[2]
            ),
            before["sampled"][b].tolist(),
            before["argmax"][b].tolist(),
            before["entropy"][b].numpy(),
            before["pinned"][b].tolist(),
            fresh,
            *(before[name][b].item() for name in ("max_steps", "t_min", "t_max", "entropy_bound")),
            *(before[name][b].item() for name in ("stability_threshold", "confidence_threshold")),
        )
        assert arguments["accepted"][b].tolist() == wanted.accepted
        assert arguments["canvas"][b].tolist() == wanted.tokens
        assert arguments["draft"][b].tolist() == wanted.draft
        for name in ("stable_steps", "step", "active", "status", "mean_entropy", "temperature"):
            assert arguments[name][b].item() == getattr(wanted, name), name


@pytest.mark.parametrize("form", UPDATES)
def test_acceptance_is_that_of_transformers(form: str) -> None:
    """Thousands of canvases. Positions with a sum within 1e-5 of the bound may differ, at most 1 in 10,000 of them."""
    batch, length, vocabulary = 4000 if BACKEND != "sim" else 400, 24, 5
    # From nearly certain to flat, so that the number of accepted positions varies from none to all.
    logits = torch.randn(batch, length, vocabulary) * torch.linspace(0.5, 40, batch)[:, None, None]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=0.1), length, vocabulary, 48)
    arguments = make_arguments(batch, length, vocabulary, entropy=entropy)
    wanted = sampler.accept_canvas(arguments["canvas"].clone(), arguments["sampled"], logits, 1)
    UPDATES[form](**arguments)
    ordered, order = entropy.double().sort(dim=-1, stable=True)
    near = ((ordered.cumsum(-1) - ordered - 0.1).abs() < 1e-5).gather(-1, order.argsort(-1))
    differs = arguments["accepted"] != sampler.accepted_token_mask
    assert not bool((differs & ~near).any())
    assert int((differs & near).sum()) <= batch * length / 10_000
    shares = arguments["accepted"].float().mean(-1)
    assert shares.min() < 0.1 < 0.9 < shares.max(), "the canvases were all alike"
    same = arguments["accepted"] & ~differs
    assert bool((arguments["canvas"] == wanted)[same].all())


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
def test_stopping_is_that_of_transformers(threshold: int, form: str) -> None:
    """Requests over 12 steps; drafts of two tokens out of two repeat often, entropies lie around the threshold."""
    batch, length, vocabulary, steps = 600 if BACKEND != "sim" else 60, 2, 3, 12
    criteria = StableAndConfidentStoppingCriteria(threshold, 0.005)
    arguments = make_arguments(batch, length, vocabulary)
    arguments |= {
        "stability_threshold": torch.full((batch,), threshold, dtype=torch.int32),
        "step": int32(*[1] * batch),
    }
    stopped = torch.zeros(batch, dtype=torch.bool)
    for _ in range(steps):
        logits = torch.randn(batch, length, vocabulary)
        argmax = torch.randint(0, 2, (batch, length))
        gap = 5.0 + 4.0 * torch.rand(batch, 1)
        logits.scatter_(-1, argmax[..., None], (logits.amax(-1) + gap)[..., None])
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        finished = criteria(argmax, logits)
        going = arguments["active"].clone()
        arguments |= {"argmax": argmax.int(), "sampled": argmax.int(), "entropy": entropy}
        UPDATES[form](**arguments)
        near = (entropy.double().mean(-1) - 0.005).abs() < 1e-8
        assert bool(((arguments["status"] == denoise.CanvasStatus.STABLE) == finished)[going & ~near].all())
        stopped |= finished
    assert int(stopped.sum()) > 0
    assert threshold == 0 or int(stopped.sum()) < batch


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize(("t_min", "t_max", "max_steps"), [(0.4, 0.8, 48), (0.0, 1.0, 7), (1e-4, 2e-4, 3)])
def test_the_temperature_is_that_of_transformers(t_min: float, t_max: float, max_steps: int, form: str) -> None:
    """Equal to the bit to its generate's calls of the schedule, with the remaining steps in a tensor."""
    schedule = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, max_steps)
    arguments = make_arguments(max_steps, 1)
    arguments |= {
        "t_min": torch.full((max_steps,), t_min, dtype=torch.float64),
        "t_max": torch.full((max_steps,), t_max, dtype=torch.float64),
        "max_steps": int32(*[max_steps] * max_steps),
        "step": torch.arange(1, max_steps + 1, dtype=torch.int32),
    }
    UPDATES[form](**arguments)
    one = torch.ones(1, dtype=torch.float64)
    for b in range(max_steps - 1):
        remaining = torch.tensor(max_steps - (b + 1), dtype=torch.int32)
        wanted = 1.0 / float(schedule(None, one, cur_step=remaining))
        assert float(arguments["temperature"][b]) == pytest.approx(wanted, rel=1e-15)
    assert float(arguments["temperature"][-1]) == np.float32(t_min)


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("bad", [NAN, torch.inf])
def test_an_entropy_that_is_not_finite(bad: float, form: str) -> None:
    pinned = torch.zeros(2, 6, dtype=torch.bool)
    pinned[1, 3] = True
    arguments = make_arguments(2, 6, pinned=pinned)
    arguments["entropy"][:, 3] = bad  # the position of request 1 is pinned, so it is not read
    before = copy.deepcopy(arguments)
    UPDATES[form](**arguments)
    assert arguments["status"].tolist() == [denoise.CanvasStatus.NON_FINITE, denoise.CanvasStatus.RUNNING]
    assert arguments["active"].tolist() == [False, True]
    assert not arguments["accepted"][0].any()
    assert arguments["mean_entropy"].isnan().tolist() == [True, False]
    for name in ("canvas", "draft", "stable_steps", "step", "temperature"):
        assert bits(arguments[name][0]) == bits(before[name][0]), name


@pytest.mark.parametrize("form", UPDATES)
def test_given_uniforms(form: str) -> None:
    arguments = make_arguments(1, 4, 1000, entropy=torch.full((1, 4), 1.0))
    arguments["uniforms"] = torch.tensor([[0.0, 0.25, 0.9999, 1.0 - 2.0**-53]], dtype=torch.float64)
    UPDATES[form](**arguments)
    sampled = arguments["sampled"][0].tolist()
    assert arguments["accepted"].tolist() == [[True, False, False, False]], "ties go to the lowest index"
    assert arguments["canvas"].tolist() == [[sampled[0], 250, 999, 999]]


def test_a_request_is_updated_alike_alone_and_in_a_batch() -> None:
    arguments = random_arguments(99)
    alone = copy.deepcopy(arguments)
    denoise.update_canvas_(**arguments)
    for b in range(len(alone["active"])):
        one = {name: value[b : b + 1].clone() if isinstance(value, Tensor) else value for name, value in alone.items()}
        denoise.update_canvas_(**one)
        for name in WRITTEN:
            assert bits(one[name][0]) == bits(arguments[name][b]), name


BAD: dict[str, tuple[str, Any]] = {
    "no steps": ("max_steps", int32(48, 0)),
    "step zero": ("step", int32(0, 1)),
    "step beyond the cap": ("step", int32(1, 49)),
    "sampled outside": ("sampled", torch.full((2, 5), 1000, dtype=torch.int32)),
    "sampled negative": ("sampled", torch.full((2, 5), -1, dtype=torch.int32)),
    "argmax outside": ("argmax", torch.full((2, 5), 1000, dtype=torch.int32)),
    "pinned canvas outside": ("canvas", torch.full((2, 5), 1000, dtype=torch.int32)),
    "stability": ("stability_threshold", int32(1, -1)),
    "stable steps": ("stable_steps", int32(-1, 0)),
    "bound": ("entropy_bound", torch.tensor([0.1, NAN])),
    "confidence": ("confidence_threshold", torch.tensor([-1.0, 0.0])),
    "t_min": ("t_min", torch.tensor([0.4, -0.4], dtype=torch.float64)),
    "t_max": ("t_max", torch.tensor([NAN, 0.8], dtype=torch.float64)),
    "float32 t_max": ("t_max", torch.ones(2)),
    "uniforms": ("uniforms", torch.ones(2, 5, dtype=torch.float64)),
    "vocabulary": ("vocabulary", 0),
    "shape of entropy": ("entropy", torch.zeros(2, 4)),
    "dtype of draft": ("draft", torch.zeros(2, 5, dtype=torch.int64)),
    "layout of accepted": ("accepted", torch.zeros(5, 2, dtype=torch.bool).T),
    "dtype of active": ("active", int32(1, 1)),
    "shape of status": ("status", int32(0)),
}


OF_VALUES = {"no steps", "step zero", "step beyond the cap", "sampled outside", "sampled negative", "argmax outside"}
OF_VALUES |= {"pinned canvas outside", "stability", "stable steps", "bound", "confidence", "t_min", "t_max", "uniforms"}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    skip_if_on_device(what, OF_VALUES)
    name, value = BAD[what]
    pinned = torch.tensor([[True] + [False] * 4, [False] * 5])
    arguments = copy.deepcopy({**make_arguments(2, 5, pinned=pinned), name: value})
    before = copy.deepcopy(arguments)
    with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
        denoise.update_canvas_(**arguments)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.update_canvas_(*arguments.values())
    for written in WRITTEN:
        assert bits(arguments[written]) == bits(before[written]), "written before all was checked"


def test_opcheck() -> None:
    arguments = random_arguments(5)
    for name in ("temperature", "mean_entropy"):
        arguments[name].zero_()  # opcheck compares tensors with NaN as unequal
    library.opcheck(torch.ops.dgemma.update_canvas_.default, tuple(arguments.values()))
