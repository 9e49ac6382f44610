"""Arguments that each function of the C interface takes on the CPU, for tests that spoil them one by one.

Those of layer.h, denoise.h and automaton.h are here; those of the products and of attention in c_products.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from automaton_cases import one_state
from c_interface import workspace

EPSILON = 1e-6


def tensor(dtype: torch.dtype, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return (torch.randn(*shape) * scale + offset).to(dtype)


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layer_operations(dtype: torch.dtype, tokens: int = 5, hidden: int = 72) -> dict[str, dict[str, Any]]:
    """Arguments of every struct of layer.h and of the router, with allocated outputs."""
    heads, key_heads, width, vocabulary, experts = 3, 1, 24, 40, 6
    rows = {"tokens": tokens, "hidden_size": hidden, "epsilon": EPSILON, "dtype": dtype}
    angles = torch.rand(tokens, width // 2) * 6.3
    table = torch.cat((angles, angles), dim=-1)

    def hiddens(*names: str) -> dict[str, Tensor]:
        return {name: tensor(dtype, tokens, hidden, scale=2.0) for name in names}

    def weights(*names: str) -> dict[str, Tensor]:
        return {name: tensor(dtype, hidden, scale=0.3, offset=1.0) for name in names}

    def outputs(*names: str) -> dict[str, Tensor]:
        return {name: torch.full((tokens, hidden), float("nan"), dtype=dtype) for name in names}

    return {
        "token_embedding": {
            **rows,
            "vocabulary": vocabulary,
            "scale": hidden**0.5,
            "normalise": 1,
            "ids": torch.randint(vocabulary, (tokens,), dtype=torch.int32),
            "embedding": tensor(dtype, vocabulary, hidden),
            **hiddens("conditioning"),
            **outputs("output"),
        },
        "rms_norm": {**rows, **hiddens("input"), **weights("weight"), **outputs("output")},
        "normalise_heads": {
            "tokens": tokens,
            "query_heads": heads,
            "key_heads": key_heads,
            "head_dim": width,
            "epsilon": EPSILON,
            "dtype": dtype,
            "raw_query": tensor(dtype, tokens, heads, width, scale=3.0),
            "raw_key": tensor(dtype, tokens, key_heads, width, scale=2.0),
            "raw_value": tensor(dtype, tokens, key_heads, width),
            "query_norm": tensor(dtype, width, scale=0.2, offset=1.0),
            "key_norm": tensor(dtype, width, scale=0.2, offset=1.0),
            "cosine": table.cos().to(dtype),
            "sine": table.sin().to(dtype),
            "query": zeros(dtype, tokens, heads, width),
            "key": zeros(dtype, tokens, key_heads, width),
            "value": zeros(dtype, tokens, key_heads, width),
        },
        "attention_residual": {
            **rows,
            **hiddens("hidden", "attended"),
            **weights("attended_norm", "dense_norm", "sparse_norm"),
            **outputs("residual", "dense_input", "sparse_input"),
        },
        "gelu_product": {
            "values": tokens * hidden,
            "dtype": dtype,
            **hiddens("gate", "up"),
            **outputs("output"),
        },
        "layer_output": {
            **rows,
            "scalar": 0.37,
            **hiddens("residual", "dense", "sparse"),
            **weights("dense_norm", "sparse_norm", "norm", "next_norm"),
            **outputs("output", "next_input"),
        },
        "router_input": {**rows, **hiddens("input"), **weights("scale"), **outputs("output")},
        "router_choice": {
            "tokens": tokens,
            "experts": experts,
            "top_k": 2,
            "dtype": dtype,
            "probabilities": torch.softmax(torch.randn(tokens, experts), dim=-1),
            "per_expert_scale": tensor(dtype, experts, scale=0.1, offset=1.0),
            "expert_ids": torch.full((tokens, 2), -7, dtype=torch.int32),
            "expert_weights": torch.full((tokens, 2), float("nan")),
        },
        "route": {
            **rows,
            "experts": experts,
            "top_k": 2,
            **hiddens("input"),
            **weights("scale"),
            "projection": tensor(dtype, experts, hidden, scale=0.3),
            "per_expert_scale": tensor(dtype, experts, scale=0.1, offset=1.0),
            "expert_ids": torch.full((tokens, 2), -7, dtype=torch.int32),
            "expert_weights": torch.full((tokens, 2), float("nan")),
        },
    }


def denoise_operations(
    dtype: torch.dtype, batch: int = 2, length: int = 3, vocabulary: int = 300, hidden: int = 40
) -> dict[str, dict[str, Any]]:
    """Arguments of every struct of denoise.h and vocabulary_head.h."""
    tiles = -(-vocabulary // 128)
    logits = {
        "batch": batch,
        "length": length,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "raw": tensor(dtype, batch, length, vocabulary, scale=3.0),
        "softcap": 30.0,
        "temperature": torch.full((batch,), 0.7),
    }
    softmax = {
        "row_max": torch.zeros(batch, length),
        "row_sum": torch.ones(batch, length, dtype=torch.float64),
        "tile_max": torch.zeros(batch, length, tiles),
        "tile_sum": torch.ones(batch, length, tiles),
    }
    statistics = {
        "logits": logits,
        "argmax": zeros(torch.int32, batch, length),
        "entropy": torch.zeros(batch, length),
        **softmax,
    }
    draws = {
        "seed": torch.arange(batch),
        "canvas_index": zeros(torch.int32, batch),
        "step": torch.ones(batch, dtype=torch.int32),
    }
    embedding = tensor(dtype, vocabulary, hidden, scale=0.5)

    def positions(dtype: torch.dtype = torch.int32) -> Tensor:
        return zeros(dtype, batch, length)

    def requests(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, dtype=dtype)

    return {
        "vocabulary_statistics": statistics,
        "sample": {"logits": logits, **softmax, **draws, "tokens": positions()},
        "merge_vocabulary_shards": {
            "shards": 2,
            "batch": batch,
            "length": length,
            "rank": 1,
            "best": tensor(torch.float32, 2, batch, length),
            "argmax": zeros(torch.int32, 2, batch, length),
            "entropy": torch.ones(2, batch, length),
            "row_max": tensor(torch.float32, 2, batch, length),
            "row_sum": torch.full((2, batch, length), 5.0, dtype=torch.float64),
            **draws,
            "merged_argmax": positions(),
            "merged_entropy": torch.zeros(batch, length),
            "merged_row_max": torch.zeros(batch, length),
            "merged_row_sum": torch.zeros(batch, length, dtype=torch.float64),
            "share": torch.zeros(batch, length),
            "owner": positions(),
            "own_uniform": torch.zeros(batch, length, dtype=torch.float64),
        },
        "noise": {
            "batch": batch,
            "length": length,
            "vocabulary": vocabulary,
            "purpose": 0,
            **draws,
            "tokens": positions(),
        },
        "update_canvas": {
            "batch": batch,
            "length": length,
            "vocabulary": vocabulary,
            "sampled": positions(),
            "argmax": positions(),
            "entropy": torch.zeros(batch, length),
            **draws,
            "max_steps": requests(8, torch.int32),
            "t_min": requests(0.4, torch.float64),
            "t_max": requests(0.8, torch.float64),
            "entropy_bound": requests(0.1),
            "stability_threshold": requests(1, torch.int32),
            "confidence_threshold": requests(0.005),
            "active": torch.ones(batch, dtype=torch.uint8),
            "canvas": positions(),
            "draft": positions(),
            "stable_steps": requests(0, torch.int32),
            "temperature": requests(0.8),
            "accepted": positions(torch.uint8),
            "mean_entropy": requests(0.0),
            "status": requests(0, torch.int32),
        },
        "soft_embedding": {
            "logits": logits,
            **softmax,
            "hidden_size": hidden,
            "embedding": embedding,
            "embedding_scale": 6.0,
            "tolerance": 0.0,
            "max_embedding_norm": 9.0,
            "output": zeros(dtype, batch, length, hidden),
        },
        "vocabulary_head": {
            "statistics": statistics,
            "hidden_size": hidden,
            "hidden": tensor(dtype, batch, length, hidden),
            "embedding": embedding,
            "raw": zeros(dtype, batch, length, vocabulary),
        },
    }


def automaton_operations(dtype: torch.dtype, batch: int = 2, length: int = 3, vocabulary: int = 300) -> dict[str, Any]:
    """Arguments of every struct of automaton.h: an automaton of one state that goes on with every token."""
    arena, descriptor = one_state(vocabulary)
    automata = {
        "arena_words": arena.numel(),
        "arena": arena,
        "descriptor": descriptor.repeat(batch, 1),
    }
    logits = denoise_operations(dtype, batch, length, vocabulary)["sample"]["logits"]

    def positions(kind: torch.dtype) -> Tensor:
        return zeros(kind, batch, length)

    def classes() -> dict[str, Any]:
        statistics = {
            "class_max": zeros(torch.float32, batch, length, 1),
            "class_argmax": zeros(torch.int32, batch, length, 1),
            "class_mass": torch.ones(batch, length, 1, dtype=torch.float64),
            "class_shifted": zeros(torch.float64, batch, length, 1),
        }
        return {"most_classes": 1, **statistics}

    def requests(value: int) -> Tensor:
        return torch.full((batch,), value, dtype=torch.int32)

    return {
        "class_statistics": {"logits": logits, **automata, "canvas": positions(torch.int32), **classes()},
        "constrain": {
            "batch": batch,
            "length": length,
            **automata,
            **classes(),
            "most_states": 1,
            "most_sets": 1,
            "state": requests(0),
            "tokens_left": requests(0),
            "max_steps": requests(8),
            "seed": zeros(torch.int64, batch),
            "canvas_index": requests(0),
            "step": requests(1),
            "argmax": positions(torch.int32),
            "entropy": positions(torch.float32),
            "chosen_class": positions(torch.int32),
            "remainder": positions(torch.float64),
            "matches": requests(0),
        },
        "sample_class": {
            "logits": logits,
            **automata,
            "chosen_class": positions(torch.int32),
            "remainder": positions(torch.float64),
            "matches": requests(1),
            "tokens": positions(torch.int32),
        },
    }


def optional_operands(struct: str, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with all tensors that the struct may do without, which change nothing but the draws."""
    if struct == "block_attention" or struct == "append_to_cache":
        batch, length = values["batch"], values["block_length"]
        given = {"length": torch.full((batch,), length, dtype=torch.int32)}
        if struct == "block_attention":
            given |= {"spans": zeros(torch.int32, batch, 3, 2), "spans_per_request": 3}
        return {**values, **given}
    if struct == "paged_attention":
        return {**values, "spans": zeros(torch.int32, values["requests"], 3, 2), "spans_per_request": 3}
    if struct == "merge_vocabulary_shards":
        shards, batch, length = values["shards"], values["batch"], values["length"]
        flags = {"nonempty": torch.ones(shards, batch, length, dtype=torch.uint8)}
        flags["active"] = torch.ones(batch, dtype=torch.uint8)
        return {**values, **flags, "uniforms": torch.rand(batch, length, dtype=torch.float64)}
    if struct == "vocabulary_head":
        return {**values, "statistics": optional_operands("vocabulary_statistics", values["statistics"])}
    if struct == "constrain":
        batch, length = values["batch"], values["length"]
        uniforms = torch.rand(batch, length, dtype=torch.float64)
        pinned = zeros(torch.uint8, batch, length)
        return {**values, "active": torch.ones(batch, dtype=torch.uint8), "uniforms": uniforms, "pinned": pinned}
    sizes = values.get("logits", values)
    if "vocabulary" not in sizes or "length" not in sizes:
        return values
    batch, length, vocabulary = sizes["batch"], sizes["length"], sizes["vocabulary"]
    mask = torch.full((2, -(-vocabulary // 32)), -1, dtype=torch.int32)
    allowed = {"mask": mask, "rows": 2, "row_index": zeros(torch.int32, batch, length)}
    if "logits" in values:
        active = torch.ones(batch, dtype=torch.uint8)
        values = {**values, "logits": {**values["logits"], "allowed": allowed, "active": active}}
    else:
        values = {**values, "allowed": allowed}
    if struct in ("sample", "noise", "update_canvas"):
        values |= {"uniforms": torch.rand(batch, length, dtype=torch.float64)}
    if struct == "noise":
        values |= {"active": torch.ones(batch, dtype=torch.uint8), "keep": zeros(torch.uint8, batch, length)}
    if struct in ("update_canvas", "soft_embedding", "class_statistics", "sample_class"):
        values |= {"pinned": zeros(torch.uint8, batch, length)}
    return values


def with_workspace(
    library: ctypes.CDLL, name: str, values: dict[str, Any], function: str | None = None
) -> dict[str, Any]:
    """The arguments with a workspace of the size that the library returns, where the operation takes one.

    `function`: whose workspace, "cpu_<name>" if it is not said.
    """
    function = function or f"cpu_{name}"
    if not hasattr(library, f"dgemma_{function}_workspace"):
        return values
    space = workspace(library, function, struct=name, **values)
    given = {"workspace": space if space.numel() else None, "workspace_bytes": space.numel()}
    for inner in ("statistics", "ffn", "dense"):
        if isinstance(values.get(inner), dict):
            return {**values, inner: {**values[inner], **given}}
    return {**values, **given}
