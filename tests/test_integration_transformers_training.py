"""Training with PEFT's adapters under `dg.accelerate`: the same loss and gradients, on the kernels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
from accelerated import all_on_kernels, random_ids, twin, unaccelerated
from test_integration_transformers import FP32_BOUND, ROWS, padded

_PROJECTIONS = r"self_attn\.[qkvo]_proj|mlp\.(gate|down)_proj|router\.proj"
TARGETS = rf".*\.(language_model|decoder)\.layers\.\d+\.({_PROJECTIONS})|.*\.self_conditioning\.up_proj"
PROMPT, CANVAS = 21, 8


def adapted(parameters: list[str] | None) -> Any:
    """A model with a random adapter on both passes, as PEFT makes it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, target_parameters=parameters)
    model = get_peft_model(twin(unaccelerated("flat"), enabled=False), config)
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.train()


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of TRL's kind: a pass without gradients, and one that is self-conditioned on it; and its gradients."""
    model.zero_grad()
    mask = padded("left", PROMPT)
    given: dict[str, Any] = {
        "input_ids": random_ids(model, ROWS, PROMPT, 11),
        "attention_mask": mask,
        "decoder_attention_mask": torch.nn.functional.pad(mask, (0, CANVAS), value=1),
        "decoder_input_ids": random_ids(model, ROWS, CANVAS, 20),
    }
    with torch.no_grad():
        first = model(**given).logits
    conditioned = torch.tensor([True, False, True])
    logits = model(**given, self_conditioning_logits=first, self_conditioning_mask=conditioned).logits
    targets = random_ids(model, ROWS, CANVAS, 21)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parameters", [None, ["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_adapters(parameters: list[str] | None) -> None:
    """With an adapter on the experts, on one of their parameters, and without; with checkpointing and without."""
    model = adapted(parameters)
    loss, grads = trained(model)
    assert len(grads) > 60
    dg.accelerate(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with (
            all_on_kernels() as counts,
            mock.patch("torch.nn.utils.parametrize.register_parametrization", side_effect=AssertionError("W + B A")),
        ):
            our_loss, ours = trained(model)
        assert (counts["moe_ffn"] > 0) == (parameters is None)
        torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=0)
        assert ours.keys() == grads.keys()
        for name, grad in grads.items():
            worst = float((ours[name] - grad).abs().max() / grad.abs().max())
            assert worst <= FP32_BOUND, f"{name}: off by {worst:.1e} of the largest"


def test_what_is_left_to_peft() -> None:
    """A switched-off, a second and a merged adapter; and acceleration undone."""
    model = dg.accelerate(adapted(["experts.gate_up_proj", "experts.down_proj"]).eval())
    given = {"input_ids": random_ids(model, 1, 9, 1), "decoder_input_ids": random_ids(model, 1, CANVAS, 2)}

    def logits(one: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = one(**given).logits
        return found

    with_adapter = logits(model)
    with model.disable_adapter():
        without = logits(model)
    base = unaccelerated("flat")
    torch.testing.assert_close(without, logits(base), rtol=0, atol=FP32_BOUND * float(without.abs().max()))
    assert float((with_adapter - without).abs().max()) > 0.01 * float(without.abs().max())
    dg.accelerate(model, enabled=False)
    assert not any(
        isinstance(module.__dict__.get("forward"), object) and "forward" in module.__dict__
        for module in model.modules()
    )
    torch.testing.assert_close(logits(model), with_adapter, rtol=0, atol=FP32_BOUND * float(without.abs().max()))


def test_an_adapter_that_comes_after_acceleration() -> None:
    """It runs as PEFT runs it, until accelerate is called again."""
    from peft import LoraConfig, get_peft_model

    accelerated = twin(unaccelerated("flat"))
    model = get_peft_model(accelerated, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    given = {"input_ids": random_ids(model, 1, 9, 1), "decoder_input_ids": random_ids(model, 1, CANVAS, 2)}
    registered = mock.patch(
        "torch.nn.utils.parametrize.register_parametrization", wraps=torch.nn.utils.parametrize.register_parametrization
    )
    with torch.no_grad(), registered as calls:
        first = model(**given).logits
        assert calls.call_count > 0
        calls.reset_mock()
        again = dg.accelerate(model)(**given).logits
        assert calls.call_count == 0
    torch.testing.assert_close(again, first, rtol=0, atol=FP32_BOUND * float(first.abs().max()))
