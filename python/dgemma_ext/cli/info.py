"""`dgemma info`: facts of this build and machine, and of a checkpoint's headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgemma_ext.arguments import path
from dgemma_ext.checkpoint import Adapter, ModelConfig, resolve_checkpoint
from dgemma_ext.cli.answer import write_json
from dgemma_ext.cli.arguments import Arguments
from dgemma_ext.cli.facts import adapter_facts, checkpoint_facts, machine_facts
from dgemma_ext.engine import plan_row
from dgemma_ext.errors import CheckpointError
from dgemma_ext.units import format_bytes


def run(arguments: Arguments) -> None:
    facts: dict[str, Any] = {"machine": machine_facts()}
    if arguments.model is not None:
        folder = _local_folder(arguments.model)
        options = (arguments.weights, arguments.dtype, arguments.device, arguments.activations)
        adapter, (source, _) = None, arguments.adapters
        if source is not None:
            config = ModelConfig.from_file(folder)
            adapter = Adapter.from_folder(source, config, arguments.adapter_passes)
            facts["adapter"] = adapter_facts(adapter, config)
        facts["checkpoint"] = checkpoint_facts(folder, arguments.context, *options, adapter)
    elif arguments.adapter is not None:
        raise ValueError("--adapter needs MODEL, whose weights it changes")
    if arguments.json:
        write_json(facts)
        return
    sections = [_machine_rows(facts["machine"])]
    if "checkpoint" in facts:
        sections.insert(0, _checkpoint_rows(facts["checkpoint"]))
    texts = [_aligned(rows) for rows in sections]
    if "adapter" in facts:
        texts.insert(1, _aligned(_adapter_rows(facts["adapter"])))
    if "checkpoint" in facts:
        memory = facts["checkpoint"]["memory"]
        slots = f"up to {memory['chat_snapshots']} slots"
        chat = plan_row("for a chat besides", slots, memory["chat_snapshots_bytes"])
        texts.insert(1, f"memory on {memory['device']}\n{memory['table']}\n{chat}")
    print("\n\n".join(texts))


def _local_folder(name: str) -> Path:
    """The folder of a checkpoint on this machine; `info` never downloads one."""
    if Path(path("MODEL", name)).exists() or "/" not in name.strip("/"):
        return resolve_checkpoint(name)
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # not installed, not a hub id, not downloaded: the hub client has many errors
        raise CheckpointError("is no folder here and no hub id that is already downloaded", file=name) from error
    return resolve_checkpoint(folder)


Rows = list[tuple[str, str]]


def _machine_rows(facts: dict[str, Any]) -> Rows:
    gpus = [f"{gpu['name']}, {format_bytes(gpu['bytes'])}" for gpu in facts["gpus"]]
    return [
        ("version", f"dgemma_ext {facts['version']}, torch {facts['torch']}, Python {facts['python']}"),
        ("CPU", f"{facts['cpu']}; processors: {facts['processors']}, torch threads: {facts['threads']}"),
        ("CPU kernels", f"{', '.join(facts['cpu_variants'])}; chosen: {facts['cpu_variant']}"),
        ("CUDA kernels", "in this build" if facts["cuda_kernels"] else "not in this build"),
        ("GPU", "; ".join(gpus) or "none that torch sees"),
        ("bundled models", ", ".join(f"Sudoku {size}x{size}" for size in facts["bundled_sudoku_sizes"]) or "none"),
    ]


def _checkpoint_rows(facts: dict[str, Any]) -> Rows:
    sliding, full = facts["sliding_layers"], facts["full_layers"]
    experts, sampler, parameters = facts["experts"], facts["sampler"], facts["parameters"]
    vision, cache = facts["vision"], facts["cache"]
    stored = "; ".join(
        f"{part['tensors']:,} in {dtype}, {format_bytes(part['bytes'])}" for dtype, part in facts["stored"].items()
    )
    rows = [
        ("checkpoint", facts["path"]),
        ("files", f"{facts['files']}, {format_bytes(facts['stored_bytes'])} of tensors"),
        ("tensors", stored),
        (
            "layers",
            f"{sliding['count'] + full['count']}: {sliding['count']} sliding ({_heads(sliding)}, window "
            f"{sliding['window']:,}), {full['count']} full ({_heads(full)})",
        ),
        ("width", f"hidden {facts['hidden_size']:,}, {facts['attention_heads']} query heads"),
        (
            "MLP",
            f"dense of {facts['intermediate_size']:,}, and {experts['per_token']} of {experts['count']} experts of "
            f"{experts['size']:,} per token",
        ),
        ("vocabulary", f"{facts['vocabulary']:,} tokens"),
        ("context", f"{facts['context']:,} tokens, canvas of {facts['canvas_length']}"),
        ("parameters", f"{parameters['text']:,} for text, {parameters['active']:,} active per token"),
        ("vision", _vision(vision)),
        (
            "cache",
            f"{cache['bytes_per_token']:,} bytes per token ({cache['bytes_per_token_after_window']:,} beyond the "
            f"window); a slot of {cache['slot_context']:,} tokens {format_bytes(cache['slot_bytes'])}, "
            f"in {cache['dtype']}",
        ),
        (
            "sampler",
            f"{sampler['max_denoising_steps']} steps at most, temperature {sampler['t_max']} to {sampler['t_min']}, "
            f"entropy bound {sampler['entropy_bound']}, stop after {sampler['stability_threshold']} unchanged and "
            f"mean entropy below {sampler['confidence_threshold']}",
        ),
    ]
    if facts["copies"]:
        rows.append(("stored again", f"{_several(facts['copies'])}, tied to weights that are stored"))
    if facts["buffers"]:
        rows.append(("buffers, skipped", _several(facts["buffers"])))
    if facts["ignored_settings"]:
        settings = (f"{name} {json.dumps(value)}" for name, value in facts["ignored_settings"].items())
        rows.append(("settings, ignored", ", ".join(settings)))
    missing = [name for name, is_there in facts["text_files"].items() if not is_there]
    if missing:
        rows.append(("missing for text", ", ".join(missing)))
    return rows


def _vision(facts: dict[str, Any]) -> str:
    if facts["refused"] is not None:
        return f"cannot be loaded: {facts['refused']}"
    if "layers" not in facts:
        return "none stored" if not facts["tensors"] else "not described in config.json, so skipped"
    return (
        f"{facts['layers']} layers of hidden {facts['hidden_size']:,}, {facts['tensors']} tensors, "
        f"{format_bytes(facts['bytes'])}; an image takes up to {facts['soft_tokens']} tokens"
    )


def _adapter_rows(facts: dict[str, Any]) -> Rows:
    rows = [
        ("adapter", f"rank {facts['rank']}, scale {facts['scale']:g}, for {facts['base'] or 'a base without a name'}"),
        ("passes", facts["passes"]),
        ("modules", ", ".join(facts["modules"])),
        ("parameters", f"{facts['parameters']:,}, {format_bytes(facts['bytes'])} in {facts['dtype']}"),
    ]
    if facts["ignored"]:
        rows.append(("vision, not used", _several(facts["ignored"])))
    return rows


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def _heads(layers: dict[str, Any]) -> str:
    return f"{layers['key_value_heads']} key/value heads of {layers['head_dim']}"


def _aligned(rows: Rows) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {value}" for label, value in rows)
