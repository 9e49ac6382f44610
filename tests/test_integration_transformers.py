"""`dg.accelerate`: both passes of transformers' model on the kernels, and the parts that do not run on them.

fp32 logits are compared with the unaccelerated model; bf16 layer by layer, each with transformers' input, cache and
experts (test_parity_forward.py says why). Every padded batch has rows padded on the left and on the right.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, StaticCache

import dgemma_ext as dg
import transformers_oracle as oracle
from accelerated import CHECKPOINTS, all_on_kernels, caught_fallbacks, random_ids, twin, unaccelerated
from bounds import relative_distance
from dgemma_ext.integrations.transformers import IMPLEMENTATION, releases
from test_parity_forward import assert_as_good
from transformers_releases import OLDER, run_under

# Largest difference, as a share of the largest magnitude in the reference.
FP32_BOUND = 5e-5
ROWS = 3
PADDINGS = {"none": [0, 0, 0], "left": [0, 5, 13], "right": [0, 5, 13]}


def padded(padding: str, count: int) -> torch.Tensor:
    """A mask of token positions, [ROWS, count]."""
    mask = torch.ones(ROWS, count, dtype=torch.long)
    for row, hidden in enumerate(PADDINGS[padding]):
        hidden = min(hidden, count - 1)
        if hidden and padding == "left":
            mask[row, :hidden] = 0
        elif hidden:
            mask[row, -hidden:] = 0
    return mask


def assert_within(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    worst = float((got - wanted).abs().max() / wanted.abs().max())
    assert worst <= FP32_BOUND, f"{what}: off by {worst:.2e} of the largest magnitude"


@torch.no_grad()
def passes(model: Any, ids: list[torch.Tensor], mask: torch.Tensor, canvas: torch.Tensor) -> list[torch.Tensor]:
    """A prompt and further blocks, each followed by two denoising passes: logits, keys and values."""
    cache, out, length = DynamicCache(config=model.config.text_config), [], canvas.shape[1]
    for block in ids:
        seen = mask[:, : cache.get_seq_length() + block.shape[1]]
        decoder_mask = torch.nn.functional.pad(seen, (0, length), value=1)
        given: dict[str, Any] = {oracle.CACHE: cache, "decoder_attention_mask": decoder_mask}
        first = model(input_ids=block, attention_mask=seen, decoder_input_ids=canvas, **given)
        again = model(decoder_input_ids=canvas, self_conditioning_logits=first.logits / 0.7, **given)
        out += [first.logits, again.logits]
    valid = mask[:, : cache.get_seq_length()].bool()
    for entry in cache.layers:
        kept = valid[:, -entry.keys.shape[2] :]
        out += [entry.keys.transpose(1, 2)[kept], entry.values.transpose(1, 2)[kept]]
    return out


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 50])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_passes(name: str, count: int, padding: str) -> None:
    """A prompt around the window (12 or 16) and two committed canvases, in a batch of three."""
    model = unaccelerated(name)
    accelerated = twin(model)
    ids = [random_ids(model, ROWS, length, 10 + length) for length in (count, 8, 8)]
    canvas, mask = random_ids(model, ROWS, 8, 20), torch.cat([padded(padding, count), torch.ones(ROWS, 16).long()], 1)
    if padding == "right":
        # A gap in a sliding layer's prefix is another kind of mask; the first canvas has none.
        ids = ids[:1]
    wanted = passes(model, ids, mask, canvas)
    with all_on_kernels() as counts:
        got = passes(accelerated, ids, mask, canvas)
    assert min(counts[kernel] for kernel in ("canvas_attention", "moe_ffn")) > 0
    assert (counts["causal_attention"] > 0) == (count > 1 or len(ids) > 1)
    for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert_within(mine, theirs, f"output {index}")


def test_padding_matters() -> None:
    """The padded cases do test the mask: another mask gives other logits."""
    model, count = unaccelerated("flat"), 17
    ids, canvas = [random_ids(model, ROWS, count, 11)], random_ids(model, ROWS, 8, 20)
    for padding in ("left", "right"):
        found = passes(model, ids, padded(padding, count), canvas)[0]
        without = passes(model, ids, padded("none", count), canvas)[0]
        assert float((found - without)[1:].abs().max()) > 0.1


def test_static_cache() -> None:
    """A static cache has unused keys at its end, and the canvas in the middle."""
    model = unaccelerated("flat")
    accelerated, ids, canvas = twin(model), random_ids(model, ROWS, 6, 30), random_ids(model, ROWS, 8, 31)
    mask = padded("left", 6)
    logits = []
    for one in (model, accelerated):
        cache = StaticCache(config=model.config.text_config, max_cache_len=40)
        with torch.no_grad(), all_on_kernels() if one is accelerated else contextlib.nullcontext():
            one.model.encoder(input_ids=ids, attention_mask=mask, **{oracle.CACHE: cache})
            masks = one.model.decoder.create_diffusion_decoder_attention_mask(
                config=one.config,
                inputs_embeds=canvas[..., None],
                decoder_attention_mask=torch.nn.functional.pad(mask, (0, 8), value=1),
                **{oracle.CACHE: cache},
            )
            out = one(decoder_input_ids=canvas, decoder_attention_mask=masks, **{oracle.CACHE: cache})
        logits.append(out.logits)
    assert_within(logits[1], logits[0], "logits")


def test_spans() -> None:
    """The tokens of an image all see each other, on layers of both kinds."""
    model = unaccelerated("flat")
    prompt, spans = random_ids(model, 1, 47, 50), [(3, 9), (20, 28)]
    wanted, causal = oracle.encode(model, prompt, spans=spans), oracle.encode(model, prompt)
    with all_on_kernels():
        got = oracle.encode(twin(model), prompt, spans=spans)
    for mine, theirs in zip(got.layers, wanted.layers, strict=True):
        assert_within(mine.keys, theirs.keys, "keys")
        assert_within(mine.values, theirs.values, "values")
    assert float((wanted.layers[-1].keys - causal.layers[-1].keys).abs().max()) > 0.01


# bf16 -----------------------------------------------------------------------------------------------------------------


def accelerated_layer(layer: Any, call: oracle.LayerCall, cache: Any) -> torch.Tensor:
    """The accelerated layer on a recorded call's input, with its experts; `cache` is the prefix."""
    arguments = dict(call.arguments) | {oracle.CACHE: cache}
    if arguments["attention_mask"] is not None:
        arguments["attention_mask"] = arguments["attention_mask"] == 0  # eager's mask is added to the scores
    with (
        torch.no_grad(),
        mock.patch.object(layer.router, "forward", oracle._router_with(layer.router, call.expert_ids)),
    ):
        out: torch.Tensor = layer(call.hidden.clone(), **arguments)
    return out


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("count", [7, 17, 50])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_layers(name: str, count: int, padding: str) -> None:
    """Layers of both passes over a prefix: close to the exact result, with at most twice transformers' own error."""
    model = unaccelerated(name, torch.bfloat16, "eager")
    accelerated = twin(model)
    mask, length = padded(padding, count), 8
    if padding == "right":
        mask = mask[:, :count]  # the prompt alone: see test_fp32_passes
    cache = DynamicCache(config=model.config.text_config)
    empty = copy.deepcopy(cache)
    ids, canvas = random_ids(model, ROWS, count, 40), random_ids(model, ROWS, length, 41)
    decoder_mask = torch.nn.functional.pad(mask, (0, length), value=1)
    with (
        torch.no_grad(),
        oracle.recorded_layers(model.model.encoder.language_model) as encoder,
        oracle.recorded_layers(model.model.decoder) as decoder,
    ):
        model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=canvas,
            decoder_attention_mask=decoder_mask,
            **{oracle.CACHE: cache},
        )
    everywhere = torch.ones(ROWS, length, dtype=torch.bool)
    stacks = (
        (encoder, accelerated.model.encoder.language_model, empty, mask.bool()),
        (decoder, accelerated.model.decoder, cache, everywhere),
    )
    for calls, stack, prefix, valid in stacks:
        exact_prefix, prefix = oracle.double_cache(prefix), copy.deepcopy(prefix)
        with all_on_kernels():
            outputs = [accelerated_layer(layer, call, prefix) for layer, call in zip(stack.layers, calls, strict=True)]
        for index, (call, got) in enumerate(zip(calls, outputs, strict=True)):
            exact = call.exact(exact_prefix)
            assert_as_good(got[valid], call.output[valid], exact[valid], f"layer {index}")


