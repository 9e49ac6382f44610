"""`dgemma quantize`: its output, its errors, and how it continues."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dgemma_ext as dg
from checkpoints import make_checkpoint
from dgemma_ext.checkpoint import ModelConfig, convert, parse_target, plan_conversion, reading
from dgemma_ext.checkpoint import quantize as convert_module
from dgemma_ext.cli import main
from dgemma_ext.model import ModelWeights, load_weights
from dgemma_ext.ops.formats import QuantizedWeight
from quantized_checkpoints import requantize, schemes, unfuse

FORMATS = ["fp8", "int8", "int4", "int4-64", "nvfp4"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "unquantized", shards=2)


def load(folder: Path, weights: Any = "auto") -> ModelWeights:
    return load_weights(folder, ModelConfig.from_file(folder), torch.bfloat16, "cpu", weights=weights)


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, QuantizedWeight):
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, right.tensors()[name]), name
    elif isinstance(left, Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("to", FORMATS)
def test_the_file_holds_what_quantizing_while_loading_makes(to: str, source: Path, tmp_path: Path) -> None:
    errors = convert(source, tmp_path / "out", parse_target(to))
    written, direct = load(tmp_path / "out"), load(source, parse_target(to))
    for left, right in zip(written.layers, direct.layers, strict=True):
        for attribute in vars(left):
            assert_same(getattr(left, attribute), getattr(right, attribute))
    assert_same(written.embed_tokens, direct.embed_tokens)
    assert {error.layer for error in errors} == {0, 1, 2}
    for error in errors:
        least, most = {"fp8": (0.01, 0.04), "int8": (0.003, 0.01)}.get(to, (0.01, 0.11))
        assert least < error.relative < most, error
        assert error.relative < 0.99 * error.relative_before, error
    # The other files of the folder are copied.
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
    dg.DiffusionGemma.from_pretrained(tmp_path / "out", device="cpu").generate("one two", max_new_tokens=8)


@pytest.mark.parametrize("to", ["fp8", "int4", "nvfp4"])
def test_the_defining_package_reads_the_same_weights(to: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="read with the package compressed-tensors, which is not here")
    from compressed_tensors.quantization import QuantizationConfig

    convert(source, tmp_path / "out", parse_target(to, ("experts", "attention", "mlp")))
    stored = all_tensors(tmp_path / "out")
    unquantized = unfuse(all_tensors(source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    assert read.format == {"fp8": "float-quantized", "int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}[to]
    scheme, compressor = schemes()[to]
    ours = load(tmp_path / "out", "unquantized")
    seen = 0
    for name in unquantized:
        if not re.search(r"layers\.\d+\.(self_attn\.\w_proj|mlp\.\w+_proj|experts\.\d+\.\w+)\.weight", name):
            continue
        base = name.removesuffix("weight")
        parts = {key.removeprefix(base): tensor for key, tensor in stored.items() if key.startswith(base)}
        targets = [t for group in read.config_groups.values() for t in group.targets]
        module = name.removesuffix(".weight")
        assert any(re.match(target.removeprefix("re:"), module) for target in targets), module
        back = compressor.decompress(parts, scheme)["weight"].bfloat16()
        assert torch.equal(loaded_plain(ours, name), back), name
        assert float((back.float() - unquantized[name].float()).norm() / unquantized[name].float().norm()) < 0.12
        seen += 1
    assert seen == 3 * (3 + 3 + 8 * 3) + 2  # three projections where values come from keys, four elsewhere


def loaded_plain(weights: ModelWeights, name: str) -> Tensor:
    match = re.fullmatch(r"model\.decoder\.layers\.(\d+)\.(?:self_attn|mlp|experts)\.(?:(\d+)\.)?(\w+)\.weight", name)
    assert match is not None
    layer = weights.layers[int(match[1])]
    if match[2] is None:
        found: Tensor = getattr(layer, match[3])
        return found
    if match[3] == "down_proj":
        assert isinstance(layer.experts_down, Tensor)
        return layer.experts_down[int(match[2])]
    assert isinstance(layer.experts_gate_up, Tensor)
    return layer.experts_gate_up[int(match[2])].chunk(2)[match[3] == "up_proj"]


def test_groups_that_do_not_divide_the_columns(source: Path, tmp_path: Path) -> None:
    """The 32 columns of down have no group of 64, the 64 of gate and up none of 128: each gets a group that fits."""
    convert(source, tmp_path / "out", parse_target("int4-128", ("experts", "mlp")))
    weights = load(tmp_path / "out")
    groups = [(layer.experts_gate_up.group, layer.experts_down.group) for layer in weights.layers]  # type: ignore[union-attr]
    assert groups == [(64, 32)] * 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(group["weights"]["group_size"] for group in config["config_groups"].values()) == [32, 64]


def test_shards_do_not_change_what_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "one", parse_target("int4"))
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    monkeypatch.setattr(convert_module, "_SHARD_BYTES", 40_000)
    convert(source, tmp_path / "many", parse_target("int4"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


class Stopped(Exception):
    pass


def units_of(folder: Path) -> int:
    """How many units of work the journals of a partial folder hold."""
    return sum(len(file.read_text().splitlines()) for file in folder.glob("*.journal"))


def test_an_interrupted_run_is_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a shard, in the middle of a stack of experts; whatever the size of a shard is."""
    monkeypatch.setattr(convert_module, "_SHARD_BYTES", 100_000)
    out, target, write = tmp_path / "out", parse_target("int4"), convert_module._write_unit
    made: list[list[str]] = []

    def counting(work: Any, unit: Any, *arguments: Any) -> None:
        if len(made) == stop_at:
            raise Stopped
        made.append(unit.names)
        write(work, unit, *arguments)

    monkeypatch.setattr(convert_module, "_write_unit", counting)
    stop_at = -1
    wanted = convert(source, tmp_path / "whole", target)
    units, shards = list(made), len(plan_conversion(source, target).shards)
    assert shards > 2
    kept = 0
    for stop_at in (len(units) // 3, len(units) // 2, len(units) - 1):
        made = units[:kept]
        with pytest.raises(Stopped):
            convert(source, out, target)
        assert made == units[:stop_at]
        kept = stop_at
        assert not out.exists()
        with pytest.raises(dg.CheckpointError):
            ModelConfig.from_file(tmp_path / "out.partial")
    # Another format, or another source, is no continuation.
    with pytest.raises(ValueError, match=r"out\.partial was begun from another source or for another format"):
        convert(source, out, parse_target("fp8"))
    stop_at, made = -1, []
    done: list[int] = []
    errors = convert(source, out, target, done.append)
    assert made == units[-1:]
    assert sum(done) == plan_conversion(source, target).info.total_bytes
    assert [vars(error) for error in errors] == [vars(error) for error in wanted]
    assert_same_files(out, tmp_path / "whole")


def test_two_runs_to_one_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused while the first one writes, and spoils nothing."""
    out, target, write = tmp_path / "out", parse_target("int4"), convert_module._write_unit
    convert(source, tmp_path / "whole", target)

    def interrupted(*arguments: Any) -> None:
        with pytest.raises(ValueError, match=r"OUT: another run writes .*out\.partial; wants one at a time"):
            convert(source, out, target)
        write(*arguments)

    monkeypatch.setattr(convert_module, "_write_unit", interrupted)
    convert(source, out, target)
    assert_same_files(out, tmp_path / "whole")


def test_a_destination_that_appears_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is kept for the next run."""
    out, target, copy = tmp_path / "out", parse_target("int4"), convert_module._write_companions
    (tmp_path / "whole").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="whole exists; wants a folder that does not"):
        convert(source, tmp_path / "whole", target)

    def appearing(*arguments: Any) -> None:
        out.symlink_to(tmp_path / "nowhere")
        copy(*arguments)

    monkeypatch.setattr(convert_module, "_write_companions", appearing)
    with pytest.raises(dg.CheckpointError, match="what is finished is kept for the next run"):
        convert(source, out, target)
    out.unlink()
    monkeypatch.setattr(convert_module, "_write_companions", copy)
    monkeypatch.setattr(convert_module, "_write_unit", None)
    convert(source, out, target)
    load(out)


