"""The installed C library: what a host finds in the prefix, what the library exports, and a C program that runs on it.

The libraries are those of the build at hand (c_interface.py); they are installed outside the tree, and the prefix is
moved afterwards, so that nothing may remember where it was.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dgemma_ext as dg
from backend import BACKEND
from c_interface import (
    ABI,
    INCLUDE,
    ROOT,
    abi_listing,
    build_folder,
    cache_of,
    declared_functions,
    environment,
    load,
    must,
    run,
    structs,
)
from c_operations import layer_operations
from dgemma_ext import _C, demo

pytestmark = [
    pytest.mark.skipif(BACKEND != "cpu", reason="of the library on the CPU"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) is here"),
]

EXAMPLE = ROOT / "examples" / "embed_c"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
VERSION = _C.version()
GUIDE = (ROOT / "docs" / "embedding.md").read_text()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c_library")
    run("cmake", "--install", build_folder(), "--component", "c", "--prefix", folder / "installed")
    moved = folder / "moved"
    (folder / "installed").rename(moved)
    return moved


def library_folder(prefix: Path) -> Path:
    return next(prefix.rglob("libdgemma.a")).parent


def configure_and_build(source: Path, build: Path, prefix: Path, *options: str) -> None:
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    run("cmake", "--build", build)


# What is installed ---------------------------------------------------------------------------------------------------


def test_installed_files(prefix: Path) -> None:
    installed = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    headers = {f"include/dgemma/{path.name}" for path in INCLUDE.glob("*.h")}
    assert headers == {name for name in installed if name.startswith("include/")}
    names = {Path(name).name for name in installed}
    assert {"libdgemma.a", "libdgemma.so", "dgemma.pc", "dgemmaConfig.cmake", "dgemmaConfigVersion.cmake"} <= names
    texts = [path.read_text() for path in prefix.rglob("*") if path.suffix in (".cmake", ".pc")]
    folders = [str(ROOT), str(prefix.parent)]
    cudart = cache_of(build_folder()).get("DGEMMA_CUDART", "")  # the library is found by this path
    assert [folder for folder in folders for text in texts if folder in text.replace(cudart or "\0", "")] == []


def test_python_installs_its_own_part_alone(tmp_path: Path) -> None:
    if cache_of(build_folder()).get("DGEMMA_PYTHON") != "ON":
        pytest.skip("the build at hand has no Python module")
    assert 'install.components = ["python"]' in (ROOT / "pyproject.toml").read_text()
    run("cmake", "--install", build_folder(), "--component", "python", "--prefix", tmp_path)
    installed = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(installed) == 1
    assert re.fullmatch(r"dgemma_ext/_C\.[\w.-]+\.so", installed[0])


@pytest.mark.parametrize("compiler", [["cc", "-std=c11"], ["c++", "-std=c++17"]], ids=["c11", "c++17"])
def test_every_header_compiles_alone(prefix: Path, compiler: list[str], tmp_path: Path) -> None:
    language = "c" if compiler[0] == "cc" else "c++"
    for header in sorted((prefix / "include" / "dgemma").glob("*.h")):
        program = tmp_path / "program"
        program.write_text(f"#include <dgemma/{header.name}>\n#include <dgemma/{header.name}>\nint main(void);\n")
        run(*compiler, *STRICT, f"-I{prefix / 'include'}", "-fsyntax-only", "-x", language, program)


def test_the_interface_is_the_listed_one(tmp_path: Path) -> None:
    """Functions, struct layouts and enumerators are frozen: the list may only grow."""
    assert abi_listing(tmp_path).splitlines() == ABI.read_text().splitlines(), (
        "csrc/include/dgemma is not what csrc/abi.txt lists. Something added: run tests/c_interface.py > csrc/abi.txt. "
        "Something changed or gone: give it another name, by the rules at the head of base.h."
    )
    sizes = dict(re.findall(r"^struct dgemma_(\w+) (\d+)", ABI.read_text(), re.MULTILINE))
    assert {name: ctypes.sizeof(struct) for name, struct in structs().items()} == {n: int(s) for n, s in sizes.items()}


def test_only_the_listed_functions_are_exported(prefix: Path) -> None:
    listed = set(re.findall(r"^function (\w+)$", ABI.read_text(), re.MULTILINE))
    assert listed == set(declared_functions())
    if not load().dgemma_has_cuda():
        listed = {name for name in listed if not name.startswith("dgemma_cuda_")}
    symbols = run("nm", "-D", "--defined-only", "--format=posix", library_folder(prefix) / "libdgemma.so")
    assert {line.split()[0] for line in symbols.splitlines()} == listed


def test_soname_and_dependencies(prefix: Path) -> None:
    dynamic = run("readelf", "-d", library_folder(prefix) / "libdgemma.so")
    abi = re.search(r"#define DGEMMA_ABI_VERSION (\d+)", (INCLUDE / "base.h").read_text())
    assert abi is not None
    assert re.findall(r"SONAME.*\[(.*)\]", dynamic) == [f"libdgemma.so.{abi[1]}"]
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    system = r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(system, name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


# Hosts ---------------------------------------------------------------------------------------------------------------

HOST = """
#include <dgemma/base.h>
#include <dgemma/block_attention.h>
#include <dgemma/grouped_gemm.h>
#include <dgemma/layer.h>
#include <dgemma/vocabulary_head.h>
#include <stdio.h>
int main(void) {
  dgemma_cpu cpu = DGEMMA_CPU_SERIAL;
  const float x[2] = {3.0f, 4.0f};
  float y[2] = {0.0f, 0.0f};
  dgemma_rms_norm op = {0};
  op.tokens = 1;
  op.hidden_size = 2;
  op.input = x;
  op.output = y;
  if (dgemma_cpu_rms_norm(&op, &cpu) != DGEMMA_OK) return 1;
  op.hidden_size = -2;
  const dgemma_status status = dgemma_cpu_rms_norm(&op, &cpu);
  printf("%.4f %.4f; %s: %s\\n", y[0], y[1], dgemma_status_name(status), cpu.message);
  printf("%s %d %d %d\\n", dgemma_version(), dgemma_version_number() == DGEMMA_VERSION_NUMBER,
         dgemma_abi_version() == DGEMMA_ABI_VERSION, dgemma_has_cuda());
  printf("%s %d %d\\n", dgemma_cpu_variant_name(dgemma_cpu_best_variant()),
         dgemma_cpu_has_variant(dgemma_cpu_best_variant()), dgemma_cpu_has_variant((dgemma_cpu_variant)9));
  return 0;
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(host LANGUAGES {language})
set(CMAKE_CXX_STANDARD 17)
find_package(dgemma {version} CONFIG REQUIRED)
if(TARGET dgemma::cuda)
  message(STATUS "has dgemma::cuda")
endif()
add_executable(host host.{suffix})
target_link_libraries(host PRIVATE dgemma::dgemma)
"""


def said_by_host() -> str:
    """The norm of (3, 4), an error, and the library's facts."""
    variant = _C.cpu_variants()[-1]
    refused = "invalid argument: hidden_size: got -2, wants 1 to 2147483647"
    cuda = load().dgemma_has_cuda()
    return f"0.8485 1.1314; {refused}\n{VERSION} 1 1 {cuda}\n{variant} 1 0\n"


def write_host(folder: Path, language: str, version: str = VERSION) -> Path:
    folder.mkdir()
    suffix = {"C": "c", "CXX": "cpp"}[language]
    # C++ warns about {0} for an enumerator; {} is C++'s form.
    (folder / f"host.{suffix}").write_text(HOST if language == "C" else HOST.replace("op = {0}", "op = {}"))
    (folder / "CMakeLists.txt").write_text(PROJECT.format(language=language, suffix=suffix, version=version))
    return folder


@pytest.mark.parametrize("linkage", ["shared", "static"])
@pytest.mark.parametrize("language", ["C", "CXX"])
def test_find_package(prefix: Path, tmp_path: Path, language: str, linkage: str) -> None:
    source = write_host(tmp_path / "source", language)
    static = "ON" if linkage == "static" else "OFF"
    flags = f"-DCMAKE_{language}_FLAGS={' '.join(STRICT)}"
    configure_and_build(source, tmp_path / "build", prefix, f"-Ddgemma_USE_STATIC={static}", flags)
    assert run(tmp_path / "build" / "host") == said_by_host()
    assert ("libdgemma" in run("readelf", "-d", tmp_path / "build" / "host")) == (linkage == "shared")


def test_the_package_tells_its_version_and_whether_it_has_cuda(prefix: Path, tmp_path: Path) -> None:
    source = write_host(tmp_path / "source", "C")
    output = run("cmake", "-S", source, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert ("has dgemma::cuda" in output) == bool(load().dgemma_has_cuda())
    later = write_host(tmp_path / "later", "C", version="0.2")
    command = ["cmake", "-S", str(later), "-B", str(tmp_path / "no"), f"-DCMAKE_PREFIX_PATH={prefix}"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert refused.returncode != 0
    assert f"version: {VERSION}" in refused.stderr


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not here")
@pytest.mark.parametrize("linkage", ["shared", "static"])
def test_pkg_config(prefix: Path, tmp_path: Path, linkage: str) -> None:
    folder = library_folder(prefix)
    if linkage == "static" and load().dgemma_has_cuda():
        pytest.skip("a static library with CUDA kernels needs the place of the CUDA toolkit, which differs")
    ask = ["pkg-config", "--cflags", "--libs", "dgemma", *(["--static"] if linkage == "static" else [])]
    path = {**environment(), "PKG_CONFIG_PATH": str(folder / "pkgconfig")}
    flags = subprocess.run(ask, capture_output=True, text=True, check=True, env=path).stdout.split()
    if linkage == "static":
        flags = [word.replace("-ldgemma", "-l:libdgemma.a") for word in flags]
    (tmp_path / "host.c").write_text(HOST)
    run("cc", "-std=c11", tmp_path / "host.c", "-o", tmp_path / "host", *flags, f"-Wl,-rpath,{folder}")
    assert run(tmp_path / "host") == said_by_host()


def guide_line(start: str) -> str:
    (found,) = [line for line in GUIDE.splitlines() if line.startswith(start)]
    return found


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not here")
def test_the_guides_line_for_pkg_config_makes_a_program_that_finds_the_library(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.c").write_text(HOST)
    path = {**environment(), "PKG_CONFIG_PATH": str(library_folder(prefix) / "pkgconfig")}
    subprocess.run(guide_line("cc engine.c"), shell=True, check=True, cwd=tmp_path, env=path)
    assert run(tmp_path / "engine") == said_by_host()


def test_the_guides_rpath_of_an_installed_engine(prefix: Path, tmp_path: Path) -> None:
    """In a prefix of its own with the library beside it, which is moved: only a relative rpath leads there."""
    (setting,) = re.findall(r"`(set\(CMAKE_INSTALL_RPATH .*?\))`", GUIDE)
    source = write_host(tmp_path / "source", "C")
    project = (source / "CMakeLists.txt").read_text().replace("add_executable", f"{setting}\nadd_executable")
    (source / "CMakeLists.txt").write_text(project + "install(TARGETS host RUNTIME DESTINATION bin)\n")
    configure_and_build(source, tmp_path / "build", prefix, "-DCMAKE_C_FLAGS=" + " ".join(STRICT))
    assert run(tmp_path / "build" / "host") == said_by_host()
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "installed")
    shutil.copytree(library_folder(prefix), tmp_path / "installed" / "lib", symlinks=True)
    (tmp_path / "installed").rename(tmp_path / "moved")
    dynamic = run("readelf", "-d", tmp_path / "moved" / "bin" / "host")
    assert re.findall(r"(?:RUNPATH|RPATH).*\[(.*)\]", dynamic) == ["$ORIGIN/../lib"]
    assert run(tmp_path / "moved" / "bin" / "host") == said_by_host()


# The example ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(prefix: Path) -> Path:
    """Builds the example with the warnings of its own CMakeLists.txt."""
    build = prefix.parent / "example"
    assert " ".join(STRICT) in (EXAMPLE / "CMakeLists.txt").read_text()
    configure_and_build(EXAMPLE, build, prefix)
    return build / "embed_c"


def answer(program: Path, folder: Path, prompt: str, *options: str | int) -> tuple[list[int], list[int], str]:
    """The steps of every canvas, the tokens, and the text."""
    _, steps, tokens, text = run(program, folder, prompt, *map(str, options)).split("\n", 3)
    return [int(n) for n in steps.split()[1:]], [int(n) for n in tokens.split()[1:]], text.rstrip("\n")


def drawn(size: int, seed: int) -> str:
    return demo.draw(size, seed).text


@pytest.mark.parametrize("size", [6, 9])
def test_tokens_are_pythons(example: Path, size: int) -> None:
    folder = demo.checkpoint(size)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    solved = 0
    for seed in range(3):
        out = model.generate(drawn(size, seed), seed=seed, max_new_tokens=model.config.canvas_length)
        steps, tokens, text = answer(example, folder, drawn(size, seed), "--seed", seed)
        assert tokens == list(out.token_ids)
        # torch sums its bfloat16 products in another order, so a mean entropy near the threshold may cross it.
        assert abs(steps[0] - out.denoising_steps[0]) <= 1
        assert text.replace("\n", "") == out.text
        assert [len(row) for row in text.split("\n")] == [size] * size
        solved += bool(demo.check(out.text, drawn(size, seed)))
        assert model.tokenizer is not None
        ids = ",".join(map(str, model.tokenizer.encode_prompt(drawn(size, seed))))
        assert answer(example, folder, f"ids:{ids}", "--seed", seed)[:2] == (steps, tokens)
    assert solved >= 2


def float32_copy(size: int, folder: Path, **generation: Any) -> Path:
    """A bundled checkpoint with float32 tensors and other sampler settings."""
    source = demo.checkpoint(size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((source / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, **generation}))
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("size", [6, 9])
def test_tokens_are_pythons_after_a_commit(example: Path, size: int, tmp_path: Path) -> None:
    """Three canvases, each encoded before the next. The model was not trained on text after the grid, so this runs in
    float32, where few ties depend on rounding, for eight steps: after about 20 the last bits decide."""
    folder = float32_copy(size, tmp_path, max_denoising_steps=8)
    model = dg.DiffusionGemma.from_pretrained(folder, device="cpu")
    sampler = dg.SamplerConfig(eos_token_ids=())
    for seed in range(3):
        out = model.generate(
            drawn(size, seed), seed=seed, max_new_tokens=3 * model.config.canvas_length, sampler=sampler
        )
        steps, tokens, _ = answer(example, folder, drawn(size, seed), "--seed", seed, "--canvases", 3)
        assert (steps, tokens) == (list(out.denoising_steps), list(out.token_ids))
        assert steps[1:] == [8, 8]


@pytest.fixture(scope="module")
def sanitized(prefix: Path) -> Path:
    build = prefix.parent / "sanitized"
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    configure_and_build(EXAMPLE, build, prefix, f"-DCMAKE_C_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=None")
    return build / "embed_c"


def test_the_example_is_clean_under_the_sanitizers(example: Path, sanitized: Path) -> None:
    folder = demo.checkpoint(6)
    options = (drawn(6, 5), "--seed", 5, "--canvases", 2)
    assert answer(sanitized, folder, *options) == answer(example, folder, *options)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not here")
def test_the_example_and_the_library_are_clean_under_valgrind(example: Path) -> None:
    """Runs the library too, with the instruction sets that valgrind supports."""
    valgrind = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"]
    run(*valgrind, example, demo.checkpoint(6), drawn(6, 1), "--seed", "1")


def refused(program: Path, *arguments: str | Path) -> str:
    """The program's message where it fails, which it does without freeing its memory."""
    settings = {**environment(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 1, done.stderr
    assert "Sanitizer" not in done.stderr
    assert done.stderr.startswith("embed_c: ")
    return done.stderr


def test_bad_input_of_the_example(sanitized: Path, tmp_path: Path) -> None:
    good = demo.checkpoint(6)
    assert "usage" in refused(sanitized)
    assert "No such file" in refused(sanitized, tmp_path / "none", "ids:2")
    assert "--seed: got 'x'" in refused(sanitized, good, "ids:2", "--seed", "x")
    assert "id number 1" in refused(sanitized, good, "ids:2,384")
    assert "byte 2 is no character" in refused(sanitized, good, "12ö")
    assert "context of 1024" in refused(sanitized, good, "ids:2", "--canvases", "40")
    assert "wants cpu" in refused(sanitized, good, "ids:2", "--device", "tpu")

    def spoiled(name: str, change: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(good, folder, ignore=shutil.ignore_patterns("9x9", "*.py", "__pycache__"))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(change(content))
        return folder

    weights, config = "model.safetensors", "config.json"
    for name, change, message in [
        (weights, lambda b: b[:6], "cut off"),
        (weights, lambda b: b[:200], "cut off"),
        (weights, lambda b: b[:-2], "bytes"),
        (weights, lambda b: b.replace(b"BF16", b"F16 ", 1), "dtype F16"),
        (weights, lambda b: b.replace(b"decoder.norm", b"decoder.nurm"), "model.decoder.norm.weight: is not in"),
        (config, lambda b: b[:300], "is not JSON"),
        (config, lambda b: b.replace(b"sliding_window", b"sliding_widow"), 'no "sliding_window"'),
        (config, lambda b: b.replace(b'"hidden_size": 96', b'"hidden_size": 97'), "wants"),
        (config, lambda b: b"[" * 100_000, "nested too deeply"),
        (config, lambda b: b"", "is not JSON"),
    ]:
        assert message in refused(sanitized, spoiled(name, change), drawn(6, 1)), message


def test_several_hosts_at_once(example: Path) -> None:
    """The library has no state: threads of a process call it side by side, with the bits of a single one."""
    library, wanted = load(), []
    values = [layer_operations(torch.bfloat16, 64, 96)["layer_output"] for _ in range(4)]
    for one in values:
        must(library, "cpu_layer_output", **one)
        wanted.append(one["output"].clone())
        one["output"].zero_()
    threads = [threading.Thread(target=must, args=(library, "cpu_layer_output"), kwargs=one) for one in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one["output"], before) for one, before in zip(values, wanted, strict=True))


# What the guides show -------------------------------------------------------------------------------------------------

EXAMPLES_README = (EXAMPLE / "README.md").read_text()


def test_the_guides_call_compiles_and_runs(prefix: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```c\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    program = f"""
#include <dgemma/grouped_gemm.h>
#include <stdio.h>
static uint16_t x[37 * 96], w[192 * 96], y[37 * 192];
static void* from_your_pool(size_t bytes) {{ return bytes > 0 ? x : NULL; }}
int main(void) {{
{code}
  return 0;
}}
"""
    (tmp_path / "guide.c").write_text(program)
    library = library_folder(prefix)
    link = [f"-L{library}", "-ldgemma", f"-Wl,-rpath,{library}"]
    include = f"-I{prefix / 'include'}"
    run("cc", "-std=c11", *STRICT, include, tmp_path / "guide.c", "-o", tmp_path / "guide", *link)
    assert run(tmp_path / "guide") == ""


def test_the_guide_names_every_operation_and_its_links_lead_to_files() -> None:
    rows = "\n".join(line for line in GUIDE.splitlines() if line.startswith("| `"))
    missing = [
        name
        for name in declared_functions()
        if (match := re.fullmatch(r"dgemma_cpu_(\w+?)(_workspace)?", name))
        and match[1] not in ("best_variant", "has_variant", "variant_name", "block_attention")
        and f"`{match[1]}`" not in rows
    ]
    assert missing == []
    for text, folder in ((GUIDE, ROOT / "docs"), (EXAMPLES_README, EXAMPLE)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / target).exists(), target


def test_the_examples_readme_shows_what_it_prints(example: Path) -> None:
    command = re.search(r"embed_c/embed_c (\S+) (\S+) --seed (\d+)", EXAMPLES_README)
    printed = re.search(r"^```\n(device .*?)^```$", EXAMPLES_README, re.DOTALL | re.MULTILINE)
    assert command is not None
    assert printed is not None
    shown = printed[1].splitlines()
    _, tokens, text = answer(example, ROOT / command[1], command[2], "--seed", command[3])
    assert shown[2].removeprefix("tokens ").removesuffix(" ...") == " ".join(map(str, tokens[:6]))
    assert shown[3:] == text.split("\n")
