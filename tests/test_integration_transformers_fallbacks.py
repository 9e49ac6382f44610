"""`dg.accelerate`: the parts that run on transformers' own code, with one warning per model and reason; adapters."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

import dgemma_ext as dg
import transformers_oracle as oracle
from accelerated import all_on_kernels, caught_fallbacks, counted_kernels, random_ids, twin, unaccelerated
from dgemma_ext.integrations.transformers import attention, denoising, releases, trial
from dgemma_ext.integrations.transformers.fallback import Acceleration
from dgemma_ext.integrations.transformers.visibility import of_mask
from dgemma_ext.ops import block_attention, grouped_gemm
from test_integration_transformers import FP32_BOUND, ROWS, assert_within, padded, passes

# Attention against transformers' own, mask by mask --------------------------------------------------------------------

QUERIES, PREFIX, WINDOW = 6, 9, 8
KEYS = PREFIX + QUERIES


def causal_mask(window: int = 0) -> torch.Tensor:
    position, key = PREFIX + torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    mask = key <= position
    return mask & (key > position - window) if window else mask


def hidden_keys(*ranges: tuple[int, int]) -> torch.Tensor:
    """bool [ROWS, 1, KEYS]: the same for the first row, everything visible in the last."""
    valid = torch.ones(ROWS, 1, KEYS, dtype=torch.bool)
    for row, (first, last) in enumerate(ranges):
        valid[row, 0, first:last] = False
    return valid


def with_spans(mask: torch.Tensor, *spans: tuple[int, int]) -> torch.Tensor:
    mask = mask.clone()
    for first, last in spans:
        mask[:, first - PREFIX : last - PREFIX, first:last] = True
    return mask


def random_mask() -> torch.Tensor:
    mask = torch.rand(ROWS, 1, QUERIES, KEYS) < 0.5
    mask[..., 0] = True
    return mask


EVERYTHING = torch.ones(QUERIES, KEYS, dtype=torch.bool)
LEFT, RIGHT, HOLE = hidden_keys((0, 4), (0, 11)), hidden_keys((13, KEYS), (10, KEYS)), hidden_keys((2, 5), (5, 9))
# (mask, window of the layer, whether the kernels support it)
MASKS: dict[str, tuple[torch.Tensor, int, bool]] = {
    "all": (EVERYTHING[None], 0, True),
    "one row for all": (EVERYTHING[None] & hidden_keys((0, 3))[:1], 0, True),
    "all, left padded": (EVERYTHING & hidden_keys((0, 4), (0, 9)), 0, True),
    "all, hole in the prefix": (EVERYTHING & HOLE, 0, True),
    "all, canvas hidden": (EVERYTHING & hidden_keys((9, 12), (0, 3)), 0, True),
    "all, fewer keys than queries": (EVERYTHING & hidden_keys((2, KEYS)), 0, False),
    "all, nearly no key in one row": (EVERYTHING & hidden_keys((5, KEYS)) & hidden_keys((0, 1)), 0, False),
    "all, nothing in one row": (EVERYTHING & hidden_keys((0, KEYS)), 0, True),
    "all, static cache": (EVERYTHING & hidden_keys((12, KEYS), (12, KEYS), (12, KEYS)), 0, True),
    "causal": (causal_mask()[None], 0, True),
    "causal, left padded": (causal_mask() & LEFT, 0, True),
    "causal, right padded": (causal_mask() & RIGHT, 0, True),
    "causal, hole in the prefix": (causal_mask() & HOLE, 0, True),
    "causal, hole in the block": (causal_mask() & hidden_keys((10, 12)), 0, False),
    "causal, static cache": (causal_mask().roll(-5, 1) & (torch.arange(KEYS) < 10), 0, True),
    "window": (causal_mask(WINDOW)[None], WINDOW, True),
    "window, left padded": (causal_mask(WINDOW) & LEFT, WINDOW, True),
    "window, right padded": (causal_mask(WINDOW) & RIGHT, WINDOW, True),
    "window, hole": (causal_mask(WINDOW) & HOLE, WINDOW, False),
    "window that never binds, hole": (causal_mask() & HOLE, 99, True),
    "spans": (with_spans(causal_mask()[None], (9, 12), (13, 15)), 0, True),
    "spans beyond the window": (with_spans(causal_mask(3)[None], (9, 14)), 3, True),
    "spans, left padded": (with_spans(causal_mask(WINDOW) & LEFT, (11, 14)) & LEFT, WINDOW, True),
    "spans, hole": (with_spans(causal_mask() & HOLE, (11, 14)), 0, False),
    "spans that overlap": (with_spans(causal_mask()[None], (9, 12), (11, 14)), 0, False),
    "another window": (causal_mask(WINDOW - 1)[None], WINDOW, False),
    "window where the layer has none": (causal_mask(WINDOW)[None], 0, False),
    "random": (random_mask(), 0, False),
    "added to the scores": (torch.zeros(1, 1, QUERIES, KEYS), 0, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    """Every query that sees a key gets the result of transformers' sdpa, whether the mask is recognised or not."""
    mask, window, on_kernels = MASKS[name]
    mask = mask if mask.dim() == 4 else (mask if mask.dim() == 3 else mask[None])[:, None]
    query = torch.randn(ROWS, 4, QUERIES, 16)
    key, value = torch.randn(2, ROWS, 2, KEYS, 16)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, is_causal=True)
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        module._dgemma_acceleration = Acceleration()  # type: ignore[assignment]
        given: dict[str, Any] = dict(scaling=0.3, is_causal=True, sliding_window=window or None)
        for _ in range(2):
            got, _ = attention.attention_forward(module, query, key, value, mask, **given)
    assert bool(counts) is on_kernels
    assert len(fallbacks) == (0 if on_kernels else 1)
    sees = (
        mask.expand(ROWS, 1, QUERIES, KEYS)[:, 0].any(-1)
        if mask.dtype == torch.bool
        else torch.ones(ROWS, QUERIES).bool()
    )
    if name.endswith("right padded"):
        # Padding's own queries: transformers computes values there that nothing reads.
        sees &= mask[:, 0, :, PREFIX:].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(got[sees], wanted[sees], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got).all()


