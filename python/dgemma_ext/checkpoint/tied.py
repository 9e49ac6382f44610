"""Tensors that a checkpoint stores more often than needed, and buffers that it need not store.

Published checkpoints hold a text weight once, under `model.decoder`. Others hold the head or the encoder's weights too,
which are tied to the decoder's (`_tied_weights_keys` in transformers' modeling_diffusion_gemma.py), or only one of the
tied names (`safetensors.torch.save_model`), and buffers that follow from the configuration. A weight is taken under
the decoder's name where that is stored; every other copy must equal it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import torch

from dgemma_ext.checkpoint.stored import FLOAT_DTYPES, TensorInfo
from dgemma_ext.errors import CheckpointError

# Stored prefix → the prefix of the tensors that it is tied to.
_TIED = (
    ("lm_head.", "model.decoder.embed_tokens."),
    ("model.encoder.language_model.", "model.decoder."),
)
_OWN_TO_THE_ENCODER = re.compile(r"model\.encoder\.language_model\.layers\.\d+\.layer_scalar")
# What transformers computes when it makes the model: frequencies of rotary embedding, scale of the token embedding.
_BUFFERS = re.compile(r"model\.(decoder|encoder\.language_model)\.(.*\.)?(\w*inv_freq|embed_scale|position_ids)")
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Copies are compared in pieces of this many values, so that no second copy of a tensor is in memory.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Names:
    """The stored tensors by what they are.

    `weights`: published name → tensor. `copies`: stored name of a copy → stored name of the tensor that it must equal.
    `buffers`: stored names of buffers, which are not read.
    """

    weights: dict[str, TensorInfo]
    copies: dict[str, str]
    buffers: tuple[str, ...]


def published_name(name: str) -> str:
    """The name that the published layout has for a tensor of this name."""
    if not _OWN_TO_THE_ENCODER.fullmatch(name):
        for prefix, tied_to in _TIED:
            if name.startswith(prefix):
                return tied_to + name.removeprefix(prefix)
    return name


def sort_names(tensors: dict[str, TensorInfo]) -> Names:
    """Finds copies and buffers. Raises CheckpointError, naming it, for a copy of another shape or dtype."""
    buffers = tuple(name for name in tensors if _BUFFERS.fullmatch(name))
    weights: dict[str, TensorInfo] = {}
    copies: dict[str, str] = {}
    # Tensors under their published names come first.
    for name in sorted(tensors.keys() - set(buffers), key=lambda name: (published_name(name) != name, name)):
        published, tensor = published_name(name), tensors[name]
        if published not in weights:
            weights[published] = tensor
            continue
        twin = weights[published]
        floats = tensor.dtype in FLOAT_DTYPES and twin.dtype in FLOAT_DTYPES
        if tensor.shape != twin.shape or not (tensor.dtype == twin.dtype or floats):
            raise CheckpointError(
                f"is {tensor.dtype} {list(tensor.shape)}, and {twin.name}, which it is tied to, {twin.dtype} "
                f"{list(twin.shape)}",
                file=tensor.file,
                tensor=name,
            )
        copies[name] = twin.name
    return Names(weights, copies, buffers)


def check_copies(
    tensors: dict[str, TensorInfo], copies: dict[str, str], advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Compares every copy with its tensor, piece by piece; of two dtypes, rounded to the narrower one.

    advance: called with the number of a copy's bytes that were compared. Raises CheckpointError, naming file and
    tensor, for a copy that differs and for a file that cannot be read.
    """
    for copy, original in copies.items():
        tensor, twin = tensors[copy], tensors[original]
        try:
            with tensor.file.open("rb") as left, twin.file.open("rb") as right:
                position = _first_difference(tensor, left, twin, right, advance)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=tensor.file, tensor=copy) from error
        if position is not None:
            index = [int(i) for i in torch.unravel_index(torch.tensor(position, device="cpu"), tensor.shape)]
            raise CheckpointError(
                f"differs at {index} from {original}, which it is tied to: the two are one weight of the model",
                file=tensor.file,
                tensor=copy,
            )


def _first_difference(
    tensor: TensorInfo, left: BinaryIO, twin: TensorInfo, right: BinaryIO, advance: Callable[[int], None]
) -> int | None:
    values = math.prod(tensor.shape)
    if values == 0:
        return None
    widths = tensor.nbytes // values, twin.nbytes // values
    left.seek(tensor.offset)
    right.seek(twin.offset)
    for begin in range(0, values, _PIECE):
        count = min(_PIECE, values - begin)
        mine, theirs = bytearray(left.read(count * widths[0])), bytearray(right.read(count * widths[1]))
        advance(len(mine))
        if tensor.dtype == twin.dtype:
            if mine == theirs:
                continue
            unequal = torch.frombuffer(mine, dtype=torch.uint8) != torch.frombuffer(theirs, dtype=torch.uint8)
            return begin + int(unequal.nonzero()[0]) // widths[0]
        pieces = [
            torch.frombuffer(piece, dtype=_TORCH_DTYPES[info.dtype]) for piece, info in ((mine, tensor), (theirs, twin))
        ]
        # bfloat16 is the narrower of two 16-bit formats: it has fewer bits of mantissa.
        narrower = min((piece.dtype for piece in pieces), key=lambda dtype: -torch.finfo(dtype).eps)
        unequal = pieces[0].to(narrower) != pieces[1].to(narrower)
        if bool(unequal.any()):
            return begin + int(unequal.nonzero()[0])
    return None