def assert_same_files(folder: Path, whole: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
    for file in whole.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("torn", [0, 7], ids=["killed", "killed while it wrote"])
def test_a_run_that_is_killed(torn: int, source: Path, tmp_path: Path) -> None:
    """kill -9, in the middle of the only shard: the next run of the command makes what was not finished."""
    program = (
        "import os, signal, sys; from dgemma_ext.checkpoint import quantize, shard_writer;"
        "shard_writer._FLUSH_SECONDS = 0.0; write, made = quantize._write_unit, []\n"
        "def dying(*arguments):\n"
        "    if len(made) == 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    made.append(1); write(*arguments)\n"
        "quantize._write_unit = dying\n"
        "from dgemma_ext.cli import main; sys.exit(main())"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, "quantize", str(source), str(out), "--to", "fp8"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert units_of(partial) == 40
    journal, pieces = (next(partial.glob(pattern)) for pattern in ("*.journal", "*.pieces"))
    if torn:  # a unit that did not reach the disk whole
        journal.write_bytes(journal.read_bytes()[:-torn])
        pieces.write_bytes(pieces.read_bytes() + bytes(torn))
    made: list[int] = []
    target, write = parse_target("fp8"), convert_module._write_unit
    with mock.patch.object(convert_module, "_write_unit", lambda *a: (made.append(1), write(*a))):
        convert(source, out, target)
        again = len(made)
        made.clear()
        convert(source, tmp_path / "whole", target)
    assert again == len(made) - 40 + (1 if torn else 0)
    assert_same_files(out, tmp_path / "whole")
    assert not partial.exists()


def test_where_it_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A log gets lines, and a terminal the bar of loading (test_weights.py)."""
    monkeypatch.setattr(reading, "_SECONDS_TO_A_LINE", 0.0)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--to", "int4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 50
    assert re.fullmatch(r"quantizing: [\d.]+ \w+ of [\d.]+ kB \(\d+%\)", lines[5])
    assert lines[-1].endswith("(100%)")


def test_a_disk_that_is_full(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes a write fail half-way, as a full disk does."""
    out = tmp_path / "out"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    program = "import sys; from dgemma_ext.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "quantize", str(source), str(out), "--to", "fp8"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert failed.returncode == 2, failed.stderr
    assert re.search(r"model-00001-of-00001.safetensors: cannot be written: .*none of it loads", failed.stderr)
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))
    assert not list((tmp_path / "out.partial").glob("*.unfinished"))
    # With room again the same command finishes.
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    load(out)