def test_the_cached_visibility_of_a_changed_mask() -> None:
    """The result for a mask is not used after the tensor changes, nor for a layer with another window."""
    mask = causal_mask(WINDOW)[None, None].clone()
    assert of_mask(mask, QUERIES, KEYS, 0) is None
    found = of_mask(mask, QUERIES, KEYS, WINDOW)
    assert found is not None
    assert found.window == WINDOW
    assert of_mask(mask, QUERIES, KEYS, WINDOW) is found
    mask[:] = causal_mask()
    assert of_mask(mask, QUERIES, KEYS, WINDOW) is None
    found = of_mask(mask, QUERIES, KEYS, 0)
    assert found is not None
    assert found.window == 0


@pytest.mark.parametrize(("queries", "causal"), [(QUERIES, True), (QUERIES, False), (1, True), (1, False)])
def test_no_mask(queries: int, causal: bool) -> None:
    """Causal from the first key on, or everything visible, as in transformers' sdpa."""
    query, (key, value) = torch.randn(ROWS, 4, queries, 16), torch.randn(2, ROWS, 2, KEYS, 16)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    given: dict[str, Any] = dict(scaling=0.3, is_causal=causal)
    wanted, _ = sdpa_attention_forward(module, query, key, value, None, **given)
    with all_on_kernels():
        got, _ = attention.attention_forward(module, query, key, value, None, sliding_window=4, **given)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


# The whole model ------------------------------------------------------------------------------------------------------


def inputs(model: Any, rows: int = ROWS, count: int = 17) -> dict[str, torch.Tensor]:
    return {"input_ids": random_ids(model, rows, count, 11), "decoder_input_ids": random_ids(model, rows, 8, 20)}


def test_full_training() -> None:
    """Where the experts' own weights are trained, they run on transformers' code, with one warning; attention trains on
    the kernels. (test_integration_transformers_training.py has adapters.)"""
    model = twin(unaccelerated("flat"), enabled=False).train()
    accelerated = twin(model)
    model.set_experts_implementation("eager")
    grads = []
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        for one in (model, accelerated):
            for _ in range(2):
                one.zero_grad()
                one(**inputs(one)).logits.square().mean().backward()
            grads.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert set(counts) == {"causal_attention", "canvas_attention"}
    (message,) = fallbacks
    assert message.startswith("the experts of this model runs on transformers' own code: its weights are trained")
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None)
        if grad is not None and bool(grad.any()):
            assert_within(grads[1][name], grad, name)
    with torch.no_grad(), all_on_kernels():
        assert_within(accelerated(**inputs(model)).logits, model(**inputs(model)).logits, "training mode, no gradients")


def test_float16() -> None:
    model = unaccelerated("flat", torch.float16)
    accelerated = twin(model)
    with torch.no_grad(), caught_fallbacks() as fallbacks, counted_kernels() as counts:
        for _ in range(2):
            assert torch.equal(accelerated(**inputs(model)).logits, model(**inputs(model)).logits)
    assert not counts
    assert len(fallbacks) == 2
    assert all("no kernel of cpu takes torch.float16" in message for message in fallbacks)


