"""The layer's operations and the router's of the C interface on the CPU, compared with torch's operators.

Python's CPU path has the same bits but for the gated activation and the products, so a C host gets its tokens.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backend import BACKEND, VARIANTS
from bounds import assert_close
from c_interface import DTYPES, call, context, load, must, operation
from c_operations import EPSILON, denoise_operations, layer_operations, tensor, with_workspace
from denoise_cases import bits
from dgemma_ext.ops import denoise, layer
from dgemma_ext.ops.plain import layer as layer_plain
from dgemma_ext.ops.plain import router as router_plain

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="of the CPU's functions alone")

# The share of a bfloat16 activation's values that may round to the neighbour: tanh is another one.
NEIGHBOURS = 0.01
BF16, FP32 = torch.bfloat16, torch.float32
# tokens and hidden sizes: the model's, the bundled models', less than a vector, no whole number of vectors
ROWS = [(5, 2816), (37, 96), (3, 7), (300, 130)]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load()


def plain(name: str, values: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of torch's operators as in Python's CPU path; in float64 for values of that type."""
    v = values
    if name == "token_embedding":
        # The scale is rounded to the model's dtype first.
        hidden = functional.embedding(v["ids"], v["embedding"]) * float(torch.tensor(v["scale"]).to(v["dtype"]))
        if v["conditioning"] is not None:
            hidden = hidden + v["conditioning"]
        return {"output": layer.rms_norm(hidden, None, EPSILON) if v["normalise"] else hidden}
    if name == "rms_norm":
        return {"output": layer.rms_norm(v["input"], v["weight"], EPSILON)}
    if name == "normalise_heads":
        given = ("raw_query", "raw_key", "raw_value", "query_norm", "key_norm", "cosine", "sine")
        made: Any = layer_plain.normalise_heads(*(v[n] for n in given), EPSILON)
        return dict(zip(("query", "key", "value"), made, strict=True))
    if name == "attention_residual":
        given = ("hidden", "attended", "attended_norm", "dense_norm", "sparse_norm")
        made = layer_plain.attention_residual(*(v[n] for n in given), EPSILON)
        return dict(zip(("residual", "dense_input", "sparse_input"), made, strict=True))
    if name == "gelu_product":
        return {"output": layer_plain.gelu_product(v["gate"], v["up"])}
    given = ("residual", "dense", "sparse", "dense_norm", "sparse_norm", "norm", "next_norm")
    made = layer_plain.layer_output(*(v[n] for n in given), v["scalar"], EPSILON)
    return dict(zip(("output", "next_input"), made, strict=True))


def in_double(values: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in values.items()}


