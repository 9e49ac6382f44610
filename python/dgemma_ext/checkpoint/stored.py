"""How one weight is stored in a checkpoint: as a tensor, in the parts of a quantized format, or expert by expert.

The names and dtypes of the stored tensors tell the format, whoever wrote the file:

    unquantized              NAME.weight                  BF16, F16 or F32 [rows, columns]; in GGUF files of any type
    fp8                      NAME.weight                  F8_E4M3 [rows, columns]
                             NAME.weight_scale            BF16, F16 or F32 [rows, 1], [rows] or one
    int8                     NAME.weight                  I8 [rows, columns]
                             NAME.weight_scale            as of fp8, none of them zero
    int4 (pack-quantized)    NAME.weight_packed           I32 [rows, columns / 8]
                             NAME.weight_scale            BF16 or F16 [rows, columns / group]
                             NAME.weight_shape            not read
    nvfp4 (compressed-tensors)  NAME.weight_packed        U8 [rows, columns / 2]
                             NAME.weight_scale            F8_E4M3 [rows, columns / 16]
                             NAME.weight_global_scale     F32, one; divides
    nvfp4 (ModelOpt)         NAME.weight, NAME.weight_scale as above, NAME.weight_scale_2: F32, one; multiplies

Scales of activations (input_scale, input_global_scale) are not used: activations are quantized dynamically. Experts are
stored stacked (experts.gate_up_proj, only unquantized) or one by one (experts.E.gate_proj, up_proj, down_proj).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dgemma_ext.errors import CheckpointError
from dgemma_ext.ops.formats import INT4_GROUPS, NVFP4_GROUP


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its file and its name there, safetensors dtype name and shape, its number of bytes and where
    they begin."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


# By the name that the published layout has for a tensor, which may be stored under another one (tied.py).
Tensors = Mapping[str, TensorInfo]

FLOAT_DTYPES = ("BF16", "F32", "F16")
# The types of GGUF files that are dequantized while they are read; such weights count as unquantized.
GGUF_DTYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
_UNREAD = ("input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale")
_ASYMMETRIC = ("weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class Matrix:
    """One stored matrix [rows, columns].

    `kind`: "unquantized", "fp8", "int8", "int4", "nvfp4" or "nvfp4-modelopt". `parts`: "values", "scales" and
    "global_scales" to the names in the files; `unread`: names that belong to it and are not used. `group`: columns that
    share a scale.
    """

    kind: str
    shape: tuple[int, int]
    parts: dict[str, str]
    unread: tuple[str, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class Experts:
    """Matrices of each expert, stacked when they are loaded: gate and up, or down alone. `shape` is the stack's."""

    shape: tuple[int, int, int]
    matrices: tuple[tuple[Matrix, ...], ...]

    @property
    def kind(self) -> str:
        """The kind of all matrices; "mixed" where they differ, and then they are loaded unquantized."""
        kinds = {(matrix.kind, matrix.group) for matrices in self.matrices for matrix in matrices}
        return kinds.pop()[0] if len(kinds) == 1 else "mixed"


@dataclass(frozen=True)
class StoredTensor:
    """An unquantized tensor of any shape, stored under one name."""

    name: str
    shape: tuple[int, ...]
    kind: str = "unquantized"


Stored = StoredTensor | Matrix | Experts


def names_of(stored: Stored) -> Iterator[str]:
    """All stored names that belong to a weight."""
    if isinstance(stored, StoredTensor):
        yield stored.name
    elif isinstance(stored, Matrix):
        yield from (*stored.parts.values(), *stored.unread)
    else:
        for matrices in stored.matrices:
            for matrix in matrices:
                yield from names_of(matrix)


def find_weight(name: str, shape: tuple[int, ...], tensors: Tensors) -> Stored | None:
    """Finds a weight by the published name that it has unquantized; returns None where nothing of it is stored.

    Raises CheckpointError, naming file and tensor, for parts that are missing, misshapen or of a wrong dtype.
    """
    if len(shape) == 3 and name not in tensors:
        return _find_experts(name, shape, tensors)
    if len(shape) == 2 and name.endswith(".weight"):
        return _find_matrix(name.removesuffix(".weight"), shape, tensors)
    if name not in tensors:
        return None
    _check(tensors, name, shape, FLOAT_DTYPES + GGUF_DTYPES)
    return StoredTensor(tensors[name].name, shape)


def _find_experts(name: str, shape: tuple[int, int, int], tensors: Tensors) -> Experts | None:
    folder, _, last = name.rpartition(".")
    experts, rows, columns = shape
    projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    rows //= len(projections)
    found = [
        [_find_matrix(f"{folder}.{expert}.{projection}", (rows, columns), tensors) for projection in projections]
        for expert in range(experts)
    ]
    if not any(matrix for matrices in found for matrix in matrices):
        return None
    for expert, matrices in enumerate(found):
        for projection, matrix in zip(projections, matrices, strict=True):
            if matrix is None:
                raise CheckpointError("is missing", tensor=f"{folder}.{expert}.{projection}.weight")
    return Experts(shape, tuple(tuple(matrix for matrix in matrices if matrix) for matrices in found))


