"""What stands between a layer's products, each as one operator: a launch on a GPU, one pass over the rows on the CPU.

Order of operations and roundings are those of transformers' modeling_diffusion_gemma.py: norms in fp32 rounded once,
sums and products beside them rounded to the tensors' dtype one by one. Every row is computed by itself. On the CPU the
bits are those of torch's operators (rows of eight values or more), of which transformers' modules are made.

On a GPU: bfloat16, hidden sizes in multiples of eight up to 8,192, heads up to 512 wide. Every function raises
ValueError naming an argument of another shape, dtype, layout or device. `rms_norm` is torch's operators everywhere,
`row_norm` the kernel, `gelu_product` torch's on the CPU: its tanh has other bits in the C interface.
"""

from __future__ import annotations

from torch import Tensor

from dgemma_ext.ops.operators import operator
from dgemma_ext.ops.plain import layer as plain_layer

rms_norm = plain_layer.rms_norm
_rms_norm = operator("rms_norm")
_normalise_heads, _attention_residual = operator("normalise_heads"), operator("attention_residual")
_gelu_product, _layer_output = operator("gelu_product"), operator("layer_output")


def row_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """`rms_norm` of rows [rows, width] by the kernel on a CPU too, without a gradient; weight [width] or None.

    On a CPU it has the bits of `rms_norm`.
    """
    result: Tensor = _rms_norm(x, weight, epsilon)
    return result


def normalise_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    query_norm: Tensor,
    key_norm: Tensor,
    cosine: Tensor,
    sine: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw projections to what attention takes: queries and keys normalised and rotated, values normalised.

    query: [tokens, heads, head_dim]. key, value: [tokens, key heads, head_dim]; value None takes the raw keys. Weights
    of the norms are [head_dim], cosine and sine [tokens, head_dim]: each pair (i, i + head_dim / 2) is turned by its
    angle.
    """
    result: tuple[Tensor, Tensor, Tensor] = _normalise_heads(
        query, key, value, query_norm, key_norm, cosine, sine, epsilon
    )
    return result


def attention_residual(
    hidden: Tensor, attended: Tensor, attended_norm: Tensor, dense_norm: Tensor, sparse_norm: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual = hidden + norm(attended), and the inputs of the dense MLP and of the experts, its two norms.

    hidden, attended: [tokens, hidden_size]; weights: [hidden_size]. Returns three tensors like hidden.
    """
    result: tuple[Tensor, Tensor, Tensor] = _attention_residual(
        hidden, attended, attended_norm, dense_norm, sparse_norm, epsilon
    )
    return result


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, two tensors of one shape."""
    result: Tensor = _gelu_product(gate, up)
    return result


def layer_output(
    residual: Tensor,
    dense: Tensor,
    sparse: Tensor,
    dense_norm: Tensor,
    sparse_norm: Tensor,
    norm: Tensor,
    next_norm: Tensor,
    scalar: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """output = (residual + norm(norm(dense) + norm(sparse))) * scalar, and norm(output, next_norm).

    residual, dense, sparse: [tokens, hidden_size]; weights: [hidden_size]. next_norm is the weight of whatever norm
    comes next: the next layer's first, or the model's last. Returns the output and that norm of it.
    """
    result: tuple[Tensor, Tensor] = _layer_output(
        residual, dense, sparse, dense_norm, sparse_norm, norm, next_norm, scalar, epsilon
    )
    return result
