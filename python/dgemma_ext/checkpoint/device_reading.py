"""Reads weights from a checkpoint's files to a GPU: as stored, straight to their place, and checked there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dgemma_ext.checkpoint.reading import CHUNK_ELEMENTS, MappedFiles, Weight, WeightReader, stack_weights
from dgemma_ext.checkpoint.staging import StagedCopies
from dgemma_ext.checkpoint.stored import Experts, Matrix, Stored
from dgemma_ext.ops.formats import Fp8Weight, Int4Weight, Int8Weight, Nvfp4Weight, QuantizedWeight

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@contextmanager
def weight_reader(
    files: MappedFiles, dtype: torch.dtype, device: torch.device, advance: Callable[[int], None]
) -> Iterator[WeightReader | DeviceReader]:
    """The reader for a device. All that it read is checked when the block ends."""
    if is_in_main_memory(device):
        yield WeightReader(files, dtype, advance)
        return
    if files.info.is_gguf:
        yield _CopyingReader(files, dtype, device, advance)
        return
    # Pinned memory and events are of the current GPU.
    with torch.cuda.device(device), StagedCopies(files.info, device, advance) as staged:
        reader = DeviceReader(files, staged, dtype, device)
        yield reader
        reader.finish()


def is_in_main_memory(device: torch.device) -> bool:
    return device.type == "cpu"


class _CopyingReader(WeightReader):
    """Reads weights on the CPU, where a GGUF file's are dequantized, and copies them to a device."""

    def __init__(
        self, files: MappedFiles, dtype: torch.dtype, device: torch.device, advance: Callable[[int], None]
    ) -> None:
        super().__init__(files, dtype, advance)
        self._device = device

    def read(self, stored: Stored) -> Weight:
        return super().read(stored).to(self._device)


