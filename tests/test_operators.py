"""What holds of every operator, whatever it computes: it refuses by its description before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch._subclasses import FakeTensorMode

from backend import BACKEND, COMPUTE_CAPABILITY, DTYPES
from denoise_cases import bits
from dgemma_ext import _C
from dgemma_ext.ops import description, operators
from dgemma_ext.ops.operators import operator
from operator_calls import OperatorCall, calls

# Products of FP8 by FP8 are for compute capability 8.9, 9.0 and 12.x; the CPU has a form in torch's operators.
HAS_FP8 = BACKEND == "cpu" or COMPUTE_CAPABILITY in (89, 90, 120, 121)
ABSENT = set() if HAS_FP8 else {"moe_ffn_fp8"}
NAMES = sorted(set(calls(DTYPES[-1])) - ABSENT)
# Whose last extent is told by no other argument.
FREE = {"dgemma::soft_embedding": ("embedding",)}
FREE["dgemma::paged_attention"] = ("page_table",)
FREE |= {f"dgemma::{name}": ("arena",) for name in ("class_statistics_", "constrain_", "sample_class_")}
# torch before 2.13 keeps no more of a std::invalid_argument than its words.
RAW_ERRORS = (ValueError, RuntimeError)


def changed(case: OperatorCall, name: str, value: Any) -> tuple[list[Any], dict[str, Any]]:
    """The operator's arguments with another value of one."""
    names = [argument.name for argument in case.operator._schema.arguments]
    arguments, keywords = list(case.arguments), dict(case.keywords)
    if name in keywords:
        keywords[name] = value
    else:
        arguments[names.index(name)] = value
    return arguments, keywords


def tensors(case: OperatorCall) -> dict[str, Tensor]:
    names = [argument.name for argument in case.operator._schema.arguments]
    given = dict(zip(names, case.arguments, strict=False)) | case.keywords
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def spoilt(case: OperatorCall) -> Iterator[tuple[str, str, Any]]:
    """What is wrong, the argument, and its value."""
    for name, tensor in tensors(case).items():
        other = torch.float16 if tensor.dtype == torch.float64 else torch.float64
        yield "dtype", name, tensor.to(other)
        if name not in ("workspace", *FREE.get(case.operator._schema.name, ())):
            yield "longer", name, torch.cat([tensor, tensor], dim=-1)
        if not name.endswith("scales"):
            yield "dimensions", name, tensor[None]
        apart = torch.stack([tensor, tensor], dim=-1)[..., 0]
        if not apart.is_contiguous():
            yield "layout", name, apart


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_checked_before_anything_is_written(name: str) -> None:
    case = calls(DTYPES[-1])[name]
    before = {key: tensor.clone() for key, tensor in tensors(case).items()}
    tried = 0
    for what, argument, value in spoilt(case):
        arguments, keywords = changed(case, argument, value)
        # A matrix of quantized weights is named by its codes. What is a matter of two may be said of the other.
        named = r"\w+" if what in ("longer", "dimensions") or argument.endswith("scales") else argument
        with pytest.raises(RAW_ERRORS, match=rf"dgemma::\w+: {named}.*: got .*, wants "):
            case.operator(*arguments, **keywords)
        tried += 1
    assert tried >= 3 * len(before) - 2
    for key, tensor in tensors(case).items():
        assert bits(tensor) == bits(before[key]), key
    case.raw()


def words(operator: Any, arguments: list[Any], keywords: dict[str, Any]) -> str:
    with pytest.raises(RAW_ERRORS) as caught:
        operator(*arguments, **keywords)
    return str(caught.value).splitlines()[0]


