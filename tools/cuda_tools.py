"""Where the CUDA compiler and its companions are, and which GPUs this machine has.

A toolkit of the machine is taken where it is release 13 or later; else the packages of requirements/cuda.txt, which pip
puts beside torch's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

# Tests of operators, which also run on the CUDA kernels, on the host (tests/test_sim_operators.py) and on a GPU.
OPERATOR_TESTS = (
    "test_denoise_statistics.py",
    "test_denoise_sampling.py",
    "test_denoise_shards.py",
    "test_denoise_update.py",
    "test_denoise_soft_embedding.py",
    "test_block_attention.py",
    "test_block_attention_append.py",
    "test_block_attention_paged.py",
    "test_grouped_gemm.py",
    "test_quantized_gemm.py",
    "test_fp8_activations.py",
    "test_int8_products.py",
    "test_vocabulary_head.py",
    "test_router_and_dense.py",
    "test_layer.py",
    "test_automaton.py",
    "test_operators.py",
)

# The oldest release of nvcc that the kernels were compiled with.
OLDEST_RELEASE = 13


def packaged_toolkit() -> Path:
    """The folder of the toolkit that requirements/cuda.txt installs for this Python, whether it exists or not."""
    return Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"


def find_tool(name: str) -> str | None:
    """A program of the toolkit, from CUDA_HOME, the PATH, the usual folder, or the packages."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/{name}" if home else None, name, f"/usr/local/cuda/bin/{name}"]
    candidates.append(str(packaged_toolkit() / "bin" / name))
    return next((found for path in candidates if path and (found := shutil.which(path))), None)


@cache
def find_nvcc() -> str | None:
    """nvcc of release 13 or later; an older one of the machine is ignored."""
    nvcc = find_tool("nvcc")
    if nvcc is not None and _release(nvcc) >= OLDEST_RELEASE:
        return nvcc
    packaged = shutil.which(str(packaged_toolkit() / "bin" / "nvcc"))
    return packaged if packaged is not None and _release(packaged) >= OLDEST_RELEASE else None


def _release(nvcc: str) -> int:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", said)
    return int(found.group(1)) if found else 0


def architectures_of_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs as CMake writes them, "90a" for Hopper; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    return sorted({architecture(*map(int, cap.split("."))) for cap in answer.stdout.split()})


def named_architectures(names: str) -> list[str]:
    """The compute capabilities that a user names, as CMake writes them (cmake/CudaArchitectures.cmake reads them).

    Leaves the program with one line for names that it does not know.
    """
    beside = Path(sys.executable).with_name("cmake")
    cmake = str(beside) if beside.exists() else "cmake"
    script = Path(__file__).resolve().parent.parent / "cmake" / "CudaArchitectures.cmake"
    answer = subprocess.run([cmake, f"-DNAMES={names}", "-P", str(script)], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(answer.stderr.partition("\n")[0])
    return answer.stdout.strip().split(";")


def architecture(major: int, minor: int) -> str:
    """9.0a enables the instructions of Hopper alone (wgmma, setmaxnreg); other GPUs run the portable kernels."""
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
