"""The tensors of every function of the C interface: NULL, misaligned or overlapping ones are refused by name.

Every pointer field of every struct is tried, so that a function that does not check one of them fails here. The CPU's
functions run here, those for a GPU on the test bed (test_sim_operators.py).
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import BACKEND
from c_interface import INVALID_ARGUMENT, OK, UNSUPPORTED, call, declared_functions, load, pointer_fields
from c_operations import (
    automaton_operations,
    denoise_operations,
    layer_operations,
    optional_operands,
    with_workspace,
)
from c_products import product_operations, quantize_operations, quantized_matrix
from dgemma_ext import _C

pytestmark = pytest.mark.skipif(BACKEND == "cuda", reason="of the host's checks")

WHERE = "cuda" if BACKEND == "sim" else "cpu"
BF16 = torch.bfloat16
# Functions whose struct has another name.
STRUCT_OF = {
    "canvas_attention": "block_attention",
    "batched_canvas_attention": "block_attention",
    "causal_attention": "block_attention",
    "moe_ffn_fp8": "moe_ffn_quantized",
}
FUNCTIONS = [
    name.removeprefix(f"dgemma_{WHERE}_")
    for name in declared_functions()
    if name.startswith(f"dgemma_{WHERE}_")
    and not name.endswith(("_workspace", "_variant", "_variant_name"))
]  # fmt: skip
# Pointers that may be NULL.
OPTIONAL = {
    "conditioning", "raw_value", "next_norm", "active", "mask", "pinned", "keep", "uniforms", "length", "spans",
    "factors", "importance", "nonempty",
}  # fmt: skip
OPTIONAL_IN = {"rms_norm": {"weight"}}
REQUIRED_IN = {"update_canvas": {"active"}}
Path = tuple[str, ...]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if BACKEND == "cpu":
        return load()
    assert _C.__file__ is not None
    return ctypes.CDLL(_C.__file__)


def operands(library: ctypes.CDLL, function: str) -> dict[str, Any]:
    """Arguments with every tensor that the function may be given."""
    struct = STRUCT_OF.get(function, function)
    makers = (layer_operations, denoise_operations, automaton_operations, product_operations, quantize_operations)
    made = next(found[struct] for make in makers if struct in (found := make(BF16)))
    if function == "moe_ffn_fp8":
        made = {**made, "gate_up": quantized_matrix("fp8", 3, 32, 32)}
    made = optional_operands(struct, made)
    if function.endswith("canvas_attention"):
        made = {**made, "spans": None}
    return with_workspace(library, struct, made, f"{WHERE}_{workspace_of(function)}")


def workspace_of(function: str) -> str:
    return "block_attention" if STRUCT_OF.get(function) == "block_attention" else function


def at(values: dict[str, Any], path: Path) -> Any:
    found = values.get(path[0])
    return found if len(path) == 1 or found is None else at(found, path[1:])


def replaced(values: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    changed = value if len(path) == 1 else replaced(values[path[0]], path[1:], value)
    return {**values, path[0]: changed}


def shown(path: Path) -> str:
    """How a message names it: by its field, and a part of a quantized matrix by both."""
    return ".".join(path[-2:] if path[-1] in ("values", "scales", "factors") else path[-1:])


def looked_at(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments under which the function looks at this tensor: what draws are made with, only without uniforms."""
    return {**values, "uniforms": None} if path[-1] in ("seed", "canvas_index", "step") else values


def tensors(function: str, values: dict[str, Any]) -> dict[Path, Tensor]:
    """Every tensor that the function reads or writes, by its path in the struct."""
    given = {path: at(values, path) for path in pointer_fields(STRUCT_OF.get(function, function))}
    # The head's statistics are of its own logits.
    given.pop(("statistics", "logits", "raw"), None)
    return {path: tensor for path, tensor in given.items() if isinstance(tensor, Tensor)}


def alignment(function: str, path: Path, tensor: Tensor) -> int:
    """What the headers say that the tensor must be a multiple of."""
    if path[-1] == "workspace":
        return 1 if WHERE == "cpu" and workspace_of(function) in ("block_attention", "paged_attention") else 64
    if WHERE == "cpu" or function == "normalise_heads" or path[-1] == "per_expert_scale":
        return tensor.element_size()
    if path[-1] in ("values", "scales"):
        return 16 if path[-1] == "values" else 4
    if path == ("logits", "raw"):  # of a multiple of four
        return 4 * tensor.element_size()
    return 16 if tensor.dtype == BF16 else tensor.element_size()


def refusal(library: ctypes.CDLL, function: str, values: dict[str, Any]) -> str:
    status, message = call(library, f"{WHERE}_{function}", struct=STRUCT_OF.get(function), **values)
    assert status == INVALID_ARGUMENT, (function, status, message)
    return message


