"""A small call of every operator, of its forms that write into given tensors too: for what holds of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automaton_cases import one_state
from dgemma_ext.ops import automaton, block_attention, denoise, grouped_gemm, layer, quantize, quantized_gemm, router
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight
from dgemma_ext.ops.vocabulary_head import vocabulary_head


@dataclass
class OperatorCall:
    """The arguments of an operator, and the function of `dgemma_ext.ops` over it with the same."""

    operator: Any  # an OpOverload
    arguments: tuple[Any, ...]
    function: Callable[..., Any]
    given: tuple[Any, ...]  # the function's arguments
    keywords: dict[str, Tensor] = field(default_factory=dict)
    function_keywords: dict[str, Any] = field(default_factory=dict)

    def raw(self) -> Any:
        return self.operator(*self.arguments, **self.keywords)

    def wrapped(self) -> Any:
        return self.function(*self.given, **self.function_keywords)


def same(operator: Any, function: Callable[..., Any], arguments: tuple[Any, ...], **keywords: Tensor) -> OperatorCall:
    """Of a function whose arguments are the operator's."""
    return OperatorCall(operator, arguments, function, arguments, keywords, dict(keywords))


def calls(dtype: torch.dtype) -> dict[str, OperatorCall]:
    """By the operator's name ("sample.out"). `dtype`: of the tensors that may be float32 or bfloat16."""
    found = {**_attention(dtype), **_denoise(dtype), **_automaton(dtype), **_products(dtype), **_layer(dtype)}
    names = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("dgemma::") for name in names if name.startswith("dgemma::")}
    assert set(found) == operators, f"without a call: {operators - set(found)}"
    return found


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention(dtype: torch.dtype) -> dict[str, OperatorCall]:
    ops = torch.ops.dgemma
    query, key = torch.randn(1, 2, 2, 16).to(dtype), torch.randn(1, 2, 1, 16).to(dtype)
    cache = torch.zeros(1, 4, 1, 16, dtype=dtype)
    rows = (key, key.clone(), cache, cache.clone(), ints(0), ints(2), ints(2))
    given = {"out": torch.empty_like(query), "workspace": block_attention.attention_workspace(query, key)}
    canvas, causal = (query, *rows, 0, 1.0), (query, *rows, torch.zeros(1, 1, 2, dtype=torch.int32), 0, 1.0)
    return {
        "canvas_attention": same(ops.canvas_attention.default, block_attention.canvas_attention, canvas),
        "canvas_attention.out": same(ops.canvas_attention.out, block_attention.canvas_attention, canvas, **given),
        "batched_canvas_attention": OperatorCall(
            *(ops.batched_canvas_attention.default, canvas, block_attention.canvas_attention, canvas),
            function_keywords={"batch_invariant": False},
        ),
        "batched_canvas_attention.out": OperatorCall(
            *(ops.batched_canvas_attention.out, canvas, block_attention.canvas_attention, canvas),
            *(given, {"batch_invariant": False, **given}),
        ),
        "causal_attention": same(ops.causal_attention.default, block_attention.causal_attention, causal),
        "causal_attention.out": same(ops.causal_attention.out, block_attention.causal_attention, causal, **given),
        "append_to_cache": same(ops.append_to_cache.default, block_attention.append_to_cache, rows),
        **_paged_attention(dtype),
    }


def _paged_attention(dtype: torch.dtype) -> dict[str, OperatorCall]:
    ops = torch.ops.dgemma
    query, pages = torch.randn(3, 2, 16).to(dtype), torch.randn(4, 2, 1, 16).to(dtype)
    requests = (torch.tensor([[2, 0], [3, 1]], dtype=torch.int32), ints(0, 2, 3), ints(3, 4), ints(1, 0))
    operands = (query, pages, pages.clone(), *requests, torch.zeros(2, 1, 2, dtype=torch.int32))
    bytes_wanted = block_attention.paged_attention_workspace_bytes(2, 2, 2, 1, 16, query.device)
    given = {"out": torch.empty_like(query), "workspace": torch.empty(bytes_wanted, dtype=torch.uint8)}
    numbers = {"max_query_length": 2, "window": 0, "scale": 1.0}
    function, arguments = block_attention.paged_attention, (*operands, *numbers.values())
    key = torch.randn(2, 1, 16).to(dtype)
    append = (key, key.clone(), pages, pages.clone(), torch.tensor([5, -1]))
    return {
        "paged_attention": OperatorCall(
            *(ops.paged_attention.default, arguments, function, operands), function_keywords=numbers
        ),
        "paged_attention.out": OperatorCall(
            *(ops.paged_attention.out, arguments, function, operands, given, {**numbers, **given})
        ),
        "append_to_pages": same(ops.append_to_pages.default, block_attention.append_to_pages, append),
    }


