"""The adapters of a batch's rows, where a step finds them."""

from __future__ import annotations

import torch

from dgemma_ext.model import AdapterSet, AdapterTable, CanvasAdapters, LoadedAdapter


class AdapterRows:
    """The adapters of a batch's rows on the host and, where one product has the rows of all canvases, by an index on
    the device.

    Rows may change at any time; `update` then writes the index, in the order of the stream. A captured step reads what
    was written last, until the table is another one: then `version` changes, and a step that was captured must not run.
    """

    def __init__(self, rows: int, device: torch.device, loaded: AdapterSet, by_index: bool) -> None:
        self.version = 0
        self._loaded, self._by_index = loaded, by_index
        self._by_row: dict[int, LoadedAdapter] = {}
        self._rows = rows
        self._index = torch.zeros(rows, dtype=torch.int64, device=device)
        self._written: list[int] = [0] * rows
        self._table: AdapterTable | None = None

    def place(self, row: int, adapter: LoadedAdapter) -> None:
        self._by_row[row] = adapter

    def clear(self, row: int) -> None:
        """No-op for a row without an adapter."""
        self._by_row.pop(row, None)

    def move(self, source: int, target: int) -> None:
        self.clear(target)
        if source in self._by_row:
            self.place(target, self._by_row.pop(source))

    def between(self, begin: int, end: int) -> tuple[LoadedAdapter | None, ...]:
        """Those of some rows; empty where none of them has one."""
        found = tuple(self._by_row.get(row) for row in range(begin, end))
        return found if any(found) else ()

    def can_be_captured(self, begin: int, end: int) -> bool:
        """Whether a step of these rows has the same operators whatever experts their tokens go to."""
        return not any(adapter is not None and adapter.adapts_experts for adapter in self.between(begin, end))

    def update(self) -> None:
        """Writes what has changed."""
        if not self._by_index:
            return
        table = self._loaded.table(frozenset(self._by_row.values()))
        if table is not self._table:
            self._table, self.version = table, self.version + 1
        adapters = (self._by_row.get(row) for row in range(self._rows))
        written = [0 if adapter is None else table.row_of[adapter] for adapter in adapters]
        if written != self._written:
            self._written = written
            self._index.copy_(torch.tensor(written, dtype=torch.int64, device="cpu"), non_blocking=True)

    def on_device(self, begin: int, end: int) -> CanvasAdapters | None:
        """As of the last `update`; None where every canvas has products of its own."""
        return None if self._table is None else CanvasAdapters(self._table, self._index[begin:end])
