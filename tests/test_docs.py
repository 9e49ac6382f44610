"""The pages are true: their code runs and prints what they show, their commands, flags, paths and links exist."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import json
import re
import statistics
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dgemma_ext as dg
from command import dgemma
from dgemma_ext import demo
from dgemma_ext.cli.arguments import build_parser
from pages import (
    GUIDES,
    PAGES,
    README,
    ROOT,
    Command,
    anchors,
    blocks_in,
    commands,
    every_page,
    inline_code,
    links,
    name_of,
    prose,
)

FOLDERS = ("csrc", "python", "tests", "tools", "bench", "docs", "examples", "cmake", "requirements", "third_party")
COMMAND_PAGE = ROOT / "docs" / "command.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
# Where a path on a page may begin: at the root, or inside the folder that the page is about.
BASES = (ROOT, ROOT / "python" / "dgemma_ext", ROOT / "csrc", ROOT / "csrc" / "grouped_gemm")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder but for MODEL, the checkpoint that the pages' commands name."""
    (tmp_path / "MODEL").symlink_to(demo.checkpoint(6))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_prints(shown: str, printed: str, where: str) -> None:
    """Whether something printed what a page shows; "..." stands for anything."""
    shown, printed = (text.rstrip() + "\n" for text in (shown, printed))
    checker = doctest.OutputChecker()
    if not checker.check_output(shown, printed, doctest.ELLIPSIS):
        pytest.fail(f"{where} shows\n{shown}\nand got\n{printed}")


