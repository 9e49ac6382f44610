"""Block attention: every CPU variant and the plain form against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import library

from backend import BACKEND, DTYPES, VARIANTS, cpu_only
from block_attention_cases import NAN, SENTINEL, Built, Case, Request, W
from dgemma_ext.ops import block_attention
from dgemma_ext.ops.plain import block_attention as block_attention_plain


def check(case: Case, dtype: torch.dtype) -> None:
    built = Built(case, dtype)
    built.poison_unseen()
    built.check(built.run())
    if BACKEND == "cpu":
        built.check(built.run(block_attention_plain))


CANVAS_CASES = {
    "no_prefix": Case([Request(0, 16)], window=W, capacity=W - 1),
    "no_prefix_no_cache": Case([Request(0, 5)], window=1, capacity=0),
    "one_token": Case([Request(1, 1)], window=W, capacity=W - 1),
    **{f"prefix_{p}": Case([Request(p, 16)], window=W, capacity=W - 1) for p in (1, W - 2, W - 1, W, W + 1)},
    "ring_wrapped": Case([Request(5 * W + 7, 16)], window=W, capacity=W - 1),
    "capacity_above_window": Case([Request(100, 16)], window=W, capacity=W + 13),
    "no_window": Case([Request(200, 16)], capacity=256),
    "several_tiles": Case([Request(300, 70)], capacity=512, query_heads=8),
    "window_one": Case([Request(9, 4)], window=1, capacity=4),
    "ragged": Case(
        [Request(3, 7, 2), Request(60, 16, 0), Request(9, 5, -1), Request(0, 1, 3), Request(31, 0, 1)],
        window=W,
        capacity=W - 1,
        block=20,
    ),
    "same_slot_read_twice": Case([Request(8, 5, -1), Request(8, 4, 0)], capacity=8),
    "scaled": Case([Request(40, 9)], capacity=64, scale=0.125),
}
CAUSAL_CASES = {
    "no_prefix": Case([Request(0, 40)], window=W, capacity=W - 1),
    **{f"prefix_{p}": Case([Request(p, 16)], window=W, capacity=W - 1) for p in (1, W - 2, W - 1, W, W + 1)},
    "one_row": Case([Request(50, 1)], window=W, capacity=W - 1),
    "block_beyond_window": Case([Request(70, 3 * W)], window=W, capacity=W - 1),
    "no_window": Case([Request(150, 150)], capacity=300),
    "window_one": Case([Request(9, 4)], window=1, capacity=1),
    "ragged": Case([Request(3, 7, 1), Request(60, 16, 0), Request(9, 5, -1)], window=W, capacity=W + 3, block=30),
    "span_in_block": Case([Request(10, 30, 0, [(15, 31)])], window=W, capacity=W - 1),
    "spans": Case(
        [Request(10, 30, 0, [(0, 4), (12, 15), (15, 16), (30, 37)]), Request(40, 8, 1, [(44, 44), (45, 90)])],
        window=W,
        capacity=W - 1,
    ),
    "span_into_prefix": Case([Request(20, 10, 0, [(12, 26)])], window=6, capacity=15),
    "span_that_left_the_ring": Case([Request(40, 10, 0, [(12, 46)])], window=6, capacity=11),
    "overlapping_spans": Case([Request(5, 20, 0, [(7, 14), (10, 22)])], window=3, capacity=2),
    "span_without_window": Case([Request(5, 200, 0, [(30, 190)])], capacity=5),
}
HEADS = {
    "group_1": {"query_heads": 3, "key_heads": 3},
    "group_2": {"query_heads": 4, "key_heads": 2},
    "group_8": {"query_heads": 8, "key_heads": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CANVAS_CASES)
def test_canvas(name: str, dtype: torch.dtype, cpu_variant: str) -> None:
    check(CANVAS_CASES[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_causal(name: str, dtype: torch.dtype, cpu_variant: str) -> None:
    case = CAUSAL_CASES[name]
    case.causal = True
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 20, 33, 256, 512] if BACKEND == "cpu" else [16, 64, 128, 256, 512])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_dimensions(heads: str, head_dim: int, dtype: torch.dtype, cpu_variant: str) -> None:
    shape = {**HEADS[heads], "head_dim": head_dim, "window": 100, "capacity": 99}
    check(Case([Request(90, 21, 1), Request(400, 35, 0)], **shape), dtype)
    check(Case([Request(130, 35, 0, [(135, 160)])], causal=True, **shape), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_shapes(variant: str, data: st.DataObject) -> None:
    draw = data.draw
    causal, window = draw(st.booleans()), draw(st.integers(0, 40))
    slots = draw(st.permutations(range(3)))
    requests = []
    for slot in slots[: draw(st.integers(1, 3))]:
        prefix, rows = draw(st.integers(0, 150)), draw(st.integers(0, 40))
        edges = st.integers(max(0, prefix - 30), prefix + rows + 10)
        spans = [tuple(sorted(draw(st.tuples(edges, edges)))) for _ in range(draw(st.integers(0, 3)))]
        requests.append(Request(prefix, rows, draw(st.sampled_from([slot, slot, slot, -1])), spans if causal else []))
    needed = max([r.prefix if window == 0 else min(r.prefix, window - 1) for r in requests])
    key_heads = draw(st.integers(1, 3))
    case = Case(
        requests,
        query_heads=key_heads * draw(st.integers(1, 4)),
        key_heads=key_heads,
        head_dim=draw(st.integers(1, 70) if BACKEND == "cpu" else st.sampled_from([16, 32, 64])),
        window=window,
        capacity=max(1, needed) + draw(st.integers(0, 20)),
        block=draw(st.integers(1, 45)),
        causal=causal,
        scale=draw(st.sampled_from([1.0, 0.25])),
    )
    # The global bound is on a mean square; with fewer elements a single rounding error may exceed it.
    values = [r.rows * case.query_heads * case.head_dim for r in requests if r.slot >= 0]
    assume(all(count == 0 or count >= 64 for count in values))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    with pytest.MonkeyPatch.context() as patch:
        if BACKEND == "cpu":
            patch.setenv("DGEMMA_CPU", variant)
        check(case, draw(st.sampled_from(DTYPES)))


def test_true_heads_at_a_long_prefix(cpu_variant: str) -> None:
    """One key head of each layer type of the model with its queries, above the window of 1,024."""
    if cpu_variant == "scalar":
        check(Case([Request(1100, 2)], query_heads=2, key_heads=1, head_dim=256, window=1024, capacity=1023), DTYPES[1])
        return
    sliding = {"query_heads": 2, "key_heads": 1, "head_dim": 256, "window": 1024, "capacity": 1023}
    full = {"query_heads": 8, "key_heads": 1, "head_dim": 512, "capacity": 1500}
    for dtype in DTYPES:
        check(Case([Request(1500, 80)], **sliding), dtype)
        check(Case([Request(1500, 40)], causal=True, **sliding), dtype)
        check(Case([Request(1400, 33)], **full), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_alone_in_a_batch_and_over_threads(causal: bool, dtype: torch.dtype, cpu_variant: str) -> None:
    requests = [Request(70, 40, 0), Request(200, 70, 1), Request(0, 3, 2), Request(31, 12, -1)]
    shape: dict[str, Any] = {"query_heads": 8, "window": 50, "capacity": 49, "causal": causal}
    built = Built(Case(requests, block=75, **shape), dtype)
    together = built.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(built.run(), together)
    finally:
        torch.set_num_threads(threads)
    for b, r in enumerate(requests[:3]):
        alone = Built(Case([Request(r.prefix, r.rows, 0)], **shape), dtype)
        alone.query[0], alone.key[0], alone.value[0] = (x[b, : r.rows] for x in (built.query, built.key, built.value))
        alone.prefix_key[0], alone.prefix_value[0] = built.prefix_key[r.slot], built.prefix_value[r.slot]
        assert torch.equal(alone.run()[0], together[b, : r.rows])


@pytest.mark.parametrize("head_dim", [32, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_bits_alone_and_in_a_batch_where_keys_are_split(causal: bool, head_dim: int, cpu_variant: str) -> None:
    """Over 512 visible keys a GPU splits them; the number of parts depends on the request alone."""
    requests = [Request(530, 5, 1), Request(20, 3, 2), Request(900, 9, 0)]
    shape: dict[str, Any] = {"query_heads": 2, "key_heads": 1, "head_dim": head_dim, "capacity": 950, "causal": causal}
    built = Built(Case(requests, block=11, **shape), torch.bfloat16)
    together = built.run()
    built.check(together)
    for b, r in enumerate(requests):
        alone = Built(Case([Request(r.prefix, r.rows, 0)], **shape), torch.bfloat16)
        alone.query[0], alone.key[0], alone.value[0] = (x[b, : r.rows] for x in (built.query, built.key, built.value))
        alone.prefix_key[0], alone.prefix_value[0] = built.prefix_key[r.slot], built.prefix_value[r.slot]
        assert torch.equal(alone.run()[0], together[b, : r.rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given_workspace", [False, True])
def test_out_writes_only_rows_of_queries(
    given_workspace: bool, causal: bool, dtype: torch.dtype, cpu_variant: str
) -> None:
    built = Built(Case([Request(30, 6, 0), Request(4, 9, 1), Request(4, 9, -1)], block=12, causal=causal), dtype)
    out = torch.full_like(built.query, SENTINEL)
    workspace = block_attention.attention_workspace(built.query, built.key) if given_workspace else None
    if workspace is not None:
        workspace.fill_(255)  # these bytes are NaN in both types
    function = block_attention.causal_attention if causal else block_attention.canvas_attention
    assert function(*built.operands(), out=out, workspace=workspace) is out
    built.check(out, outside=SENTINEL)
    plain = block_attention_plain.causal_attention_out if causal else block_attention_plain.canvas_attention_out
    out.fill_(SENTINEL)
    plain(*built.operands(), out=out, workspace=torch.empty(0))
    built.check(out, outside=SENTINEL)


@cpu_only
def test_a_workspace_at_any_address(cpu_variant: str) -> None:
    built = Built(Case([Request(30, 6)]), torch.bfloat16)
    size = block_attention.attention_workspace(built.query, built.key).numel()
    for offset in (0, 1, 63):
        out = torch.full_like(built.query, NAN)
        workspace = torch.full((offset + size,), 255, dtype=torch.uint8)[offset:]
        block_attention.canvas_attention(*built.operands(), out=out, workspace=workspace)
        built.check(out)


def test_nan_and_infinity_are_kept(cpu_variant: str) -> None:
    """A NaN in a key, and infinite scores, reach only the rows that see them."""
    case = Case([Request(10, 8)], query_heads=1, key_heads=1, causal=True)
    for poison in (NAN, float("inf")):
        built = Built(case, DTYPES[0])
        built.query[0].abs_()
        built.key[0, 5] = poison
        result = built.run()[0]
        assert bool(torch.isfinite(result[:5]).all())
        assert bool(torch.isnan(result[5:]).all())


def test_large_scores_do_not_overflow(cpu_variant: str) -> None:
    built = Built(Case([Request(200, 8)], capacity=200), DTYPES[0])
    built.query *= 1e4
    result = built.run()
    assert bool(torch.isfinite(result).all())
    # One key has all the probability of a row.
    winner = built.wanted(0)
    bound = 1e-5 if DTYPES[0] == torch.float32 else 2.0**-8
    assert float((result[0].double() - winner).abs().max()) < bound * float(winner.abs().max())


@cpu_only
def test_empty_batch_and_empty_block() -> None:
    for batch, block in ((0, 4), (2, 0)):
        query, key = torch.zeros(batch, block, 4, 8), torch.zeros(batch, block, 2, 8)
        cache, numbers = torch.zeros(2, 6, 2, 8), torch.arange(batch, dtype=torch.int32)
        for module in (block_attention, block_attention_plain):
            assert module.canvas_attention(query, key, key, cache, cache, numbers, numbers).shape == query.shape
            assert module.causal_attention(query, key, key, cache, cache, numbers, numbers).shape == query.shape
            module.append_to_cache(key, key, cache, cache.clone(), numbers, numbers)
        assert bool((cache == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    canvas = Built(Case([Request(10, 4, 1), Request(3, 5, 0)], window=W, capacity=W - 1), dtype)
    spans = [(11, 13)]
    causal = Built(Case([Request(10, 4, 1, spans), Request(3, 5, 0)], capacity=16, causal=True), dtype)
    for built, op in ((canvas, torch.ops.dgemma.canvas_attention), (causal, torch.ops.dgemma.causal_attention)):
        for tensor in (built.query, built.key, built.value, built.prefix_key, built.prefix_value):
            tensor.nan_to_num_(0.0)  # opcheck compares tensors with NaN as unequal
        library.opcheck(op.default, built.operands())
        given = {
            "out": torch.zeros_like(built.query),
            "workspace": block_attention.attention_workspace(built.query, built.key),
        }
        given["workspace"].zero_()
        library.opcheck(op.out, built.operands(), given)
    place = (causal.prefix_key, causal.prefix_value, causal.slot, causal.prefix_length, causal.length)
    library.opcheck(torch.ops.dgemma.append_to_cache.default, (causal.key, causal.value, *place))
