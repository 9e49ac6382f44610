"""The kernels of a denoising step with inputs of the published sizes, for first_light.py; the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Work
from torch import Tensor

import dgemma_ext as dg
from dgemma_ext.checkpoint import LayerConfig, ModelConfig, parse_target
from dgemma_ext.ops import block_attention, grouped_gemm, layer, router
from dgemma_ext.ops.quantized_gemm import check_moe_ffn_fp8
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from dgemma_ext.ops.weights import experts
from dgemma_ext.profile.true_size import random_model, true_config
from dgemma_ext.sampling import begin_canvas, make_canvas_batch, make_step_buffers
from dgemma_ext.sampling.step import logits_params, sample_and_update, soft_embedding

# Inputs that a kernel's calls take by turns.
SETS = 3


@dataclass(frozen=True)
class Sizes:
    """The canvas, and fields of the configuration that differ from the published ones."""

    tokens: int
    changes: tuple[tuple[str, int], ...] = ()
    product: int = 8192

    @property
    def config(self) -> ModelConfig:
        return true_config(1, canvas_length=self.tokens, **dict(self.changes))

    def layer(self, full: bool) -> LayerConfig:
        """A full-attention layer or a sliding one."""
        return true_config(2, canvas_length=self.tokens, **dict(self.changes)).layers[int(full)]


FULL = Sizes(256)
SMALL = Sizes(
    16,
    (
        ("hidden_size", 256),
        ("intermediate_size", 192),
        ("moe_intermediate_size", 64),
        ("num_experts", 16),
        ("top_k_experts", 4),
        ("vocab_size", 4096),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("num_global_key_value_heads", 1),
        ("head_dim", 64),
        ("global_head_dim", 128),
        ("sliding_window", 64),
        ("max_position_embeddings", 2048),
    ),
    product=256,
)


@dataclass(frozen=True)
class Kernel:
    """Calls that take other inputs each, what one has to do, and what else computes the same."""

    calls: list[Callable[[], object]]
    work: Work
    peer: Callable[[], object] | None = None
    distance: Callable[[], float] | None = None
    about: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Sizes, str], Kernel]
KERNELS: dict[str, Maker] = {}


def add(name: str, make: Callable[..., Kernel], *arguments: Any) -> None:
    KERNELS[name] = lambda sizes, device: make(sizes, device, *arguments)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=device).mul_(scale).bfloat16()


@cache
def model(sizes: Sizes, device: str, weights: str = "bfloat16") -> dg.DiffusionGemma:
    """One layer with random weights."""
    target = None if weights == "bfloat16" else parse_target(weights)
    return random_model(sizes.config, device, target=target)


# The device's ceilings ------------------------------------------------------------------------------------------------


def product(sizes: Sizes, device: str) -> Kernel:
    """A large product by cuBLAS: what the tensor cores give in this process."""
    n = sizes.product
    a, b = normal(device, n, n), normal(device, n, n)
    return Kernel([lambda: torch.mm(a, b)], Work(bytes=6.0 * n * n, operations=2.0 * n**3))


# Experts --------------------------------------------------------------------------------------------------------------


def moe(sizes: Sizes, device: str, weights: str, hit: int, activations: str | None = None) -> Kernel:
    """hit: how many experts of 128 routing draws from."""
    config, made = sizes.config, model(sizes, device, weights).weights.layers[0]
    if activations is not None:
        check_moe_ffn_fp8(config.hidden_size, config.moe_intermediate_size, torch.bfloat16, device)
    top_k, drawn = config.top_k_experts, max(config.top_k_experts, hit * config.num_experts // 128)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.rand(sizes.tokens, drawn, device=device).argsort(dim=1)[:, :top_k].int().contiguous()
        return normal(device, sizes.tokens, config.hidden_size), ids, torch.rand(ids.shape, device=device) / top_k

    def call(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return experts(*given, made.experts_gate_up, made.experts_down, activations)

    sets = [inputs() for _ in range(SETS)]
    found = sum(torch.unique(ids).numel() for _, ids, _ in sets) / SETS
    kept = (made.experts_gate_up.nbytes + made.experts_down.nbytes) / config.num_experts
    values = 3 * config.hidden_size * config.moe_intermediate_size
    work = Work(
        bytes=found * kept + 4.0 * sizes.tokens * config.hidden_size, operations=2.0 * sizes.tokens * top_k * values
    )
    calls: list[Callable[[], object]] = [partial(call, given) for given in sets]
    about = {"experts_hit": found}
    if device == "cpu" or weights != "bfloat16":
        return Kernel(calls, work, about=about)
    from bench_grouped_gemm_gpu import grouped_products

    def peer() -> Tensor:
        return grouped_products(*sets[0], made.experts_gate_up, made.experts_down)

    return Kernel(calls, work, peer, lambda: relative(call(sets[0]), peer()), about)


def route(sizes: Sizes, device: str) -> Kernel:
    config, made = sizes.config, model(sizes, device).weights.layers[0]
    given = (made.router_scale, made.router_proj, made.router_per_expert_scale, config.top_k_experts, 1e-6)
    sets = [normal(device, sizes.tokens, config.hidden_size) for _ in range(SETS)]
    weights = config.num_experts * config.hidden_size
    work = Work(bytes=2.0 * (weights + sets[0].numel()), operations=2.0 * sizes.tokens * weights)
    return Kernel([partial(router.route, x, *given) for x in sets], work)


# Vocabulary -----------------------------------------------------------------------------------------------------------


class Step:
    """What a step does after its layers, over a canvas of its own."""

    def __init__(self, sizes: Sizes, device: str, peaked: bool) -> None:
        self.network = made = model(sizes, device).network
        length = sizes.tokens
        self.batch, self.buffers = make_canvas_batch(made, 1, length), make_step_buffers(made, 1, length)
        sampler = dg.SamplerConfig(confidence_threshold=0.0).resolve(model(sizes, device).defaults, length)
        begin_canvas(made, self.batch, 0, sampler, seed=0, index=0)
        self.state = self.batch.state
        hidden = normal(device, 1, length, made.config.hidden_size)
        if peaked:  # each position's logits are near the cap for one token
            ids = torch.randint(0, made.config.vocab_size, (length,), device=device)
            rows = made.weights.embed_tokens[ids].float()
            hidden = (rows * 45.0 / rows.square().sum(-1, keepdim=True)).bfloat16()[None]
        self.hidden = hidden.contiguous()
        self.params = logits_params(made, self.state, self.buffers)
        self.head()

    def head(self) -> None:
        statistics, embedding = self.buffers.statistics_of(self.state), self.network.weights.embed_tokens
        vocabulary_head(self.hidden, embedding, **self.params, logits=self.buffers.logits, out=statistics)

    def sample(self) -> None:
        """With two fills, so that every call is of the same step."""
        self.state.step.fill_(2)
        self.state.active.fill_(True)
        sample_and_update(self.network, self.state, self.buffers, self.params)

    def soft(self) -> None:
        soft_embedding(self.network, self.state, self.buffers, self.params)


@cache
def step(sizes: Sizes, device: str, peaked: bool) -> Step:
    return Step(sizes, device, peaked)


def head(sizes: Sizes, device: str) -> Kernel:
    made = step(sizes, device, False)
    embedding, logits = made.network.weights.embed_tokens, made.buffers.logits
    work = Work(bytes=2.0 * (embedding.numel() + logits.numel()), operations=2.0 * sizes.tokens * embedding.numel())

    def peer() -> Tensor:
        return F.linear(made.hidden, embedding)

    return Kernel([made.head], work, peer, lambda: relative(logits, peer()))


def sample(sizes: Sizes, device: str) -> Kernel:
    made = step(sizes, device, False)
    # Statistics of tiles first; of the row that a draw falls in one tile.
    return Kernel([made.sample], Work(bytes=float(made.buffers.statistics_of(made.state).tile_sum.nbytes)))


def soft(sizes: Sizes, device: str, peaked: bool) -> Kernel:
    """The floor is of the dense product; a peaked distribution needs a few rows of the embedding."""
    made = step(sizes, device, peaked)
    embedding, logits = made.network.weights.embed_tokens, made.buffers.logits
    whole = Work(bytes=2.0 * (embedding.numel() + logits.numel()), operations=2.0 * sizes.tokens * embedding.numel())
    return Kernel([made.soft], Work(bytes=float(logits.nbytes)) if peaked else whole)


# Attention ------------------------------------------------------------------------------------------------------------


def attention(sizes: Sizes, device: str, full: bool, prefix: int) -> Kernel:
    one, heads = sizes.layer(full), sizes.config.num_attention_heads
    key_heads, head_dim, window = one.num_key_value_heads, one.head_dim, one.sliding_window
    if not full:
        prefix = min(prefix, window - 1)

    def inputs() -> tuple[Tensor, ...]:
        query = normal(device, 1, sizes.tokens, heads, head_dim, scale=2.0 / head_dim**0.5)
        new = [normal(device, 1, sizes.tokens, key_heads, head_dim) for _ in range(2)]
        return query, *new, *(normal(device, 1, prefix, key_heads, head_dim) for _ in range(2))

    slot = torch.zeros(1, dtype=torch.int32, device=device)
    length = torch.full((1,), prefix, dtype=torch.int32, device=device)
    sets = [inputs() for _ in range(SETS)]

    def call(given: tuple[Tensor, ...]) -> Tensor:
        return block_attention.canvas_attention(*given, slot, length, None, window, 1.0)

    query, key, value, *stored = sets[0]
    whole = [torch.cat((before, now), dim=1).transpose(1, 2) for before, now in zip(stored, (key, value), strict=True)]
    keys, values = (x.repeat_interleave(heads // key_heads, dim=1).contiguous() for x in whole)
    queries = query.transpose(1, 2).contiguous()

    def peer() -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)

    positions = prefix + sizes.tokens
    work = Work(
        bytes=2.0 * head_dim * (2 * sizes.tokens * heads + 2 * positions * key_heads),
        operations=4.0 * sizes.tokens * heads * positions * head_dim,
    )
    calls: list[Callable[[], object]] = [partial(call, given) for given in sets]
    return Kernel(calls, work, peer, lambda: relative(call(sets[0]).transpose(1, 2), peer()), {"prefix": prefix})


# Dense products and what stands between -------------------------------------------------------------------------------


def dense(sizes: Sizes, device: str, name: str) -> Kernel:
    weight = getattr(model(sizes, device).weights.layers[0], name)
    sets = [normal(device, sizes.tokens, weight.shape[1]) for _ in range(SETS)]
    work = Work(
        bytes=2.0 * (weight.numel() + sizes.tokens * sum(weight.shape)), operations=2.0 * sizes.tokens * weight.numel()
    )

    def peer() -> Tensor:
        return F.linear(sets[0], weight)

    return Kernel(
        [partial(grouped_gemm.dense, x, weight) for x in sets],
        work,
        peer,
        lambda: relative(grouped_gemm.dense(sets[0], weight), peer()),
    )


def between(sizes: Sizes, device: str, name: str) -> Kernel:
    config, n = sizes.config, sizes.tokens
    hidden, one = config.hidden_size, sizes.layer(full=False)
    ones = torch.ones(hidden, device=device, dtype=torch.bfloat16)

    def rows(*shape: int) -> Tensor:
        return normal(device, n, *shape)

    def inputs() -> tuple[Any, ...]:
        if name == "gelu_product":
            return rows(config.intermediate_size), rows(config.intermediate_size)
        if name == "attention_residual":
            return rows(hidden), rows(hidden), ones, ones, ones, 1e-6
        if name == "layer_output":
            return rows(hidden), rows(hidden), rows(hidden), ones, ones, ones, ones, 1.0, 1e-6
        heads = [rows(count, one.head_dim) for count in (config.num_attention_heads, *[one.num_key_value_heads] * 2)]
        norms = [torch.ones(one.head_dim, device=device, dtype=torch.bfloat16)] * 2
        return *heads, *norms, rows(one.head_dim), rows(one.head_dim), 1e-6

    sets = [inputs() for _ in range(SETS)]
    written = {"gelu_product": 1, "attention_residual": 3, "layer_output": 2}
    read = sum(x.nbytes for x in sets[0] if isinstance(x, Tensor) and x.dim() > 1)
    size = 2.0 * n * (config.intermediate_size if name == "gelu_product" else hidden)
    # normalise_heads writes what it reads, but the cosines and sines.
    work = Work(bytes=read + written[name] * size if name in written else 2.0 * read)
    function = getattr(layer, name)
    return Kernel([partial(function, *given) for given in sets], work)


add("experts_bf16_128", moe, "bfloat16", 128)
add("experts_bf16_84", moe, "bfloat16", 84)
add("head", head)
add("soft_embedding_flat", soft, False)
add("soft_embedding_peaked", soft, True)
add("attention_256_window", attention, False, 1023)
add("attention_512_128", attention, True, 128)
add("attention_512_8192", attention, True, 8192)
add("product_by_cublas", product)
add("dense_q", dense, "q_proj")
add("dense_o", dense, "o_proj")
add("dense_gate", dense, "gate_proj")
add("dense_down", dense, "down_proj")
add("experts_fp8_84", moe, "fp8", 84)
add("experts_fp8_128", moe, "fp8", 128)
add("experts_fp8_fp8_84", moe, "fp8", 84, "fp8")
add("experts_int8_128", moe, "int8", 128)
add("experts_int4_84", moe, "int4", 84)
add("experts_int4_128", moe, "int4", 128)
add("router", route)
add("sample_and_update", sample)
for _name in ("normalise_heads", "attention_residual", "gelu_product", "layer_output"):
    add(_name, between, _name)