# Code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks_in(page, "python")], ids=name_of)
def test_python_runs_and_prints_what_is_shown(page: Path, scratch: Path) -> None:
    """The blocks of a page are one program."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_in(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, name_of(page), "exec")
        if not block.is_run:
            continue
        if "transformers" in block.text:
            pytest.importorskip("transformers")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        if block.prints is not None:
            assert_prints(block.prints, out.getvalue(), f"{name_of(page)}:{block.line}")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    (block,) = blocks_in(README, "python")
    assert len([line for line in block.text.splitlines() if line]) <= 20


def test_the_readmes_program_prints_answers(scratch: Path) -> None:
    (block,) = blocks_in(README, "python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block.text, "README.md", "exec"), {"__name__": "page"})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith(f"{demo.draw(size=6, seed=1).solution} eos ")
    assert lines[-2] == "True"
    assert lines[-1].count("'") == 2 * 6


# Commands -------------------------------------------------------------------------------------------------------------

DGEMMA = [(page, command) for page in PAGES for command in commands(page, "dgemma")]


@pytest.mark.parametrize(("page", "command"), DGEMMA, ids=lambda value: getattr(value, "line", None) or value.name)
def test_commands_run_and_print_what_is_shown(
    page: Path, command: Command, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_parser().parse_args(command.words[1:])
    if not command.is_run:
        return
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    run = dgemma(*command.words[1:], stdin=command.stdin)
    assert run.code == 0, run.err
    if command.prints is not None:
        assert_prints(command.prints, run.err + run.out, f"{name_of(page)}: {command.line}")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        named = {word for command in commands(page, "make") for word in command.words[1:] if "=" not in word}
        named |= set(re.findall(r"^make ([a-z-]+)", "\n".join(inline_code(page)), re.MULTILINE))
        assert named <= targets, name_of(page)


@pytest.mark.parametrize("page", every_page(), ids=name_of)
def test_files_of_shell_commands_exist(page: Path) -> None:
    for block in blocks_in(page, "sh"):
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*", block.text):
            assert (ROOT / path).exists(), path


# Flags ----------------------------------------------------------------------------------------------------------------


@cache
def flags_of(command: str) -> set[str]:
    """The long flags of `dgemma COMMAND`."""
    (commands_action,) = (action for action in build_parser()._actions if action.dest == "command")
    assert isinstance(commands_action.choices, dict)
    actions = commands_action.choices[command]._actions
    return {flag for action in actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def sections(page: Path) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


COMMANDS = ["generate", "chat", "decide", "grammar", "info", "quantize", "finetune", "profile", "serve", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_the_command_has_every_flag_and_no_other(command: str) -> None:
    parts = sections(COMMAND_PAGE)
    own = parts[f"dgemma {command}"]
    shared = "".join(
        parts[heading] for heading in re.findall(r"\(#(flags-[a-z-]+)\)", own) for heading in [_heading(heading)]
    )
    known = flags_of(command)
    assert flags_in(own) <= known
    assert known <= flags_in(own) | flags_in(shared)


def _heading(anchor: str) -> str:
    return anchor.replace("-", " ").capitalize()


def test_the_page_of_the_command_has_every_command() -> None:
    assert {f"dgemma {command}" for command in COMMANDS} <= sections(COMMAND_PAGE).keys()
    assert all(f" {command} " in dgemma("--help").out for command in COMMANDS)


def test_flags_in_the_text_exist() -> None:
    known = {"--help", "--version"}.union(*(flags_of(command) for command in COMMANDS))
    scripts = "".join(
        file.read_text(encoding="utf-8") for folder in ("tools", "bench") for file in (ROOT / folder).glob("*.py")
    )
    for page in PAGES:
        for code in inline_code(page):
            if code.startswith(("--", "dgemma ")):
                unknown = {flag for flag in flags_in(code) - known if f'"{flag}"' not in scripts}
                assert not unknown, f"{name_of(page)}: {code}"


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", every_page(), ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_page_begins_with_what_its_reader_can_do(page: Path) -> None:
    title, _, first = page.read_text(encoding="utf-8").partition("\n\n")
    assert title.startswith("# ")
    assert first.startswith("After this page you can ")


def test_every_page_is_named_in_the_readme() -> None:
    assert {name_of(page) for page in GUIDES} <= set(links(README))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_environment_variables_are_read_somewhere(page: Path) -> None:
    named = set(re.findall(r"\bDGEMMA_[A-Z_]+\b", page.read_text(encoding="utf-8")))
    assert {name for name in named if not re.search(rf"\b{name}\b", _sources())} == set()


@cache
def _sources() -> str:
    files = [ROOT / "Makefile", ROOT / "CMakeLists.txt"]
    for folder in ("python", "csrc", "tools", "cmake"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cmake")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_the_package_exist(page: Path) -> None:
    for code in inline_code(page):
        for dotted in re.findall(r"\bdg((?:\.\w+)+)", code):
            value: object = dg
            for name in dotted[1:].split("."):
                assert hasattr(value, name), f"{name_of(page)}: dg{dotted}"
                value = getattr(value, name)


PATH = re.compile(r"(?P<path>[\w.*-]+(?:/[\w.*-]+)*/?)(?::(?P<name>[\w.]+))?")


@pytest.mark.parametrize("page", every_page(), ids=name_of)
def test_paths_exist_and_hold_the_names_that_are_said_to_be_there(page: Path) -> None:
    wrong = []
    for code in inline_code(page):
        match = PATH.fullmatch(code)
        if match is None or not (match["path"].split("/")[0] in FOLDERS or _is_path_of_the_architecture(page, match)):
            continue
        files = [file for base in BASES for file in base.glob(match["path"])]
        if not files or (match["name"] and not any(defines(file, match["name"]) for file in files)):
            wrong.append(code)
    assert wrong == []


def _is_path_of_the_architecture(page: Path, match: re.Match[str]) -> bool:
    """There every path counts, also one that begins inside the package or inside csrc."""
    return page == ARCHITECTURE and ("/" in match["path"] or match["path"].endswith((".py", ".h", ".cu", ".cpp")))


def defines(file: Path, name: str) -> bool:
    """Whether the file has the name: in Python a definition, in C++ a word."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text) is not None
    nodes: list[ast.AST] = [ast.parse(text)]
    for part in name.split("."):
        nodes = [child for node in nodes for child in getattr(node, "body", []) if part in _names(child)]
    return bool(nodes)


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def test_the_drawing_of_the_house_is_the_contract() -> None:
    """Its rooms stand in the order in which imports may run."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawing, _, _ = blocks_in(ARCHITECTURE, "text")[0].text.partition("──")
    rooms = [re.findall(r"(\w+)(?:/|\.py)(?=  |\n)", line) for line in drawing.splitlines(keepends=True)]
    assert [set(found) for found in rooms if found] == [set(layer.split(" | ")) for layer in layers]


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "machine"), [(0, "zen4"), (1, "zen5")])
def test_ratios_of_a_step_are_those_that_were_measured(table: int, machine: str) -> None:
    results = json.loads((ROOT / "bench" / "results" / f"cpu-{machine}-2-cores.json").read_text())["results"]
    rows = {"step": "step", "first": "first step (no self-conditioning)", "sampler": "sampler without its two"}
    for key, label in rows.items():
        wanted = [one[key] for one in results]  # peaked, flat
        line = re.findall(rf"^\| {re.escape(label)}.*$", prose(PERFORMANCE), re.MULTILINE)[table]
        shown = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        measured = [value for one in wanted for value in (one["ours"], one["transformers"], one["ratio"])]
        assert shown == pytest.approx(measured, abs=0.0051)


PEERS = ROOT / "bench" / "results" / "cpu-zen4-2-cores-peers.json"


def peer_results() -> dict[str, list[Any]]:
    """Of each run beside a peer, by the label of its row: what was measured with peaked and with flat weights."""
    found: dict[str, list[Any]] = {}
    results = json.loads(PEERS.read_text())
    for one in results["by turns, idle"]["results"]:
        found.setdefault(one["name"], []).append(one)
    for number, run in enumerate(results["vLLM with zentorch, each side loaded for its turn, idle"], 1):
        found[f"vLLM with zentorch, run {number}"] = run["results"]
    return found


def numbers_of(table: str, label: str) -> list[float]:
    """Those of the table's one row with this label."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)$", table, re.MULTILINE)
    return [float(found) for found in re.findall(r"\d+(?:\.\d+)?", line)]


