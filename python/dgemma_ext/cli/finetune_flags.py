"""The flags of `dgemma finetune`."""

from __future__ import annotations

import argparse
from typing import Any

from dgemma_ext.cli.flags import MODEL, add_device, add_weights, positive, seed
from dgemma_ext.finetune import PASSES, TARGETS, FinetuneSettings, LoraSettings

DESCRIPTION = """\
Trains a low-rank adapter for both passes of a model, whose own weights stay as they are, and writes it as PEFT does.
An interrupted run is continued by the same command with --resume, to the same bits.
"""
EPILOG = """\
A line of DATA.jsonl is {"messages": [...]}, of which the last answer is trained, or {"prompt": ..., "response": ...}.
"""


def add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("data", metavar="DATA.jsonl", help="the examples, one a line")
    parser.add_argument("--out", required=True, metavar="DIR", help="the adapter, the run's state and its log")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    add_device(parser)
    add_weights(parser)
    _add_adapter(parser.add_argument_group("adapter"))
    _add_training(parser.add_argument_group("training (defaults: the published recipe's)"))
    _add_telling(parser.add_argument_group("what is told and kept"))
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")


def _add(group: Any, flag: str, kind: Any, metavar: str, help: str, of: Any = None) -> None:
    default = getattr(of or FinetuneSettings(), flag.strip("-").replace("-", "_"))
    shown = "" if default is None else f" (default: {default:.10g})"
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=help + shown)


def _add_adapter(group: Any) -> None:
    usual = LoraSettings()
    targets = ",".join(usual.targets)
    _add(group, "--rank", positive, "N", "of the factors", usual)
    _add(group, "--alpha", float, "X", "their product is multiplied by alpha / rank", usual)
    group.add_argument(
        "--targets", default=targets, metavar="TARGET,...", help=f"some of {', '.join(TARGETS)} (default: {targets})"
    )
    group.add_argument(
        "--passes", default=usual.passes, choices=PASSES, help="one adapter for both passes, or one each (shared)"
    )


def _add_training(group: Any) -> None:
    _add(group, "--steps", positive, "N", "optimizer steps")
    _add(group, "--batch", positive, "N", "examples of a step")
    _add(group, "--micro-batch", positive, "N", "of these go through the model together (default: all)")
    _add(group, "--rate", float, "X", "the learning rate at its highest")
    _add(group, "--warmup", int, "N", "steps in which it rises; then it falls by a cosine to a tenth")
    _add(group, "--seed", seed, "N", "of every draw")
    _add(group, "--max-length", positive, "N", "tokens of prompt and answer; longer answers are cut")
    _add(group, "--encoder-loss", float, "X", "weight of the next-token loss of the encode pass; 0 leaves it out")
    _add(group, "--self-conditioning", float, "SHARE", "of the examples that are denoised with self-conditioning")
    group.add_argument(
        "--noise", default="uniform", choices=["uniform", "high"], help="the noise level: uniform, or mostly high"
    )
    _add(group, "--shuffle-buffer", positive, "N", "examples among which the next one is drawn")
    group.add_argument(
        "--recompute",
        default="auto",
        choices=["auto", "on", "off"],
        help="activations in backward, which takes a third more time and little memory (auto: where they do not fit)",
    )


def _add_telling(group: Any) -> None:
    group.add_argument("--eval", metavar="FILE.jsonl", help="held-out examples, which the real sampler answers")
    _add(group, "--eval-every", positive, "N", "steps from one evaluation to the next")
    _add(group, "--eval-count", positive, "N", "of the held-out examples, the first ones")
    _add(group, "--save-every", positive, "N", "steps from one written state to the next")
    group.add_argument("--chart", metavar="FILE", help="draw the run, as .png or .svg (needs the extra: finetune)")