def test_output_attentions() -> None:
    """The weights come from transformers' eager attention, with its additive mask."""
    eager = unaccelerated("flat", attention="eager")
    accelerated, mask = twin(unaccelerated("flat")), padded("left", 17)
    given: dict[str, Any] = inputs(eager) | {"attention_mask": mask, "output_attentions": True}
    given["decoder_attention_mask"] = torch.nn.functional.pad(mask, (0, 8), value=1)
    with torch.no_grad(), caught_fallbacks() as fallbacks:
        outputs = [one(**given) for one in (eager, accelerated, accelerated)]
    assert len(fallbacks) == 1
    assert "output_attentions" in fallbacks[0]
    assert len(outputs[0].attentions) == len(outputs[1].attentions) > 0
    for wanted, got in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), all_on_kernels():
        accelerated(**given | {"output_attentions": False})


def test_mask_of_its_own() -> None:
    """A mask that no kernel supports gives the same logits and one warning."""
    model = unaccelerated("flat")
    accelerated, cache = twin(model), DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model.model.encoder(input_ids=random_ids(model, 1, 17, 11), **{oracle.CACHE: cache})
        sliding, full = (torch.rand(1, 1, 8, keys) < 0.7 for keys in (15 + 8, 17 + 8))
        given: dict[str, Any] = {
            "decoder_input_ids": random_ids(model, 1, 8, 20),
            "decoder_attention_mask": {"sliding_attention": sliding, "full_attention": full},
            oracle.CACHE: cache,
        }
        with caught_fallbacks() as fallbacks:
            for _ in range(2):
                assert_within(accelerated(**given).logits, model(**given).logits, "logits")
    assert len(fallbacks) == 1
    assert "its mask is neither causal" in fallbacks[0]


def test_tensors_of_other_kinds() -> None:
    """A tensor subclass (of a quantizer, or sharded over devices) is not read as plain memory."""

    class Packed(torch.Tensor):
        pass

    model = unaccelerated("flat")
    accelerated = twin(model)
    experts = accelerated.model.decoder.layers[0].experts
    del experts.gate_up_proj
    experts.gate_up_proj = model.model.decoder.layers[0].experts.gate_up_proj.detach().as_subclass(Packed)
    with torch.no_grad(), caught_fallbacks() as fallbacks:
        assert_within(accelerated(**inputs(model)).logits, model(**inputs(model)).logits, "logits")
    assert len(fallbacks) == 1
    assert "the kernels take plain tensors, and one is a Packed" in fallbacks[0]


def test_inference_mode() -> None:
    """Inference tensors have no version counter, and no gradients."""
    model, mask = unaccelerated("flat"), padded("left", 17)
    accelerated = twin(model)
    given: dict[str, Any] = inputs(model) | {"attention_mask": mask}
    given["decoder_attention_mask"] = torch.nn.functional.pad(mask, (0, 8), value=1)
    with torch.inference_mode(), all_on_kernels():
        assert_within(accelerated(**given).logits, model(**given).logits, "logits")
        generate(accelerated)


def test_each_model_warns_for_itself() -> None:
    for _ in range(2):
        accelerated = twin(unaccelerated("flat", torch.float16))
        with torch.no_grad(), caught_fallbacks() as fallbacks:
            accelerated(**inputs(accelerated))
        assert len(fallbacks) == 2


# The sampler ----------------------------------------------------------------------------------------------------------


def generate(model: Any, **extra: Any) -> torch.Tensor:
    torch.manual_seed(5)
    found: torch.Tensor = model.generate(
        random_ids(model, 2, 12, 3), max_new_tokens=16, max_denoising_steps=4, **extra
    ).sequences
    return found


class HalfTemperature(generation.LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Any, scores: torch.Tensor, cur_step: Any) -> torch.Tensor:
        return scores * 2


class OwnSampler(generation.EntropyBoundSampler):  # type: ignore[misc]
    pass


class OwnStopping(generation.StableAndConfidentStoppingCriteria):  # type: ignore[misc]
    pass


def with_processor(model: Any) -> dict[str, Any]:
    return {"logits_processor": generation.LogitsProcessorList([HalfTemperature()])}


def with_sampler(model: Any) -> dict[str, Any]:
    config = generation.EntropyBoundSamplerConfig(0.1)
    model._prepare_sampler = lambda generation_config: OwnSampler(config, 8, 300, 4)
    return {}


def with_stopping(model: Any) -> dict[str, Any]:
    model._prepare_diffusion_stopping_criteria = lambda generation_config: OwnStopping(1, 0.005)
    return {}