def test_bad_arguments(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str) -> str:
        assert main(["quantize", *arguments]) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "--to must be one of fp8, int8, int4, int4-32, int4-64, int4-128, nvfp4, got 'int3'" in complaint(
        str(source), out, "--to", "int3"
    )
    assert "parts must be one of experts, attention, mlp, got 'router'" in complaint(
        str(source), out, "--to", "fp8", "--parts", "experts,router"
    )
    assert "exists; wants a folder that does not" in complaint(str(source), str(source), "--to", "fp8")
    assert "does not exist" in complaint(str(tmp_path / "nothing"), out, "--to", "fp8")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("mine")
    assert "has files of something else" in complaint(str(source), out, "--to", "fp8")
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "mine"
    pytest.importorskip("compressed_tensors", reason="writes a quantized checkpoint")
    single = make_checkpoint(tmp_path / "single", with_tokenizer=False)
    requantize(single, "int4")
    for parts in ("experts,attention,mlp", "mlp"):  # where the other parts are quantized, too
        told = complaint(str(single), out, "--to", "fp8", "--parts", parts)
        assert re.search(r"the checkpoint has .* as int4; wants it unquantized", told)


@pytest.mark.parametrize("name", ["experts.down_proj", "input_layernorm.weight"], ids=["quantized", "copied"])
def test_weights_that_are_not_finite(name: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "unquantized", with_tokenizer=False)
    file = source / "model.safetensors"
    stored = load_file(file)
    stored[f"model.decoder.layers.1.{name}"].view(-1)[3] = float("nan")
    from safetensors.torch import save_file

    save_file(stored, file, {"format": "pt"})
    with pytest.raises(dg.CheckpointError, match=rf"layers\.1\.{name}: has values that are not finite"):
        convert(source, tmp_path / "out", parse_target("int4"))
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(source), str(tmp_path / "out"), "--to", "int4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["layer", "experts", "attention"]
    assert lines[2].split() == ["before", "now"] * 2
    assert [line.split()[0] for line in lines[3:7]] == ["0", "1", "2", "all"]
    for line in lines[3:7]:
        numbers = [float(number) for number in line.split()[1:]]
        assert all(0.05 < now < before < 0.12 for before, now in zip(numbers[::2], numbers[1::2], strict=True))
    assert main(["quantize", str(source), str(tmp_path / "json"), "--to", "fp8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"]["after"] < result["bytes"]["before"]
    assert {(error["layer"], error["part"]) for error in result["errors"]} == {
        (layer, part) for layer in range(3) for part in ("experts", "attention", "mlp")
    }
    assert os.path.isdir(result["path"])
