"""An adapter on a device: its factors for each pass, by layer and weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dgemma_ext.checkpoint import Adapter, Factors, FactorsOf
from dgemma_ext.model.low_rank import NO_FACTORS, LowRank, LowRanks

EXPERT_ATTRIBUTES = ("experts_gate_up", "experts_down")


@dataclass(frozen=True)
class PassFactors:
    """An adapter's factors for the encode or the denoise pass. layers: by the layer's index; None is the
    self-conditioning. Layers that it does not change are left out."""

    layers: Mapping[int | None, LowRanks]

    def of(self, layer: int | None) -> LowRanks:
        return self.layers.get(layer, NO_FACTORS)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter on the model's device, in its dtype.

    rank: the largest of any weight. scale: where no pattern says otherwise. modules: attributes of LayerWeights and
    ModelWeights that it changes. passes: as of `Adapter`. nbytes: of its factors. base: the model that it was trained
    on, as its file calls it. ignored: tensors of its file that are not used, those of the vision tower. digest: equal
    for equal adapters.
    """

    name: str
    rank: int
    scale: float
    modules: tuple[str, ...]
    passes: str
    nbytes: int
    base: str | None
    ignored: tuple[str, ...]
    digest: str
    encoder: PassFactors = field(repr=False)
    decoder: PassFactors = field(repr=False)

    @property
    def adapts_experts(self) -> bool:
        return any(name in self.modules for name in EXPERT_ATTRIBUTES)

    @classmethod
    def load(cls, name: str, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> LoadedAdapter:
        """Copies an adapter's factors, each scale multiplied into b in fp32. A pair that changes nothing, because one
        of its factors is zero, is left out: its product is the base's, bit for bit."""
        made: dict[int, LowRank | None] = {}

        def low_rank(factors: Factors) -> LowRank | None:
            # Factors that both passes share are copied once.
            if id(factors) not in made:
                is_nothing = not bool(factors.a.any()) or not bool(factors.b.any()) or factors.scale == 0
                made[id(factors)] = None if is_nothing else _on_device(factors, dtype, device)
            return made[id(factors)]

        def factors_of(found: FactorsOf) -> PassFactors:
            layers: dict[int | None, dict[str, LowRank]] = {}
            for (layer, attribute), factors in found.items():
                changed = low_rank(factors)
                if changed is not None:
                    layers.setdefault(layer, {})[attribute] = changed
            return PassFactors(layers)

        encoder, decoder = factors_of(adapter.encoder), factors_of(adapter.decoder)
        return cls(
            name=name,
            rank=adapter.rank,
            scale=adapter.scale,
            modules=adapter.modules,
            passes=adapter.passes,
            nbytes=sum(one.nbytes for one in made.values() if one is not None),
            base=adapter.settings.base,
            ignored=adapter.ignored,
            digest=adapter.digest,
            encoder=encoder,
            decoder=decoder,
        )


def _on_device(factors: Factors, dtype: torch.dtype, device: torch.device) -> LowRank:
    a, b = factors.a, factors.b.float() * factors.scale
    if device.type == "cuda":
        # Kernels there take features in multiples of 8 (16 bytes); zeros add nothing.
        missing = -a.shape[-2] % 8
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return LowRank(a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())
