"""Checkpoints that store tied weights more often than needed, or under other names; buffers; files with a byte order
mark."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import dgemma_ext as dg
from checkpoints import load_transformers, make_checkpoint
from command import dgemma
from dgemma_ext.checkpoint import ModelConfig, convert, inspect_checkpoint, parse_target, tied
from dgemma_ext.model import load_weights
from quantized_checkpoints import requantize

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
UP = "layers.1.mlp.up_proj.weight"
Stored = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def change(folder: Path, edit: Callable[[Stored], object], file: str = "model.safetensors") -> None:
    stored = load_file(folder / file)
    edit(stored)
    # A new file, because loaded tensors may be a map of the old one.
    save_file(stored, folder / "new", {"format": "pt"})
    (folder / "new").replace(folder / file)


def tokens(folder: Path) -> Any:
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    return model.generate([2, 108, 109], max_new_tokens=8, seed=1).token_ids


def store_head(stored: Stored) -> None:
    stored[HEAD] = stored[EMBEDDING].clone()


def store_wide_head(stored: Stored) -> None:
    stored[HEAD] = stored[EMBEDDING].float()


def store_encoder(stored: Stored) -> None:
    """All that is in the encoder too: everything but self-conditioning and the layer scalars, which are its own."""
    for name in list(stored):
        twin = name.replace(DECODER, ENCODER)
        if name.startswith(DECODER) and twin not in stored and "self_conditioning" not in name:
            stored[twin] = stored[name].clone()


def store_under_other_names(stored: Stored) -> None:
    stored[HEAD] = stored.pop(EMBEDDING)
    for name in list(stored):
        if name.startswith(DECODER + "layers.") and not name.endswith("layer_scalar"):
            stored[name.replace(DECODER, ENCODER)] = stored.pop(name)


def store_buffers(stored: Stored) -> None:
    stored["model.decoder.embed_tokens.embed_scale"] = torch.tensor(8.0)
    for name in ("inv_freq", "full_attention_inv_freq", "sliding_attention_original_inv_freq"):
        for stack in (DECODER, ENCODER):
            stored[f"{stack}rotary_emb.{name}"] = torch.ones(4)


VARIANTS = [store_head, store_wide_head, store_encoder, store_under_other_names, store_buffers]


@pytest.mark.parametrize("edit", VARIANTS, ids=lambda edit: edit.__name__)
def test_the_same_model(edit: Callable[[Stored], None], folder: Path) -> None:
    wanted = tokens(folder)
    change(folder, edit)
    assert tokens(folder) == wanted


def test_a_file_of_save_model(folder: Path) -> None:
    """safetensors.torch.save_model stores each tied weight under one of its names, not always the decoder's."""
    wanted = tokens(folder)
    save_model(load_transformers(folder, torch.bfloat16), str(folder / "new"))
    (folder / "new").replace(folder / "model.safetensors")
    assert EMBEDDING not in load_file(folder / "model.safetensors")
    assert tokens(folder) == wanted


def test_copies_of_quantized_weights(folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="writes a quantized checkpoint")
    requantize(folder, "int4")
    wanted = tokens(folder)
    change(folder, store_encoder)
    assert tokens(folder) == wanted


def refused(folder: Path, tensor: str, match: str) -> None:
    with pytest.raises(dg.CheckpointError, match=match) as caught:
        load_weights(folder, ModelConfig.from_file(folder), torch.bfloat16, "cpu")
    assert (caught.value.file, caught.value.tensor) == (str(folder / "model.safetensors"), tensor)


