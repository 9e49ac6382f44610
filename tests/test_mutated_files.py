"""Thousands of damaged headers and configurations: each is read, or refused by a CheckpointError, and none makes the
loader take memory for what a file only claims."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma_ext as dg
from checkpoints import GENERATION_CONFIG, config_for, make_checkpoint
from dgemma_ext.checkpoint import GenerationDefaults, ModelConfig, Tokenizer, inspect_checkpoint
from dgemma_ext.checkpoint.headers import read_header
from dgemma_ext.checkpoint.json_section import read_json
from dgemma_ext.model import load_weights
from published_layout import PUBLISHED_CONFIG

HEADERS, CONFIGS, CHECKPOINTS, TOKENIZERS = 6_000, 4_000, 100, 50
# Bytes that Python may take while it reads a file of a few thousand. A claimed size would take gigabytes.
MOST = 1_000_000

NASTY: list[Any] = [
    *(None, True, False, "", "BF16", "F64", "\ud800", "x" * 5_000, [], {}, [[]], {"": {}}, [None], [-1], ["1"]),
    *(0, -1, 1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *([2**62, 2**62], [2**32, 2**32], [1] * 100, [0, 2**40], [2**40, 0], [10**300] * 40, [1.0, 2.0]),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy in which one to three places are replaced, removed, doubled, or swapped."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return chance.choice(NASTY)
        container, key = chance.choice(found)
        kind = chance.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, other_key = chance.choice(found)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 2 and isinstance(container[key], int) and not isinstance(container[key], bool):
            container[key] += chance.choice((-1, 1, 2, 8, 1 << 20))
        elif kind == 3 and isinstance(container, dict):
            container[chance.choice(("", "x", key + ".", "__metadata__", "\u0000"))] = container[key]
        elif kind == 4 and isinstance(container, list):
            container.append(container[key])
        elif kind == 5:
            return chance.choice(NASTY)
        else:
            container[key] = copy.deepcopy(chance.choice(NASTY))
    return value


def garbled(raw: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, taken out, put in, or the end cut off."""
    data = bytearray(raw)
    for _ in range(chance.choice((1, 2, 5))):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            del data[place : place + chance.choice((1, 3, 50))]
        elif kind == 1:
            data[place:place] = bytes(
                chance.choices((0, 34, 44, 91, 93, 123, 125, 255), k=chance.choice((1, 4, 3_000)))
            )
        elif kind == 2:
            data[place : place + 1] = bytes([chance.randrange(256)])
        else:
            del data[place:]
    return bytes(data)


def packed(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + payload


def damaged_file(header: Any, payload: bytes, chance: random.Random) -> bytes:
    """A safetensors file with damage in its structure, its bytes, or the length of its header."""
    kind = chance.randrange(5)
    if kind == 0:
        return garbled(packed(header, payload), chance)
    if kind == 1:
        length = chance.choice(
            (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, chance.randrange(2**64), chance.randrange(999))
        )
        return length.to_bytes(8, "little") + packed(header, payload)[8:]
    return packed(mutated(header, chance), payload)


@pytest.fixture
def measured() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None for a CheckpointError; everything else is a failure."""
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    refusal: dg.CheckpointError | None = None
    result = None
    try:
        result = read()
    except dg.CheckpointError as error:
        refusal = error
    taken = tracemalloc.get_traced_memory()[1] - before
    assert taken < MOST, f"{taken:,} bytes"
    if refusal is not None:
        assert refusal.file is not None
        assert len(str(refusal)) < 20_000
    return result


def small_header() -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size) in {
        "model.decoder.norm.weight": ("BF16", [8], 16),
        "model.decoder.layers.0.experts.down_proj": ("F32", [2, 2, 2], 32),
        "scalar": ("F8_E4M3", [], 1),
        "empty": ("I64", [0, 5], 0),
    }.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, bytes(end)


@pytest.mark.usefixtures("measured")
def test_headers(tmp_path: Path) -> None:
    """A header that is accepted describes the file's bytes exactly."""
    (header, payload), chance, file = small_header(), random.Random(1), tmp_path / "model.safetensors"
    file.write_bytes(packed(header, payload))
    assert len(read_header(file)) == 4
    accepted = 0
    for number in range(HEADERS):
        data = damaged_file(header, payload, chance)
        file.write_bytes(data)
        tensors = outcome(lambda: read_header(file))
        if tensors is None:
            continue
        accepted += 1
        end = 8 + int.from_bytes(data[:8], "little")
        for tensor in tensors.values():
            assert tensor.offset == end, number
            end += tensor.nbytes
        assert end == len(data), number
    assert HEADERS * 0.02 < accepted < HEADERS * 0.6  # neither all nor none


@pytest.mark.usefixtures("measured")
@pytest.mark.filterwarnings("ignore:text_config.layer_types")
def test_configurations(tmp_path: Path) -> None:
    chance, accepted, short = random.Random(2), 0, config_for()
    # The number of layers alone says how many there are.
    del short["text_config"]["layer_types"]
    sources: list[tuple[str, Any, Callable[[Path], Any]]] = [
        ("config.json", config_for(), ModelConfig.from_file),
        ("config.json", config_for(dialect="per_layer"), ModelConfig.from_file),
        ("config.json", short, ModelConfig.from_file),
        ("config.json", PUBLISHED_CONFIG | {"quantization_config": QUANTIZATION}, ModelConfig.from_file),
        ("generation_config.json", GENERATION_CONFIG, GenerationDefaults.from_file),
    ]
    for _ in range(CONFIGS):
        name, values, read = chance.choice(sources)
        raw = json.dumps(values).encode()
        if chance.randrange(4):
            raw = json.dumps(mutated(values, chance)).encode("utf-8", "surrogatepass")
        else:
            raw = garbled(raw, chance)
        (tmp_path / name).write_bytes(raw)
        accepted += outcome(lambda read=read: read(tmp_path)) is not None
    assert CONFIGS * 0.1 < accepted < CONFIGS * 0.9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, with_tokenizer=False)