def test_bf16_is_not_fp32() -> None:
    """The bf16 models differ from the fp32 ones, so the bounds above do limit something."""
    model, rounded = unaccelerated("flat"), unaccelerated("flat", torch.bfloat16)
    ids, canvas = [random_ids(model, ROWS, 17, 11)], random_ids(model, ROWS, 8, 20)
    exact, found = (passes(one, ids, padded("none", 17), canvas)[0] for one in (model, rounded))
    assert relative_distance(exact.double(), found.double()) > 1e-5


# What stays as it was -------------------------------------------------------------------------------------------------


def test_undo(tmp_path: Path) -> None:
    """After accelerate(enabled=False) bits, configuration, files and tensors are the same, and no attribute is left."""
    model = twin(unaccelerated("flat"), enabled=False)
    ids, canvas, mask = [random_ids(model, ROWS, 17, 11)], random_ids(model, ROWS, 8, 20), padded("left", 17)
    before = passes(model, ids, mask, canvas)
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    names = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    model.save_pretrained(tmp_path / "before")
    assert dg.accelerate(model) is model
    assert dg.accelerate(model) is model  # calling it twice has no further effect
    assert model.config.text_config._attn_implementation == IMPLEMENTATION
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    model.save_pretrained(tmp_path / "accelerated")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "accelerated" / file).read_bytes()
    assert IMPLEMENTATION not in json.dumps(model.config.to_dict())

    dg.accelerate(model, enabled=False)
    dg.accelerate(model, enabled=False)
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    assert {name: sorted(module.__dict__) for name, module in model.named_modules()} == names
    with caught_fallbacks() as fallbacks:
        after = passes(model, ids, mask, canvas)
    assert not fallbacks
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))