def taken(library: ctypes.CDLL, function: str, values: dict[str, Any]) -> bool:
    """Whether the tensors are taken: on the test bed by a GPU that is then found too old to launch anything."""
    if WHERE == "cuda":
        library.sim_set_gpu(75, 3)
    before = {path: tensor.clone() for path, tensor in tensors(function, values).items()}
    try:
        status, message = call(library, f"{WHERE}_{function}", struct=STRUCT_OF.get(function), **values)
    finally:
        for path, content in before.items():  # a later call takes them as they were
            at(values, path).copy_(content)
        if WHERE == "cuda":
            library.sim_set_gpu(90, 3)
    return (status, "7.5" in message) == ((UNSUPPORTED, True) if WHERE == "cuda" else (OK, False))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_pointer_is_tried(library: ctypes.CDLL, function: str) -> None:
    values = operands(library, function)
    assert taken(library, function, values)
    missing = set(pointer_fields(STRUCT_OF.get(function, function))) - set(tensors(function, values))
    left_out = {
        ("statistics", "logits", "raw"), ("dense", "weight"), ("ffn", "gate_up"), ("ffn", "down"),
        *([("spans",)] if function.endswith("canvas_attention") else []),
        *([("gate_up", "scales"), ("down", "scales")] if "moe_ffn" in function else []),
        *((*path, "workspace") for path in [(), ("dense",), ("statistics",)]),
    }  # fmt: skip
    assert missing <= left_out


@pytest.mark.parametrize("function", FUNCTIONS)
def test_null_is_named(library: ctypes.CDLL, function: str) -> None:
    values = operands(library, function)
    for path in tensors(function, values):
        if path[-1] in (OPTIONAL | OPTIONAL_IN.get(function, set())) - REQUIRED_IN.get(function, set()):
            continue
        message = refusal(library, function, replaced(looked_at(values, path), path, None))
        assert message.startswith(f"{shown(path)}: got NULL, wants"), (path, message)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_misaligned_tensor_is_named(library: ctypes.CDLL, function: str) -> None:
    values = operands(library, function)
    tried = 0
    for path, tensor in tensors(function, values).items():
        wanted = alignment(function, path, tensor)
        if wanted == 1:
            continue
        address = tensor.data_ptr() + wanted // 2
        message = refusal(library, function, replaced(looked_at(values, path), path, address))
        assert message == f"{shown(path)}: got {address:#x}, wants a multiple of {wanted} bytes", (path, message)
        tried += 1
    assert tried >= 3


def weights_beside_quantized_ones() -> list[tuple[str, Path]]:
    made = [("dense_quantized", ("dense", "weight"))]
    made += [("moe_ffn_quantized", ("ffn", name)) for name in ("gate_up", "down")]
    return [(function, path) for function, path in made if function in FUNCTIONS]


@pytest.mark.parametrize(("function", "path"), weights_beside_quantized_ones())
def test_weights_of_two_kinds_are_refused(library: ctypes.CDLL, function: str, path: Path) -> None:
    message = refusal(library, function, replaced(operands(library, function), path, torch.zeros(64)))
    assert message == f"{path[-1]}: got a pointer, wants NULL beside quantized weights"


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def placed(tensor: Tensor, address: int) -> int:
    ctypes.memmove(address, tensor.data_ptr(), size(tensor))
    return address


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_output_that_overlaps_is_named(library: ctypes.CDLL, function: str) -> None:
    """Every output and the workspace with every other tensor: they begin together, one begins on the other's last
    bytes, or right behind the other."""
    values = operands(library, function)
    written = [path for path, is_written in pointer_fields(STRUCT_OF.get(function, function)).items() if is_written]
    found = tensors(function, values)
    arena = torch.zeros(2 * max(map(size, found.values())) + 1024, dtype=torch.uint8)
    base = -(-arena.data_ptr() // 256) * 256
    tried = 0
    for pair in ((output, other) for output in written for other in found if output in found and output != other):
        for first, second in (pair, pair[::-1]):
            step = alignment(function, second, found[second])
            last = base + (size(found[first]) - 1) // step * step
            behind = base + -(-size(found[first]) // step) * step
            beside = replaced(looked_at(looked_at(values, first), second), first, placed(found[first], base))
            # A GPU may use less of a workspace than the most that any uses.
            at_its_end = WHERE == "cpu" or first[-1] != "workspace"
            for address in (base, last) if at_its_end else (base,):
                message = refusal(library, function, replaced(beside, second, address))
                got, overlapped = message.split(": got ")[0], message.split("overlaps ")[1].split(",")[0]
                assert {got, overlapped} == {shown(first), shown(second)}, (pair, message)
                assert message.endswith(f"which overlaps {overlapped}, wants memory of its own")
            # On the test bed the workspace is checked after the GPU.
            if WHERE == "cpu" or all(path[-1] != "workspace" for path in pair):
                content = placed(found[second], behind)
                assert taken(library, function, replaced(beside, second, content)), pair
            tried += 1
    assert tried >= 4
