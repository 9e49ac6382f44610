"""`dgemma profile`: where the time of a denoising step goes, as a table, JSON, a chart and a trace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgemma_ext.arguments import path
from dgemma_ext.checkpoint import ModelConfig, Target, resolve_checkpoint, resolve_weights
from dgemma_ext.cli.answer import load_checkpoint, write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.diffusion_gemma import DiffusionGemma
from dgemma_ext.model import resolve_activations, resolve_device, resolve_dtype
from dgemma_ext.profile import Profile, chart, check_sizes, profile, trace
from dgemma_ext.profile.timeline import Pass, ratio_text
from dgemma_ext.profile.true_size import LAYERS, random_model, true_config
from dgemma_ext.units import format_bytes

RANDOM = "random"
# The final norm of a model with flat distributions; with 1 they are as peaked as the tied head makes them.
_FLAT = 0.05


def run(arguments: Arguments) -> None:
    _check_files(arguments)
    model = _model(arguments)
    found = profile(
        model, arguments.steps, arguments.prefix, arguments.batch, context=arguments.context, seed=arguments.seed
    )
    if arguments.chart is not None:
        chart.write(found, Path(arguments.chart), f"dgemma profile {arguments.model}")
    if arguments.trace is not None:
        trace.write(found, Path(arguments.trace))
    if arguments.json:
        options = {"weights": arguments.weights, "activations": arguments.activations}
        write_json({"event": "profile", "model": arguments.model, **options, **fields(found)})
        return
    rounded = f", activations {arguments.activations}" if arguments.activations is not None else ""
    print(table(found, f"{arguments.model}, weights {arguments.weights}{rounded}"))
    for file in filter(None, (arguments.chart, arguments.trace)):
        print(f"written: {file}")


def _check_files(arguments: Arguments) -> None:
    """Checks before anything is loaded that the output files can be written at the end."""
    for name, suffix in (("chart", ".png"), ("trace", ".json")):
        if getattr(arguments, name) is None:
            continue
        file = path(f"--{name}", getattr(arguments, name))
        setattr(arguments, name, file)
        if Path(file).suffix != suffix:
            raise ValueError(f"--{name} must name a file that ends in {suffix}, got {file}")
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"--{name}: {Path(file).parent} is no folder")
    if arguments.chart is not None:
        chart.require()


def _model(arguments: Arguments) -> DiffusionGemma:
    """Loads or makes the model, after checking that the sizes fit it."""
    if arguments.model == RANDOM:
        config = true_config(arguments.layers or LAYERS)
        check_sizes(config, arguments.prefix, arguments.context)
        target = resolve_weights(arguments.weights)
        device, dtype = resolve_device(arguments.device), resolve_dtype(arguments.dtype, config)
        format = target.format if isinstance(target, Target) else str(dtype).removeprefix("torch.")
        activations = resolve_activations(arguments.activations, format, config, device, dtype)
        return random_model(
            config,
            device,
            dtype,
            target if isinstance(target, Target) else None,
            arguments.experts_hit,
            final_norm=_FLAT if arguments.flat else 1.0,
            seed=arguments.seed,
            activations=activations,
        )
    for name, value in (("layers", arguments.layers), ("experts-hit", arguments.experts_hit), ("flat", arguments.flat)):
        if value:
            raise ValueError(f"--{name} is for MODEL {RANDOM}, got {arguments.model}")
    folder = resolve_checkpoint(arguments.model)
    check_sizes(ModelConfig.from_file(folder), arguments.prefix, arguments.context)
    return load_checkpoint(folder, arguments)


# As text ----------------------------------------------------------------------------------------------------------


def table(found: Profile, title: str) -> str:
    """The parts of the step as a table, with the other results below it."""
    step, encode, machine = found.step, found.encode, found.machine
    experts = sum(found.experts_hit) / len(found.experts_hit)
    canvases = "a canvas" if found.batch == 1 else f"{found.batch} canvases"
    if found.driven_seconds is None:
        outside, single = "operators (Python, waiting, the clock itself)", "a step"
    else:
        outside, single = "kernels", "a step driven by Python"
    peaks = ", ".join(f"{peak / 1e12:.4g} TFLOP/s ({kind})" for kind, peak in machine.peaks.items())
    floor = f"floor: bytes at {machine.bandwidth / 1e9:.4g} GB/s or FLOPs at {peaks}, whichever takes longer; "
    floor += "both measured in this run"
    lines = [
        f"{title}: {found.dtype}, {found.layers} layers, on {found.device}",
        f"a denoising step of {canvases} of {found.canvas} tokens after {found.prefix:,}, mean of {step.repeats}",
        "",
        *_rows(step),
        "",
        f"everything else: {_ms(step.between)} ms outside of {outside}",
        f"unwatched, {single} took {_ms(step.unwatched_seconds)} ms",
        f"experts hit: {experts:.1f} of {found.experts} in a layer, on average",
        f"encode of {found.prefix:,} tokens: {_ms(encode.seconds)} ms, floor {_ms(encode.floor)} ms",
    ]
    if found.tower is not None:
        took = f"{_ms(found.tower.seconds)} ms, floor {_ms(found.tower.floor)} ms"
        lines.append(f"vision tower, an image of {found.tower.soft_tokens} tokens: {took}")
    lines.append(floor)
    if found.load is not None:
        lines.append(f"load of this machine before: {found.load:.1f} on {found.cores} cores")
    if found.soft_tiles is not None:
        per_row, union, listed = (f"{count:,.1f}" for count in found.soft_tiles)
        tiles = f"{per_row} of {found.vocabulary_tiles:,} vocabulary tiles count for a row, {union} in all"
        tiles += f"; a GPU's kernels list {listed} of a request"
        lines.insert(lines.index(floor), f"soft embedding: {tiles}")
    return "\n".join(lines)


def _rows(step: Pass) -> list[str]:
    lines = [("part", "ms", "share", "bytes", "GFLOP", "floor ms", "x floor")]
    for row in step.rows:
        share = f"{100 * row.seconds / step.seconds:.1f} %"
        if row.bytes is None or row.flops is None or row.floor is None:
            lines.append((row.part.label, _ms(row.seconds), share, "-", "-", "-", "-"))
            continue
        gigaflops = f"{row.flops / 1e9:.4g}" if row.flops else "-"
        counted = (format_bytes(round(row.bytes)), gigaflops, _ms(row.floor), ratio_text(row.ratio or 0))
        lines.append((row.part.label, _ms(row.seconds), share, *counted))
    moved, flops = (sum(getattr(row, name) or 0 for row in step.rows) for name in ("bytes", "flops"))
    ratio = ratio_text(step.seconds / step.floor)
    total = (
        "step",
        _ms(step.seconds),
        "100 %",
        format_bytes(round(moved)),
        f"{flops / 1e9:.4g}",
        _ms(step.floor),
        ratio,
    )
    lines.append(total)
    widths = [max(len(line[column]) for line in lines) for column in range(len(total))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def _ms(seconds: float) -> str:
    """Milliseconds with three significant digits, or whole ones from 100 on."""
    value = seconds * 1e3
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


# As JSON ----------------------------------------------------------------------------------------------------------


def fields(found: Profile) -> dict[str, Any]:
    """A profile as JSON types. Times are in seconds for one pass."""
    sizes = ("device", "dtype", "layers", "canvas", "prefix", "batch", "context", "experts")
    results = ("experts_hit", "vocabulary_tiles", "soft_tiles", "driven_seconds", "load", "cores")
    return {
        **{name: getattr(found, name) for name in (*sizes, *results)},
        "vision_tower": None if found.tower is None else asdict(found.tower),
        "machine": {"bytes_per_second": found.machine.bandwidth, "flops_per_second": dict(found.machine.peaks)},
        "step": _pass_fields(found.step),
        "encode": _pass_fields(found.encode),
    }


def _pass_fields(one: Pass) -> dict[str, Any]:
    return {
        "repeats": one.repeats,
        "seconds": one.seconds,
        "unwatched_seconds": one.unwatched_seconds,
        "seconds_outside_operators": one.between,
        "floor_seconds": one.floor,
        "parts": [
            {
                "part": row.part.value,
                "seconds": row.seconds,
                "share": row.seconds / one.seconds,
                "bytes": row.bytes,
                "flops": row.flops,
                "floor_seconds": row.floor,
                "ratio": row.ratio,
            }
            for row in one.rows
        ],
    }
