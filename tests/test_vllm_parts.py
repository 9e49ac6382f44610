"""What the plugin for vLLM is made from, as far as it needs no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor

import dgemma_ext as dg
import dgemma_vllm
from dgemma_ext.checkpoint import GenerationDefaults, Tokenizer
from dgemma_ext.integrations.vllm import settings, versions
from dgemma_ext.integrations.vllm.contents import Contents
from dgemma_ext.integrations.vllm.experts import experts_product, experts_target, quantized_experts
from dgemma_ext.integrations.vllm.request_options import Limits, check, options_of
from dgemma_ext.integrations.vllm.requests import Requests, seed_of
from dgemma_ext.integrations.vllm.slots import Rows
from dgemma_ext.integrations.vllm.vocabulary import AllowedOfShard, Buffers, Vocabulary, advance
from dgemma_ext.ops import denoise, grouped_gemm
from dgemma_ext.ops.vocabulary_head import vocabulary_head
from dgemma_ext.sampling import FAILED
from dgemma_ext.sampling.step import logits_params, sample_and_update, soft_embedding
from models import begun, random_model

# The plugin's switches --------------------------------------------------------------------------------------------


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == dgemma_vllm.NAME]
    assert found.load() is dgemma_vllm.register


@pytest.mark.parametrize("switch", [None, "0"])
def test_a_plugin_that_is_off_imports_nothing(switch: str | None) -> None:
    program = (
        "import sys; sys.modules['vllm'] = None; import dgemma_vllm; dgemma_vllm.register();"
        "print([name for name in sys.modules if name.startswith(('dgemma_ext', 'torch'))])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DGEMMA_VLLM", "VLLM_PLUGINS")}
    if switch is not None:
        environment |= {"DGEMMA_VLLM": switch, "VLLM_PLUGINS": dgemma_vllm.NAME}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    # The finder of an editable installation is there from the start.
    assert [name for name in eval(result.stdout) if not name.startswith("_editable")] == []


def test_a_plugin_that_is_on_asks_for_vllm_s_release_first() -> None:
    program = "import sys; sys.modules['vllm'] = None; import dgemma_vllm; dgemma_vllm.register()"
    environment = os.environ | {"DGEMMA_VLLM": "1"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "No module named 'vllm.version'" in result.stderr


@pytest.mark.parametrize(
    ("switch", "named", "on"),
    [
        (None, None, False),
        ("1", None, True),
        ("0", None, False),
        (None, "dgemma", True),
        (None, "other, dgemma", True),
        (None, "other", False),
        ("0", "dgemma", False),
        ("1", "other", True),
    ],
)
def test_the_switch(switch: str | None, named: str | None, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DGEMMA_VLLM", switch), ("VLLM_PLUGINS", named)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert dgemma_vllm.is_on() is on


def test_switches_without_a_meaning_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_VLLM", "yes")
    with pytest.raises(ValueError, match="DGEMMA_VLLM must be 0 or 1, got 'yes'"):
        dgemma_vllm.is_on()
    monkeypatch.setenv("DGEMMA_VLLM_PARTS", "sampler,experts ,router")
    with pytest.raises(ValueError, match="DGEMMA_VLLM_PARTS must name sampler, experts, attention, rows, got 'router'"):
        settings.parts()
    monkeypatch.setenv("DGEMMA_VLLM_PARTS", "experts, sampler")
    assert settings.parts() == ("sampler", "experts")
    monkeypatch.delenv("DGEMMA_VLLM_PARTS")
    assert settings.parts() == settings.PARTS


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.0rc1"])
def test_known_releases(version: str) -> None:
    assert versions.refused(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "dev"])
def test_another_release_is_named_beside_those_that_are_known(version: str) -> None:
    message = versions.refused(version) or ""
    assert "0.32 and 0.33" in message
    assert version in message


# A request's options ----------------------------------------------------------------------------------------------

LIMITS = Limits(vocabulary=512, canvas_length=8, defaults=GenerationDefaults(eos_token_ids=(1,)))


def test_options_go_by_the_engines_names() -> None:
    found = options_of(
        {
            "seed": 2**63 - 1,
            "max_denoising_steps": 5,
            "t_min": 0.1,
            "tokens": [3, -1, 5],
            "pinned": [1, 0, 1],
            "allowed": "[[3, 4], null, [5]]",
            "start_step": 2,
            "choice": '["yes", "no"]',
            "thinking_budget": 9,
            "kv_transfer_params": {},
        }
    )
    assert found.seed == 2**63 - 1
    assert found.sampler == dg.SamplerConfig(max_denoising_steps=5, t_min=0.1)
    assert found.canvas == dg.Canvas([3, None, 5], [True, False, True], [[3, 4], None, [5]], 2)
    assert found.grammar == dg.Choice(["yes", "no"], thinking_budget=9)
    resolved = check(found, LIMITS, 16)
    assert (resolved.max_denoising_steps, resolved.t_min, resolved.t_max, resolved.canvas_length) == (5, 0.1, 0.8, 8)
    assert options_of(None).canvas is options_of({}).grammar is None


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"sead": 1}, "extra_args has sead, which is not known; known are seed,"),
        ({"diffusion_pinned": [1]}, "diffusion_pinned, which vLLM's own sampler takes; pinned says it here"),
        ({"diffusion_read_only": 1}, "diffusion_read_only, which vLLM's own sampler takes and"),
        ({"seed": 2**63}, "seed must be an integer in"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": 1.5}, "seed must be an integer in"),
        ({"entropy_bound": "high"}, "entropy_bound must be a finite number"),
        ({"t_max": 0.1}, "t_max must be at least t_min"),
        ({"canvas_length": 9}, "canvas_length must be at most the checkpoint's 8, got 9"),
        ({"tokens": [512]}, r"canvas.tokens\[0\] must be in \[0, 512\)"),
        ({"tokens": [-2]}, r"canvas.tokens\[0\] must be"),
        ({"tokens": [3], "pinned": [1, 1]}, "canvas.pinned must have 1 entries"),
        ({"tokens": [-1], "pinned": [1]}, r"canvas.pinned\[0\] is set where canvas.tokens has None"),
        ({"tokens": [3] * 17}, "canvas.tokens has 17 entries, and the canvases of max_tokens 16 have 16 positions"),
        (
            {"allowed": "[" + "[3]," * 16 + "[3]]"},
            "canvas.allowed has 17 entries, and the canvases of max_tokens 16 have",
        ),
        ({"pinned": [1]}, "pinned is for tokens"),
        ({"allowed": [600]}, r"canvas.allowed for position 0 must name ids in \[0, 512\)"),
        ({"allowed": "[3"}, "allowed must be a value or the text of its JSON"),
        ({"tokens": [3], "start_step": 49}, r"canvas.start_step must be in \[1, 48\]"),
        ({"regex": "a", "json": "{}"}, "extra_args has regex and json"),
        ({"choice": []}, "choice: choices is empty"),
        ({"thinking_budget": 4}, "thinking_budget is for a grammar"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(options_of(extra), LIMITS, 16)


def test_without_max_tokens_the_context_is_the_room() -> None:
    limits, options = Limits(512, 8, LIMITS.defaults, context=20), options_of({"tokens": [3] * 25})
    with pytest.raises(ValueError, match="of max_model_len 20 have 24 positions"):
        check(options, limits, None)
    check(options_of({"tokens": [3] * 24}), limits, None)


def test_a_grammar_wants_the_whole_vocabulary() -> None:
    limits = Limits(512, 8, LIMITS.defaults, tensor_parallel=2)
    with pytest.raises(ValueError, match="a grammar wants tensor parallel 1"):
        check(options_of({"regex": "a+"}), limits, 16)


def test_a_seed_follows_from_the_request() -> None:
    assert seed_of("a") == seed_of("a") != seed_of("b")
    assert all(0 <= seed_of(str(number)) < 2**63 for number in range(100))


# Contents ---------------------------------------------------------------------------------------------------------


def test_contents_are_read_by_canvas_and_forgotten_with_their_request() -> None:
    contents = Contents(3, 4, 64, torch.device("cpu"))
    assert not contents.any_of([0, 1, 2])
    contents.place(0, dg.Canvas([5, None, 7, 8, 9], [True, False, False, True, True], [[5], None, [7, 8]]))
    contents.place(2, dg.Canvas(allowed=[1, 2]))
    assert contents.any_of([1, 2])
    assert contents.rules([0])
    assert not contents.rules([1])

    def window(slot: int, index: int, width: int) -> Any:
        return contents.window(torch.tensor([slot]), torch.tensor([index]), torch.tensor([width]))

    assert window(0, 0, 4).tokens.tolist() == [[5, -1, 7, 8]]
    assert window(0, 0, 4).pinned.tolist() == [[True, False, False, True]]
    assert window(0, 1, 4).tokens.tolist() == [[9, -1, -1, -1]]
    assert window(0, 1, 3).tokens.tolist() == [[8, 9, -1, -1]]  # canvases of three positions
    assert window(0, 0, 2).tokens.tolist() == [[5, -1, -1, -1]]
    assert window(0, 9, 4).tokens.tolist() == [[-1] * 4]
    rows = window(0, 0, 4).allowed_row[0].tolist()
    assert rows[1] == rows[3] == -1
    assert contents.allowed[rows[0], 0] == 1 << 5
    assert contents.allowed[rows[2], 0] == (1 << 7) | (1 << 8)
    everywhere = {row for index in (0, 5) for row in window(2, index, 4).allowed_row[0].tolist()}
    assert len(everywhere) == 1
    assert contents.allowed[everywhere.pop(), 0] == 6
    contents.place(0, dg.Canvas(tokens=[3] * 9))  # another request in the slot, with longer tables
    assert window(0, 2, 4).tokens.tolist() == [[3, -1, -1, -1]]
    assert window(0, 0, 4).allowed_row.tolist() == [[-1] * 4]
    assert window(2, 2, 4).allowed_row.tolist() == window(2, 0, 4).allowed_row.tolist()
    contents.clear(2)
    assert not contents.any_of([1, 2])
    assert window(2, 0, 4).allowed_row.tolist() == [[-1] * 4]


# A step beside the engine's ---------------------------------------------------------------------------------------

SEEDS, LENGTH = (3, 2**40, 77), 8
OPTIONS: list[dict[str, Any]] = [
    {"max_denoising_steps": 6, "entropy_bound": 4.0},
    {"max_denoising_steps": 3, "tokens": [5, -1, 7], "pinned": [1, 0, 1], "start_step": 2, "entropy_bound": 2.0},
    {"canvas_length": 5, "allowed": "[[3, 4, 300], null, [500], [9, 10, 450]]", "entropy_bound": 2.0, "t_max": 2.0},
]


class ThreadRanks:
    """Ranks that are threads of one process."""

    def __init__(self, count: int) -> None:
        self.count, self.rank = count, 0
        self._barrier, self._board = threading.Barrier(count), [None] * count

    def of(self, rank: int) -> ThreadRanks:
        one = object.__new__(ThreadRanks)
        vars(one).update(vars(self), rank=rank)
        return one

    def gather(self, tensor: Tensor) -> Tensor:
        self._board[self.rank] = tensor.clone()  # type: ignore[call-overload]
        self._barrier.wait(60)
        every = torch.stack(list(self._board))  # type: ignore[arg-type]
        self._barrier.wait(60)
        return every

    def sum(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor).sum(0)


def vocabulary_of(network: Any, begin: int, end: int, ranks: Any = None) -> Vocabulary:
    config = network.config
    return Vocabulary(
        size=config.vocab_size,
        begin=begin,
        embedding=network.weights.embed_tokens[begin:end].contiguous(),
        softcap=config.final_logit_softcapping,
        embedding_scale=network.embedding_scale,
        tolerance=network.soft_embedding_tolerance,
        max_norm=network.max_embedding_norm,
        ranks=ranks,
    )


def steps_of(vocabulary: Vocabulary, model: Any, hiddens: list[Tensor]) -> list[tuple[Rows, Tensor]]:
    """The rows and soft embeddings of the three requests after each step, from the same hidden states."""
    limits = Limits(vocabulary.size, LENGTH, model.defaults)
    requests = Requests(4, limits, "", torch.device("cpu"))
    order = [2, 0, 3]  # of the slots
    for slot, seed, extra in zip(order, SEEDS, OPTIONS, strict=True):
        requests.place(slot, "one", [1, 2], [], {**extra, "seed": seed}, 16)
    at = torch.tensor(order)
    rows, contents = requests.slots.gather(at), requests.contents
    window = contents.window(at, rows.canvas_index, rows.width)
    requests.slots.begin(rows, torch.ones(3, dtype=torch.bool), window)
    requests.slots.scatter(at, rows)
    buffers, of_shard, found = Buffers(vocabulary, 3, LENGTH), AllowedOfShard(vocabulary), []
    for hidden in hiddens:
        rows = requests.slots.gather(at)
        window = contents.window(at, rows.canvas_index, rows.width)
        pinned = window.pinned | (torch.arange(LENGTH) >= rows.width[:, None])
        masks, nonempty = contents.allowed, None
        if vocabulary.ranks is not None:
            masks, nonempty = of_shard(masks, contents.version)
        soft = torch.zeros_like(hidden)
        advance(vocabulary, buffers, hidden, rows, pinned, soft, (masks, window.allowed_row), nonempty)
        requests.slots.scatter(at, rows)
        found.append((rows, soft))
    return found


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def hidden_states(request: pytest.FixtureRequest) -> tuple[Any, list[Tensor]]:
    model = random_model(request.param)
    torch.manual_seed(5)
    width = model.config.hidden_size
    return model, [torch.randn(3, LENGTH, width).to(request.param) for _ in range(4)]


def test_a_step_is_the_engines(hidden_states: tuple[Any, list[Tensor]]) -> None:
    """Canvases, drafts, temperatures and soft embeddings, bit by bit, of requests with settings of their own: a canvas
    that is narrower than the model's is padded here, where the engine has tensors of its length."""
    model, hiddens = hidden_states
    found = steps_of(vocabulary_of(model.network, 0, 512), model, hiddens)
    for row, (seed, extra) in enumerate(zip(SEEDS, OPTIONS, strict=True)):
        options = options_of(extra)
        resolved = check(options, Limits(512, LENGTH, model.defaults), 16)
        width = resolved.canvas_length
        batch, buffers = begun(model, resolved, seed, 0, options.canvas)
        for hidden, (rows, soft) in zip(hiddens, found, strict=True):
            params = logits_params(model.network, batch.state, buffers)
            statistics, own = buffers.statistics_of(batch.state), hidden[row : row + 1, :width].contiguous()
            table = model.network.weights.embed_tokens
            vocabulary_head(own, table, **params, logits=buffers.logits, out=statistics)
            was_active = bool(batch.state.active)
            sample_and_update(model.network, batch.state, buffers, params)
            soft_embedding(model.network, batch.state, buffers, params)
            for name in ("canvas", "draft"):
                assert torch.equal(getattr(rows, name)[row, :width], getattr(batch.state, name)[0]), (row, name)
            for name in ("step", "temperature", "active", "stable_steps", "mean_entropy", "status"):
                assert torch.equal(getattr(rows, name)[row], getattr(batch.state, name)[0]), (row, name)
            if bool(batch.state.active):
                # The dense product of rows of another number may add up in another order.
                bound = 0.0 if width == LENGTH else 1e-6 if hidden.dtype == torch.float32 else 2.0**-8
                torch.testing.assert_close(soft[row, :width], batch.state.soft_embedding[0], rtol=bound, atol=bound)
            assert was_active or not bool(rows.active[row])
    assert [bool(active) for active in found[-1][0].active] == [True, False, True]