def test_figures_beside_other_programs_are_those_that_were_measured() -> None:
    table = sections(PERFORMANCE)["Beside other programs"].partition("**Thirty layers**")[0]
    for name, (peaked, flat) in peer_results().items():
        steps = [peaked] if "plugin" in name else [peaked, flat]  # it ran with peaked weights alone
        layers = [peaked, flat] if "zentorch" in name else [peaked]
        parts = [(one, "seconds") for one in steps] + [(one, "layers") for one in layers]
        pairs = [(one["ours"][clock], one["peer"][clock]) for one, clock in parts]
        wanted = [number for ours, theirs in pairs for number in (ours, theirs, ours / theirs)]
        shown = numbers_of(table, "transformers 5.24" if name == "transformers" else name)
        assert shown == pytest.approx(wanted, abs=0.0051), name


def test_estimate_of_thirty_layers_follows_from_what_was_measured() -> None:
    measured = peer_results()
    of_zentorch = [one for label, ones in measured.items() if "zentorch" in label for one in ones]

    def estimate(side: dict[str, float]) -> float:
        return 15 * side["layers_processor"] + side["processor"] - side["layers_processor"]

    undisturbed = [*measured["transformers"], *of_zentorch]
    ours = {
        kind: sorted(estimate(one["ours"]) for one in undisturbed if one["weights"] == kind)
        for kind in ("peaked", "flat")
    }
    two = sorted(one["ours"]["layers_processor"] for one in undisturbed)
    wanted = {
        "dgemma_ext, peaked": [two[0], two[-1], ours["peaked"][0], ours["peaked"][-1]],
        "dgemma_ext, flat": [ours["flat"][0], ours["flat"][-1]],
    }
    for label, ones in (
        ("transformers", measured["transformers"]),
        ("vLLM", measured["vLLM"]),
        ("vLLM with zentorch", of_zentorch),
    ):
        layers = sorted(one["peer"]["layers_processor"] for one in ones)
        steps = sorted(estimate(one["peer"]) for one in ones)
        ratios = [statistics.median(ours[kind]) / step for kind in ours for step in (steps[-1], steps[0])]
        wanted[label] = [layers[0], layers[-1], steps[0], steps[-1], *ratios]
    table = sections(PERFORMANCE)["Beside other programs"].partition("**Thirty layers**")[2]
    for label, numbers in wanted.items():
        digits = [1 if number > 2 else 2 for number in numbers]  # steps, and what is less
        shown = numbers_of(table, label)
        assert shown == [round(number, count) for number, count in zip(numbers, digits, strict=True)], label


