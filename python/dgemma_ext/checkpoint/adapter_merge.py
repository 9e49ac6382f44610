"""Adds an adapter to the weights, before they are quantized: sound where both passes change them alike.

There is one copy of the weights for both passes, so an adapter of two passes cannot be in it. And a change that is
added to a weight that is quantized already is mostly rounded away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgemma_ext.checkpoint.adapter import Adapter, Factors
from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.files import CheckpointInfo, layer_layout, model_layout
from dgemma_ext.checkpoint.reading import MappedFiles
from dgemma_ext.checkpoint.stored import Experts, names_of


class Merge:
    """The changes of an adapter. Raises ValueError, with the reason, for an adapter that cannot be merged."""

    def __init__(self, adapter: Adapter) -> None:
        one_pass = {attribute for (layer, attribute) in adapter.decoder if layer is None}
        if adapter.passes != "shared" and set(adapter.modules) != one_pass:
            reason = "changes the weights differently for each pass"
            if adapter.passes != "separate":
                reason = f"changes the weights of one pass alone ({adapter.passes})"
            raise ValueError(f"merge: the adapter {reason}, and both have one copy of them; load it without merging")
        self.digest = adapter.digest
        self._factors = adapter.decoder

    @property
    def attributes(self) -> set[str]:
        """Attributes of LayerWeights and ModelWeights that are changed."""
        return {attribute for _, attribute in self._factors}

    def factors(self, layer: int | None, attribute: str) -> Factors | None:
        return self._factors.get((layer, attribute))

    def added(self, layer: int | None, attribute: str, weight: Tensor) -> Tensor:
        """A weight with its change, added in fp32 and rounded once to its dtype; itself where there is none."""
        factors = self.factors(layer, attribute)
        return weight if factors is None else _added(weight, factors)


def _added(weight: Tensor, factors: Factors) -> Tensor:
    if weight.dim() < 3:
        a, b = (factor.to(weight.device, torch.float32) for factor in (factors.a, factors.b))
        return torch.addmm(weight.float(), b, a, alpha=factors.scale).to(weight.dtype)
    # Expert by expert, because the wide copies are several times as large as the result.
    merged = torch.empty_like(weight)
    for expert in range(weight.shape[0]):
        merged[expert] = _added(weight[expert], Factors(factors.a[expert], factors.b[expert], factors.scale))
    return merged


class _Part(NamedTuple):
    """What of a weight's change a stored tensor has: one expert's, and of that some rows."""

    factors: Factors
    expert: int | None = None
    first_row: int = 0

    def added(self, weight: Tensor) -> Tensor:
        a, b, scale = self.factors
        if self.expert is not None:
            a, b = a[self.expert], b[self.expert, self.first_row : self.first_row + weight.shape[0]]
        return _added(weight, Factors(a, b, scale))


class MergedFiles(MappedFiles):
    """The stored tensors of a checkpoint with an adapter's changes added.

    Raises ValueError, naming it, where a weight that the adapter changes is stored quantized.
    """

    def __init__(self, info: CheckpointInfo, config: ModelConfig, merge: Merge) -> None:
        super().__init__(info)
        self._parts: dict[str, _Part] = {}
        layouts = [(None, model_layout(config)), *((one.index, layer_layout(config, one)) for one in config.layers)]
        for layer, layout in layouts:
            for attribute, (name, _) in layout.items():
                factors, stored = merge.factors(layer, attribute), info.weights[name]
                if factors is None:
                    continue
                if stored.kind != "unquantized":
                    raise quantized_already(next(names_of(stored)), stored.kind)
                if not isinstance(stored, Experts):
                    self._parts[next(names_of(stored))] = _Part(factors)
                    continue
                for expert, matrices in enumerate(stored.matrices):
                    first_row = 0
                    for matrix in matrices:
                        self._parts[matrix.parts["values"]] = _Part(factors, expert, first_row)
                        first_row += matrix.shape[0]

    def tensor(self, name: str) -> Tensor:
        tensor, part = super().tensor(name), self._parts.get(name)
        return tensor if part is None else part.added(tensor)


def quantized_already(name: str, kind: str) -> ValueError:
    """The error for a weight that has no place for a change."""
    return ValueError(
        f"merge: the checkpoint has {name} as {kind}, which would round the adapter away; load it without merging, or "
        "merge it into the unquantized checkpoint"
    )
