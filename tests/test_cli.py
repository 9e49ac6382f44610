"""The command `dgemma`: its output and exit codes."""

from __future__ import annotations

import io
import math
import re
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import dgemma_ext as dg
from command import CANVAS, ESCAPE, dgemma, library_model, random_checkpoint, started
from dgemma_ext import _C
from dgemma_ext.cli import main
from published_layout import write_published_layout

# A threshold that is never met, so that every canvas takes all its steps.
UNSURE = ["--confidence-threshold", "0"]


# Help, exit codes, errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"], ["demo"]])
def test_help(command: list[str]) -> None:
    run = dgemma(*command, "--help")
    assert run.code == 0
    assert run.out.startswith(" ".join(["usage: dgemma", *command]))
    assert max(map(len, run.out.splitlines())) <= 120


def test_the_sampler_s_fields_are_flags() -> None:
    shown = dgemma("generate", "--help").out
    fields = "steps entropy-bound t-min t-max stability-threshold confidence-threshold canvas-length"
    for flag in f"seed max-new-tokens {fields} device dtype system watch json".split():
        assert f" --{flag} " in shown


def test_version() -> None:
    assert dgemma("--version").out == f"dgemma {dg.__version__}\n"


def bad_command_lines(model: str) -> dict[str, tuple[list[str], str]]:
    """Command lines that cannot work, and a part of the error message of each."""
    return {
        "no command": ([], "COMMAND"),
        "unknown command": (["sing"], "'sing'"),
        "unknown flag": (["generate", model, "x", "--colour"], "--colour"),
        "no prompt": (["generate", model], "PROMPT"),
        "empty prompt": (["generate", model, " \n"], "PROMPT is empty"),
        "empty stdin": (["generate", model, "-"], "PROMPT is empty"),
        "no folder": (["generate", "/no/such/folder", "x"], "/no/such/folder"),
        "no folder for info": (["info", "no-such-folder"], "no-such-folder"),
        "hub id that is not here": (["info", "nobody/nothing-of-this-name"], "nobody/nothing-of-this-name"),
        "not a number": (["generate", model, "x", "--seed", "one"], "--seed"),
        "negative seed": (["generate", model, "x", "--seed", "-1"], "--seed"),
        "no tokens": (["generate", model, "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        "no steps": (["generate", model, "x", "--steps", "0"], "--steps"),
        "temperatures": (["generate", model, "x", "--t-max", "0.1", "--t-min", "0.5"], "t_max"),
        "entropy bound": (["generate", model, "x", "--entropy-bound", "-1"], "entropy_bound"),
        "canvas length": (["generate", model, "x", "--canvas-length", "999"], "canvas_length"),
        "dtype": (["generate", model, "x", "--dtype", "int8"], "--dtype"),
        "device": (["generate", model, "x", "--device", "tpu"], "device"),
        "too long": (["generate", model, "x" * 5000], "context"),
        "context": (["info", model, "--context", "5000"], "4096"),
        "size": (["demo", "--size", "7"], "--size"),
        "not a Sudoku's canvas": (["demo", "--model", model], "canvas of 8 tokens"),
    }


@pytest.mark.parametrize("what", bad_command_lines(""))
def test_bad_input_is_one_clear_line(what: str) -> None:
    arguments, piece = bad_command_lines(random_checkpoint())[what]
    run = dgemma(*arguments)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(r"dgemma[^\n]*\n", run.err), run.err
    assert piece in run.err


def test_sampler_fields_are_checked_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dg.DiffusionGemma, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert dgemma("generate", random_checkpoint(), "x", "--t-min", "-1").code == 2


def test_a_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(random_checkpoint()) / name).read_bytes()[:-100])
    (tmp_path / "config.json").write_bytes((Path(random_checkpoint()) / "config.json").read_bytes())
    for command in (["info", str(tmp_path)], ["generate", str(tmp_path), "x"]):
        run = dgemma(*command)
        assert run.code == 2
        assert run.err.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("out of\nluck"), 1), (MemoryError(), 1)])
def test_failures_are_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dg.DiffusionGemma, "stream", fail)
    run = dgemma("generate", random_checkpoint(), "x")
    assert run.code == code
    message = f"dgemma: {type(error).__name__}: {error} (DGEMMA_DEBUG=1 shows where)"
    assert run.err == " ".join(message.split()) + "\n"
    monkeypatch.setenv("DGEMMA_DEBUG", "1")
    assert "Traceback" in dgemma("generate", random_checkpoint(), "x").err


def test_a_closed_reader_gives_no_error_message() -> None:
    with started("generate", random_checkpoint(), "x", "--max-new-tokens", "200", "--json", "--watch") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_an_encoding_without_the_model_s_characters_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["demo", "--size", "6", "--seed", "1"]) == 0
    assert b"??" in written.getvalue()


