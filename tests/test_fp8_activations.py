"""The experts with weights and activations in FP8: the operator on every backend, and a model with that option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library

import dgemma_ext as dg
from backend import BACKEND, COMPUTE_CAPABILITY, DTYPES, cpu_only
from bounds import GLOBAL_BOUND, assert_close, relative_distance
from checkpoints import make_checkpoint
from command import dgemma, random_checkpoint
from dgemma_ext import diffusion_gemma as model_module
from dgemma_ext.checkpoint import convert, parse_target
from dgemma_ext.ops import quantized_gemm, weights
from dgemma_ext.ops.formats import Fp8Weight
from dgemma_ext.ops.plain import quantized_gemm as quantized_gemm_plain
from reference import fp8 as reference
from test_grouped_gemm import route
from test_quantized_gemm import make_experts

# GPUs with e4m3 products.
SERVED = (89, 90, 120)
served = pytest.mark.skipif(
    BACKEND != "cpu" and COMPUTE_CAPABILITY not in SERVED, reason="test_an_unsupported_gpu looks at it"
)
# The tensor core's sums differ in their last bits, and an h that differs in them may round to the next code. The
# bounds are for all tokens together, and for each by itself.
BOUND, ROW_BOUND = (
    (GLOBAL_BOUND, GLOBAL_BOUND) if BACKEND == "cpu" else ({torch.bfloat16: 3e-4}, {torch.bfloat16: 3e-3})
)


def make_case(
    tokens: int, hidden_size: int, expert_size: int, experts: int, top_k: int, routing: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Fp8Weight, Fp8Weight]:
    """Tokens of very different sizes, so that no two have the same scale."""
    sizes = torch.exp2(torch.linspace(-6, 6, tokens).round())[:, None]
    ids = route(routing, tokens, experts, top_k)
    scales = torch.rand(tokens, top_k) + 0.1
    scales[ids < 0] = float("nan")
    gate_up, down = make_experts(("fp8", "fp8"), hidden_size, expert_size, experts)
    assert isinstance(gate_up, Fp8Weight)
    assert isinstance(down, Fp8Weight)
    return (torch.randn(tokens, hidden_size) * sizes).to(dtype), ids, scales, gate_up, down


def exact(weight: Fp8Weight) -> Tensor:
    return weight.values.view(torch.float8_e4m3fn).double() * weight.scales.double()[..., None]


CASES = [
    (24, 384, 128, 8, 4, "distinct"),
    (9, 2816, 704, 2, 2, "distinct"),  # the model's sizes, few experts
    (1, 128, 128, 4, 2, "distinct"),
    (70, 128, 256, 3, 2, "one expert"),
    (40, 256, 128, 8, 3, "holes"),
    (4, 128, 128, 2, 2, "nothing"),
]
if BACKEND == "sim":  # where each expert of the model's sizes takes a second
    CASES[1] = (9, 2816, 704, 1, 1, "distinct")


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_moe_ffn_fp8_is_right(sizes: tuple[int, int, int, int, int, str], dtype: torch.dtype) -> None:
    input, ids, scales, gate_up, down = make_case(*sizes, dtype)
    actual = quantized_gemm.moe_ffn_fp8(input, ids, scales, gate_up, down)
    call = (input, ids, scales, exact(gate_up), exact(down))
    wanted = torch.from_numpy(reference.moe_ffn(*call))
    if BACKEND == "cpu":
        assert_close(actual, wanted, dtype)
    for row, wanted_row in zip(actual.double(), wanted, strict=True):
        assert relative_distance(row, wanted_row) <= ROW_BOUND[dtype]
    assert relative_distance(actual.double(), wanted) <= BOUND[dtype]
    # The error has the size of the intended roundings, and not much more.
    unrounded = torch.from_numpy(reference.moe_ffn(*call, rounds=False))
    if sizes[-1] != "nothing":
        assert 1e-4 < relative_distance(actual.double(), unrounded) < 3e-3
    # A token's bits do not depend on other tokens.
    half = slice(0, (len(input) + 1) // 2)
    arguments = (part[half].contiguous() for part in (input, ids, scales))
    assert torch.equal(quantized_gemm.moe_ffn_fp8(*arguments, gate_up, down), actual[half])


@served
def test_a_wrong_scale_is_noticed() -> None:
    input, ids, scales, gate_up, down = make_case(*CASES[0], torch.bfloat16)
    off = gate_up.scales.clone()
    off[3] *= 2
    actual = quantized_gemm.moe_ffn_fp8(input, ids, scales, replace(gate_up, scales=off), down)
    wanted = torch.from_numpy(reference.moe_ffn(input, ids, scales, exact(gate_up), exact(down)))
    rows = [relative_distance(*pair) for pair in zip(actual.double(), wanted, strict=True)]
    goes_there = (ids == 3).any(-1).tolist()
    assert [distance > ROW_BOUND[torch.bfloat16] for distance in rows] == goes_there


@pytest.mark.skipif(BACKEND == "cpu" or COMPUTE_CAPABILITY in SERVED, reason="of GPUs that do not multiply e4m3")
def test_an_unsupported_gpu() -> None:
    capability = f"{COMPUTE_CAPABILITY // 10}.{COMPUTE_CAPABILITY % 10}"
    with pytest.raises(ValueError, match=rf"this GPU has compute capability {capability}, wants .*9\.0"):
        quantized_gemm.check_moe_ffn_fp8(64, 32, torch.bfloat16, "cpu")


@served
@pytest.mark.skipif(BACKEND == "cpu", reason="of the kernels")
def test_supported_sizes_and_types() -> None:
    quantized_gemm.check_moe_ffn_fp8(64, 32, torch.bfloat16, "cpu")
    for bad, message in (
        ((64, 32, torch.float32), "dtype: wants bfloat16"),
        ((72, 32, torch.bfloat16), "hidden_size: got 72, wants a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized_gemm.check_moe_ffn_fp8(*bad, "cpu")


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_to_e4m3(dtype: torch.dtype) -> None:
    """Rows with every exponent below the largest, ties both ways, signed zeros, only zeros, the smallest values."""
    width = 512
    ties = torch.arange(0, 449).float() / 16  # in steps finer than e4m3's, so that some are ties
    rows = torch.zeros(6, width)
    rows[0, : len(ties)], rows[0, 500] = ties, 448
    rows[1] = torch.randn(width)
    rows[2] = torch.randn(width) * torch.exp2(torch.linspace(-20, 8, width))
    rows[3, ::2] = -rows[0, ::2]
    rows[3, 7] = -448
    rows[4] = torch.randn(width) * 1e-30
    rows = rows.to(dtype)
    codes, scales = quantized_gemm_plain.rows_to_e4m3(rows)
    wanted, wanted_scales = reference.rows_to_e4m3(rows)
    assert torch.equal(codes.double(), torch.from_numpy(wanted))
    assert torch.equal(codes.double().signbit(), torch.from_numpy(wanted).signbit())
    assert torch.equal(scales.double(), torch.from_numpy(wanted_scales))
    assert float(codes[:5].double().abs().amax(-1).min()) == 448
    assert float(scales[5]) == 0


@cpu_only
def test_opcheck() -> None:
    input, ids, scales, gate_up, down = make_case(4, 64, 32, 3, 2, "distinct", torch.float32)
    matrices = (gate_up.values, gate_up.scales, down.values, down.scales)
    library.opcheck(torch.ops.dgemma.moe_ffn_fp8.default, (input, ids, scales, *matrices))
    # With and without a factor for every expert.
    flat = torch.ones(3, 1)
    for factors in (flat, None):
        plain = torch.ops.dgemma.moe_ffn_fp8(input, ids, scales, gate_up.values, factors, down.values, factors)
        ones = (replace(weight, scales=torch.ones_like(weight.scales)) for weight in (gate_up, down))
        assert torch.equal(plain, quantized_gemm.moe_ffn_fp8(input, ids, scales, *ones))


@cpu_only
def test_bad_arguments() -> None:
    input, ids, scales, gate_up, down = make_case(4, 64, 32, 3, 2, "distinct", torch.float32)
    other = make_experts(("nvfp4", "nvfp4"), 64, 32, 3)
    call = quantized_gemm.moe_ffn_fp8
    with pytest.raises(ValueError, match="down: got weights in nvfp4, wants fp8"):
        call(input, ids, scales, gate_up, other[1])
    with pytest.raises(ValueError, match=r"gate_up: got shape \[3, 64, 64\], wants \[3, 64, 32\]"):
        call(input[:, :32].contiguous(), ids, scales, gate_up, replace(down, values=down.values[:, :32]))
    with pytest.raises(ValueError, match=r"expert_weights: got shape \[3, 2\], wants \[4, 2\]"):
        call(input, ids, scales[:3], gate_up, down)
    with pytest.raises(ValueError, match=r"expert_ids: got torch.int64, wants torch.int32"):
        call(input, ids.long(), scales, gate_up, down)
    with pytest.raises(ValueError, match=r"input: got .*float64"):
        call(input.double(), ids, scales, gate_up, down)
    bad = ids.clone()
    bad[1, 0] = 9
    with pytest.raises(ValueError, match="expert_ids: got 9, wants -1 or 0 to 2"):
        call(input, bad, scales, gate_up, down)
    with pytest.raises(ValueError, match="activations: got fp8 with unquantized weights"):
        weights.experts(input, ids, scales, gate_up.dequantized(torch.float32), down.values.float(), "fp8")


# The model ------------------------------------------------------------------------------------------------------------

FP8_TWICE: dict[str, Any] = {"device": "cpu", "weights": "fp8", "activations": "fp8"}


def logits_of(model: dg.DiffusionGemma) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cache = model.new_cache(1, 64)
    model.encode(torch.randint(0, model.config.vocab_size, (1, 20), generator=generator), cache)
    canvas = torch.randint(0, model.config.vocab_size, (1, model.config.canvas_length), generator=generator)
    return model.denoise(canvas, cache)


@cpu_only
def test_a_model_rounds_its_experts_activations(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "plain", with_tokenizer=False)
    convert(folder, tmp_path / "fp8", parse_target("fp8"))
    without = dg.DiffusionGemma.from_pretrained(folder, device="cpu", weights="fp8")
    model = dg.DiffusionGemma.from_pretrained(folder, **FP8_TWICE)
    assert (without.network.options.activations, model.network.options.activations) == (None, "fp8")
    wanted, logits = logits_of(without), logits_of(model)
    assert 1e-6 < relative_distance(logits.double(), wanted.double()) < 0.02
    # A file with fp8 weights needs no other option.
    stored = dg.DiffusionGemma.from_pretrained(tmp_path / "fp8", device="cpu", activations="fp8")
    assert torch.equal(logits_of(stored), logits)
    single = dg.DiffusionGemma.from_pretrained(folder, dtype="float32", **FP8_TWICE)
    assert relative_distance(logits_of(single).double(), logits.double()) < 0.02


@cpu_only
def test_bad_options_are_found_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, with_tokenizer=False)
    monkeypatch.setattr(model_module, "load_weights", None)
    for options, message in (
        ({"activations": "fp8"}, "activations fp8 is for experts with weights in fp8, and these are in bfloat16"),
        ({"activations": "fp8", "weights": "int4"}, "and these are in int4"),
        ({"activations": "int8", "weights": "fp8"}, "activations must be fp8, or None .*, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            dg.DiffusionGemma.from_pretrained(folder, device="cpu", **options)

    def refuse(*_: object) -> None:
        raise ValueError("dgemma::moe_ffn_fp8: this GPU has compute capability 8.0")

    monkeypatch.setattr("dgemma_ext.model.placement.check_moe_ffn_fp8", refuse)
    with pytest.raises(ValueError, match=r"^activations fp8: this GPU has compute capability 8\.0$"):
        dg.DiffusionGemma.from_pretrained(folder, **FP8_TWICE)


@cpu_only
def test_tokens_are_the_same_alone_and_in_a_batch() -> None:
    model = dg.DiffusionGemma.from_pretrained(random_checkpoint(), **FP8_TWICE)
    prompts = ["one", "another one", "three"]
    together = model.generate(prompts, max_new_tokens=16, seed=[1, 2, 3])
    for prompt, seed, output in zip(prompts, (1, 2, 3), together, strict=True):
        assert model.generate(prompt, max_new_tokens=16, seed=seed).token_ids == output.token_ids


@cpu_only
def test_the_command_line() -> None:
    folder = random_checkpoint()
    asked = ["--activations", "fp8", "--max-new-tokens", "8", "--seed", "1", "--json"]
    run = dgemma("generate", folder, "hello", "--weights", "fp8", *asked)
    assert (run.code, run.err) == (0, "")
    output = dg.DiffusionGemma.from_pretrained(folder, **FP8_TWICE).generate("hello", max_new_tokens=8, seed=1)
    assert run.object["token_ids"] == list(output.token_ids)
    refused = dgemma("generate", folder, "hello", *asked)
    assert refused.code == 2
    assert "activations fp8 is for experts with weights in fp8" in refused.err
    watched = dgemma("profile", folder, "--weights", "fp8", "--activations", "fp8", "--prefix", "9", "--steps", "1")
    assert watched.code == 0
    assert ", weights fp8, activations fp8: bfloat16" in watched.out
