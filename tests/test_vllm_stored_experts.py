"""Parameters of quantized experts inside vLLM, as far as they need no vLLM."""

from __future__ import annotations

import math

import pytest

from dgemma_ext.integrations.vllm.stored_experts import Scheme
from dgemma_ext.ops.formats import FORMATS


@pytest.mark.parametrize(
    ("scheme", "sizes", "cuda", "words"),
    [
        (Scheme("int8"), (24, 9), False, None),
        (Scheme("int8"), (24, 16), True, "the hidden size is 24, and int8 wants a multiple of 16 up to 16384"),
        (Scheme("nvfp4", (16, 16)), (2816, 176), False, None),
        (
            Scheme("nvfp4", (16, 16)),
            (2816, 176),
            True,
            "an expert on this rank is 176, and nvfp4 wants a multiple of 32",
        ),
        (Scheme("fp8"), (2816, 704), True, None),
        (Scheme("fp8"), (16_392, 704), False, "the hidden size is 16392, and fp8 wants"),
    ],
)
def test_sizes_of_quantized_experts(scheme: Scheme, sizes: tuple[int, int], cuda: bool, words: str | None) -> None:
    refusal = scheme.refusal(*sizes, cuda=cuda)
    assert (refusal is None) is (words is None)
    assert words is None or words in (refusal or "")


def test_parameters_of_quantized_experts_take_the_bytes_of_their_format() -> None:
    """Of the published sizes: what a layer's parameters take is what the formats say, and no parameter is for a part
    that nothing reads."""
    experts, rows, columns = 128, 704, 2816
    for scheme in (Scheme("fp8"), Scheme("int8"), Scheme("int4", (32, 32)), Scheme("nvfp4", (16, 16))):
        taken = 0
        for part in scheme.parts(scheme.groups[0]):
            size = math.prod(part.parameter(experts, 2, rows, columns))
            assert (size == 0) is (part.role == "unread")
            taken += size * part.dtypes[0].itemsize if part.dtypes and part.columns is not None else 0
        matrix = experts * 2 * rows * columns
        assert taken == FORMATS[scheme.format].nbytes(matrix, columns, scheme.groups[0])