def test_copies_and_hooks() -> None:
    """A copy of an accelerated model is accelerated too; hooks see the same values as before."""
    model = unaccelerated("flat")
    accelerated = copy.deepcopy(twin(model))
    assert accelerated._denoising_step.args == (accelerated,)
    ids, canvas, mask = [random_ids(model, ROWS, 17, 11)], random_ids(model, ROWS, 8, 20), padded("none", 17)
    shapes: list[list[torch.Size]] = []
    for one in (copy.deepcopy(model), accelerated):
        seen: list[torch.Size] = []
        for module_name, module in one.model.decoder.named_modules():
            if not module_name.endswith("experts.act_fn"):  # hooks inside a replaced module
                module.register_forward_hook(
                    lambda module, arguments, output, seen=seen: seen.append(getattr(output, "shape", None))
                )
        passes(one, ids, mask, canvas)
        shapes.append(seen)
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 100


def test_saved_whole(tmp_path: Path) -> None:
    """torch.save and pickle as without acceleration; loaded again, in another process too, it is accelerated."""
    model = twin(unaccelerated("flat"))
    ids, canvas, mask = [random_ids(model, ROWS, 17, 11)], random_ids(model, ROWS, 8, 20), padded("none", 17)
    with all_on_kernels():
        wanted = passes(model, ids, mask, canvas)
        torch.manual_seed(4)
        tokens = model.generate(ids[0], max_new_tokens=8).sequences
    torch.save(model, tmp_path / "model.pt")
    for loaded in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))):
        assert loaded._denoising_step.args == (loaded,)
        with all_on_kernels() as counts:
            got = passes(loaded, ids, mask, canvas)
            torch.manual_seed(4)
            assert torch.equal(loaded.generate(ids[0], max_new_tokens=8).sequences, tokens)
        assert counts["update_canvas_"] > 0
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))
        dg.accelerate(loaded, enabled=False)
        assert "_denoising_step" not in vars(loaded)
    torch.save(ids[0], tmp_path / "ids.pt")
    program = (
        "import sys, torch; model, ids = (torch.load(file, weights_only=False) for file in sys.argv[1:]);"
        "torch.manual_seed(4); print(model.generate(ids, max_new_tokens=8).sequences.tolist());"
        "print(type(model._denoising_step).__name__, model.config.text_config._attn_implementation)"
    )
    files = [str(tmp_path / name) for name in ("model.pt", "ids.pt")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [str(tokens.tolist()), f"partial {IMPLEMENTATION}"]


def test_import_leaves_transformers_alone() -> None:
    program = "import sys, dgemma_ext; dgemma_ext.accelerate; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# Errors ---------------------------------------------------------------------------------------------------------------


def test_refused_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model: got Linear, wants transformers' DiffusionGemmaForBlockDiffusion"):
        dg.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: got DiffusionGemmaModel, wants"):
        dg.accelerate(unaccelerated("flat").model)
    model = twin(unaccelerated("flat"), enabled=False)
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match=r"got weights quantized by bitsandbytes, wants plain ones"):
        dg.accelerate(model)
    del model.quantization_method
    layer = model.model.decoder.layers[1].experts
    layer.down_proj = torch.nn.Parameter(layer.down_proj.to(torch.int8), requires_grad=False)
    wanted = r"got torch.int8 in model.decoder.layers.1.experts.down_proj, wants weights of 16 bits or more"
    with pytest.raises(ValueError, match=wanted):
        dg.accelerate(model)
    assert model.config._attn_implementation == "sdpa"  # nothing is half replaced
    monkeypatch.setattr(releases.transformers, "__version__", "5.16.2")
    with pytest.raises(ValueError, match=r"transformers: got 5.16.2, wants 5.17 or later"):
        dg.accelerate(unaccelerated("flat"))


# Other releases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", OLDER)
def test_older_releases(release: str) -> None:
    """The tests of the integration, of the larger ones a part."""
    slow = "compiled or saved_whole or import_leaves or bf16_layers or fp32_passes or generations"
    part = f"not ({slow}) or (fp32_passes and 17 and left) or (generations and patient)"
    run_under(release, *sorted(Path(__file__).parent.glob("test_integration_transformers*.py")), keywords=part)
