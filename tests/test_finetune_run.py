"""Runs of `dgemma finetune`: data, interruption at every moment, quantized bases, memory, and what generation loads."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dgemma_ext as dg
from checkpoints import FULL, SLIDING, make_checkpoint
from command import dgemma
from dgemma_ext.checkpoint import Adapter, ModelConfig, inspect_checkpoint, resolve_weights
from dgemma_ext.engine import memory_plan
from dgemma_ext.errors import CheckpointError
from dgemma_ext.finetune import Examples, FinetuneSettings, LoraSettings, Run, open_examples, training_sizes
from dgemma_ext.finetune import files as finetune_files
from dgemma_ext.finetune import run as run_module
from dgemma_ext.finetune.adapter import TrainedAdapter
from dgemma_ext.finetune.data import Example
from dgemma_ext.finetune.evaluate import Evaluation
from dgemma_ext.finetune.forward import Passes
from dgemma_ext.finetune.loss import losses
from dgemma_ext.finetune.recipe import make_batch
from dgemma_ext.model import Network, load_weights
from dgemma_ext.model.weights import _dequantized
from dgemma_ext.ops.formats import Int8Weight
from dgemma_ext.ops.gradients import head

SIZES: dict[str, Any] = dict(
    layers=(SLIDING, FULL),
    hidden=32,
    intermediate=32,
    moe_intermediate=32,
    experts=4,
    heads=2,
    kv_heads=1,
    global_kv_heads=1,
    global_head_dim=16,
    vocabulary=512,
    window=10,
    canvas=8,
)
LORA = LoraSettings(rank=4, alpha=8, targets=("attention", "mlp", "self-conditioning", "router", "experts"))
SETTINGS = FinetuneSettings(steps=3, batch=2, rate=0.01, warmup=1, save_every=1, seed=5, lora=LORA)
STATE, ADAPTER, LOG = finetune_files.STATE_FILE, finetune_files.ADAPTER_FILE, finetune_files.LOG_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture(scope="module")
def model(folder: Path) -> dg.DiffusionGemma:
    return dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=torch.float32, images=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven examples, in both forms, with answers of one canvas and more."""
    lines: list[dict[str, Any]] = [{"prompt": f"say {n}", "response": "abc" * 3 * n} for n in range(1, 6)]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines += [
        {"messages": talk},
        {"messages": [*talk, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]},
    ]
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture(scope="module")
def examples(model: dg.DiffusionGemma, data: Path) -> Examples:
    return open_examples(data, model.tokenizer, model.defaults, SETTINGS)


def finished(model: dg.DiffusionGemma, examples: Examples, out: Path, **changes: Any) -> Run:
    run = Run(model, examples, out, SETTINGS, **changes)
    for _ in run.steps():
        pass
    return run


