"""GGUF files: values to the last bit of the package's own, settings and tokenizer, conversion, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
from checkpoints import FULL, SLIDING, make_checkpoint
from dgemma_ext import demo
from dgemma_ext.checkpoint import (
    GenerationDefaults,
    ModelConfig,
    convert,
    gguf_folder,
    layer_layout,
    model_layout,
    parse_target,
    resolve_checkpoint,
)
from dgemma_ext.checkpoint.gguf_names import gguf_name_of, published_name_of
from dgemma_ext.cli import main
from dgemma_ext.model import ModelWeights, load_weights
from gguf_files import PREFIX, kinds_of, metadata_of, tensors_of, write_gguf

TYPES = ["Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "BF16"]
TEXTS = ["the sky user", "  two  spaces", "Grüße — 漢字", "a\nb", "<|turn>user", "tab\tand \u2581"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 columns, a block of the types with K; those of down have 64."""
    folder = tmp_path_factory.mktemp("gguf") / "unquantized"
    sizes: dict[str, Any] = {"hidden": 256, "intermediate": 256, "moe_intermediate": 64, "experts": 3, "head_dim": 32}
    return make_checkpoint(folder, layers=(SLIDING, FULL), global_head_dim=64, **sizes)


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model-BF16.gguf"
    write_gguf(source, path, kinds_of("BF16"))
    return path


def load(path: Path, dtype: torch.dtype = torch.bfloat16) -> ModelWeights:
    folder = resolve_checkpoint(path)
    return load_weights(folder, ModelConfig.from_file(folder), dtype, "cpu")


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_the_packages_own(kind: str, source: Path, tmp_path: Path) -> None:
    written = write_gguf(source, tmp_path / "model.gguf", kinds_of(kind))
    assert sum(found == kind for found, _ in written.values()) > 8
    folder = resolve_checkpoint(tmp_path / "model.gguf")
    config = ModelConfig.from_file(folder)
    names = {name: (None, attribute) for attribute, (name, _) in model_layout(config).items()}
    for layer in config.layers:
        names |= {name: (layer.index, attribute) for attribute, (name, _) in layer_layout(config, layer).items()}
    for dtype in (torch.float32, torch.bfloat16):
        weights = load_weights(folder, config, dtype, "cpu")
        for published, (index, attribute) in names.items():
            found, data = written[gguf_name_of(published)]
            own = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[found]).copy())
            got = getattr(weights if index is None else weights.layers[index], attribute)
            if isinstance(got, float):
                assert got == float(own.to(dtype))
            else:
                assert torch.equal(got, own.to(dtype)), (published, found)


def test_settings_and_tokenizer_are_the_checkpoints(source: Path, file: Path) -> None:
    """In the type that loses nothing everything is as in the folder that the file was made from."""
    folder = resolve_checkpoint(file)
    config, wanted = ModelConfig.from_file(folder), ModelConfig.from_file(source)
    differ = {name for name in vars(config) if getattr(config, name) != getattr(wanted, name)}
    assert differ <= {"vision", "image_token_id", "boi_token_id", "eoi_token_id", "eos_token_ids"}
    defaults = GenerationDefaults.from_file(folder, config)
    assert (defaults.max_denoising_steps, defaults.entropy_bound, defaults.t_min) == (40, 0.1, 0.4)
    assert defaults.eos_token_ids == (1, 106, 50)
    models = [dg.DiffusionGemma.from_pretrained(path, device="cpu") for path in (source, file)]
    first, second = (model.tokenizer for model in models)
    assert first is not None
    assert second is not None
    assert first.markers == second.markers
    for text in TEXTS:
        ids = first.encode(text)
        assert second.encode(text) == ids
        assert second.encode(text, special_tokens="tokens") == first.encode(text, special_tokens="tokens")
        assert second.decode(ids) == first.decode(ids)
    chat = [{"role": "user", "content": "the sky"}]
    assert second.encode_prompt(chat) == first.encode_prompt(chat)
    sampler = dg.SamplerConfig(max_denoising_steps=4)
    answers = [model.generate(chat, max_new_tokens=16, sampler=sampler, seed=3).token_ids for model in models]
    assert answers[0] == answers[1]