# generate -------------------------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_alone() -> None:
    model = library_model()
    sampler = dg.SamplerConfig(max_denoising_steps=3)
    expected = model.generate("the sky", max_new_tokens=20, sampler=sampler, seed=5)
    assert len(expected.denoising_steps) > 1
    flags = ["--max-new-tokens", "20", "--steps", "3", "--seed", "5"]
    run = dgemma("generate", random_checkpoint(), "the sky", *flags)
    assert (run.code, run.err) == (0, "")
    assert run.out == expected.text.removesuffix("\n") + "\n"
    assert dgemma("generate", random_checkpoint(), "-", *flags, stdin="the sky") == run


def test_json_is_one_object_and_follows_the_seed() -> None:
    def result(seed: int) -> dict[str, Any]:
        run = dgemma(
            "generate", random_checkpoint(), "the sky", "--json", "--seed", str(seed), "--max-new-tokens", "16"
        )
        assert (run.code, run.err) == (0, "")
        fields = run.object
        assert fields.pop("seconds") > 0
        return fields

    first = result(1)
    assert first["event"] == "result"
    assert first["seed"] == 1
    assert first["finish_reason"] in ("eos", "length")
    assert first["tokens_per_forward"] == len(first["token_ids"]) / sum(first["denoising_steps"])
    assert result(1) == first
    assert result(2)["token_ids"] != first["token_ids"]


def test_watched_json_has_every_step() -> None:
    run = dgemma("generate", random_checkpoint(), "a", "--json", "--watch", "--max-new-tokens", "20", "--steps", "4")
    assert run.err == ""
    *events, result = run.objects
    drafts = [event for event in events if event["event"] == "draft"]
    commits = [event for event in events if event["event"] == "commit"]
    assert len(drafts) + len(commits) == len(events)
    assert result["event"] == "result"
    assert [commit["denoising_steps"] for commit in commits] == result["denoising_steps"]
    assert [(draft["canvas_index"], draft["step"]) for draft in drafts] == [
        (canvas, step + 1) for canvas, steps in enumerate(result["denoising_steps"]) for step in range(steps)
    ]
    assert list(chain.from_iterable(commit["token_ids"] for commit in commits)) == result["token_ids"]
    assert commits[-1]["finish_reason"] == result["finish_reason"]
    for draft in drafts:
        assert len(draft["entropy"]) == len(draft["accepted"]) == len(draft["token_ids"]) == CANVAS
        assert draft["mean_entropy"] == pytest.approx(sum(draft["entropy"]) / CANVAS, rel=1e-5)


def test_flags_reach_the_sampler() -> None:
    def drafts(*flags: str) -> list[dict[str, Any]]:
        run = dgemma("generate", random_checkpoint(), "a", "--json", "--watch", "--max-new-tokens", "8", *flags)
        assert run.code == 0
        return [event for event in run.objects if event["event"] == "draft"]

    unsure = drafts("--steps", "5", *UNSURE, "--t-min", "0.5", "--t-max", "1.5", "--entropy-bound", "0")
    assert [draft["temperature"] for draft in unsure] == pytest.approx([1.5, 1.3, 1.1, 0.9, 0.7], rel=1e-6)
    assert {sum(draft["accepted"]) for draft in unsure} == {1}
    everything = drafts("--steps", "5", *UNSURE, "--entropy-bound", "1000")
    assert {sum(draft["accepted"]) for draft in everything} == {CANVAS}
    # With thresholds of no effect a canvas stops at once, and with a stability of three not before step four.
    assert len(drafts("--confidence-threshold", "1000", "--stability-threshold", "0")) == 1
    assert len(drafts("--confidence-threshold", "1000", "--stability-threshold", "3")) >= 4
    assert len(drafts("--canvas-length", "3", "--steps", "1")[0]["token_ids"]) == 3


