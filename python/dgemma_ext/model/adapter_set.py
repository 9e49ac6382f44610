"""The adapters that a network has loaded, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.model.adapter_table import AdapterTable
from dgemma_ext.model.loaded_adapter import LoadedAdapter

# The name of the model without an adapter, and of the adapter that from_pretrained was given alone.
BASE, DEFAULT = "base", "default"


class AdapterSet(Mapping[str, LoadedAdapter]):
    """The adapters of a network by name. default: the name of the one that requests have which name none."""

    def __init__(self) -> None:
        self.default: str | None = None
        self._by_name: dict[str, LoadedAdapter] = {}
        self._table: AdapterTable | None = None

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._by_name.values())

    def add(self, adapter: LoadedAdapter) -> None:
        self._by_name[adapter.name], self._table = adapter, None

    def remove(self, name: str) -> None:
        """Requests that have it keep it until they end."""
        del self._by_name[name]
        self._table = None
        if self.default == name:
            self.default = None

    def check_new(self, name: str) -> str:
        """A name for an adapter. Raises ValueError for one that is taken, or no name."""
        if not arguments.text("name", name).strip() or name == BASE:
            raise arguments.refusal("name", f"a name of its own, other than {BASE}", name)
        if name in self._by_name:
            raise ValueError(f"name: an adapter {name!r} is loaded already; unload it first")
        return name

    def named(self, adapter: str | LoadedAdapter | None) -> LoadedAdapter | None:
        """The adapter of a request: by its name, the default for None, and None for BASE. A loaded one is itself.

        Raises ValueError for a name that is none.
        """
        if isinstance(adapter, LoadedAdapter):
            return adapter
        name = adapter
        if name is None:
            name = BASE if self.default is None else self.default
        if not isinstance(name, str) or (name != BASE and name not in self._by_name):
            loaded = ", ".join((*self._by_name, BASE))
            raise arguments.refusal("adapter", f"the name of a loaded adapter ({loaded}) or None", name)
        return None if name == BASE else self._by_name[name]

    def named_each(self, adapter: Any, count: int) -> list[LoadedAdapter | None]:
        """One for each of some rows, from one for all of them or a list. Raises ValueError."""
        given = (
            arguments.sequence("adapter", adapter, "a list") if arguments.is_sequence(adapter) else [adapter] * count
        )
        if len(given) != count:
            raise ValueError(f"adapter must be one for all rows or {count}, one per row, got {len(given)}")
        return [self.named(one) for one in given]

    def table(self, wanted: frozenset[LoadedAdapter]) -> AdapterTable:
        """A table with all that are loaded and all that are wanted; the last one where it has them."""
        if self._table is None or not wanted <= self._table.row_of.keys():
            adapters = [*self._by_name.values(), *(one for one in wanted if one not in self._by_name.values())]
            self._table = AdapterTable(adapters)
        return self._table