def on_meta(value: Any) -> Any:
    """Strides as they are."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@pytest.mark.parametrize("name", [name for name in NAMES if "quantize" not in name])
def test_a_call_without_data_is_refused_in_the_same_words(name: str) -> None:
    """So the two readers of the description agree; shapes of quantized codes are told in columns by one alone."""
    case = calls(DTYPES[-1])[name]
    compared = 0
    for _, argument, value in spoilt(case):
        arguments, keywords = changed(case, argument, value)
        meta = [on_meta(each) for each in arguments], {key: on_meta(each) for key, each in keywords.items()}
        if argument == "workspace" or (name == "moe_ffn_fp8" and argument in ("gate_up", "down")):
            continue
        assert words(case.operator, *meta) == words(case.operator, arguments, keywords)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_call_without_data_gives_the_shapes_of_one_with(name: str) -> None:
    case = calls(DTYPES[-1])[name]
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        keywords = {key: fake(each) for key, each in case.keywords.items()}
        imagined = case.operator(*map(fake, case.arguments), **keywords)
    assert layouts(imagined) == layouts(case.raw())


def layouts(result: Any) -> list[Any]:
    parts = () if result is None else (result,) if isinstance(result, Tensor) else result
    return [(tuple(part.shape), part.is_contiguous(), part.dtype) for part in parts]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    case = calls(DTYPES[-1])[name]
    given = list(tensors(case))
    if len(given) < 2:
        return
    arguments, keywords = changed(case, given[1], tensors(case)[given[1]].to("meta"))
    with pytest.raises(
        (*RAW_ERRORS, NotImplementedError), match=rf"{given[1]}: got a tensor on meta, wants one on cpu"
    ):
        case.operator(*arguments, **keywords)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_gives_what_its_operator_gives(name: str) -> None:
    case = calls(DTYPES[-1])[name]
    raw, wrapped = case.raw(), case.wrapped()
    if isinstance(raw, Tensor):
        raw, wrapped = (raw,), (wrapped,)
    if raw is not None:
        assert [bits(part) for part in raw] == [bits(part) for part in wrapped]


@pytest.mark.parametrize(
    ("name", "argument", "value", "refusal"),
    [
        ("canvas_attention", "window", -1, "window: got -1, wants 0 or more"),
        ("canvas_attention", "scale", float("inf"), "scale: got inf, wants a finite number"),
        ("noise_", "vocabulary", 0, "vocabulary: got 0, wants 1 to 2147483647"),
        ("noise_", "purpose", 3, "purpose: got 3, wants 0 to 2"),
        ("route", "top_k", 5, "top_k: got 5, wants 1 to 4"),
        ("sample", "allowed", None, "allowed: got None, wants both it and allowed_row or neither"),
        ("sample", "allowed_row", None, "allowed_row: got None, wants both it and allowed or neither"),
    ],
)
def test_numbers_and_pairs(name: str, argument: str, value: Any, refusal: str) -> None:
    case = calls(DTYPES[-1])[name]
    arguments, keywords = changed(case, argument, value)
    meta = [on_meta(each) for each in arguments]
    for given in (arguments, meta):
        assert words(case.operator, given, keywords) == f"dgemma::{name}: {refusal}"


def test_a_refusal_is_a_value_error_and_a_failure_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every release of torch: what an operator tells is all that Python has to go by before 2.13."""
    fragment = library.Library("dgemma", "FRAGMENT")
    fragment.define("of_a_test(Tensor input, int way) -> ()")

    def refuse(input: Tensor, way: int) -> None:
        if way == 0:
            raise RuntimeError("dgemma::of_a_test: input: got this, wants that\nException raised from here")
        raise RuntimeError("dgemma::of_a_test failed: out of memory")

    try:
        fragment.impl("of_a_test", refuse, "CPU")
        call = operator("of_a_test")
        with pytest.raises(ValueError, match=r"^input: got this, wants that$"):
            call(torch.ones(1), 0)
        with pytest.raises(RuntimeError, match="dgemma::of_a_test failed: out of memory"):
            call(torch.ones(1), 1)
    finally:
        fragment._destroy()


def test_memory_that_is_not_there_has_its_own_error() -> None:
    """No machine can address 2**50 bytes. torch 2.13 tells of the call that failed and of no memory."""
    column = torch.empty(2**24, 1)  # never touched
    with pytest.raises(torch.OutOfMemoryError, match=r"^dgemma::dense: \w+ takes 1.126e\+06 GB, which cpu cannot"):
        operator("dense")(column, column)


def test_the_error_of_a_gpu_without_memory_tells_how_much_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    told = operators._NO_MEMORY.search(
        "dgemma::moe_ffn failed: no memory of 3000000000 bytes for workspace: call failed"
    )
    assert told is not None
    for name, nbytes in (("memory_reserved", 7 * 10**9), ("memory_allocated", 6 * 10**9)):
        monkeypatch.setattr(torch.cuda, name, lambda device, nbytes=nbytes: nbytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 24 * 10**9))
    error = operators._out_of_memory(told, torch.device("cuda:1"))
    assert isinstance(error, torch.OutOfMemoryError)
    assert str(error) == (
        "dgemma::moe_ffn: workspace takes 3 GB; cuda:1 has 2 GB of 24 GB free, and torch holds 7 GB, of which tensors "
        "use 6 GB"
    )

    def fault(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        operators._out_of_memory(told, torch.device("cuda:1"))


def test_descriptions_and_schemas_name_the_same() -> None:
    for name, described in description.OPERATORS.items():
        schema = getattr(torch.ops.dgemma, name).default._schema
        assert [argument.name for argument in described.arguments] == [argument.name for argument in schema.arguments]


def test_workspace_by_names() -> None:
    sizes = {"batch": 1, "length": 4, "vocabulary": 300, "hidden_size": 64}
    assert _C.workspace("soft_embedding", bfloat16=True, cuda=False, **sizes) > 0
    if BACKEND == "cpu":
        assert _C.workspace("append_to_cache", bfloat16=True, cuda=False) == 0
    for name, named, wrong in (("soft_embedding", {"tokens": 3}, "tokens"), ("soft", {}, "operator: got soft")):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            _C.workspace(name, bfloat16=True, cuda=False, **named)