def test_system_is_a_message_of_its_own() -> None:
    model = library_model()
    chat: list[dict[str, object]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the sky"}]
    run = dgemma("generate", random_checkpoint(), "the sky", "--system", "Be brief.", "--json", "--max-new-tokens", "8")
    assert run.object["token_ids"] == list(model.generate(chat, max_new_tokens=8).token_ids)
    assert run.object["token_ids"] != list(model.generate("the sky", max_new_tokens=8).token_ids)


def test_dtype_changes_the_computation() -> None:
    flags = ["generate", random_checkpoint(), "a", "--json", "--watch", "--steps", "1", "--max-new-tokens", "8"]
    entropies = [dgemma(*flags, "--dtype", dtype).objects[0]["entropy"] for dtype in ("auto", "bfloat16", "float32")]
    assert entropies[0] == entropies[1] != entropies[2]


def test_watching_without_a_terminal_is_plain_lines_on_stderr() -> None:
    flags = ["--max-new-tokens", "12", "--steps", "3", *UNSURE]
    plain = dgemma("generate", random_checkpoint(), "a", *flags)
    watched = dgemma("generate", random_checkpoint(), "a", *flags, "--watch")
    assert watched.out == plain.out
    assert ESCAPE not in watched.out + watched.err
    *steps, last = watched.err.splitlines()
    assert len(steps) == 6
    for number, line in enumerate(steps):
        head = f"canvas {number // 3 + 1} step {number % 3 + 1}/3, temperature "
        assert re.fullmatch(re.escape(head) + r"\d\.\d\d, mean entropy \d+\.\d{4}, accepted \d/8", line), line
    assert last.startswith("12 tokens in 2 canvases, 6 denoising steps, 2.0 tokens per forward, ")


def test_interrupted_generate_leaves_with_130() -> None:
    with started("generate", random_checkpoint(), "x", "--max-new-tokens", "3000", "--watch", *UNSURE) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("canvas 1 step 1")
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
        assert process.wait() == 130


# info -----------------------------------------------------------------------------------------------------------------


def test_info_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dgemma("info", "--json").object["machine"]
    assert facts["version"] == dg.__version__
    assert facts["cpu_variants"] == _C.cpu_variants()
    assert facts["cuda_kernels"] == _C.has_cuda()
    assert facts["cpu_variant"] == _C.cpu_variants()[-1]
    monkeypatch.setenv("DGEMMA_CPU", "scalar")
    shown = dgemma("info").out
    assert "chosen: scalar" in shown
    assert ("not in this build" in shown) != _C.has_cuda()
    monkeypatch.setenv("DGEMMA_CPU", "abacus")
    assert dgemma("info").code == 2


def test_info_agrees_with_the_files_and_the_cache() -> None:
    facts = dgemma("info", random_checkpoint(), "--json", "--context", "100").object["checkpoint"]
    with safe_open(Path(random_checkpoint()) / "model.safetensors", framework="pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    vision = {name: size for name, size in sizes.items() if "vision" in name}
    assert facts["stored"] == {"BF16": {"tensors": len(sizes), "bytes": 2 * sum(sizes.values())}}
    assert facts["vision"]["tensors"] == len(vision) > 0
    assert facts["vision"]["bytes"] == 2 * sum(vision.values())
    assert all(name.startswith(tuple(facts["vision"]["prefixes"])) for name in vision)
    text = sum(sizes.values()) - sum(vision.values())
    # Three layers, two of eight experts active, three matrices of 64 x 32 each.
    assert facts["parameters"] == {"text": text, "active": text - 3 * 6 * 3 * 64 * 32}
    assert facts["loaded_bytes"] == {"bfloat16": 2 * text, "float32": 4 * text}
    model = library_model()
    for context in (100, 10):
        facts = dgemma("info", random_checkpoint(), "--json", "--context", str(context)).object["checkpoint"]
        assert facts["cache"]["slot_bytes"] == model.new_cache(1, context).nbytes
    grown = model.new_cache(1, 101).nbytes - model.new_cache(1, 100).nbytes
    assert facts["cache"]["bytes_per_token_after_window"] == grown
    assert facts["cache"]["bytes_per_token"] == model.new_cache(1, 2).nbytes - model.new_cache(1, 1).nbytes


def test_info_of_the_published_layout_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_published_layout(tmp_path)
    monkeypatch.setattr("dgemma_ext.checkpoint.reading.safe_open", lambda *_, **__: pytest.fail("weights were opened"))
    facts = dgemma("info", str(folder), "--json").object["checkpoint"]
    assert facts["stored_bytes"] == 51_647_562_456
    assert facts["files"] == 11
    assert sum(part["tensors"] for part in facts["stored"].values()) == 1047
    assert facts["vision"]["tensors"] == 356
    assert facts["vision"]["prefixes"] == ["model.encoder.embed_vision", "model.encoder.vision_tower"]
    assert facts["loaded_bytes"]["bfloat16"] == 51_647_562_456 - facts["vision"]["bytes"]
    # 30 layers, 120 of 128 experts inactive, three matrices of 2,816 x 704 each.
    assert facts["parameters"]["text"] - facts["parameters"]["active"] == 30 * 120 * 3 * 2816 * 704
    # Keys and values of two bytes: 25 layers of 8 heads of 256 in rings of 1,023, 5 layers of 2 heads of 512.
    assert facts["cache"]["bytes_per_token"] == 225_280
    assert facts["cache"]["bytes_per_token_after_window"] == 20_480
    assert facts["cache"]["slot_bytes"] == 25 * 1023 * 8192 + 5 * 8192 * 4096
    shown = dgemma("info", str(folder)).out
    assert "25 sliding (8 key/value heads of 256, window 1,024), 5 full (2 key/value heads of 512)" in shown
    assert re.search(r"^files +11, 51.65 GB of tensors\ntensors +1,047 in BF16, 51.65 GB$", shown, re.MULTILINE)
    assert re.search(r"^vision +27 layers of hidden 1,152, 356 tensors, ", shown, re.MULTILINE)
    assert re.search(r"^missing for text +tokenizer.json, chat template$", shown, re.MULTILINE)
    assert ESCAPE not in shown