def with_forward(model: Any) -> dict[str, Any]:
    forward = model.forward
    model.forward = lambda **keywords: forward(**keywords)
    return {}


SAMPLER_FALLBACKS: dict[str, tuple[Any, str]] = {
    "processor": (with_processor, "logits processors are given (HalfTemperature)"),
    "sampler": (with_sampler, "it is a OwnSampler of its own"),
    "stopping": (with_stopping, "it stops by OwnStopping"),
    "forward": (with_forward, "the model's forward was replaced"),
}


@pytest.mark.parametrize("name", SAMPLER_FALLBACKS)
def test_sampler_fallbacks(name: str) -> None:
    """The user's own part is called, by transformers' own step with torch's generator; the passes stay accelerated."""
    prepare, reason = SAMPLER_FALLBACKS[name]
    model = twin(unaccelerated("flat"), enabled=False)
    accelerated = twin(model)
    wanted = generate(model, **prepare(model))
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        got = [generate(accelerated, **prepare(accelerated)) for _ in range(2)]
    assert counts["moe_ffn"] > 0
    assert counts["update_canvas_"] == 0
    assert len(fallbacks) == 1
    assert fallbacks[0].startswith("the sampler of this model runs on transformers' own code: " + reason)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0][:, :20], wanted[:, :20])


def test_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache compiles the loop; with disable_compile it runs on the kernels, without on transformers."""
    accelerated = twin(unaccelerated("flat"))
    with all_on_kernels() as counts:
        generate(accelerated, cache_implementation="static", disable_compile=True)
    assert counts["update_canvas_"] > 0
    # Compiling takes a minute; it is enough that transformers passes another function.
    monkeypatch.setattr(torch, "compile", lambda function, **keywords: lambda *a, **k: function(*a, **k))
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        generate(accelerated, cache_implementation="static")
    assert counts["update_canvas_"] == 0
    assert len(fallbacks) == 1
    assert "the loop is compiled" in fallbacks[0]


def test_compiled_by_the_user() -> None:
    """One graph and the same logits, as without acceleration."""
    model = twin(unaccelerated("flat"), enabled=False)
    model.set_experts_implementation("grouped_mm")  # the eager experts cannot be compiled to one graph
    accelerated, cache = twin(model), DynamicCache(config=model.config.text_config)
    with torch.no_grad(), caught_fallbacks() as fallbacks:
        model.model.encoder(input_ids=random_ids(model, 2, 20, 1), **{oracle.CACHE: cache})
        given: dict[str, Any] = {"decoder_input_ids": random_ids(model, 2, 8, 2), oracle.CACHE: cache}
        compiled = torch.compile(accelerated.forward, backend="eager", fullgraph=True)
        assert_within(compiled(**given).logits, model(**given).logits, "logits")
    assert not fallbacks


def test_repeatable_and_seeded() -> None:
    """torch.manual_seed decides all draws; every row, canvas and run has different ones."""
    accelerated = twin(unaccelerated("flat"))
    assert torch.equal(generate(accelerated), generate(accelerated))
    first, second = (accelerated.generate(random_ids(accelerated, 2, 12, 3), max_new_tokens=16) for _ in range(2))
    assert not torch.equal(first.sequences, second.sequences)
    torch.manual_seed(5)
    (seeds, indices), (others, _) = (denoising.draw_streams(4, torch.device("cpu")) for _ in range(2))
    assert len({*seeds.tolist(), *others.tolist()}) == 8
    assert indices.tolist() == [0] * 4


@pytest.mark.parametrize("version", ["5.25.0", "5.30.1.dev0", "6.0rc1"])
def test_a_later_release_is_tried_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its model is accelerated as a whole, because the small model of the trial runs as it should."""
    monkeypatch.setattr(releases.transformers, "__version__", version)
    state = torch.random.get_rng_state()
    with caught_fallbacks() as fallbacks:
        accelerated = twin(unaccelerated("flat"))
        generate(accelerated)
    assert not fallbacks
    with mock.patch.object(trial, "_small_model") as tried, all_on_kernels() as counts:
        torch.random.set_rng_state(state)
        twin(unaccelerated("flat"))
        assert torch.equal(torch.random.get_rng_state(), state)
        generate(accelerated)
    assert not tried.called
    assert counts["update_canvas_"] > 0


def _another_acceptance(sampler: Any, current: Any, denoised: Any, logits: Any, cur_step: Any) -> Any:
    sampler.accepted_token_mask = torch.ones_like(denoised, dtype=torch.bool)
    return denoised