LAYER = ["token_embedding", "rms_norm", "normalise_heads", "attention_residual", "gelu_product", "layer_output"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), ROWS)
@pytest.mark.parametrize("name", LAYER)
def test_layer(library: ctypes.CDLL, name: str, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    values = layer_operations(dtype, tokens, hidden)[name]
    must(library, f"cpu_{name}", **values)
    wide = plain(name, in_double(values))
    for output, wanted in plain(name, values).items():
        got = values[output]
        if name != "gelu_product" and hidden >= 8:  # torch adds up fewer values in another order
            assert bits(got) == bits(wanted), output
        elif dtype == BF16:
            assert float((got != wanted).float().mean()) <= NEIGHBOURS, output
        assert_close(got, wide[output], dtype, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYER)
def test_small_rows_meet_epsilon(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    """Mean squares near epsilon and below: where epsilon is missing, or added elsewhere, results are off by half."""
    values = layer_operations(dtype, 6, 96)[name]
    for field, value in values.items():
        if (
            isinstance(value, Tensor)
            and not field.endswith("norm")
            and field not in ("weight", "cosine", "sine", "ids")
        ):
            values[field] = value * 5e-4
    must(library, f"cpu_{name}", **values)
    wide = plain(name, in_double(values))
    for output, wanted in plain(name, values).items():
        assert_close(values[output], wide[output], dtype, wanted)


@pytest.mark.parametrize(("option", "name"), [
    ("weight", "rms_norm"), ("raw_value", "normalise_heads"), ("next_norm", "layer_output"),
    ("conditioning", "token_embedding"),
])  # fmt: skip
def test_optional_arguments(library: ctypes.CDLL, name: str, option: str) -> None:
    values = layer_operations(BF16)[name]
    given = {**values, option: None}
    if option == "next_norm":
        given["next_input"] = None
    must(library, f"cpu_{name}", **given)
    wanted = plain(name, values if option == "next_norm" else given)
    for output in set(wanted) - {"next_input"}:
        assert bits(values[output]) == bits(wanted[output])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_alone_is_torchs_bit_for_bit(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = {**layer_operations(dtype)["token_embedding"], "normalise": 0}
    for given in (values, {**values, "conditioning": None}):
        must(library, "cpu_token_embedding", **given)
        assert bits(values["output"]) == bits(plain("token_embedding", given)["output"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYER)
def test_all_instruction_sets_give_the_same_bits(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    values = layer_operations(dtype, 9, 138)[name]
    outputs = list(plain(name, values))
    seen = set()
    for variant in VARIANTS:
        must(library, f"cpu_{name}", variant, **values)
        seen.add(tuple(b for output in outputs for b in bits(values[output])))
    assert len(seen) == 1


# The router ----------------------------------------------------------------------------------------------------------

ROUTES = [(5, 2816, 128, 8), (37, 96, 4, 2), (20, 130, 16, 16), (1, 7, 1, 1)]


def route(library: ctypes.CDLL, values: dict[str, Any], variant: str | None = None) -> tuple[Tensor, Tensor]:
    must(library, "cpu_route", variant, **with_workspace(library, "route", values))
    return values["expert_ids"], values["expert_weights"]


def route_values(dtype: torch.dtype, tokens: int, hidden: int, experts: int, top_k: int) -> dict[str, Any]:
    return {
        **layer_operations(dtype, tokens, hidden)["route"],
        "experts": experts,
        "top_k": top_k,
        "projection": tensor(dtype, experts, hidden, scale=hidden**-0.5),
        "per_expert_scale": tensor(dtype, experts, scale=0.1, offset=1.0),
        "expert_ids": torch.full((tokens, top_k), -7, dtype=torch.int32),
        "expert_weights": torch.full((tokens, top_k), float("nan")),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTES)
def test_route(
    library: ctypes.CDLL, tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype, cpu_variant: str
) -> None:
    values = route_values(dtype, tokens, hidden, experts, top_k)
    ids, weights = route(library, values, cpu_variant)
    operands = (values["input"], values["scale"], values["projection"])
    found = router_plain.probabilities(*operands, EPSILON)
    # A score may round to its neighbour where sums have another order; another choice is then as good.
    chosen, best = found.gather(1, ids.long()), found.topk(top_k).values
    step = {FP32: 1e-5, BF16: 2.0**-6}[dtype]
    assert bool((best - chosen <= step * best).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    wanted = router_plain.weights_of(found, ids.long(), values["per_expert_scale"])
    assert bool(((weights - wanted).abs() <= 2 * step * wanted.abs()).all())
    same_ids, _ = router_plain.route(*operands, values["per_expert_scale"], top_k, EPSILON)
    assert float((ids == same_ids).all(dim=1).float().mean()) >= 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_rounded_where_torchs_are(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """With a unit matrix the scores are the projection's input; squares that add up exactly leave only roundings."""
    values = route_values(dtype, 40, 64, 64, 64)
    choice = torch.tensor([0.5, 1.0, 2.0, -0.5, -1.0, -2.0])
    values["input"], values["projection"] = choice[torch.randint(6, (40, 64))].to(dtype), torch.eye(64).to(dtype)
    ids, weights = route(library, values)
    operands = (values["input"], values["scale"], values["projection"], values["per_expert_scale"])
    wanted_ids, wanted = router_plain.route(*operands, 64, EPSILON)
    assert torch.equal(ids, wanted_ids)
    assert torch.allclose(weights, wanted, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(5, 2816), (37, 96), (300, 130)])
def test_router_input(library: ctypes.CDLL, tokens: int, hidden: int, dtype: torch.dtype, cpu_variant: str) -> None:
    values = layer_operations(dtype, tokens, hidden)["router_input"]
    must(library, "cpu_router_input", cpu_variant, **values)
    assert bits(values["output"]) == bits(router_plain.scaled_input(values["input"], values["scale"], EPSILON))


# Sums of fewer than four, of fewer than eight, of eight, with what is left of vectors, and of blocks of 512.
CHOICES = [(37, 4, 2), (5, 8, 7), (40, 128, 8), (2, 20, 13), (9, 1200, 1200)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), CHOICES)
def test_router_choice(
    library: ctypes.CDLL, tokens: int, experts: int, top_k: int, dtype: torch.dtype, cpu_variant: str
) -> None:
    probabilities = (torch.rand(tokens, experts) * 40).round() / 40  # of few values, so that some tie
    probabilities[0, -1] = float("nan")
    values = {**route_values(dtype, tokens, 8, experts, top_k), "probabilities": probabilities}
    values = {name: value for name, value in values.items() if name in layer_operations(dtype)["router_choice"]}
    must(library, "cpu_router_choice", cpu_variant, **values)
    ids, weights = router_plain.choice(probabilities, values["per_expert_scale"], top_k)
    assert torch.equal(values["expert_ids"], ids)
    assert bool(values["expert_weights"][0].isnan().all())
    assert bits(values["expert_weights"][1:]) == bits(weights[1:])


def test_ties_go_to_the_lower_expert(library: ctypes.CDLL) -> None:
    values = route_values(BF16, 6, 64, 7, 7)
    values["projection"] = values["projection"][:1].expand(7, 64).contiguous()
    ids, weights = route(library, values)
    assert ids.tolist() == [list(range(7))] * 6
    assert torch.allclose(weights, values["per_expert_scale"].float()[None] / 7, rtol=1e-5)


def test_a_token_that_is_not_finite_gets_experts_and_no_weights(library: ctypes.CDLL) -> None:
    values = route_values(FP32, 3, 64, 5, 3)
    values["input"][1, 7] = float("nan")
    ids, weights = route(library, values)
    assert ids[1].tolist() == [0, 1, 2]
    assert bool(torch.isnan(weights[1]).all())
    assert bool(torch.isfinite(weights[[0, 2]]).all())


# The head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "vocabulary", "hidden"), [(37, 384, 96), (5, 1000, 136), (1, 129, 7)])
def test_head(library: ctypes.CDLL, length: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    # The first and two adjacent requests are inactive, and two adjacent ones are active.
    values = denoise_operations(dtype, 6, length, vocabulary, hidden)["vocabulary_head"]
    active = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.uint8)
    on, off = active.nonzero()[:, 0].tolist(), (active == 0).nonzero()[:, 0].tolist()
    values["hidden"][off] = float("nan")
    values["raw"].fill_(7.0)
    values["statistics"]["logits"] = {**values["statistics"]["logits"], "raw": None, "active": active}
    must(library, "cpu_vocabulary_head", **with_workspace(library, "vocabulary_head", values))
    assert bool((values["raw"][off] == 7.0).all()), "an inactive request's logits were written"
    exact = values["hidden"].double() @ values["embedding"].double().T
    for b in on:
        assert_close(values["raw"][b], exact[b], dtype, functional.linear(values["hidden"][b], values["embedding"]))
    # The statistics are those of the stored logits; inactive requests keep theirs.
    temperature = values["statistics"]["logits"]["temperature"]
    expected = denoise.vocabulary_statistics(values["raw"], 30.0, temperature, active.bool(), None, None)
    for name, wanted in expected._asdict().items():
        assert bits(values["statistics"][name][on]) == bits(wanted[on]), name
    assert bool((values["statistics"]["entropy"][off] == 0).all())


# Bits alone and among others, on any number of threads ---------------------------------------------------------------

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, TASK, ctypes.c_void_p)


@pytest.mark.skipif("DGEMMA_TEST_MACHINE" in os.environ, reason="the other machine cannot call a function here")
@pytest.mark.parametrize("name", [*LAYER, "route", "router_input", "router_choice"])
def test_tasks_in_any_order(library: ctypes.CDLL, name: str) -> None:
    """A host's parallel_for may run tasks in any order; each is run once."""
    values = layer_operations(BF16, 800, 130)[name]
    if name == "route":
        values = with_workspace(library, name, values)
    must(library, f"cpu_{name}", **values)
    choices = ["expert_ids", "expert_weights"]
    outputs = {"route": choices, "router_choice": choices, "router_input": ["output"]}.get(name) or list(
        plain(name, values)
    )
    wanted = [bits(values[output]) for output in outputs]
    for output in outputs:
        values[output].fill_(-1)
    counts: list[int] = []

    @PARALLEL_FOR
    def backwards(pool: int, tasks: int, task: Any, state: int) -> None:
        counts.append(tasks)
        for index in reversed(range(tasks)):
            task(state, index)

    place = context()
    place.parallel_for = ctypes.cast(backwards, ctypes.c_void_p)
    status = getattr(library, f"dgemma_cpu_{name}")(ctypes.byref(operation(name, values)), ctypes.byref(place))
    assert status == 0, place.message
    assert min(counts, default=0) > 1
    assert [bits(values[output]) for output in outputs] == wanted


def test_nothing_to_do_is_no_error(library: ctypes.CDLL) -> None:
    for name, values in layer_operations(BF16).items():
        empty = {n: None if isinstance(v, Tensor) else v for n, v in values.items()}
        assert call(library, f"cpu_{name}", **{**empty, "values" if name == "gelu_product" else "tokens": 0})[0] == 0
