"""vocabulary_statistics on every instruction set of the machine, and its form in torch, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, library

from backend import skip_if_on_device
from bounds import assert_close
from denoise_cases import DTYPES, FORMS, NAN, RAW_ERRORS, Case, bits, int32, make_case, use
from dgemma_ext.ops import denoise
from reference import denoise as reference


def in_float32(case: Case) -> reference.Statistics:
    """The same maths in float32, as transformers computes it."""
    z = case.logits.to(torch.float32)
    if case.softcap > 0:
        z = torch.tanh(z / case.softcap) * case.softcap
    z = torch.where(case.mask, z / case.temperature[:, None, None], -torch.inf)
    row_max = z.amax(-1)
    tiles = torch.nn.functional.pad(z, (0, -z.shape[-1] % reference.TILE), value=-torch.inf)
    tiles = tiles.unflatten(-1, (-1, reference.TILE))
    tile_max = tiles.amax(-1)
    empty = tile_max == -torch.inf
    tile_sum = torch.exp(tiles - torch.where(empty, 0.0, tile_max)[..., None]).sum(-1)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    row_sum = torch.exp(z - row_max[..., None]).sum(-1)
    return reference.Statistics(z.argmax(-1), entropy, row_max, row_sum, tile_max, tile_sum)


def assert_statistics(case: Case, actual: tuple[Tensor, ...]) -> None:
    exact, plain = case.exact(), in_float32(case)
    got = denoise.VocabularyStatistics(*actual)
    assert got.argmax.tolist() == exact.argmax.tolist()
    for name in ("entropy", "row_max", "tile_max"):
        assert_close(getattr(got, name), getattr(exact, name), torch.float32, getattr(plain, name))
    # The relative error of a mass is that of its exponents, so exponents are compared: log of the sum of exp(z).
    for of in (row_log_mass, tile_log_mass):
        assert_close(of(got), of(exact), torch.float32, of(plain))


def row_log_mass(statistics: Any) -> Tensor:
    return statistics.row_max.double() + statistics.row_sum.double().log()


def tile_log_mass(statistics: Any) -> Tensor:
    return statistics.tile_max.double() + statistics.tile_sum.double().log()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary", [257, 1000, 4096])
def test_statistics(
    vocabulary: int, masked: bool, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dtype, vocabulary=vocabulary, masked=masked)
    assert_statistics(case, use(form, monkeypatch).vocabulary_statistics(**case.logits_params))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("softcap", "spread"),
    [(0.0, 0.01), (0.0, 4.0), (30.0, 0.01), (30.0, 20.0), (30.0, 300.0), (5.0, 300.0)],  # from flat to beyond the cap
)
def test_softcap_and_spread(softcap: float, spread: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.float32, softcap=softcap, spread=spread)
    assert_statistics(case, use(form, monkeypatch).vocabulary_statistics(**case.logits_params))


@pytest.mark.parametrize("form", FORMS)
def test_the_real_vocabulary(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(torch.bfloat16, batch=1, length=2, vocabulary=262144)
    assert_statistics(case, use(form, monkeypatch).vocabulary_statistics(**case.logits_params))


@pytest.mark.parametrize("form", FORMS)
def test_a_nearly_certain_row_has_the_right_tiny_entropy(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The textbook form log sum exp z - sum p z cancels here: in float32 it gives 0 or a larger error."""
    logits = torch.full((1, 1, 1000), -10.0)
    logits[0, 0, 700] = 12.0
    case = Case(logits, 0.0, torch.tensor([0.8]))
    got = use(form, monkeypatch).vocabulary_statistics(**case.logits_params)[1]
    exact = case.exact().entropy
    assert 1e-9 < exact.item() < 1e-7
    # The tile with the maximum loses its small masses in float32: 128 of 1,000 of the part that is 1/28 of the whole.
    assert got.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_allowed_index(dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 3, 600, dtype=dtype)
    logits[0, :, [129, 131, 400, 599]] = 9.0
    allowed = denoise.pack_allowed([[5, 131, 400], [5, 7]], 600)
    case = Case(logits, 30.0, torch.ones(1), None, allowed, int32(-1, 0, 1).view(1, 3))
    assert use(form, monkeypatch).vocabulary_statistics(**case.logits_params)[0].tolist() == [[129, 131, 5]]