def _denoise(dtype: torch.dtype) -> dict[str, OperatorCall]:
    ops = torch.ops.dgemma
    logits, embedding, hidden = (torch.randn(*shape).to(dtype) for shape in ((1, 1, 32), (32, 8), (1, 1, 8)))
    allowed, row = denoise.pack_allowed([[3, 5, 9]], 32), torch.zeros(1, 1, dtype=torch.int32)
    params = (30.0, torch.ones(1), torch.ones(1, dtype=torch.bool), allowed, row)
    found = denoise.vocabulary_statistics(logits, *params)
    _, _, *softmax = found
    seed, zero, one = torch.zeros(1, dtype=torch.int64), ints(0), ints(1)
    uniforms = torch.full((1, 1), 0.5, dtype=torch.float64)
    token, flags = torch.full((1, 1), 3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.bool)
    inactive = torch.zeros(1, dtype=torch.bool)  # so that every call finds the same
    wide, narrow, entropy = torch.ones(1, dtype=torch.float64), torch.ones(1), torch.ones(1, 1)
    sample = (logits, *params, *softmax, seed, zero, one, uniforms)
    noise = (token.clone(), 32, 0, seed, zero, one, inactive, flags, uniforms)
    update = (
        *(token, token.clone(), entropy, flags, uniforms, 32, seed, zero, ints(4), wide, wide.clone()),
        *(narrow, one, narrow.clone(), inactive, token.clone(), token.clone(), zero.clone(), one.clone()),
        *(narrow.clone(), flags.clone(), narrow.clone(), zero.clone()),
    )
    soft = (logits, *params, *softmax, flags, embedding, 1.0, 0.0, 9.0)
    workspace = torch.empty(denoise.soft_embedding_workspace(1, 1, 32, 8), dtype=torch.uint8)
    given = {"out": torch.empty(1, 1, 8, dtype=dtype), "workspace": workspace}
    shard = (entropy[None], token[None], entropy[None].clone(), entropy[None].clone(), uniforms[None])
    merge = (*shard, 0, seed, zero, one, flags[None], inactive, uniforms)
    into = denoise.merge_vocabulary_shards(*merge)
    named = {f"merged_{name}" if name in found._fields else name: value for name, value in into._asdict().items()}
    merged = OperatorCall(
        ops.merge_vocabulary_shards.out, merge, denoise.merge_vocabulary_shards, merge, named, {"out": into}
    )
    reading = (logits, *params)
    statistics = OperatorCall(
        ops.vocabulary_statistics.out,
        reading,
        denoise.vocabulary_statistics,
        reading,
        found._asdict(),
        {"out": found},
    )
    head = OperatorCall(
        ops.vocabulary_head.default,
        (hidden, embedding, *params, logits, *found),
        vocabulary_head,
        (hidden, embedding, *params),
        function_keywords={"logits": logits, "out": found},
    )
    return {
        "vocabulary_statistics": same(ops.vocabulary_statistics.default, denoise.vocabulary_statistics, reading),
        "vocabulary_statistics.out": statistics,
        "sample": same(ops.sample.default, denoise.sample, sample),
        "sample.out": same(ops.sample.out, denoise.sample, sample, out=token.clone()),
        "merge_vocabulary_shards": same(ops.merge_vocabulary_shards.default, denoise.merge_vocabulary_shards, merge),
        "merge_vocabulary_shards.out": merged,
        "noise_": same(ops.noise_.default, denoise.noise_, noise),
        "update_canvas_": same(ops.update_canvas_.default, denoise.update_canvas_, update),
        "soft_embedding": same(ops.soft_embedding.default, denoise.soft_embedding, soft),
        "soft_embedding.out": same(ops.soft_embedding.out, denoise.soft_embedding, soft, **given),
        "vocabulary_head": head,
    }