@pytest.mark.usefixtures("folder", "measured")  # in this order: only what is read is measured
@pytest.mark.parametrize("claim", [10**6, 2**31 - 1, 10**18])
def test_claimed_sizes(claim: int, folder: Path) -> None:
    """Each number of a configuration in turn is far too large, with a checkpoint's headers beside it."""
    values = json.loads((folder / "config.json").read_text())
    del values["text_config"]["layer_types"]
    for container, key in list(places(values)):
        value = container[key]
        if isinstance(value, int) and not isinstance(value, bool):
            container[key] = claim
            (folder / "config.json").write_text(json.dumps(values))
            container[key] = value
            outcome(lambda: inspect_checkpoint(folder, ModelConfig.from_file(folder)))


QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "symmetric": True}}},
    "ignore": ["lm_head"],
}


@pytest.mark.filterwarnings("ignore:text_config.layer_types")
def test_checkpoints(tmp_path: Path) -> None:
    """Damage in one file of a whole checkpoint: it loads, or a CheckpointError says why not."""
    folder, chance, loaded = make_checkpoint(tmp_path, shards=2, with_tokenizer=False), random.Random(3), 0
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
    originals = {file: file.read_bytes() for file in files}

    def read() -> Any:
        config = ModelConfig.from_file(folder)
        GenerationDefaults.from_file(folder, config)
        info = inspect_checkpoint(folder, config)
        return load_weights(folder, config, torch.bfloat16, "cpu", info=info)

    for _ in range(CHECKPOINTS):
        file = chance.choice(files)
        raw = originals[file]
        if file.suffix == ".safetensors":
            begin = 8 + int.from_bytes(raw[:8], "little")
            damaged = damaged_file(json.loads(raw[8:begin]), raw[begin:], chance)
        else:
            damaged = json.dumps(mutated(json.loads(raw), chance)).encode("utf-8", "surrogatepass")
        # A new file: weights that were loaded before may be a map of the old one.
        (folder / "new").write_bytes(damaged)
        (folder / "new").replace(file)
        loaded += outcome(read) is not None
        (folder / "new").write_bytes(raw)
        (folder / "new").replace(file)
    assert CHECKPOINTS * 0.05 < loaded < CHECKPOINTS * 0.8


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizers(name: str, tmp_path: Path) -> None:
    folder, chance, read = make_checkpoint(tmp_path), random.Random(4), 0
    raw = (folder / name).read_bytes()
    for _ in range(TOKENIZERS):
        damaged = garbled(raw, chance)
        if name.endswith(".json") and chance.randrange(3):
            damaged = json.dumps(mutated(json.loads(raw), chance)).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(damaged)
        read += outcome(lambda: Tokenizer.from_directory(folder)) is not None
    assert read > 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "\ufeff", "", "\x00"])
def test_json_at_its_limits(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(dg.CheckpointError, match=r"config\.json: is not JSON"):
        read_json(tmp_path / "config.json")
