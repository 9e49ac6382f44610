"""Recognises folders and files that hold a model in a form that this engine does not load, and says what to do."""

from __future__ import annotations

from pathlib import Path

from dgemma_ext.checkpoint.file_faults import check_link
from dgemma_ext.checkpoint.json_section import read_object
from dgemma_ext.errors import CheckpointError

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
# The files of a checkpoint that are read.
_READ = ("*.json", "*.jinja", "*.safetensors")

_SAVE_AGAIN = "load it with transformers and save it by save_pretrained, which writes safetensors"
# Patterns of files in a folder without safetensors → what they are, and what to do. The first that is there counts.
_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("*.distcp", ".metadata"),
        "a torch.distributed checkpoint (FSDP), in one piece per process",
        "merge it, as `accelerate merge-weights` does",
    ),
    (
        ("zero_to_fp32.py", "global_step*", "*_optim_states.pt"),
        "a DeepSpeed checkpoint, in one piece per process",
        "merge it with its zero_to_fp32.py, which writes safetensors by --safe_serialization",
    ),
    (("pytorch_model*.bin", "*.bin", "*.pt", "*.pth"), "weights as Python pickles, which are programs", _SAVE_AGAIN),
    (
        ("_CHECKPOINT_METADATA", "manifest.ocdbt", "ocdbt.process_*"),
        "a checkpoint of JAX (Orbax)",
        "load the safetensors checkpoint of transformers in its place",
    ),
    (
        ("*.engine", "*.plan", "*.onnx"),
        "a model that was built for another engine",
        "load the safetensors checkpoint that it was built from",
    ),
    (("weights.npz", "*.npz"), "weights of MLX", "load the safetensors checkpoint that they were made from"),
)


def check_not_foreign(folder: Path) -> None:
    """Raises CheckpointError, saying what it is and what to do, for a folder that holds something else than a
    checkpoint in safetensors, and for one with links to nothing."""
    for pattern in _READ:
        for file in folder.glob(pattern):
            check_link(file)
    adapter = folder / ADAPTER_FILE
    if adapter.is_file():
        raise CheckpointError(_adapter(adapter), file=folder)
    has_config, has_weights = (folder / CONFIG_FILE).exists(), any(weight_files(folder))
    if has_config and has_weights:
        return
    if not has_weights:
        for patterns, what, advice in _KINDS:
            if any(next(folder.glob(pattern), None) for pattern in patterns):
                raise CheckpointError(f"holds {what}: {advice}", file=folder)
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
    if inner and not has_config:
        shown = ", ".join(inner[:5]) + (", ..." if len(inner) > 5 else "")
        raise CheckpointError(f"is no checkpoint, but holds some: give one of its folders ({shown})", file=folder)


def check_not_foreign_file(file: Path) -> None:
    """Raises CheckpointError for a path that leads to a file, where the folder of a checkpoint is wanted."""
    raise CheckpointError(
        "is a file; wanted: the checkpoint's folder, a GGUF file (*.gguf), or a hub id (owner/name)", file=file
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name, links to nothing among them, without hidden ones."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _adapter(file: Path) -> str:
    settings = read_object(file)
    kind, base = (settings.get(field) for field in ("peft_type", "base_model_name_or_path"))
    made_for = f" for {base}" if isinstance(base, str) else ""
    return (
        f"holds an adapter of PEFT ({kind if isinstance(kind, str) else 'of no kind'}){made_for}, not a whole model: "
        "load the base and give this folder as its adapter"
    )
