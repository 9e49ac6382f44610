"""Tries the kernels in a release of transformers that the tests have not seen, on a small model, once for a process.

Attention and experts: the logits of both passes beside those of transformers' own code. The sampler: of a first step,
whose input transformers draws, the draft and the accepted positions; and a whole canvas near zero temperature with
every position accepted, in which no draw of the sampler decides anything.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

from dgemma_ext.integrations.transformers.releases import NEWEST_TESTED
from dgemma_ext.integrations.transformers.switch import PARTS, enable
from dgemma_ext.torch_state import own_torch_state

# Largest difference of fp32 logits, as a share of the largest: the integration's tests find less than 5e-5.
_BOUND = 1e-3
_PROMPT, _CANVAS, _VOCABULARY = 11, 8, 96
_CONFIG: dict[str, Any] = {
    "canvas_length": _CANVAS,
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 32,
        "sliding_window": 6,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


@functools.cache
def failed_parts(release: str) -> Mapping[str, str]:
    """Part → why it does not run on the kernels under this release, for each that fails the trial."""
    found: dict[str, str] = {}
    # Neither the caller's random numbers nor what is set in torch may change, or matter.
    with own_torch_state(), torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain: Any = None
        for part in PARTS:
            try:
                if plain is None:
                    plain = _small_model()
                with_kernels = copy.deepcopy(plain)
                enable(with_kernels, {other: "is not tried now" for other in PARTS if other != part})
                (_check_sampler if part == "sampler" else _check_passes)(plain, with_kernels)
            except Exception as error:  # of the other library, in a release that nobody here has seen
                newest = ".".join(map(str, NEWEST_TESTED))
                found[part] = (
                    f"transformers {release} is newer than {newest}, and a trial on a small model failed "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                )
    return types.MappingProxyType(found)


def _small_model() -> Any:
    torch.manual_seed(1)
    model: Any = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(copy.deepcopy(_CONFIG)))
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        elif name.endswith("decoder.norm.weight"):
            parameter.fill_(2.0)  # so that some positions are sure and others are not
    return model


def _ids(count: int) -> Tensor:
    return torch.randint(3, _VOCABULARY, (2, count), dtype=torch.int64)


def _check_passes(plain: Any, with_kernels: Any) -> None:
    torch.manual_seed(2)
    given = {"input_ids": _ids(_PROMPT), "decoder_input_ids": _ids(_CANVAS)}
    wanted, got = (model(**given).logits.float() for model in (plain, with_kernels))
    off = float((got - wanted).abs().max() / wanted.abs().max())
    if not off <= _BOUND:
        raise ValueError(f"logits are off by {off:.1e} of the largest")


def _check_sampler(plain: Any, with_kernels: Any) -> None:
    usual = dict(entropy_bound=3.0, t_min=0.4, t_max=0.8, max_denoising_steps=3)
    wanted, got = (_generation(model, **usual)[1][0] for model in (plain, with_kernels))
    _compare("draft of a first step", wanted[0], got[0])
    _compare("accepted positions of a first step", wanted[1], got[1])
    cold = dict(entropy_bound=1e6, t_min=1e-3, t_max=2e-3, max_denoising_steps=4)
    (wanted_tokens, wanted_steps), (tokens, steps) = (_generation(model, **cold) for model in (plain, with_kernels))
    _compare("tokens", wanted_tokens, tokens)
    if len(steps) != len(wanted_steps):
        raise ValueError(f"{len(steps)} denoising steps in place of {len(wanted_steps)}")


def _compare(what: str, wanted: Tensor, got: Tensor) -> None:
    if not torch.equal(wanted, got):
        raise ValueError(f"other {what} than transformers' sampler")


def _generation(model: Any, entropy_bound: float, **settings: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Tokens of a canvas, and draft and accepted positions of every step."""
    steps: list[tuple[Tensor, Tensor]] = []
    step: Callable[..., Any] = model._denoising_step

    def recorded(**arguments: Any) -> Any:
        result = step(**arguments)
        steps.append((result[1].clone(), arguments["sampler"].accepted_token_mask.clone()))
        return result

    before = vars(model).get("_denoising_step")
    model._denoising_step = recorded
    try:
        torch.manual_seed(3)
        out = model.generate(
            _ids(_PROMPT),
            max_new_tokens=_CANVAS,
            sampler_config=generation.EntropyBoundSamplerConfig(entropy_bound=entropy_bound),
            stability_threshold=1,
            confidence_threshold=0.005,
            eos_token_id=[-1],  # no token
            pad_token_id=0,
            **settings,
        )
    finally:
        del model._denoising_step
        if before is not None:
            model._denoising_step = before
    return out.sequences, steps
