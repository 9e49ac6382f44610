"""An adapter of a model: two low-rank factors for each weight that it changes, apart for each pass.

transformers ties the encoder's weights to the decoder's, and PEFT does not tie their adapters: one file holds two
adapters for one set of weights. So they are never one, unless their factors are equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgemma_ext import arguments
from dgemma_ext.checkpoint import adapter_experts
from dgemma_ext.checkpoint.adapter_names import DECODER, ENCODER, EXPERTS, PASSES, Place, is_vision, place_of
from dgemma_ext.checkpoint.adapter_settings import AdapterSettings
from dgemma_ext.checkpoint.config import ModelConfig
from dgemma_ext.checkpoint.files import layer_layout, model_layout
from dgemma_ext.checkpoint.folder import resolve_adapter
from dgemma_ext.checkpoint.headers import read_header
from dgemma_ext.checkpoint.stored import FLOAT_DTYPES
from dgemma_ext.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
# Beside the files of NeMo AutoModel, which trains one stack for both passes and saves it under the decoder's names.
NEMO_FILE = "automodel_peft_config.json"
# What a file means that has one pass alone.
STORED, BOTH = "stored", "both"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """A weight's change is scale * b @ a. a: [rank, in], b: [out, rank]; of experts [experts, rank, in] and
    [experts, out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def numel(self) -> int:
        return self.a.numel() + self.b.numel()

    def equals(self, other: Factors | None) -> bool:
        if other is None or self.scale != other.scale:
            return False
        return torch.equal(self.a, other.a) and torch.equal(self.b, other.b)


# Layer (None for the self-conditioning) and attribute of LayerWeights or ModelWeights → its factors.
FactorsOf = dict[tuple[int | None, str], Factors]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors for each pass, on the CPU as they are stored.

    passes: "separate", "shared" (equal in both), "decoder only" or "encoder only". ignored: names of tensors that are
    not used, those of the vision tower. digest: of all factors and scales; equal digests are equal adapters.
    """

    settings: AdapterSettings
    passes: str
    encoder: FactorsOf
    decoder: FactorsOf
    ignored: tuple[str, ...]
    digest: str

    @classmethod
    def from_folder(
        cls, path_or_hub_id: str | os.PathLike[str], config: ModelConfig, passes: str | None = None
    ) -> Adapter:
        """Reads a folder that PEFT or NeMo AutoModel has written, or one on the hub.

        passes: "both" where a file with the names of one pass alone means both of them (one stack trained for both),
        "stored" where it means that one. Such a file is refused without it, but for NeMo's, which tells.

        Raises CheckpointError naming the file and the tensor or field, and ValueError naming `passes`.
        """
        folder = resolve_adapter(path_or_hub_id)
        settings, file = AdapterSettings.from_file(folder), folder / WEIGHTS_FILE
        passes = _checked_passes(passes)
        if passes is None and (folder / NEMO_FILE).is_file():
            passes = BOTH
        return _parsed(settings, _read(file), config, passes, file)

    @classmethod
    def from_tensors(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: ModelConfig,
        passes: str | None = None,
    ) -> Adapter:
        """An adapter from memory. settings: adapter_config.json as a mapping. tensors: by PEFT's names, of any device.
        passes: as in `from_folder`.

        Raises ValueError naming the field or `passes`, CheckpointError naming the tensor.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return _parsed(AdapterSettings.from_dict(settings), copies, config, _checked_passes(passes), None)

    def of(self, stack: str) -> FactorsOf:
        return self.encoder if stack == ENCODER else self.decoder

    @property
    def rank(self) -> int:
        """The largest of any weight."""
        return max((factors.a.shape[-2] for factors in self._distinct()), default=0)

    @property
    def scale(self) -> float:
        """Where no pattern says otherwise."""
        return self.settings.scale

    @property
    def modules(self) -> tuple[str, ...]:
        """Attributes of LayerWeights and ModelWeights that it changes."""
        return tuple(dict.fromkeys(attribute for stack in PASSES for _, attribute in self.of(stack)))

    @property
    def parameters(self) -> int:
        return sum(factors.numel for factors in self._distinct())

    def _distinct(self) -> list[Factors]:
        """The factors of both passes, shared ones once."""
        shared = self.passes == "shared"
        return [*self.decoder.values(), *(() if shared else self.encoder.values())]


def _checked_passes(passes: Any) -> str | None:
    return None if passes is None else arguments.choice("passes", passes, (STORED, BOTH))


def _read(file: Path) -> dict[str, Tensor]:
    if not file.exists() and not file.is_symlink():
        for pickled in (*file.parent.glob("adapter_model.bin"), *file.parent.glob("*.pt"), *file.parent.glob("*.pth")):
            raise CheckpointError(
                "is a Python pickle, which is a program and is not run: save the adapter by save_pretrained, which "
                "writes safetensors",
                file=pickled,
            )
        raise CheckpointError("is missing", file=file)
    for name, info in read_header(file).items():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"has dtype {info.dtype}; supported: {', '.join(FLOAT_DTYPES)}", file=file, tensor=name
            )
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=file) from error


def _parsed(
    settings: AdapterSettings,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    passes: str | None,
    file: Path | None,
) -> Adapter:
    pairs, ignored = _pairs(tensors, config, file)
    found: dict[str, FactorsOf] = {stack: {} for stack in PASSES}
    for place, (name, a, b) in pairs.items():
        try:
            attribute, factors = _factors(place, a, b, pairs.keys(), settings, config)
        except ValueError as error:
            raise CheckpointError(str(error), file=file, tensor=name) from error
        where = (place.layer, attribute)
        if where in found[place.stack]:
            raise CheckpointError(f"is a second pair of factors for {attribute}", file=file, tensor=name)
        found[place.stack][where] = factors
    encoder, decoder = found[ENCODER], found[DECODER]
    if not encoder and not decoder:
        raise CheckpointError("has no factors for this model's text layers", file=file)
    meaning, encoder, decoder = _meaning(encoder, decoder, passes)
    return Adapter(settings, meaning, encoder, decoder, ignored, _digest(encoder, decoder))