def test_a_folder_with_one_file_is_that_file(file: Path) -> None:
    assert resolve_checkpoint(file.parent) == resolve_checkpoint(file)


def test_what_is_unpacked_is_made_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_checkpoint(file)
    monkeypatch.setattr(gguf, "GGUFReader", None)
    assert resolve_checkpoint(file) == folder


@pytest.mark.parametrize("to", ["int4", "fp8"])
def test_a_converted_file_is_a_checkpoint(to: str, source: Path, file: Path, tmp_path: Path) -> None:
    """As the checkpoint that the file was made from would be converted."""
    assert main(["quantize", str(file), str(tmp_path / "of file"), "--to", to]) == 0
    convert(source, tmp_path / "of folder", parse_target(to))
    loaded = [dg.DiffusionGemma.from_pretrained(tmp_path / name, device="cpu") for name in ("of file", "of folder")]
    for left, right in zip(*(model.weights.layers for model in loaded), strict=True):
        for attribute, value in vars(left).items():
            other = getattr(right, attribute)
            if hasattr(value, "tensors"):
                assert all(torch.equal(part, other.tensors()[name]) for name, part in value.tensors().items())
            elif isinstance(value, Tensor):
                assert torch.equal(value, other)
    assert torch.equal(loaded[0].weights.embed_tokens, loaded[1].weights.embed_tokens)
    assert loaded[0].tokenizer is not None


def test_requantized_while_loading(file: Path) -> None:
    model = dg.DiffusionGemma.from_pretrained(file, device="cpu", weights="int4")
    assert model.weights.layers[0].experts_down.name == "int4"  # type: ignore[union-attr]