class DeviceReader:
    """Like WeightReader, to a device that is not the CPU. Nothing waits for the device before `finish`.

    Values are checked by the device; a fault is looked for again in the mapped file, to name its tensor and place.
    """

    def __init__(self, files: MappedFiles, staged: StagedCopies, dtype: torch.dtype, device: torch.device) -> None:
        self._files, self._staged, self._dtype, self._device = files, staged, dtype, device
        # Whether values are as they must be, how the mapped file is asked for the fault, and the names to ask for.
        self._checks: list[tuple[Tensor, Callable[[WeightReader, str], object], Sequence[str]]] = []

    def read(self, stored: Stored) -> Weight:
        """A weight as stored; experts are stacked, and unquantized where they have more than one format."""
        if isinstance(stored, Experts):
            return self._read_experts(stored)
        if isinstance(stored, Matrix):
            return self._read_matrix(stored)
        return self._read_tensor(stored.name)

    def finish(self) -> None:
        """Raises CheckpointError, naming file and tensor, for values that no weight may have."""
        checks, self._checks = self._checks, []
        if not checks:
            return
        for fine, (_, find, names) in zip(torch.stack([one[0] for one in checks]).tolist(), checks, strict=True):
            if fine:
                continue
            mapped = WeightReader(self._files, self._dtype, lambda nbytes: None)
            for name in names:
                find(mapped, name)
            raise self._files.error(names[0], "was read broken, and the file has it right now")

    def _read_tensor(self, name: str) -> Tensor:
        result = torch.empty(self._files.info.tensors[name].shape, dtype=self._dtype, device=self._device)
        self._fill(name, result)
        self._check_finite(result, [name])
        return result

    def _read_matrix(self, stored: Matrix) -> Weight:
        if stored.kind == "unquantized":
            return self._read_tensor(stored.parts["values"])
        return self._stack([[stored]]).expert(0)

    def _read_experts(self, stored: Experts) -> Weight:
        if stored.kind not in ("unquantized", "mixed"):
            return self._stack(stored.matrices)
        stack = torch.empty(stored.shape, dtype=self._dtype, device=self._device)
        for expert, matrices in enumerate(stored.matrices):
            first = 0
            for matrix in matrices:
                rows = stack[expert, first : first + matrix.shape[0]]
                if matrix.kind == "unquantized":
                    self._fill(matrix.parts["values"], rows)
                else:
                    rows.copy_(self._stack([[matrix]]).expert(0).dequantized(self._dtype))
                if stored.kind == "mixed" and matrix.kind == "unquantized":
                    self._check_finite(rows, [matrix.parts["values"]])
                first += matrix.shape[0]
        if stored.kind == "unquantized":
            names = [matrix.parts["values"] for matrices in stored.matrices for matrix in matrices]
            self._check_finite(stack, names)
        return stack

    def _fill(self, name: str, target: Tensor) -> None:
        """Fills a contiguous tensor with an unquantized one. After a flush, unless it was converted."""
        stored = _DTYPES[self._files.info.tensors[name].dtype]
        if stored == self._dtype:
            self._staged.copy(name, target)
            return
        for begin, piece in _pieces(target):
            unconverted = torch.empty(piece.shape, dtype=stored, device=self._device)
            self._staged.copy(name, unconverted, begin * stored.itemsize)
            self._staged.flush()
            piece.copy_(unconverted)

    def _stack(self, matrices: Sequence[Sequence[Matrix]]) -> QuantizedWeight:
        """Quantized matrices of one format as one weight [experts, rows, columns].

        matrices: for each expert those whose rows follow each other, all of one shape.
        """
        first = matrices[0][0]
        names = {part: [matrix.parts[part] for one in matrices for matrix in one] for part in first.parts}
        if not all(self._are_alike(of_part) for of_part in names.values()):
            experts = ([self._stack([[matrix]]).expert(0) for matrix in one] for one in matrices)
            return stack_weights(experts, len(matrices))
        parts = {part: self._read_together(of_part) for part, of_part in names.items()}
        self._staged.flush()
        shape = (len(matrices), len(matrices[0]) * first.shape[0])
        values, scales = parts["values"].view(torch.uint8).reshape(*shape, -1), parts["scales"]
        self._check_scales(scales, names["scales"], zero=first.kind != "int8")
        match first.kind:
            case "int8":
                return Int8Weight(values, scales.float().expand(-1, first.shape[0]).reshape(shape).contiguous())
            case "fp8":
                self._check_codes(values, names["values"])
                # One scale for each row, or one for all.
                return Fp8Weight(values, scales.float().expand(-1, first.shape[0]).reshape(shape).contiguous())
            case "int4":
                return Int4Weight(values, scales.reshape(*shape, -1))
            case "nvfp4" | "nvfp4-modelopt":
                self._check_scales(parts["global_scales"], names["global_scales"], zero=False)
                global_scales = parts["global_scales"].reshape(len(matrices), -1)
                divides = first.kind == "nvfp4"
                return Nvfp4Weight(values, scales.view(torch.uint8).reshape(*shape, -1), global_scales, divides)
        raise KeyError(first.kind)

    def _are_alike(self, names: Sequence[str]) -> bool:
        tensors = [self._files.info.tensors[name] for name in names]
        return len({(tensor.dtype, tensor.nbytes) for tensor in tensors}) == 1

    def _read_together(self, names: Sequence[str]) -> Tensor:
        """Tensors of one dtype and size, [tensors, elements], as stored. After a flush."""
        first = self._files.info.tensors[names[0]]
        dtype = _DTYPES[first.dtype]
        together = torch.empty(len(names), first.nbytes // dtype.itemsize, dtype=dtype, device=self._device)
        for name, target in zip(names, together, strict=True):
            self._staged.copy(name, target)
        return together

    # What is right is counted on the device, piece by piece, so that the intermediate values stay small.

    def _check_finite(self, values: Tensor, names: Sequence[str]) -> None:
        self._staged.flush()
        fine = [piece.isfinite().all() for _, piece in _pieces(values)]
        self._note(fine, WeightReader.tensor, names)

    def _check_codes(self, values: Tensor, names: Sequence[str]) -> None:
        """e4m3 has one NaN of each sign, all bits of exponent and mantissa set."""
        fine = [((piece & 0x7F) != 0x7F).all() for _, piece in _pieces(values)]
        self._note(fine, lambda mapped, name: mapped.codes(name, check_nan=True), names)

    def _check_scales(self, scales: Tensor, names: Sequence[str], zero: bool = True) -> None:
        fine = []
        for _, piece in _pieces(scales):
            values = piece.float()
            fine.append((values.isfinite() if zero else values.isfinite() & (values != 0)).all())
        self._note(fine, lambda mapped, name: mapped.scales(name, zero), names)

    def _note(self, fine: list[Tensor], find: Callable[[WeightReader, str], object], names: Sequence[str]) -> None:
        if fine:
            self._checks.append((torch.stack(fine).all(), find, names))


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The elements of a contiguous tensor in pieces, each with the number of its first."""
    flat = tensor.view(-1)
    for begin in range(0, flat.numel(), CHUNK_ELEMENTS):
        yield begin, flat[begin : begin + CHUNK_ELEMENTS]
