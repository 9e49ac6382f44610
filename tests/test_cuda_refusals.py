"""What the CUDA entry points refuse before any launch, on the test bed; run by test_sim_operators.py."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import operator_calls
from backend import BACKEND
from block_attention_cases import Built, Request
from block_attention_cases import Case as AttentionCase
from denoise_cases import make_case, softmax_statistics
from dgemma_ext import _C
from dgemma_ext.ops import automaton, block_attention, denoise, grouped_gemm, layer, router
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from test_grouped_gemm import make_case as make_moe_case
from test_layer import head_operands, residual_operands

pytestmark = pytest.mark.skipif(BACKEND != "sim", reason="of the CUDA kernels, on the test bed")

BF16 = torch.bfloat16
OF_AUTOMATA = ("class_statistics_", "constrain_", "sample_class_")


def set_gpu(compute_capability: int) -> None:
    assert _C.__file__ is not None
    ctypes.CDLL(_C.__file__).sim_set_gpu(compute_capability, 3)


def moe(dtype: torch.dtype = BF16, hidden: int = 64, expert: int = 32) -> tuple[Any, ...]:
    return make_moe_case(4, hidden, expert, 4, 2, dtype, "distinct").arguments


def attend(head_dim: int = 32, dtype: torch.dtype = BF16) -> torch.Tensor:
    return Built(AttentionCase([Request(9, 4)], head_dim=head_dim), dtype).run()


def class_statistics(classes: int) -> None:
    """Of a row of the most classes that a GPU takes, or of more."""
    *given, _, _, _, _ = operator_calls.calls(BF16)["class_statistics_"].given
    statistics = automaton.make_class_statistics(1, 1, classes)
    automaton.class_statistics_(*given, **statistics._asdict())


def calls() -> dict[str, Any]:
    """Every operator, with arguments that it takes on a GPU that it knows."""
    case = make_case(BF16, length=4, vocabulary=300)
    hidden, embedding = torch.randn(2, 4, 64).to(BF16), torch.randn(300, 64).to(BF16)
    logits_params = case.logits_params
    given = softmax_statistics(denoise.vocabulary_statistics(**logits_params))
    head_params = {name: value for name, value in logits_params.items() if name != "logits"}
    rows, weight = torch.randn(4, 64).to(BF16), torch.ones(64, dtype=BF16)
    return {
        "moe_ffn": lambda: grouped_gemm.moe_ffn(*moe()),
        "dense": lambda: grouped_gemm.dense(rows, embedding[:40]),
        "route": lambda: router.route(rows, weight, embedding[:8], torch.ones(8, dtype=BF16), 2, 1e-6),
        "canvas_attention": attend,
        "vocabulary_head": lambda: vocabulary_head(hidden, embedding, **head_params),
        "vocabulary_statistics": lambda: denoise.vocabulary_statistics(**logits_params),
        "soft_embedding": lambda: denoise.soft_embedding(
            **logits_params,
            **given,
            pinned=None,
            embedding=embedding,
            embedding_scale=8.0,
            tolerance=0.0,
            max_embedding_norm=9.0,
        ),
        "normalise_heads": lambda: layer.normalise_heads(*head_operands(3, 4, 2, 32, BF16, True)),
        "attention_residual": lambda: layer.attention_residual(*residual_operands(3, 64, BF16)),
        "gelu_product": lambda: layer.gelu_product(rows, rows),
        **{name: call.wrapped for name, call in operator_calls.calls(BF16).items() if name in OF_AUTOMATA},
        "class_statistics_ of many": lambda: class_statistics(4096),
    }


def test_a_gpu_that_is_too_old_is_named_with_what_is_wanted() -> None:
    for name, call in calls().items():
        call()  # as it is, it is taken
        set_gpu(75)
        try:
            with pytest.raises((ValueError, RuntimeError), match=r"compute capability 7\.5, wants 8\.0 or later"):
                call()
        except BaseException as error:
            raise AssertionError(name) from error
        finally:
            set_gpu(90)


@pytest.mark.parametrize("compute_capability", [80, 86, 89, 90, 100, 120])
def test_every_operator_runs_on_every_gpu_from_8_0(compute_capability: int) -> None:
    """The test bed refuses a launch that asks for more shared memory than a block has there."""
    set_gpu(compute_capability)
    try:
        for call in calls().values():
            call()
        for head_dim in (16, 64, 128, 256, 512):
            attend(head_dim)
    finally:
        set_gpu(90)


def test_types_and_sizes_are_named_with_what_is_wanted() -> None:
    refusals: list[tuple[Any, str]] = [
        (lambda: grouped_gemm.moe_ffn(*moe(torch.float32)), "dtype: wants bfloat16"),
        (lambda: grouped_gemm.moe_ffn(*moe(hidden=60)), "hidden_size: wants a multiple of 8"),
        (lambda: grouped_gemm.moe_ffn(*moe(expert=36)), "expert_size: wants a multiple of 8"),
        (lambda: attend(48), "head_dim: wants 16, 32, 64, 128, 256 or 512"),
        (lambda: attend(32, torch.float32), "dtype: wants bfloat16"),
        (lambda: layer.gelu_product(torch.ones(8), torch.ones(8)), "dtype: got 0, wants bfloat16"),
        (lambda: layer.attention_residual(*residual_operands(2, 60, BF16)), "hidden_size: got 60, wants a multiple"),
        (lambda: layer.normalise_heads(*head_operands(2, 1, 1, 514, BF16, True)), "head_dim: got 514, wants an even"),
        (lambda: class_statistics(4097), "most_classes: got 4097, wants 1 to 4096"),
    ]
    for call, words in refusals:
        with pytest.raises((ValueError, RuntimeError), match=words):
            call()


def test_a_misaligned_tensor_is_named() -> None:
    input, *rest = moe()
    shifted = torch.empty(input.numel() + 1, dtype=BF16)[1:].view_as(input).copy_(input)
    with pytest.raises((ValueError, RuntimeError), match=r"input: got 0x[0-9a-f]+, wants a multiple of 16 bytes"):
        grouped_gemm.moe_ffn(shifted, *rest)
    built = Built(AttentionCase([Request(9, 4)], head_dim=32), BF16)
    built.query = torch.empty(built.query.numel() + 1, dtype=BF16)[1:].view_as(built.query).copy_(built.query)
    with pytest.raises((ValueError, RuntimeError), match=r"query: got 0x[0-9a-f]+, wants a multiple of 16 bytes"):
        built.run()


def test_a_workspace_that_is_too_small_is_named() -> None:
    arguments = moe()
    small = torch.empty(grouped_gemm.moe_ffn_workspace(*arguments) - 1, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match=r"workspace: got [0-9]+ bytes, wants at least [0-9]+"):
        grouped_gemm.moe_ffn(*arguments, out=torch.empty_like(arguments[0]), workspace=small)
    built = Built(AttentionCase([Request(9, 4)], head_dim=32), BF16)
    with pytest.raises((ValueError, RuntimeError), match="workspace"):
        block_attention.canvas_attention(
            *built.operands(), out=torch.empty_like(built.query), workspace=torch.empty(64, dtype=torch.uint8)
        )