@pytest.mark.parametrize("piece", [7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_a_copy_that_differs(dtype: torch.dtype, piece: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied, "_PIECE", piece)

    def differ(stored: Stored) -> None:
        # Values that all three dtypes hold, so that the widened copy is equal but for one of them.
        stored[DECODER + UP] = stored[DECODER + UP].clamp(0.25, 0.5)
        stored[ENCODER + UP] = stored[DECODER + UP].to(dtype, copy=True)

    change(folder, differ)
    load_weights(folder, ModelConfig.from_file(folder), torch.bfloat16, "cpu")
    change(folder, lambda stored: stored[ENCODER + UP][95].index_fill_(0, torch.tensor(62), 2.0))
    refused(folder, ENCODER + UP, rf"differs at \[95, 62\] from {DECODER}{UP}, which it is tied to")
    change(folder, lambda stored: stored[ENCODER + UP].fill_(float("nan")))
    refused(folder, ENCODER + UP, r"differs at \[0, 0\]")


def test_a_copy_of_another_shape_or_dtype(folder: Path) -> None:
    change(folder, lambda stored: stored.update({HEAD: torch.ones(512, 63).bfloat16()}))
    refused(folder, HEAD, rf"is BF16 \[512, 63\], and {EMBEDDING}, which it is tied to, BF16 \[512, 64\]")
    change(folder, lambda stored: stored.update({HEAD: torch.ones(512, 64).int()}))
    refused(folder, HEAD, r"is I32 \[512, 64\]")


def test_the_layer_scalars_of_the_encoder_are_its_own(folder: Path) -> None:
    """They differ from the decoder's in these checkpoints, and each arrives where it belongs."""
    config = ModelConfig.from_file(folder)
    assert inspect_checkpoint(folder, config).copies == {}
    layer = load_weights(folder, config, torch.bfloat16, "cpu").layers[0]
    assert layer.encoder_layer_scalar != layer.decoder_layer_scalar


def test_quantizing_writes_each_weight_once(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "wanted", parse_target("int4"))
    for edit in (store_under_other_names, store_buffers):
        change(folder, edit)
    convert(folder, tmp_path / "renamed", parse_target("int4"))
    change(folder, lambda stored: stored.update({EMBEDDING: stored[HEAD].clone()}))
    convert(folder, tmp_path / "twice", parse_target("int4"))
    for name in ("renamed", "twice"):
        written, wanted = (load_file(tmp_path / one / "model-00001-of-00001.safetensors") for one in (name, "wanted"))
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    change(folder, lambda stored: stored[HEAD][5].fill_(2.0))
    with pytest.raises(dg.CheckpointError, match=r"differs at \[5, 0\]"):
        convert(folder, tmp_path / "out", parse_target("int4"))


def test_info_lists_what_is_not_used(folder: Path) -> None:
    for edit in (store_head, store_buffers):
        change(folder, edit)
    file = folder / "generation_config.json"
    settings = {"max_length": 8192, "use_cache": True, "confidence_threshold": 0.0, "transformers_version": "5"}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    facts = dgemma("info", str(folder), "--json").object["checkpoint"]
    assert facts["copies"] == [HEAD]
    assert len(facts["buffers"]) == 7
    assert facts["ignored_settings"] == {"max_length": 8192, "use_cache": True}
    assert facts["sampler"]["confidence_threshold"] == 0
    shown = dgemma("info", str(folder)).out
    assert "lm_head.weight, tied to" in shown
    assert "and 6 more" in shown
    assert "max_length 8192, use_cache true" in shown
    plain = dgemma("info", str(make_checkpoint(folder / "plain"))).out
    assert not any(word in plain for word in ("tied to", "buffers", "ignored"))


# Byte order marks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, folder: Path) -> None:
    """An editor, or a shell's redirection, writes them; a template's mark is no character of the prompt."""
    sharded = make_checkpoint(folder / "sharded", shards=2)
    model = dg.DiffusionGemma.from_pretrained(sharded, device="cpu")
    wanted = model.generate("use the sky", max_new_tokens=8).token_ids
    chat: list[Any] = [{"role": "user", "content": "use the sky"}]
    assert model.tokenizer is not None
    rendered = model.tokenizer.apply_chat_template(chat)
    for file in sharded.glob("*.json"):
        # tokenizer.json is read by a library that takes UTF-8.
        file.write_text(file.read_text(), encoding="utf-8-sig" if file.name == "tokenizer.json" else encoding)
    template = sharded / "chat_template.jinja"
    template.write_bytes(codecs.BOM_UTF8 + template.read_bytes())
    again = dg.DiffusionGemma.from_pretrained(sharded, device="cpu")
    assert again.generate("use the sky", max_new_tokens=8).token_ids == wanted
    assert again.tokenizer is not None
    assert again.tokenizer.apply_chat_template(chat) == rendered
    shutil.rmtree(sharded)