def _automaton(dtype: torch.dtype) -> dict[str, OperatorCall]:
    """An automaton of one state that goes on with every token, for a request that is not active."""
    ops = torch.ops.dgemma
    arena, descriptor = one_state(32)
    off, flags = torch.zeros(1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    mask, row, token = denoise.pack_allowed([[3, 5]], 32), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1).int()
    reading = (torch.randn(1, 1, 32).to(dtype), 30.0, torch.ones(1), off, mask, row, arena, descriptor, flags)
    statistics = (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).int(), *(torch.zeros(1, 1, 1).double() for _ in range(2)))
    position, half = torch.zeros(1, 1), torch.full((1, 1), 0.5, dtype=torch.float64)
    constrain = (
        *(arena, descriptor, 1, 1, *statistics, flags, off, ints(0), ints(0), ints(4), torch.zeros(1).long()),
        *(ints(0), ints(1), half, token.clone(), position, token.clone(), half.clone(), ints(1)),
    )
    drawing = (*reading, token.clone(), half, ints(1), token.clone())
    found = (*reading, token, *(one.clone() for one in statistics))
    return {
        "class_statistics_": same(ops.class_statistics_.default, automaton.class_statistics_, found),
        "constrain_": same(ops.constrain_.default, automaton.constrain_, constrain),
        "sample_class_": same(ops.sample_class_.default, automaton.sample_class_, drawing),
    }


def _products(dtype: torch.dtype) -> dict[str, OperatorCall]:
    ops = torch.ops.dgemma
    shapes = ((1, 32), (1, 64, 32), (1, 32, 32), (8, 32))
    input, gate_up, down, weight = (torch.randn(*shape).to(dtype) for shape in shapes)
    tokens = (input, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    experts = (*tokens, gate_up, down)
    workspace = torch.empty(grouped_gemm.moe_ffn_workspace(*experts), dtype=torch.uint8)
    given = {"out": torch.empty_like(input), "workspace": workspace}
    fp8 = tuple(Fp8Weight.quantize(matrix) for matrix in (gate_up, down))
    int4 = tuple(Int4Weight.quantize(matrix, 32) for matrix in (gate_up, down))
    narrow = Int4Weight.quantize(weight, 32)
    codes = tuple(part for matrix in fp8 for part in (matrix.values, matrix.scales))
    parts = tuple(part for matrix in int4 for part in (2, matrix.values, matrix.scales, None))
    scale, projection, per_expert = (torch.randn(*shape).to(dtype) for shape in ((32,), (4, 32), (4,)))
    quantizing = (weight, torch.ones(32), 2, 1.0, narrow.values.clone(), torch.empty(8, 1), torch.empty(8, 3).double())
    routing = (input, scale, projection, per_expert, 2, 1e-6)
    return {
        "moe_ffn": same(ops.moe_ffn.default, grouped_gemm.moe_ffn, experts),
        "moe_ffn.out": same(ops.moe_ffn.out, grouped_gemm.moe_ffn, experts, **given),
        "dense": same(ops.dense.default, grouped_gemm.dense, (input, weight)),
        "moe_ffn_quantized": OperatorCall(
            ops.moe_ffn_quantized.default, (*tokens, *parts), quantized_gemm.moe_ffn, (*tokens, *int4)
        ),
        "moe_ffn_fp8": OperatorCall(
            ops.moe_ffn_fp8.default, (*tokens, *codes), quantized_gemm.moe_ffn_fp8, (*tokens, *fp8)
        ),
        "dense_quantized": OperatorCall(
            ops.dense_quantized.default,
            (input, 2, narrow.values, narrow.scales, None),
            quantized_gemm.dense,
            (input, narrow),
        ),
        "route": same(ops.route.default, router.route, routing),
        "router_input": same(ops.router_input.default, router.router_input, (input, scale, 1e-6)),
        "router_choice": same(ops.router_choice.default, router.router_choice, (torch.rand(1, 4), per_expert, 2)),
        "quantize_weight": same(ops.quantize_weight.default, quantize.quantize_weight, quantizing),
    }


def _layer(dtype: torch.dtype) -> dict[str, OperatorCall]:
    ops = torch.ops.dgemma
    rows, weight, heads = torch.randn(1, 8).to(dtype), torch.ones(8, dtype=dtype), torch.randn(1, 1, 8).to(dtype)
    normalise = (heads, heads.clone(), heads.clone(), weight, weight, rows, rows.clone(), 1e-6)
    residual = (rows, rows.clone(), weight, weight.clone(), weight.clone(), 1e-6)
    output = (rows, rows.clone(), rows.clone(), weight, weight, weight, weight, 1.0, 1e-6)
    return {
        "normalise_heads": same(ops.normalise_heads.default, layer.normalise_heads, normalise),
        "attention_residual": same(ops.attention_residual.default, layer.attention_residual, residual),
        "rms_norm": same(ops.rms_norm.default, layer.row_norm, (rows, weight, 1e-6)),
        "gelu_product": same(ops.gelu_product.default, layer.gelu_product, (rows, rows.clone())),
        "layer_output": same(ops.layer_output.default, layer.layer_output, output),
    }
