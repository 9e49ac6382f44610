"""vLLM on this machine's CPU, with the stand-ins for what its package lacks, and checkpoints that it reads as we do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints import make_checkpoint

TESTS = Path(__file__).parent
# Seconds: vLLM imports torch in three processes, on a machine that may be busy.
PATIENCE = 900.0
ENGINE = ("--enforce-eager", "--limit-mm-per-prompt", '{"image":0,"video":0}', "--dtype", "float32")


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs vLLM; the plugin is off unless `more` switches it on."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_VLLM", "VLLM_"))}
    return {
        **own,
        "PYTHONPATH": str(TESTS / "vllm_stand_ins"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }


def one_scalar(folder: Path) -> Path:
    """Gives the encoder the decoder's layer scalars, as in the published checkpoint: vLLM keeps one for both."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("model.encoder.") and name.endswith("layer_scalar"):
            tensors[name] = tensors[name.replace("encoder.language_model", "decoder")].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def tiny(folder: Path, **sizes: Any) -> Path:
    """A random checkpoint with heads of a width that vLLM's attention has."""
    shape = {"head_dim": 32, "global_head_dim": 64, "canvas": 16, **sizes}
    return one_scalar(make_checkpoint(folder, dtype=torch.float32, **shape))


def probe(told: dict[str, Any], **more: str) -> tuple[dict[str, Any], str]:
    """What tests/vllm_probe.py finds, and its log."""
    command = [sys.executable, str(TESTS / "vllm_probe.py"), json.dumps(told)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=2 * PATIENCE)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    (found,) = re.findall(r"^FOUND (.*)$", result.stdout, re.MULTILINE)
    return json.loads(found), result.stdout + result.stderr


@dataclass
class Server:
    url: str
    log: Path

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.url + "/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@contextlib.contextmanager
def serving(model: Path, log: Path, options: Sequence[str] = (), **more: str) -> Iterator[Server]:
    """vLLM's OpenAI server on a free port of this machine, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), *ENGINE, *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(**more))
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < end, log.read_text()[-6000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
