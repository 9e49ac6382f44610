"""How much of a collection of JSON schemas compiles, why the rest is refused, and whether what compiles is right.

    python bench/schema_coverage.py FOLDER [FOLDER ...] [--json FILE]

A file is a schema; an object with `schema` and `tests`, as JSONSchemaBench's mask benchmark has them; or a list of such
objects, as the JSON Schema Test Suite has them; a test has `data` and `valid`. What compiles is judged by:

- walks: random texts of the grammar, which jsonschema must find valid, and llguidance must take where it takes the
  schema (in one of the value's spellings);
- tests: a value that is not valid must not be accepted. A valid one that is not accepted is counted apart: properties
  stand in the schema's order here, and an object has no others.

It names what is wrong, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import referencing.exceptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import dgemma_ext as dg
from grammar_cases import accepts, compiled, random_walk, text_of
from test_grammar_schema import _judge_tokenizer

WALKS = 8
# The pieces of a walk after which it goes straight to an end.
WANDER = 30


@dataclass
class Findings:
    schemas: int = 0
    compiled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    walks: int = 0
    judged_twice: int = 0  # walks that llguidance looked at too
    tests: int = 0
    valid: int = 0
    valid_accepted: int = 0
    wrong: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        times = sorted(self.milliseconds) or [0.0]
        return {
            "schemas": self.schemas,
            "compiled": self.compiled,
            "share_compiled": round(self.compiled / max(1, self.schemas), 4),
            "refused": dict(self.refused.most_common()),
            "walks": self.walks,
            "walks_judged_by_llguidance": self.judged_twice,
            "tests": self.tests,
            "valid_values": self.valid,
            "valid_values_accepted": self.valid_accepted,
            "wrong": len(self.wrong),
            "compile_ms_median": round(times[len(times) // 2], 1),
            "compile_ms_most": round(times[-1], 1),
        }


def cases_of(file: Path) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    """Name, schema and tests of each case in a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    is_case = isinstance(content, dict) and "schema" in content and isinstance(content.get("tests"), list)
    if is_case:
        yield file.name, content["schema"], content["tests"]
    elif isinstance(content, list):
        for number, one in enumerate(content):
            yield f"{file.name}[{number}]", one["schema"], one["tests"]
    else:
        yield file.name, content, []


def why(error: dg.GrammarError) -> str:
    """The keyword, or what an error without one is about."""
    if error.keyword is not None:
        return error.keyword
    if "lower" in error.message or "limit" in error.message:
        return "(a limit)"
    return "(recursion)" if "recursion" in error.message else "(no such schema)"


def look_at(name: str, schema: Any, tests: list[dict[str, Any]], found: Findings) -> None:
    found.schemas += 1
    began = time.process_time()
    try:
        grammar = compiled(dg.JsonSchema(schema))
    except dg.GrammarError as error:
        found.refused[why(error)] += 1
        return
    found.milliseconds.append(1e3 * (time.process_time() - began))
    found.compiled += 1
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    judge = _matcher(schema)
    for seed in range(WALKS):
        text = text_of(random_walk(grammar, seed, wander=WANDER))
        found.walks += 1
        value = json.loads(text)
        if not _is_valid(validator, value):
            found.wrong.append(f"{name}: {text.decode()[:200]} is not valid")
        if judge is not None:
            found.judged_twice += 1
            if not any(_takes(judge, spelled) for spelled in _spellings(text.decode(), value)):
                found.wrong.append(f"{name}: llguidance does not take {text.decode()[:200]}")
    for test in tests:
        found.tests += 1
        texts = [json.dumps(test["data"], **layout) for layout in ({}, {"separators": (",", ":")})]
        accepted = any(accepts(grammar, text) for text in texts)
        if accepted and not test["valid"]:
            found.wrong.append(f"{name}: {texts[0][:200]} is accepted")
        found.valid += bool(test["valid"])
        found.valid_accepted += bool(test["valid"]) and accepted


def _is_valid(validator: Any, value: Any) -> bool:
    try:
        return bool(validator.is_valid(value))
    except referencing.exceptions.Unresolvable:
        return False


def _matcher(schema: Any) -> Any:
    """llguidance's matcher; None where it does not take the schema."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = llguidance.LLMatcher(_judge_tokenizer(), grammar, log_level=0)
    return None if matcher.is_error() else matcher


def _spellings(text: str, value: Any) -> Iterator[str]:
    """Of a value: llguidance knows fewer than the grammars do (no escapes of letters, no -2.0 for -2)."""
    usual = json.dumps(value, ensure_ascii=False)
    yield text
    yield usual
    yield re.sub(r"(?<=\d)\.0(?![\d.eE])", "", usual)


def _takes(matcher: Any, text: str) -> bool:
    fresh = matcher.deep_copy()  # one that has refused a text takes no other
    return bool(fresh.consume_tokens(list(text.encode())) and fresh.is_accepting())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    reports, wrong = {}, list[str]()
    for folder in arguments.folders:
        found = Findings()
        for file in sorted(folder.rglob("*.json")):
            for name, schema, tests in cases_of(file):
                look_at(name, schema, tests, found)
        reports[folder.name] = found.report()
        print(json.dumps({folder.name: reports[folder.name]}), flush=True)
        wrong += found.wrong
    print("\n".join(wrong))
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
