"""The arguments of the command line, and its help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from dgemma_ext.checkpoint import DEMO
from dgemma_ext.cli import finetune_flags
from dgemma_ext.cli.finetune_flags import add_finetune
from dgemma_ext.cli.flags import (
    MODEL,
    add_activations,
    add_adapter,
    add_adapters,
    add_device,
    add_grammar,
    add_image_tokens,
    add_images,
    add_model,
    add_output,
    add_patterns,
    add_prompting,
    add_sampling,
    add_serving,
    add_weights,
    positive,
    seconds,
    seed,
    tools_of,
)
from dgemma_ext.cli.palette import LEGEND
from dgemma_ext.demo.puzzles import BOX_SHAPES
from dgemma_ext.sampling import Choice, Grammar, JsonSchema, Regex, SamplerConfig, ToolCalls
from dgemma_ext.version import __version__

_PICTURE = f"""\
The picture shows the draft after every denoising step. A token's colour is its entropy, dark to bright as it settles,
one colour for every factor of about three (nats):
  {LEGEND}
Accepted tokens (those whose sampled token is kept for the next step) are underlined, pinned ones bold and white. Above
it stand canvas, step, temperature, mean entropy and how many are accepted. Where there is no terminal each step is one
plain line.
"""

_WATCH = "--watch draws on stderr, so that stdout holds the answer alone.\n" + _PICTURE

_JSON = """\
--json writes one JSON object per answer and line: "event" is "result", with text, token_ids, finish_reason,
denoising_steps (one number per canvas), tokens_per_forward, thinking, tool_calls (name and arguments),
invalid_tool_calls (text and error), seed, seconds; with --choice also choices, the score of each. With --watch, a
"draft" for every denoising step (token_ids, entropy and accepted by position, ...) and a "commit" for every finished
canvas come before it.
"""

_CODES = """\
exit code: 0 done, 1 failed, 2 an argument, an input or a checkpoint that cannot be used, 130 interrupted.
DGEMMA_DEBUG=1 shows where an error comes from and checks every layer's output. NO_COLOR=1 leaves colours out.
"""


class Arguments(argparse.Namespace):
    """A parsed command line; `build_parser` defines the attributes of each command."""

    # Of commands without these flags.
    adapter: str | list[str] | None = None
    adapter_passes: str | None = None

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(
            max_denoising_steps=self.steps,
            entropy_bound=self.entropy_bound,
            t_min=self.t_min,
            t_max=self.t_max,
            stability_threshold=self.stability_threshold,
            confidence_threshold=self.confidence_threshold,
            canvas_length=self.canvas_length,
            trim_canvas=self.trim_canvas,
        )

    @property
    def adapters(self) -> tuple[str | None, dict[str, str]]:
        """The adapter of all requests, and those that requests name. Raises ValueError for two of a name."""
        if self.adapter is None or isinstance(self.adapter, str):
            return self.adapter, {}
        unnamed, named = None, dict[str, str]()
        for given in self.adapter:
            name, is_named, path = given.partition("=")
            # A folder that is there is meant as it is written, with = in its name too.
            if not is_named or Path(given).is_dir():
                if unnamed is not None:
                    raise ValueError("--adapter is given twice without a name")
                unnamed = given
            elif name in named or not name or not path:
                raise ValueError(f"--adapter must be NAME=PATH with a name of its own, or PATH, got {given!r}")
            else:
                named[name] = path
        return unnamed, named

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must match. Raises ValueError for a schema that cannot be read, and for flags that do not go
        together."""
        thinking: dict[str, Any] = {"thinking_budget": self.thinking_budget}
        if self.json_schema is not None:
            try:
                text = Path(self.json_schema).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"the schema {self.json_schema} cannot be read: {error}") from error
            return JsonSchema(text, **thinking)
        if self.regex is not None:
            return Regex(self.regex, **thinking)
        if self.choice is not None:
            return Choice(self.choice, **thinking)
        if self.tool_choice is not None:
            if self.tools is None:
                raise ValueError("--tool-choice needs --tools")
            return ToolCalls(self.tools, self.tool_choice, **thinking)
        if self.thinking_budget is None:
            return None
        # A thought is bounded where a grammar holds what follows it: here any text, and calls.
        return Regex("(?s:.*)", **thinking) if self.tools is None else ToolCalls(self.tools, **thinking)

    @property
    def prompting(self) -> dict[str, Any]:
        """The arguments of `generate` and `chat` for the chat template."""
        return {
            "tools": self.tools,
            "enable_thinking": True if self.thinking else None,
            "chat_template_kwargs": dict(self.template_variable) or None,
            "special_tokens": self.special_tokens,
        }


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        # Descriptions and epilogs below have their line breaks already.
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        # argparse's own method prints the whole usage before the message.
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dgemma", description="Runs DiffusionGemma.", epilog=_CODES)
    parser.add_argument("--version", action="version", version=f"dgemma {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    generate = commands.add_parser(
        "generate", help="answer a prompt", description="Answers a prompt.", epilog=f"{_WATCH}\n{_JSON}"
    )
    add_model(generate)
    add_adapter(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="the user's message, or - to read it from stdin")
    generate.add_argument("--system", metavar="TEXT", help="a system message before it")
    add_images(generate)
    add_prompting(generate)
    add_grammar(generate)
    add_sampling(generate)
    add_output(generate)

    chat = commands.add_parser(
        "chat",
        help="talk in turns",
        description="Talks in turns, one line each. /help lists the commands. Ctrl-C stops an answer and keeps the\n"
        "conversation; end of input leaves. Turn n (the first is 0) samples with seed + n.",
        epilog=f"{_WATCH}\n{_JSON}",
    )
    add_model(chat)
    add_adapter(chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    chat.add_argument(
        "--context", type=positive, metavar="N", help="longest conversation in tokens (default: 8192, or the model's)"
    )
    add_image_tokens(chat)
    add_prompting(chat)
    add_sampling(chat)
    add_output(chat)

    decide = commands.add_parser(
        "decide",
        help="choose between texts, with a probability for each",
        description="Tells how probable each of some choices is as the answer to a prompt, read in one denoising\n"
        "step. The last line is their mass: what they hold together of the model's whole distribution.",
    )
    add_model(decide)
    add_adapter(decide)
    decide.add_argument("prompt", metavar="PROMPT", help="the user's message, or - to read it from stdin")
    decide.add_argument("--system", metavar="TEXT", help="a system message before it")
    add_images(decide)
    decide.add_argument(
        "--choice",
        action="append",
        metavar="TEXT[=LABEL]",
        help="a choice; give it several times. Its label, by default itself, is one token",
    )
    decide.add_argument(
        "--template", default="{}", metavar="TEXT", help="the answer's text, {} where the label stands (default: {})"
    )
    decide.add_argument(
        "--canvas-length", type=positive, metavar="N", help="positions (default: 32, or more where it needs them)"
    )
    decide.add_argument("--seed", type=seed, default=0, metavar="N", help="of the label's noise (default: 0)")
    add_prompting(decide)
    decide.add_argument("--json", action="store_true", help="one JSON object")

    grammar = commands.add_parser(
        "grammar",
        help="tell what a JSON schema or another grammar compiles to",
        description="Compiles what an answer must match, over a checkpoint's tokens, and tells its size, its shortest\n"
        "text and ten texts at random. What cannot be followed is exit code 2, with the JSON pointer and the keyword.",
    )
    grammar.add_argument("json_schema", metavar="FILE.json", nargs="?", help="a JSON schema; or one of these:")
    add_patterns(grammar)
    grammar.add_argument("--tools", type=tools_of, metavar="FILE.json", help="functions, a list of JSON schemas")
    grammar.add_argument("--tool-choice", metavar="CHOICE", help="auto, required (the default), or a tool's name")
    grammar.add_argument("--thinking", action="store_true", help="for prompts that let the model think")
    grammar.add_argument("--model", default=DEMO, metavar="MODEL", help=f"{MODEL} (default: {DEMO})")
    grammar.add_argument("--seed", type=seed, default=0, metavar="N", help="of the texts at random (default: 0)")
    grammar.add_argument("--json", action="store_true", help="one JSON object")

    info = commands.add_parser(
        "info",
        help="tell what a checkpoint, this build and this machine are",
        description="Tells what a checkpoint's headers say (no weight is read), what this build has and what this\n"
        "machine can run.",
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL} (info downloads nothing)")
    add_adapter(info)
    info.add_argument("--context", type=positive, metavar="N", help="tokens of a cache slot (default: 8192, at most)")
    info.add_argument("--device", default="auto", help="where the memory is planned: auto, cpu or cuda")
    info.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: as stored")
    add_weights(info)
    add_activations(info)
    info.add_argument("--json", action="store_true", help="one JSON object")

    quantize = commands.add_parser(
        "quantize",
        help="write a checkpoint with weights of 8 or 4 bits",
        description="Writes a checkpoint's quantized form in the layout of compressed-tensors, and tells the error of\n"
        "every layer. OUT appears when it is whole; an interrupted run is continued by the same command.",
    )
    quantize.add_argument("model", metavar="IN", help=MODEL)
    quantize.add_argument("out", metavar="OUT", help="the folder to write, which must not exist")
    quantize.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="fp8 or int8 (a scale per row), int4 (a scale per 32 columns), int4-64, int4-128, or nvfp4",
    )
    quantize.add_argument(
        "--parts",
        metavar="PART,...",
        help="some of experts, attention, mlp; default, as published checkpoints do: all of them for fp8 and int8, "
        "experts and attention for int4, experts for nvfp4",
    )
    quantize.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text by which errors are weighed: what the model's products take in over it; IN must fit into memory",
    )
    add_adapter(quantize)
    quantize.add_argument("--json", action="store_true", help="one JSON object")

    add_finetune(
        commands.add_parser(
            "finetune",
            help="train an adapter on examples",
            description=finetune_flags.DESCRIPTION,
            epilog=finetune_flags.EPILOG,
        )
    )

    profile = commands.add_parser(
        "profile",
        help="tell where the time of a denoising step goes",
        description="Runs denoising steps, and one encode pass, and tells for each part how long it takes, what it\n"
        "reads and multiplies, and how long that takes at best on this device (bandwidth and products are\n"
        "measured in the same run).",
        epilog="MODEL random has the published sizes and no checkpoint; --layers makes it fit.",
    )
    profile.add_argument("model", metavar="MODEL", help=f"{MODEL}; or random")
    add_device(profile)
    add_weights(profile)
    add_activations(profile)
    profile.add_argument("--steps", type=positive, default=4, metavar="N", help="steps to watch (default: 4)")
    profile.add_argument(
        "--prefix", type=positive, default=128, metavar="N", help="random tokens before the canvas (default: 128)"
    )
    profile.add_argument("--batch", type=positive, default=1, metavar="N", help="requests side by side (default: 1)")
    profile.add_argument("--context", type=positive, metavar="N", help="tokens of a cache slot (default: the prefix)")
    profile.add_argument("--seed", type=seed, default=0, metavar="N", help="of the tokens and draws (default: 0)")
    profile.add_argument("--layers", type=positive, metavar="N", help="random: of so many layers (default: 30)")
    profile.add_argument("--experts-hit", type=positive, metavar="N", help="random: route to N experts (default: all)")
    profile.add_argument("--flat", action="store_true", help="random: flat distributions (default: peaked)")
    profile.add_argument("--chart", metavar="FILE.png", help="draw time against floor (needs the extra: report)")
    profile.add_argument("--trace", metavar="FILE.json", help="write every operator for Perfetto or chrome://tracing")
    profile.add_argument("--json", action="store_true", help="one JSON object")

    serve = commands.add_parser(
        "serve",
        help="answer over HTTP, as OpenAI's servers do",
        description="Answers over HTTP by OpenAI's interface (needs the extra: serve); /docs on the server describes\n"
        "it. The first SIGTERM or Ctrl-C lets running requests finish, a second one ends at once.",
        epilog="DGEMMA_API_KEY=KEY does what --api-key KEY does, which other users of the machine could read.",
    )
    add_model(serve)
    add_adapters(serve)
    add_serving(serve)

    demo = commands.add_parser(
        "demo",
        help="watch a bundled model solve an unseen Sudoku",
        description="Draws a Sudoku with one solution, from random streams that training does not use, lets a bundled\n"
        "model solve it, and checks the answer. The exit code reports errors, not puzzle results.",
        epilog=_PICTURE,
    )
    demo.add_argument("--size", type=int, choices=sorted(BOX_SHAPES), help="of the grid (default: the largest bundled)")
    demo.add_argument("--count", type=positive, default=1, metavar="N", help="so many puzzles (default: 1)")
    demo.add_argument("--seed", type=seed, metavar="N", help="draws puzzle and samples (default: a new one each time)")
    demo.add_argument(
        "--no-pin",
        dest="pin",
        action="store_false",
        help="tell the clues in the prompt alone; by default they are also pinned in the canvas",
    )
    demo.add_argument("--model", metavar="MODEL", help="another checkpoint for the same task")
    add_adapter(demo)
    demo.add_argument(
        "--pause",
        type=seconds,
        default=0.25,
        metavar="SECONDS",
        help="between steps in a terminal, not counted (default: 0.25)",
    )
    add_device(demo)
    add_weights(demo)
    add_activations(demo)
    demo.add_argument("--watch", action="store_true", help="with --json: drafts and commits too")
    demo.add_argument("--json", action="store_true", help="one JSON object per puzzle and line")
    return parser
