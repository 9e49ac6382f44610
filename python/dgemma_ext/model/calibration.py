"""Second moments of what goes into a model's products, over a text: by them a quantizer weighs its errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgemma_ext.model.forward import LayerInputs
from dgemma_ext.model.network import Network
from dgemma_ext.ops.layer import gelu_product
from dgemma_ext.ops.weights import linear

# By layer and attribute of LayerWeights: [columns], and of experts [experts, columns].
Moments = dict[tuple[int, str], Tensor]

# Tokens that see each other: the cache of a calibration holds so many, and the next begin anew.
_SEGMENT = 2048
# Every expert counts as having seen so many more tokens, of the mean: one that hardly any token goes to has no moments
# of its own.
_TOKENS_OF_THE_MEAN = 64


def second_moments(
    network: Network, ids: Sequence[int], advance: Callable[[int], None] = lambda tokens: None
) -> Moments:
    """The mean square of every input channel of the matrices in a layer, over both passes of a text.

    Every canvas_length tokens go through a denoising pass, as a canvas that is finished, and then through the encode
    pass. ids: at least one token. advance: called with the number of tokens that went through both since the last call.
    Raises ValueError for no ids, for ids outside the vocabulary, and for inputs that are not finite.
    """
    if not ids:
        raise ValueError("calibrate: got a text without tokens, wants some")
    gathered = _Gathered()
    length = network.config.canvas_length
    most = min(_SEGMENT, network.config.max_position_embeddings)
    network.options.observe = gathered
    try:
        for start in range(0, len(ids), most):
            segment = torch.tensor([list(ids[start : start + most])], device=network.device)
            cache = network.new_cache(1, segment.shape[1])
            for piece in segment.split(length, dim=1):
                network.forward(cache, network.canvas_in_slot(piece, cache, 0))
                network.encode(piece, cache)
                advance(piece.shape[1])
    finally:
        network.options.observe = None
    return gathered.moments()


class _Gathered:
    """Sums of squares and numbers of tokens by layer and attribute."""

    def __init__(self) -> None:
        self._sums: Moments = {}
        self._counts: dict[tuple[int, str], Tensor] = {}

    def __call__(self, inputs: LayerInputs) -> None:
        weights, layer = inputs.weights, inputs.layer
        hidden = gelu_product(linear(inputs.mlp, weights.gate_proj), linear(inputs.mlp, weights.up_proj))
        for attributes, rows in (
            (("q_proj", "k_proj", "v_proj"), inputs.attention),
            (("o_proj",), inputs.attended),
            (("gate_proj", "up_proj"), inputs.mlp),
            (("down_proj",), hidden),
        ):
            for attribute in attributes:
                self._add(layer, attribute, rows)
        self._add_experts(inputs)

    def moments(self) -> Moments:
        found = {}
        for key, sums in self._sums.items():
            counts = self._counts[key]
            if sums.dim() == 2:  # of experts
                mean = sums.sum(0) / counts.sum()
                sums, counts = sums + _TOKENS_OF_THE_MEAN * mean, (counts + _TOKENS_OF_THE_MEAN)[:, None]
            found[key] = (sums / counts).float().cpu()
            if not bool(found[key].isfinite().all()):
                raise ValueError(f"calibrate: over the text, what goes into {key[1]} of layer {key[0]} is not finite")
        return found

    def _add(self, layer: int, attribute: str, rows: Tensor) -> None:
        squares = rows.double().square().sum(0)
        self._put(layer, attribute, squares, torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device))

    def _add_experts(self, inputs: LayerInputs) -> None:
        weights, ids = inputs.weights, inputs.expert_ids
        experts, width, inner = weights.experts_down.shape
        device = inputs.experts.device
        outer_sums, inner_sums = (torch.zeros(experts, n, dtype=torch.float64, device=device) for n in (width, inner))
        counts = torch.zeros(experts, dtype=torch.float64, device=device)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            rows = inputs.experts[(ids == expert).any(-1)]
            gate_up = weights.experts_gate_up
            matrix = gate_up[expert] if isinstance(gate_up, Tensor) else gate_up.expert(expert)
            hidden = gelu_product(*(part.contiguous() for part in linear(rows, matrix).chunk(2, dim=-1)))
            outer_sums[expert] = rows.double().square().sum(0)
            inner_sums[expert] = hidden.double().square().sum(0)
            counts[expert] = len(rows)
        self._put(inputs.layer, "experts_gate_up", outer_sums, counts)
        self._put(inputs.layer, "experts_down", inner_sums, counts)

    def _put(self, layer: int, attribute: str, sums: Tensor, counts: Tensor) -> None:
        key = (layer, attribute)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self._counts[key] = self._counts[key] + counts if key in self._counts else counts
