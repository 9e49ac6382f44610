"""What the message of a refused argument says: what came and what is wanted; and what `from_pretrained` refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgemma_ext as dg
from argument_values import NOTHING, answer
from dgemma_ext import demo
from dgemma_ext.demo import puzzles
from models import random_model, smallest_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [[3], [4, None]]}, r"prompt\[1\]\[1\] must be a token id in \[0, 300\), got None"),
        ({"prompt": [[3], 4]}, r"prompt\[1\] must be a string, a chat or token ids, got 4"),
        ({"prompt": [[3], []]}, r"prompt\[1\] is empty"),
        ({"prompt": [[3], "text"]}, r"prompt\[1\] is text, and the checkpoint has no tokenizer"),
        ({"prompt": [[3], [4]], "seed": [1]}, "seed must be one value or 2, one per prompt, got 1"),
        ({"prompt": [[3], [4]], "seed": [1, 1.5]}, r"seed must be an integer in \[0, 2\*\*63\), got 1.5"),
        ({"prompt": [[3], [4]], "canvas": [None]}, "canvas must be one value or 2, one per prompt"),
        ({"canvas": [[3, 4, 5]]}, r"canvas must be a dg.Canvas or None, or a list of them, got \[3, 4, 5\] \(list\)"),
        ({"canvas": {}}, r"canvas must be a dg.Canvas or None, or a list of them, got \{\} \(dict\)"),
        ({"sampler": {}}, r"sampler must be a dg.SamplerConfig or None, got \{\} \(dict\)"),
        ({"sampler": {"t_min": 0.1}}, r"sampler must be a dg.SamplerConfig or None, got \{'t_min': 0.1\} \(dict\)"),
        ({"on_draft": "print"}, "on_draft must be a function or None, got 'print'"),
        ({"max_new_tokens": 2**31}, r"max_new_tokens must be an integer in \[1, 2\*\*31\), got 2147483648"),
    ],
)
def test_the_message_says_what_came_and_what_is_wanted(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        answer(**changes)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            [{"role": "user", "content": 3}],
            r"messages\[0\]\['content'\] must be a string or a list of parts, texts and images, got 3",
        ),
        (
            [{"role": "user", "content": "hi"}, {"role": "robot"}],
            r"messages\[1\]\['role'\] must be one of .*, got 'robot'",
        ),
    ],
)
def test_a_message_of_a_batch_is_named_with_its_prompt(chat: list[dict[str, Any]], message: str) -> None:
    model = random_model()
    hello = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=f"^{message}"):
        model.generate(chat)
    with pytest.raises(ValueError, match=rf"^prompt\[2\]: {message}"):
        model.generate([hello, "hi", chat])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dg.Canvas(tokens="text"), "canvas.tokens must be a sequence of token ids and None, got 'text'"),
        (lambda: dg.Canvas(allowed=[[3], 4]), r"canvas.allowed\[1\] must be a list of token ids or None, got 4"),
        (lambda: dg.Canvas(allowed=[[3], [4, "5"]]), r"canvas.allowed\[1\]\[1\] must be an integer .* got '5'"),
        (lambda: dg.SamplerConfig(eos_token_ids=106), "eos_token_ids must be a sequence of token ids, got 106"),  # type: ignore[arg-type]
        (lambda: dg.Scheduler("model"), "model must be a dg.DiffusionGemma, got 'model'"),  # type: ignore[arg-type]
        (
            lambda: dg.Scheduler(smallest_model(), driver="fast"),
            "driver must be one of eager, async, graph, got 'fast'",
        ),
        (
            lambda: dg.Scheduler(smallest_model(), max_length=65),
            r"max_length must be in \[1, 64\], the model's context",
        ),
        (lambda: dg.Scheduler(smallest_model(), batched="no"), "batched must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: smallest_model().denoise([[3]], "cache"), "cache must be a dg.Cache, got 'cache'"),  # type: ignore[arg-type]
        (lambda: demo.draw(7, 1), "size must be one of 6, 9, got 7"),
        (lambda: demo.draw("6", 1), r"size must be an integer in \[0, 2\*\*31\), got '6'"),  # type: ignore[arg-type]
        (lambda: demo.check("1", "12"), "puzzle must be a line of 36 or 81 characters, got '12'"),
        (lambda: puzzles.generate(6, 7, random.Random(0)), r"clues must be an integer in \[8, 37\), got 7"),
        (lambda: puzzles.generate(9, 82, random.Random(0)), r"clues must be an integer in \[17, 82\), got 82"),
    ],
)
def test_objects_say_what_is_wrong_when_they_are_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_number_of_clues_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzles, "_ATTEMPTS", 3)
    with pytest.raises(ValueError, match=r"^clues is 17, and none of 3 random grids has a puzzle with so few"):
        puzzles.generate(9, 17, random.Random(0))


# Loading --------------------------------------------------------------------------------------------------------------


def load(**changes: Any) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(**({"path_or_hub_id": demo.checkpoint(6)} | changes))


@pytest.mark.parametrize("argument", ["path_or_hub_id", "device", "dtype", "weights", "batch_invariant", "activations"])
def test_from_pretrained_refuses_what_it_cannot_use_by_name(argument: str) -> None:
    values = [*NOTHING, 3, 3.5, "", b"", [], torch.float16, np.array([1, 2])]
    for value in values if argument == "activations" else (None, *values):
        with pytest.raises(ValueError, match=f"^{argument} must be "):
            load(**{argument: value})
    if argument == "path_or_hub_id":
        with pytest.raises(dg.CheckpointError, match=r"^nonsense: does not exist"):
            load(path_or_hub_id="nonsense")


def test_a_path_of_any_kind_is_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(demo.checkpoint(6))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(demo.checkpoint(6))
    for path in (folder, folder.encode(), np.str_(folder), "~/model", Path("~/model"), "6x6"):
        assert load(path_or_hub_id=path).config.canvas_length == 37
    assert dg.DiffusionGemma.from_pretrained("demo").config.canvas_length == 82
    assert load(device=torch.device("cpu"), dtype=torch.float32).dtype == torch.float32
    # A folder of a bundled model's name is reached by a path.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(dg.CheckpointError):
        load(path_or_hub_id="./demo")


def test_the_bundled_names_are_those_of_the_sizes_that_they_solve() -> None:
    for size, folder in demo.checkpoints().items():
        assert dg.ModelConfig.from_file(folder).canvas_length == size * size + 1