@pytest.fixture(scope="module")
def whole(model: dg.DiffusionGemma, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    finished(model, examples, out)
    return out


def assert_same_run(one: Path, other: Path) -> None:
    """Factors, moments, counters and adapter to the bit, and the log but for its seconds."""
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    for name in (STATE, ADAPTER):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert log_lines(one) == log_lines(other)


def log_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# Data -----------------------------------------------------------------------------------------------------------------

BAD_LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("{'prompt': 1}", "no JSON: Expecting property name"),
    "a list": ("[1]", "got [1] (list), wanted"),
    "an unknown field": ('{"prompt": "a", "answer": "b"}', "got the field 'answer', wanted"),
    "both forms": ('{"prompt": "a", "response": "b", "messages": []}', "got messages, prompt, response, wanted"),
    "half of a form": ('{"prompt": "a"}', "response must be a string, got None"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "messages must end with the assistant's answer"),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]}',
        "messages[0] has a part of type 'image'; only text is trained",
    ),
    "calls": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b", "tool_calls": [1]}]}',
        "messages[1] has tool_calls; only text is trained",
    ),
    "bytes": ('{"prompt": "\\ud800", "response": "b"}', "prompt must be text that UTF-8 can hold"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    """Before the model is loaded, through the command."""
    text, message = BAD_LINES[name]
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n\n' + text + "\n")
    run = dgemma("finetune", str(folder), str(file), "--out", str(tmp_path / "out"))
    assert run.code == 2
    assert run.err.startswith(f"dgemma: {file}, line 3: {message}"), run.err
    assert not (tmp_path / "out").exists()


def test_every_line_once_in_an_order_of_its_own(examples: Examples) -> None:
    orders = []
    for epoch in range(3):
        for buffer in (1, 4, 100):
            order = [line.index for line in examples.epoch(seed=9, epoch=epoch, buffer=buffer)]
            assert sorted(order) == list(range(7))
            # The line at place n of the file is not drawn before the buffer has it.
            assert all(index < place + buffer for place, index in enumerate(order))
            orders.append(tuple(order))
    assert orders[0] == orders[3] == tuple(range(7))
    assert len(set(orders)) == 1 + 2 * 3
    assert orders[1] == tuple(line.index for line in examples.epoch(seed=9, epoch=0, buffer=4))


def test_lines_and_answers(model: dg.DiffusionGemma, examples: Examples) -> None:
    """An answer ends with the end of its turn; a conversation's last answer alone is one; a long one is cut."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    end = tokenizer.id_of("<turn|>")
    found = examples.first(7)
    assert [example.response for example in found[-2:]] == ["yes", "no"]
    assert found[0].answer == (*tokenizer.encode("abcabcabc"), end)
    assert found[0].prompt == tuple(tokenizer.encode_prompt("say 1"))
    short = open_examples(examples.file, tokenizer, model.defaults, FinetuneSettings(max_length=40))
    cut = short.first(5)[4]
    assert (cut.truncated, cut.answer) == (True, found[4].answer[: 40 - len(cut.prompt)])
    with pytest.raises(ValueError, match=r"line 1: its prompt has \d+ tokens, and max_length is 3"):
        open_examples(examples.file, tokenizer, model.defaults, FinetuneSettings(max_length=3))


# Interruption ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing that it does after this moment reaches the disk."""


def killed_at(moment: int) -> Any:
    """Lets `moment` calls that touch the disk pass, and none after them."""
    left = [moment]

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    return mock.patch.multiple(os, fsync=dying(os.fsync), replace=dying(os.replace))


def test_killed_at_any_moment(
    model: dg.DiffusionGemma, examples: Examples, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At every call that writes through to the disk or replaces a file, of every state; twice on the way."""
    moments = 0
    while True:
        out = tmp_path_factory.mktemp("killed")
        try:
            with killed_at(moments):
                finished(model, examples, out)
        except Killed:
            pass
        else:
            break
        try:
            with killed_at(4):
                finished(model, examples, out, resume=True)
        except Killed:
            finished(model, examples, out, resume=True)
        assert_same_run(out, whole)
        # All moments until the first state and its adapter are there; then some of each later one's, and the last ones.
        moments += 1 if moments < 13 or moments > 33 else 5
    assert moments >= 39


def test_stopped_between_states(model: dg.DiffusionGemma, examples: Examples, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C writes a state, whatever save_every says; a setting that differs from the run's is named."""
    seldom = FinetuneSettings(**{**vars(SETTINGS), "save_every": 100})
    run = Run(model, examples, tmp_path, seldom)
    for report in run.steps():
        if report.step == 2:
            break
    assert run.progress.step == 2
    for changed, message in (
        ({"rate": 0.02}, "has rate 0.01, and this one 0.02"),
        ({"lora": LoraSettings(rank=8, targets=LORA.targets)}, "has lora.alpha 8.0, and this one 32.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(model, examples, tmp_path, FinetuneSettings(**{**vars(SETTINGS), **changed}), resume=True)
    with pytest.raises(ValueError, match="has a run already; continue it with resume"):
        Run(model, examples, tmp_path, SETTINGS)
    finished(model, examples, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{STATE}: is no state of a run"):
        Run(model, examples, tmp_path, SETTINGS, resume=True)


def test_an_evaluation_that_was_due_is_made_when_the_run_goes_on(
    model: dg.DiffusionGemma, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *_: Evaluation(0.5, 3.0, 2.0, 4))
    settings = FinetuneSettings(**{**vars(SETTINGS), "eval_every": 2})
    for name, stops_at in (("whole", None), ("stopped", 2)):
        for report in Run(model, examples, tmp_path / name, settings, examples).steps():
            if report.loss is not None and report.step == stops_at:
                break
    for _ in Run(model, examples, tmp_path / "stopped", settings, examples, resume=True).steps():
        pass
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    lines = log_lines(tmp_path / "whole")
    assert [line["step"] for line in lines if "exact_match" in line] == [0, 2, 3]


def test_interrupted_inside_an_update(
    model: dg.DiffusionGemma, examples: Examples, whole: Path, tmp_path: Path
) -> None:
    """Half-updated factors are of no step, and are not written."""
    run = Run(model, examples, tmp_path, FinetuneSettings(**{**vars(SETTINGS), "save_every": 100}))
    steps = run.steps()
    next(steps)

    def half() -> None:
        next(iter(run.adapter.parameters().values())).data.add_(1)
        raise KeyboardInterrupt

    with mock.patch.object(run._optimizer, "step", half), pytest.raises(KeyboardInterrupt):
        next(steps)
    finished(model, examples, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_ctrl_c_lets_the_step_end(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes the state of that step, and its code says that it was interrupted."""
    given = ["--out", str(tmp_path), "--steps", "5", "--batch", "1", "--rank", "1", "--device", "cpu"]
    make_step = Run._step

    def interrupted(run: Run, drawn: Any) -> Any:
        if run.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return make_step(run, drawn)

    monkeypatch.setattr(Run, "_step", interrupted)
    assert dgemma("finetune", str(folder), str(data), *given).code == 130
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]
    again = dgemma("finetune", str(folder), str(data), *given, "--resume", "--json")
    assert again.objects[-1]["steps"] == 5


def test_a_full_disk(model: dg.DiffusionGemma, examples: Examples, whole: Path, tmp_path: Path) -> None:
    """The error names the file; the state before it is whole, and the run goes on from it."""
    run = Run(model, examples, tmp_path, SETTINGS)
    steps = run.steps()
    next(steps)
    next(steps)
    before = (tmp_path / STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(CheckpointError, match=f"{STATE}: cannot be written: .*; {STATE} holds what was written"):
            list(steps)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / STATE).read_bytes() == before
    finished(model, examples, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_process_that_is_killed(folder: Path, data: Path, tmp_path: Path) -> None:
    """kill -9 of the command in the middle of a run; the same command with --resume reaches the bits of one without."""
    given = [
        *("finetune", str(folder), str(data)),
        *("--steps", "6", "--batch", "2", "--warmup", "2", "--rate", "0.01"),
    ]
    given += ["--rank", "2", "--save-every", "1", "--dtype", "float32", "--device", "cpu", "--json"]
    program = "import sys, torch; torch.set_num_threads(2); from dgemma_ext.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, *given, "--out", str(tmp_path / "killed")])
    state = tmp_path / "killed" / LOG
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if state.exists() and state.read_bytes().count(b"\n") >= 2:
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    runs = [dgemma(*given, "--out", str(tmp_path / name), "--resume") for name in ("killed", "whole")]
    assert [run.code for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    told = runs[0].objects[-1]
    assert (told["event"], told["steps"]) == ("finetuned", 6)


# What is trained ------------------------------------------------------------------------------------------------------


def random_factors(adapter: TrainedAdapter) -> None:
    generator = torch.Generator().manual_seed(4)
    for tensor in adapter.parameters().values():
        tensor.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("passes", ["shared", "separate"])
def test_generation_computes_what_was_trained(
    passes: str, model: dg.DiffusionGemma, examples: Examples, tmp_path: Path
) -> None:
    """The logits of the written adapter in the engine are those of the trained passes."""
    settings = FinetuneSettings(lora=LoraSettings(rank=3, targets=LORA.targets, passes=passes))
    run = Run(model, examples, tmp_path, settings)
    random_factors(run.adapter)
    run.save()
    network = model.network
    read = Adapter.from_folder(tmp_path, model.config)
    assert read.passes == passes
    ids, canvas = torch.randint(3, 500, (1, 21)), torch.randint(3, 500, (1, 8))
    conditioning = torch.randn(1, 8, 512)
    network.load_adapter("trained", read)
    try:
        cache = model.new_cache(1, 64)
        network.encode(ids, cache, adapter="trained")
        wanted = network.denoise(canvas, cache, self_conditioning=conditioning, adapter="trained")
    finally:
        network.adapters.remove("trained")
    trained = Passes(network, run.adapter)
    with torch.no_grad():
        prefix, _ = trained.encode(ids, needs_output=False)
        soft = network.soft_embedding_of_logits(conditioning)
        hidden = trained.denoise(canvas, prefix, torch.tensor([21]), soft)
        raw = hidden @ network.weights.embed_tokens.T
    cap = model.config.final_logit_softcapping
    torch.testing.assert_close(torch.tanh(raw / cap) * cap, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("format", ["fp8", "int4", "nvfp4"])
def test_a_quantized_base(format: str, folder: Path, examples: Examples) -> None:
    """Loss and gradients are those over the dequantized weights."""
    target = resolve_weights(format)
    config = ModelConfig.from_file(folder)
    device = torch.device("cpu")
    found = []
    for plain in (False, True):
        weights = load_weights(folder, config, torch.float32, device, weights=target)
        quantized = 0
        for layer in weights.layers:
            for name, weight in vars(layer).items():
                if hasattr(weight, "dequantized"):
                    quantized += 1
                    if plain:
                        setattr(layer, name, _dequantized(weight, torch.float32))
        assert quantized >= 4
        network = Network(config, weights)
        adapter = TrainedAdapter(config, LORA, 1, device)
        random_factors(adapter)
        batch = make_batch(examples.first(3), [0] * 3, SETTINGS, 8, 512, fill=1, pad=0)
        loss = losses(Passes(network, adapter), batch)
        (loss.canvas + loss.encoder).backward()
        gradients = adapter.peft_tensors(gradients=True)
        found.append({"loss": (loss.canvas + loss.encoder).detach(), **gradients})
    for name, mine in found[0].items():
        worst = float((mine - found[1][name]).abs().max() / found[1][name].abs().max().clamp(min=1e-12))
        assert worst < 1e-4, f"{name}: {worst:.1e}"


def test_int8_is_refused(model: dg.DiffusionGemma, examples: Examples, tmp_path: Path) -> None:
    weights = copy.copy(model.weights)
    weights.layers = [copy.copy(layer) for layer in weights.layers]
    weights.layers[1].o_proj = Int8Weight(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32))
    other = dg.DiffusionGemma(Network(model.config, weights), model.defaults, model.tokenizer)
    with pytest.raises(ValueError, match="weights: got int8 for o_proj, which rounds what it multiplies too"):
        Run(other, examples, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_micro_batches_and_shared_factors(model: dg.DiffusionGemma, examples: Examples, tmp_path: Path) -> None:
    """Examples one at a time give the gradients of all together; shared factors get the sum of both passes'."""
    found = []
    for name, passes, micro_batch in (("a", "shared", 3), ("b", "shared", 1), ("c", "separate", 3)):
        lora = LoraSettings(rank=3, targets=("mlp", "experts"), passes=passes)
        run = Run(model, examples, tmp_path / name, FinetuneSettings(batch=3, micro_batch=micro_batch, lora=lora))
        for tensor in run.adapter.parameters().values():
            tensor.data = torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape)
        batch = make_batch(examples.first(3), [0] * 3, run.settings, 8, 512, fill=1, pad=0)
        loss = run._backward(batch)
        found.append((loss, run.adapter.peft_tensors(gradients=True)))
    (loss, together), (loss_apart, apart), (loss_separate, separate) = found
    assert loss == pytest.approx(loss_apart, rel=1e-6)
    assert loss == pytest.approx(loss_separate, rel=1e-6)
    decoder = [name for name in together if ".decoder." in name]
    assert decoder
    for name in decoder:
        both = separate[name] + separate[name.replace(".decoder.", ".encoder.language_model.")]
        for other in (apart[name], both):
            torch.testing.assert_close(together[name], other, rtol=0, atol=2e-5 * float(both.abs().max()))


def test_the_rate(model: dg.DiffusionGemma, examples: Examples, tmp_path: Path) -> None:
    run = Run(model, examples, tmp_path, FinetuneSettings(steps=101, warmup=11, rate=2.0))
    assert [run.rate(step) for step in (0, 10)] == [pytest.approx(2 / 11), 2.0]
    assert run.rate(11) == 2.0
    assert run.rate(56) == pytest.approx(2 * 0.55, rel=0.02)
    assert run.rate(100) == pytest.approx(0.2)


class _WidestFloat32(TorchDispatchMode):
    """The most rows of a float32 tensor whose last dimension is the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.shape[-1:] == (512,):
                self.rows = max(self.rows, tensor.numel() // 512)
        return found


def test_no_step_holds_the_logits_of_all_rows(
    folder: Path, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, of a model in bfloat16: pieces alone."""
    monkeypatch.setattr(head, "ROWS_AT_ONCE", 5)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", images=False)
    adapter = TrainedAdapter(model.config, LORA, 0, model.device)
    batch = make_batch(examples.first(3), [0] * 3, SETTINGS, 8, 512, fill=1, pad=0)
    assert bool(batch.conditioned.any())
    with _WidestFloat32() as widest:
        found = losses(Passes(model.network, adapter), batch)
        (found.canvas + found.encoder).backward()
    assert 0 < widest.rows <= 5


# Memory ---------------------------------------------------------------------------------------------------------------


def kept_for_backward(passes: Passes, batch: Any) -> int:
    """Bytes of the storages that a forward keeps for its backward, without weights and factors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _weights_of(passes)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = losses(passes, batch)
        total = sum(kept.values())
    assert found.canvas.requires_grad
    return total


def _weights_of(passes: Passes) -> Iterator[torch.Tensor]:
    yield from passes.adapter.parameters().values()
    for holder in (passes.network.weights, *passes.network.weights.layers):
        yield from (value for value in vars(holder).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_what_training_keeps(dtype: torch.dtype, folder: Path, examples: Examples) -> None:
    """The plan holds, without being three times as much, and recomputation is less by a layer's part."""
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu", dtype=dtype, images=False)
    settings = FinetuneSettings(batch=3, lora=LoraSettings(rank=2))
    adapter = TrainedAdapter(model.config, settings.lora, 0, model.device)
    batch = make_batch([long_example(n) for n in range(3)], [0] * 3, settings, 8, 512, fill=1, pad=0)
    info = inspect_checkpoint(folder, model.config)
    plans = []
    for recompute in (False, True):
        sizes = training_sizes(model.config, settings, mock.Mock(spec=Examples, length=57), recompute)
        plan = memory_plan(model.config, info, "auto", dtype, model.device, 128, training=sizes)
        assert plan.trained == 16 * adapter.count
        rows = {row[0]: row[2] for row in plan.rows()}
        assert rows["backward"] == plan.backward > 0
        assert rows["total"] == plan.total
        kept = kept_for_backward(Passes(model.network, adapter, recompute), batch)
        plans.append((kept, plan.backward))
    (kept, planned), (kept_less, planned_less) = plans
    assert kept < planned < 3 * kept, (kept, planned)
    assert kept_less < kept / 3
    assert kept_less < planned_less < planned


def long_example(index: int) -> Example:
    return Example(index, tuple(range(100, 140)), tuple(range(200, 217)), False, "")


def test_no_memory(folder: Path, data: Path, tmp_path: Path) -> None:
    """A run that cannot fit is refused before the model is loaded, with a table."""
    with mock.patch("dgemma_ext.engine.memory.available_bytes", return_value=1000):
        run = dgemma("finetune", str(folder), str(data), "--out", str(tmp_path / "out"))
    assert run.code == 1
    assert "what a step keeps for it" in run.err
    assert "with gradients and moments" in run.err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_int8_before_it_loads(folder: Path, data: Path, tmp_path: Path) -> None:
    with mock.patch.object(dg.DiffusionGemma, "from_pretrained", side_effect=AssertionError):
        run = dgemma("finetune", str(folder), str(data), "--out", str(tmp_path / "out"), "--weights", "int8")
    assert run.code == 2
    assert "weights: got int8 for experts, which rounds what it multiplies too" in run.err


def test_evaluation_and_chart(folder: Path, data: Path, tmp_path: Path) -> None:
    """The real sampler answers held-out prompts before the first step, on the way and at the end."""
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    given = ["--out", str(tmp_path / "out"), "--steps", "2", "--batch", "2", "--eval", str(held_out)]
    given += ["--eval-every", "1"]
    given += ["--eval-count", "2", "--chart", str(tmp_path / "chart.png"), "--device", "cpu", "--rank", "2"]
    run = dgemma("finetune", str(folder), str(data), *given)
    assert run.code == 0, run.err
    lines = log_lines(tmp_path / "out")
    assert Counter("loss" if "loss" in line else "evaluation" for line in lines) == {"loss": 2, "evaluation": 3}
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2]
    found = lines[0]
    assert (found["count"], found["exact_match"]) == (2, 0.0)
    assert found["denoising_steps"] >= 1
    assert "step 2: 0.0% of 2 answers right" in run.err
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