def _find_matrix(base: str, shape: tuple[int, int], tensors: Tensors) -> Matrix | None:
    weight, packed = f"{base}.weight", f"{base}.weight_packed"
    for suffix in _ASYMMETRIC:
        if f"{base}.{suffix}" in tensors:
            raise CheckpointError(
                f"is of a quantization that is not supported ({suffix}); supported: symmetric, in the columns' order",
                file=tensors[f"{base}.{suffix}"].file,
                tensor=tensors[f"{base}.{suffix}"].name,
            )
    unread = tuple(tensors[f"{base}.{suffix}"].name for suffix in _UNREAD if f"{base}.{suffix}" in tensors)
    if packed in tensors:
        if tensors[packed].dtype == "U8":
            return _nvfp4(base, packed, "weight_global_scale", shape, tensors, unread)
        return _int4(base, shape, tensors, unread)
    if weight not in tensors:
        return None
    dtype = tensors[weight].dtype
    if dtype in ("F8_E4M3", "I8"):
        rows = shape[0]
        scales = _part(base, "weight_scale", tensors)
        _check(tensors, weight, shape, (dtype,))
        _check_one_of(tensors, scales, ((rows, 1), (rows,), (1,), ()), FLOAT_DTYPES)
        kind = "fp8" if dtype == "F8_E4M3" else "int8"
        return Matrix(kind, shape, _names(tensors, values=weight, scales=scales), unread)
    if tensors[weight].dtype == "U8":
        return _nvfp4(base, weight, "weight_scale_2", shape, tensors, unread)
    _check(tensors, weight, shape, FLOAT_DTYPES + GGUF_DTYPES)
    return Matrix("unquantized", shape, _names(tensors, values=weight), unread)


def _int4(base: str, shape: tuple[int, int], tensors: Tensors, unread: tuple[str, ...]) -> Matrix:
    rows, columns = shape
    packed, scales = f"{base}.weight_packed", _part(base, "weight_scale", tensors)
    _check(tensors, packed, (rows, columns // 8), ("I32",))
    stored = tensors[scales].shape
    groups = stored[1] if len(stored) == 2 else 0
    if groups == 0 or stored[0] != rows or columns % groups or columns // groups not in INT4_GROUPS:
        wanted = " or ".join(str([rows, columns // group]) for group in INT4_GROUPS if columns % group == 0)
        raise CheckpointError(
            f"has shape {list(stored)}; the configuration asks for {wanted}",
            file=tensors[scales].file,
            tensor=tensors[scales].name,
        )
    _check(tensors, scales, stored, ("BF16", "F16"))
    return Matrix("int4", shape, _names(tensors, values=packed, scales=scales), unread, columns // groups)


def _nvfp4(
    base: str, packed: str, global_suffix: str, shape: tuple[int, int], tensors: Tensors, unread: tuple[str, ...]
) -> Matrix:
    rows, columns = shape
    scales, global_scales = _part(base, "weight_scale", tensors), _part(base, global_suffix, tensors)
    _check(tensors, packed, (rows, columns // 2), ("U8",))
    _check(tensors, scales, (rows, columns // NVFP4_GROUP), ("F8_E4M3",))
    _check_one_of(tensors, global_scales, ((1,), ()), ("F32",))
    kind = "nvfp4" if global_suffix == "weight_global_scale" else "nvfp4-modelopt"
    parts = _names(tensors, values=packed, scales=scales, global_scales=global_scales)
    return Matrix(kind, shape, parts, unread, NVFP4_GROUP)


def _names(tensors: Tensors, **parts: str) -> dict[str, str]:
    """The names in the files of a matrix's parts."""
    return {part: tensors[name].name for part, name in parts.items()}


def _part(base: str, suffix: str, tensors: Tensors) -> str:
    name = f"{base}.{suffix}"
    if name not in tensors:
        values = tensors.get(f"{base}.weight_packed") or tensors[f"{base}.weight"]
        raise CheckpointError("is missing, and the quantized weight needs it", file=values.file, tensor=name)
    return name


def _check(tensors: Tensors, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    _check_one_of(tensors, name, (shape,), dtypes)


def _check_one_of(tensors: Tensors, name: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> None:
    info = tensors[name]
    if info.shape not in shapes:
        raise CheckpointError(
            f"has shape {list(info.shape)}; the configuration asks for {' or '.join(str(list(s)) for s in shapes)}",
            file=info.file,
            tensor=info.name,
        )
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"has dtype {info.dtype}; supported: {', '.join(dtype for dtype in dtypes if dtype not in GGUF_DTYPES)}",
            file=info.file,
            tensor=info.name,
        )
