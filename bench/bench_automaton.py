"""What a grammar costs: to compile, beside its peers in the same run, and in a denoising step on a CPU.

    python bench/bench_automaton.py                      # five minutes; peers where they are installed
    python bench/bench_automaton.py --step               # a step with and without: a minute more, 8 GB of memory

Compile: eleven schemas on one vocabulary of 262,144 tokens made by rule (grammar_schemas.py), each program and schema
in a process of its own, one thread, CPU time, the best of three (of one where it takes seconds); bytes are those of
the compiled grammar, or what the process grew by. Peers: outlines-core (its own expression of a schema, then its Index
over the vocabulary), xgrammar, llguidance. The last two compile less ahead and look at the vocabulary at every token.

Step: two layers at true width (as bench_step_cpu.py), CPU time of all threads, by turns; "30 layers" is an estimate,
fifteen times the layers and the rest of a step. Compare shares, not times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grammar_schemas import END, PAD, SCHEMAS, VOCABULARY_SIZE, make_texts

# Seconds of CPU time and bytes after which a program is given up for a schema.
PATIENCE = 60
MOST_BYTES = 8 << 30
GOAL_MILLISECONDS = 150
GOAL_SHARE = 0.03


def timed(compile_once: Callable[[], Any]) -> tuple[float, Any]:
    """The best of three in milliseconds of CPU time, or the first where it takes a second."""
    best, made = float("inf"), None
    for _ in range(3):
        began = time.process_time()
        made = compile_once()
        best = min(best, 1e3 * (time.process_time() - began))
        if best > 1000:
            break
    return best, made


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ours(schema: Any, texts: list[bytes | None]) -> dict[str, Any]:
    import dgemma_ext as dg
    from dgemma_ext.sampling.grammar import compile_pattern, vocabulary_of

    vocabulary = vocabulary_of(texts, [PAD, END], VOCABULARY_SIZE)
    taken, made = timed(lambda: compile_pattern(dg.JsonSchema(schema).pattern(), vocabulary, [END], PAD))
    facts = {"states": made.states, "classes": made.num_classes, "arcs": made.arcs, "shortest": made.shortest}
    return {"milliseconds": taken, "bytes": made.nbytes, **facts}


def outlines_core(schema: Any, texts: list[bytes | None]) -> dict[str, Any]:
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    vocabulary = Vocabulary(END, {text: [token] for token, text in enumerate(texts) if text is not None})
    before = resident()
    taken, index = timed(lambda: Index(build_regex_from_schema(json.dumps(schema)), vocabulary))
    return {"milliseconds": taken, "bytes": resident() - before, "states": len(index.get_transitions())}


def xgrammar(schema: Any, texts: list[bytes | None]) -> dict[str, Any]:
    from xgrammar import GrammarCompiler, TokenizerInfo, VocabType

    encoded = [b"<special%d>" % token if text is None else text for token, text in enumerate(texts)]
    info = TokenizerInfo(encoded, vocab_type=VocabType.RAW, stop_token_ids=[END])
    compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)
    taken, made = timed(lambda: compiler.compile_json_schema(json.dumps(schema)))
    return {"milliseconds": taken, "bytes": made.memory_size_bytes}


def llguidance(schema: Any, texts: list[bytes | None]) -> dict[str, Any]:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    class Tokens:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id, self.special_token_ids = END, None, [PAD, END]
            self.tokens = [b"<special%d>" % token if text is None else text for token, text in enumerate(texts)]

        def __call__(self, text: str | bytes) -> list[int]:
            return [2 + byte for byte in (text.encode() if isinstance(text, str) else text)]

    tokenizer = LLTokenizer(TokenizerWrapper(Tokens()))
    before = resident()
    taken, made = timed(lambda: LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema))))
    if made.is_error():
        raise ValueError(made.get_error())
    return {"milliseconds": taken, "bytes": resident() - before}


PROGRAMS: dict[str, Callable[[Any, list[bytes | None]], dict[str, Any]]] = {
    "dgemma_ext": ours,
    "outlines-core": outlines_core,
    "xgrammar": xgrammar,
    "llguidance": llguidance,
}


def installed(program: str) -> str | None:
    try:
        return version(program)
    except PackageNotFoundError:
        return None


def compile_apart(program: str, name: str) -> dict[str, Any]:
    """The figures of one program for one schema, from a process of its own; or why there are none."""
    command = [sys.executable, __file__, "--worker", program, name]
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one_thread}, check=False)
    if run.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"failed": f"more than {PATIENCE} s"}
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
        return {"failed": lines[-1][:200]}
    return dict(json.loads(run.stdout.splitlines()[-1]))


def work(program: str, name: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    print(json.dumps(PROGRAMS[program](SCHEMAS[name], make_texts())))


def compile_table(names: list[str], wanted: list[str]) -> dict[str, Any]:
    programs = {program: installed(program) for program in wanted}
    table: dict[str, Any] = {"versions": programs, "schemas": {}}
    present = [program for program, found in programs.items() if found]
    print("milliseconds of CPU time and bytes:", ", ".join(f"{one} {programs[one]}" for one in present))
    for name in names:
        row = table["schemas"][name] = {program: compile_apart(program, name) for program in present}
        own = row.get("dgemma_ext", dict.fromkeys(("states", "classes", "arcs"), 0))
        print(f"{name:32} {own['states']:6} states {own['classes']:4} classes {own['arcs']:7} arcs", end="")
        for program in present:
            print(f"  {program} {_shown(row[program])}", end="")
        print(flush=True)
    if "dgemma_ext" in present:
        slowest = max(row["dgemma_ext"]["milliseconds"] for row in table["schemas"].values())
        print(f"slowest of ours: {slowest:.0f} ms, goal {GOAL_MILLISECONDS}")
    return table


def _shown(figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"- ({figures['failed'][:40]})"
    return f"{figures['milliseconds']:.1f} ms {figures['bytes'] / 1e6:.1f} MB"


# A step --------------------------------------------------------------------------------------------------------------


def step_table(names: list[str], rounds: int, threads: int, final_norm: float) -> dict[str, Any]:
    """CPU seconds of a step without and with each grammar, and of its layers, as medians of turns."""
    import torch
    from true_size import random_model, true_config

    import dgemma_ext as dg
    from dgemma_ext import sampling
    from dgemma_ext.sampling.grammar import compile_pattern, vocabulary_of
    from dgemma_ext.sampling.state import canvases_of

    torch.set_num_threads(threads)
    model = random_model(true_config(layers=2), "cpu", final_norm=final_norm)
    network, prefix = model.network, 128
    vocabulary = vocabulary_of(make_texts(), [PAD, END], VOCABULARY_SIZE)
    grammars = {name: compile_pattern(dg.JsonSchema(SCHEMAS[name]).pattern(), vocabulary, [END], PAD) for name in names}
    cache = model.new_cache(1, prefix)
    model.encode(torch.arange(2, 2 + prefix)[None], cache)
    batch, buffers = sampling.make_canvas_batch(network, 1, 256), sampling.make_step_buffers(network, 1, 256)
    batch.place(0, 0, prefix, network.rotary_tables(torch.arange(prefix, prefix + 256)))
    settings = dg.SamplerConfig(confidence_threshold=0.0).resolve(model.defaults, 256)

    def step(name: str | None) -> None:
        if not bool(batch.state.active):
            sampling.begin_canvas(network, batch, 0, settings, seed=0, index=0)
        batch.constraints.clear(0)
        if name is not None:
            batch.constraints.place(0, sampling.Constraint(grammars[name], grammars[name].start, 1024))
        sampling.denoising_step(network, cache, batch, buffers)

    calls: dict[str, Callable[[], Any]] = {
        "layers": lambda: network.forward(cache, canvases_of(batch, buffers, True)),
        "without": lambda: step(None),
        **{name: (lambda name=name: step(name)) for name in names},  # type: ignore[misc]
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:  # the first one warms up
                taken[name].append(time.process_time() - began)
    layers, without = (statistics.median(taken[name]) for name in ("layers", "without"))
    thirty = without + 14 * layers
    found: dict[str, Any] = {"layers": layers, "without": without, "thirty_layers": thirty, "added": {}}
    print(f"a step of two layers: {without:.3f} CPU seconds, {layers:.3f} of them its layers; of 30: {thirty:.1f}")
    for name in names:
        added = statistics.median(one - other for one, other in zip(taken[name], taken["without"], strict=True))
        shares = {"two_layers": added / without, "thirty_layers": added / thirty}
        found["added"][name] = {"seconds": added, **shares}
        print(
            f"{name:32} adds {added:.3f} s: {100 * shares['two_layers']:.1f} % of two layers, "
            f"{100 * shares['thirty_layers']:.1f} % of 30 (goal {100 * GOAL_SHARE:.0f} %)",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("PROGRAM", "SCHEMA"), help=argparse.SUPPRESS)
    parser.add_argument("--schemas", nargs="+", choices=SCHEMAS, default=list(SCHEMAS), metavar="SCHEMA")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="PROGRAM")
    parser.add_argument("--step", action="store_true", help="measure a step in place of compiling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--flat", action="store_true", help="flat distributions (default: peaked)")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    load = os.getloadavg()[0]
    kind = ("step flat" if arguments.flat else "step peaked") if arguments.step else "compile"
    if arguments.step:
        final_norm = 0.05 if arguments.flat else 1.0
        result = step_table(arguments.schemas, arguments.rounds, arguments.threads, final_norm)
    else:
        result = compile_table(arguments.schemas, arguments.programs)
    facts = {"machine": platform.processor() or platform.machine(), "load": round(load, 1)}
    result |= {**facts, "date": time.strftime("%Y-%m-%d"), "threads": arguments.threads}
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps({**known, kind: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
