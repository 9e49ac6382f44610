"""The vision tower and its projector: from an image's patches to what stands for its soft tokens in the prompt.

What transformers' Gemma4VisionModel and DiffusionGemmaMultimodalEmbedder compute (5.23, attention by SDPA), to the bit
on the CPU. Norms are computed in float32 and rounded once, and what stands beside them is rounded to the weights' dtype
one by one. Each image runs alone and without padding, so that its bits depend on nothing beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dgemma_ext.checkpoint.vision_config import PATCH, POOL, VisionConfig
from dgemma_ext.model.vision.pixels import Patches
from dgemma_ext.ops import layer as layer_ops

_TOWER = "model.encoder.vision_tower."


@dataclass(frozen=True, eq=False)
class VisionLayer:
    """Weights of a layer; matrices are [out, in]."""

    input_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    query_norm: Tensor
    key_norm: Tensor
    output: Tensor
    attention_norm: Tensor
    feedforward_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    output_norm: Tensor


@dataclass(frozen=True, eq=False)
class VisionTower:
    """The tower with its weights, all of one dtype and on one device."""

    config: VisionConfig
    patches: Tensor  # [hidden, 768]
    positions: Tensor  # [2, position_embeddings, hidden]: by column and by row
    layers: tuple[VisionLayer, ...]
    bias: Tensor | None  # of standardising, [hidden]
    scale: Tensor | None
    projection: Tensor  # [text hidden, hidden]

    @classmethod
    def from_tensors(cls, config: VisionConfig, tensors: Mapping[str, Tensor]) -> VisionTower:
        """From the tensors of a checkpoint by their names there (`checkpoint.vision_config.vision_tensors`)."""

        def layer(number: int) -> VisionLayer:
            prefix = f"{_TOWER}encoder.layers.{number}."
            return VisionLayer(
                input_norm=tensors[f"{prefix}input_layernorm.weight"],
                query=tensors[f"{prefix}self_attn.q_proj.linear.weight"],
                key=tensors[f"{prefix}self_attn.k_proj.linear.weight"],
                value=tensors[f"{prefix}self_attn.v_proj.linear.weight"],
                query_norm=tensors[f"{prefix}self_attn.q_norm.weight"],
                key_norm=tensors[f"{prefix}self_attn.k_norm.weight"],
                output=tensors[f"{prefix}self_attn.o_proj.linear.weight"],
                attention_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
                feedforward_norm=tensors[f"{prefix}pre_feedforward_layernorm.weight"],
                gate=tensors[f"{prefix}mlp.gate_proj.linear.weight"],
                up=tensors[f"{prefix}mlp.up_proj.linear.weight"],
                down=tensors[f"{prefix}mlp.down_proj.linear.weight"],
                output_norm=tensors[f"{prefix}post_feedforward_layernorm.weight"],
            )

        return cls(
            config=config,
            patches=tensors[f"{_TOWER}patch_embedder.input_proj.weight"],
            positions=tensors[f"{_TOWER}patch_embedder.position_embedding_table"],
            layers=tuple(map(layer, range(config.num_layers))),
            bias=tensors[f"{_TOWER}std_bias"] if config.standardize else None,
            scale=tensors[f"{_TOWER}std_scale"] if config.standardize else None,
            projection=tensors["model.encoder.embed_vision.embedding_projection.weight"],
        )

    @property
    def nbytes(self) -> int:
        ends = (self.patches, self.positions, self.bias, self.scale, self.projection)
        tensors = [*ends, *(tensor for layer in self.layers for tensor in vars(layer).values())]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def check_length(self, patches: int) -> None:
        """Raises ValueError for an image of more columns or rows of patches than there are embeddings for."""
        if patches > self.config.position_embeddings:
            raise ValueError(
                f"the image has {patches} patches in a line, and the model's vision tower has "
                f"{self.config.position_embeddings} positions; give it fewer soft tokens"
            )

    @torch.no_grad()
    def features(self, image: Patches) -> Tensor:
        """What stands for an image's soft tokens in place of their embeddings: [soft_tokens, text hidden].

        Raises ValueError as `check_length` does.
        """
        device, dtype = self.patches.device, self.patches.dtype
        self.check_length(int(image.positions.max()) + 1)
        pixels, positions = image.pixels.to(device), image.positions.to(device)
        # 2 (p - 1/2) in float32: of a rounded p it would be another number.
        hidden = functional.linear((2 * (pixels - 0.5)).to(dtype), self.patches)
        hidden = hidden + (self.positions[0][positions[:, 0]] + self.positions[1][positions[:, 1]])
        cosine, sine = rotation(positions, self.config, dtype)
        for layer in self.layers:
            hidden = self._layer(layer, hidden, cosine, sine)
        return self._projected(self._pooled(hidden, positions))

    def _layer(self, layer: VisionLayer, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        normed = self._norm(hidden, layer.input_norm)
        attended = self._norm(self._attention(layer, normed, cosine, sine), layer.attention_norm)
        hidden = hidden + attended
        normed = self._norm(hidden, layer.feedforward_norm)
        gate = functional.gelu(functional.linear(normed, layer.gate), approximate="tanh")
        product = gate * functional.linear(normed, layer.up)
        return hidden + self._norm(functional.linear(product, layer.down), layer.output_norm)

    def _attention(self, layer: VisionLayer, normed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Every patch sees every patch; scores are not scaled, and values are normalised without a weight."""
        heads = (len(normed), self.config.num_heads, self.config.head_dim)
        query, key, value = (
            functional.linear(normed, weight).view(heads) for weight in (layer.query, layer.key, layer.value)
        )
        query = rotated(self._norm(query, layer.query_norm), cosine, sine)
        key = rotated(self._norm(key, layer.key_norm), cosine, sine)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, self._norm(value, None)))
        attended = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        return functional.linear(attended[0].transpose(0, 1).flatten(1), layer.output)

    def _pooled(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The mean of each cell of 3 x 3 patches, rounded, then scaled and standardised in float32.

        A product with a matrix of ninths and zeros adds in transformers' order; another one rounds one value in 250
        elsewhere.
        """
        cells = positions // POOL
        cell = cells[:, 0] + cells[:, 1] * (cells[:, 0].max() + 1)
        ninths = hidden.new_zeros(len(hidden), len(hidden) // POOL**2, dtype=torch.float32)
        ninths.scatter_(1, cell[:, None], 1 / POOL**2)
        pooled = (ninths.t() @ hidden.float()).to(hidden.dtype).float() * self.config.hidden_size**0.5
        if self.bias is not None and self.scale is not None:
            pooled = (pooled - self.bias.float()) * self.scale.float()
        return pooled.to(hidden.dtype)

    def _projected(self, pooled: Tensor) -> Tensor:
        return functional.linear(self._norm(pooled, None), self.projection)

    def _norm(self, input: Tensor, weight: Tensor | None) -> Tensor:
        return layer_ops.rms_norm(input, weight, self.config.rms_norm_eps)


def tower_workspace_bytes(config: VisionConfig, dtype: torch.dtype, soft_tokens: int) -> int:
    """The largest memory that the tower takes for an image of so many soft tokens, beside its weights.

    For each patch its pixels, and the largest of three: their two float32 forms and what the first product makes of
    them; what attention holds (residual and norm, the three projections, and what normalising and rotating one of them
    makes), which keeps no scores; what the MLP holds (residual, norm and attention; gate, up and product).
    """
    pixels, heads, hidden = 3 * PATCH**2, config.num_heads * config.head_dim, config.hidden_size
    entry = 8 * pixels + (pixels + hidden) * dtype.itemsize
    attention = (2 * hidden + 8 * heads) * dtype.itemsize
    mlp = 3 * (hidden + config.intermediate_size) * dtype.itemsize
    return soft_tokens * POOL**2 * (4 * pixels + max(entry, attention, mlp))


def rotation(positions: Tensor, config: VisionConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head_dim] of positions [patches, 2].

    The first half of a head is turned by the column, the second by the row; in each half the pairs are
    (j, j + head_dim / 4), turned by theta^(-2 j / (head_dim / 2)).
    """
    half = config.head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[:, :, None] * (1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles, angles), -1).flatten(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(input: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[patches, heads, head_dim]; both products and their sum are rounded one by one."""
    quarters = input.chunk(4, -1)
    turned = torch.cat((-quarters[1], quarters[0], -quarters[3], quarters[2]), -1)
    return input * cosine[:, None] + turned * sine[:, None]
