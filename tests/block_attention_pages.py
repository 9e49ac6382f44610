"""A case of block attention with its keys and values in pages: shuffled, and poisoned wherever nobody may look."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from block_attention_cases import NAN, Built, Case
from dgemma_ext.ops import block_attention

# Entries of the page table that must not be read.
NO_PAGE = (-1, 2**31 - 1, 10_000)
LAYOUTS = ("rows_first", "heads_first", "keys_beside_values", "layers_in_a_page", "values_by_themselves")


def make_pool(
    layout: str, pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, page size, heads, dim] of NaN, as engines lay them out."""
    full: Any = {"fill_value": NAN, "dtype": dtype}
    if layout == "rows_first":
        return (torch.full((pages, page_size, heads, dim), **full), torch.full((pages, page_size, heads, dim), **full))
    if layout == "heads_first":
        keys, values = torch.full((2, pages, heads, page_size, dim), **full).transpose(2, 3).unbind(0)
    elif layout == "keys_beside_values":
        keys, values = torch.full((pages, heads, page_size, 2 * dim), **full).transpose(1, 2).split(dim, dim=-1)
    elif layout == "values_by_themselves":  # with strides that are none of the keys'
        keys = torch.full((pages, page_size, heads, dim), **full)
        values = torch.full((pages, 3, heads, page_size, dim), **full)[:, 1].transpose(1, 2)
    else:
        keys, values = torch.full((pages, 3, page_size, heads, 2 * dim), **full)[:, 1].split(dim, dim=-1)
    return keys, values


class Paged:
    """The requests of a case one after the other, with positions in pages of a pool; `causal[b]`: what request b is.

    A request of slot -1 has no rows. Some rows in front of the first request and behind the last are nobody's.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, causal: list[bool], page_size: int, layout: str, outside: int = 2
    ) -> None:
        self.built = Built(case, dtype)
        self.causal_of, self.page_size = causal, page_size
        requests = case.requests
        self.rows = [r.rows if r.slot >= 0 else 0 for r in requests]
        starts = [outside + sum(self.rows[:b]) for b in range(len(requests) + 1)]
        self.query = torch.full((starts[-1] + outside, case.query_heads, case.head_dim), NAN, dtype=dtype)
        for b, rows in enumerate(self.rows):
            self.query[starts[b] : starts[b] + rows] = self.built.query[b, :rows]
        self.query_start = torch.tensor(starts, dtype=torch.int32)
        lengths = [r.prefix + rows for r, rows in zip(requests, self.rows, strict=True)]
        self.sequence_length = torch.tensor(lengths, dtype=torch.int32)
        self.causal = torch.tensor(causal, dtype=torch.int32) * 7  # any number but zero is a yes
        columns = max(-(-length // page_size) for length in lengths) + 2
        wanted = sum(-(-length // page_size) for length in lengths)
        pool = make_pool(layout, wanted + 3, page_size, case.key_heads, case.head_dim, dtype)
        self.key_pages, self.value_pages = pool
        order = torch.randperm(wanted + 3).tolist()
        self.page_table = torch.tensor(NO_PAGE, dtype=torch.int32).repeat(len(requests) * columns)
        self.page_table = self.page_table[: len(requests) * columns].reshape(len(requests), columns)
        for b, r in enumerate(requests):
            seen = self.mask(b).any(dim=0) if self.rows[b] else torch.zeros(0, dtype=torch.bool)
            for position in seen.nonzero().flatten().tolist():
                column, row = divmod(position, page_size)
                if int(self.page_table[b, column]) in NO_PAGE:
                    self.page_table[b, column] = order.pop()
                page = int(self.page_table[b, column])
                self.key_pages[page, row] = self.built.keys[b][position]
                self.value_pages[page, row] = self.built.values[b][position]
            del r

    def form(self, b: int) -> Built:
        """The contiguous form as request b has it."""
        self.built.case = replace(self.built.case, causal=self.causal_of[b])
        return self.built

    def mask(self, b: int) -> Tensor:
        return self.form(b).mask(b)

    def arguments(self) -> dict[str, Any]:
        case = self.built.case
        return {
            "query": self.query,
            "key_pages": self.key_pages,
            "value_pages": self.value_pages,
            "page_table": self.page_table,
            "query_start": self.query_start,
            "sequence_length": self.sequence_length,
            "causal": self.causal,
            "spans": self.built.spans,
            "max_query_length": max(self.rows),
            "window": case.window,
            "scale": case.scale,
        }

    def run(self, **keywords: Any) -> Tensor:
        return block_attention.paged_attention(**{**self.arguments(), **keywords})

    def of_request(self, result: Tensor, b: int) -> Tensor:
        start = int(self.query_start[b])
        return result[start : start + self.rows[b]]

    def contiguous(self, b: int) -> Tensor:
        """What the operators on slots give for request b: [rows, query heads, head dim]."""
        result: Tensor = self.form(b).run()[b, : self.rows[b]]
        return result

    def check_bits(self, result: Tensor, outside: float = 0.0) -> None:
        """Every request has the contiguous form's bits, and rows of no request are `outside`."""
        for b in range(len(self.rows)):
            got, wanted = self.of_request(result, b), self.contiguous(b)
            assert torch.equal(got, wanted), f"request {b}: {float((got.float() - wanted.float()).abs().max())}"
        start, end = int(self.query_start[0]), int(self.query_start[-1])
        assert bool((result[:start] == outside).all())
        assert bool((result[end:] == outside).all())
