"""The operators of automata, against enumeration of all canvases in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dgemma_ext as dg
from automaton_cases import Small, random_automaton, small, step
from backend import BACKEND, cpu_only, not_on_test_bed, skip_if_on_device
from denoise_cases import bits
from dgemma_ext.ops import automaton, denoise
from grammar_cases import TEXTS, VOCABULARY, compiled, spelled
from reference import automaton as reference

VOCABULARY_SIZE, LENGTH = 5, 4
# The test bed has a file of its own for the rest: test_automaton_cuda.py.
AUTOMATA = 32 if BACKEND == "sim" else 160


def random_case(seed: int) -> tuple[Small, torch.Tensor, int, int, torch.Tensor]:
    """An automaton, logits [1, L, V], a state, tokens left, uniforms [1, L]."""
    random = np.random.default_rng(seed)
    one = random_automaton(random, VOCABULARY_SIZE)
    # Flat, peaked, and so far apart that a path's probability is no normal double.
    scale = [0.5, 3.0, 40.0, 400.0][seed % 4]
    logits = torch.from_numpy(random.standard_normal((1, LENGTH, VOCABULARY_SIZE)) * scale).float()
    uniforms = torch.from_numpy(random.random((1, LENGTH)))
    return one, logits, int(random.integers(one.states)), int(random.integers(3)), uniforms


def ends_of(one: Small, left: int) -> set[int]:
    return {q for q in range(one.states) if one.tables[9][q] <= left}


@pytest.mark.parametrize("closes", [False, True])
def test_random_automata_against_enumeration(closes: bool) -> None:
    """closes: states have parts that are open, which must be closed within some tokens of the canvas, or before it."""
    counts = {0: 0, 1: 0}
    for seed in range(AUTOMATA):
        one, logits, state, left, uniforms = random_case(seed)
        given, closing_left = {}, LENGTH
        if closes:
            random = np.random.default_rng(seed)
            one.closing = random.integers(0, 4, one.states).astype(np.int32)
            closing_left = int(random.integers(-1, LENGTH + 3))
            given = {"closing_left": [closing_left]}
        number = 4 if closes else 1  # of four steps: where s is small, the entropy given acceptance shows
        out = step([one], logits, [state], [left], uniforms, step=torch.tensor([number], dtype=torch.int32), **given)
        open_in = np.zeros(one.states) if one.closing is None else one.closing
        wanted = reference.conditioned(
            logits[0].double().numpy(),
            one.arcs_of,
            state,
            ends_of(one, left),
            lambda i, q, open_in=open_in, end=closing_left: open_in[q] == 0 or open_in[q] <= end - i,
        )
        counts[int(out["matches"])] += 1
        if wanted is None:
            assert int(out["matches"]) == 0, seed
            assert bits(out["entropy"]) == bits(out["own"])
            continue
        assert int(out["matches"]) == 1, seed
        key = np.maximum(wanted.entropy, (5 - number) / 4 * out["own"][0].double().numpy())
        np.testing.assert_allclose(out["entropy"][0].numpy(), key, atol=2e-6, rtol=2e-6, err_msg=f"seed {seed}")
        draft = out["argmax"][0].tolist()
        of = {tuple(word): p for word, p in zip(wanted.words.tolist(), wanted.probability, strict=True)}
        assert of[tuple(draft)] >= wanted.probability.max() * (1 - 1e-6), seed
        sampled = out["sampled"][0].tolist()
        expected = reference.drawn(wanted, uniforms[0].numpy(), one.class_order(), one.arcs_of, state)
        assert sampled == expected, seed
    assert counts[0] > AUTOMATA // 16 < counts[1]


def test_the_key_and_the_marginals() -> None:
    """The key is max(H given acceptance, s H), exactly so; H alone shows where s H is small."""
    for seed in range(AUTOMATA // 3):
        one, logits, state, left, _ = random_case(4 * seed)
        wanted = reference.conditioned(logits[0].double().numpy(), one.arcs_of, state, ends_of(one, left))
        if wanted is None:
            continue
        for number in (1, 2, 4):
            out = step([one], logits, [state], [left], step=torch.tensor([number], dtype=torch.int32))
            share = (4 - number + 1) / 4
            key = np.maximum(wanted.entropy, share * out["own"][0].double().numpy())
            np.testing.assert_allclose(out["entropy"][0].numpy(), key, atol=2e-6, rtol=2e-6)


def test_class_statistics() -> None:
    one = small(np.array([[0, 0, 1, -1, 1, 0, 1], [1, 1, 0, -1, 0, 1, -1]]), [0, 0])
    raw = torch.tensor([[[3.0, 3.0, -2.0, 99.0, 700.0, 1.0, 5.0]]]).bfloat16()
    allowed = automaton_mask([0, 1, 2, 3, 4, 5])
    out = step(
        [one], raw, [0], [9], softcap=30.0, temperature=torch.tensor([0.5]), allowed=allowed,
        allowed_row=torch.zeros(1, 1, dtype=torch.int32),
    )  # fmt: skip
    z = [60 * math.tanh(v / 30) for v in (3.0, 3.0, -2.0, 99.0, 700.0, 1.0)]
    for tokens in ([0, 1, 5], [2, 4], [3]):
        k = int(one.tables[0][tokens[0]])
        top = max(z[t] for t in tokens)
        assert float(out["class_max"][0, 0, k]) == pytest.approx(top, rel=1e-6)
        assert int(out["class_argmax"][0, 0, k]) == max(tokens, key=lambda t: (raw[0, 0, t].item(), -t))
        mass = sum(math.exp(z[t] - top) for t in tokens)
        assert float(out["class_mass"][0, 0, k]) == pytest.approx(mass, rel=1e-6)
        shifted = sum(math.exp(z[t] - top) * (z[t] - top) for t in tokens)
        assert float(out["class_shifted"][0, 0, k]) == pytest.approx(shifted, rel=1e-5, abs=1e-6)
    k = int(one.tables[0][6])
    assert [float(out[name][0, 0, k]) for name in ("class_max", "class_argmax", "class_mass")] == [-math.inf, -1, 0]


def automaton_mask(ids: list[int]) -> torch.Tensor:
    return denoise.pack_allowed([ids], 7)


@pytest.mark.parametrize("share", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_statistics_over_many_tiles(dtype: torch.dtype, share: float, cpu_variant: str) -> None:
    """share: of the class that most tokens have. Rising and falling logits, so that its maximum moves late and early;
    bfloat16 has many ties."""
    random, vocabulary, kinds = np.random.default_rng(3), 1000, 40
    classes = np.where(random.random(vocabulary) < share, 7, random.integers(1, kinds, vocabulary))
    one = small(np.where(classes == np.arange(kinds)[:, None], 0, -1), [0] * kinds)
    slope = np.linspace(-60, 60, vocabulary) * np.array([1, -1, 0.02])[:, None]
    raw = torch.from_numpy(random.standard_normal((3, vocabulary)) * 3 + slope).to(dtype)[None]
    absent = set(range(100, 400)) | set(np.nonzero(classes == 11)[0].tolist())
    mask = denoise.pack_allowed([sorted(set(range(vocabulary)) - absent)], vocabulary)
    out = step(
        [one], raw, [0], [9], softcap=30.0, temperature=torch.tensor([0.7]), allowed=mask,
        allowed_row=torch.tensor([[-1, 0, 0]], dtype=torch.int32),
    )  # fmt: skip
    z = 30 / 0.7 * torch.tanh(raw[0].double() / 30)
    for row in range(3):
        allowed = [token for token in range(vocabulary) if row == 0 or token not in absent]
        for k in range(one.num_classes):
            tokens = [token for token in allowed if one.tables[0][token] == k]
            found = [out[name][0, row, k].item() for name in ("class_max", "class_argmax", "class_mass")]
            if not tokens:
                assert found == [-math.inf, -1, 0]
                continue
            best = max(tokens, key=lambda token: (raw[0, row, token].item(), -token))
            top = float(z[row, best])
            below = z[row, tokens] - top
            mass, shifted = float(below.exp().sum()), float((below.exp() * below).sum())
            assert found[1] == best
            assert found[0] == pytest.approx(top, rel=1e-6, abs=1e-6)
            assert found[2] == pytest.approx(mass, rel=1e-5)
            assert float(out["class_shifted"][0, row, k]) == pytest.approx(shifted, rel=2e-5, abs=2e-5)


def test_ties_of_the_draft_go_to_the_lowest_id() -> None:
    # Every token is as good as any; 4 and 1 lead to other states, which accept all.
    delta = np.array([[2, 1, 2, 1, 0], [1] * 5, [2] * 5])
    out = step([small(delta, [0, 0, 0])], torch.zeros(1, 3, 5), [0], [0])
    assert out["argmax"][0].tolist() == [0, 0, 0]
    out = step([small(delta, [9, 0, 9])], torch.zeros(1, 3, 5), [0], [0])
    assert out["argmax"][0].tolist() == [1, 0, 0]


def test_products_far_below_a_double() -> None:
    """256 positions whose accepted tokens lie 150 below the others: e^-38,400, and the draft and the draw are exact."""
    length, vocabulary = 256, 6
    delta = np.array([[1, -1, -1, -1, -1, 0], [-1, 0, -1, -1, -1, -1]])
    one = small(delta, [0, 9])
    logits = torch.full((1, length, vocabulary), 75.0)
    logits[0, :, [0, 1, 5]] = -75.0
    out = step([one], logits, [0], [0])
    assert int(out["matches"]) == 1
    for name in ("sampled", "argmax"):
        state = 0
        for token in out[name][0].tolist():
            state = one.arcs_of[(state, token)]
        assert state == 0
    assert bool(torch.isfinite(out["entropy"]).all())
    # The number of 5s: each (0, 1) takes two positions at the same score a token.
    assert 5 in out["sampled"][0].tolist()
    assert 0 in out["sampled"][0].tolist()


@not_on_test_bed
@pytest.mark.parametrize("seed", [2, 4, 5, 8, 10, 13])
def test_joint_draws_have_the_distribution(seed: int) -> None:
    one, logits, state, left, _ = random_case(seed)
    wanted = reference.conditioned(logits[0].double().numpy(), one.arcs_of, state, ends_of(one, left))
    assert wanted is not None
    count = 4000
    uniforms = torch.rand(count, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = step([one] * count, logits.expand(count, -1, -1).contiguous(), [state] * count, [left] * count, uniforms)
    codes = [5**i for i in range(LENGTH)]
    seen = np.bincount(out["sampled"].numpy() @ codes, minlength=5**LENGTH)
    words = wanted.words @ np.array(codes)
    assert seen.sum() == seen[words].sum(), "a canvas that is not accepted"
    expected = wanted.probability * count
    usual = expected > 5
    chi = ((seen[words] - expected)[usual] ** 2 / expected[usual]).sum()
    freedom = max(int(usual.sum()) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_a_request_is_alike_alone_and_in_a_batch() -> None:
    cases = [random_case(seed) for seed in range(24)]
    numbers = list(range(len(cases)))
    automata = [None if n % 5 == 0 else case[0] for n, case in enumerate(cases)]
    logits = torch.cat([case[1] for case in cases])
    whole = step(automata, logits, [c[2] for c in cases], [c[3] for c in cases], numbers=numbers)
    for n, case in enumerate(cases):
        alone = step([automata[n]], case[1], [case[2]], [case[3]], numbers=[n])
        for name in ("argmax", "entropy", "chosen_class", "remainder", "matches", "sampled"):
            assert bits(alone[name][0]) == bits(whole[name][n]), (n, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_automaton_that_allows_all_gives_the_bits_of_none(dtype: torch.dtype) -> None:
    vocabulary, length = 700, 12
    torch.manual_seed(3)
    logits = (torch.randn(1, length, vocabulary) * torch.linspace(0.2, 9, length)[:, None]).to(dtype)
    one, uniforms = small(np.zeros((1, vocabulary), dtype=int), [0]), torch.rand(1, length, dtype=torch.float64)
    free, ruled = (step([which], logits, [0], [0], uniforms, softcap=30.0) for which in (None, one))
    for name in ("argmax", "entropy", "sampled"):
        assert bits(free[name]) == bits(ruled[name]), name
    assert bits(ruled["remainder"]) == bits(uniforms)
    assert free["matches"].tolist() == [-1]


def test_pinned_positions_rule_the_others() -> None:
    # 0 1 alternate; which begins is free.
    one = small(np.array([[1, 2], [-1, 2], [1, -1]]), [0, 0, 0])
    logits = torch.tensor([[[9.0, -9.0]] * 4])
    pinned = torch.tensor([[False, False, True, False]])
    canvas = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)
    out = step([one], logits, [0], [0], pinned=pinned, canvas=canvas)
    assert [out[name][0, i].item() for name in ("argmax", "sampled") for i in (0, 1, 3)] == [1, 0, 0] * 2
    both = torch.tensor([[False, True, True, False]])
    canvas = torch.tensor([[0, 1, 1, 0]], dtype=torch.int32)
    assert step([one], logits, [0], [0], pinned=both, canvas=canvas)["matches"].tolist() == [0]


def test_entropies_that_are_not_finite_are_left() -> None:
    one = small(np.zeros((1, 5), dtype=int), [0])
    logits = torch.zeros(3, 3, 5)
    logits[0, 1, 2] = math.nan
    logits[1, 1] = math.nan  # no token of the class is left
    out = step([one] * 3, logits, [0] * 3, [0] * 3)
    assert out["matches"].tolist() == [1, 1, 1]
    assert out["entropy"][:2, 1].isnan().all()
    assert out["chosen_class"][:2].flatten().tolist() == [-1] * 6
    assert not out["entropy"][2].isnan().any()


def test_grammars_over_canvases() -> None:
    """A JSON schema over two canvases: the state goes on, and the text closes where no token is left."""
    grammar = compiled(dg.JsonSchema({"type": "array", "items": {"type": "string"}}))
    vocabulary, length = len(VOCABULARY.string_of_id), 12
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        state, tokens = grammar.start, list[int]()
        for canvas in range(2):
            logits = torch.randn(1, length, vocabulary, generator=generator) * (1 + 4 * (seed % 3))
            logits[0, :, spelled("]")] = -60.0
            out = step([grammar], logits, [state], [length * (1 - canvas)])
            for name in ("sampled", "argmax"):
                assert grammar.walk(state, out[name][0].tolist()) >= 0, name
            state = grammar.walk(state, out["argmax"][0].tolist())
            tokens += out["argmax"][0].tolist()
        text = b"".join(TEXTS[t] or b"" for t in tokens if t < len(TEXTS))
        assert text.endswith(b"]")
        assert grammar.distance[state] == 0
    longer = compiled(dg.Choice(["zqz"]))
    for left, matches in ((2, 1), (1, 0)):  # the shortest text has three tokens
        out = step([longer], logits[:, :1].contiguous(), [longer.start], [left])
        assert out["matches"].tolist() == [matches]


BAD = {
    "a state outside": ("state", {"state": [4]}),
    "a step beyond the cap": ("step", {"step": torch.tensor([5], dtype=torch.int32)}),
    "a uniform of one": ("uniforms", {"uniforms": torch.ones(1, 2, dtype=torch.float64)}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str) -> None:
    skip_if_on_device(what, set(BAD))
    name, change = BAD[what]
    one = small(np.zeros((1, 5), dtype=int), [0])
    given = {"state": [0], "tokens_left": [0], **change}
    with pytest.raises(ValueError, match=rf"{name}: got .*wants"):
        step([one], torch.zeros(1, 2, 5), **given)


@cpu_only
@pytest.mark.parametrize("table", [*range(9), 10, 11])  # no value of `distance` is out of range
def test_an_arena_that_points_outside_is_refused(table: int) -> None:
    one = small(np.zeros((1, 5), dtype=int), [0])
    tables = [part.copy() for part in one.tables]
    tables[table][-1] = 77
    spoilt = Small(one.arcs_of, one.states, one.num_classes, tuple(tables))
    with pytest.raises(ValueError, match=r"arena: got 77|descriptor: got"):
        step([spoilt], torch.zeros(1, 2, 5), [0], [0])


def test_the_same_automaton_is_held_once() -> None:
    one, other = small(np.zeros((1, 5), dtype=int), [0]), small(np.zeros((1, 5), dtype=int), [0])
    assert (
        automaton.pack_automata([one, None, one]).arena.numel() * 2
        == automaton.pack_automata([one, other]).arena.numel()
    )
    assert automaton.pack_automata([None]).descriptor.abs().sum() == 0
