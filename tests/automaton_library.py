"""The CUDA kernels of the automata in the test bed, behind functions like those of dgemma_ext.ops."""

from __future__ import annotations

import ctypes
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from automaton_cases import Operators
from c_interface import context, operation, workspace
from denoise_library import Poisoned
from dgemma_ext.ops.denoise import VocabularyStatistics
from sim.build import ROOT, sim_library

AUTOMATON, DENOISE = ROOT / "csrc" / "automaton" / "cuda", ROOT / "csrc" / "denoise" / "cuda"
SOURCES = [*sorted(AUTOMATON.glob("*.cu")), AUTOMATON / "plan_chain.cpp", ROOT / "csrc" / "cuda" / "entry.cu"]
SOURCES += [
    DENOISE / f"{name}.cu"
    for name in (
        "entry_points",
        "tile_statistics",
        "finish_statistics",
        "sample",
        "merge_shards",
        "noise",
        "update_canvas",
    )
]
SOURCES += [ROOT / "tests" / "sim" / "kernels" / "chain_plan.cpp"]
# Seeds for the order in which the machine runs threads.
SEEDS = [1, 2, 3]


@cache
def library() -> ctypes.CDLL:
    built = sim_library("automaton", SOURCES)
    built.chain_plan.restype = ctypes.c_char_p
    return built


def plan(batch: int, length: int, classes: int, states: int, sets: int) -> str:
    """What the launch plan of constrain says of itself."""
    sizes = {"batch": batch, "length": length, "most_classes": classes, "most_states": states, "most_sets": sets}
    text = ctypes.create_string_buffer(1000)
    assert library().chain_plan(ctypes.byref(operation("constrain", sizes)), text, len(text)) is None
    return text.value.decode()


def _run(name: str, **values: Any) -> None:
    """Calls a function in a poisoned workspace; a report of the machine is an error."""
    space, call = None, getattr(library(), f"dgemma_cuda_{name}")
    if hasattr(library(), f"dgemma_cuda_{name}_workspace"):
        space = workspace(library(), f"cuda_{name}", **values)
        values = {**values, "workspace": space, "workspace_bytes": space.numel()}
    place = context(where="cuda")
    status = call(ctypes.byref(operation(name, values)), ctypes.byref(place))
    assert status == 0, place.message.decode()


def _logits(
    logits: Tensor,
    softcap: float,
    temperature: Tensor,
    active: Tensor | None,
    allowed: Tensor | None,
    allowed_row: Tensor | None,
) -> dict[str, Any]:
    batch, length, vocabulary = logits.shape
    rows = {"mask": allowed, "rows": 0 if allowed is None else len(allowed), "row_index": allowed_row}
    return {
        **{"batch": batch, "length": length, "vocabulary": vocabulary, "dtype": logits.dtype, "raw": logits},
        **{"softcap": softcap, "temperature": temperature, "active": active, "allowed": rows},
    }


def _statistics(logits: Tensor, **params: Any) -> VocabularyStatistics:
    batch, length, vocabulary = logits.shape
    row, tile = (batch, length), (batch, length, -(-vocabulary // 128))
    dtypes = (torch.int32, torch.float32, torch.float32, torch.float64, torch.float32, torch.float32)
    poisoned = Poisoned()
    found = VocabularyStatistics(
        *(poisoned.tensor(shape, kind) for shape, kind in zip([row] * 4 + [tile] * 2, dtypes, strict=True))
    )
    _run("vocabulary_statistics", logits=_logits(logits, **params), **found._asdict())
    return found


def _sample(logits: Tensor, softcap: float, temperature: Tensor, **values: Any) -> Tensor:
    params = {name: values.pop(name) for name in ("active", "allowed", "allowed_row")}
    tokens = torch.full(logits.shape[:2], -1, dtype=torch.int32)
    described = _logits(logits, softcap, temperature, **params)
    _run("sample", logits=described, tokens=tokens, **values)
    return tokens


def _on_logits(name: str, logits: Tensor, softcap: float, temperature: Tensor, arena: Tensor, **values: Any) -> None:
    params = {kind: values.pop(kind) for kind in ("active", "allowed", "allowed_row")}
    described = _logits(logits, softcap, temperature, **params)
    classes = {"most_classes": values["class_max"].shape[-1]} if name == "class_statistics" else {}
    _run(name, logits=described, arena_words=arena.numel(), arena=arena, **classes, **values)


def _constrain(
    arena: Tensor, descriptor: Tensor, most_states: int, most_sets: int, *statistics: Tensor, **values: Any
) -> None:
    batch, length, classes = statistics[0].shape
    names = ("class_max", "class_argmax", "class_mass", "class_shifted")
    _run(
        "constrain",
        **{"batch": batch, "length": length, "arena_words": arena.numel(), "arena": arena, "descriptor": descriptor},
        **{"most_classes": classes, "most_states": most_states, "most_sets": most_sets},
        **dict(zip(names, statistics, strict=True)),
        **values,
    )


def kernels(seed: int, compute_capability: int = 90) -> Operators:
    """The operators of a step on the kernels, in one of the machine's orders."""
    library().sim_set_gpu(compute_capability, 3)
    library().sim_set_seed(ctypes.c_uint64(seed))
    return SimpleNamespace(
        vocabulary_statistics=_statistics,
        sample=_sample,
        class_statistics_=partial(_on_logits, "class_statistics"),
        constrain_=_constrain,
        sample_class_=partial(_on_logits, "sample_class"),
    )
