"""Bad input to the C interface on the CPU: a status and a message that names the argument, never a crash."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from backend import BACKEND
from c_interface import INVALID_ARGUMENT, OK, UNSUPPORTED, WORKSPACE_TOO_SMALL, call, context, load, operation
from c_operations import automaton_operations, denoise_operations, layer_operations, with_workspace
from c_products import product_operations, quantized_matrix

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="of the CPU's functions alone")

BF16 = torch.bfloat16


def all_operations() -> dict[str, dict[str, Any]]:
    return {
        **layer_operations(BF16),
        **denoise_operations(BF16),
        **automaton_operations(BF16),
        **product_operations(BF16),
    }


NAMES = sorted(all_operations())


def functions_of(name: str) -> list[str]:
    return ["canvas_attention", "causal_attention"] if name == "block_attention" else [name]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load()


def values_of(library: ctypes.CDLL, name: str) -> dict[str, Any]:
    return with_workspace(library, name, all_operations()[name])


def refused(library: ctypes.CDLL, name: str, values: dict[str, Any]) -> list[tuple[int, str]]:
    return [call(library, f"cpu_{function}", struct=name, **values) for function in functions_of(name)]


def replaced(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = value if len(path) == 1 else replaced(values[path[0]], path[1:], value)
    return {**values, path[0]: changed}


@pytest.mark.parametrize("name", NAMES)
def test_good_values_are_taken(library: ctypes.CDLL, name: str) -> None:
    assert {status for status, _ in refused(library, name, values_of(library, name))} == {OK}


def with_workspaces(library: ctypes.CDLL) -> list[str]:
    return [name for name in NAMES if values_of(library, name).get("workspace") is not None]


def test_a_workspace_that_is_too_small_or_misaligned(library: ctypes.CDLL) -> None:
    names = with_workspaces(library)
    assert {"moe_ffn", "route", "block_attention", "paged_attention", "soft_embedding"} <= set(names)
    for name in names:
        values = values_of(library, name)
        small = {**values, "workspace_bytes": values["workspace_bytes"] - 1}
        for status, message in refused(library, name, small):
            assert status == WORKSPACE_TOO_SMALL, (name, message)
            assert message.startswith("workspace")
            assert str(values["workspace_bytes"]) in message
        if name in ("block_attention", "paged_attention"):  # it finds an aligned part by itself
            continue
        for status, message in refused(library, name, {**values, "workspace": values["workspace"].data_ptr() + 1}):
            assert (status, message.split(":")[0]) == (INVALID_ARGUMENT, "workspace"), name


DENSE_INT8 = {"weight": quantized_matrix("int8", 1, 16, 32)}
GATE_UP_INT8 = {"gate_up": quantized_matrix("int8", 3, 32, 32)}
DOWN_INT8 = {"down": quantized_matrix("int8", 3, 32, 16)}


@pytest.mark.parametrize(
    ("name", "inner", "weights", "tokens"),
    [
        ("dense_quantized", "dense", DENSE_INT8, 4),
        ("moe_ffn_quantized", "ffn", GATE_UP_INT8, 4),
        ("moe_ffn_quantized", "ffn", DOWN_INT8, 8),  # pairs of a token and an expert
        ("moe_ffn_quantized", "ffn", GATE_UP_INT8 | DOWN_INT8, 8),
    ],
)
def test_tokens_are_rounded_to_int8_in_the_workspace(
    library: ctypes.CDLL, name: str, inner: str, weights: dict[str, Any], tokens: int
) -> None:
    """Each takes 64 codes of two bytes and a scale, which is what other formats do without."""
    others = values_of(library, name)[inner]["workspace_bytes"]
    values = with_workspace(library, name, all_operations()[name] | weights)
    size = values[inner]["workspace_bytes"]
    assert size == others + tokens * 64 * 2 + 64
    assert call(library, f"cpu_{name}", **values)[0] == OK
    status, message = call(library, f"cpu_{name}", **replaced(values, (inner, "workspace_bytes"), size - 1))
    assert (status, message) == (WORKSPACE_TOO_SMALL, f"workspace_bytes: got {size - 1}, wants at least {size}")
    status, message = call(library, f"cpu_{name}", **replaced(values, (inner, "workspace"), None))
    assert (status, message) == (INVALID_ARGUMENT, f"workspace: got NULL, wants {size} bytes")
    # Columns that no call takes: no size either.
    columns = "in_features" if inner == "dense" else "hidden_size" if "gate_up" in weights else "expert_size"
    wide = replaced(values, (inner, columns), 2**31 - 1)
    assert with_workspace(library, name, wide)[inner]["workspace_bytes"] == 0
    assert call(library, f"cpu_{name}", **wide)[0] == INVALID_ARGUMENT


SIZES = [
    *((name, "tokens", -1) for name in ("token_embedding", "rms_norm", "attention_residual", "layer_output", "route")),
    *((name, "tokens", -1) for name in ("router_input", "router_choice")),
    *((name, "hidden_size", 0) for name in ("token_embedding", "rms_norm", "attention_residual", "layer_output")),
    *((name, "hidden_size", 2**31) for name in ("rms_norm", "route", "vocabulary_head")),
    *((name, "epsilon", -1.0) for name in ("token_embedding", "rms_norm", "normalise_heads", "route", "layer_output")),
    *((name, "epsilon", float("nan")) for name in ("rms_norm", "attention_residual", "route")),
    ("token_embedding", "vocabulary", 0),
    ("token_embedding", "scale", float("inf")),
    ("normalise_heads", "tokens", -1),
    ("normalise_heads", "query_heads", 0),
    ("normalise_heads", "key_heads", 0),
    ("normalise_heads", "head_dim", 7),
    ("normalise_heads", "head_dim", 0),
    ("gelu_product", "values", -1),
    *((name, "hidden_size", 0) for name in ("route", "router_input")),
    *((name, "experts", 0) for name in ("route", "router_choice")),
    *((name, "top_k", top_k) for name in ("route", "router_choice") for top_k in (0, 7)),
    *(("router_input", "epsilon", epsilon) for epsilon in (-1.0, float("inf"))),
    ("vocabulary_head", "hidden_size", 0),
]


@pytest.mark.parametrize(("name", "field", "value"), SIZES)
def test_a_wrong_size_is_named(library: ctypes.CDLL, name: str, field: str, value: float) -> None:
    status, message = call(library, f"cpu_{name}", **{**values_of(library, name), field: value})
    assert status == INVALID_ARGUMENT
    assert message.startswith(f"{field}: got"), message
    assert "wants" in message


@pytest.mark.parametrize("field", ["batch", "length", "vocabulary"])
def test_a_wrong_size_of_the_heads_logits_is_named(library: ctypes.CDLL, field: str) -> None:
    values = values_of(library, "vocabulary_head")
    status, message = call(library, "cpu_vocabulary_head", **replaced(values, ("statistics", "logits", field), -1))
    assert (status, message.split(":")[0]) == (INVALID_ARGUMENT, field)


@pytest.mark.parametrize("token", [-1, 40, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named(library: ctypes.CDLL, token: int) -> None:
    values = all_operations()["token_embedding"]
    values["ids"][3] = token
    values["output"].fill_(7.0)
    status, message = call(library, "cpu_token_embedding", **values)
    assert (status, message) == (INVALID_ARGUMENT, f"ids: got {token} at token 3, wants 0 to 39")
    assert bool((values["output"] == 7.0).all()), "something was written before the check"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_dtype_or_variant_is_unsupported(library: ctypes.CDLL, name: str) -> None:
    values = values_of(library, name)
    path = {
        "vocabulary_head": ("statistics", "logits"),
        "moe_ffn_quantized": ("ffn",),
        "dense_quantized": ("dense",),
    }.get(name, ("logits",) if "logits" in values else ())
    if name not in ("update_canvas", "noise", "constrain", "merge_vocabulary_shards"):
        for status, message in refused(library, name, replaced(values, (*path, "dtype"), 7)):
            assert status == UNSUPPORTED, message
            assert message.startswith("dtype: got 7")
    # These have one form for all variants.
    copies = ("append_to_cache", "append_to_pages")
    if name in ("update_canvas", "noise", "constrain", "merge_vocabulary_shards", *copies):
        return
    for function in functions_of(name):
        place = context()
        place.variant = 9
        status = getattr(library, f"dgemma_cpu_{function}")(ctypes.byref(operation(name, values)), ctypes.byref(place))
        assert status == UNSUPPORTED
        assert place.message.decode().startswith("variant: got 9")


@pytest.mark.parametrize("name", NAMES)
def test_null_structs(library: ctypes.CDLL, name: str) -> None:
    values = values_of(library, name)
    for function in functions_of(name):
        entry = getattr(library, f"dgemma_cpu_{function}")
        place = context()
        assert entry(None, ctypes.byref(place)) == INVALID_ARGUMENT
        assert place.message == b"op: got NULL, wants a pointer"
        assert entry(ctypes.byref(operation(name, values)), None) == INVALID_ARGUMENT
        assert entry(None, None) == INVALID_ARGUMENT
    if hasattr(library, f"dgemma_cpu_{name}_workspace"):
        size = getattr(library, f"dgemma_cpu_{name}_workspace")
        size.restype = ctypes.c_size_t
        assert size(None) == 0
