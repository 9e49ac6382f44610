"""The CUDA kernels of the automata, run on the host by the test bed in several orders, with races and ends of memory
watched: against enumeration, against the CPU's operators, and against themselves in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import automaton_library
from automaton_cases import Small, small, step
from automaton_library import SEEDS, kernels
from denoise_cases import bits
from dgemma_ext.ops.automaton import pack_automata
from reference import automaton as reference
from sim.build import SUPPORTED
from test_automaton import ends_of, random_case

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the test bed needs x86-64 and g++")

WRITTEN = ("argmax", "entropy", "chosen_class", "remainder", "matches", "sampled")
STATISTICS = ("class_max", "class_argmax", "class_mass", "class_shifted")


def chain_of(states: int, vocabulary: int, seed: int, targets: int = 3) -> Small:
    """A random automaton whose states lead to few others, each by many tokens; the last state ends."""
    random = np.random.default_rng(seed)
    leads_to = random.integers(0, states, (states, targets))
    delta = np.take_along_axis(leads_to, random.integers(0, targets, (states, vocabulary)), 1)
    delta[:, 0] = -1
    return small(delta, [int(d) for d in random.integers(0, 3, states)])


def agree(ours: dict[str, torch.Tensor], cpus: dict[str, torch.Tensor]) -> None:
    """Masses of classes within fp32 rounding, what they add up to as well; choices the same."""
    for name in ("class_argmax", "argmax", "matches", "sampled", "chosen_class"):
        assert bits(ours[name]) == bits(cpus[name]), name
    for name in ("class_max", "class_mass", "entropy"):
        torch.testing.assert_close(ours[name], cpus[name], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(ours["class_shifted"], cpus["class_shifted"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["remainder"], cpus["remainder"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_automata_against_enumeration(seed: int) -> None:
    """A batch of automata, of which some accept nothing and some requests have none or are not active."""
    cases = [random_case(20 * seed + n) for n in range(16)]
    automata = [None if n % 8 == 7 else case[0] for n, case in enumerate(cases)]
    active = torch.tensor([n % 8 != 6 for n in range(len(cases))])
    logits, uniforms = (torch.cat([case[index] for case in cases]) for index in (1, 4))
    states, left = [case[2] for case in cases], [case[3] for case in cases]
    out = step(automata, logits, states, left, uniforms, active=active, on=kernels(seed))
    none = 0
    for n, (one, rows, state, tokens, draws) in enumerate(cases):
        if n % 8 >= 6:
            assert int(out["matches"][n]) == -1, "written"
            continue
        wanted = reference.conditioned(rows[0].double().numpy(), one.arcs_of, state, ends_of(one, tokens))
        assert int(out["matches"][n]) == int(wanted is not None)
        if wanted is None:
            none += 1
            assert bits(out["entropy"][n]) == bits(out["own"][n])
            continue
        key = np.maximum(wanted.entropy, out["own"][n].double().numpy())
        np.testing.assert_allclose(out["entropy"][n].numpy(), key, atol=2e-6, rtol=2e-6, err_msg=f"case {n}")
        of = {tuple(word): p for word, p in zip(wanted.words.tolist(), wanted.probability, strict=True)}
        assert of[tuple(out["argmax"][n].tolist())] >= wanted.probability.max() * (1 - 1e-6)
        expected = reference.drawn(wanted, draws[0].numpy(), one.class_order(), one.arcs_of, state)
        assert out["sampled"][n].tolist() == expected, n
    assert none > 0


def test_every_order_gives_the_same_bits_alone_and_in_a_batch() -> None:
    """Of requests of different sizes, one of them with more states than a block has threads."""
    length, vocabulary = 6, 300
    automata = [chain_of(700, vocabulary, 1), chain_of(3, vocabulary, 2), None, chain_of(40, vocabulary, 3, 12)]
    logits = (torch.randn(4, length, vocabulary) * 3).bfloat16()
    given: dict[str, Any] = {"softcap": 30.0, "temperature": torch.linspace(0.4, 0.8, 4)}
    numbers, left = [0, 1, 2, 3], [9, 9, 9, 9]
    found = [
        step(automata, logits, [5, 0, 0, 7], left, numbers=numbers, on=kernels(seed, capability), **given)
        for seed, capability in zip(SEEDS, (80, 90, 120), strict=True)
    ]
    for name in (*WRITTEN, *STATISTICS):
        assert bits(found[0][name]) == bits(found[1][name]) == bits(found[2][name]), name
    for n, state in ((0, 5), (1, 0), (3, 7)):
        alone = step(
            *([automata[n]], logits[n : n + 1].contiguous(), [state], [9]), numbers=[n], on=kernels(4),
            **{**given, "temperature": given["temperature"][n : n + 1].contiguous()},
        )  # fmt: skip
        for name in WRITTEN:
            assert bits(alone[name][0]) == bits(found[0][name][n]), (n, name)
    agree(found[0], step(automata, logits, [5, 0, 0, 7], left, numbers=numbers, **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_draws_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """Rows with allowed ids, a pinned position, a vocabulary that ends inside a tile, ties and masses far apart."""
    length, vocabulary = 5, 1001
    torch.manual_seed(1)
    one = chain_of(30, vocabulary, 9)
    logits = torch.randn(1, length, vocabulary) * torch.tensor([0.1, 2, 9, 30, 200])[:, None]
    logits[0, 1, 500:] = logits[0, 1, 0]
    logits = logits.to(dtype)
    allowed = torch.randint(-(2**31), 2**31, (2, -(-vocabulary // 32)), dtype=torch.int64).int()
    given: dict[str, Any] = {"allowed": allowed, "allowed_row": torch.tensor([[-1, -1, 0, 1, -1]], dtype=torch.int32)}
    given |= {"pinned": torch.tensor([[False, False, False, False, True]]), "softcap": 30.0}
    canvas = torch.full((1, length), 77, dtype=torch.int32)
    for seed in SEEDS:
        ours = step([one], logits, [3], [9], canvas=canvas, on=kernels(seed), **given)
        agree(ours, step([one], logits, [3], [9], canvas=canvas, **given))


def test_sums_over_many_tokens() -> None:
    """Of 50,000, most of one class: its sums are made in registers, the others' in two words with a carry."""
    vocabulary = 50_000
    delta = np.where(np.arange(vocabulary) % 16 == 0, np.arange(vocabulary) % 3, 1)[None].repeat(3, 0)
    delta[0, ::7] = 2
    one, logits = small(delta, [0, 0, 0]), (torch.randn(1, 2, vocabulary) * 0.2).bfloat16()
    ours, cpus = (step([one], logits, [0], [0], **on) for on in ({"on": kernels(1)}, {}))
    agree(ours, cpus)
    torch.testing.assert_close(ours["class_mass"], cpus["class_mass"], rtol=3e-7, atol=0)