def test_a_later_release_that_samples_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases.transformers, "__version__", "5.99.1")
    monkeypatch.setattr(generation.EntropyBoundSampler, "accept_canvas", _another_acceptance)
    with caught_fallbacks() as fallbacks:
        accelerated = twin(unaccelerated("flat"))
    assert len(fallbacks) == 1
    assert "the sampler of this model runs on transformers' own code: transformers 5.99.1 is newer" in fallbacks[0]
    assert "other accepted positions of a first step" in fallbacks[0]
    with caught_fallbacks() as fallbacks, counted_kernels() as counts:
        generate(accelerated)
    assert not fallbacks
    assert counts["moe_ffn"] > 0
    assert counts["canvas_attention"] > 0
    assert counts["update_canvas_"] == 0


@pytest.mark.parametrize(("part", "version"), [("attention", "5.99.2"), ("experts", "5.99.3")])
def test_a_later_release_whose_layers_differ(part: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other parts run on the kernels; one that transformers computes otherwise does not."""
    monkeypatch.setattr(releases.transformers, "__version__", version)
    model = unaccelerated("flat")
    kind, name = {"attention": (block_attention, "canvas_attention"), "experts": (grouped_gemm, "moe_ffn")}[part]
    right = getattr(kind, name)
    with mock.patch.object(kind, name, lambda *arguments, **keywords: right(*arguments, **keywords).roll(1, -1)):
        trial.failed_parts(version)
    with caught_fallbacks() as fallbacks:
        accelerated = twin(model)
    assert len(fallbacks) == 1
    assert f"the {part} of this model runs on transformers' own code" in fallbacks[0]
    assert "logits are off by" in fallbacks[0]
    with torch.no_grad(), counted_kernels() as counts:
        assert_within(accelerated(**inputs(model)).logits, model(**inputs(model)).logits, "logits")
        generate(accelerated)
    assert (counts["moe_ffn"] == 0) == (part == "experts")
    assert (counts["canvas_attention"] == 0) == (part == "attention")
    assert counts["update_canvas_"] > 0


def test_another_signature_keeps_its_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(unaccelerated("flat")), "_denoising_step", lambda self, canvas: None)
    with caught_fallbacks() as fallbacks:
        accelerated = twin(unaccelerated("flat"))
    assert len(fallbacks) == 1
    assert "takes other arguments than known (self, canvas)" in fallbacks[0]
    assert "_denoising_step" not in vars(accelerated)


# Adapters -------------------------------------------------------------------------------------------------------------

LORA_TARGETS: dict[str, dict[str, Any]] = {
    # The vision tower's layers are excluded: PEFT does not support their modules.
    "projections": dict(target_modules=r".*(decoder|language_model)\.layers\..*_proj"),
    "experts": dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "head": dict(target_modules=["lm_head", "self_conditioning.down_proj"]),
}


@pytest.mark.parametrize("order", ["adapter first", "acceleration first"])
@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_lora(targets: str, order: str) -> None:
    """A LoRA adapter of PEFT changes both models in the same way; without it both are as before."""
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements/dev.txt)")
    model, accelerated = (twin(unaccelerated("flat"), enabled=False) for _ in range(2))
    config = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **LORA_TARGETS[targets])
    if order == "acceleration first":
        dg.accelerate(accelerated)
    wrapped = []
    for one in (model, accelerated):
        torch.manual_seed(1)
        wrapped.append(peft.get_peft_model(one, config).eval())
    if order == "adapter first":
        assert dg.accelerate(wrapped[1]) is wrapped[1]
    ids, canvas, mask = [random_ids(model, ROWS, 17, 11)], random_ids(model, ROWS, 8, 20), padded("left", 17)
    wanted = passes(wrapped[0], ids, mask, canvas)
    with all_on_kernels() as counts:
        got = passes(wrapped[1], ids, mask, canvas)
    assert counts["canvas_attention"] > 0
    # Experts with factors are grouped products, but where PEFT came last and makes their weights.
    assert (counts["moe_ffn"] > 0) == (targets != "experts" or order == "acceleration first")
    base = passes(unaccelerated("flat"), ids, mask, canvas)
    assert float((wanted[0] - base[0]).abs().max() / base[0].abs().max()) > 100 * FP32_BOUND
    for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert_within(mine, theirs, f"output {index}")
    with wrapped[1].disable_adapter(), all_on_kernels():
        assert_within(passes(wrapped[1], ids, mask, canvas)[0], base[0], "without the adapter")
    with all_on_kernels() as counts:
        generate(wrapped[1].get_base_model())
    assert counts["update_canvas_"] > 0
