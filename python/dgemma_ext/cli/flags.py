"""Flags that several commands have, in groups, and the types of their values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dgemma_ext.arguments import integer, number
from dgemma_ext.checkpoint import BUNDLED, DEMO, checked_tools
from dgemma_ext.model import IMAGE_ATTENTION
from dgemma_ext.model.vision import SOFT_TOKENS
from dgemma_ext.serve.options import ServeOptions

MODEL = (
    "a checkpoint's folder, a GGUF file, a hub id (owner/name) to download, or a bundled model: "
    f"{', '.join((DEMO, *BUNDLED))}"
)

Value = TypeVar("Value")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_device(parser)
    add_weights(parser)
    add_activations(parser)
    _add_vision(parser)


_ADAPTER = "an adapter of PEFT beside the weights, its folder or hub id"


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="PATH", help=_ADAPTER)
    _add_adapter_passes(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help=f"{_ADAPTER}; clients ask for it as the model MODEL:NAME. Without a name it is for all who ask for MODEL. "
        "Give it several times",
    )
    _add_adapter_passes(parser)


def _add_adapter_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter-passes",
        choices=["stored", "both"],
        help="what an adapter with the names of one pass alone means: that pass, or both",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU where torch sees one), cpu or cuda[:N]")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: as stored")


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="FORMAT",
        help="fp8, int8, int4, int4-64, int4-128 or nvfp4 quantizes weights while loading, unquantized the reverse "
        "(default: auto, as stored)",
    )


def add_activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=["fp8"],
        help="round what goes into experts with fp8 weights to fp8 as well, which changes tokens (default: no)",
    )


def _add_vision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        choices=["auto", "on", "off"],
        default="auto",
        help="load the vision tower, which images need; auto: where the checkpoint has one",
    )
    parser.add_argument(
        "--image-attention",
        choices=IMAGE_ATTENTION,
        default=IMAGE_ATTENTION[0],
        help=f"layers in which the tokens of an image see each other whole (default: {IMAGE_ATTENTION[0]})",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image before the message; may be repeated"
    )
    add_image_tokens(parser)


def add_image_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-tokens",
        type=int,
        choices=SOFT_TOKENS,
        help="the most tokens that an image becomes (default: the checkpoint's, usually 280)",
    )


def add_prompting(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt (what the checkpoint's chat template understands)")
    group.add_argument("--thinking", action="store_true", help="let the model think; its thoughts go to stderr, dimmed")
    group.add_argument(
        "--tools", type=tools_of, metavar="FILE.json", help="functions that the model may call, a list of JSON schemas"
    )
    group.add_argument(
        "--template-variable",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another variable of the template; VALUE is JSON, or else text",
    )
    group.add_argument(
        "--special-tokens",
        choices=["text", "tokens"],
        default="text",
        help="what special tokens become that the prompt spells (default: text)",
    )


def add_grammar(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the answer must match (on a CPU)")
    group.add_argument(
        "--thinking-budget", type=positive, metavar="N", help="end the thought before it within N tokens"
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE.json", help="a JSON schema")
    one.add_argument("--tool-choice", metavar="CHOICE", help="calls of --tools: auto, required, or a tool's name")
    add_patterns(one)


def add_patterns(group: Any) -> None:
    group.add_argument(
        "--regex", metavar="EXPRESSION", help="a regular expression, from its first to its last character"
    )
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; give it several times")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="same seed, same answer (default: 0)")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="length of the answer at most")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps per canvas at most")
    group.add_argument("--entropy-bound", type=float, metavar="NATS", help="accept while surer tokens sum to no more")
    group.add_argument("--t-min", type=float, metavar="T", help="the temperature that the last step comes near")
    group.add_argument("--t-max", type=float, metavar="T", help="the temperature of the first step")
    group.add_argument("--stability-threshold", type=int, metavar="N", help="stop when unchanged for so many steps ...")
    group.add_argument("--confidence-threshold", type=float, metavar="NATS", help="... and mean entropy is below this")
    group.add_argument("--canvas-length", type=positive, metavar="N", help="tokens per canvas, at most the model's")
    group.add_argument(
        "--trim-canvas",
        action="store_true",
        help="cut the last canvas to --max-new-tokens, in quarters: less work, perhaps other tokens",
    )


def add_serving(parser: argparse.ArgumentParser) -> None:
    usual = ServeOptions()
    group = parser.add_argument_group("server")

    def add(flag: str, help: str, **settings: Any) -> None:
        default = getattr(usual, settings.setdefault("dest", flag.strip("-").replace("-", "_")))
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        shown = f" (default: {default:.10g})" if is_number else ""
        group.add_argument(flag, help=help + shown, default=default, **settings)

    add("--host", f"address to listen on (default: {usual.host}, this machine alone)", metavar="ADDRESS")
    add("--port", "port to listen on; 0 takes a free one", type=int, metavar="N")
    add("--api-key", "what clients must send as Authorization: Bearer KEY (default: no key)", metavar="KEY")
    group.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="what clients call the model (default: as MODEL)"
    )
    add("--max-batch", "requests that run together", type=positive, metavar="N")
    add("--max-length", "tokens of a cache slot (default: 8192, or the model's)", type=positive, metavar="N")
    add("--prefix-cache-bytes", "copies of beginnings of prompts to keep; 0 keeps none", type=int, metavar="N")
    add("--max-waiting", "requests that may wait for a slot; more get status 429", type=int, metavar="N")
    add("--max-body-bytes", "of a request; larger ones get status 413", type=positive, metavar="N")
    add("--max-images", "in a request", type=int, metavar="N")
    add("--max-image-bytes", "of an image's file", type=positive, metavar="N")
    add("--max-image-pixels", "of an image", type=positive, metavar="N")
    add("--request-timeout", "seconds that an answer may take", type=seconds, metavar="SECONDS")
    add("--body-timeout", "seconds in which a request's body must arrive", type=seconds, metavar="SECONDS")
    add("--drain-timeout", "seconds that a signal waits for running requests", type=seconds, metavar="SECONDS")
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="let pages of ORIGIN call (default: none)"
    )
    add("--log-prompts", "write prompts and answers into the log", action="store_true")
    group.add_argument(
        "--no-trim-canvas",
        dest="trim_canvas",
        action="store_false",
        help="let short answers take whole canvases, as dgemma generate does",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="show the canvas settle (see below)")
    parser.add_argument("--json", action="store_true", help="for machines (see below)")


def positive(text: str) -> int:
    return _refusing(integer, int(text), least=1)


def seed(text: str) -> int:
    return _refusing(integer, int(text), end=2**63)


def seconds(text: str) -> float:
    return _refusing(number, float(text))


def _refusing(check: Callable[..., Value], value: object, **limits: int) -> Value:
    """argparse puts the flag's name before a message."""
    try:
        return check("", value, **limits)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error


def tools_of(file: str) -> list[dict[str, Any]] | None:
    """The tools in a JSON file: a list, an object with the list "tools", or one tool."""
    try:
        tools = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        if isinstance(tools, Mapping):
            tools = tools.get("tools", [tools])
        return checked_tools(tools)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from error


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# argparse's error messages name a type by its __name__.
positive.__name__ = seed.__name__ = "whole number"
seconds.__name__ = "number"
