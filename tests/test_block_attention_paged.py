"""Attention over pages: the bits of the contiguous form wherever the pages are, and nothing read that nobody sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import library

from backend import BACKEND, DTYPES, cpu_only
from block_attention_cases import NAN, SENTINEL, Case, Request, W
from block_attention_pages import LAYOUTS, Paged
from dgemma_ext.ops import block_attention
from dgemma_ext.ops.plain import block_attention as block_attention_plain

PAGE = 16
# On the test bed test_block_attention_paged_cuda.py has more.
HEAD_DIMS = {"cpu": [20, 256, 512], "sim": [16, 512], "cuda": [16, 32, 64, 128, 256, 512]}


def mixed(window: int, capacity: int = 200, **shape: Any) -> tuple[Case, list[bool]]:
    """Canvases and prompts at the window's and the pages' edges."""
    prefixes = [0, W - 2, W - 1, W, W + 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 5, 130]
    rows = [1, 16, PAGE + 1, 7, PAGE - 1, 1, 2 * PAGE, 5, 9, 12]
    requests = [Request(p, n, slot) for slot, (p, n) in enumerate(zip(prefixes, rows, strict=True))]
    requests[7].slot = -1  # has no rows
    return Case(requests, window=window, capacity=capacity, **shape), [b % 2 == 1 for b in range(len(requests))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("page_size", "layout"), [(1, "rows_first"), *((PAGE, name) for name in LAYOUTS), (48, "heads_first")]
)
@pytest.mark.parametrize("window", [0, W])
def test_bits_of_the_contiguous_form(
    window: int, page_size: int, layout: str, dtype: torch.dtype, cpu_variant: str
) -> None:
    """A batch of both kinds; every third entry of the table that nobody needs is wild, and all other rows are NaN."""
    case, causal = mixed(window)
    for flags in (causal, [not flag for flag in causal]):
        paged = Paged(case, dtype, flags, page_size, layout)
        result = paged.run()
        paged.check_bits(result)
        if BACKEND == "cpu":
            form = paged.arguments()
            plain = block_attention_plain.paged_attention(*form.values())
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            assert float((plain.float() - result.float()).abs().max()) < bound * float(result.float().abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS[BACKEND])
def test_heads_and_dimensions(head_dim: int, dtype: torch.dtype, cpu_variant: str) -> None:
    """The oracle's results as well, and where a GPU splits a request's keys."""
    requests = [Request(90, 21, 0), Request(600, 19, 1), Request(33, 40, 2)]
    for heads in ({"query_heads": 3, "key_heads": 3}, {"query_heads": 8, "key_heads": 1}):
        case = Case(requests, head_dim=head_dim, window=100 if heads["key_heads"] == 3 else 0, capacity=700, **heads)
        for causal in (False, True):
            paged = Paged(case, dtype, [causal] * 3, 32, "keys_beside_values")
            result = paged.run()
            paged.check_bits(result)
            padded = torch.zeros_like(paged.built.query)
            for b, rows in enumerate(paged.rows):
                padded[b, :rows] = paged.of_request(result, b)
            paged.form(0).check(padded)


@pytest.mark.parametrize("page_size", [4, 16])
def test_spans_of_requests_that_encode(page_size: int, cpu_variant: str) -> None:
    """Spans reach back over pages and up to the block's end; those of a canvas are not looked at."""
    spans = [(12, 26), (30, 90)]
    requests = [Request(20, 20, 0, spans), Request(20, 20, 1, spans), Request(60, 4, 2, [(0, 0), (61, 63)])]
    case = Case(requests, window=6, capacity=100)
    for dtype in DTYPES:
        paged = Paged(case, dtype, [True, True, True], page_size, "rows_first")
        paged.check_bits(paged.run())
        canvases = Paged(case, dtype, [False, True, False], page_size, "rows_first")
        with_spans = canvases.run()
        assert torch.equal(canvases.of_request(with_spans, 1), canvases.contiguous(1))
        plain_case = Case([Request(r.prefix, r.rows, r.slot) for r in requests], window=6, capacity=100)
        for b in (0, 2):
            without = Paged(plain_case, dtype, [False] * 3, page_size, "rows_first")
            without.built.__dict__.update(canvases.built.__dict__, spans=None, case=without.built.case)
            assert torch.equal(canvases.of_request(with_spans, b), without.contiguous(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_batch_and_place_change_no_bits(dtype: torch.dtype, cpu_variant: str) -> None:
    """A request alone, and with its pages somewhere else."""
    case, causal = mixed(W)
    paged = Paged(case, dtype, causal, PAGE, "rows_first")
    together = paged.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(paged.run(), together)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(len(paged.key_pages))
    moved = {"key_pages": paged.key_pages[order], "value_pages": paged.value_pages[order]}
    place = torch.argsort(order)
    there = (paged.page_table >= 0) & (paged.page_table < len(order))
    table = torch.where(there, place[paged.page_table.where(there, 0).long()].int(), paged.page_table)
    assert torch.equal(paged.run(**moved, page_table=table), together)
    for b in (1, 4, 9):
        start, end = (int(x) for x in paged.query_start[b : b + 2])
        alone = block_attention.paged_attention(
            paged.query[start:end].contiguous(),
            paged.key_pages,
            paged.value_pages,
            paged.page_table[b : b + 1],
            torch.tensor([0, end - start], dtype=torch.int32),
            paged.sequence_length[b : b + 1],
            paged.causal[b : b + 1],
            max_query_length=end - start,
            window=W,
        )
        assert torch.equal(alone, together[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_workspace", [False, True])
def test_out_writes_only_rows_of_requests(given_workspace: bool, dtype: torch.dtype, cpu_variant: str) -> None:
    case, causal = mixed(W)
    paged = Paged(case, dtype, causal, PAGE, "heads_first")
    out, workspace = torch.full_like(paged.query, SENTINEL), None
    if given_workspace:
        sizes = (len(causal), max(paged.rows), case.query_heads, case.key_heads, case.head_dim, out.device)
        workspace = torch.full((block_attention.paged_attention_workspace_bytes(*sizes),), 255, dtype=torch.uint8)
    assert paged.run(out=out, workspace=workspace) is out
    paged.check_bits(out, outside=SENTINEL)
    out.fill_(SENTINEL)
    block_attention_plain.paged_attention_out(*paged.arguments().values(), out=out)
    start, end = int(paged.query_start[0]), int(paged.query_start[-1])
    assert bool((out[:start] == SENTINEL).all())
    assert bool((out[end:] == SENTINEL).all())
    assert not bool((out[start:end] == SENTINEL).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("append", [block_attention.append_to_pages, block_attention_plain.append_to_pages])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append(layout: str, append: Any, dtype: torch.dtype) -> None:
    """Rows go to their slots, those of -1 nowhere, and what lies between them stays."""
    paged = Paged(Case([Request(9, 8)], head_dim=32), dtype, [True], PAGE, layout)
    pools = (paged.key_pages, paged.value_pages)
    for pool in pools:
        pool.fill_(SENTINEL)
    tokens, slots = 70, len(paged.key_pages) * PAGE
    blocks = [torch.randn(tokens, 2, 32).to(dtype) for _ in pools]
    slot = torch.randperm(slots)[:tokens]
    slot[len(slot) // 2 :: 3] = -1
    append(*blocks, *pools, slot)
    stored = slot >= 0
    for pool, block in zip(pools, blocks, strict=True):
        rows = pool.flatten(0, 1)  # a copy, of most layouts
        assert torch.equal(rows[slot[stored]], block[: len(slot)][stored])
        rest = torch.ones(slots, dtype=torch.bool)
        rest[slot[stored]] = False
        assert bool((rows[rest] == SENTINEL).all())


@cpu_only
def test_nothing_to_do() -> None:
    query, pages = torch.zeros(0, 4, 8), torch.zeros(3, 4, 2, 8)
    none, start = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for module in (block_attention, block_attention_plain):
        table = none.reshape(0, 5)
        keywords: dict[str, Any] = {"max_query_length": 0}
        spans = () if module is block_attention else (None,)
        operands = (query, pages, pages, table, start, none, none, *spans)
        assert module.paged_attention(*operands, **keywords).shape == query.shape
        module.append_to_pages(torch.zeros(0, 2, 8), torch.zeros(0, 2, 8), pages, pages.clone(), none.long())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    paged = Paged(
        Case([Request(10, 4, 1), Request(3, 5, 0)], window=W), dtype, [False, True], PAGE, "keys_beside_values"
    )
    arguments = paged.arguments()
    for name in ("query", "key_pages", "value_pages"):
        arguments[name].nan_to_num_(0.0)  # opcheck compares tensors with NaN as unequal
    operands = tuple(arguments.values())
    library.opcheck(torch.ops.dgemma.paged_attention.default, operands)
    sizes = (2, 5, 4, 2, 32, paged.query.device)
    workspace = torch.zeros(block_attention.paged_attention_workspace_bytes(*sizes), dtype=torch.uint8)
    given = {"out": torch.zeros_like(paged.query), "workspace": workspace}
    library.opcheck(torch.ops.dgemma.paged_attention.out, operands, given)
    key = torch.randn(3, 2, 32).to(dtype)
    # opcheck copies arguments one by one, so keys and values are tensors of their own.
    pages = [pool.contiguous() for pool in (paged.key_pages, paged.value_pages)]
    slot = torch.tensor([5, -1, 17])
    library.opcheck(torch.ops.dgemma.append_to_pages.default, (key, key.clone(), *pages, slot))


def good_arguments() -> dict[str, Any]:
    """Valid arguments of paged_attention: 2 requests of 5 and 3 rows, 4 pages of 4 rows."""
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([[2, 0, -1], [3, 1, 9]], [0, 5, 8], [7, 8], [1, 0])]
    table, start, length, causal = ints
    return {
        "query": torch.zeros(8, 4, 8),
        "key_pages": torch.zeros(4, 4, 2, 8),
        "value_pages": torch.zeros(4, 4, 2, 8),
        "page_table": table,
        "query_start": start,
        "sequence_length": length,
        "causal": causal,
        "spans": torch.tensor([[[1, 3]], [[0, 0]]], dtype=torch.int32),
        "max_query_length": 5,
        "window": 0,
        "scale": 1.0,
    }


def i32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD: list[tuple[str, Any]] = [
    ("query", torch.zeros(8, 3, 8)),
    ("query", torch.zeros(8, 8, 4).transpose(1, 2)),
    ("key_pages", torch.zeros(4, 4, 2, 8, dtype=torch.bfloat16)),
    ("key_pages", torch.zeros(4, 4, 8, 2).transpose(2, 3)),
    ("key_pages", torch.zeros(4, 4, 2)),
    ("value_pages", torch.zeros(4, 5, 2, 8)),
    ("value_pages", torch.zeros(4, 4, 8, 2).transpose(2, 3)),
    ("page_table", i32([4, 0, 0], [3, 1, 0])),
    ("page_table", i32([2, -1, 0], [3, 1, 0])),
    ("page_table", i32([2], [3])),
    ("page_table", torch.zeros(2, 3, dtype=torch.int64)),
    ("query_start", i32(0, 5)),
    ("query_start", i32(0, 6, 8)),  # more than max_query_length
    ("query_start", i32(5, 3, 8)),
    ("query_start", i32(-1, 3, 8)),
    ("query_start", i32(0, 5, 9)),
    ("sequence_length", i32(4, 8)),
    ("sequence_length", i32(7, 13)),
    ("sequence_length", i32(7, 8, 9)),
    ("causal", torch.ones(2, dtype=torch.bool)),
    ("causal", i32(1)),
    ("spans", i32([[3, 1]], [[0, 0]])),
    ("spans", i32([[1, 3]])),
    ("max_query_length", -1),
    ("window", -1),
    ("scale", NAN),
]


@cpu_only
@pytest.mark.parametrize(("name", "bad"), BAD, ids=[f"{name}_{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_input(name: str, bad: Any) -> None:
    """Refused by name before anything is read or written."""
    arguments = good_arguments()
    block_attention.paged_attention(**arguments)
    out = torch.full((8, 4, 8), SENTINEL)
    # A narrow table holds too few positions, and a query of another shape is told by what it does not fit.
    pattern = {"page_table": "page_table|sequence_length", "key_pages": "key_pages|value_pages"}.get(name, name)
    with pytest.raises(ValueError, match=rf"(^|: )({pattern})(\[[\d, ]+\])?: got .*, wants "):
        block_attention.paged_attention(**{**arguments, name: bad}, out=out)
    assert bool((out == SENTINEL).all())


@cpu_only
@pytest.mark.parametrize(("span", "refused"), [((1, 12), True), ((3, 11), True), ((1, 10), False), ((12, 12), False)])
def test_pages_that_spans_alone_show_are_checked(span: tuple[int, int], refused: bool) -> None:
    """A window of 2 shows positions 9 to 11; a span that holds a row shows what it begins with."""
    query, pages, table = torch.zeros(2, 4, 8), torch.zeros(4, 4, 2, 8), i32([9, 1, 2])
    operands = (query, pages, pages.clone(), table, i32(0, 2), i32(12), i32(1), i32([span]))
    keywords: Any = {"max_query_length": 2, "window": 2}
    if refused:
        with pytest.raises(ValueError, match=r"page_table\[0, 0\]: got 9, wants 0 \.\. 3"):
            block_attention.paged_attention(*operands, **keywords)
    else:
        assert bool((block_attention.paged_attention(*operands, **keywords) == 0.0).all())


@cpu_only
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("value", torch.zeros(3, 2, 7)),
        ("value_pages", torch.zeros(4, 4, 2, 8, dtype=torch.bfloat16)),
        ("value_pages", torch.zeros(4, 1, 2, 8).expand(4, 4, 2, 8)),  # all rows of a page are one
        ("slot", torch.tensor([0, 16, -1])),
        ("slot", i32(0, 1, 2)),
        ("slot", torch.tensor([0, 1])),
    ],
)
def test_bad_append(name: str, bad: torch.Tensor) -> None:
    key = torch.zeros(3, 2, 8)
    arguments = {"key": key, "value": key, "slot": torch.tensor([0, 15, -1])}
    arguments |= {"key_pages": torch.zeros(4, 4, 2, 8), "value_pages": torch.zeros(4, 4, 2, 8)}
    block_attention.append_to_pages(**arguments)
    with pytest.raises(ValueError, match=rf"(^|: ){name}(\[\d+\])?: got .*, wants "):
        block_attention.append_to_pages(**{**arguments, name: bad})


@cpu_only
def test_pages_whose_rows_overlap_are_refused() -> None:
    """Keys and values may take turns in a tensor, and not share rows of it."""
    key, slot = torch.ones(1, 2, 8), torch.tensor([3])
    both = torch.zeros(4, 4, 2, 16)
    keys, values = both.split(8, dim=-1)
    block_attention.append_to_pages(key, 2 * key, keys, values, slot)
    assert (float(keys.sum()), float(values.sum())) == (16.0, 32.0)
    for shared in (both[..., 4:12], keys):
        with pytest.raises(ValueError, match=r"value_pages: got .*overlaps key_pages"):
            block_attention.append_to_pages(key, key, keys, shared, slot)
