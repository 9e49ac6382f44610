"""Operators that training takes gradients through: a kernel's forward, and a backward of torch's products.

The base's weights are frozen, so no gradient of them exists: what flows back is that of the inputs, of routing weights
and of low-rank factors. A backward recomputes what it needs from the operator's inputs and stores nothing else. Every
formula also runs in float64 (then torch computes the forward too), in which the tests compare it with finite
differences.
"""

from __future__ import annotations

from dgemma_ext.ops.gradients.attention import canvas_attention, causal_attention
from dgemma_ext.ops.gradients.dense import linear
from dgemma_ext.ops.gradients.experts import ExpertFactors, moe_ffn
from dgemma_ext.ops.gradients.head import head_cross_entropy
