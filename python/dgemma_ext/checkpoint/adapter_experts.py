"""The experts' factors of an adapter: which of the two parameters a pair adapts, and by which of two layouts.

PEFT keeps the factors of all experts in two matrices, A [experts * rank, in] by expert, B [out, rank * experts] by
rank. It names both parameters after their module: with both adapted `experts.base_layer` is gate_up_proj and `experts`
down_proj, one alone is `experts`. Up to 0.18 it took the parameter's dimensions for [experts, in, out] and so exchanged
in and out (`ParamWrapper` in peft/tuners/lora/layer.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dgemma_ext.checkpoint.adapter_settings import AdapterSettings
from dgemma_ext.checkpoint.config import ModelConfig

GATE_UP, DOWN = "experts_gate_up", "experts_down"
PARAMETERS = {GATE_UP: "gate_up_proj", DOWN: "down_proj"}

# Since this release in and out are those of the product.
_NOT_EXCHANGED = (0, 19)


class Layout(NamedTuple):
    """attribute: of LayerWeights. is_exchanged: whether A has the rows of the weight and B its columns."""

    attribute: str
    is_exchanged: bool


def layout_of(
    columns: int, rows: int, module: str, is_nested: bool, settings: AdapterSettings, config: ModelConfig
) -> Layout:
    """The layout of a pair with A [.., columns] and B [rows, ..], by its shapes, and where they fit more than one by
    PEFT's release and by which parameters were adapted.

    module: `experts` or `experts.base_layer`; is_nested: whether the file has both. Raises ValueError where nothing or
    more than one fits.
    """
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    sizes = {GATE_UP: (hidden, 2 * inner), DOWN: (inner, hidden)}
    fitting = [
        Layout(name, False) for name, (size_in, size_out) in sizes.items() if (columns, rows) == (size_in, size_out)
    ]
    fitting += [
        Layout(name, True) for name, (size_in, size_out) in sizes.items() if (rows, columns) == (size_in, size_out)
    ]
    if not fitting:
        wanted = " or ".join(
            f"{size_in} and {size_out} for {PARAMETERS[name]}" for name, (size_in, size_out) in sizes.items()
        )
        raise ValueError(f"has {columns} columns, and its B {rows} rows; wanted: {wanted}, or exchanged")
    if len(fitting) > 1 and is_nested:
        wanted = GATE_UP if module.endswith("base_layer") else DOWN
        fitting = [one for one in fitting if one.attribute == wanted]
    if len(fitting) > 1:
        named = [
            name
            for name, parameter in PARAMETERS.items()
            if any(t.endswith(parameter) for t in settings.target_parameters)
        ]
        fitting = [one for one in fitting if len(named) != 1 or one.attribute == named[0]]
    if len(fitting) > 1 and settings.version is not None:
        fitting = [one for one in fitting if one.is_exchanged == (settings.version < _NOT_EXCHANGED)]
    if len(fitting) != 1:
        raise ValueError(
            "fits more than one parameter or layout of the experts; wanted: peft_version and target_parameters in "
            "adapter_config.json"
        )
    return fitting[0]


def by_expert(a: Tensor, b: Tensor, experts: int, is_exchanged: bool) -> tuple[Tensor, Tensor]:
    """A [experts * rank, n] and B [m, rank * experts] as [experts, rank, in] and [experts, out, rank]."""
    by_a = a.unflatten(0, (experts, -1))
    by_b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if is_exchanged:
        by_a, by_b = by_b.mT, by_a.mT
    return by_a.contiguous(), by_b.contiguous()