@pytest.mark.parametrize("cut", [256, 96, 480])
def test_ranks_come_to_the_same_canvases(cut: int, hidden_states: tuple[Any, list[Tensor]]) -> None:
    """Two shards of the vocabulary, in two threads. The logits are those of one rank, so the draws are too."""
    model, hiddens = hidden_states
    alone = steps_of(vocabulary_of(model.network, 0, 512), model, hiddens)
    ranks, found = ThreadRanks(2), {}

    def run(rank: int, begin: int, end: int) -> None:
        found[rank] = steps_of(vocabulary_of(model.network, begin, end, ranks.of(rank)), model, hiddens)

    threads = [threading.Thread(target=run, args=one) for one in ((0, 0, cut), (1, cut, 512))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A rank's part is rounded to the dtype, and in bf16 the masses of shards are those of logits that are not rounded.
    tolerance = 1e-5 if hiddens[0].dtype == torch.float32 else 0.06
    for step, (rows, soft) in enumerate(alone):
        for rank in (0, 1):
            of_rank, soft_of_rank = found[rank][step]
            for name in ("canvas", "draft", "step", "active", "status", "temperature"):
                assert torch.equal(getattr(rows, name), getattr(of_rank, name)), (step, rank, name)
            running = rows.active[:, None, None] & torch.ones_like(soft, dtype=torch.bool)
            scale = float(soft[running].abs().max())
            torch.testing.assert_close(soft_of_rank[running], soft[running], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("begin", "count"), [(0, 96), (32, 64), (40, 60), (7, 25), (95, 5), (3, 97), (31, 1)])
def test_a_rank_s_part_of_a_mask(begin: int, count: int) -> None:
    """Also where it begins or ends inside a word, and where the ids around it are allowed."""
    generator = torch.Generator().manual_seed(begin)
    sets = [torch.nonzero(torch.rand(100, generator=generator) < 0.5).flatten().tolist() for _ in range(4)]
    sets += [[v for v in range(100) if not begin <= v < begin + count] or [begin], list(range(100))]
    vocabulary = Vocabulary(100, begin, torch.zeros(count, 4), 0.0, 1.0, 0.0, 1.0)
    own, some = AllowedOfShard(vocabulary)(denoise.pack_allowed(sets, 100), 1)
    for row, ids in enumerate(sets):
        wanted = [v - begin for v in ids if begin <= v < begin + count]
        assert bool(some[row]) is bool(wanted)
        assert torch.equal(own[row], denoise.pack_allowed([wanted or [0]], count)[0])


def test_answers_that_share_a_seed() -> None:
    limits = Limits(512, LENGTH, GenerationDefaults())
    requests = Requests(2, limits, "", torch.device("cpu"))

    def seed(request_id: str, extra: dict[str, Any]) -> int:
        requests.place(0, request_id, [5], [], extra, 8)
        return int(requests.slots.gather(torch.tensor([0])).seed)

    assert [seed(f"{n}_cmpl-1", {"seed": 2**63 - 1, "dgemma_answers": 3}) for n in range(3)] == [2**63 - 1, 0, 1]
    assert seed("7_of_the_user", {"seed": 5}) == 5
    assert seed("0_cmpl-1", {}) != seed("1_cmpl-1", {})


def test_what_only_the_prompt_forbids_ends_the_answer(tokenizer_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error in a worker would end the engine for all of its requests."""
    limits = Limits(512, LENGTH, GenerationDefaults(eos_token_ids=(7,), pad_token_id=0))
    requests = Requests(2, limits, str(tokenizer_folder), torch.device("cpu"))
    requests.place(1, "one", [5, 6], [], {"regex": "a{40}", "canvas_length": 5}, 32)
    assert "request one ends without an answer: max_new_tokens is 32" in caplog.text
    at = torch.tensor([1])
    rows = requests.slots.gather(at)
    window = requests.contents.window(at, rows.canvas_index, rows.width)
    assert (window.tokens[0, :5].tolist(), window.pinned[0, :5].tolist()) == ([7] * 5, [True] * 5)
    assert int(rows.max_steps) == 1
    assert not requests.has_grammar(1)


def test_a_grammar_holds_a_slot_and_a_preempted_one_goes_on(tokenizer_folder: Any) -> None:
    limits = Limits(512, LENGTH, GenerationDefaults(eos_token_ids=(1,), pad_token_id=0))
    requests = Requests(2, limits, str(tokenizer_folder), torch.device("cpu"))
    requests.place(1, "one", [5, 6], [], {"regex": "[ab]{12,}"}, 32)
    assert requests.has_grammar(1)
    assert not requests.has_grammar(0)
    first = requests.constraint(1, 0, LENGTH)
    assert first.tokens_left == 24
    letters = Tokenizer.from_directory(tokenizer_folder).encode("abab")
    assert first.grammar.walk(first.state, letters) not in (first.state, FAILED)
    letters = [*letters, *letters[:1] * (LENGTH - len(letters))]
    requests.place(1, "one", [5, 6], letters, {"regex": "[ab]{12,}"}, 32)
    assert int(requests.slots.gather(torch.tensor([1])).canvas_index) == 1
    assert requests.constraint(1, 1, LENGTH).state == first.grammar.walk(first.state, letters)
    requests.clear(1)
    assert not requests.has_grammar(1)


# Experts ----------------------------------------------------------------------------------------------------------


def test_ranks_of_expert_parallelism_add_up_to_all_experts() -> None:
    torch.manual_seed(1)
    hidden, gate_up, down = torch.randn(9, 16), torch.randn(6, 24, 16), torch.randn(6, 16, 12)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64)
    ids[0, 0] = -1  # no expert, on every rank
    whole = grouped_gemm.moe_ffn(hidden, ids.int(), weights.float(), gate_up, down)
    total = torch.zeros_like(whole)
    for own in ([0, 2, 5], [1, 3, 4]):
        places = torch.full((6,), -1, dtype=torch.int32)
        places[own] = torch.arange(3, dtype=torch.int32)
        part = torch.full_like(whole, float("nan"))
        experts_product(hidden, ids, weights, gate_up[own].contiguous(), down[own].contiguous(), places, part)
        total += part
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4", "nvfp4"])
def test_experts_quantized_at_loading_are_those_of_the_engine(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    hidden, gate_up, down = torch.randn(5, 64), torch.randn(4, 128, 64), torch.randn(4, 64, 64)
    ids, weights = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]]), torch.rand(5, 2)
    monkeypatch.setenv("DGEMMA_VLLM_EXPERTS", format)
    target = experts_target()
    assert target is not None
    made = quantized_experts(gate_up, down, target)
    assert [one.name for one in made] == [format] * 2
    out = torch.full_like(hidden, float("nan"))
    experts_product(hidden, ids, weights, *made, None, out)
    decoded = [torch.stack([one.expert(e).dequantized(torch.float32) for e in range(4)]) for one in made]
    exact = grouped_gemm.moe_ffn(hidden, ids.int(), weights, *decoded)
    # By int8 the activations are rounded too, to 1/127 of the largest.
    bound = 0.03 if format == "int8" else 1e-4
    assert float((out - exact).norm() / exact.norm()) < bound
    unquantized = grouped_gemm.moe_ffn(hidden, ids.int(), weights, gate_up, down)
    assert 1e-3 < float((out - unquantized).norm() / unquantized.norm()) < 0.4


def test_a_format_of_experts_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_VLLM_EXPERTS", "fp9")
    with pytest.raises(ValueError, match="DGEMMA_VLLM_EXPERTS"):
        experts_target()
    monkeypatch.setenv("DGEMMA_VLLM_EXPERTS", "nvfp4")
    target = experts_target()
    assert target is not None
    with pytest.raises(ValueError, match="no group of it divides the 24 columns of down"):
        quantized_experts(torch.randn(1, 48, 32), torch.randn(1, 32, 24), target)
