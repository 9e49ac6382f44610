"""Both passes with an adapter against transformers and PEFT, whose adapter is not merged, in fp32."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import dgemma_ext as dg
import transformers_oracle as oracle
from checkpoints import FULL, SLIDING, load_transformers, make_checkpoint
from dgemma_ext.checkpoint import layer_layout
from dgemma_ext.model import PrefillChunk
from dgemma_ext.ops.formats import QuantizedWeight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # PEFT looks for them among modules, and the experts' are parameters; it follows them all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

# Largest difference as a share of the largest magnitude; the worst seen is 1.2e-6.
BOUND = 1e-5
# What a wrong adapter is off by at least; the least seen is 0.3.
WRONG = 0.1

WINDOW, LENGTH, PROMPT = 16, 8, 41
LAYERS = r".*\.(decoder|encoder\.language_model)\.layers\.\d+\."
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]

# Settings of PEFT. "shared" has one adapter under both names.
SPELLINGS: dict[str, dict[str, Any]] = {
    "a regular expression": dict(target_modules=LAYERS + r"(self_attn|mlp)\..*_proj"),
    "names": dict(target_modules=PROJECTIONS, exclude_modules=".*vision.*"),
    "shared": dict(target_modules=LAYERS + r"(self_attn|mlp)\..*_proj", use_rslora=True),
    "the decoder": dict(target_modules=r".*\.decoder\.layers\.\d+\.(self_attn|mlp)\..*_proj"),
    "everything": dict(
        target_modules=rf"{LAYERS}((self_attn|mlp)\..*_proj|router\.proj)|.*self_conditioning\..*_proj",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={r".*\.q_proj": 3, "experts.down_proj": 2},
        alpha_pattern={"mlp.up_proj": 7},
        use_rslora=True,
    ),
    "experts, one way": dict(target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"]),
    "experts, one parameter": dict(target_modules=[], target_parameters=["experts.down_proj"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(hidden=96, intermediate=64, moe_intermediate=32, experts=4, vocabulary=160, layers=(SLIDING, FULL))
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, dtype=torch.float32, with_tokenizer=False, window=WINDOW, canvas=LENGTH, **sizes)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def adapted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """adapted(spelling): a model of PEFT, and the folder of its adapter, made once."""

    @functools.cache
    def made(spelling: str) -> tuple[Any, Path]:
        theirs = with_adapter(load_transformers(checkpoint, torch.float32), spelling)
        folder = tmp_path_factory.mktemp("adapter")
        theirs.save_pretrained(folder)
        return theirs, folder

    return made


def with_adapter(base: Any, spelling: str) -> Any:
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **SPELLINGS[spelling])
    theirs = peft.get_peft_model(base, settings).eval()
    if spelling == "shared":
        state = theirs.state_dict()
        for name, tensor in state.items():
            if "lora_" in name and ".decoder." in name:
                state[name.replace(".decoder.", ".encoder.language_model.")].copy_(tensor)
    return theirs


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 160, (1, count), generator=torch.Generator().manual_seed(seed))


Passes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def passes_of_peft(theirs: Any) -> Passes:
    """Logits of a first step, of a self-conditioned one, and of one after a second canvas was encoded."""
    base = theirs.base_model.model if isinstance(theirs, peft.PeftModel) else theirs
    cache = oracle.encode(base, ids(PROMPT, 1))
    first = oracle.denoise(base, ids(LENGTH, 2), cache)
    second = oracle.denoise(base, ids(LENGTH, 2), cache, first / 0.7)
    cache = oracle.encode(base, ids(LENGTH, 4), cache)
    return first, second, oracle.denoise(base, ids(LENGTH, 5), cache)


def passes_of(model: dg.DiffusionGemma, adapter: dg.Adapter | None, wanted: Passes) -> Passes:
    network = model.network
    name = "base" if adapter is None else network.load_adapter("tested", adapter).name
    try:
        cache = model.new_cache(1, 64)
        network.encode(ids(PROMPT, 1), cache, adapter=name)
        first = network.denoise(ids(LENGTH, 2), cache, adapter=name)
        conditioning = wanted[0] / 0.7
        second = network.denoise(ids(LENGTH, 2), cache, self_conditioning=conditioning, adapter=name)
        network.encode(ids(LENGTH, 4), cache, adapter=name)
        return first, second, network.denoise(ids(LENGTH, 5), cache, adapter=name)
    finally:
        if adapter is not None:
            network.adapters.remove(name)


def distance(actual: Passes, wanted: Passes) -> float:
    return max(float((a - w).abs().max() / w.abs().max()) for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_passes(spelling: str, adapted: Any, model: dg.DiffusionGemma) -> None:
    """The prompt is longer than the window."""
    theirs, folder = adapted(spelling)
    adapter = dg.Adapter.from_folder(folder, model.config, "stored" if spelling == "the decoder" else None)
    meanings = {"shared": "shared", "the decoder": "decoder only"}
    assert adapter.passes == meanings.get(spelling, "separate")
    wanted = passes_of_peft(theirs)
    assert distance(passes_of(model, None, wanted), wanted) > WRONG, "the adapter changes nothing"
    assert distance(passes_of(model, adapter, wanted), wanted) < BOUND


def rewritten(folder: Path, target: Path, rename: Callable[[str], str | None], **settings: Any) -> Path:
    """A copy of an adapter's folder with other names (None leaves one out) and settings."""
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    target.mkdir()
    save_file({name: t for name, t in renamed.items() if name is not None}, target / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def test_nemo_names_one_stack_for_both_passes(adapted: Any, model: dg.DiffusionGemma, tmp_path: Path) -> None:
    theirs, folder = adapted("shared")
    nemo = rewritten(folder, tmp_path / "nemo", lambda name: name if ".decoder." in name else None)
    with pytest.raises(ValueError, match="passes must be both or stored"):
        dg.Adapter.from_folder(nemo, model.config)
    (nemo / "automodel_peft_config.json").write_text("{}")
    wanted = passes_of_peft(theirs)
    assert distance(passes_of(model, dg.Adapter.from_folder(nemo, model.config), wanted), wanted) < BOUND


def test_the_layout_of_experts_up_to_peft_0_18(adapted: Any, model: dg.DiffusionGemma, tmp_path: Path) -> None:
    """The same change of the weights in the older layout: A has the rows of a weight, B its columns."""
    theirs, folder = adapted("experts, one way")
    old = rewritten(folder, tmp_path / "old", lambda name: name, peft_version="0.18.1")
    file, experts = old / "adapter_model.safetensors", model.config.num_experts
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        a = tensors[name].unflatten(0, (experts, -1))  # [experts, rank, in]
        b = tensors[other].unflatten(1, (-1, experts)).permute(2, 0, 1)  # [experts, out, rank]
        tensors[name] = b.mT.flatten(0, 1).contiguous()
        tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, file)
    wanted = passes_of_peft(theirs)
    assert distance(passes_of(model, dg.Adapter.from_folder(old, model.config), wanted), wanted) < BOUND