def _pairs(
    tensors: Mapping[str, Tensor], config: ModelConfig, file: Path | None
) -> tuple[dict[Place, tuple[str, Tensor, Tensor]], tuple[str, ...]]:
    """Place → the name of A, A and B; and the names that are not used."""
    halves: dict[Place, dict[str, str]] = {}
    ignored = []
    for name, tensor in tensors.items():
        if is_vision(name):
            ignored.append(name)
            continue
        try:
            place, factor = place_of(name, len(config.layers))
            if tensor.dim() != 2 or tensor.dtype not in _FLOATS:
                raise ValueError(f"is {arguments.shown(tensor)}; wanted: a matrix of float32, bfloat16 or float16")
        except ValueError as error:
            raise CheckpointError(str(error), file=file, tensor=name) from error
        if not bool(tensor.isfinite().all()):
            raise CheckpointError("has values that are not finite", file=file, tensor=name)
        halves.setdefault(place, {})[factor] = name
    pairs = {}
    for place, names in halves.items():
        if len(names) < 2:
            (name,) = names.values()
            raise CheckpointError(f"is there without its {'B' if 'A' in names else 'A'}", file=file, tensor=name)
        pairs[place] = (names["A"], tensors[names["A"]], tensors[names["B"]])
    return pairs, tuple(ignored)


def _factors(
    place: Place, a: Tensor, b: Tensor, places: Any, settings: AdapterSettings, config: ModelConfig
) -> tuple[str, Factors]:
    """The weight that a pair changes, and its factors. Raises ValueError for shapes that do not fit."""
    attribute, module, experts = place.attribute, place.module, config.num_experts
    if attribute == EXPERTS:
        nested = place._replace(module=f"{module.removesuffix('.base_layer')}.base_layer") in places
        if a.shape[0] % experts or b.shape[1] != a.shape[0]:
            raise ValueError(
                f"is {list(a.shape)}, and its B {list(b.shape)}; wanted: as many rows as B has columns, a multiple of "
                f"the {experts} experts"
            )
        layout = adapter_experts.layout_of(a.shape[1], b.shape[0], module, nested, settings, config)
        attribute = layout.attribute
        module = f"{module.removesuffix('.base_layer')}.{adapter_experts.PARAMETERS[attribute]}"
        a, b = adapter_experts.by_expert(a, b, experts, layout.is_exchanged)
    rank, size_in, size_out = a.shape[-2], a.shape[-1], b.shape[-2]
    layout_of = model_layout(config) if place.layer is None else layer_layout(config, config.layers[place.layer])
    if attribute not in layout_of:
        raise ValueError(f"adapts {attribute} of layer {place.layer}, whose values come from its keys: there is none")
    wanted_out, wanted_in = layout_of[attribute][1][-2:]
    if (size_in, size_out, b.shape[-1]) != (wanted_in, wanted_out, rank):
        raise ValueError(
            f"is {list(a.shape)}, and its B {list(b.shape)}; wanted: [rank, {wanted_in}] and [{wanted_out}, rank]"
        )
    if rank != settings.rank_of(module):
        raise ValueError(f"has rank {rank}, and adapter_config.json says {settings.rank_of(module)}")
    return attribute, Factors(a, b, settings.scale_of(module))


def _meaning(encoder: FactorsOf, decoder: FactorsOf, passes: str | None) -> tuple[str, FactorsOf, FactorsOf]:
    """Which passes an adapter changes, and the factors of each. Raises ValueError where the file leaves it open."""
    layers = {where: factors for where, factors in decoder.items() if where[0] is not None}
    if encoder and layers:
        is_shared = encoder.keys() == layers.keys() and all(one.equals(layers[where]) for where, one in encoder.items())
        if is_shared:
            return "shared", layers, decoder
        if passes == BOTH:
            raise ValueError("passes is both, and the adapter has factors of its own for each pass; wanted: stored")
        return "separate", encoder, decoder
    alone = ENCODER if encoder else DECODER
    if not encoder and not layers:  # the self-conditioning, which the denoise pass alone has
        return "decoder only", encoder, decoder
    if passes is None:
        raise ValueError(
            f"passes must be both or stored: the adapter has the {alone}'s names alone. If one stack was trained for "
            "both passes (as NeMo AutoModel does), it is both; if only that pass was adapted, it is stored"
        )
    if passes == STORED:
        return f"{alone} only", encoder, decoder
    return "shared", (encoder or layers), {**encoder, **decoder}


def _by_place(item: tuple[tuple[int | None, str], Factors]) -> tuple[int, str]:
    (layer, attribute), _ = item
    return (-1 if layer is None else layer), attribute


def _digest(encoder: FactorsOf, decoder: FactorsOf) -> str:
    digest = hashlib.sha256()
    for stack, factors_of in ((ENCODER, encoder), (DECODER, decoder)):
        for (layer, attribute), factors in sorted(factors_of.items(), key=_by_place):
            digest.update(f"{stack} {layer} {attribute} {factors.scale!r}".encode())
            for factor in (factors.a, factors.b):
                digest.update(f"{factor.dtype} {list(factor.shape)}".encode())
                digest.update(factor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
