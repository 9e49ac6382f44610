"""The part `attention` inside vLLM on a CPU: the logits of the first two denoising steps against transformers.

make test-vllm ARGS="-k attention"
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from checkpoints import make_checkpoint
from transformers_oracle import denoise, encode, load_transformers

ROOT = Path(__file__).resolve().parent
WINDOW, CANVAS, BLOCK = 40, 16, 32
# Prompt and canvas fit the window, fill it, pass it by one; the prompt fills it; far above, over several pages.
LENGTHS = [5, WINDOW - CANVAS, WINDOW - CANVAS + 1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * BLOCK - 1, 3 * BLOCK, 150]
BOUND = 5e-4  # of the logits' scale


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 500, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 256 and 512. vLLM has one scalar of a layer for both passes, so the encoder's are the decoder's."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "global_kv_heads": 2, "head_dim": 256, "global_head_dim": 512}
    folder = tmp_path_factory.mktemp("vllm") / "checkpoint"
    make_checkpoint(folder, dtype=torch.float32, window=WINDOW, canvas=CANVAS, max_positions=512, **sizes)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("model.encoder.language_model."):
            tensors[name] = tensors[name.replace("model.encoder.language_model.", "model.decoder.")].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def run_in_vllm(checkpoint: Path, folder: Path, calls: list[list[list[int]]], parts: str, **engine: Any) -> Any:
    """What tests/vllm_logits.py saves."""
    arguments = {
        "model": str(checkpoint),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,  # prompts come in pieces, beside canvases of others
        "block_size": BLOCK,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        **engine,
    }
    (folder / "order.json").write_text(json.dumps({"engine": arguments, "calls": calls}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "vllm_stand_ins"), str(ROOT)]),
        "DGEMMA_VLLM": "1",
        "DGEMMA_VLLM_PARTS": parts,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "vllm_logits.py"), str(folder), str(folder / "order.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(folder / "logits.pt", weights_only=True)


def distances(model: Any, prompts: list[list[int]], steps: list[Any]) -> list[float]:
    """For every prompt the largest difference of either step from transformers', over the scale of its logits."""
    found = []
    for prompt, of_prompt in zip(prompts, steps, strict=True):
        cache = encode(model, torch.tensor([prompt]))
        conditioning, worst = None, 0.0
        assert len(of_prompt) == 2
        for step in of_prompt:
            wanted = denoise(model, step["canvas"][None].long(), cache, conditioning)[0]
            worst = max(worst, float((step["logits"] - wanted).abs().max() / wanted.abs().max()))
            conditioning = step["logits"][None] / step["temperature"]
        found.append(worst)
    return found


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_transformers(checkpoint, torch.float32)


