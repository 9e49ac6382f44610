"""What `dgemma finetune` computes in a step: the recipe's loss on recorded draws, written by hand over transformers and
PEFT, and the gradients of all factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import dgemma_ext as dg
from checkpoints import FULL, SLIDING, load_transformers, make_checkpoint
from dgemma_ext.finetune.adapter import TrainedAdapter
from dgemma_ext.finetune.data import Example
from dgemma_ext.finetune.draws import Purpose, uniforms
from dgemma_ext.finetune.files import write_adapter
from dgemma_ext.finetune.forward import Passes
from dgemma_ext.finetune.loss import losses
from dgemma_ext.finetune.recipe import make_batch
from dgemma_ext.finetune.settings import FinetuneSettings, LoraSettings

CANVAS, VOCABULARY, EOS = 8, 307, 1
SIZES: dict[str, Any] = dict(
    layers=(SLIDING, FULL, SLIDING, FULL),
    hidden=32,
    intermediate=48,
    moe_intermediate=32,
    experts=6,
    heads=2,
    kv_heads=2,
    global_kv_heads=1,
    vocabulary=VOCABULARY,
    window=10,
    canvas=CANVAS,
)
TARGETS = ("attention", "mlp", "self-conditioning", "router", "experts")
# Largest difference of loss and gradients in fp32, as a share of the largest magnitude.
BOUND = 5e-5
SETTINGS = FinetuneSettings(seed=7, lora=LoraSettings(rank=4, alpha=6, targets=TARGETS, passes="separate"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), with_tokenizer=False, **SIZES)


@pytest.fixture(scope="module")
def model(folder: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=torch.float32)


def examples() -> list[Example]:
    """Prompts around the window; answers of less than a canvas, of a whole one, of three, and one that was cut."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    sizes = ((5, 6, False), (12, 8, False), (9, 20, False), (23, 11, True))
    return [Example(40 + n, ids(p), ids(a), cut, "") for n, (p, a, cut) in enumerate(sizes)]


def randomised(model: dg.DiffusionGemma, settings: LoraSettings) -> TrainedAdapter:
    """An adapter that does something: B is not zero."""
    made = TrainedAdapter(model.config, settings, seed=1, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    for name, tensor in made.parameters().items():
        if name.endswith(".b"):
            tensor.data.normal_(0, 0.1, generator=generator)
    return made


def our_step(model: dg.DiffusionGemma, adapter: TrainedAdapter, settings: FinetuneSettings, recompute: bool) -> Tensor:
    batch = make_batch(examples(), [2] * 4, settings, CANVAS, VOCABULARY, fill=EOS, pad=0)
    found = losses(Passes(model.network, adapter, recompute), batch)
    loss = found.canvas / batch.weights.sum()
    if settings.encoder_loss:
        loss = loss + settings.encoder_loss * found.encoder / batch.next_weights.sum()
    loss.backward()
    return loss.detach()


def recipe_by_hand(theirs: Any, settings: FinetuneSettings) -> Tensor:
    """TRL's recipe, example by example, with this run's draws."""
    canvas_losses, next_losses = [], []
    for example in examples():
        index = torch.tensor([example.index])

        def draw(length: int, purpose: Purpose, index: Tensor = index) -> Tensor:
            return uniforms(settings.seed, index, 2, length, purpose)[0]

        count = -(-len(example.answer) // CANVAS)
        filled = [*example.answer, *[EOS] * (count * CANVAS - len(example.answer))]
        supervised = len(example.answer) if example.truncated else len(filled)
        row = torch.tensor([*example.prompt, *filled])
        chosen = int(draw(1, Purpose.CANVAS)[0] * count)
        start = len(example.prompt) + chosen * CANVAS
        clean = row[start : start + CANVAS]
        t = 1e-4 + (1 - 2e-4) * draw(1, Purpose.NOISE_LEVEL)[0]
        random = (draw(CANVAS, Purpose.NOISE_TOKEN) * VOCABULARY).long()
        canvas = torch.where(draw(CANVAS, Purpose.NOISED) < t, random, clean)
        given: dict[str, Any] = {"input_ids": row[None, :start], "decoder_input_ids": canvas[None]}
        if draw(1, Purpose.SELF_CONDITIONED)[0] < settings.self_conditioning:
            with torch.no_grad():
                given["self_conditioning_logits"] = theirs(**given).logits
        logits = theirs(**given).logits[0]
        kept = max(0, min(CANVAS, supervised - chosen * CANVAS))
        canvas_losses.append(functional.cross_entropy(logits[:kept], clean[:kept], reduction="none"))
        base = theirs.get_base_model()
        encoded = base.model.encoder(input_ids=row[None]).last_hidden_state[0]
        following = torch.tanh(base.lm_head(encoded) / base.final_logit_softcapping) * base.final_logit_softcapping
        last = len(example.prompt) + supervised - 1
        next_losses.append(functional.cross_entropy(following[:last], row[1 : last + 1], reduction="none"))
    return torch.cat(canvas_losses).mean() + settings.encoder_loss * torch.cat(next_losses).mean()


@pytest.fixture(scope="module")
def theirs(model: dg.DiffusionGemma, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model with the adapter that this package wrote, loaded by PEFT."""
    from peft import PeftModel

    written = tmp_path_factory.mktemp("adapter")
    write_adapter(written, randomised(model, SETTINGS.lora), str(folder))
    base = load_transformers(folder, torch.float32)
    return PeftModel.from_pretrained(base, written, is_trainable=True)


def assert_near(mine: Tensor, wanted: Tensor, what: str) -> None:
    worst = float((mine - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    assert worst <= BOUND, f"{what}: off by {worst:.1e} of the largest"


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_recipe_s(model: dg.DiffusionGemma, theirs: Any, recompute: bool) -> None:
    theirs.zero_grad()
    wanted = recipe_by_hand(theirs, SETTINGS)
    wanted.backward()
    adapter = randomised(model, SETTINGS.lora)
    got = our_step(model, adapter, SETTINGS, recompute)
    assert_near(got, wanted.detach(), "the loss")
    found = adapter.peft_tensors(gradients=True)
    names = {name.replace(".weight", ".default.weight"): name for name in found}
    checked = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            assert_near(found[names[name]], parameter.grad, name)
            checked += 1
    assert checked == len(found) == len(names)