def test_times_inside_transformers_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu-zen4-2-cores-transformers.json").read_text())
    table = sections(PERFORMANCE)["Inside transformers"]
    for key, label in {"step": "step", "first": "first step", "sampler": "the sampler alone"}.items():
        (line,) = re.findall(rf"^\| {label} \|.*$", table, re.MULTILINE)
        shown = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]
        for index, kind in enumerate(("peaked", "flat")):
            theirs, ours, times = (results[kind][key][name] for name in ("transformers", "accelerated", "times"))
            assert shown[3 * index : 3 * index + 2] == pytest.approx([theirs, ours], abs=0.0051)
            assert shown[3 * index + 2] == pytest.approx(times, rel=0.02)


def test_figures_of_training_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu-zen4-2-cores-training.json").read_text())
    rows = re.findall(r"^\| .* \| ([\d.]+) \| ([\d,]+) MB \|$", sections(PERFORMANCE)["Training"], re.MULTILINE)
    shown = [(float(seconds), int(peak.replace(",", ""))) for seconds, peak in rows]
    measured = [*results["step"].values(), *results["experts_lora_of_a_layer"].values()]
    assert len(shown) == len(measured)
    for (seconds, peak), wanted in zip(shown, measured, strict=True):
        assert seconds == pytest.approx(wanted["cpu_seconds"], rel=0.005)
        assert peak == wanted["peak_mb"]


def test_figures_of_quantized_weights_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "bench" / "results" / "cpu-zen4-2-cores-quantized.json").read_text())
    table = sections(PERFORMANCE)["Quantized weights"]
    labels = {"int4, groups of 32": "int4", "int4, groups of 64": "int4-64", "int4, groups of 128": "int4-128"}
    labels["fp8, experts' activations too"] = "fp8, activations too"
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in re.findall(r"^\|.*$", table, re.MULTILINE)
    ]
    for label, *cells in rows:
        name, layer = labels.get(label, label), results["layer"]
        if len(cells) == 5 and name in results["solved"]["6x6"]:
            for size, cell in (("6x6", cells[3]), ("9x9", cells[4])):
                assert [float(n) for n in re.findall(r"[\d.]+", cell)] == pytest.approx(
                    [100 * share for share in results["solved"][size][name]]
                )
            if name in layer["memory"]:
                measured = [layer["memory"][name]]
                measured += [layer[f"two_threads_{what}"][name]["ratio"] for what in ("256_tokens", "1_token")]
                assert [float(cell) for cell in cells[:3]] == pytest.approx(measured, abs=0.0051)
        elif len(cells) == 4 and name in results["searched_scales"]:
            measured = results["searched_scales"][name]
            for column, cell in zip(
                ("largest, 6x6", "searched, 6x6", "largest, 9x9", "searched, 9x9"), cells, strict=True
            ):
                assert [float(n) for n in re.findall(r"[\d.]+", cell)] == measured.get(column, [])
        elif len(cells) == 3 and "," in cells[0]:
            kinds = [kind for kind in results["logits"] if kind != "benchmark"]
            measured = [
                results["logits"][kind][name][what] for kind in kinds for what in ("cosine", "top_1", "divergence")
            ]
            assert [float(n) for cell in cells for n in cell.split(",")] == measured