def test_tables_that_do_not_fit_shared_memory() -> None:
    """The same bits from the workspace as from shared memory: of a request beside one with many states and sets."""
    length, vocabulary = 3, 64
    one, other = chain_of(12, vocabulary, 4), chain_of(3300, vocabulary, 5, 2)
    for automata, place in (([one], "shared memory"), ([one, other], "the workspace")):
        packed = pack_automata(automata)
        said = automaton_library.plan(1, length, packed.most_classes, packed.most_states, packed.most_sets)
        assert f"states in {place}" in said
        assert f"weights in {place}" in said
    logits = torch.randn(1, length, vocabulary)
    alone = step([one], logits, [1], [9], numbers=[3], on=kernels(1))
    many = step([one, other], logits.expand(2, -1, -1).contiguous(), [1, 0], [9, 9], numbers=[3, 0], on=kernels(2))
    for name in WRITTEN:
        assert bits(alone[name][0]) == bits(many[name][0]), name


def test_products_far_below_a_double() -> None:
    """24 positions whose accepted tokens lie 150 below the others: e^-3,600."""
    delta = np.array([[1, -1, -1, -1, -1, 0], [-1, 0, -1, -1, -1, -1]])
    logits = torch.full((1, 24, 6), 75.0)
    logits[0, :, [0, 1, 5]] = -75.0
    ours, cpus = (step([small(delta, [0, 9])], logits, [0], [0], on=on) for on in (kernels(1), kernels(2)))
    agree(ours, step([small(delta, [0, 9])], logits, [0], [0]))
    assert bits(ours["sampled"]) == bits(cpus["sampled"])