def test_info(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert str(file.resolve()) in json.dumps(told)
    assert "BF16" in json.dumps(told)


@pytest.mark.parametrize(("kind", "least"), [("Q8_0", 22), ("Q4_K", 22)])
def test_a_bundled_model_solves(kind: str, least: int, tmp_path: Path) -> None:
    """Of 25 puzzles that it has not seen; the model as it is solves 24 of these."""
    write_gguf(demo.checkpoint(6), tmp_path / "model.gguf", kinds_of(kind))
    model = dg.DiffusionGemma.from_pretrained(tmp_path / "model.gguf", device="cpu")
    puzzles = [demo.draw(6, 777, index) for index in range(25)]
    chats = [[{"role": "user", "content": puzzle.text}] for puzzle in puzzles]
    answers = model.generate(chats, max_new_tokens=model.config.canvas_length, seed=list(range(25)))
    solved = sum(demo.check(answer.text, puzzle.text) for answer, puzzle in zip(answers, puzzles, strict=True))
    assert solved >= least


def refusal(path: Path) -> str:
    with pytest.raises(dg.CheckpointError) as caught:
        dg.DiffusionGemma.from_pretrained(path, device="cpu")
    return str(caught.value)


def test_files_of_another_kind(source: Path, file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    metadata, tensors = metadata_of(source), tensors_of(source)

    def complaint(
        without: str | None = None,
        values: dict[str, Any] | None = None,
        given: dict[str, Tensor] | None = None,
        architecture: str = "diffusion-gemma",
    ) -> str:
        kept = {key: value for key, value in metadata.items() if key != without} | (values or {})
        write_gguf(source, broken, kinds_of("BF16"), kept, given or tensors, architecture)
        return refusal(broken)

    assert "the architecture gemma4; wanted: diffusion-gemma" in complaint(architecture="gemma4")
    assert "has no tokenizer: tokenizer.ggml.model is missing" in complaint("tokenizer.ggml.model")
    assert "has no tokenizer: tokenizer.ggml.tokens is missing" in complaint("tokenizer.ggml.tokens")
    assert "tokenizer.ggml.model is gpt2; wanted: gemma4" in complaint(values={"tokenizer.ggml.model": "gpt2"})
    assert "diffusion-gemma.expert_count is missing; wanted: an integer" in complaint(PREFIX + "expert_count")
    short = complaint(values={PREFIX + "attention.head_count_kv": [2, 1, 1]})
    assert "attention.head_count_kv is [2, 1, 1]; wanted: a list of 2 entries" in short
    assert "shared_kv_layers is 3; wanted: 0" in complaint(values={PREFIX + "attention.shared_kv_layers": 3})
    assert "is one of 4 pieces: merge them first" in complaint(values={"split.count": 4})
    assert "blk.0.attn_sinks.weight: is not part of a DiffusionGemma" in complaint(
        given={**tensors, "blk.0.attn_sinks.weight": torch.zeros(4)}
    )
    assert "experts.down_proj: is missing" in complaint(
        given={name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_down_exps.weight"}
    )
    assert "rope_freqs.weight: has 32 factors; wanted: 32, each 1" in complaint(
        given={**tensors, "rope_freqs.weight": torch.linspace(1, 8, 32)}
    )
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).symlink_to(file)
    assert "holds 2 GGUF files: give one of them (a.gguf, b.gguf)" in refusal(tmp_path / "two")


def test_files_that_are_broken(source: Path, file: Path, tmp_path: Path) -> None:
    broken, whole = tmp_path / "model.gguf", file.read_bytes()
    reader = gguf.GGUFReader(file)
    last = reader.tensors[-1]
    for cut in (5, 20, 500, 3000, last.data_offset, len(whole) - 64):
        broken.write_bytes(whole[:cut])
        assert "is cut short or corrupt" in refusal(broken), cut
    broken.write_bytes(b"GGML" + whole[4:])
    assert "is no GGUF file: it does not begin with GGUF" in refusal(broken)
    # The type of the first tensor, a number behind its extents.
    place = int(reader.tensors[0].field.offset) + sum(part.nbytes for part in reader.tensors[0].field.parts[:4])
    for number, message in (
        (999, r"has a tensor of an unknown type: .*999.* is not a valid GGMLQuantizationType"),
        (int(gguf.GGMLQuantizationType.Q8_K), "is of type Q8_K, which the package gguf does not dequantize"),
    ):
        patched = bytearray(whole)
        patched[place : place + 4] = number.to_bytes(4, "little")
        broken.write_bytes(patched)
        assert re.search(message, refusal(broken))
    # One that becomes shorter after it was unpacked.
    broken.write_bytes(whole)
    folder = resolve_checkpoint(broken)
    broken.write_bytes(whole[:-4096])
    with pytest.raises(dg.CheckpointError, match="is cut short: it ends at byte"):
        load(folder)


def test_headers_that_mislead(file: Path, tmp_path: Path) -> None:
    """What the format allows to be written and no reader may believe."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    def complaint(entries: list[bytes], tensors: int = 0, version: int = 3) -> str:
        (tmp_path / "model.gguf").write_bytes(
            b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries)) + b"".join(entries)
        )
        return refusal(tmp_path / "model.gguf")

    # An array of a million numbers in 8 bytes, and arrays of arrays.
    longer = text("key") + struct.pack("<IIQ", 9, 0, 1 << 20) + bytes(8)
    assert re.search(r"is cut short or corrupt: what begins at byte \d+ ends at byte \d+ of", complaint([longer]))
    assert "is cut short or corrupt" in complaint(
        [text("key") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000]
    )
    assert "has no tensors" in complaint([text("key") + struct.pack("<II", 4, 7)])
    assert "is of version 1 of the format; wanted: 2 or 3" in complaint([], version=1)
    assert "is big-endian; wanted: a little-endian" in complaint([], version=3 << 24)
    # The second tensor in the bytes of the first.
    whole, second = file.read_bytes(), gguf.GGUFReader(file).tensors[1]
    place = int(second.field.offset) + sum(part.nbytes for part in second.field.parts[:5])
    (tmp_path / "model.gguf").write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    told = refusal(tmp_path / "model.gguf")
    assert re.search(rf"tensor {second.name}: begins at byte \d+, the one before it ends at {second.data_offset}", told)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "pipe.gguf: is no regular file" in refusal(tmp_path / "pipe.gguf")


# Metadata that are not what they must be, and what is said of them, which names the file and the key.
METADATA: list[tuple[str, Any, str]] = [
    (PREFIX + "block_count", 1 << 31, "block_count is 2147483648; wanted: at least 1 and no more than the file's"),
    (PREFIX + "attention.sliding_window_pattern", 6, "sliding_window_pattern is 6; wanted: a list of 2 entries"),
    (PREFIX + "attention.head_count_kv", ["a", "b"], "head_count_kv is ['a', 'b']; wanted: a list of 2 entries"),
    (PREFIX + "attention.key_length", 0, "attention.key_length is 0; wanted: an even number"),
    (PREFIX + "attention.value_length", 63, "attention.value_length is 63; wanted: 64"),
    (PREFIX + "rope.dimension_count_swa", 16, "rope.dimension_count_swa is 16; wanted: 32"),
    (PREFIX + "rope.scaling.type", "yarn", "rope.scaling.type is yarn; wanted: none"),
    (PREFIX + "attention.causal", True, "attention.causal is True; wanted: false"),
    ("diffusion.canvas_length", "long", "diffusion.canvas_length is long; wanted: an integer"),
    ("diffusion.eb_max_steps", 0, "max_denoising_steps is 0; supported: an integer from 1"),
    ("split.count", "two", "is one of two pieces"),
    ("tokenizer.ggml.token_type", 3, "token_type is 3; wanted: integers"),
    ("tokenizer.ggml.merges", [1, 2], "merges is [1, 2]; wanted: texts"),
    ("tokenizer.ggml.merges", ["no such"], "has a broken tokenizer: cannot be read"),
    ("tokenizer.ggml.bos_token_id", "two", "bos_token_id is two; wanted: an integer"),
    ("tokenizer.ggml.unknown_token_id", 1 << 20, "unknown_token_id is 1048576; wanted: an integer from 0 to 511"),
    ("tokenizer.ggml.add_space_prefix", True, "add_space_prefix is True; wanted: false"),
    ("tokenizer.chat_template", "{{ (", "has a broken tokenizer: chat template, line 1"),
]


def test_metadata_of_another_kind(source: Path, tmp_path: Path) -> None:
    metadata, tensors = metadata_of(source), tensors_of(source)
    for key, value, message in METADATA:
        write_gguf(source, tmp_path / "model.gguf", kinds_of("BF16"), metadata | {key: value}, tensors)
        told = refusal(tmp_path / "model.gguf")
        assert message in told, key
        assert told.startswith(f"{tmp_path / 'model.gguf'}: "), key
    del tensors["rope_freqs.weight"]
    write_gguf(source, tmp_path / "model.gguf", kinds_of("BF16"), metadata, tensors)
    assert "tensor rope_freqs.weight: is missing" in refusal(tmp_path / "model.gguf")


def test_names_and_links(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link as in the hub's cache, whose target has no suffix; names of 4-byte letters, and of bytes that are no text;
    a cache that is no folder, or is full."""
    (tmp_path / "blob").write_bytes(file.read_bytes())
    for name in ("link.gguf", "\U0001f600" * 60 + ".gguf", os.fsdecode(b"m\xff.gguf")):
        (tmp_path / name).symlink_to("blob")
        load(tmp_path / name)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blob"))
    load(tmp_path / "link.gguf")
    fill = gguf_folder._fill

    def full(folder: Path, *arguments: Any) -> None:
        if (tmp_path / "small") in folder.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        fill(folder, *arguments)

    monkeypatch.setattr(gguf_folder, "_fill", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "small"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "other"))
    assert (tmp_path / "other") in resolve_checkpoint(tmp_path / "link.gguf").parents
    assert not list((tmp_path / "small").rglob("*.json"))


def test_values_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    tensors["blk.1.ffn_norm.weight"] = torch.full((256,), float("nan"))
    write_gguf(source, tmp_path / "model.gguf", kinds_of("Q8_0"), tensors=tensors)
    assert "layers.1.pre_feedforward_layernorm.weight: has nan at [0]" in refusal(tmp_path / "model.gguf")


def test_without_the_package(file: Path) -> None:
    program = (
        "import sys; sys.modules['gguf'] = None; import dgemma_ext as dg\n"
        "try: dg.DiffusionGemma.from_pretrained(sys.argv[1])\n"
        "except dg.CheckpointError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert "the package gguf is needed (pip install 'dgemma_ext[gguf]')" in told.stdout


# As the published conversions write them, beside the name of what they hold.
NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "self_cond_pre_norm.weight": "self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "self_conditioning.up_proj.weight",
    "self_cond_down.weight": "self_conditioning.down_proj.weight",
    "blk.7.attn_norm.weight": "layers.7.input_layernorm.weight",
    "blk.7.attn_q.weight": "layers.7.self_attn.q_proj.weight",
    "blk.7.attn_k.weight": "layers.7.self_attn.k_proj.weight",
    "blk.7.attn_v.weight": "layers.7.self_attn.v_proj.weight",
    "blk.7.attn_output.weight": "layers.7.self_attn.o_proj.weight",
    "blk.7.attn_q_norm.weight": "layers.7.self_attn.q_norm.weight",
    "blk.7.attn_k_norm.weight": "layers.7.self_attn.k_norm.weight",
    "blk.7.post_attention_norm.weight": "layers.7.post_attention_layernorm.weight",
    "blk.7.ffn_norm.weight": "layers.7.pre_feedforward_layernorm.weight",
    "blk.7.ffn_gate.weight": "layers.7.mlp.gate_proj.weight",
    "blk.7.ffn_up.weight": "layers.7.mlp.up_proj.weight",
    "blk.7.ffn_down.weight": "layers.7.mlp.down_proj.weight",
    "blk.7.post_ffw_norm_1.weight": "layers.7.post_feedforward_layernorm_1.weight",
    "blk.7.pre_ffw_norm_2.weight": "layers.7.pre_feedforward_layernorm_2.weight",
    "blk.7.ffn_gate_inp.weight": "layers.7.router.proj.weight",
    "blk.7.ffn_gate_inp.scale": "layers.7.router.scale",
    "blk.7.ffn_gate_up_exps.weight": "layers.7.experts.gate_up_proj",
    "blk.7.ffn_down_exps.weight": "layers.7.experts.down_proj",
    "blk.7.ffn_down_exps.scale": "layers.7.router.per_expert_scale",
    "blk.7.post_ffw_norm_2.weight": "layers.7.post_feedforward_layernorm_2.weight",
    "blk.7.post_ffw_norm.weight": "layers.7.post_feedforward_layernorm.weight",
    "blk.7.layer_output_scale.weight": "layers.7.layer_scalar",
}


def test_names_there_and_back(source: Path) -> None:
    for name in tensors_of(source):
        published = published_name_of(name)
        assert name == "rope_freqs.weight" or gguf_name_of(str(published)) == name
    assert published_name_of("blk.0.ffn_gate_exps.weight") is None
    assert {name: published_name_of(name) for name in NAMES} == {k: f"model.decoder.{v}" for k, v in NAMES.items()}
    scalar = "model.encoder.language_model.layers.7.layer_scalar"
    assert published_name_of("blk.7.enc_layer_output_scale.weight") == scalar
