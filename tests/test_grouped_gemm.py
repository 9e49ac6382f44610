"""moe_ffn on every instruction set of the machine, and its form in torch, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, library

from backend import BACKEND, DTYPES, cpu_only
from bounds import assert_close
from dgemma_ext import _C
from dgemma_ext.ops import grouped_gemm
from dgemma_ext.ops.plain import grouped_gemm as grouped_gemm_plain
from dgemma_ext.ops.weights import experts_workspace_bytes
from reference import grouped_gemm as reference

NAN = float("nan")
# A raw op raises one or the other: before 2.13, torch keeps only the message of a C++ exception.
RAW_ERRORS = (RuntimeError, ValueError)


@dataclass
class Case:
    """The arguments of a call. Everything that must not be read is NaN."""

    input: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.input, self.expert_ids, self.expert_weights, self.gate_up, self.down

    def rows(self, rows: slice | list[int]) -> Case:
        """The same call for some of the tokens."""
        return replace(
            self,
            input=self.input[rows].contiguous(),
            expert_ids=self.expert_ids[rows].contiguous(),
            expert_weights=self.expert_weights[rows].contiguous(),
        )


def route(routing: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Expert ids [tokens, top_k]."""
    if routing == "one expert":
        return torch.full((tokens, top_k), experts - 1, dtype=torch.int32)
    if routing == "repeated":
        return torch.randint(0, experts, (tokens, top_k), dtype=torch.int32)
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k].int()
    if routing == "distinct":
        return ids
    if routing == "holes":
        ids[torch.rand(tokens, top_k) < 0.4] = -1
        ids[tokens // 2] = -1
        return ids
    assert routing == "nothing"
    return torch.full((tokens, top_k), -1, dtype=torch.int32)


def make_case(
    tokens: int, hidden_size: int, expert_size: int, experts: int, top_k: int, dtype: torch.dtype, routing: str
) -> Case:
    ids = route(routing, tokens, experts, top_k)
    # The widths of a trained model: gate, up and output are of order one.
    case = Case(
        input=torch.randn(tokens, hidden_size).to(dtype),
        expert_ids=ids,
        expert_weights=torch.rand(tokens, top_k) + 0.1,
        # One expert more than the operator gets, so that the memory behind the last one is poisoned.
        gate_up=(torch.randn(experts + 1, 2 * expert_size, hidden_size) / hidden_size**0.5).to(dtype),
        down=(torch.randn(experts + 1, hidden_size, expert_size) / expert_size**0.5).to(dtype),
    )
    case.input[(ids < 0).all(dim=1)] = NAN
    case.expert_weights[ids < 0] = NAN
    hit = set(ids.flatten().tolist())
    for expert in range(experts + 1):
        if expert not in hit:
            case.gate_up[expert] = NAN
            case.down[expert] = NAN
    case.gate_up, case.down = case.gate_up[:experts], case.down[:experts]
    return case


def run_into_poison(case: Case) -> Tensor:
    """Runs the op with outputs and workspace full of NaN, and with bytes behind the workspace that must not change."""
    out = torch.full_like(case.input, NAN)
    size = grouped_gemm.moe_ffn_workspace(*case.arguments)
    buffer = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    result = grouped_gemm.moe_ffn(*case.arguments, out=out, workspace=buffer[:size])
    assert result is out
    assert bool((buffer[size:] == 0xFF).all()), "written behind the workspace"
    return out


# tokens, hidden_size, expert_size, experts, top_k, routing
CASES = [
    (24, 352, 88, 16, 8, "distinct"),  # the model's sizes, reduced eight times
    (9, 2816, 704, 3, 2, "distinct"),  # the model's sizes, few experts
    (1, 64, 32, 4, 2, "distinct"),
    (17, 96, 49, 3, 2, "one expert"),  # an expert with all tokens; one weight row in the last task
    (150, 65, 51, 3, 2, "distinct"),  # several blocks of tokens, odd tails
    (90, 352, 96, 3, 2, "one expert"),  # whole tiles of rows and columns, three runs of packed tokens
    (40, 40, 24, 8, 3, "holes"),
    (12, 31, 15, 4, 6, "repeated"),  # more slots than experts
    (11, 200, 5, 2, 1, "distinct"),
    (7, 1, 1, 2, 1, "distinct"),
    (6, 5, 2, 3, 3, "distinct"),
    (5, 3, 300, 3, 2, "holes"),
    (4, 32, 16, 2, 2, "nothing"),
]
if BACKEND != "cpu":  # sizes that are multiples of eight; test_grouped_gemm_cuda.py has more of them
    CASES = [case for case in CASES if case[1] % 8 == 0 and case[2] % 8 == 0]
if BACKEND == "sim":  # where each expert of the model's sizes takes a second
    CASES[1] = (9, 2816, 704, 1, 1, "distinct")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_right(case: tuple[int, int, int, int, int, str], dtype: torch.dtype, cpu_variant: str) -> None:
    made = make_case(*case[:5], dtype=dtype, routing=case[5])
    exact = reference.moe_ffn(*made.arguments)
    low = reference.moe_ffn_rounded(*made.arguments)
    actual = run_into_poison(made)
    assert_close(actual, exact, dtype, low)
    assert torch.equal(grouped_gemm.moe_ffn(*made.arguments), actual)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_form_is_right(case: tuple[int, int, int, int, int, str], dtype: torch.dtype) -> None:
    made = make_case(*case[:5], dtype=dtype, routing=case[5])
    exact = reference.moe_ffn(*made.arguments)
    low = reference.moe_ffn_rounded(*made.arguments)
    assert_close(grouped_gemm_plain.moe_ffn(*made.arguments), exact, dtype, low)
    out = torch.full_like(made.input, NAN)
    grouped_gemm_plain.moe_ffn_out(*made.arguments, out=out, workspace=torch.empty(0, dtype=torch.uint8))
    assert torch.equal(out, grouped_gemm_plain.moe_ffn(*made.arguments))


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_passes(dtype: torch.dtype, cpu_variant: str) -> None:
    """16,384 tokens, three times the pairs that one pass takes."""
    made = make_case(16384, 12, 10, 5, 3, dtype=dtype, routing="holes")
    exact = reference.moe_ffn(*made.arguments)
    assert_close(run_into_poison(made), exact, dtype, reference.moe_ffn_rounded(*made.arguments))


@cpu_only
def test_no_tokens(cpu_variant: str) -> None:
    made = make_case(1, 16, 8, 2, 2, dtype=torch.float32, routing="distinct").rows(slice(0, 0))
    assert grouped_gemm.moe_ffn(*made.arguments).shape == (0, 16)
    assert run_into_poison(made).shape == (0, 16)


def test_infinities_and_nan_stay_in_their_token(cpu_variant: str) -> None:
    made = make_case(9, 64, 32, 2, 2, dtype=torch.bfloat16, routing="distinct")
    expected = grouped_gemm.moe_ffn(*made.arguments)
    made.input[3, 5] = NAN
    made.input[6, 7] = float("inf")
    actual = grouped_gemm.moe_ffn(*made.arguments)
    assert bool(actual[3].isnan().all())
    assert not bool(actual[6].isfinite().any())
    others = [t for t in range(9) if t not in (3, 6)]
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(352, 88), (67, 33)] if BACKEND == "cpu" else [(352, 88)])
def test_bits_of_a_token_do_not_depend_on_the_others(
    sizes: tuple[int, int], dtype: torch.dtype, cpu_variant: str
) -> None:
    """A token alone, among few (every remainder of a tile of tokens) and among many, also shuffled."""
    made = make_case(75, *sizes, 4, 2, dtype=dtype, routing="distinct")
    together = grouped_gemm.moe_ffn(*made.arguments)
    for count in (1, 2, 3, 5, 6, 7, 66):
        assert torch.equal(grouped_gemm.moe_ffn(*made.rows(slice(0, count)).arguments), together[:count])
    order = torch.randperm(75).tolist()
    assert torch.equal(grouped_gemm.moe_ffn(*made.rows(order).arguments), together[order])


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(dtype: torch.dtype, cpu_variant: str) -> None:
    """Of one expert, up to three runs of tokens that are packed together; the sizes fill every tile."""
    made = make_case(90, 64, 32, 1, 1, dtype=dtype, routing="distinct")
    together = grouped_gemm.moe_ffn(*made.arguments)
    for count in range(1, 90):
        assert torch.equal(grouped_gemm.moe_ffn(*made.rows(slice(0, count)).arguments), together[:count]), count


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_thread_count(dtype: torch.dtype, cpu_variant: str) -> None:
    made = make_case(33, 140, 101, 5, 3, dtype=dtype, routing="distinct")
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(grouped_gemm.moe_ffn(*made.arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    made = make_case(5, 32, 16, 3, 2, dtype=dtype, routing="holes")
    made.input.nan_to_num_()  # opcheck compares results, and NaN is not equal to itself
    made.expert_weights.nan_to_num_()
    library.opcheck(torch.ops.dgemma.moe_ffn.default, made.arguments)
    workspace = torch.zeros(grouped_gemm.moe_ffn_workspace(*made.arguments), dtype=torch.uint8)
    keywords = {"out": torch.zeros_like(made.input), "workspace": workspace}
    library.opcheck(torch.ops.dgemma.moe_ffn.out, made.arguments, keywords)


def test_plan_lists_pairs_by_expert() -> None:
    plan = _C.moe_ffn_plan([[2, 0], [-1, 2], [0, 0], [-1, -1]], 4)
    assert plan == "expert 0: 0/1 2/0 2/1\nexpert 2: 0/0 1/1\n"
    assert _C.moe_ffn_plan([], 4) == ""


@pytest.mark.parametrize("routing", ["distinct", "repeated", "holes", "one expert", "nothing"])
def test_plan_has_every_pair_once(routing: str) -> None:
    ids = route(routing, 50, 12, 4)
    wanted: dict[int, list[tuple[int, int]]] = {}
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                wanted.setdefault(expert, []).append((token, slot))
    lines = _C.moe_ffn_plan(ids.tolist(), 12).splitlines()
    assert lines == [
        f"expert {expert}: " + " ".join(f"{token}/{slot}" for token, slot in wanted[expert])
        for expert in sorted(wanted)
    ]


@pytest.mark.parametrize("bad", [-2, 12])
def test_plan_refuses_a_bad_id(bad: int) -> None:
    with pytest.raises(ValueError, match=f"expert_ids: got {bad}, wants -1 to 11"):
        _C.moe_ffn_plan([[0, 1], [2, bad]], 12)


# The error and its message, whose first word is the argument.
BAD_INPUT: dict[str, tuple[str, Callable[[Case], Case]]] = {
    "input in float16": ("input", lambda c: replace(c, input=c.input.half())),
    "input of one dimension": ("input", lambda c: replace(c, input=c.input[0].contiguous())),
    "input of another width": ("gate_up", lambda c: replace(c, input=c.input[:, :31].contiguous())),
    "input transposed": ("input", lambda c: replace(c, input=c.input.t().contiguous().t())),
    "ids in int64": ("expert_ids", lambda c: replace(c, expert_ids=c.expert_ids.long())),
    "ids for fewer tokens": ("expert_ids", lambda c: replace(c, expert_ids=c.expert_ids[:4].contiguous())),
    "ids of one dimension": ("expert_ids", lambda c: replace(c, expert_ids=c.expert_ids.flatten())),
    "an id too large": ("expert_ids", lambda c: replace(c, expert_ids=c.expert_ids + 3)),
    "an id too small": ("expert_ids", lambda c: replace(c, expert_ids=c.expert_ids - 4)),
    "an id far out": ("expert_ids", lambda c: replace(c, expert_ids=torch.full_like(c.expert_ids, 2**31 - 1))),
    "no slots": (
        "expert_ids",
        lambda c: replace(c, expert_ids=c.expert_ids[:, :0], expert_weights=c.expert_weights[:, :0]),
    ),
    "weights in bfloat16": ("expert_weights", lambda c: replace(c, expert_weights=c.expert_weights.bfloat16())),
    "weights of another shape": (
        "expert_weights",
        lambda c: replace(c, expert_weights=c.expert_weights[:, :1].contiguous()),
    ),
    "gate_up in another dtype": ("gate_up", lambda c: replace(c, gate_up=c.gate_up.bfloat16())),
    "gate_up without up": ("gate_up", lambda c: replace(c, gate_up=c.gate_up[:, :16].contiguous())),
    "gate_up transposed": ("gate_up", lambda c: replace(c, gate_up=c.gate_up.mT.contiguous().mT)),
    "down for fewer experts": ("down", lambda c: replace(c, down=c.down[:2].contiguous())),
    "down with rows and columns swapped": ("gate_up", lambda c: replace(c, down=c.down.mT.contiguous())),
    "down in another dtype": ("down", lambda c: replace(c, down=c.down.bfloat16())),
    "down of two dimensions": ("down", lambda c: replace(c, down=c.down[0].contiguous())),
    "down with a gap between experts": (
        "down",
        lambda c: replace(c, down=torch.cat([c.down, c.down])[::2][:3]),
    ),
    "no experts": ("down", lambda c: replace(c, gate_up=c.gate_up[:0], down=c.down[:0])),
    "on another device": ("gate_up", lambda c: replace(c, gate_up=c.gate_up.to("meta"))),
}


@cpu_only
@pytest.mark.parametrize("what", BAD_INPUT)
def test_wrapper_names_what_is_wrong(what: str) -> None:
    argument, spoil = BAD_INPUT[what]
    spoilt = spoil(make_case(5, 32, 16, 3, 2, dtype=torch.float32, routing="distinct"))
    with pytest.raises(ValueError, match=f"^{argument}: got .*, wants "):
        grouped_gemm.moe_ffn(*spoilt.arguments)


@cpu_only
@pytest.mark.parametrize("what", [what for what in BAD_INPUT if what != "on another device"])
def test_raw_op_refuses(what: str) -> None:
    spoilt = BAD_INPUT[what][1](make_case(5, 32, 16, 3, 2, dtype=torch.float32, routing="distinct"))
    with pytest.raises(RAW_ERRORS, match=r"dgemma::moe_ffn: \w+: got .*, wants "):
        torch.ops.dgemma.moe_ffn(*spoilt.arguments)


BAD_TARGETS: dict[str, tuple[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "out in another dtype": ("out", lambda out, workspace: (out.bfloat16(), workspace)),
    "out for fewer tokens": ("out", lambda out, workspace: (out[:4], workspace)),
    "out transposed": ("out", lambda out, workspace: (out.t().contiguous().t(), workspace)),
    "workspace of floats": ("workspace", lambda out, workspace: (out, workspace.float())),
    "workspace too small": ("workspace", lambda out, workspace: (out, workspace[:-1])),
    "no workspace": ("workspace", lambda out, workspace: (out, workspace[:0])),
    "workspace at an odd address": ("workspace", lambda out, workspace: (out, torch.cat([workspace, workspace])[1:])),
    "workspace with gaps": ("workspace", lambda out, workspace: (out, torch.cat([workspace, workspace])[::2])),
}


@cpu_only
@pytest.mark.parametrize("what", BAD_TARGETS)
def test_bad_out_and_workspace(what: str) -> None:
    argument, spoil = BAD_TARGETS[what]
    made = make_case(5, 32, 16, 3, 2, dtype=torch.float32, routing="distinct")
    workspace = torch.zeros(grouped_gemm.moe_ffn_workspace(*made.arguments), dtype=torch.uint8)
    out, workspace = spoil(torch.zeros_like(made.input), workspace)
    with pytest.raises(ValueError, match=f"^{argument}.*: got .*, wants "):
        grouped_gemm.moe_ffn(*made.arguments, out=out, workspace=workspace)
    with pytest.raises(RAW_ERRORS, match=rf"dgemma::moe_ffn: {argument}.*: got .*, wants "):
        torch.ops.dgemma.moe_ffn.out(*made.arguments, out=out, workspace=workspace)


def workspace(*sizes: Any) -> int:
    *extents, dtype = sizes
    return experts_workspace_bytes(*extents, dtype=dtype, device="cpu", format=None)


def test_workspace_of_sizes_that_are_not_taken_is_zero() -> None:
    assert workspace(1, 0, 16, 3, 2, torch.float32) == 0
    assert workspace(-1, 32, 16, 3, 2, torch.float32) == 0
    assert workspace(2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1, torch.bfloat16) == 0


@cpu_only
def test_workspace_stops_growing_with_tokens() -> None:
    """At the model's width a pass is 2,048 tokens; longer calls need no more memory."""
    sizes = [workspace(tokens, 2816, 704, 128, 8, torch.bfloat16) for tokens in (256, 2048, 16384)]
    assert sizes[0] < sizes[1] == sizes[2] < 220e6


@pytest.mark.parametrize("bad", [5, -2])
def test_plain_form_refuses_a_bad_id(bad: int) -> None:
    made = make_case(3, 8, 4, 3, 2, dtype=torch.float32, routing="distinct")
    made.expert_ids[1, 1] = bad
    with pytest.raises(ValueError, match=f"dgemma::moe_ffn: expert_ids: got {bad}, wants -1 or 0 to 2"):
        grouped_gemm_plain.moe_ffn(*made.arguments)


@cpu_only
def test_variants_differ_only_in_rounding() -> None:
    """The environment variable is read at every call: another variant gives other bits."""
    if "avx2" not in _C.cpu_variants():
        pytest.skip("this machine has the scalar variant alone")
    made = make_case(8, 352, 88, 4, 2, dtype=torch.float32, routing="distinct")
    before = os.environ.get("DGEMMA_CPU")
    results = []
    try:
        for name in ("scalar", "avx2"):
            os.environ["DGEMMA_CPU"] = name
            results.append(grouped_gemm.moe_ffn(*made.arguments))
    finally:
        if before is None:
            del os.environ["DGEMMA_CPU"]
        else:
            os.environ["DGEMMA_CPU"] = before
    assert not torch.equal(results[0], results[1])
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