def test_logits_of_the_first_two_steps(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    """Below, at and above the window; prompts in pieces, in batches with canvases, and out of the prefix cache."""
    prompts = random_prompts(1, LENGTHS)
    longer = [ids + more for ids, more in zip(prompts, random_prompts(2, [7] * len(prompts)), strict=True)]
    saved = run_in_vllm(checkpoint, tmp_path, [prompts, longer], "attention", enable_prefix_caching=True)
    assert set(saved["classes"]) == {"PagedCpuAttention"}
    assert max(step["others"] for steps in saved["calls"][0] for step in steps) > 3
    for asked, steps in zip((prompts, longer), saved["calls"], strict=True):
        found = distances(model, asked, steps)
        assert max(found) < BOUND, dict(zip(LENGTHS, found, strict=True))


def test_two_ranks_have_the_heads_between_them(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    prompts = random_prompts(3, [5, WINDOW + 1, 150])
    saved = run_in_vllm(checkpoint, tmp_path, [prompts], "attention", tensor_parallel_size=2)
    assert max(distances(model, prompts, saved["calls"][0])) < BOUND


def good_layer() -> dict[str, Any]:
    return {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2, "sliding_window": 8}


def test_the_backend_for_gpus_on_tensors_of_a_cpu() -> None:
    """Two canvases and a prompt: what it stores and reads is what the contiguous operators give."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from dgemma_ext.integrations.vllm.attention_backend import PagedAttentionBackend, PagedAttentionBuilder
    from dgemma_ext.ops import block_attention

    layer = PagedAttentionBackend.get_impl_cls()(**good_layer())
    rows, lengths, causal = [5, 4, 9], [12, 4, 30], [0, 1, 0]
    cache = torch.full((12, 2, 4, 64), float("nan"))  # [blocks, key heads, block size, keys beside values]
    table = torch.tensor([[3, 7, 1, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0], [2, 4, 5, 6, 8, 10, 11, 0]]).int()
    keys, values = ([torch.randn(n, 2, 32) for n in lengths] for _ in "kv")

    def slots(b: int, first: int, end: int) -> torch.Tensor:
        return torch.tensor([int(table[b, p // 4]) * 4 + p % 4 for p in range(first, end)], dtype=torch.int64)

    for b, (n, length) in enumerate(zip(rows, lengths, strict=True)):  # earlier steps
        layer.do_kv_cache_update(None, keys[b][: length - n], values[b][: length - n], cache, slots(b, 0, length - n))
    new = [torch.cat([x[b][lengths[b] - rows[b] :] for b in range(3)]) for x in (keys, values)]
    new = [torch.cat([x, torch.zeros(2, 2, 32)]) for x in new]  # padding, for a graph
    slot = torch.cat([*(slots(b, lengths[b] - rows[b], lengths[b]) for b in range(3)), torch.tensor([-1, -1])])
    layer.do_kv_cache_update(None, *new, cache, slot)
    start = torch.tensor([0, 5, 9, 18], dtype=torch.int32)
    metadata = CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=18,
        max_query_len=9,
        max_seq_len=32,
        block_table_tensor=table,
        slot_mapping=slot,
        causal=torch.tensor(causal, dtype=torch.int32),
    )
    query, output = torch.randn(20, 4, 32), torch.full((20, 4, 32), 7.0)
    batch = PagedAttentionBuilder.build(None, 0, metadata)
    assert layer.forward(None, query, *new, cache, batch, output) is output
    assert bool((output[18:] == 7.0).all())
    for b, (n, length) in enumerate(zip(rows, lengths, strict=True)):
        function = block_attention.causal_attention if causal[b] else block_attention.canvas_attention
        first = int(start[b])
        place = (torch.zeros(1, dtype=torch.int32), torch.tensor([length - n], dtype=torch.int32))
        old = [torch.cat([x[b][: length - n], torch.zeros(1, 2, 32)])[None] for x in (keys, values)]
        block = [x[b][None, length - n :].contiguous() for x in (keys, values)]
        wanted = function(query[None, first : first + n].contiguous(), *block, *old, *place, window=8)
        assert torch.equal(output[first : first + n], wanted[0]), b


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, []),
        ({"head_size": 512}, []),
        ({"head_size": 96}, ["head_size not supported"]),
        ({"dtype": torch.float16}, ["dtype not supported"]),
        ({"device_capability": (7, 5)}, ["compute capability not supported"]),
    ],
)
def test_vllm_is_told_what_the_backend_for_gpus_takes(changed: dict[str, Any], reasons: list[str]) -> None:
    """By vLLM's own questions, of a canvas on a sliding layer."""
    from vllm.platforms.interface import DeviceCapability

    from dgemma_ext.integrations.vllm.attention_backend import PagedAttentionBackend

    asked = {"head_size": 256, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, **changed}
    asked["device_capability"] = DeviceCapability(*changed.get("device_capability", (9, 0)))
    asked |= {"attn_type": "decoder", "has_sliding_window": True, "use_non_causal": True}
    features = ("use_mla", "has_sink", "use_sparse", "use_mm_prefix", "use_per_head_quant_scales")
    assert PagedAttentionBackend.validate_configuration(**asked, **dict.fromkeys(features, False)) == reasons


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi_slopes", [1.0]),
        ("logits_soft_cap", 50.0),
        ("attn_type", "encoder_only"),
        ("kv_cache_dtype", "fp8"),
        ("sinks", torch.zeros(4)),
    ],
)
def test_the_backend_for_gpus_names_what_it_does_not_have(name: str, value: Any) -> None:
    from dgemma_ext.integrations.vllm.attention_backend import PagedAttention

    with pytest.raises(NotImplementedError, match=rf"^{name}: "):
        PagedAttention(**{**good_layer(), name: value})


def test_without_the_part_vllm_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, where nothing was registered before."""
    program = (
        "from dgemma_ext.integrations.vllm import register; register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "print(AttentionBackendEnum.CPU_ATTN.get_path(), AttentionBackendEnum.CUSTOM.is_overridden())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "vllm_stand_ins"), "DGEMMA_VLLM": "1"}
    for parts, wanted in (
        ("sampler", "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend False"),
        ("attention", "dgemma_ext.integrations.vllm.attention_cpu.PagedCpuAttentionBackend True"),
    ):
        given = {**environment, "DGEMMA_VLLM_PARTS": parts}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=given)
        assert done.stdout.splitlines()[-1] == wanted