def test_the_joint_first_step(adapted: Any, model: dg.DiffusionGemma) -> None:
    """A pass with a chunk's rows and a canvas's takes the encoder's factors for the one and the decoder's for the
    other: the bits of two passes, which agree with PEFT."""
    theirs, folder = adapted("everything")
    network = model.network
    adapter = network.load_adapter("joint", dg.Adapter.from_folder(folder, model.config))
    try:
        cache = model.new_cache(2, 64)
        for slot in range(2):
            network.encode(ids(20, 1), cache, slots=[slot], adapter="joint")
        network.encode(ids(PROMPT - 20, 6), cache, slots=[0], adapter="joint")
        soft = torch.randn(1, LENGTH, 96, generator=torch.Generator().manual_seed(7))
        two = network.forward(cache, network.canvas_in_slot(ids(LENGTH, 2), cache, 0, soft, adapter=adapter))
        chunk = PrefillChunk(1, ids(PROMPT - 20, 6)[0], adapter=adapter)
        canvas = network.canvas_in_slot(ids(LENGTH, 2), cache, 1, soft, appended=len(chunk), adapter=adapter)
        assert torch.equal(network.forward(cache, canvas, [chunk]), two)
        one, other = cache.snapshot(0), cache.snapshot(1)
        assert all(map(torch.equal, (*one.keys, *one.values), (*other.keys, *other.values)))
        joined = torch.cat((ids(20, 1), ids(PROMPT - 20, 6)), dim=1)
        base = theirs.base_model.model
        wanted = oracle.denoise(base, ids(LENGTH, 2), oracle.encode(base, joined))
        got = network.denoise(ids(LENGTH, 2), cache, slots=[1], adapter="joint")
        assert distance((got,), (wanted,)) < BOUND
    finally:
        network.adapters.remove("joint")


@pytest.mark.parametrize(("format", "bound"), [("fp8", BOUND), ("int4", BOUND), ("nvfp4", BOUND), ("int8", 0.05)])
def test_quantized_weights(format: str, bound: float, checkpoint: Path) -> None:
    """Against PEFT on the dequantized weights: the adapter is beside them, not in them. INT8 weights
    round what they multiply too, which PEFT does not: 0.022 of the logits' scale."""
    model = dg.DiffusionGemma.from_pretrained(checkpoint, device="cpu", weights=format)
    base = load_transformers(checkpoint, torch.float32)
    state, quantized = base.state_dict(), 0
    for layer, weights in zip(model.config.layers, model.weights.layers, strict=True):
        for attribute, (name, _) in layer_layout(model.config, layer).items():
            weight = getattr(weights, attribute)
            if isinstance(weight, QuantizedWeight):
                state[name].copy_(weight.dequantized(torch.float32))
                quantized += 1
    assert quantized >= 4
    theirs = with_adapter(base, "everything")
    settings, tensors = theirs.peft_config["default"].to_dict(), peft.get_peft_model_state_dict(theirs)
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    adapter = dg.Adapter.from_tensors(settings, tensors, model.config)
    wanted = passes_of_peft(theirs)
    assert distance(passes_of(model, None, wanted), wanted) > WRONG, "the adapter changes nothing"
    assert distance(passes_of(model, adapter, wanted), wanted) < bound


def test_the_three_wrong_merges(adapted: Any, checkpoint: Path, model: dg.DiffusionGemma) -> None:
    """What an adapter of two passes is taken for where weights are one: all of it in one copy, as PEFT's own merge does
    to tied weights; the decoder's in both passes; the decoder's alone."""
    theirs, folder = adapted("a regular expression")
    wanted = passes_of_peft(theirs)
    merged = passes_of_peft(
        with_adapter(load_transformers(checkpoint, torch.float32), "a regular expression").merge_and_unload()
    )
    assert distance(merged, wanted) > WRONG
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    decoder = {name: tensor for name, tensor in tensors.items() if re.search(r"\.decoder\.", name)}
    for passes in ("both", "stored"):
        wrong = dg.Adapter.from_tensors(settings, decoder, model.config, passes)
        assert distance(passes_of(model, wrong, wanted), wanted) > WRONG
    right = dg.Adapter.from_tensors(settings, tensors, model.config)
    assert distance(passes_of(model, right, wanted), wanted) < BOUND
