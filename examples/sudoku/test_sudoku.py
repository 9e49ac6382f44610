"""Checks of the example itself: pytest examples/sudoku (needs transformers)."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

import checkpoint
import evaluate
import puzzles
import sampling
import tokenizer
import train
from optimizer import orthogonalize


@pytest.mark.parametrize(("size", "clues"), [(6, 14), (9, 36)])
def test_puzzles_have_the_clues_asked_for_and_one_solution(size: int, clues: int) -> None:
    rng = random.Random(1)
    for _ in range(10):
        puzzle = puzzles.generate(size, clues, rng)
        assert puzzle.clues == clues
        found = puzzles.solutions(puzzles.from_text(puzzle.text), limit=3)
        assert [puzzles.to_text(cells) for cells in found] == [puzzle.solution]


def test_impossible_numbers_of_clues_end_the_script_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for clues in ("-1", "7", "37", "100"):
        monkeypatch.setattr("sys.argv", ["puzzles.py", "--size", "6", "--clues", clues])
        with pytest.raises(SystemExit) as left:
            puzzles.main()
        assert left.value.code == 2
        assert f"error: clues must be an integer in [8, 37), got {clues}" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_puzzles() -> None:
    assert puzzles.held_out(6, (10, 22), 3) == puzzles.held_out(6, (10, 22), 3)
    assert puzzles.held_out(6, (10, 22), 3) != puzzles.held_out(6, (10, 22), 3, seed=1)


def test_an_empty_grid_has_many_solutions() -> None:
    assert len(puzzles.solutions([0] * 36, limit=5)) == 5


def test_check_wants_every_unit_whole_and_every_clue_kept() -> None:
    puzzle = puzzles.generate(6, 20, random.Random(2))
    assert puzzles.check(puzzle.solution + "\n", puzzle.text)
    assert not puzzles.check(puzzle.solution[:-1], puzzle.text)
    assert not puzzles.check(puzzle.text, puzzle.text)
    other = puzzles.generate(6, 20, random.Random(3))
    assert not puzzles.check(other.solution, puzzle.text)
    swapped = puzzle.solution.translate(str.maketrans("12", "21"))  # a whole grid, but with other clues
    assert puzzles.check(swapped, "." * 36)
    assert not puzzles.check(swapped, puzzle.text)
    broken = puzzle.solution[1] + puzzle.solution[0] + puzzle.solution[2:]
    assert not puzzles.check(broken, "." * 36)


@pytest.mark.parametrize(("size", "blanks"), [(6, (10, 22)), (9, (25, 47))])
def test_training_puzzles_are_still_unique_after_their_symmetry(
    size: int, blanks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "BASE_PUZZLES", 5)
    solutions, blank = train.PuzzleStream(size, blanks, seed=0).batch(8)
    for cells, open_cells in zip(solutions, blank, strict=True):
        assert blanks[0] <= open_cells.sum() <= blanks[1]
        puzzle = np.where(open_cells, 0, cells).tolist()
        assert puzzles.solutions(puzzle, limit=2) == [cells.tolist()]


def test_the_expression_of_rows_takes_the_solution_and_no_digit_twice_in_a_row() -> None:
    for puzzle in puzzles.held_out(9, (35, 45), 5):
        expression = evaluate.rows_expression(puzzle.text)
        assert re.fullmatch(expression, puzzle.solution)
        clue = next(cell for cell in range(81) if puzzle.text[cell] != puzzles.BLANK)
        other = "1" if puzzle.solution[clue] != "1" else "2"
        assert not re.fullmatch(expression, puzzle.solution[:clue] + other + puzzle.solution[clue + 1 :])
        row = min(range(0, 81, 9), key=lambda start: puzzle.text[start : start + 9].count(puzzles.BLANK))
        blank = puzzle.text.index(puzzles.BLANK, row)
        taken = puzzle.solution[blank - 1 if blank % 9 else blank + 1]
        assert not re.fullmatch(expression, puzzle.solution[:blank] + taken + puzzle.solution[blank + 1 :])


def test_the_tokenizer_spells_any_text_and_keeps_the_published_ids() -> None:
    text = tokenizer.build()
    for sample in ("53..7....", "héllo\tusers, 🙂 models", "".join(map(chr, range(1, 256)))):
        assert text.decode(text.encode(sample, add_special_tokens=False).ids) == sample
    assert sampling.prompt_ids(text, " 12 ")[:2] == [2, 105]
    assert sampling.prompt_ids(text, "1")[-5:] == [106, 107, 105, text.token_to_id("model"), 107]


def test_the_chat_template_writes_the_published_turns() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(tokenizer.CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi "}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    history = "<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    rendered = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert rendered == "<bos><|turn>system\nBe brief.<turn|>\n" + history
    thinking = template.render(messages=messages[1:], bos_token="<bos>", add_generation_prompt=True, enable_thinking=1)
    assert thinking == "<bos><|turn>system\n<|think|>\n<turn|>\n" + history


@pytest.fixture(scope="module")
def model() -> DiffusionGemmaForBlockDiffusion:
    torch.manual_seed(0)
    settings = checkpoint.config_dictionary(6, sliding_window=20)
    model = DiffusionGemmaForBlockDiffusion(checkpoint.transformers_config(settings)).train(False)
    for layer in model.model.decoder.layers:
        layer.layer_scalar.fill_(0.5)
    return model


def test_the_short_passes_equal_the_whole_model(model: DiffusionGemmaForBlockDiffusion) -> None:
    prompts, canvas = torch.randint(384, (2, 45)), torch.randint(384, (2, 37))
    conditioning = torch.randn(2, 37, 384)
    with torch.no_grad():
        whole = model(input_ids=prompts, decoder_input_ids=canvas, self_conditioning_logits=conditioning).logits
        prefix = sampling.encode(model, prompts)
        short = sampling.denoise(model, canvas, prefix, conditioning)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-5)


def test_dense_experts_equal_the_model_s_own(model: DiffusionGemmaForBlockDiffusion) -> None:
    experts = model.model.decoder.layers[0].experts
    hidden = torch.randn(50, experts.hidden_dim)
    weights, index = torch.rand(50, 4).topk(2)
    with torch.no_grad():
        expected = experts(hidden, index, weights)
        torch.testing.assert_close(train.dense_experts(experts, hidden, index, weights), expected)


def test_a_saved_checkpoint_holds_the_published_names_and_loads(
    model: DiffusionGemmaForBlockDiffusion, tmp_path: Path
) -> None:
    checkpoint.save_settings(tmp_path, checkpoint.config_dictionary(6, sliding_window=20))
    tensors = checkpoint.published_tensors(model)
    checkpoint.save_weights(tmp_path, tensors)
    assert not any("vision" in name or "lm_head" in name for name in tensors)
    assert sum(name.startswith("model.encoder") for name in tensors) == len(model.model.decoder.layers)
    loaded = checkpoint.load(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name].bfloat16(), tensor) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]
    prompt = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "12"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.build().encode(prompt, add_special_tokens=False).ids == sampling.prompt_ids(
        tokenizer.build(), "12"
    )


def test_orthogonalize_brings_the_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 20)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_acceptance_stops_after_the_position_that_passes_the_bound() -> None:
    processed = torch.full((200, 5, 64), -30.0)
    processed[:, :3, 1] = 30.0  # certain
    processed[:, 3, :2] = 0.0  # entropy log 2: accepted, because the sum before it is within the bound
    processed[:, 4, :4] = 0.0  # entropy log 4: not accepted
    torch.manual_seed(0)
    canvas, argmax, entropies = sampling.next_canvas(processed, entropy_bound=0.1)
    assert (canvas[:, :3] == 1).all()
    assert (argmax[:, :3] == 1).all()
    assert set(canvas[:, 3].tolist()) == {0, 1}
    assert canvas[:, 4].unique().numel() > 20
    torch.testing.assert_close(entropies[0, 3:], torch.tensor([2.0, 4.0]).log())