@pytest.mark.parametrize("form", FORMS)
def test_argmax_sees_what_the_soft_cap_hides(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both logits saturate tanh in float32, so z is the same; the raw logit is not."""
    logits = torch.zeros(1, 1, 300)
    logits[0, 0, 3], logits[0, 0, 290] = 600.0, 601.0
    got = use(form, monkeypatch).vocabulary_statistics(logits, 30.0, torch.ones(1), None, None, None)
    assert got[0].item() == 290


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [NAN, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_logit_that_is_not_finite(dtype: torch.dtype, bad: float, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(dtype, batch=1, length=3, vocabulary=400)
    clean = use(form, monkeypatch).vocabulary_statistics(**case.logits_params)
    case.logits[0, 1, 399] = bad
    got = use(form, monkeypatch).vocabulary_statistics(**case.logits_params)
    assert got[1][0, 1].isnan()
    assert got[3][0, 1].isnan()
    assert 0 <= got[0][0, 1] < 400
    for a, b in zip(got, clean, strict=True):
        assert bits(a[0, [0, 2]]) == bits(b[0, [0, 2]])


@pytest.mark.parametrize("form", FORMS)
def test_inactive_requests_are_neither_read_nor_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(make_case(torch.bfloat16, batch=3, masked=True), active=torch.tensor([True, False, True]))
    case.logits[1], case.temperature[1], case.allowed_row[1] = NAN, NAN, 1000
    module = use(form, monkeypatch)
    if form == "plain":
        case.allowed_row[1] = 0  # plain torch uses the row index before it knows whether the row is used
    got = module.vocabulary_statistics(**case.logits_params)
    for a, b, c in zip(
        *(module.vocabulary_statistics(**case.request(b).logits_params) for b in (0, 2)), got, strict=True
    ):
        assert bits(c[0]) == bits(a[0])
        assert bits(c[2]) == bits(b[0])
    out = denoise.VocabularyStatistics(*(torch.full_like(t, 77) for t in got))
    if form == "plain":
        module.vocabulary_statistics_out(*case.logits_params.values(), **out._asdict())
    else:
        module.vocabulary_statistics(**case.logits_params, out=out)
    for written, returned in zip(out, got, strict=True):
        assert bool((written[1] == 77).all())
        assert bits(written[[0, 2]]) == bits(returned[[0, 2]])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_batch_or_threads(threads: int, cpu_variant: str) -> None:
    case = make_case(torch.bfloat16, batch=4, length=7, vocabulary=1000)
    whole = denoise.vocabulary_statistics(**case.logits_params)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for b in range(4):
            for got, part in zip(denoise.vocabulary_statistics(**case.request(b).logits_params), whole, strict=True):
                assert bits(got[0]) == bits(part[b])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    case = make_case(torch.bfloat16, vocabulary=300, masked=masked)
    arguments = tuple(case.logits_params.values())
    library.opcheck(torch.ops.dgemma.vocabulary_statistics.default, arguments)
    out = denoise.vocabulary_statistics(**case.logits_params)._asdict()
    library.opcheck(torch.ops.dgemma.vocabulary_statistics.out, arguments, out)


def bad_arguments() -> dict[str, tuple[str, dict[str, Any]]]:
    """Error -> (the named argument, the arguments that differ from a good call)."""
    good = make_case(torch.float32, masked=True)
    row = good.allowed_row
    assert row is not None
    return {
        "dtype of logits": ("logits", {"logits": good.logits.double()}),
        "dimensions of logits": ("logits", {"logits": good.logits[0]}),
        "layout of logits": ("logits", {"logits": good.logits.transpose(0, 1).contiguous().transpose(0, 1)}),
        "negative softcap": ("softcap", {"softcap": -1.0}),
        "softcap NaN": ("softcap", {"softcap": NAN}),
        "temperature zero": ("temperature", {"temperature": torch.tensor([0.5, 0.0])}),
        "temperature NaN": ("temperature", {"temperature": torch.tensor([0.5, NAN])}),
        "temperature infinite": ("temperature", {"temperature": torch.tensor([0.5, torch.inf])}),
        "shape of temperature": ("temperature", {"temperature": torch.ones(3)}),
        "dtype of temperature": ("temperature", {"temperature": torch.ones(2, dtype=torch.float64)}),
        "dtype of active": ("active", {"active": torch.ones(2, dtype=torch.int32)}),
        "only allowed": ("allowed_row", {"allowed_row": None}),
        "only allowed_row": ("allowed", {"allowed": None}),
        "words of allowed": ("allowed", {"allowed": torch.ones(3, 31, dtype=torch.int32)}),
        "row of allowed without a bit": ("allowed", {"allowed": torch.zeros(3, 32, dtype=torch.int32)}),
        "bits past the vocabulary only": ("allowed", {"allowed": torch.tensor([[0] * 31 + [1 << 20]] * 3).int()}),
        "row index too large": ("allowed_row", {"allowed_row": torch.full_like(row, 3)}),
        "row index too small": ("allowed_row", {"allowed_row": torch.full_like(row, -2)}),
        "dtype of row index": ("allowed_row", {"allowed_row": row.long()}),
    }


OF_VALUES = {"temperature zero", "temperature NaN", "temperature infinite", "row of allowed without a bit"}
OF_VALUES |= {"bits past the vocabulary only", "row index too large", "row index too small"}


@pytest.mark.parametrize("what", bad_arguments())
def test_bad_input(what: str) -> None:
    skip_if_on_device(what, OF_VALUES)
    name, change = bad_arguments()[what]
    arguments = {**make_case(torch.float32, masked=True).logits_params, **change}
    with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
        denoise.vocabulary_statistics(**arguments)
    with pytest.raises(RAW_ERRORS):
        torch.ops.dgemma.vocabulary_statistics(*arguments.values())


def test_bad_out() -> None:
    case = make_case(torch.float32)
    good = denoise.vocabulary_statistics(**case.logits_params)
    for name, tensor in good._asdict().items():
        with pytest.raises(ValueError, match=rf"^{name}: got .*wants"):
            denoise.vocabulary_statistics(**case.logits_params, out=good._replace(**{name: tensor[:1]}))


@pytest.mark.parametrize("shape", [(0, 4, 300), (2, 0, 300)])
def test_nothing_to_do(shape: tuple[int, int, int], cpu_variant: str) -> None:
    got = denoise.vocabulary_statistics(torch.zeros(shape), 30.0, torch.ones(shape[0]))
    assert got.entropy.shape == shape[:2]
